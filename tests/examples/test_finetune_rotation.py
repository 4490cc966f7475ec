"""Swapping and fine-tuning a small stock DiT on real digits."""

import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from helpers import EXAMPLES
from hub_client import TOKEN, client, holding
from processes import run_processes, run_python
from rotation_runs import WIDTH, arguments, finetune, make_base
from tiny_autoencoders import make, random_images

from diffusers_mp import load_rotation_adapter
from diffusers_mp.data.latents import LatentDataset
from diffusers_mp.training import NonFiniteError, TrainingSamples, split_validation


# Width 16 and conditioning of width 16; five sites: attention and MLP of two blocks, and the last one.
NUM_SITES = 5
SHIFT = WIDTH * (WIDTH + 1)  # weights and biases of a shift
ANGLES = SHIFT // 2


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def held_out_loss(base, transformer, *more):
    """The final loss of a run, computed anew."""
    import finetune_rotation

    args = finetune_rotation.parse_args(arguments(base, base / "never written", *more))
    pipeline = DiTPipeline.from_pretrained(base / "pipeline")
    latents = finetune_rotation.load_latents(args, pipeline, Accelerator(cpu=True))
    _, indices = split_validation(len(latents), args.num_validation_images, args.seed)
    options = finetune_rotation.sample_options(pipeline)
    samples = TrainingSamples(latents, seed=args.seed, indices=indices, **options)
    held_out = finetune_rotation.HeldOut(
        args, samples, finetune_rotation.training_objective(pipeline), torch.device("cpu")
    )
    return held_out.losses(transformer)["loss"]


# Differences of parameters: a shift becomes angles of half its size, and where a mean stays, WIDTH numbers more.
SAVED = NUM_SITES * (SHIFT - ANGLES)
SAVED_WITH_MEAN = SAVED - NUM_SITES * WIDTH
STOCK, SWAPPED = "DiTTransformer2DModel", "RotationDiTTransformer2DModel"


@pytest.mark.parametrize(
    "swap, class_name, saved, options",
    [
        ("none", STOCK, 0, None),
        ("drop", SWAPPED, SAVED, {"keep_shift": False, "mean_shift": False}),
        ("mean", SWAPPED, SAVED_WITH_MEAN, {"keep_shift": False, "mean_shift": True}),
        ("anneal", SWAPPED, SAVED_WITH_MEAN, {"keep_shift": False, "mean_shift": True}),
    ],
)
def test_run_becomes_a_pipeline(base, tmp_path, capsys, swap, class_name, saved, options):
    record = finetune(base, tmp_path / "run", "--swap", swap, "--validation_steps", "2")
    before, after_swap, final = (record[stage] for stage in ("before", "after_swap", "final"))
    said = capsys.readouterr().out
    assert re.findall(r"^(\w+)  ", said, re.MULTILINE) == [
        *("device", "batch", "data", "model", "objective", "updates", "output")
    ]
    assert "60 images, 10 classes: 0 (6), 1 (6), " in said
    assert "; 12 held out, 0 left out" in said
    change = final["loss"] / before["loss"] - 1
    verdict = f"4 updates: loss of held-out images {final['loss']:.4f}, before {before['loss']:.4f} ({change:+.1%})"
    assert f"{verdict}, right after the swap {after_swap['loss']:.4f}" in said
    assert f"Saved the pipeline to {tmp_path / 'run'}\nNext, an image of it: python -c " in said
    assert before["relative_error"] == 0
    if swap in ("none", "anneal"):
        assert after_swap["relative_error"] < 1e-12
        assert after_swap["loss"] == pytest.approx(before["loss"], rel=1e-6)
    else:
        assert after_swap["relative_error"] > 1e-4
    assert final["relative_error"] > 1e-6
    assert record["num_parameters"]["before"] - record["num_parameters"]["after"] == saved
    log = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    curve = {entry["step"]: entry["validation/loss"] for entry in log if "validation/loss" in entry}
    assert list(curve) == [0, 2, 4]
    assert (curve[0], curve[4]) == (after_swap["loss"], final["loss"])
    config = json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    if options is None:
        assert "rotation_modulation" not in config
    else:
        assert options.items() <= config["rotation_modulation"].items()

    transformer = DiTPipeline.from_pretrained(tmp_path / "run").transformer
    assert type(transformer).__name__ == class_name
    assert held_out_loss(base, transformer) == pytest.approx(final["loss"], rel=1e-6)


def test_pinned_weights_keep_the_norms_they_had_after_the_swap(base, tmp_path, capsys):
    more = ("--swap", "mean", "--adam_weight_decay", "0.1", "--pin_weight_norms", "row")
    finetune(base, tmp_path / "run", *more)
    said = capsys.readouterr().out
    assert "rows that were zero are free: transformer_blocks.*.norm1.linear.rotation.weight (" in said
    before = DiTPipeline.from_pretrained(base / "pipeline").transformer
    transformer = DiTPipeline.from_pretrained(tmp_path / "run").transformer
    for name, weight in before.named_parameters():
        if weight.ndim > 1 and "norm1.linear" not in name and "proj_out_1" not in name:
            trained = transformer.get_parameter(name)
            torch.testing.assert_close(
                trained.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=4e-6, atol=0
            )
            assert not torch.equal(trained, weight), name
    assert all(torch.count_nonzero(site.rotation.weight) for site in rotation_sites(transformer))


def test_it_loads_where_nothing_but_the_package_is_known(base, tmp_path):
    finetune(base, tmp_path / "run", "--swap", "mean")
    code = """
        import sys, torch, diffusers_mp
        from diffusers import DiTPipeline
        torch.set_num_threads(1)
        pipeline = DiTPipeline.from_pretrained(sys.argv[1])
        assert pipeline.labels["7"] == 7, pipeline.labels
        assert len(pipeline([3, 7], guidance_scale=1.0, num_inference_steps=2).images) == 2
        torch.manual_seed(0)
        x, timestep, label = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 900]), torch.tensor([0, 9, 12])
        torch.save(pipeline.transformer(x, timestep, label).sample.detach(), sys.argv[2])
        print(type(pipeline.transformer).__name__)
    """
    assert run_python(code, tmp_path / "run", tmp_path / "output.pt").split()[-1] == SWAPPED
    transformer = DiTPipeline.from_pretrained(tmp_path / "run").transformer
    torch.manual_seed(0)
    x, timestep, label = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 900]), torch.tensor([0, 9, 12])
    output = transformer(x, timestep, label).sample
    torch.testing.assert_close(torch.load(tmp_path / "output.pt", weights_only=True), output, rtol=1e-6, atol=1e-6)


def test_a_base_saved_under_its_former_class(base, tmp_path):
    # As the published DiT-XL: the transformer calls itself Transformer2DModel, and the scheduler knows no variance.
    former = tmp_path / "former"
    shutil.copytree(base / "pipeline", former)
    for name in ("model_index.json", "transformer/config.json"):
        text = (former / name).read_text()
        (former / name).write_text(text.replace("DiTTransformer2DModel", "Transformer2DModel"))
    more = ("--pretrained_model_name_or_path", former)
    record = finetune(base, tmp_path / "run", *more)
    assert record == {**finetune(base, tmp_path / "again"), "arguments": record["arguments"]}
    assert type(DiTPipeline.from_pretrained(tmp_path / "run").transformer).__name__ == SWAPPED


def test_the_mean_is_nearer_than_nothing_and_training_brings_both_nearer(base, tmp_path):
    more = ("--max_train_steps", "60", "--learning_rate", "1e-3", "--distillation")
    records = {swap: finetune(base, tmp_path / swap, "--swap", swap, *more) for swap in ("drop", "mean")}
    assert records["mean"]["after_swap"]["relative_error"] < 0.7 * records["drop"]["after_swap"]["relative_error"]
    for record in records.values():
        assert record["final"]["relative_error"] < 0.7 * record["after_swap"]["relative_error"]


@pytest.mark.parametrize(
    "train, swap, more",
    [("rotation", "mean", ()), ("rotation", "anneal", ("--rank", "2")), ("modulation", "drop", ())],
)
def test_an_adapter_on_the_base_is_the_trained_model(base, tmp_path, train, swap, more):
    options = ("--swap", swap, "--train", train, "--save", "adapter", *more)
    record = finetune(base, tmp_path / "run", *options, "--sublayers", "attention", "mlp")
    assert record["final"]["loss"] != record["after_swap"]["loss"]
    assert not (tmp_path / "run" / "model_index.json").exists()
    transformer = DiTPipeline.from_pretrained(base / "pipeline").transformer
    load_rotation_adapter(transformer, tmp_path / "run")
    assert held_out_loss(base, transformer) == pytest.approx(record["final"]["loss"], rel=1e-6)
    assert "load_rotation_adapter" in (tmp_path / "run" / "README.md").read_text()


PUBLISH = f"""
import json, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import finetune_rotation
finetune_rotation.main(finetune_rotation.parse_args(json.load(sys.stdin)))
print("RESULTS {{}}")
"""


@pytest.mark.slow  # training is shown above, publishing of a swapped pipeline in test_hub
def test_trained_and_published(base, server, tmp_path):
    options = ("--train", "rotation", "--save", "adapter", "--hub_license", "mit", "--report_to", "tensorboard")
    more = ("--push_to_hub", "--hub_model_id", "user/name", "--hub_token", TOKEN)
    argv = arguments(base, tmp_path / "run", *options, *more)
    _, output = client(server, tmp_path / "home", PUBLISH, argv)
    assert "Published: " in output
    assert holding(TOKEN, tmp_path / "run") == []
    published = server.repositories["user/name"].files()
    assert set(published) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert not [name for name, content in published.items() if str(base).encode() in content]
    card = published["README.md"].decode()
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "hub_token" not in record["arguments"]
    assert f"| {record['final']['loss']:.5g} |" in card
    assert "license: mit" in card


def test_no_updates_swap_only(base, tmp_path):
    record = finetune(base, tmp_path / "run", "--swap", "mean", "--max_train_steps", "0")
    assert record["final"] == record["after_swap"]
    transformer = DiTPipeline.from_pretrained(tmp_path / "run").transformer
    assert not any(map(torch.count_nonzero, (site.rotation.weight for site in rotation_sites(transformer))))
    # Constants are means over training batches, not those of any one input.
    assert all(torch.count_nonzero(site.mean_shift) for site in rotation_sites(transformer))


def rotation_sites(transformer):
    return [block.norm1.linear for block in transformer.transformer_blocks] + [transformer.proj_out_1]


def test_micro_batches_are_one_batch(base, tmp_path):
    whole = finetune(base, tmp_path / "whole", "--total_batch_size", "16")
    parts = finetune(base, tmp_path / "parts", "--total_batch_size", "16", "--train_batch_size", "8")
    # Of the same images, in batches of 8 or 16, which only rounding tells apart.
    assert parts["final"]["loss"] == pytest.approx(whole["final"]["loss"], rel=1e-4)
    assert whole["final"]["loss"] != pytest.approx(whole["after_swap"]["loss"], rel=1e-2)


def test_the_log_has_the_rate_of_the_update_and_the_norm_of_its_gradient(base, tmp_path):
    more = ("--lr_scheduler", "linear", "--logging_steps", "1", "--max_grad_norm", "1e-3")
    finetune(base, tmp_path / "run", *more)
    lines = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    log = [entry for entry in map(json.loads, lines) if "train/loss" in entry]
    assert [entry["train/learning_rate"] for entry in log] == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])
    # Before clipping.
    assert all(entry["train/grad_norm"] > 1e-2 for entry in log)


@pytest.mark.parametrize(
    "steps, message",
    [
        # The first update makes such weights, the next such a loss; neither is at a log entry.
        ("1", r"after update 1 the weights or the held-out loss \(nan\) are not finite"),
        ("3", "the loss is nan before update 3"),
    ],
)
def test_what_is_not_finite_is_not_saved(base, tmp_path, steps, message):
    more = ("--max_train_steps", steps, "--learning_rate", "1e30", "--logging_steps", "10")
    with pytest.raises(NonFiniteError, match=f"{message}.* try a lower --learning_rate"):
        finetune(base, tmp_path / "run", *more)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]


def test_a_weight_that_no_held_out_image_uses_has_to_be_finite_too(base, tmp_path, monkeypatch):
    import finetune_rotation

    def train(args, accelerator, transformer, *others):
        with torch.no_grad():
            # Of the null class.
            transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight[-1] = torch.inf

    monkeypatch.setattr(finetune_rotation, "train", train)
    with pytest.raises(NonFiniteError, match=r"after update 4 the weights or the held-out loss \(\d"):
        finetune(base, tmp_path / "run", "--swap", "none")
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_an_accumulation_that_the_environment_changes_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(RuntimeError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set .* to 3: unset"):
        finetune(base, tmp_path / "run")


def test_a_relative_base_is_recorded_as_the_folder_it_is(base, tmp_path, monkeypatch):
    # It would look like an id of the Hub as soon as the working directory is another.
    monkeypatch.chdir(base.parent)
    relative = ("--pretrained_model_name_or_path", f"{base.name}/pipeline")
    record = finetune(base, tmp_path / "run", *relative, "--train", "rotation", "--save", "adapter")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base / "pipeline")
    assert record["arguments"]["pretrained_model_name_or_path"] == str(base / "pipeline")


def test_the_flags_reach_the_run(base, tmp_path, monkeypatch):
    import finetune_rotation

    made = {}

    def spy(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            made.setdefault(name, []).append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    spy(finetune_rotation, "TrainingSamples")
    spy(finetune_rotation, "set_shift_scale")
    spy(Accelerator, "clip_grad_norm_")
    spy(torch.optim, "AdamW")
    finetune(
        *(base, tmp_path / "run", "--swap", "anneal", "--anneal_steps", "2", "--class_dropout_prob", "0.25"),
        *("--random_flip", "--max_grad_norm", "0.5", "--adam_weight_decay", "0.125", "--validation_steps", "0"),
        *("--latents_dir", tmp_path / "latents"),
    )
    # The shifts fade within two updates, and are gone for the other two.
    assert [args[1] for args, _ in made["set_shift_scale"]] == [0.5, 0.0, 0.0, 0.0]
    assert [args[2] for args, _ in made["clip_grad_norm_"]] == [0.5] * 4
    ((((group,),), _),) = made["AdamW"]
    assert (group["initial_lr"], group["weight_decay"]) == (3e-3, 0.125)
    (_, held_out), (_, training) = made["TrainingSamples"]
    assert (training["class_dropout_prob"], training["random_flip"], training["num_classes"]) == (0.25, True, 12)
    assert not {"class_dropout_prob", "random_flip"} & held_out.keys()
    assert not set(training["indices"].tolist()) & set(held_out["indices"].tolist())


def test_evaluations_are_of_one_precision_whatever_that_of_training(base, tmp_path):
    losses = {}
    for precision in ("bf16", "no"):
        more = ("--swap", "none", "--learning_rate", "0", "--validation_steps", "2", "--mixed_precision", precision)
        record = finetune(base, tmp_path / precision, *more)
        # The weights are what they were, and so is all that is said of them, on the way as well.
        assert record["final"] == record["before"]
        log = [json.loads(line) for line in (tmp_path / precision / "logs" / "metrics.jsonl").read_text().splitlines()]
        assert len({entry["validation/loss"] for entry in log if "validation/loss" in entry}) == 1
        losses[precision] = [entry["train/loss"] for entry in log if "train/loss" in entry]
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)


def test_latents_are_as_the_pipeline_decodes_them(base):
    import finetune_rotation

    args = finetune_rotation.parse_args(arguments(base, base / "never written"))
    pipeline = DiTPipeline.from_pretrained(base / "pipeline")
    latents = finetune_rotation.load_latents(args, pipeline, Accelerator(cpu=True))
    samples = TrainingSamples(latents, seed=0, **finetune_rotation.sample_options(pipeline))
    standardised = TrainingSamples(LatentDataset(base / "latents"), seed=0, num_classes=12)
    for key in ((0, 3), (1, 40)):
        drawn = standardised[key]["latents"] * standardised.latents_std + standardised.latents_mean
        torch.testing.assert_close(samples[key]["latents"], 2.0 * drawn, rtol=1e-5, atol=1e-6)


def test_latents_of_an_autoencoder_without_posteriors(base, tmp_path):
    import finetune_rotation

    args = finetune_rotation.parse_args(arguments(base, tmp_path / "never written"))
    args.latents_dir = tmp_path / "latents"
    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 8, "sample_size": 4}
    pipeline = DiTPipeline(DiTTransformer2DModel(**sizes), make("dc", random_images()), DDIMScheduler())
    latents = finetune_rotation.load_latents(args, pipeline, Accelerator(cpu=True))
    samples = TrainingSamples(latents, seed=0, **finetune_rotation.sample_options(pipeline))
    torch.testing.assert_close(samples[0, 3]["latents"], pipeline.vae.config.scaling_factor * latents[3]["mean"])


def test_labels_are_not_dropped_again_by_every_block(base):
    import finetune_rotation

    transformer = DiTPipeline.from_pretrained(base / "pipeline").transformer
    inputs = torch.randn(64, 1, 8, 8), torch.full((64,), 500), torch.arange(64) % 10
    expected = transformer.eval()(*inputs).sample
    assert not torch.equal(transformer.train()(*inputs).sample, expected)
    finetune_rotation.set_training_mode(transformer)
    assert transformer.training
    assert sum(isinstance(module, LabelEmbedding) for module in transformer.modules()) == 2
    torch.testing.assert_close(transformer(*inputs).sample, expected)


def test_plain_fine_tuning_goes_on_from_a_swapped_base(base, tmp_path):
    finetune(base, tmp_path / "swapped", "--max_train_steps", "1")
    more = ("--pretrained_model_name_or_path", tmp_path / "swapped", "--swap", "none")
    record = finetune(base, tmp_path / "run", *more)
    assert record["num_parameters"]["after"] == record["num_parameters"]["before"]
    assert type(DiTPipeline.from_pretrained(tmp_path / "run").transformer).__name__ == SWAPPED


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(base, tmp_path):
    whole = finetune(base, tmp_path / "whole", "--swap", "anneal")
    # `accelerate launch` starts several processes on accelerators only; torchrun starts them on the CPU.
    run_processes(EXAMPLES / "finetune_rotation.py", *arguments(base, tmp_path / "two", "--swap", "anneal"))
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert two["final"]["loss"] == pytest.approx(whole["final"]["loss"], rel=1e-4)
