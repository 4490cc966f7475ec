"""The pipeline on small real components: a tiny AutoencoderKL, real schedulers, a tiny transformer."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from helpers import tiny_model, tiny_vae
from processes import run_python

from diffusers_mp import MPDiTPipeline


NAMES = [
    "tench",
    "goldfish",
    "white shark, man-eater",
    "crane",
    "golden retriever",
    "cup",
    "crane",
    "a, b",
    "ten",
    "9",
]
MEAN, STD = [0.5, -1.0, 0.0, 2.0], [1.0, 0.5, 2.0, 3.0]


LINEAR = {"beta_start": 1e-4, "beta_end": 0.02}


def ddpm(variance_type="learned_range", **kwargs):
    return DDPMScheduler(**LINEAR, variance_type=variance_type, clip_sample=False, **kwargs)


def tiny_pipeline(scheduler=None, vae=True, **overrides):
    transformer = tiny_model(**{"out_channels": 8, **overrides}).eval()
    num_classes = transformer.config.num_classes
    pipe = MPDiTPipeline(
        transformer,
        scheduler or ddpm(),
        tiny_vae() if vae else None,
        id2label=dict(enumerate(NAMES)) if num_classes == len(NAMES) else None,
        latents_mean=MEAN,
        latents_std=STD,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, class_labels=(1, 4), seed=0, **kwargs):
    kwargs = {"num_inference_steps": 3, "generator": torch.manual_seed(seed), "output_type": "pt", **kwargs}
    return pipe(None if class_labels is None else list(class_labels), **kwargs).images


class TestLabels:
    def test_ids_names_and_synonyms(self):
        pipe = tiny_pipeline()
        assert pipe.get_label_ids([7, "golden retriever", "white shark", "man-eater", "white shark, man-eater"]) == [
            7,
            4,
            2,
            2,
            2,
        ]
        assert pipe.get_label_ids("goldfish") == [1]
        assert pipe.get_label_ids(3) == [3]
        assert pipe.get_label_ids(np.int64(3)) == [3]
        assert pipe.get_label_ids(torch.tensor([2, 0])) == [2, 0]
        assert pipe.get_label_ids(np.array([2, 0])) == [2, 0]
        assert pipe.get_label_ids(np.array(3)) == [3]

    def test_a_string_is_a_name_even_if_it_looks_like_an_id(self):
        assert tiny_pipeline().get_label_ids("9") == [9]
        with pytest.raises(ValueError, match="unknown name '3'"):
            tiny_pipeline().get_label_ids("3")

    def test_ambiguous_name_raises_with_its_ids(self):
        with pytest.raises(ValueError, match=r"ambiguous name 'crane'; use one of its ids: \[3, 6\]"):
            tiny_pipeline().get_label_ids(["crane"])

    def test_unknown_name_suggests(self):
        with pytest.raises(ValueError, match="unknown name 'goldfisch'. Did you mean 'goldfish'"):
            tiny_pipeline().get_label_ids("goldfisch")

    @pytest.mark.parametrize("label", [-1, 10])
    def test_id_out_of_range(self, label):
        # 10 is the null id, which is no class to ask for.
        with pytest.raises(ValueError, match=rf"ids in \[0, 9\] or names, got {label}"):
            tiny_pipeline().get_label_ids(label)

    @pytest.mark.parametrize("label", [1.0, True, None])
    def test_neither_id_nor_name(self, label):
        with pytest.raises(ValueError, match=r"must be ids \(int\) or names \(str\)"):
            tiny_pipeline().get_label_ids([label])

    def test_name_without_id2label(self):
        with pytest.raises(ValueError, match="no `id2label`"):
            tiny_pipeline(num_classes=7).get_label_ids("goldfish")


class TestCall:
    @pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
    def test_output_types(self, output_type):
        images = sample(tiny_pipeline(), [1, "golden retriever"], output_type=output_type)
        assert len(images) == 2
        if output_type == "pil":
            assert all(isinstance(image, PIL.Image.Image) and image.size == (32, 32) for image in images)
        elif output_type == "np":
            assert images.shape == (2, 32, 32, 3)
            assert 0 <= images.min() <= images.max() <= 1
        else:
            assert images.shape == ((2, 3, 32, 32) if output_type == "pt" else (2, 4, 8, 8))

    def test_tuple(self):
        pipe = tiny_pipeline()
        (images,) = pipe([1], num_inference_steps=2, output_type="pt", return_dict=False)
        assert images.shape == (1, 3, 32, 32)

    def test_images_per_class_follow_each_other(self):
        pipe, latents = tiny_pipeline(), torch.randn(4, 4, 8, 8)
        together = sample(pipe, [1, 4], num_images_per_class=2, latents=latents, generator=torch.manual_seed(0))
        one_by_one = sample(pipe, [1, 1, 4, 4], latents=latents, generator=torch.manual_seed(0))
        assert torch.equal(together, one_by_one)

    def test_non_square_output(self):
        assert sample(tiny_pipeline(), height=24, width=48).shape == (2, 3, 24, 48)

    def test_generator_list_makes_an_image_depend_on_its_own_seed_only(self):
        pipe = tiny_pipeline()
        both = sample(pipe, [1, 4], generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)])
        second = sample(pipe, [4], generator=[torch.Generator().manual_seed(6)])
        assert torch.allclose(both[1], second[0], atol=1e-5)

    def test_latents_are_noise_of_rms_1(self):
        pipe = tiny_pipeline(EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02))
        latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))
        given = sample(pipe, [1], latents=latents)
        drawn = sample(pipe, [1], seed=3)
        assert torch.equal(given, drawn)

    def test_pixel_space(self):
        pipe = tiny_pipeline(vae=False)
        pixels, latents = sample(pipe), sample(pipe, output_type="latent")
        expected = latents * torch.tensor(STD).view(1, 4, 1, 1) + torch.tensor(MEAN).view(1, 4, 1, 1)
        assert torch.allclose(pixels, (expected / 2 + 0.5).clamp(0, 1))

    def test_grey_images_come_as_pil(self):
        pipe = MPDiTPipeline(tiny_model(in_channels=1, out_channels=2).eval(), ddpm())
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(3, num_inference_steps=2).images
        assert image.mode == "L"

    def test_unconditional(self):
        pipe = tiny_pipeline(num_classes=None)
        assert sample(pipe, None, num_images_per_class=3).shape == (3, 3, 32, 32)

    def test_progress_bar(self, capfd):
        pipe = tiny_pipeline()
        pipe.set_progress_bar_config(disable=False)
        sample(pipe)
        assert "3/3" in capfd.readouterr().err

    def test_guidance_is_the_formula_on_all_channels(self):
        pipe = tiny_pipeline(vae=False)
        seen = []

        def record(pipe, step, timestep, tensors):
            seen.append(tensors["noise_pred"])
            return tensors

        latents = torch.randn(1, 4, 8, 8)
        predictions = {}
        for scale in (0.0, 1.0, 3.0):
            seen.clear()
            sample(
                pipe,
                [2],
                latents=latents,
                guidance_scale=scale,
                callback_on_step_end=record,
                callback_on_step_end_tensor_inputs=["noise_pred"],
            )
            predictions[scale] = seen[0]
        eps = {scale: prediction[:, :4] for scale, prediction in predictions.items()}
        assert torch.allclose(eps[3.0], eps[0.0] + 3 * (eps[1.0] - eps[0.0]), atol=1e-5)
        # Guidance changes every channel, and none of the variance, which is that of the class.
        assert ((eps[3.0] - eps[1.0]).abs().amax((0, 2, 3)) > 1e-4).all()
        assert torch.allclose(predictions[3.0][:, 4:], predictions[1.0][:, 4:], atol=1e-5)

    def test_unconditional_half_is_the_null_class(self):
        pipe = tiny_pipeline(vae=False, class_dropout_prob=0.1)
        labels = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: labels.append(kwargs["class_labels"]), with_kwargs=True
        )
        sample(pipe, [2, 5], guidance_scale=2.0)
        handle.remove()
        assert labels[0].tolist() == [2, 5, 10, 10]

    def test_default_guidance(self):
        pipe = tiny_pipeline()
        sample(pipe)
        assert pipe.guidance_scale == 4
        pipe = tiny_pipeline(class_dropout_prob=0.0)
        sample(pipe)
        assert pipe.guidance_scale == 1
        assert not pipe.do_classifier_free_guidance

    def test_callback_replaces_latents_and_interrupts(self):
        pipe, steps = tiny_pipeline(), []

        def stop(pipe, step, timestep, tensors):
            steps.append(step)
            pipe._interrupt = step == 1
            return {"latents": torch.zeros_like(tensors["latents"])}

        latents = sample(pipe, num_inference_steps=5, output_type="latent", callback_on_step_end=stop)
        assert steps == [0, 1]
        assert not latents.any()
        assert pipe.num_timesteps == 5


class TestSchedulers:
    def test_ddpm_gets_the_learned_variance(self):
        pipe, shapes = tiny_pipeline(), []

        def record(pipe, step, timestep, tensors):
            shapes.append(tensors["noise_pred"].shape[1])
            return tensors

        kwargs = {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": ["noise_pred"]}
        sample(pipe, **kwargs)
        pipe.scheduler = ddpm("fixed_small")
        sample(pipe, **kwargs)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        sample(pipe, **kwargs)
        assert shapes == [8, 8, 8, 4, 4, 4, 4, 4, 4]

    @pytest.mark.parametrize(
        "scheduler_class",
        [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler],
    )
    def test_others_from_the_same_config_get_the_noise_alone(self, scheduler_class):
        pipe = tiny_pipeline()
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
        stored = dict(pipe.scheduler.config)
        images = sample(pipe)
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, variance_type="fixed_small")
        assert torch.equal(images, sample(pipe))
        # The registered scheduler is left as the user made it.
        assert stored.get("variance_type") in (None, "learned_range")

    def test_registered_scheduler_keeps_its_config(self):
        pipe = tiny_pipeline()
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        sample(pipe)
        assert pipe.scheduler.config.variance_type == "learned_range"

    @pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
    def test_flow_matching_is_the_scheduler_step_on_guided_float_timesteps(self, scheduler_class):
        pipe, asked = tiny_pipeline(scheduler_class(shift=2.0), vae=False, class_dropout_prob=0.1), []
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append((args[0].clone(), kwargs["timestep"].clone())), with_kwargs=True
        )
        latents = torch.randn(2, 4, 8, 8)
        images = sample(pipe, [2, 5], latents=latents, guidance_scale=2.0, output_type="latent")
        reference = scheduler_class(shift=2.0)
        reference.set_timesteps(3)
        assert len(asked) == len(reference.timesteps)
        transformer = pipe.transformer
        for (hidden_states, timesteps), timestep in zip(list(asked), reference.timesteps, strict=True):
            assert timesteps.dtype == torch.float32
            assert torch.equal(timesteps, timestep.expand(4))
            assert torch.equal(hidden_states, torch.cat([latents, latents]))
            with torch.no_grad():
                prediction = transformer(
                    torch.cat([latents, latents]), timestep=timesteps, class_labels=torch.tensor([2, 5, 10, 10])
                ).sample[:, :4]
            guided = torch.lerp(prediction[2:], prediction[:2], 2.0)
            latents = reference.step(guided, timestep, latents).prev_sample
        assert torch.equal(images, latents)

    def test_learned_variance_schedule_needs_a_transformer_that_predicts_it(self):
        with pytest.raises(ValueError, match="`scheduler` must have variance_type 'fixed_small'"):
            sample(tiny_pipeline(out_channels=None))


class TestErrors:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"height": 30}, "`height` and `width` must be ints, positive multiples of 8 .* got 30 x 32"),
            ({"width": 0}, "got 32 x 0"),
            ({"num_images_per_class": 0}, "`num_images_per_class` must be an int of at least 1, got 0"),
            ({"num_images_per_class": 1.5}, "`num_images_per_class` must be an int of at least 1, got 1.5"),
            ({"num_inference_steps": 0}, "`num_inference_steps` must be an int of at least 1, got 0"),
            ({"height": 16.0}, "got 16.0 x 32"),
            ({"class_labels": None}, "`class_labels` must be given"),
            ({"class_labels": []}, r"a label or a non-empty list of labels, got \[\]"),
            ({"output_type": "jpg"}, "`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"),
            (
                {"latents": torch.zeros(1, 4, 8, 8)},
                r"`latents` must be a tensor of shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)",
            ),
            ({"generator": [torch.Generator()]}, "one for each of the 2 images, got 1"),
            ({"callback_on_step_end_tensor_inputs": ["x"]}, r"must be a list of names out of .* got \['x'\]"),
        ],
    )
    def test_call(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            sample(tiny_pipeline(), **kwargs)

    def test_guidance_without_label_dropout(self):
        with pytest.raises(ValueError, match=r"trained without dropping conditions .* got 2"):
            sample(tiny_pipeline(class_dropout_prob=0.0), guidance_scale=2.0)

    def test_unconditional(self):
        pipe = tiny_pipeline(num_classes=None)
        with pytest.raises(ValueError, match="`class_labels` must be None for a transformer without classes"):
            sample(pipe, [1])
        with pytest.raises(ValueError, match="`guidance_scale` must be 1 for an unconditional"):
            sample(pipe, None, guidance_scale=2.0)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"vae": tiny_vae(latent_channels=3)}, r"as many latent channels .* \(4\), got 3"),
            ({"latents_mean": MEAN}, "must be given together, got only `latents_mean`"),
            ({"latents_mean": [0.0], "latents_std": STD}, "`latents_mean` must have one value .* got 1"),
            ({"latents_mean": MEAN, "latents_std": [1.0, 0.0, 2.0, 3.0]}, "`latents_std` must hold positive .* got"),
            ({"latents_mean": MEAN, "latents_std": [1.0, -1.0, 2.0, 3.0]}, "`latents_std` must hold positive numbers"),
            ({"latents_mean": MEAN, "latents_std": [1.0, float("nan"), 2.0, 3.0]}, "`latents_std` must hold positive"),
            ({"latents_mean": MEAN, "latents_std": [1.0, None, 2.0, 3.0]}, "`latents_std` must hold positive numbers"),
            ({"latents_mean": [float("inf"), 0, 0, 0], "latents_std": STD}, "`latents_mean` must hold finite numbers"),
            ({"latents_mean": "0000", "latents_std": STD}, "`latents_mean` must have one value .* got 0000"),
            ({"id2label": {0: "a"}}, r"`id2label` must name the ids 0 to 9 .* got 1 ids"),
        ],
    )
    def test_components_that_do_not_fit(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            MPDiTPipeline(tiny_model(), ddpm("fixed_small"), **kwargs)


class TestSaving:
    def test_fresh_process_gives_the_same_images_bit_for_bit(self, tmp_path):
        pipe = tiny_pipeline()
        images = sample(pipe, ["golden retriever", 1], output_type="np")
        pipe.save_pretrained(tmp_path / "pipe")
        program = (
            "import sys, numpy, torch\n"
            "torch.set_num_threads(1)\n"  # as here: sums of another order differ in their last digit
            "from diffusers_mp import MPDiTPipeline\n"
            "pipe = MPDiTPipeline.from_pretrained(sys.argv[1])\n"
            "images = pipe(['golden retriever', 1], num_inference_steps=3, generator=torch.manual_seed(0),"
            " output_type='np').images\n"
            "numpy.save(sys.argv[2], images)\n"
        )
        run_python(program, tmp_path / "pipe", tmp_path / "images.npy")
        assert np.array_equal(np.load(tmp_path / "images.npy"), images)

    def test_everything_needed_travels(self, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["transformer"] == ["diffusers_mp", "MPDiTTransformer2DModel"]
        assert index["id2label"]["4"] == "golden retriever"
        pipe = MPDiTPipeline.from_pretrained(tmp_path)
        assert pipe.id2label == dict(enumerate(NAMES))
        assert (pipe.config.latents_mean, pipe.config.latents_std) == (MEAN, STD)
        assert not list(tmp_path.rglob("*.bin"))

    def test_saving_again_changes_nothing(self, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path / "a")
        MPDiTPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        a, b = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in "ab")
        assert {k: v for k, v in a.items() if k != "_name_or_path"} == {
            k: v for k, v in b.items() if k != "_name_or_path"
        }

    @pytest.mark.parametrize(
        "scheduler",
        [FlowMatchEulerDiscreteScheduler(shift=2.0), ddpm(prediction_type="v_prediction")],
        ids=["flow", "v"],
    )
    def test_the_scheduler_travels_without_a_word(self, scheduler, tmp_path, caplog):
        pipe = tiny_pipeline(scheduler, vae=False)
        pipe.save_pretrained(tmp_path)
        loaded = MPDiTPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is type(scheduler)
        assert loaded.scheduler.config.get("prediction_type") == scheduler.config.get("prediction_type")
        assert torch.equal(sample(pipe), sample(loaded))
        assert not caplog.records

    def test_no_vae(self, tmp_path):
        tiny_pipeline(vae=False).save_pretrained(tmp_path)
        pipe = MPDiTPipeline.from_pretrained(tmp_path)
        assert pipe.vae is None
        assert pipe.vae_scale_factor == 1

    def test_loading_with_the_base_class_says_which_class_is_missing(self, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path)
        with pytest.raises(AttributeError, match="has no attribute MPDiTPipeline"):
            DiffusionPipeline.from_pretrained(tmp_path)

    def test_scaling_factor_of_the_vae_without_statistics(self):
        pipe = MPDiTPipeline(tiny_model().eval(), ddpm("fixed_small"), tiny_vae())
        pipe.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
        latents = torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            assert torch.equal(pipe.decode_latents(latents), pipe.vae.decode(latents / 0.5 + 0.25).sample)

    def test_half_precision_transformer_and_vae(self):
        pipe = tiny_pipeline().to(torch.bfloat16)
        assert sample(pipe, output_type="latent").dtype == torch.float32
        assert sample(pipe).isfinite().all()
