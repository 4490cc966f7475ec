"""The demo in small: what it leaves, and that whatever interrupts it, it ends with the same images."""

import json
import os
import signal
import sys
import time

import pytest
from helpers import ROOT
from PIL import Image
from processes import start


sys.path.insert(0, str(ROOT / "examples"))
import demo


# On one CPU: two threads would wait for each other on a busy machine, as the server of processes has them spin.
ON_ONE_CPU = """
import os, runpy, signal, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SMALL = ("--max_train_steps", "2", "--num_images_per_class", "2", "--num_inference_steps", "2")


def run(folder, vae_steps=1, until=None, signal_number=signal.SIGKILL):
    """Run the demo to its end, or until a file is there; its exit status and what it printed."""
    output = folder.with_name(f"{folder.name}.output")
    arguments = (demo.__file__, "--output_dir", folder, "--vae_steps", vae_steps, *SMALL)
    process = start(ON_ONE_CPU, arguments=arguments, paths=[demo.EXAMPLES], output=output)
    while until is not None and process.exitcode is None and not list(folder.glob(until)):
        time.sleep(0.01)
    if until is not None:
        os.kill(process.pid, signal_number)
    process.join()
    return process.exitcode, output.read_text()


def test_it_leaves_a_labelled_sheet_and_says_what_comes_next(tmp_path):
    status, printed = run(tmp_path / "demo")
    assert status == 0, printed[-3000:]
    lines = printed.replace("\r", "\n").splitlines()
    assert lines[0].startswith("Trains a VAE and a diffusion transformer on 896 real handwritten digits")
    assert lines[-1].startswith("Next: ")
    assert {"VAE", "Training"} <= {line.partition(":")[0] for line in lines}  # progress bars
    assert (tmp_path / "demo" / "loss.png").is_file()
    with Image.open(tmp_path / "demo" / "samples.png") as sheet:
        assert sheet.height > 10 * demo.CELL_SIZE
        assert sheet.width > 2 * demo.CELL_SIZE


@pytest.mark.slow
def test_interrupted_anywhere_it_ends_with_the_same_images(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, vae_steps=60)[0] == 0
    for until in ("digits/*/9/*.png", "vae.unfinished/training.pt", "model/latents/*.safetensors"):
        assert run(broken, vae_steps=60, until=until)[0] == -signal.SIGKILL
    status, printed = run(broken, vae_steps=60, until="model/training_arguments.json", signal_number=signal.SIGINT)
    assert status == 130
    assert printed.endswith("Interrupted: the same command goes on.\n")
    assert run(broken, vae_steps=60)[0] == 0
    assert (broken / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    assert not list(tmp_path.glob("broken.old-*"))
    # Once more: nothing is trained anew, and the images are the same.
    status, printed = run(broken, vae_steps=60)
    assert status == 0
    assert "VAE:" not in printed
    assert (broken / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


def test_a_folder_of_another_version_is_moved_aside(tmp_path, capsys):
    folder = tmp_path / "demo"
    args = demo.parse_args(["--output_dir", str(folder)])
    num_threads = demo.open_folder(args)
    assert num_threads == demo.usable_cpus() > 0
    (folder / "mine.txt").touch()

    # Threads stay those it was begun with.
    record = json.loads((folder / "demo.json").read_text())
    (folder / "demo.json").write_text(json.dumps({**record, "num_threads": 7}))
    assert demo.open_folder(args) == 7
    assert capsys.readouterr().out == ""

    for number, change in enumerate(({"flags": {}}, {"versions": {}}, {"sources_sha256": "0"}), start=1):
        (folder / "demo.json").write_text(json.dumps({**record, **change}))
        assert demo.open_folder(args) == num_threads
        (name,) = change
        assert f"another version ({name}): kept as {folder}.old-{number}" in capsys.readouterr().out
        assert [path.name for path in folder.iterdir()] == ["demo.json"]
    assert (tmp_path / "demo.old-1" / "mine.txt").is_file()
    (folder / "demo.json").unlink()
    (folder / "other").touch()
    demo.open_folder(args)
    assert "no record" in capsys.readouterr().out


def test_a_sheet_has_a_class_in_each_row():
    rows = {"0": [Image.new("L", (8, 8), 10)] * 3, "1": [Image.new("L", (8, 8), 200)] * 3}
    sheet = demo.draw_samples(rows, "title")
    colours = [sheet.getpixel((sheet.width - demo.CELL_SIZE, sheet.height - y)) for y in (150, 50)]
    assert colours == [10, 200]
    assert sheet.crop((0, 60, 60, sheet.height)).getextrema() == (0, 255)  # names
    assert sheet.crop((60, 0, sheet.width, 60)).getextrema()[0] < 128  # title


@pytest.mark.parametrize("flag", ["num_images_per_class", "vae_steps", "max_train_steps"])
def test_flags_that_end_badly_are_refused_at_once(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.parse_args([f"--{flag}", "0"])
    assert f"--{flag} must be at least" in capsys.readouterr().err
