"""The trainer's command line: what it understands, and what it refuses before anything is imported or encoded."""

import importlib.util
import inspect
import re
import shlex

import numpy as np
import pytest
from diffusers.optimization import SchedulerType, get_scheduler
from helpers import EXAMPLES
from training_runs import arguments

from diffusers_mp import training
from diffusers_mp.arguments import LR_SCHEDULERS
from diffusers_mp.averages.ema import MAX_STD
from diffusers_mp.training.arguments import parse_args
from diffusers_mp.training.model import model_config
from diffusers_mp.training.objective_arguments import OBJECTIVES


def test_what_is_written_out_to_keep_imports_light_is_what_its_owners_say():
    kinds = {kind.value for kind in SchedulerType}
    assert {*LR_SCHEDULERS} == kinds - {SchedulerType.PIECEWISE_CONSTANT.value}
    bounds = [float(np.nextafter(MAX_STD, toward)) for toward in (0, 1)]
    flags = ["--train_data_dir", "x", "--ema_stds"]
    assert parse_args([*flags, str(bounds[0])]).ema_stds == [bounds[0]]
    with pytest.raises(SystemExit):
        parse_args([*flags, str(bounds[1])])


@pytest.mark.parametrize("prediction_type", OBJECTIVES)
def test_an_objective_takes_the_flags_of_the_table_with_their_defaults(prediction_type):
    objective = training.FlowMatchObjective if "flow" in prediction_type else training.DDPMObjective
    parameters = dict(inspect.signature(objective.of_recipe).parameters)
    del parameters["prediction_type"], parameters["model_config"]
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    if prediction_type == "sample":
        defaults["variance_type"] = "fixed_small"
    assert defaults == OBJECTIVES[prediction_type]
    assert objective.of_recipe(prediction_type, **defaults).prediction_type == prediction_type


def test_help_says_no_second_default(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "default: None" not in shown
    assert "over all processes [256]" in shown


@pytest.mark.parametrize("page", ["resume.md", "scale_out.md"])
def test_every_command_of_the_docs_is_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLES.parent / "docs" / page).read_text(), re.S)
    commands = [line for block in blocks for line in block.splitlines() if "train_mpdit.py" in line]
    assert len(commands) >= 5
    for command in commands:
        argv = shlex.split(command.partition("train_mpdit.py")[2])
        if "--train_data_dir" not in argv:
            (tmp_path / "run" / "latents").mkdir(parents=True)
            (tmp_path / "run" / "latents" / "index.json").write_text('{"resolution": 256, "vae": {"id": "x"}}')
        args = parse_args(argv)
        assert args.preset in command


def test_preset_flags(tmp_path):
    args = parse_args(
        [
            *("--train_data_dir", "x", "--output_dir", str(tmp_path / "new"), "--preset", "B/4"),
            *("--configuration", "C", "--modulation", "scale", "shift", "--no-mp_silu", "--layer_norm"),
        ]
    )
    config = model_config(args, (4, 16, 16), 7)
    assert (config["num_layers"], config["patch_size"], config["num_classes"]) == (12, 4, 7)
    assert (config["modulation"], config["mp_silu"], config["layer_norm"]) == (["scale", "shift"], False, True)
    assert (config["in_channels"], config["out_channels"]) == (4, 8)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--report_to", "wandb"), "--report_to wandb: not installed; there are ["),
        (("--report_to", "comet_ml", "--hub_token", "secret"), "`hub_token` must not be given together with"),
        (("--preset", "S/x"), "--preset must be one of"),
        (("--modulation", "spin"), "`modulation` must be a non-empty list"),
        (
            ("--no-weight_normalization",),
            "`weight_normalization` must be True with `forced_weight_normalization=True`",
        ),
        (
            ("--optimizer", "adamw", "--adam_weight_decay", "0.1"),
            "`adam_weight_decay` must be 0 for a model with normalised rows and nothing else but gains",
        ),
        *(
            (("--configuration", name, "--pin_weight_norms", "row"), "`pin_weight_norms` must be left out for a mod")
            for name in "CDEF"
        ),
        (
            ("--configuration", "A", "--weight_normalization", "--pin_weight_norms", "matrix"),
            "got 'matrix'. Take configuration A or B, or D instead of C",
        ),
    ],
)
def test_what_the_parser_cannot_tell_is_refused_as_it_would(examples_run_here, tmp_path, capsys, wrong, message):
    import train_mpdit

    with pytest.raises(SystemExit, match="2"):
        train_mpdit.main(parse_args(["--train_data_dir", "x", "--output_dir", str(tmp_path / "new"), *wrong]))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_bitsandbytes_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse_args(arguments(tmp_path, tmp_path, "--use_8bit_adam"))
    assert "--use_8bit_adam needs bitsandbytes, which is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("owner, values", [("cosine_with_restarts", (1, None)), ("polynomial", (None, 1.0))])
def test_schedules_have_the_defaults_of_diffusers(owner, values):
    args = parse_args(["--train_data_dir", "x", "--lr_scheduler", owner])
    assert (args.lr_num_cycles, args.lr_power) == values
    defaults = inspect.signature(get_scheduler).parameters
    assert {defaults["num_cycles"].default, defaults["power"].default, None} == {*values, 1}


@pytest.mark.parametrize("folder", ["run", "run/samples", "run/logs", "run/checkpoint-2/latents"])
def test_a_folder_of_the_run_is_none_for_encoded_images(tmp_path, capsys, folder):
    with pytest.raises(SystemExit, match="2"):
        parse_args(arguments(tmp_path, tmp_path / "run", "--latents_dir", str(tmp_path / folder)))
    assert "must be a folder that the run uses for nothing else, got" in capsys.readouterr().err
    for accepted in ("run/latents", "run/encoded", "elsewhere"):
        parse_args(arguments(tmp_path, tmp_path / "run", "--latents_dir", str(tmp_path / accepted)))


def test_output_dir_in_use(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        parse_args(arguments(tmp_path, tmp_path))
    assert "--output_dir must be new or empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--dataset_name", "x"), "give one of --train_data_dir and --dataset_name"),
        (("--num_train_epochs", "2"), "give one of --max_train_steps and --num_train_epochs"),
        (
            ("--train_batch_size", "2", "--gradient_accumulation_steps", "2"),
            "give one of --total_batch_size, from which accumulation follows, and --gradient_accumulation_steps",
        ),
        (("--train_batch_size", "0"), "argument --train_batch_size: must be at least 1, got 0"),
        (("--preset", "S/3"), "--model_config_name_or_path stands instead of --preset"),
        (("--max_train_steps", "0"), "argument --max_train_steps: must be at least 1, got 0"),
        # Noticed by the first validation otherwise, before the first checkpoint.
        (
            ("--validation_inference_steps", "0"),
            "argument --validation_inference_steps: must be at least 1, got 0",
        ),
        (
            ("--validation_inference_steps", "1001"),
            "--validation_inference_steps must be at most 1000, the noise levels",
        ),
        (("--ema_stds", "0.5"), "argument --ema_stds: must be in (0, 1/sqrt(12)), that is below 0.2887, got 0.5"),
        (("--ema_stds", "0.1", "0.05", "0.1"), "--ema_stds must differ in six digits, got 0.1 0.05 0.1"),
        (("--ema_stds", "0.1", "0.05", "0.050000001"), "--ema_stds must differ in six digits, got 0.1"),
        (("--learning_rate", "0"), "argument --learning_rate: must be positive, got 0"),
        (("--learning_rate", "nan"), "argument --learning_rate: must be positive, got nan"),
        # Off in other trainers; clipped to nothing, gradients change no weight.
        (("--max_grad_norm", "0"), "argument --max_grad_norm: must be positive, got 0"),
        (("--adam_epsilon", "0"), "argument --adam_epsilon: must be positive, got 0"),
        (("--adam_beta1", "1"), "argument --adam_beta1: must be in [0, 1), got 1"),
        (("--lr_warmup_steps", "-1"), "argument --lr_warmup_steps: must be at least 0, got -1"),
        (("--validation_steps", "-1"), "argument --validation_steps: must be at least 0, got -1"),
        (("--num_validation_images", "-1"), "argument --num_validation_images: must be at least 0, got -1"),
        (("--validation_guidance_scale", "nan"), "argument --validation_guidance_scale: must be finite, got nan"),
        (("--resolution", "0"), "argument --resolution: must be at least 1, got 0"),
        (
            ("--class_dropout_prob", "0", "--validation_guidance_scale", "2", "--validation_steps", "3"),
            "--validation_guidance_scale needs dropped conditions in training, not --class_dropout_prob 0",
        ),
        (
            ("--lr_scheduler", "constant", "--lr_warmup_steps", "5"),
            "--lr_warmup_steps has no meaning for --lr_scheduler constant",
        ),
        (
            ("--lr_scheduler", "cosine", "--lr_constant_steps", "5"),
            "--lr_constant_steps has no meaning for --lr_scheduler cosine",
        ),
        (
            ("--lr_scheduler", "cosine", "--lr_num_cycles", "2"),
            "--lr_num_cycles has no meaning for --lr_scheduler cosine, only for cosine_with_restarts",
        ),
        (("--lr_num_cycles", "1"), "--lr_num_cycles has no meaning for --lr_scheduler inverse_sqrt"),
        (
            ("--lr_scheduler", "linear", "--lr_power", "2"),
            "--lr_power has no meaning for --lr_scheduler linear, only for polynomial",
        ),
        (("--lr_scheduler", "polynomial", "--lr_power", "0"), "argument --lr_power: must be positive, got 0"),
        (
            ("--lr_scheduler", "polynomial", "--learning_rate", "1e-7"),
            "--learning_rate must be above 1e-07, where --lr_scheduler polynomial ends, got 1e-07",
        ),
        (
            ("--lr_scheduler", "polynomial", "--lr_warmup_steps", "6"),
            "--lr_warmup_steps must be below --max_train_steps (6) for --lr_scheduler polynomial, got 6",
        ),
        (("--adam_weight_decay", "-1"), "argument --adam_weight_decay: must be at least 0, got -1"),
        (("--adam_weight_decay", "0.1"), "--adam_weight_decay has no meaning for --optimizer adam: use adamw"),
        (("--use_8bit_adam", "--optimizer", "muon"), "--use_8bit_adam has no meaning for --optimizer muon"),
        (("--optimizer", "lion"), "invalid choice: 'lion'"),
        (("--logging_dir", "../other/logs"), "got ../other/logs"),
        (("--logging_dir", "/dev/null/logs"), "--logging_dir must lie inside --output_dir"),
        *(
            (("--logging_dir", name), "--logging_dir must be a folder that the run uses for nothing else, got")
            for name in ("checkpoint-2", "a/../samples/x", "ema_snapshots", "transformer_ema_0.1", "latents", ".")
        ),
        (("--tracker_run_name", "x"), "--tracker_run_name has no meaning without a tracker: give --report_to"),
        (("--report_to", "aim", "--tracker_run_name", "x"), "--tracker_run_name is for tensorboard, wandb"),
        (("--report_to", "tensorboard", "--tracker_project_name", "../x"), "must be a name without slashes"),
        (("--validation_labels", "cat"), "--validation_labels has no meaning with no validation"),
        (
            ("--validation_steps", "1", "--pooled_column", "x", "--validation_labels", "cat"),
            "--validation_labels has no meaning with condition vectors",
        ),
        (("--ema_update_steps", "7"), "--ema_update_steps must be at most --max_train_steps (6), got 7"),
        (("--preset", "B/2", "--no-mp_silu"), "--model_config_name_or_path stands instead of --preset, --mp_silu"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit, match="2"):
        parse_args(arguments(tmp_path, tmp_path / "run", *more))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--prediction_type flow_prediction --snr_gamma 5",
            "--snr_gamma has no meaning for --prediction_type flow_pred",
        ),
        ("--prediction_type flow_prediction --variance_type learned_range", "--variance_type has no meaning"),
        ("--logit_mean 1", "--logit_mean has no meaning for --prediction_type epsilon"),
        (
            "--prediction_type v_prediction --logit_std 1",
            "--logit_std has no meaning for --prediction_type v_prediction",
        ),
        ("--snr_gamma 0", "argument --snr_gamma: must be positive, got 0"),
        ("--prediction_type flow_prediction --logit_std -1", "argument --logit_std: must be positive, got -1"),
        ("--prediction_type original_sample", "invalid choice: 'original_sample'"),
        (
            "--prediction_type sample --variance_type learned_range",
            "--variance_type must be fixed_small or fixed_large for --prediction_type sample, since a learned",
        ),
        ("--loss_space v", "argument --loss_space: invalid choice: 'v'"),
        (
            "--snr_gamma 5 --loss_space sample",
            "--loss_space sample has no meaning with --snr_gamma, whose weights make the loss the same in every space",
        ),
        ("--shift 2", "--shift has no meaning for --prediction_type epsilon"),
        (
            "--prediction_type flow_sample --shift size",
            "argument --shift: must be positive, dimension or resolution, got size",
        ),
        (
            "--prediction_type flow_sample --shift 0",
            "argument --shift: must be positive, dimension or resolution, got 0",
        ),
        (
            "--prediction_type flow_sample --shift 2 --max_shift 1",
            "--max_shift has no meaning without --shift resolution",
        ),
    ],
)
def test_flags_that_contradict_each_other(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args(arguments(tmp_path, tmp_path / "run", *flags.split()))
    assert message in capsys.readouterr().err


def test_the_space_of_the_prediction_is_the_run_without_the_flag(tmp_path):
    def loss_space(*flags):
        return parse_args(arguments(tmp_path, tmp_path / "run", *flags)).loss_space

    assert loss_space("--loss_space", "epsilon") is loss_space() is None
    assert loss_space("--prediction_type", "flow_prediction", "--loss_space", "velocity") is None
    assert loss_space("--prediction_type", "flow_sample", "--loss_space", "velocity") == "velocity"
