"""The command lines of all scripts: `--help` and a wrong flag are answered before anything heavy is imported."""

import json
import subprocess
import sys

import pytest
from helpers import EXAMPLES, ROOT


SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "sklearn"}
OUT_OF_RANGE = {"train_mpdit": ["--train_batch_size=0"], "demo": ["--num_images_per_class=1"]}
ASK = """
import contextlib, io, json, runpy, sys

answers, (_, folder, out_of_range, *scripts) = {}, sys.argv
out_of_range = json.loads(out_of_range)
for script in scripts:
    for flag in ("--help", "--no_such_flag", *out_of_range.get(script, [])):
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
    command = [sys.executable, "-c", ASK, str(EXAMPLES), json.dumps(OUT_OF_RANGE), *SCRIPTS]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag, code, text", [("--help", 0, "usage: {}.py"), ("--no_such_flag", 2, "{}.py: error: ")])
def test_answered_before_anything_heavy_is_imported(answers, script, flag, code, text):
    got, said, modules = answers[f"{script} {flag}"]
    assert got == code
    assert text.format(script) in said
    assert HEAVY.intersection(modules) == set()


def test_values_out_of_range_too(answers):
    for script, flags in OUT_OF_RANGE.items():
        for flag in flags:
            got, said, modules = answers[f"{script} {flag}"]
            assert got == 2, flag
            assert f"error: argument {flag.partition('=')[0]}: " in said
            assert HEAVY.intersection(modules) == set()


def test_scripts_are_found():
    assert {"demo", "evaluate", "train_mpdit"} <= {*SCRIPTS}
