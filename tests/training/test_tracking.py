"""The log of a run, a JSON object a line."""

from diffusers_mp.training import JSONLinesTracker


def test_a_log_is_shortened_and_what_a_kill_left_of_that_goes(tmp_path):
    tracker = JSONLinesTracker(tmp_path)
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step=step)
    (tmp_path / "metrics.jsonl.99.unfinished").write_text("{}")
    tracker.discard_after(1)
    assert tracker.last_step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
