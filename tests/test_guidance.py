"""Guidance in the pipeline against loops written out by hand: interval and autoguidance."""

import json

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from guided_sampling import (
    DDPM,
    LABELS,
    LATENTS,
    NULL,
    NUM_STEPS,
    by_hand,
    count_rows,
    ddim,
    pipeline,
    predict,
    sample,
    weak_model,
)
from helpers import relative_error, tiny_model, tiny_vae

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, PowerFunctionEMA, normalize_weights_
from diffusers_mp.averages.snapshots import save_snapshots


def noise_levels(scheduler):
    """Closed form at whole timesteps: noise sqrt(1 - a) over signal sqrt(a)."""
    scheduler.set_timesteps(NUM_STEPS)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return ((1 - alphas) / alphas).sqrt().tolist()


class TestInterval:
    def test_formula_inside_and_the_bare_prediction_outside(self):
        pipe, levels = pipeline(), noise_levels(ddim())
        seen = []

        def guide(step, timestep, latents):
            if step not in (1, 2):
                return predict(pipe.transformer, latents, timestep, LABELS)
            both = predict(pipe.transformer, torch.cat([latents, latents]), timestep, torch.cat([LABELS, NULL]))
            conditional, unconditional = both.chunk(2)
            guided = unconditional + 3 * (conditional - unconditional)
            assert ((guided - conditional).abs().amax((0, 2, 3)) > 1e-4).all()  # in every channel
            return guided

        def record(pipe, step, timestep, tensors):
            seen.append(tensors["noise_pred"])
            return {}

        interval = (levels[3], levels[1])
        rows = count_rows(pipe.transformer)
        got = sample(
            pipe,
            guidance_scale=3.0,
            guidance_interval=interval,
            callback_on_step_end=record,
            callback_on_step_end_tensor_inputs=["noise_pred"],
        )
        assert rows == [2, 4, 4, 2, 2]
        assert relative_error(got, by_hand(pipe.transformer, ddim(), guide)) < 1e-5
        # The first step is outside, so it is the prediction of the class to the bit.
        assert torch.equal(seen[0], predict(pipe.transformer, LATENTS, pipe.scheduler.timesteps[0], LABELS))

    def test_no_level_inside_is_no_guidance_and_every_level_is_full_guidance(self):
        pipe = pipeline()
        rows = count_rows(pipe.transformer)
        nowhere = sample(pipe, guidance_scale=3.0, guidance_interval=(1e6, 2e6))
        assert rows == [2] * NUM_STEPS
        assert torch.equal(nowhere, sample(pipe, guidance_scale=1.0))
        everywhere = sample(pipe, guidance_scale=3.0, guidance_interval=[0, float("inf")])
        assert torch.equal(everywhere, sample(pipe, guidance_scale=3.0))
        assert not torch.equal(everywhere, nowhere)

    def test_the_upper_end_is_inside_and_the_lower_is_not(self):
        # Timesteps 4, 3, 2, 1 of 4: the shares 1/2 and 3/4 of a flow are exact, and their noise levels 1 and 3.
        pipe = pipeline(scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=4))
        rows = count_rows(pipe.transformer)
        for interval, expected in (((1, 3), [2, 4, 2, 2]), ((0.9, 2.9), [2, 2, 4, 2]), ((3, 4), [2, 2, 2, 2])):
            rows.clear()
            sample(pipe, guidance_scale=3.0, guidance_interval=interval, num_inference_steps=4)
            assert pipe.scheduler.timesteps.tolist() == [4, 3, 2, 1]
            assert rows == expected

    @pytest.mark.parametrize(
        "scheduler, levels_of",
        [
            (EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02), lambda sigmas: sigmas),
            (
                EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True),
                lambda sigmas: sigmas,
            ),
            (DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02), lambda sigmas: sigmas),
            (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda sigmas: sigmas / (1 - sigmas)),
            (
                DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
                lambda sigmas: sigmas / (1 - sigmas),
            ),
        ],
        ids=["euler", "euler karras", "dpm", "flow", "dpm flow"],
    )
    def test_levels_are_those_of_the_sampler(self, scheduler, levels_of):
        pipe = pipeline(scheduler=scheduler)
        scheduler.set_timesteps(NUM_STEPS)
        levels = levels_of(scheduler.sigmas.double()[:NUM_STEPS]).tolist()
        for inside in ({1}, {0, 1, 2}, {2, 3, 4}):
            # Bounds 1 % beyond the levels inside: closer than any other, farther than timesteps are rounded.
            interval = (0.99 * levels[max(inside)], 1.01 * levels[min(inside)])
            rows = count_rows(pipe.transformer)
            sample(pipe, guidance_scale=3.0, guidance_interval=interval)
            assert rows == [4 if step in inside else 2 for step in range(NUM_STEPS)]

    def test_learned_variance_is_that_of_the_class(self):
        scheduler = DDPMScheduler(**DDPM, variance_type="learned_range")
        pipe = pipeline(tiny_model(out_channels=8).eval(), scheduler)
        levels = noise_levels(DDPMScheduler(**DDPM))

        def guide(step, timestep, latents):
            if step != 2:
                return predict(pipe.transformer, latents, timestep, LABELS)
            both = predict(pipe.transformer, torch.cat([latents, latents]), timestep, torch.cat([LABELS, NULL]))
            (conditional, variance), unconditional = both[:2].split(4, 1), both[2:, :4]
            return torch.cat([unconditional + 3 * (conditional - unconditional), variance], 1)

        interval = (levels[3], levels[2] * 1.01)
        expected = by_hand(pipe.transformer, DDPMScheduler(**DDPM, variance_type="learned_range"), guide)
        got = sample(pipe, guidance_scale=3.0, guidance_interval=interval)
        assert relative_error(got, expected) < 1e-5

    @pytest.mark.parametrize(
        "interval",
        [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (1.0,), (0.0, 1.0, 2.0), (0.0, float("nan")), ("0", "1"), 1.0],
        ids=str,
    )
    def test_not_in_order(self, interval):
        with pytest.raises(
            ValueError, match=r"`guidance_interval` must be two noise levels \(low, high\) with 0 <= low"
        ):
            sample(pipeline(), guidance_interval=interval)

    def test_a_sampler_whose_levels_are_unknown(self):
        pipe = pipeline(scheduler=EDMEulerScheduler())
        with pytest.raises(ValueError, match="`guidance_interval` must be None with a scheduler .* EDMEulerScheduler"):
            sample(pipe, guidance_interval=(0.1, 1.0))


class TestAutoguidance:
    @pytest.mark.parametrize("overrides", [{}, {"patch_size": 4}, {"out_channels": 8}], ids=str)
    def test_formula(self, overrides):
        strong, weak = tiny_model().eval(), weak_model(**overrides)
        pipe = pipeline(strong, guidance_transformer=weak)

        def guide(step, timestep, latents):
            good = predict(strong, latents, timestep, LABELS)
            bad = predict(weak, latents, timestep, LABELS)[:, :4]
            guided = bad + 1.5 * (good - bad)
            assert ((guided - good).abs().amax((0, 2, 3)) > 1e-4).all()
            return guided

        expected = by_hand(strong, ddim(), guide)
        assert relative_error(sample(pipe, guidance_scale=1.5), expected) < 1e-5

    def test_a_model_guided_by_itself_is_not_guided(self):
        transformer = tiny_model().eval()
        guided = sample(pipeline(transformer, guidance_transformer=transformer), guidance_scale=2.5)
        assert torch.equal(guided, sample(pipeline(transformer), guidance_scale=1.0))

    def test_the_null_condition_is_not_asked_for(self):
        pipe, seen = pipeline(guidance_transformer=weak_model()), []
        for transformer in (pipe.transformer, pipe.guidance_transformer):
            transformer.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
            )
        sample(pipe)
        assert seen == [LABELS.tolist()] * 2 * NUM_STEPS
        assert not pipe.do_classifier_free_guidance
        assert pipe.guidance_scale == 2

    @pytest.mark.parametrize("off", [{"guidance_scale": 1.0}, {"guidance_interval": (1e6, 2e6)}], ids=str)
    def test_the_weak_model_rests_where_guidance_is_off(self, off):
        pipe = pipeline(guidance_transformer=weak_model())
        rows = count_rows(pipe.guidance_transformer)
        got = sample(pipe, **off)
        assert rows == []
        assert torch.equal(got, sample(pipeline(pipe.transformer), guidance_scale=1.0))

    @pytest.mark.parametrize("overrides", [{"num_classes": None}, {"class_dropout_prob": 0.0}], ids=str)
    def test_models_without_a_null_condition_are_guided(self, overrides):
        pipe = pipeline(tiny_model(**overrides).eval(), guidance_transformer=weak_model(**overrides))
        labels = None if pipe.transformer.config.num_classes is None else LABELS
        guided, plain = (
            sample(pipe, labels, guidance_scale=scale, num_images_per_class=2 if labels is None else 1)
            for scale in (2.0, 1.0)
        )
        assert (guided - plain).abs().max() > 1e-3

    def test_an_earlier_snapshot(self, tmp_path):
        transformer = tiny_model(open_gains=False)
        ema = PowerFunctionEMA(transformer, (0.1,))
        ema.update(1)
        (snapshot,) = save_snapshots(ema, tmp_path, pipeline(transformer))
        earlier = normalize_weights_(MPDiTTransformer2DModel.from_pretrained(snapshot))
        pipe = pipeline(tiny_model().eval(), guidance_transformer=earlier)
        # Gains at zero: the first update predicts zero, and u + w (c - u) = w c.
        strong = pipe.transformer
        expected = by_hand(strong, ddim(), lambda step, t, latents: 2 * predict(strong, latents, t, LABELS))
        assert relative_error(sample(pipe, guidance_scale=2.0), expected) < 1e-5

    def test_saved_loaded_and_shared(self, tmp_path):
        pipe = pipeline(guidance_transformer=weak_model())
        expected = sample(pipe)
        pipe.save_pretrained(tmp_path)
        assert (tmp_path / "guidance_transformer" / "config.json").is_file()
        again = MPDiTPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert again.guidance_transformer.config.num_layers == 1
        assert torch.equal(sample(again), expected)
        alone = MPDiTPipeline.from_pipe(again, guidance_transformer=None)
        assert alone.transformer is again.transformer
        assert alone.config._name_or_path == tmp_path
        assert alone.guidance_transformer is None
        # A second model for a pipeline that was published without one
        pipeline().save_pretrained(tmp_path / "plain")
        index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
        assert index["guidance_transformer"] == [None, None]
        with_second = MPDiTPipeline.from_pretrained(tmp_path / "plain", guidance_transformer=pipe.guidance_transformer)
        with_second.set_progress_bar_config(disable=True)
        assert torch.equal(sample(with_second), expected)

    def test_a_folder_written_before_there_was_guidance_loads(self, tmp_path):
        pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        del index["guidance_transformer"], index["guider"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        pipe = MPDiTPipeline.from_pretrained(tmp_path)
        assert pipe.guidance_transformer is None
        assert pipe.guider is None

    def test_model_offload(self):
        pipe = pipeline(vae=tiny_vae(), guidance_transformer=weak_model())
        expected = sample(pipe, output_type="pt")
        # The only device here; the hooks that move parts to and fro are real.
        pipe.enable_model_cpu_offload(device="cpu")
        assert hasattr(pipe.guidance_transformer, "_hf_hook")
        for _ in range(2):
            assert torch.equal(sample(pipe, output_type="pt"), expected)

    def test_parts_of_different_dtypes(self):
        pipe = pipeline(guidance_transformer=weak_model())
        expected = sample(pipe)
        pipe.guidance_transformer.to(torch.bfloat16)
        got = sample(pipe)
        assert got.dtype == torch.float32
        assert 0 < relative_error(got, expected) < 0.05

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"in_channels": 3}, "whose `in_channels` is 4; got 3"),
            ({"num_classes": 7}, "whose `num_classes` is 10; got 7"),
            ({"num_classes": None}, "whose `num_classes` is 10; got None"),
            ({"sample_size": 16}, "whose `sample_size` is 8; got 16"),
            ({"pooled_projection_dim": 6}, "whose `pooled_projection_dim` is None; got 6"),
        ],
        ids=str,
    )
    def test_another_task(self, overrides, message):
        other = weak_model(**overrides)
        with pytest.raises(ValueError, match=f"`guidance_transformer` must be of the task .* {message}"):
            pipeline(guidance_transformer=other)
        pipe = pipeline()
        pipe.guidance_transformer = other
        with pytest.raises(ValueError, match=f"`guidance_transformer` must be of the task .* {message}"):
            sample(pipe)

    def test_a_stock_transformer(self):
        stock = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
        with pytest.raises(TypeError, match="`guidance_transformer` must be an MPDiTTransformer2DModel"):
            pipeline(guidance_transformer=stock)

    def test_sizes_are_multiples_of_both_patches(self):
        pipe = pipeline(guidance_transformer=weak_model(patch_size=4))
        with pytest.raises(ValueError, match=r"positive multiples of 4 .* got 8 x 6"):
            sample(pipe, height=8, width=6, latents=None)

    def test_negative_vectors(self):
        overrides = {"num_classes": None, "pooled_projection_dim": 6}
        pipe = pipeline(tiny_model(**overrides).eval(), guidance_transformer=weak_model(**overrides))
        vectors = torch.randn(2, 6)
        assert sample(pipe, None, pooled_projections=vectors).shape == LATENTS.shape
        with pytest.raises(ValueError, match="`negative_pooled_projections` must be None in a pipeline with a `guid"):
            sample(pipe, None, pooled_projections=vectors, negative_pooled_projections=vectors)
