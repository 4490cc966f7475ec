"""Condition vectors beside or instead of class labels: model and pipeline."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from helpers import tiny_inputs, tiny_model
from processes import run_python

from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel, normalize_weights_, parameter_groups


P = 12
BESIDE, INSTEAD = {}, {"num_classes": None}


def model_and_inputs(configuration="E", batch_size=4, **overrides):
    model = tiny_model(configuration, pooled_projection_dim=P, **overrides).eval()
    inputs = tiny_inputs(batch_size=batch_size)
    if overrides.get("num_classes", 10) is None:
        del inputs["class_labels"]
    inputs["pooled_projections"] = torch.randn(batch_size, P, generator=torch.Generator().manual_seed(3))
    return model, inputs


@torch.no_grad()
def forward(model, inputs):
    return model(**inputs).sample


@pytest.mark.parametrize("overrides", [BESIDE, INSTEAD], ids=["beside", "instead"])
@pytest.mark.parametrize("configuration", "ABCDEF")
def test_every_configuration_learns_from_it(configuration, overrides):
    model, inputs = model_and_inputs(configuration, **overrides)
    # One of them stands for no condition, so that both ways are taken.
    inputs["pooled_projections"][0] = 0
    model.train()
    model(**inputs).sample.square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not [name for name in missing if "class_embedder" not in name]


@pytest.mark.parametrize("overrides", [BESIDE, INSTEAD], ids=["beside", "instead"])
def test_the_conditioning_is_an_equal_sum_at_rms_1(overrides):
    model, inputs = model_and_inputs(**overrides)
    embedder = model.conditioning_embedder
    pooled = embedder.pooled_embedder(inputs["pooled_projections"], torch.float32)
    parts = [embedder.time_embedder(inputs["timestep"], torch.float32), pooled]
    if "class_labels" in inputs:
        parts.append(embedder.class_embedder(inputs["class_labels"]))
    expected = embedder.act(sum(parts) / math.sqrt(len(parts)))
    received = embedder(inputs["timestep"], inputs.get("class_labels"), inputs["pooled_projections"], torch.float32)
    torch.testing.assert_close(received, expected)


def test_any_scale_of_the_vectors_is_one_condition():
    model, inputs = model_and_inputs()
    expected = forward(model, inputs)
    inputs["pooled_projections"] = 300 * inputs["pooled_projections"]
    torch.testing.assert_close(forward(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_magnitude_of_the_embedding():
    width = 256
    model = tiny_model(num_attention_heads=4, attention_head_dim=width // 4, pooled_projection_dim=768)
    pooled = model.conditioning_embedder.pooled_embedder
    vectors = 5 * torch.randn(400, 768)
    vectors[200:] = 0
    embedding = pooled(vectors, torch.float32).square().mean(dim=-1).sqrt()
    # SiLU keeps RMS 1 in expectation; the rows of two maps are the sample.
    assert abs(embedding[:200].mean() - 1) < 4 / math.sqrt(2 * width)
    torch.testing.assert_close(embedding[200:], torch.ones(200))


def test_zeros_are_the_learned_null_embedding():
    model, inputs = model_and_inputs()
    pooled = model.conditioning_embedder.pooled_embedder
    inputs["pooled_projections"][1] = 0
    embedding = pooled(inputs["pooled_projections"], torch.float32)
    null = pooled.null_embedder.weight[0]
    assert [torch.equal(row, null) for row in embedding] == [False, True, False, False]


def test_bf16_and_one_graph():
    model, inputs = model_and_inputs()
    inputs["pooled_projections"][1] = 0
    expected = forward(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(compiled, inputs), expected)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    half = forward(model.to(torch.bfloat16), inputs)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


def test_forced_rows_and_rates():
    model, inputs = model_and_inputs()
    model.train()
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
    model(**inputs).sample.square().mean().backward()
    optimizer.step()
    normalize_weights_(model)
    pooled = model.conditioning_embedder.pooled_embedder
    for layer, norm in ((pooled.linear_1, 1), (pooled.linear_2, 1), (pooled.null_embedder, math.sqrt(32))):
        torch.testing.assert_close(layer.weight.norm(dim=-1), torch.full((len(layer.weight),), float(norm)))


def test_a_fresh_process_reloads_it(tmp_path):
    model, inputs = model_and_inputs()
    model.save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs, "output": forward(model, inputs)}, tmp_path / "expected.pt")
    run_python(f"""
    import torch
    from diffusers_mp import MPDiTTransformer2DModel
    model = MPDiTTransformer2DModel.from_pretrained({str(tmp_path / "model")!r})
    expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(**expected["inputs"]).sample, expected["output"])
    """)


@pytest.mark.parametrize(
    "overrides, change, message",
    [
        ({"pooled_projection_dim": 0}, None, "`pooled_projection_dim` must be an integer of .*, or None, got 0"),
        ({}, {"pooled_projections": None}, r"of shape \(4, 12\) for a model with .*=12`, got None: a vector of zeros"),
        ({"pooled_projection_dim": None}, {}, "`pooled_projections` must be None for a model with .*=None"),
        ({}, {"pooled_projections": torch.zeros(4, 3)}, r"of shape \(4, 12\) .*, got torch.float32 of shape \(4, 3\)"),
        ({}, {"pooled_projections": torch.zeros(4, P).long()}, r"floating point .*, got torch.int64 of shape"),
    ],
)
def test_errors(overrides, change, message):
    _, inputs = model_and_inputs()
    with pytest.raises(ValueError, match=message):
        forward(tiny_model(**{"pooled_projection_dim": P, **overrides}), {**inputs, **(change or {})})


# The pipeline


def pipeline(**overrides):
    model, _ = model_and_inputs(**overrides)
    pipe = MPDiTPipeline(transformer=model, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vectors(count, seed=5):
    return torch.randn(count, P, generator=torch.Generator().manual_seed(seed))


def sample(pipe, **arguments):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    count = arguments.pop("count", 2)
    return pipe(num_inference_steps=3, output_type="latent", latents=latents[:count], **arguments).images


@pytest.mark.parametrize("overrides", [BESIDE, INSTEAD], ids=["beside", "instead"])
def test_images_follow_their_own_vectors(overrides):
    pipe = pipeline(**overrides)
    labels = {"class_labels": [1, 2]} if not overrides else {}
    images = sample(pipe, pooled_projections=vectors(2), guidance_scale=3.0, **labels)
    other = vectors(2)
    other[1] = vectors(1, seed=9)[0]
    changed = sample(pipe, pooled_projections=other, guidance_scale=3.0, **labels)
    torch.testing.assert_close(changed[0], images[0])
    assert (changed[1] - images[1]).abs().max() > 1e-3


def test_guidance_by_hand():
    pipe = pipeline(**INSTEAD)
    x, pooled = torch.randn(2, 4, 8, 8), vectors(2)
    seen = []
    pipe.scheduler.set_timesteps(3)

    def keep(pipe, step, timestep, tensors):
        seen.append((timestep, tensors["noise_pred"]))
        return {}

    pipe(
        pooled_projections=pooled,
        guidance_scale=3.0,
        num_inference_steps=3,
        latents=x,
        output_type="latent",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["noise_pred"],
    )
    timestep, guided = seen[0]
    predictions = [
        forward(
            pipe.transformer,
            {"hidden_states": x, "timestep": timestep.expand(2), "pooled_projections": condition},
        )
        for condition in (pooled, torch.zeros_like(pooled))
    ]
    torch.testing.assert_close(guided, predictions[1] + 3 * (predictions[0] - predictions[1]), rtol=1e-4, atol=1e-5)


def test_zeros_are_the_default_negative_and_one_serves_all():
    pipe = pipeline(**INSTEAD)
    arguments = {"pooled_projections": vectors(2), "guidance_scale": 3.0}
    images = sample(pipe, **arguments)
    torch.testing.assert_close(sample(pipe, negative_pooled_projections=torch.zeros(1, P), **arguments), images)
    negative = vectors(1, seed=11)
    away = sample(pipe, negative_pooled_projections=negative, **arguments)
    assert (away - images).abs().max() > 1e-3
    torch.testing.assert_close(sample(pipe, negative_pooled_projections=negative.expand(2, -1), **arguments), away)


def test_several_images_of_each_vector_follow_each_other():
    pipe = pipeline(**INSTEAD)
    images = sample(pipe, pooled_projections=vectors(2), num_images_per_class=2, count=4, guidance_scale=1.0)
    repeated = vectors(2).repeat_interleave(2, dim=0)
    torch.testing.assert_close(sample(pipe, pooled_projections=repeated, count=4, guidance_scale=1.0), images)


def test_it_is_guided_by_default_if_conditions_were_dropped():
    pipe = pipeline(**INSTEAD)
    default = sample(pipe, pooled_projections=vectors(2))
    torch.testing.assert_close(default, sample(pipe, pooled_projections=vectors(2), guidance_scale=4.0))
    pipe = pipeline(**INSTEAD, class_dropout_prob=0.0)
    default = sample(pipe, pooled_projections=vectors(2))
    torch.testing.assert_close(default, sample(pipe, pooled_projections=vectors(2), guidance_scale=1.0))
    with pytest.raises(ValueError, match="never seen the null condition"):
        sample(pipe, pooled_projections=vectors(2), guidance_scale=2.0)


@pytest.mark.parametrize(
    "overrides, arguments, message",
    [
        (INSTEAD, {}, r"`pooled_projections` must be given: vectors of shape \(N, 12\)"),
        (INSTEAD, {"pooled_projections": torch.zeros(P)}, r"must be a tensor of shape \(N, 12\), got \(12,\)"),
        (INSTEAD, {"pooled_projections": [[0.0] * P]}, r"must be a tensor of shape \(N, 12\), got list"),
        (INSTEAD, {"pooled_projections": torch.zeros(2, 3)}, r"must be a tensor of shape \(N, 12\), got \(2, 3\)"),
        (
            {"pooled_projection_dim": None},
            {"class_labels": 1, "pooled_projections": torch.zeros(1, P)},
            "`pooled_projections` must be None for a transformer with `pooled_projection_dim=None`",
        ),
        (BESIDE, {"class_labels": [1, 2], "pooled_projections": torch.zeros(1, P)}, "of equal number, got 2 and 1"),
        (
            INSTEAD,
            {"pooled_projections": torch.zeros(2, P), "negative_pooled_projections": torch.zeros(3, P)},
            "`negative_pooled_projections` must be 1 or 2 vectors, got 3",
        ),
        (
            INSTEAD,
            {
                "pooled_projections": torch.zeros(2, P),
                "negative_pooled_projections": torch.zeros(1, P),
                "guidance_scale": 1.0,
            },
            "must be None with `guidance_scale=1`",
        ),
    ],
)
def test_errors_of_the_pipeline(overrides, arguments, message):
    model = tiny_model(**{"pooled_projection_dim": P, **overrides})
    pipe = MPDiTPipeline(transformer=model, scheduler=DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=2, **arguments)


def test_the_class_is_the_public_one():
    assert type(tiny_model(pooled_projection_dim=P)) is MPDiTTransformer2DModel
