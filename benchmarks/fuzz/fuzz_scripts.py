"""Wrong, odd and damaged inputs to all scripts of examples/, by seed: how does each of them end?

    python benchmarks/fuzz/fuzz_scripts.py --num_inputs 1000

One process imports the scripts once. An input is a command that works, with one or two flags set, taken away or put in
at random, or with a damaged file in one of its folders; models are tiny, so that it ends within a second. Outcomes:

    clear      refused in one line that names a flag or file of the command
    unclear    refused in one line that names neither
    failed     was accepted, and failed with a line of its own, as a training that diverges
    foreign    an exception that nobody foresaw; without the scripts' handler it would have been a traceback
    effect     accepted, and a result differs from that without the flag
    default    accepted, the flag says what holds anyway
    no effect  accepted, and nothing differs
    unharmed   accepted with a damaged file, which is made again, or not read
    parsed     a command line of the demo, which takes minutes, was understood
    speed      accepted; a flag of which only time, place or a log depends
    slow       not ended after a minute

Exits with 1 if an input is foreign, unclear, slow or without effect.
"""

import argparse
import collections
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path[:0] = [str(Path(__file__).parent), str(EXAMPLES)]
SCRIPTS = ("train_mpdit", "encode_latents", "evaluate", "finetune_rotation", "reconstruct_ema", "convert_dit", "demo")
JUNK = ("", " ", "x", "-1", "0", "nan", "inf", "-inf", "1e400", "999999999999", "4294967296", "1.5", "日本", "[]")
PLAUSIBLE = ("1", "2", "3", "0.5", "0.1", "1e-3", "2.5", "cat", "none", "latest")
# Of these nothing in the results depends by their nature: time, memory, place, what is said beside, a limit that small
# runs do not reach.
OF_SPEED = {
    *("cache_dir", "encode_batch_size", "dataloader_num_workers", "batch_size", "streaming"),
    *(
        "gradient_checkpointing",
        "allow_tf32",
        "report_to",
        "logging_dir",
        "checkpoints_total_limit",
        "mixed_precision",
    ),
    *("hub_token", "hub_license", "latents_dir", "output_dir", "shard_size", "skip_corrupt", "checkpointing_steps"),
    *("on_non_finite", "resume_from_checkpoint", "vae", "dtype", "max_grad_norm"),
    *("tracker_project_name", "tracker_run_name", "write_card"),  # the last acts in the folder of the model
}
NOT_RESULTS = ("training_arguments.json", "README.md", ".lock", "state.json", "manifest.json", "snapshot.json")
BAD = ("foreign", "unclear", "no effect", "slow")


class Outcome(NamedTuple):
    """How a command ended: a kind, what it said last, and a digest of what it left."""

    kind: str
    line: str
    digest: str = ""


class Fuzzer:
    """Draws commands, runs them in this process and says how they end."""

    def __init__(self, folder: Path, seed: int):
        from fuzz_inputs import make_inputs

        self.folder, self.seed, self.share_damaged = folder, seed, 0.3
        self.inputs = make_inputs(folder / "inputs")
        sys.path.insert(0, str(self.inputs))
        self.scripts = {name: importlib.import_module(name) for name in SCRIPTS}
        self.bases = self.base_commands()
        self.plain: dict[tuple, Outcome] = {}
        kept = {"train_mpdit": "run", "evaluate": "evaluation"}  # what others read: a run with snapshots, statistics
        for name, command in self.bases.items():
            more = {"output_dir": [str(self.inputs / kept[name])]} if name in kept else {}
            ended = self.run(name, {**command, **more}) if command else None
            assert ended is None or ended.kind == "accepted", (name, ended)
        (statistics,) = (self.inputs / "evaluation" / "reference").glob("*.safetensors")
        shutil.copy(statistics, self.inputs / "reference.safetensors")
        self.bases["reconstruct_ema"] = {"": [str(self.inputs / "run" / "ema_snapshots")], "ema_stds": ["0.07"]}

    def base_commands(self) -> dict[str, dict[str, list[str]]]:
        """For each script a command that works: flag → its values."""
        at = {name: [str(self.inputs / name)] for name in ("images", "model.json", "pipeline", "dit", "dit.pt", "vae")}
        data = {"train_data_dir": at["images"], "cache_dir": [str(self.folder / "cache")]}
        train = {"train_batch_size": ["2"], "max_train_steps": ["2"], "num_validation_images": ["2"]}
        return {
            "train_mpdit": {
                **data,
                **train,
                **{"resolution": [str(8)], "vae": ["none"], "model_config_name_or_path": at["model.json"]},
                **{"ema_snapshot_steps": ["1"], "validation_steps": ["2"], "validation_inference_steps": ["2"]},
                **{"checkpointing_steps": ["2"], "logging_steps": ["1"]},
            },
            "encode_latents": {**data, "resolution": ["8"], "vae": ["none"]},
            "evaluate": {
                **{"pretrained_model_name_or_path": at["pipeline"], "reference_dir": at["images"]},
                **{"extractors": ["fuzz_features:means"], "num_samples": ["6"], "nearest_k": ["1"]},
                **{"num_inference_steps": ["2"], "cache_dir": [str(self.folder / "cache")]},
            },
            "finetune_rotation": {**data, **train, "pretrained_model_name_or_path": at["dit"]},
            "reconstruct_ema": {},
            "convert_dit": {"checkpoint_path": at["dit.pt"], "num_heads": ["1"], "vae": at["vae"]},
            "demo": {"max_train_steps": ["2"]},
        }

    def draw(self, number: int) -> tuple[str, dict[str, list[str]], list[str], str | None]:
        """Input `number`: script, command, the flags changed, and what was damaged."""
        rng = random.Random(f"{self.seed} {number}")
        script = rng.choices(SCRIPTS, weights=(8, 4, 5, 5, 3, 3, 1))[0]
        command, changed = dict(self.bases[script]), []
        if rng.random() < self.share_damaged and script != "demo":
            return script, *self.damaged(command, rng, number)
        actions = [action for action in self.parser(script)._actions if action.dest not in ("help", "debug")]
        for action in rng.sample(actions, rng.choice((1, 1, 2))):
            name = action.dest if action.option_strings else ""
            if name in command and rng.random() < 0.1:
                del command[name]
            elif action.nargs == 0:
                command[name] = []
            else:
                count = 1 if action.nargs is None else rng.choice((1, 2))
                command[name] = [self.value(action, rng) for _ in range(count)]
            changed.append(name)
        return script, command, changed, None

    def damaged(self, command, rng, number):
        """A command one of whose folders is a damaged copy."""
        from fuzz_inputs import damage

        run, evaluation = self.inputs / "run", self.inputs / "evaluation"
        given = [(name, Path(values[0]), {}) for name, values in command.items() if name != "cache_dir" and values]
        given = [each for each in given if each[1].is_dir()]
        if "ema_snapshot_steps" in command:  # the trainer
            given += [("latents_dir", run / "latents", {}), ("latents_dir", run / "latents", {"train_data_dir": None})]
            given += [("output_dir", run, {"resume_from_checkpoint": ["latest"], "max_train_steps": ["3"]})] * 2
        elif "extractors" in command:  # the evaluation: what it goes on from, and a run with snapshots
            given += [("output_dir", evaluation, {"num_inference_steps": ["2", "3"]})]
            given += [("pretrained_model_name_or_path", run, {"ema_stds": ["0.07"]})]
        elif "resolution" in command:
            given += [("latents_dir", run / "latents", more) for more in ({}, {"verify": []})]
        if not given:
            return command, [], None
        name, source, more = rng.choice(given)
        target = self.folder / "damaged" / str(number)
        _, what = damage(source, target, rng)
        command = command | more | {name: [str(target)]}
        if "verify" in command:
            command = {name: command[name] for name in ("verify", "latents_dir")}
        return {name: values for name, values in command.items() if values is not None}, [], what

    def value(self, action: argparse.Action, rng: random.Random) -> str:
        """Something that a flag may be given."""
        if action.choices and rng.random() < 0.7:
            return str(rng.choice(list(action.choices)))
        if rng.random() < 0.25 or any(
            part in action.dest for part in ("dir", "path", "vae", "statistics", "id2label")
        ):
            there = [path for path in sorted(self.inputs.iterdir())]
            paths = [*map(str, there), str(self.inputs / "nowhere"), str(self.inputs / "file.txt" / "x"), "user/name"]
            return rng.choice([*paths, *JUNK[:3], "日本", "./nowhere"])
        return rng.choice(JUNK if rng.random() < 0.5 else PLAUSIBLE)

    def parser(self, script: str) -> argparse.ArgumentParser:
        module = self.scripts[script]
        parser = module.make_parser()
        parser.prog = f"{script}.py"
        return parser

    def words(self, script: str, command: dict[str, list[str]], output: Path) -> list[str]:
        """The command as it is typed; what a script writes to is new, unless the command says it."""
        positional = command.get("", [])
        flags = {name: values for name, values in command.items() if name}
        place = "latents_dir" if script == "encode_latents" else "output_dir"
        if place not in flags and script != "demo":
            flags[place] = [str(output)]
        return [*positional, *(word for name, values in flags.items() for word in (f"--{name}", *values))]

    def run(self, script: str, command: dict[str, list[str]], names: tuple[str, ...] = ()) -> Outcome:
        """Run a command in an empty folder: "accepted", or how it was refused, clearly with one of `names`."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        words, said, former = self.words(script, command, place / "out"), io.StringIO(), os.getcwd()
        os.chdir(place)
        sys.argv, code = [f"{script}.py", *words], 0
        signal.signal(signal.SIGALRM, _too_slow)
        signal.alarm(60)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.call(script)
        except SystemExit as ended:
            code = ended.code or 0
        except TimeoutError:
            code = -1
        finally:
            signal.alarm(0)
            os.chdir(former)
            _reset()
        lines = [line for line in said.getvalue().replace("\r", "\n").splitlines() if line.strip()]
        line = lines[-1] if lines else ""
        digest = _digest(place)
        shutil.rmtree(place)
        if code == 0:
            return Outcome("accepted", line, digest)
        if code == -1:
            return Outcome("slow", "")
        if "--debug shows where" in line or ": error: " not in line:
            return Outcome("foreign", line)
        if code == 1:
            return Outcome("failed", line)
        is_named = any(name in line for name in names) or " --" in line
        return Outcome("clear" if is_named else "unclear", line)

    def call(self, script: str) -> None:
        """What `if __name__ == "__main__"` of a script does; of the demo, which takes minutes, the command line."""
        from diffusers_mp.scripts import command_line, run_script

        module, parser = self.scripts[script], self.parser(script)
        args = command_line(module.parse_args, parser)
        if script != "demo":
            run_script(module.main, args, parser)

    def outcome(self, number: int) -> tuple[str, Outcome, list[str]]:
        """Run input `number`; where it is accepted, find what each changed flag did."""
        script, command, changed, damaged = self.draw(number)
        names = [f"--{name}" if name else "snapshots_dir" for name in changed]
        names += [value for name in changed for value in command.get(name, ()) if len(value) > 3]
        if damaged is not None:
            names = [str(self.folder / "damaged" / str(number)), damaged.split()[0]]
        ended = self.run(script, command, tuple(names))
        words = [script, *[f"--{name} {' '.join(command.get(name, ['taken away']))}" for name in changed]]
        if damaged is not None:
            return ended.kind.replace("accepted", "unharmed"), ended, [script, damaged]
        if ended.kind != "accepted" or script == "demo":
            return ended.kind.replace("accepted", "parsed"), ended, words
        kinds = [self.effect(script, command, name, ended) for name in changed]
        order = ("no effect", "effect", "default", "speed")
        return next((kind for kind in order if kind in kinds), "default"), ended, words

    def effect(self, script: str, command: dict[str, list[str]], name: str, ended: Outcome) -> str:
        """What one flag of an accepted command did: compared with the command that works otherwise."""
        if name in OF_SPEED:
            return "speed"
        base = self.bases[script].get(name)
        without = {key: values for key, values in command.items() if key != name}
        without |= {} if base is None else {name: base}
        if without == command:
            return "default"
        key = (script, json.dumps(without, sort_keys=True))
        if key not in self.plain:
            self.plain[key] = self.run(script, without)
        other = self.plain[key]
        if other.kind != "accepted" or other.digest != ended.digest:
            return "effect"
        return "default" if self.is_default(script, command, without, name) else "no effect"

    def is_default(self, script: str, command, without, name: str) -> bool:
        """Whether a flag was given the value that it has without it."""
        values = []
        for each in (command, without):
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
                sys.argv = [f"{script}.py", *self.words(script, each, self.folder / "unused")]
                values.append(getattr(self.scripts[script].parse_args(), name, None))
        if len(values) < 2 or values[0] == values[1]:
            return True
        (told,) = (action.help or "" for action in self.parser(script)._actions if action.dest == name)
        # What is said and holds anyway: the last snapshot, and the level of classes where there is one.
        holds_anyway = (name, values[0]) == ("step", 2) or name == "class_level"
        return values[1] is None and (holds_anyway or f"[{values[0]}" in told)


def _too_slow(*_):
    raise TimeoutError("a minute has passed")


def _reset() -> None:
    """As in a new process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        os.environ.pop(name, None)


def _digest(folder: Path) -> str:
    """Of the results in a folder: names of all files, and content but for times and records of the command line."""
    content = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        content.update(name.encode())
        if path.name in NOT_RESULTS or "checkpoint-" in name:
            continue
        text = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            text = "".join(map(_timeless, text.decode().splitlines())).encode()
        content.update(text)
    return content.hexdigest()


def _timeless(line: str) -> str:
    if "images_per_second" in line:
        entry = {key: value for key, value in json.loads(line).items() if not key.endswith("per_second")}
        return json.dumps(entry)
    return "" if "seconds" in line else line


def table(outcomes: list[tuple[str, Outcome, list[str]]]) -> str:
    """How many inputs ended how, by script, and the lines of the bad ones."""
    kinds = (
        "clear",
        "unclear",
        "foreign",
        "failed",
        "effect",
        "default",
        "no effect",
        "speed",
        "unharmed",
        "parsed",
        "slow",
    )
    counts = collections.Counter((words[0], kind) for kind, _, words in outcomes)
    rows = [f"{'':20}" + "".join(f"{kind:>11}" for kind in kinds)]
    for script in (*SCRIPTS, "all"):
        found = [counts[script, kind] for kind in kinds]
        if script == "all":
            found = [sum(counts[each, kind] for each in SCRIPTS) for kind in kinds]
        rows.append(f"{script:20}" + "".join(f"{count:>11}" for count in found))
    for bad in BAD:
        rows += [f"{bad}: {' '.join(words)}\n    {ended.line}" for kind, ended, words in outcomes if kind == bad]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_inputs", type=int, default=100, help="how many are drawn")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.seed)
        outcomes = [fuzzer.outcome(number) for number in range(args.first, args.first + args.num_inputs)]
    print(table(outcomes))
    sys.exit(any(kind in BAD for kind, _, _ in outcomes))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
