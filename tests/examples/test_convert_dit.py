"""Importing DiT: checkpoints in the layout of the original release, made here, against the converted pipeline."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers import ROOT, relative_error, tiny_vae
from processes import run_python
from tiny_autoencoders import make, random_images

from diffusers_mp import OriginalDiTTransformer2DModel


DIM, DEPTH, HEADS, PATCH, CHANNELS, CLASSES, SIDE = 32, 2, 4, 2, 4, 10, 8
NAMES = {str(id): f"class {id}" for id in range(CLASSES)}
LAST = "final_layer.linear.weight"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "examples"))
    import convert_dit

    yield convert_dit
    sys.path.pop(0)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


def position_table():
    """Closed form: sine and cosine of the column, then of the row, at D/4 frequencies 10000^(-j / (D/4))."""
    position = torch.arange(SIDE // PATCH, dtype=torch.float64)
    angles = position[:, None] * 10000 ** (-torch.arange(DIM // 4, dtype=torch.float64) / (DIM // 4))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    count = len(position)
    columns = waves[None].expand(count, -1, -1)
    rows = waves[:, None].expand(-1, count, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, -1, DIM).float()


def checkpoint(out_channels=2 * CHANNELS, seed=0, mlp_ratio=4):
    """Every weight drawn, biases too, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    sizes = {
        "t_embedder.mlp.0": (DIM, 256),
        "t_embedder.mlp.2": (DIM, DIM),
        "final_layer.adaLN_modulation.1": (2 * DIM, DIM),
        "final_layer.linear": (PATCH * PATCH * out_channels, DIM),
    }
    for number in range(DEPTH):
        block = f"blocks.{number}"
        sizes |= {
            f"{block}.attn.qkv": (3 * DIM, DIM),
            f"{block}.attn.proj": (DIM, DIM),
            f"{block}.mlp.fc1": (mlp_ratio * DIM, DIM),
            f"{block}.mlp.fc2": (DIM, mlp_ratio * DIM),
            f"{block}.adaLN_modulation.1": (6 * DIM, DIM),
        }
    weights = {
        "pos_embed": position_table(),
        "x_embedder.proj.weight": draw(DIM, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": draw(DIM),
        "y_embedder.embedding_table.weight": draw(CLASSES + 1, DIM),
    }
    for name, shape in sizes.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = draw(*shape), draw(shape[0])
    return weights


@pytest.fixture
def convert(script, vae_folder, tmp_path):
    def call(stored, *flags, name="pipeline"):
        file, names = tmp_path / "dit.pt", tmp_path / "names.json"
        torch.save(stored, file)
        names.write_text(json.dumps(NAMES))
        flags = [*flags] if "--id2label" in flags else ["--id2label", str(names), *flags]
        flags = [*flags] if "--num_heads" in flags else ["--num_heads", str(HEADS), *flags]
        arguments = ["--checkpoint_path", str(file), "--output_dir", str(tmp_path / name), "--vae", str(vae_folder)]
        script.main(script.parse_args([*arguments, *flags]))
        return tmp_path / name

    return call


def inputs():
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(4, CHANNELS, SIDE, SIDE, generator=generator)
    return latents, torch.tensor([0, 500, 999, 999]), torch.tensor([0, 9, 4, CLASSES])


@torch.no_grad()
def prediction(transformer):
    latents, timestep, labels = inputs()
    return transformer(latents, timestep=timestep, class_labels=labels).sample


class TestConversion:
    @pytest.mark.parametrize("out_channels", [CHANNELS, 2 * CHANNELS], ids=["noise", "noise and variance"])
    def test_predictions_are_those_of_the_original_equations(self, convert, script, out_channels, capsys):
        weights = checkpoint(out_channels)
        folder = convert(weights)
        pipeline = DiTPipeline.from_pretrained(folder)
        assert type(pipeline.transformer) is OriginalDiTTransformer2DModel
        expected = script.original_prediction(weights, *inputs(), HEADS)
        assert expected.shape == (4, out_channels, SIDE, SIDE)
        assert relative_error(prediction(pipeline.transformer), expected) < 1e-5
        printed = capsys.readouterr().out.split("largest prediction: ")[1].split()[0]
        assert float(printed) < 1e-6

    def test_a_missing_vae_is_missed_before_the_work(self, convert, script, monkeypatch, tmp_path):
        monkeypatch.setattr(script, "largest_difference", lambda *args: pytest.fail("compared first"))
        with pytest.raises(OSError, match="nowhere"):
            convert(checkpoint(), "--vae", str(tmp_path / "nowhere"))
        assert not (tmp_path / "pipeline").exists()

    def test_a_vae_of_another_kind_is_refused_before_the_work(self, convert, script, monkeypatch, tmp_path):
        monkeypatch.setattr(script, "largest_difference", lambda *args: pytest.fail("compared first"))
        make("flux2", random_images()).save_pretrained(tmp_path / "flux2")
        tiny_vae(latent_channels=3).save_pretrained(tmp_path / "three")
        message = "DiTPipeline decodes, .* got AutoencoderKLFlux2"
        for vae, reason in (("flux2", message), ("three", rf"\({CHANNELS}\), got 3")):
            with pytest.raises(ValueError, match=f"`vae` must .*{reason}"):
                convert(checkpoint(), "--vae", str(tmp_path / vae))
        with pytest.raises(ValueError, match="`vae` must be an autoencoder, .* got 'none'"):
            convert(checkpoint(), "--vae", "none")
        assert not (tmp_path / "pipeline").exists()

    def test_a_folder_explains_itself_in_a_fresh_process(self, convert):
        folder = convert(checkpoint())
        printed = run_python(
            """
            import sys, torch, diffusers_mp
            from diffusers import DiTPipeline
            pipeline = DiTPipeline.from_pretrained(sys.argv[1])
            print(type(pipeline.transformer).__name__, pipeline.get_label_ids(["class 3"]))
            blocks = pipeline.transformer.transformer_blocks
            shifts = {block.norm1.emb.time_proj.downscale_freq_shift for block in blocks}
            print(shifts, pipeline(class_labels=[3], guidance_scale=1.0, num_inference_steps=2).images[0].size)
            """,
            folder,
        )
        assert "OriginalDiTTransformer2DModel [3]" in printed
        assert "{0} (32, 32)" in printed
        config = json.loads((folder / "transformer" / "config.json").read_text())
        assert config["num_embeds_ada_norm"] == CLASSES
        assert config["norm_eps"] == 1e-6
        assert not list(folder.rglob("*.bin"))

    def test_the_noise_schedule_is_that_of_training(self, convert):
        pipeline = DiTPipeline.from_pretrained(convert(checkpoint()))
        expected = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
        assert torch.equal(pipeline.scheduler.alphas_cumprod, expected)
        assert pipeline.scheduler.config.prediction_type == "epsilon"
        assert not pipeline.scheduler.config.clip_sample

    def test_what_the_trainer_saves_gives_its_averages(self, convert, script):
        averages = checkpoint(seed=1)
        stored = {
            "model": checkpoint(seed=2),
            "ema": averages,
            "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(model="DiT-XL/2", global_seed=0),
        }
        pipeline = DiTPipeline.from_pretrained(convert(stored))
        expected = script.original_prediction(averages, *inputs(), HEADS)
        assert relative_error(prediction(pipeline.transformer), expected) < 1e-5

    def test_half_precision_files(self, convert, script):
        weights = {name: value.half() if name != "pos_embed" else value for name, value in checkpoint().items()}
        pipeline = DiTPipeline.from_pretrained(convert(weights))
        assert pipeline.transformer.dtype == torch.float32
        expected = script.original_prediction(weights, *inputs(), HEADS)
        assert relative_error(prediction(pipeline.transformer), expected) < 1e-5

    def test_the_plain_class_is_written_on_request_and_its_distance_told(self, convert, script, capsys):
        weights = checkpoint()
        pipeline = DiTPipeline.from_pretrained(convert(weights, "--time_features", "diffusers"))
        assert type(pipeline.transformer) is DiTTransformer2DModel
        printed = capsys.readouterr().out
        assert float(printed.split("largest prediction: ")[1].split()[0]) < 1e-6
        assert float(printed.split("To the original: ")[1].split()[0]) > 1e-2
        received = prediction(pipeline.transformer)
        with_their_features = script.original_prediction(weights, *inputs(), HEADS, last_frequency=127.0)
        assert relative_error(received, with_their_features) < 1e-5
        original = script.original_prediction(weights, *inputs(), HEADS)
        assert relative_error(received, original) > 1e-2
        # At timestep 0 every feature is a constant.
        assert relative_error(received[:1], original[:1]) < 1e-5

    def test_an_untrained_model_predicts_zeros(self, convert):
        weights = checkpoint()
        weights["final_layer.linear.weight"].zero_()
        weights["final_layer.linear.bias"].zero_()
        assert not prediction(DiTPipeline.from_pretrained(convert(weights)).transformer).any()

    def test_published_widths_need_no_head_count(self, script):
        assert script.NUM_HEADS == {384: 6, 768: 12, 1024: 16, 1152: 16}
        with pytest.raises(ValueError, match="`num_heads` must be given for the width 32, .* got None"):
            script.read_config(checkpoint(), None)


class TestRefusals:
    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda w: w.pop("blocks.1.attn.qkv.bias"), r"every weight of a DiT, it lacks 1: \['blocks.1.attn.qkv.b"),
            (lambda w: w.update(extra=torch.ones(1)), r"no other weights than a DiT, it has 1: \['extra'\]"),
            (lambda w: w["blocks.0.mlp.fc1.weight"].fill_(float("nan")), r"must be finite, 1 are not"),
            # Finite in the file, infinite in the float32 of the class.
            (lambda w: w.update({LAST: w[LAST].double().fill_(1e300)}), "it differs by nan; nothing was written"),
            (lambda w: w.update(checkpoint(mlp_ratio=3)), "shapes must be those of a DiT"),
            (lambda w: w.update(pos_embed=w["pos_embed"][:, :15]), "must be of square images, .* and 15 positions"),
            (lambda w: w["pos_embed"].mul_(1.01), r"within 1e-06 .* it differs by 0\.\d+; nothing was written"),
            (lambda w: w["pos_embed"].copy_(w["pos_embed"].roll(DIM // 2, -1)), r"it differs by 0\.\d+; nothing was"),
        ],
        ids=["missing", "unknown", "not finite", "overflow", "shapes", "oblong", "positions", "rows for columns"],
    )
    def test_corrupted(self, convert, tmp_path, change, message):
        weights = checkpoint()
        change(weights)
        with pytest.raises(ValueError, match=message):
            convert(weights)
        assert not (tmp_path / "pipeline").exists()

    def test_truncated(self, script, tmp_path):
        torch.save(checkpoint(), tmp_path / "dit.pt")
        content = (tmp_path / "dit.pt").read_bytes()
        (tmp_path / "dit.pt").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="`checkpoint_path` must be a whole file of plain tensors"):
            script.load_weights(tmp_path / "dit.pt")

    def test_code_is_not_run(self, script, tmp_path):
        class Code:
            def __reduce__(self):
                return Path.mkdir, (tmp_path / "ran",)

        for stored in ({**checkpoint(), "code": Code()}, {"ema": checkpoint(), "args": argparse.Namespace(x=Code())}):
            torch.save(stored, tmp_path / "dit.pt")
            with pytest.raises(ValueError, match="`checkpoint_path` must be a whole file of plain tensors"):
                script.load_weights(tmp_path / "dit.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("stored", [[torch.ones(1)], {"ema": 3}, {"epoch": 3}], ids=["list", "ema", "no tensors"])
    def test_something_else(self, script, tmp_path, stored):
        torch.save(stored, tmp_path / "dit.pt")
        with pytest.raises(ValueError, match="`checkpoint_path` must hold tensors by name"):
            script.load_weights(tmp_path / "dit.pt")

    def test_names(self, script, tmp_path, monkeypatch):
        (tmp_path / "names.json").write_text(json.dumps({"0": "one", "2": "two"}))
        with pytest.raises(ValueError, match="`id2label` must name the ids 0 to 9, got 2 ids"):
            script.read_names(str(tmp_path / "names.json"), CLASSES)
        assert script.read_names(None, CLASSES) is None
        # Without network and cache, ImageNet's names cannot be had.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match="`id2label` must be given where the names of ImageNet cannot be fetched"):
            script.read_names(None, 1000)

    def test_an_existing_folder(self, script, tmp_path, capsys):
        with pytest.raises(SystemExit):
            script.parse_args(["--checkpoint_path", "dit.pt", "--output_dir", str(tmp_path)])
        assert "--output_dir must be a new folder" in capsys.readouterr().err


def test_the_class_differs_from_diffusers_in_time_features_only():
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    ours, theirs = OriginalDiTTransformer2DModel(**config).eval(), DiTTransformer2DModel(**config).eval()
    theirs.load_state_dict(ours.state_dict())
    assert dict(ours.config) == dict(theirs.config)
    features = [model.transformer_blocks[0].norm1.emb.time_proj(torch.tensor([999])) for model in (ours, theirs)]
    angles = 999 * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(features[0][0].double(), torch.cat([angles.cos(), angles.sin()]), rtol=0, atol=2e-4)
    assert (features[1] - features[0]).abs().max() > 1
    assert OriginalDiTTransformer2DModel.from_config(ours.config).config.num_layers == 1
