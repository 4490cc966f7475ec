"""What an evaluation writes where: its own files alone are replaced, and the model's folder is not written to."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import evaluate, snapshots_of_a_run
from helpers import random_image
from PIL import Image
from training_runs import contents

from diffusers_mp.evaluation.outputs import check_card


pytestmark = pytest.mark.usefixtures("examples_run_here")


@pytest.fixture
def sweep(arguments, tmp_path):
    list(snapshots_of_a_run(tmp_path / "run", 4))
    return [*arguments, "--pretrained_model_name_or_path", tmp_path / "run", "--ema_stds", 0.05]


def write(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", ["thesis.txt", "evaluated.json", "model_index.json"])
def test_a_folder_best_of_the_user_stays(sweep, tmp_path, monkeypatch, name):
    import evaluate as script

    write(tmp_path / "evaluation" / "best" / name, '{"made_by": "me"}')
    before = contents(tmp_path / "evaluation")
    # Refused before anything is loaded.
    monkeypatch.setattr(script, "Accelerator", None)
    with pytest.raises(ValueError, match="must be a folder in which nothing is lost, it has .*/best, (in )?which"):
        evaluate(sweep)
    assert contents(tmp_path / "evaluation") == before


def test_best_is_replaced_as_long_as_nobody_has_changed_it(sweep, tmp_path):
    best = tmp_path / "evaluation" / "best"
    evaluate(sweep)
    record = json.loads((best / "evaluated.json").read_text())
    assert set(record["files"]) == {str(path.relative_to(best)) for path in contents(best)} - {"evaluated.json"}
    (best / "README.md").write_text((best / "README.md").read_text().replace("Evaluation of samples", "x"))
    with pytest.raises(ValueError, match=r"it has .*/best, in which README.md is not as evaluate.py has written it"):
        evaluate(sweep, 0.1)
    assert "## x" in (best / "README.md").read_text()
    (best / "README.md").unlink()  # what is gone is not lost
    write(best / "transformer" / "notes.txt")
    with pytest.raises(ValueError, match=r"best, in which transformer/notes.txt is not as evaluate.py has written it"):
        evaluate(sweep, 0.1)
    (best / "transformer" / "notes.txt").unlink()
    evaluate(sweep, 0.1)
    assert (best / "README.md").is_file()
    assert not list((tmp_path / "evaluation").glob("*.unfinished"))
    # A link is not ours, wherever it points.
    best.rename(tmp_path / "mine")
    best.symlink_to(tmp_path / "mine", target_is_directory=True)
    with pytest.raises(ValueError, match="it has .*/best, which evaluate.py has not written"):
        evaluate(sweep, 0.1)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("settings.json", []),
        ("results.json", []),
        ("cells/guidance-1.0_steps-3.json", []),
        ("cells/guidance-1.0_steps-3.png", []),
        ("heat_map.png", ["--heat_map"]),
    ],
)
def test_files_of_the_user_are_not_replaced(arguments, tmp_path, name, more):
    path = tmp_path / "evaluation" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        random_image(np.random.default_rng(0)).save(path)
    else:
        path.write_text(json.dumps({"metrics": [], "model_sha256": "x", "guidance_scale": 1.0}))
    before = contents(tmp_path / "evaluation")
    with pytest.raises(ValueError, match=f"it has .*{Path(name).name}, which evaluate.py has not written: move"):
        evaluate(arguments, *more)
    assert contents(tmp_path / "evaluation") == before
    # What is not in the way is no matter.
    path.rename(tmp_path / "evaluation" / "cells.old")
    evaluate(arguments, *more)
    assert (tmp_path / "evaluation" / "cells.old").read_bytes() == before[path]


def test_other_files_among_the_cells_are_left_out(arguments, tmp_path):
    cells = tmp_path / "evaluation" / "cells"
    write(cells / "notes.json", "no JSON")
    write(cells / "mine.json", json.dumps({"metrics": [{"frechet_distance": -1.0}], "guidance_scale": 1.0}))
    assert len(evaluate(arguments)["cells"]) == 1
    assert (cells / "notes.json").read_text() == "no JSON"


def test_the_model_is_not_written_to_unless_its_card_is_asked_for(arguments, folder, tmp_path):
    write(folder / "README.md", "# Mine\n\n## Evaluation of samples\n\nby hand\n\n## End\n")
    random_image(np.random.default_rng(0)).save(folder / "evaluation.png")
    before = contents(folder)
    evaluate(arguments, "--heat_map")
    assert contents(folder) == before
    assert not (tmp_path / "evaluation" / "best").exists()
    with pytest.raises(ValueError, match=r"`write_card` must not replace .*evaluation.png, which evaluate.py has not"):
        evaluate(arguments, "--write_card")
    assert contents(folder) == before
    (folder / "evaluation.png").unlink()
    evaluate(arguments, "--heat_map", "--write_card")
    changed = {path.name for path, content in contents(folder).items() if before.get(path) != content}
    assert changed == {"README.md", "evaluation.png"}
    card = (folder / "README.md").read_text()
    assert card.startswith("# Mine\n\n## Evaluation of samples\n\n12 images for each row")
    assert card.endswith("## End\n")
    assert "![Fréchet distances](evaluation.png)" in card
    # Another table without a map: the one that was ours goes.
    evaluate(arguments, "--guidance_scales", 2, "--write_card")
    assert not (folder / "evaluation.png").exists()
    assert "evaluation.png" not in (folder / "README.md").read_text()


def test_a_new_card_replaces_no_image(arguments, folder):
    random_image(np.random.default_rng(0)).save(folder / "sample_grid.png")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"`write_card` must not replace .*sample_grid.png"):
        evaluate(arguments, "--write_card")
    assert contents(folder) == before
    (folder / "sample_grid.png").unlink()
    evaluate(arguments, "--write_card")
    with Image.open(folder / "sample_grid.png") as image:
        assert image.size == (8 * 32, 32)


def test_the_folder_of_the_model_is_no_output_dir(arguments, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="`output_dir` must not be the model's own folder"):
        evaluate(arguments, "--output_dir", folder / ".." / "model")
    assert contents(folder) == before


def test_a_file_in_the_place_of_a_folder(arguments, tmp_path):
    write(tmp_path / "evaluation" / "cells")
    with pytest.raises(ValueError, match="must be a folder, and cells and reference in it too, .*cells is a file"):
        evaluate(arguments)


@contextlib.contextmanager
def nobody():
    """As a user who may read but not write; root may everything."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_card_that_cannot_be_written_is_refused_beforehand():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "README.md")
        (folder / "README.md").chmod(0o644)
        folder.chmod(0o755)
        check_card(folder)
        folder.chmod(0o555)
        with (
            nobody(),
            pytest.raises(ValueError, match="`write_card` needs a model whose card can be written, .* is"),
        ):
            check_card(folder)
        folder.chmod(0o755)
