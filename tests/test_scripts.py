"""How scripts end: the line, the exit code, the flags in it; of several processes one speaks."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusers_mp import presets
from diffusers_mp.data.settings import EncodingSettings
from diffusers_mp.scripts import RunFailedError, ScriptParser, command_line, refusals, run_script


def make_parser():
    parser = ScriptParser(prog="train.py")
    parser.add_argument("folder_of_run", nargs="?", type=Path)
    for flag in ("--resolution", "--encode_batch_size", "--image_channels", "--train_data_dir"):
        parser.add_argument(flag)
    return parser


def ended(main, capsys, *flags):
    parser = make_parser()
    with pytest.raises(SystemExit) as ending:
        run_script(main, parser.parse_args(flags), parser)
    return ending.value.code, capsys.readouterr().err


def raises(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    "error, line, code",
    [
        # Flags for arguments, under their name in the script; what is none stays as it is.
        (ValueError("`resolution` must be\n  8, got 7."), "--resolution must be 8, got 7", 2),
        (ValueError("`batch_size` and `depth` differ"), "--encode_batch_size and `depth` differ", 2),
        (ValueError("`--train_data_dir x` is no folder"), "--train_data_dir x is no folder", 2),
        (ValueError("`folder_of_run` is a file"), "folder_of_run is a file", 2),
        (RuntimeError("launched as 2 processes"), "launched as 2 processes", 2),
        (FileNotFoundError("no snapshots"), "no snapshots", 2),
        (ValueError("no https://me:open@host/a"), "no https://me:[removed]@host/a", 2),
        (RunFailedError("2 of 3 cells failed"), "2 of 3 cells failed", 1),
        (FloatingPointError("the loss is nan"), "the loss is nan", 1),
        (OSError(28, "No space left on device", "run/checkpoint-3"), "run/checkpoint-3: No space left on device", 1),
        (TypeError("`resolution` must be a number"), "--resolution must be a number", 2),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied", 2),
    ],
)
def test_an_error_of_this_package_is_one_line(capsys, error, line, code):
    assert ended(raises(error), capsys) == (code, f"train.py: error: {line}\n")


@pytest.mark.parametrize(
    "call, line, code",
    [
        (lambda args: int("x"), "ValueError: invalid literal for int() with base 10: 'x' (--debug shows where)", 2),
        (lambda args: {}["x"], "KeyError: 'x' (--debug shows where)", 1),
        (lambda args: open("no/file"), "no/file: No such file or directory", 2),
        (lambda args: Path(os.devnull, "x").mkdir(), f"{os.devnull}/x: Not a directory", 2),
        (lambda args: next(iter(())), "StopIteration: no message (--debug shows where)", 1),
    ],
)
def test_an_error_that_nobody_foresaw_names_its_exception(capsys, call, line, code):
    assert ended(call, capsys) == (code, f"train.py: error: {line}\n")


def test_a_full_disk_that_safetensors_meets_is_no_usage(capsys):
    def main(args):
        save_file({"weight": torch.zeros(1)}, os.devnull + "/x")

    code, said = ended(main, capsys)
    assert code == 2
    assert said.startswith("train.py: error: a file could not be read or written: ")
    assert ended(raises(SafetensorError("I/O error: No space left on device (os error 28)")), capsys)[0] == 1


def test_long_words_of_others_are_cut(capsys):
    code, said = ended(
        lambda args: torch.nn.Linear(2, 3).load_state_dict({f"weight_{i}": 0 for i in range(99)}), capsys
    )
    assert code == 1
    assert said.startswith("train.py: error: RuntimeError: Error(s) in loading state_dict for Linear: Missing key(s)")
    assert said.endswith("… (--debug shows where)\n")
    assert said.count("\n") == 1
    assert len(said) < 500


def test_messages_of_the_package_s_modules(capsys):
    code, said = ended(lambda args: EncodingSettings(16, batch_size=0), capsys)
    assert (code, said) == (2, "train.py: error: --encode_batch_size must be at least 1, got 0\n")
    code, said = ended(lambda args: EncodingSettings(16, num_channels=2).for_vae(None), capsys)
    assert (code, said[:35]) == (2, "train.py: error: --image_channels, ")
    assert ended(lambda args: presets.get_preset("Q/2"), capsys)[0] == 2


def test_debug_shows_the_traceback(capsys):
    parser = make_parser()
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            run_script(raises(error), parser.parse_args(["--debug"]), parser)
    assert capsys.readouterr().err == ""


def test_interrupts_and_exits(capsys):
    assert ended(raises(KeyboardInterrupt()), capsys) == (130, "\ntrain.py: interrupted\n")
    assert ended(lambda args: sys.exit(7), capsys) == (7, "")


def test_an_interrupt_during_the_imports(capsys, monkeypatch):
    former = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["/path/train.py"])
    parser = make_parser()
    try:
        args = command_line(lambda: parser.parse_args([]), parser)
        with pytest.raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err == "\ntrain.py: interrupted\n"
        # From here on the script has its own words.
        assert ended(lambda args: signal.raise_signal(signal.SIGINT), capsys) == (130, "\ntrain.py: interrupted\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert args.debug is False
    finally:
        signal.signal(signal.SIGINT, former)


def test_what_main_returns_is_no_exit_code():
    parser = make_parser()
    assert run_script(lambda args: 3, parser.parse_args([]), parser) is None


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--train_data_dir", ""], "argument --train_data_dir: must not be empty, as it is where a variable of the"),
        (["--train_data_dir= "], "argument --train_data_dir: must not be empty"),
        ([""], "argument folder_of_run: must not be empty"),
        (["x", "--train_dir", "y"], "unrecognized arguments: --train_dir y (--help shows all flags)\n"),
    ],
)
def test_wrong_command_lines_are_one_line(capsys, flags, line):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(flags)
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: error: {line}")
    assert said.count("\n") == 1


def test_checks_of_a_command_line_refuse_as_the_parser_does(capsys):
    with pytest.raises(SystemExit, match="2"), refusals(make_parser()):
        raise ValueError("`resolution` must be 8, got 7.")
    assert capsys.readouterr().err == "train.py: error: --resolution must be 8, got 7\n"
    with pytest.raises(KeyError), refusals(make_parser()):
        raise KeyError("x")


LAUNCHER = """
import os, subprocess, sys
code = '''
import os, sys
from diffusers_mp.scripts import ScriptParser, run_script
def main(args):
    raise ValueError("rank " + os.environ["RANK"] + " sees it" if sys.argv[1:] == ["each"] else "all see it")
parser = ScriptParser(prog="train.py")
parser.add_argument("how")
run_script(main, parser.parse_args(), parser)
'''
command, common = [sys.executable, "-c", code, *sys.argv[1:]], {**os.environ, "WORLD_SIZE": "3"}
ranks = [subprocess.Popen(command, env={**common, "RANK": str(i)}) for i in range(3)]
print([rank.wait() for rank in ranks])
"""


@pytest.mark.parametrize("how, said", [(["all"], "all see it"), (["each"], " sees it"), ([], "required: how")])
def test_of_several_processes_the_first_speaks(tmp_path, how, said):
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), *how]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "[2, 2, 2]\n"
    assert ran.stderr.startswith("train.py: error: ")
    assert ran.stderr.endswith(f"{said}\n")
    assert ran.stderr.count("\n") == 1
    (marker,) = tmp_path.iterdir()
    assert marker.stat().st_size == 0


def test_what_a_launcher_long_gone_has_said_silences_nobody(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ended(raises(ValueError("first")), capsys)[1] == "train.py: error: first\n"
    assert ended(raises(ValueError("second")), capsys)[1] == ""
    (marker,) = tmp_path.iterdir()
    os.utime(marker, (0, 0))
    assert ended(raises(ValueError("third")), capsys)[1] == "train.py: error: third\n"
