"""From the trainer's command line to the Hub and back, over HTTP against `hub_server.py`."""

import numpy as np
from helpers import EXAMPLES
from hub_client import TOKEN, client, holding, load
from training_runs import arguments


TRAIN = f"""
import json, sys, traceback
sys.path.insert(0, {str(EXAMPLES)!r})
import train_mpdit
results = []
for argv in json.load(sys.stdin):
    try:
        train_mpdit.main(train_mpdit.parse_args(argv))
        results.append(None)
    except Exception as error:
        traceback.print_exc()
        results.append(str(error))
print("RESULTS " + json.dumps(results))
"""


def test_trained_and_published_unless_the_token_is_wrong(server, data, tmp_path):
    run = tmp_path / "run"
    more = ("--push_to_hub", "--hub_model_id", "user/name", "--hub_license", "mit", "--validation_steps", "6")
    calls = [
        arguments(data, tmp_path / "wrong", *more, "--hub_token", "hf_" + "Nobody" * 5),
        arguments(data, run, *more, "--hub_token", TOKEN, "--report_to", "tensorboard"),
    ]
    (refused, error), output = client(server, tmp_path / "home", TRAIN, calls)
    assert "token" in refused.lower()
    assert not (tmp_path / "wrong").exists()
    assert error is None, output
    assert "Published: " in output
    assert "amazonaws" not in output
    assert holding(TOKEN, run) == []
    published = server.repositories["user/name"].files()
    assert {"README.md", "model_index.json", "sample_grid.png"} <= set(published)
    assert not [name for name in published if name.startswith(("checkpoint", "latents", "logs", "training_arg"))]
    card = published["README.md"].decode()
    assert "license: mit" in card
    assert "| images seen | 24 |" in card  # 6 updates of 4
    (images,) = load(server, tmp_path / "other home", {})
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()
