"""The log of a run, a JSON object a line."""

from diffusers_mp.training import JSONLinesTracker
from diffusers_mp.training.arguments import parse_args
from diffusers_mp.training.tracking import tracker_options


def test_a_log_is_shortened_and_what_a_kill_left_of_that_goes(tmp_path):
    tracker = JSONLinesTracker(tmp_path)
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step=step)
    (tmp_path / "metrics.jsonl.99.unfinished").write_text("{}")
    tracker.discard_after(1)
    assert tracker.last_step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def options(*flags, step=0):
    args = parse_args(["--train_data_dir", "x", "--output_dir", "never written", *flags])
    return tracker_options(args, step)


def test_trackers_are_told_their_names_as_they_call_them():
    assert options() == ("train_mpdit", {})
    assert options("--report_to", "wandb", "--tracker_project_name", "p") == ("p", {})
    named = ("--tracker_project_name", "p", "--tracker_run_name", "r")
    assert options("--report_to", "wandb", *named) == ("p", {"wandb": {"name": "r"}})
    assert options("--report_to", "tensorboard", *named, step=7) == ("p/r", {"tensorboard": {"purge_step": 8}})
