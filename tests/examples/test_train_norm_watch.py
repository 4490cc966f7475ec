"""The trainer watches norms by default: its alarms are a line each, logged, and not repeated by a resumed run."""

import json

import pytest
from training_runs import metrics, raw_weights, train


pytestmark = pytest.mark.usefixtures("examples_run_here")


def test_an_alarm_is_one_line_is_logged_and_comes_once(data, tmp_path, capsys):
    folder = train(
        data, tmp_path / "run", "--norm_watch_steps", "1", "--learning_rate", "0.3", "--max_train_steps", "4"
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: update ")]
    assert ["(median_update)" in line for line in lines] == [False, True]
    name = "patch_embed.proj.weight"
    assert f"update 3: the update over the weight in {name} (relative_update) is 0." in lines[0]
    assert "learning rate that is too high" in lines[0]
    logged = metrics(folder, f"alarm/relative_update/{name}")
    assert list(logged) == [3]
    assert logged[3] > 0.03

    state = json.loads((folder / "checkpoint-4" / "training_state.json").read_text())["norm_watch"]
    assert state["alarms"][0][:3] == [3, "relative_update", name]
    arguments = ("--norm_watch_steps", "1", "--max_train_steps", "6", "--resume_from_checkpoint", "checkpoint-4")
    train(data, folder, *arguments)
    assert "Warning: update" not in capsys.readouterr().out
    assert list(metrics(folder, f"alarm/relative_update/{name}")) == [3]


def test_watching_changes_nothing_and_can_be_left_out(data, plain, tmp_path):
    folder = train(data, tmp_path / "run", "--norm_watch_steps", "0")
    ours, theirs = raw_weights(folder / "checkpoint-6"), raw_weights(plain / "checkpoint-6")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    states = [
        json.loads((run / "checkpoint-6" / "training_state.json").read_text()).get("norm_watch")
        for run in (folder, plain)
    ]
    assert states[0] is None
    assert states[1]["num_updates"] == 6
