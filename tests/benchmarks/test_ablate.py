"""The ablation: its statistics against closed forms, and a miniature of it with real trainings from end to end."""

import contextlib
import json
import math
import multiprocessing
import signal

import ablate
import ablation_report
import numpy as np
import pytest
import report
import torch
from helpers import BENCHMARKS
from PIL import Image
from processes import start

from diffusers_mp.files import write_json
from diffusers_mp.training import split_validation


MINIATURE = [
    *("--seeds", "0", "1"),
    *("--max_train_steps", "4"),
    *("--train_batch_size", "4"),
    *("--num_layers", "1"),
    *("--num_attention_heads", "1"),
    *("--attention_head_dim", "8"),
    *("--num_validation_images", "8"),
    *("--num_samples", "40"),
    *("--num_inference_steps", "2"),
    *("--plain_learning_rates", "1e-4", "1e-3"),
    *("--learning_rates", "1e-2"),
]
# In the process that is killed, which makes the judge.
JUDGE_STEPS = 60
ARMS = "^A_|^E_scale.shift.gate"
RUNS = [
    f"{arm}_lr{rate}_seed0"
    for arm, rates in {"A_scale+shift+gate": ("0.0001", "0.001"), "E_scale+shift+gate": ("0.01",)}.items()
    for rate in rates
]


pytestmark = pytest.mark.usefixtures("examples_run_here")


def run(folder, *more):
    args = ablate.parse_args(["--output_dir", str(folder), "--only", ARMS, *MINIATURE, *more])
    ablate.main(args)
    return args


# Statistics


def test_interval_is_that_of_student():
    mean, half = report.interval([1.0, 2.0, 3.0])
    # t of 2 degrees of freedom in closed form: t = (2p - 1) sqrt(2 / (4 p (1 - p))), p = 0.975.
    t = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    assert mean == 2
    assert half == pytest.approx(t / math.sqrt(3))
    assert math.isnan(report.interval([5.0])[1])


def test_cells_of_tables():
    # Mean 2, standard error 1 / sqrt(3), and 4.3027 is the 97.5 % point of two degrees of freedom.
    assert report.text([1, 2, 3], 4) == f"2.0000 ± {4.302653 / 3**0.5:.4f}"
    assert report.text([0.5], 1, 100) == "50.0"
    assert report.text([None, 0.5]) == "0.50"
    assert report.text([None]) == "–"
    assert report.signed([1.0]) == "+1.0"
    assert report.signed([-1.0]) == "-1.0"


def record_of(seed, frechet, cpu=10.0):
    return {"seed": seed, "samples": {"1": {"frechet": frechet}}, "update_cpu_ms": cpu}


def test_changes_are_paired_by_seed():
    # What a seed does to all arms alike leaves no trace.
    references = [record_of(seed, 100.0 * 10**seed) for seed in range(3)]
    records = [record_of(seed, 87.2 * 10**seed, cpu) for seed, cpu in ((2, None), (0, 12.0), (7, 12.0))]
    assert ablation_report.changes(records, references, "frechet") == pytest.approx([-12.8, -12.8])
    # A run that was taken up after its last update has no time of one.
    assert ablation_report.changes(records, references, "update_cpu_ms") == pytest.approx([20.0])


def test_each_change_stands_in_its_table_once(monkeypatch):
    monkeypatch.setattr(ablation_report, "title", str)
    monkeypatch.setattr(ablation_report, "changes", lambda records, references, name: [1.0, 2.0])
    arms = ("A_scale+shift+gate", "E_scale+shift+gate", "E_scale+gate", "E_scale+shift", "E_scale")
    rows = ablation_report.pairs_table({arm: [record_of(0, 1.0)] for arm in arms}).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "A_scale+shift+gate from E_scale+shift+gate",
        "E_scale+gate from E_scale+shift+gate",
        "E_scale+shift from E_scale+shift+gate",
        "E_scale from E_scale+shift+gate",
        "E_scale from E_scale+gate",
    ]


@pytest.mark.parametrize(
    "values, claimed, expected",
    [
        ([-12.0, -13.0, -14.0], -12.8, "**agrees**"),
        ([-32.0, -33.0, -34.0], -12.8, "**agrees** in direction, not in size"),
        ([12.0, 13.0, 14.0], -12.8, "**disagrees**"),
        ([-30.0, 0.0, 15.0], -12.8, "not resolved"),
        ([-0.1, 0.0, 0.1], -12.8, "not resolved, and less than claimed"),
        ([-50.0], -12.8, "not resolved"),
    ],
)
def test_verdict(values, claimed, expected):
    assert ablation_report.verdict(values, claimed) == expected


def test_growth_is_of_the_last_block_and_of_mean_weights():
    first, last = (
        {
            f"magnitude/{kind}/transformer_blocks.{index}": value
            for kind, of_kind in entry.items()
            for index, value in of_kind
        }
        for entry in (
            {"activations": ((2, 1.0), (10, 2.0)), "weights": ((2, 1.0), (10, 1.0))},
            {"activations": ((2, 9.0), (10, 3.0)), "weights": ((2, 2.0), (10, 4.0))},
        )
    )
    record = {"magnitudes": [first, last]}
    assert ablation_report.magnitudes(last, "activations") == [9.0, 3.0]
    assert ablation_report.growth(record, "activations") == 1.5
    assert ablation_report.growth(record, "weights") == 3.0


def test_a_rate_at_which_a_seed_failed_is_shown_and_not_taken():
    def record(loss, failed_seeds):
        return {"validation": {"loss": loss}, "samples": {"1": {"frechet": 10.0}}, "failed_seeds": failed_seeds}

    sweep = {0.1: record(0.1, [2]), 0.02: record(0.2, []), 0.5: {"failure": "not finite", "failed_seeds": [0]}}
    assert ablation_report.losses(sweep) == {0.02: 0.2}
    table = ablation_report.sweep_table({"E_scale": sweep})
    assert table.splitlines()[-1] == "| E, scale | **0.2000, 10** | 0.1000, 10; seed 2 not finite | not finite |"


# The plan


def test_plan_has_every_arm_once_and_the_claims_first():
    names = [arm.name for arm in ablate.ARMS]
    assert len(set(names)) == len(names) == 14
    modulations = {arm.modulation for arm in ablate.ARMS if arm.configuration == "E"}
    kinds = {"scale", "shift", "rotate", "scale+shift", "scale+rotate"}
    assert modulations == kinds | {f"{kind}+gate" for kind in kinds}
    assert set(names[:3]) == {"A_scale+shift+gate", ablation_report.ADALN, ablation_report.ROTATION}
    args = ablate.parse_args([])
    for arm in ablate.ARMS:
        rates = ablate.rates_of(args, arm)[-4:]
        assert rates[-1] / rates[0] == pytest.approx(100)
    assert ablation_report.PROBE_RATE in ablate.rates_of(args, ablate.ROTATION)


def test_seeds_take_the_best_rate_and_leave_failed_ones(tmp_path):
    args, facts = ablate.parse_args(["--output_dir", str(tmp_path), "--only", "^B_"]), {"sha256": "judge"}
    arm = next(arm for arm in ablate.ARMS if arm.configuration == "B")

    def record(rate, seed, result):
        run = ablate.Run(arm, rate, seed)
        content = {"settings": ablate.settings_of(args, arm, facts), "learning_rate": rate, **result}
        write_json(ablate.record_file(args, run), content)

    def planned():
        return [(run.learning_rate, run.seed) for run in ablate.plan(args, facts)]

    sweep = [(rate, 0) for rate in args.plain_learning_rates]
    assert planned() == sweep
    results = [{"validation": {"loss": loss}} for loss in (0.3, 0.2, 0.4)]
    for (rate, seed), result in zip(sweep, [*results, {"failure": "not finite"}], strict=True):
        assert ablate.best_rate(args, arm, facts) is None
        record(rate, seed, result)
    assert planned() == [*sweep, (2e-3, 1), (2e-3, 2)]
    # Not stable: the next best, for all seeds.
    record(2e-3, 2, {"failure": "not finite"})
    assert planned() == [*sweep, (5e-4, 1), (5e-4, 2)]
    # A rate of an earlier plan counts.
    record(3e-4, 0, {"validation": {"loss": 0.25}})
    assert planned() == [*sweep, (3e-4, 1), (3e-4, 2)]
    assert ablate.failed_seeds(args, arm, 2e-3, facts) == [2]


def _hold(args, started, release):
    with ablate.lock(args, "run") as is_mine:
        started.put(is_mine)
        release.wait()


def test_a_lock_is_held_by_one_process_and_goes_with_it(tmp_path):
    args = ablate.parse_args(["--output_dir", str(tmp_path)])
    context = multiprocessing.get_context("fork")
    started, release = context.SimpleQueue(), context.Event()
    holder = context.Process(target=_hold, args=(args, started, release))
    holder.start()
    assert started.get()
    with ablate.lock(args, "run", blocking=False) as is_mine:
        assert not is_mine
    holder.kill()  # as the machine does when memory is short
    holder.join()
    with ablate.lock(args, "run", blocking=False) as is_mine:
        assert is_mine


# A miniature from end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The miniature with its report; its first run was killed while it trained, and taken up by a second process."""
    folder = tmp_path_factory.mktemp("ablation")
    arguments = ["--output_dir", str(folder), "--only", ARMS, *MINIATURE]
    # Dies as from `kill -9` right after the first checkpoint: only the first update has been made.
    killed = f"""
import os, signal, sys
sys.path.insert(0, {str(BENCHMARKS / "quality")!r})
import torch
torch.set_num_threads(1)
import ablate
from shared import train_mpdit
ablate.JUDGE_STEPS = {JUDGE_STEPS}
save = train_mpdit.save_checkpoint
def save_and_die(*args):
    save(*args)
    os.kill(os.getpid(), signal.SIGKILL)
train_mpdit.save_checkpoint = save_and_die
ablate.main(ablate.parse_args({arguments!r}))
"""
    died = start(killed, output=folder / "killed.txt")
    died.join()
    assert died.exitcode == -signal.SIGKILL, (folder / "killed.txt").read_text()[-2000:]
    assert not list((folder / "records").glob("*.json"))
    assert (folder / "runs" / RUNS[0] / "checkpoint-1").is_dir()
    with (folder / "out.txt").open("w") as out, contextlib.redirect_stdout(out):
        run(folder, "--report", str(folder / "docs" / "ablation.md"), "--records", str(folder / "ablation.jsonl"))
    return folder


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))}


def test_killed_run_went_on_at_its_checkpoint(finished):
    assert "from update 1" in (finished / "out.txt").read_text()
    assert not list((finished / "runs").glob("*/checkpoint-*"))  # nothing to go on with once there is a record


def test_every_run_has_a_record_with_all_measures(finished):
    found = records(finished)
    lines = (finished / "ablation.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [found[name] for name in sorted(found)]
    assert len(found) == 5  # one arm at two rates, one at one, then each at its best with the other seed
    assert set(RUNS) < set(found)
    for name, record in found.items():
        assert record["settings"]["model"]["num_layers"] == 1
        assert set(record["samples"]) == {"1", "2"}
        for measures in record["samples"].values():
            assert measures["frechet"] > 0
            assert 0 <= measures["recognised"] <= 1
            assert measures["nearest_training_ratio"] > 0
        assert sum(level.startswith("mse_t") for level in record["validation"]) == 8
        assert record["validation"]["loss"] == record["curve"]["4"]
        assert [entry["step"] for entry in record["magnitudes"]] == [1, 4]
        assert record["update_ms"] > 0
        assert record["update_cpu_ms"] > 0
        weights = [ablation_report.magnitudes(entry, "weights") for entry in record["magnitudes"]]
        if name.startswith("E"):
            # Unit rows, and gains that leave 0 by a few updates.
            assert weights[0] == pytest.approx(weights[1], rel=1e-2)


def test_runs_of_a_seed_see_the_same_data_and_seeds_others(finished):
    # After one update models still predict next to nothing, so that the loss is that of the noise and digits held out.
    losses = {0: [], 1: []}
    for record in records(finished).values():
        losses[record["seed"]].append(record["curve"]["1"])
    assert losses[0] == pytest.approx([losses[0][0]] * 3, rel=0.01)
    assert losses[1] == pytest.approx([losses[1][0]] * 2, rel=0.01)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=0.02)


@pytest.mark.parametrize("part", ["trained on", "held out"])
def test_measures_of_real_digits(finished, monkeypatch, part):
    """What is measured where the model's samples are digits of the data, of the class asked for."""
    args = ablate.parse_args(["--output_dir", str(finished), *MINIATURE, "--num_samples", "1000"])
    images, labels = ablate.read_digits(args)
    run = ablate.Run(ablate.BASELINE, 1e-4, 0)
    held_in, held_out = split_validation(len(images), 400, run.seed)
    args.num_validation_images, chosen = 400, held_in if part == "trained on" else held_out
    counts = torch.zeros(10, dtype=torch.int64)
    wanted = []

    def real_digits(pipeline, indices, *, seed, class_ids, num_inference_steps, guidance_scale):
        asked = [class_ids[index] for index in indices]
        wanted.extend(asked)
        of_class = {digit: chosen[labels[chosen] == digit] for digit in range(10)}
        counts[:] = torch.bincount(torch.tensor(class_ids), minlength=10)
        return torch.stack([images[of_class[digit][n % len(of_class[digit])]] for n, digit in enumerate(asked)])

    monkeypatch.setattr(ablate, "generate_images", real_digits)
    judge = ablate.load_judge(args.output_dir)
    result = ablate.measure(args, run, finished / "runs" / RUNS[0], judge)
    facts = json.loads((finished / "judge.json").read_text())
    for scale in ("1", "2"):
        measures = result["samples"][scale]
        # Each image of the part about once or twice; training images are their own nearest ones.
        assert measures["nearest_training_ratio"] == pytest.approx(0 if part == "trained on" else 1, abs=0.05)
        assert measures["recognised"] == pytest.approx(facts["accuracy"], abs=0.05)
        assert measures["frechet"] < 10 * facts["floor"]
    # Classes in the proportions of the data, up to one image.
    shares = torch.bincount(labels, minlength=10) * 1000 / len(labels)
    assert (counts - shares).abs().max() <= 1


def test_finished_runs_are_not_run_again(finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}
    monkeypatch.setattr(ablate, "do", lambda *args: pytest.fail("nothing was left to do"))
    run(finished)
    assert {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()} == before


def test_no_run_begins_after_max_hours(tmp_path, finished, monkeypatch, capsys):
    for name in ("judge.json", "judge.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    monkeypatch.setattr(ablate, "do", lambda *args: pytest.fail("no time was left"))
    run(tmp_path, "--max_hours", "0")
    assert "stopped, 3 runs can be done now" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["max_train_steps", "num_samples", "attention_head_dim"])
def test_records_of_other_settings_are_refused(finished, option):
    with pytest.raises(ValueError, match=option if option != "attention_head_dim" else "attention_head_dim 8 .now 16"):
        run(finished, f"--{option}", "16")


def test_report_has_every_arm_and_keeps_conclusions(finished, capsys):
    file = finished / "docs" / "ablation.md"
    text = file.read_text()
    assert "for 5 of " in text
    for heading in ("What the paper says", "All arms", "Learning rates", "Magnitudes", "Noise levels"):
        assert f"\n### {heading}\n" in text
    found = records(finished)
    for arm in ("A, scale + shift + gate", "E, scale + shift + gate"):
        assert text.count(f"| {arm} |") >= 4
    best = min((found[name] for name in RUNS[:2]), key=lambda record: record["validation"]["loss"])
    assert f"**{best['validation']['loss']:.4f}, {best['samples']['1']['frechet']:.0f}**" in text
    both = [record for record in found.values() if record["arm"] == best["arm"]]
    both = [record for record in both if record["learning_rate"] == best["learning_rate"]]
    assert report.text([record["samples"]["1"]["frechet"] for record in both], 1) in text
    assert "magnitude preservation lowers the distance" in text
    assert "rotation needs fewer" not in text  # that arm has no record
    for name in ("frechet", "magnitudes"):
        figure = np.asarray(Image.open(file.with_name(f"ablation_{name}.png")).convert("L"))
        assert figure.std() > 5  # something is drawn
    file.write_text(text.replace("## Numbers", "What it means.\n\n## Numbers"))
    run(finished, "--report", str(file), "--max_hours", "0")
    assert file.read_text() == text.replace("## Numbers", "What it means.\n\n## Numbers")
    capsys.readouterr()


def test_a_run_that_becomes_not_finite_is_recorded_as_failed(finished):
    handler = signal.getsignal(signal.SIGTERM)
    # The second update, before the first validation, is the one that fails.
    args = ablate.parse_args(["--output_dir", str(finished), *MINIATURE, "--max_train_steps", "8"])
    facts = ablate.prepare(args)
    failing = ablate.Run(ablate.BASELINE, 1e30, 5)
    ablate.do(args, failing, facts)
    record = ablate.read(args, failing, facts)
    assert "not finite" in record["failure"] or "non-finite" in record["failure"]
    args.seeds = [5]
    assert ablate.failed_seeds(args, failing.arm, 1e30, facts) == [5]
    assert signal.getsignal(signal.SIGTERM) == handler
    ablate.record_file(args, failing).unlink()
