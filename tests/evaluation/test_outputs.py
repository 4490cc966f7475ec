"""Files that an evaluation knows as its own."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from training_runs import contents

from diffusers_mp.evaluation.outputs import MARK, check_own, is_own, keep_settings, read_own, whole_pipeline, write_own


def test_json_is_known_by_its_mark_and_holds_no_secret(tmp_path):
    path = tmp_path / "results.json"
    write_own(path, {"model": "https://me:open@host/a", "cells": [{"seed": 0}]})
    assert is_own(path)
    assert read_own(path) == {"model": "https://me:[removed]@host/a", "cells": [{"seed": 0}]}
    assert json.loads(path.read_text())["made_by"] == "examples/evaluate.py of diffusers-mp"
    for text in ('{"made_by": "me"}', '["made_by"]', "{", "", '{"made_by": null, "cells": []}', "\x00\x01"):
        path.write_text(text)
        assert not is_own(path)
        assert read_own(path) is None
    path.write_bytes(b"\xff\xfe")
    assert not is_own(path)
    assert read_own(tmp_path / "missing.json") is None


def test_an_image_is_known_by_its_mark(tmp_path):
    path, notes = tmp_path / "heat_map.png", PngInfo()
    Image.new("L", (2, 2)).save(path)
    assert not is_own(path)
    for name, text in MARK.items():
        notes.add_text(name, text)
    Image.new("L", (2, 2)).save(path, pnginfo=notes)
    assert is_own(path)
    path.write_bytes(path.read_bytes()[:30])
    assert not is_own(path)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    best = tmp_path / "best"
    best.mkdir()  # empty: nothing to lose
    with whole_pipeline(best, {"ema_std": 0.1}) as folder:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text("{}")
    assert is_own(best)
    assert read_own(best / "evaluated.json")["ema_std"] == 0.1
    before = contents(best)

    def write(ends):
        with whole_pipeline(best, {"ema_std": 0.2}) as folder:
            (folder / "config.json").write_text("{}")
            if not ends:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(ends=False)
    assert contents(best) == before
    write(ends=True)
    assert sorted(path.name for path in best.iterdir()) == ["config.json", "evaluated.json"]
    # What somebody put there while the work went on.
    (best / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="best, in which notes.txt is not as evaluate.py has written it"):
        write(ends=True)
    assert (best / "notes.txt").read_text() == "mine"


RECORDS = ("{}", '{"made_by": "me", "files": {}}', json.dumps(MARK), json.dumps(MARK | {"files": 3}))


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_is_none(tmp_path, record):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "evaluated.json").write_text(record)
    with pytest.raises(ValueError, match="best, in which evaluated.json is not as evaluate.py has written it"):
        check_own([tmp_path / "best"])


def test_settings_that_differ_are_named(tmp_path):
    path = tmp_path / "settings.json"
    settings = {"model": "a", "commit": None, "seed": 0, "sampler": {"class": "A", "order": 2}, "step": 4}
    keep_settings(path, settings)
    keep_settings(path, settings | {"model": "b", "commit": "c"})  # the same elsewhere
    for change, message in (
        ({"seed": 1}, r"settings; .*settings.json differs in seed: 0 and 1$"),
        ({"sampler": {"class": "A", "order": 3}}, r"differs in sampler.order: 2 and 3$"),
        ({"step": 6}, "differs in step: 4 and 6. `--step 4` goes on with its cells"),
    ):
        with pytest.raises(ValueError, match=message):
            keep_settings(path, settings | change)
    assert read_own(path)["model"] == "b"
