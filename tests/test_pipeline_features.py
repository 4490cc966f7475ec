"""What a user of diffusers does with a pipeline, done with this one."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from helpers import tiny_model, tiny_vae
from peft import LoraConfig
from processes import run_python

from diffusers_mp import MPDiTPipeline


def tiny_pipeline(**overrides):
    pipe = MPDiTPipeline(tiny_model(**overrides).eval(), DDIMScheduler(clip_sample=False), tiny_vae())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, class_labels=(1, 4), seed=0, **arguments):
    generator = [torch.Generator().manual_seed(seed + number) for number in range(len(class_labels))]
    arguments = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 2.0, **arguments}
    return pipe(list(class_labels), generator=generator, **arguments).images


# Memory


def model_offload(pipe):
    # The only device here; the hooks that move parts to and fro are real.
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    # What `enable_sequential_cpu_offload` does; itself it makes "cpu:0" of "cpu", at which Accelerate stumbles.
    for part in (pipe.transformer, pipe.vae):
        cpu_offload(part, torch.device("cpu"))


def group_offload(pipe):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [model_offload, sequential_offload, group_offload])
def test_offloading_changes_nothing(offload):
    pipe = tiny_pipeline()
    expected = sample(pipe)
    offload(pipe)
    assert torch.equal(sample(pipe), expected)
    # And again: hooks are back in place after a call.
    assert torch.equal(sample(pipe), expected)


def test_the_order_of_offloading_names_the_models():
    pipe = tiny_pipeline()
    assert pipe.model_cpu_offload_seq.split("->") == ["transformer", "vae"]
    assert {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)} == {
        "transformer",
        "vae",
    }


@pytest.mark.parametrize("how", ["slicing", "tiling"])
def test_sliced_and_tiled_decoding(how):
    pipe = tiny_pipeline()
    expected, calls = sample(pipe), []
    decode = pipe.vae.decoder.forward
    pipe.vae.decoder.forward = lambda latents: calls.append(latents.shape) or decode(latents)
    getattr(pipe.vae, f"enable_{how}")()
    got = sample(pipe)
    if how == "slicing":
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert [shape[0] for shape in calls] == [1, 1]
    calls.clear()
    pipe.vae.tile_latent_min_size = 4
    pipe.vae.tile_sample_min_size = 16
    assert sample(pipe).shape == expected.shape
    assert (len(calls) > 2) is (how == "tiling")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_different_dtypes(dtype):
    pipe = tiny_pipeline()
    expected = sample(pipe)
    for part in ("vae", "transformer"):
        mixed = copy.deepcopy(pipe)
        getattr(mixed, part).to(dtype)
        got = sample(mixed)
        assert (got.float() - expected).abs().mean() < 0.05


# Other pipelines of the same parts


def test_from_pipe_shares_the_parts_and_keeps_the_settings():
    pipe = MPDiTPipeline(
        tiny_model().eval(),
        DDIMScheduler(clip_sample=False),
        tiny_vae(),
        id2label={id: f"class {id}" for id in range(10)},
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
    )
    other = MPDiTPipeline.from_pipe(pipe, scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))
    assert other.transformer is pipe.transformer
    assert other.vae is pipe.vae
    assert isinstance(other.scheduler, DPMSolverMultistepScheduler)
    assert other.id2label == pipe.id2label
    assert other.config.latents_std == pipe.config.latents_std
    other.set_progress_bar_config(disable=True)
    sampler = MPDiTPipeline(
        **other.components, **{name: pipe.config[name] for name in ("latents_mean", "latents_std")}
    )
    sampler.set_progress_bar_config(disable=True)
    assert torch.equal(sample(other, ["class 3"]), sample(sampler, [3]))


def test_from_pipe_keeps_dtypes():
    pipe = tiny_pipeline().to(torch.bfloat16)
    pipe.vae.to(torch.float16)
    gain = pipe.transformer.output.gain
    gain.data = gain.data.float()  # as parts are that some casting leaves alone
    weak = tiny_model(num_layers=1, seed=7).eval().to(torch.bfloat16)
    other = MPDiTPipeline.from_pipe(pipe, guidance_transformer=weak)
    assert {part.dtype for part in (other.transformer.patch_embed.proj.weight, weak)} == {torch.bfloat16}
    assert (gain.dtype, other.vae.dtype) == (torch.float32, torch.float16)
    exact = MPDiTPipeline.from_pipe(tiny_pipeline().to(torch.bfloat16), dtype=torch.float32)
    assert (exact.transformer.dtype, exact.vae.dtype) == (torch.float32, torch.float32)


def test_from_pipe_of_other_parts():
    stock = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    theirs = DiTPipeline(stock, tiny_vae(), DDIMScheduler(clip_sample=False))
    with pytest.raises(TypeError, match=r"`transformer` must be an MPDiTTransformer2DModel, .* DiTTransformer2DModel"):
        MPDiTPipeline.from_pipe(theirs)
    ours = MPDiTPipeline.from_pipe(theirs, transformer=tiny_model().eval(), id2label=None)
    assert ours.vae is theirs.vae
    with pytest.raises(TypeError, match="must be an MPDiTTransformer2DModel, possibly compiled, got a NoneType"):
        MPDiTPipeline.from_pipe(
            DDIMPipeline(
                UNet2DModel(
                    8,
                    block_out_channels=(32, 32),
                    down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2,
                ),
                DDIMScheduler(),
            )
        )


def test_a_stock_transformer_is_refused_by_name():
    pipe = tiny_pipeline()
    stock = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    pipe.transformer = stock
    with pytest.raises(TypeError, match=r"`transformer` must be an MPDiTTransformer2DModel, .* DiTTransformer2DModel"):
        sample(pipe)
    with pytest.raises(TypeError, match="DiTPipeline"):
        MPDiTPipeline(stock, DDIMScheduler())


def test_a_compiled_or_lora_transformer_is_taken():
    pipe = tiny_pipeline()
    expected = sample(pipe)
    model = pipe.transformer
    pipe.transformer = torch.compile(model, backend="eager")
    torch.testing.assert_close(sample(pipe), expected)
    pipe.transformer = model
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "linear_1"], init_lora_weights=False))
    adapted = sample(pipe)
    assert (adapted - expected).abs().max() > 0.01
    model.fuse_lora()
    torch.testing.assert_close(sample(pipe), adapted, rtol=1e-4, atol=1e-5)
    model.unfuse_lora()
    model.disable_adapters()
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-4, atol=1e-5)


# Saving


@pytest.mark.parametrize("variant", ["fp16", "ema"])
def test_variants_are_saved_and_loaded(variant, tmp_path):
    pipe = tiny_pipeline()
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path, variant=variant)
    assert (tmp_path / "transformer" / f"diffusion_pytorch_model.{variant}.safetensors").is_file()
    again = MPDiTPipeline.from_pretrained(tmp_path, variant=variant)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), expected)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        MPDiTPipeline.from_pretrained(tmp_path)


def test_loading_in_half_precision_in_a_fresh_process(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="30KB")
    printed = run_python(
        """
        import sys, torch
        from diffusers_mp import MPDiTPipeline
        pipe = MPDiTPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
        image = pipe(3, num_inference_steps=2).images[0]
        print(pipe.transformer.dtype, pipe.vae.dtype, image.size)
        """,
        tmp_path,
    )
    assert "torch.bfloat16 torch.bfloat16" in printed


# An image depends on its own seed only


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_batch_invariance(configuration, guidance_scale):
    pipe = tiny_pipeline(configuration=configuration)
    together = sample(pipe, (1, 4, 7), guidance_scale=guidance_scale)
    for number, label in enumerate((1, 4, 7)):
        alone = sample(pipe, (label,), seed=number, guidance_scale=guidance_scale)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-5)


def test_non_square_images():
    pipe = tiny_pipeline()
    factor = pipe.vae_scale_factor
    images = sample(pipe, height=8 * factor, width=12 * factor)
    assert images.shape[-2:] == (8 * factor, 12 * factor)


def test_a_callback_that_changes_latents():
    pipe = tiny_pipeline()

    def mirror(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"].flip(-1)} if step == 2 else {}

    plain = sample(pipe, output_type="latent")
    mirrored = sample(pipe, output_type="latent", callback_on_step_end=mirror)
    assert torch.equal(mirrored, plain.flip(-1))


class Halve(PipelineCallback):
    tensor_inputs = ["noise_pred", "latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        assert callback_kwargs["noise_pred"].shape == callback_kwargs["latents"].shape
        return {"latents": callback_kwargs["latents"] / 2} if step_index == 2 else callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_callbacks_of_diffusers_bring_their_tensors(several):
    callback = MultiPipelineCallbacks([Halve()]) if several else Halve()
    pipe = tiny_pipeline()
    plain = sample(pipe, output_type="latent")
    assert torch.equal(sample(pipe, output_type="latent", callback_on_step_end=callback), plain / 2)


# Guidance changed on the way


def test_a_callback_switches_guidance_on_and_off():
    pipe, rows, scales = tiny_pipeline(), [], iter((3.0, 1.0, 1.0))
    pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def change(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        pipe._guidance_scale = next(scales)

    kept = []
    sample(pipe, guidance_scale=1.0, num_inference_steps=3, callback_on_step_end=change, output_type="latent")
    assert rows == [2, 4, 2]

    def go_on(pipe, step, timestep, tensors):
        expected.append(tensors["latents"])
        return {"latents": kept[step]}

    # The second step is one of sampling at 3.
    expected = []
    sample(pipe, guidance_scale=3.0, num_inference_steps=3, callback_on_step_end=go_on, output_type="latent")
    assert torch.equal(kept[1], expected[1])
    assert not torch.equal(kept[2], expected[2])


def test_a_callback_gets_the_errors_of_a_call():
    def to(scale):
        return lambda pipe, step, timestep, tensors: setattr(pipe, "_guidance_scale", scale)

    untrained = tiny_pipeline(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="trained without dropping conditions .* got 2.0"):
        sample(untrained, guidance_scale=1.0, callback_on_step_end=to(2.0))
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number, got nan"):
        sample(tiny_pipeline(), callback_on_step_end=to(float("nan")))


def test_what_to_guide_away_from_may_wait_for_a_callback():
    pipe = tiny_pipeline(num_classes=None, pooled_projection_dim=6)
    vectors = {"pooled_projections": torch.randn(2, 6), "negative_pooled_projections": torch.ones(1, 6)}
    call = {"num_inference_steps": 3, "output_type": "latent", **vectors}

    def late(scale, negative=None):
        def change(pipe, step, timestep, tensors):
            pipe._guidance_scale = scale

        given = {**call, "negative_pooled_projections": negative}
        generator = torch.Generator().manual_seed(0)
        return pipe(**given, guidance_scale=1.0, callback_on_step_end=change, generator=generator).images

    assert not torch.equal(late(3.0, torch.ones(1, 6)), late(3.0))
    with pytest.raises(ValueError, match="`negative_pooled_projections` must be None with `guidance_scale=1`"):
        pipe(**call, guidance_scale=1.0)
