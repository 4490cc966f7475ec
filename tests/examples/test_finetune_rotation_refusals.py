"""What the script that swaps and fine-tunes refuses, before anything is encoded or trained."""

import json
import shutil

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.optimization import SchedulerType
from rotation_runs import arguments, make_base
from tiny_autoencoders import make, random_images

from diffusers_mp import OriginalDiTTransformer2DModel, swap_adaln_for_rotation
from diffusers_mp.arguments import LR_SCHEDULERS
from diffusers_mp.rotation_swap import sites


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "more, message",
    [
        (("--swap", "none", "--train", "rotation"), "--swap none has no rotations"),
        (("--save", "adapter"), "--save adapter does not hold the whole model"),
        (("--swap", "mean", "--anneal_steps", "2"), "--anneal_steps has no meaning for --swap mean"),
        (("--swap", "anneal", "--anneal_steps", "5"), "--anneal_steps must be from 1 to --max_train_steps, got 5"),
        (("--dataset_name", "user/name"), "give one of --train_data_dir and --dataset_name"),
        (("--num_validation_images", "0"), "--num_validation_images: must be at least 1, got 0"),
        (("--logging_steps", "0"), "--logging_steps: must be at least 1, got 0"),
        (("--max_train_steps", "-1"), "--max_train_steps: must be at least 0, got -1"),
        (("--lr_num_cycles", "2"), "--lr_num_cycles has no meaning for --lr_scheduler constant_with_warmup"),
        (
            ("--lr_scheduler", "polynomial", "--max_train_steps", "1", "--lr_warmup_steps", "1"),
            "--lr_warmup_steps must be below --max_train_steps (1) for --lr_scheduler polynomial, got 1",
        ),
        (("--hub_token", "x", "--report_to", "wandb"), "`hub_token` must not be given together"),
    ],
)
def test_arguments_that_do_not_fit(base, tmp_path, capsys, more, message):
    import finetune_rotation

    with pytest.raises(SystemExit, match="2"):
        finetune_rotation.main(finetune_rotation.parse_args(arguments(base, tmp_path / "run", *more)))
    assert message in capsys.readouterr().err


def test_names_known_before_diffusers_is_imported_are_those_of_diffusers_and_the_package():
    import finetune_rotation

    assert finetune_rotation.SUBLAYERS == sites.SUBLAYERS
    assert set(LR_SCHEDULERS) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}


def test_a_folder_with_something_in_it_is_refused(base, tmp_path, capsys):
    import finetune_rotation

    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(SystemExit):
        finetune_rotation.parse_args(arguments(base, tmp_path))
    assert "--output_dir must be new or empty" in capsys.readouterr().err


def test_unlabelled_images_are_refused(base, tmp_path):
    import finetune_rotation

    (tmp_path / "images").mkdir()
    for number, path in enumerate(sorted((base / "images").rglob("*.png"))[:20]):
        (tmp_path / "images" / f"{number}.png").write_bytes(path.read_bytes())
    argv = arguments(base, tmp_path / "run", "--latents_dir", tmp_path / "latents")
    argv[argv.index(str(base / "images"))] = str(tmp_path / "images")
    with pytest.raises(ValueError, match="--train_data_dir must have classes, .* has none"):
        finetune_rotation.main(finetune_rotation.parse_args(argv))


def of_another_class(base):
    config = {name: value for name, value in base.config.items() if name != "norm_type" and not name.startswith("_")}
    return OriginalDiTTransformer2DModel.from_config(config)


def swapped(base):
    swap_adaln_for_rotation(base)
    return base


def of_fewer_classes(base):
    return DiTTransformer2DModel.from_config({**base.config, "num_embeds_ada_norm": 9})


@pytest.mark.parametrize(
    "transformer, error, message",
    [
        (of_another_class, TypeError, "got a diffusers_mp.OriginalDiTTransformer2DModel"),
        (swapped, ValueError, "must not be swapped already"),
        (of_fewer_classes, ValueError, "must have labels below 9, the number of the base's classes, got 9"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_the_images_are_encoded(
    base, tmp_path, transformer, error, message
):
    import finetune_rotation

    pipeline = DiTPipeline.from_pretrained(base / "pipeline")
    pipeline.transformer = transformer(pipeline.transformer)
    pipeline.save_pretrained(tmp_path / "pipeline")
    more = ("--pretrained_model_name_or_path", tmp_path / "pipeline", "--latents_dir", tmp_path / "latents")
    with pytest.raises(error, match=message):
        finetune_rotation.main(finetune_rotation.parse_args(arguments(base, tmp_path / "run", *more)))
    assert not (tmp_path / "latents").exists()


def test_a_vae_that_a_dit_pipeline_does_not_decode_is_refused(base, tmp_path):
    import finetune_rotation

    pipeline = DiTPipeline.from_pretrained(base / "pipeline")
    pipeline.vae = make("kvae", random_images())
    pipeline.save_pretrained(tmp_path / "pipeline")
    more = ("--pretrained_model_name_or_path", tmp_path / "pipeline", "--latents_dir", tmp_path / "latents")
    with pytest.raises(ValueError, match="`vae` must be one that .* DiTPipeline decodes, .* got AutoencoderKLKVAE"):
        finetune_rotation.main(finetune_rotation.parse_args(arguments(base, tmp_path / "run", *more)))
    assert not (tmp_path / "latents").exists()


def test_a_base_of_more_blocks_than_its_config_says_is_refused(base, tmp_path):
    import finetune_rotation

    shutil.copytree(base / "pipeline", tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    more = ("--pretrained_model_name_or_path", tmp_path / "pipeline", "--latents_dir", tmp_path / "latents")
    with pytest.raises(ValueError, match=r"config.json describes, it leaves out \d+, such as transformer_blocks.1."):
        finetune_rotation.main(finetune_rotation.parse_args(arguments(base, tmp_path / "run", *more)))
    assert not (tmp_path / "latents").exists()


class QuantisedLinear(torch.nn.Linear):
    """As bitsandbytes does it: a subclass of nn.Linear."""


@pytest.mark.parametrize("swap", ["mean", "anneal"])
def test_a_base_whose_shifts_cannot_be_cut_out_is_refused_before_the_images_are_encoded(
    base, tmp_path, monkeypatch, swap
):
    import finetune_rotation

    pipeline = DiTPipeline.from_pretrained(base / "pipeline")
    pipeline.transformer.proj_out_1.__class__ = QuantisedLinear
    monkeypatch.setattr(finetune_rotation.DiTPipeline, "from_pretrained", lambda *args, **kwargs: pipeline)
    more = ("--swap", swap, "--latents_dir", tmp_path / "latents")
    with pytest.raises(ValueError, match="must have plain linear maps for their shift rows to be cut out, proj_out_1"):
        finetune_rotation.main(finetune_rotation.parse_args(arguments(base, tmp_path / "run", *more)))
    assert not (tmp_path / "latents").exists()
