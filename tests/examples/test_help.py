"""The command lines of all scripts: `--help` and a wrong flag are answered before anything heavy is imported."""

import json
import subprocess
import sys

import pytest
from helpers import EXAMPLES, ROOT


# Until their branches are merged; then this goes, and every script of the folder is held to it.
LEFT_OUT = {"train_mpdit", "training_arguments", "demo", "ablate", "ablation_report", "digits", "digits_features"}
LEFT_OUT |= {"make_tiny_checkpoint", "rotation_digits", "train_digits_vae"}
SCRIPTS = sorted({path.stem for path in EXAMPLES.glob("*.py")} - LEFT_OUT)
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "sklearn"}
ASK = """
import contextlib, io, json, runpy, sys

answers, (_, folder, *scripts) = {}, sys.argv
for script in scripts:
    for flag in ("--help", "--no_such_flag"):
        sys.argv, said, code = [f"{script}.py", flag], io.StringIO(), None
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                runpy.run_path(f"{folder}/{script}.py", run_name="__main__")
            except SystemExit as ended:
                code = ended.code
        answers[f"{script} {flag}"] = code, said.getvalue(), sorted(sys.modules)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers():
    """Exit code, output and what was imported by then; one process for all scripts, which begins with nothing."""
    command = [sys.executable, "-c", ASK, str(EXAMPLES), *SCRIPTS]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag, code, text", [("--help", 0, "usage: {}.py"), ("--no_such_flag", 2, "{}.py: error: ")])
def test_answered_before_anything_heavy_is_imported(answers, script, flag, code, text):
    received, said, modules = answers[f"{script} {flag}"]
    assert received == code
    assert text.format(script) in said
    assert HEAVY.intersection(modules) == set()


def test_scripts_are_found():
    assert {"convert_dit", "encode_latents", "evaluate", "finetune_rotation", "reconstruct_ema"} <= {*SCRIPTS}
