"""The real huggingface_hub client in processes that speak to `hub_server.py`, and the small pipelines it carries.

`huggingface_hub` reads its address when it is imported, so what speaks to the server runs in processes that are forked
from one that has the address and has imported what this package stands on. Xet, the Hub's own transfer, needs the
Hub's servers and is untested.
"""

import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from diffusers import DDPMScheduler
from helpers import ROOT, tiny_model
from processes import PRELOADED

from diffusers_mp import MPDiTPipeline


TOKEN, READ_TOKEN = "hf_" + "WriteSecret" * 3, "hf_" + "ReadSecret" * 3


NAMES = {0: "cat", 1: "dog", 2: "a | b"}


# Of huggingface_hub to its HTTP client, of diffusers to huggingface_hub and to NumPy; theirs to mend.
THEIR_WARNINGS = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning",
    "ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning",
)


INPUTS = {"class_labels": [0, 1], "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}


RECORD = {
    "arguments": {"swap": "mean", "max_train_steps": 3, "learning_rate": 1e-4, "dataset_name": None},
    "num_parameters": {"before": 2000, "after": 1900},
    **{stage: {"loss": 0.25, "mse": 0.125, "relative_error": 0.5} for stage in ("before", "after_swap", "final")},
}


DIT_OPTIONS = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}


def blocks_of(text):
    """Python of a card."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def make_pipeline(folder, num_classes=3, vae=None, seed=0, **config):
    config = {"num_classes": num_classes, "class_dropout_prob": 0.1 if num_classes else 0.0, **config}
    transformer = tiny_model(seed=seed, **config).eval()
    pipe = MPDiTPipeline(
        transformer,
        DDPMScheduler(clip_sample=False),
        vae,
        id2label=NAMES if num_classes else None,
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.1, 0.9, 1.0, 1.2],
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def rewrite(path, text):
    path.unlink(missing_ok=True)
    path.write_text(text)


PUSH = """
import json, logging, os, sys, time, traceback
logging.basicConfig(level=os.environ.get("LEVEL", "DEBUG"))
time.sleep = lambda seconds: None
from diffusers_mp.publishing import hub
results = []
for name, arguments, options in json.load(sys.stdin):
    try:
        results.append({"value": getattr(hub, name)(*arguments, **options)})
    except Exception as error:
        traceback.print_exc()
        results.append({"error": type(error).__name__, "message": str(error)})
print("RESULTS " + json.dumps(results))
"""


def command(code):
    return [sys.executable, "-W", "error", *(f"-W{filter}" for filter in THEIR_WARNINGS), "-P", "-c", code]


def environment_of_client(server, home):
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "XDG_CACHE_HOME", "PYTHONWARNINGS")
    return {
        **{name: value for name, value in os.environ.items() if name not in names and "proxy" not in name.lower()},
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DEBUG": "1",
        # `datasets` would look for a newer loader, and count its use, on servers that are not ours.
        "HF_DATASETS_OFFLINE": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "OMP_NUM_THREADS": "1",
    }


FORKS = """
import importlib, io, json, os, sys, traceback
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
for line in sys.stdin:
    task = json.loads(line)
    if (child := os.fork()) == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT), number)
        try:
            os.chdir(task["home"])
            os.environ.update(task["environment"])
            sys.stdin = io.StringIO(task["stdin"])
            exec(task["code"], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""


@functools.cache
def forking(server):
    """A folder and the process in it that forks others; each of them finds its home under one name."""
    folder = Path(tempfile.mkdtemp())
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command(FORKS), json.dumps(PRELOADED)],
            env=environment_of_client(server, folder / "home"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def end():
        process.kill()
        process.communicate()
        shutil.rmtree(folder)

    atexit.register(end)
    return folder, process


def client(server, home, code, stdin, **environment):
    """Run code against the server, with a clean cache; its results. No output, no file in `home` may hold a token."""
    home.mkdir(parents=True, exist_ok=True)
    if {"HF_HUB_OFFLINE", "HF_DEBUG"} & environment.keys():  # read when huggingface_hub is imported
        environment = {**environment_of_client(server, home), **environment}
        run = {"input": json.dumps(stdin), "env": environment, "cwd": home, "capture_output": True, "text": True}
        done = subprocess.run(command(code), **run)
        return checked(done.stdout, done.stderr, home)
    folder, process = forking(server)
    (folder / "home").unlink(missing_ok=True)
    (folder / "home").symlink_to(home, target_is_directory=True)
    outputs = {name: folder / name for name in ("stdout", "stderr")}
    for output in outputs.values():
        output.unlink(missing_ok=True)
    task = {"home": str(home), "code": code, "stdin": json.dumps(stdin), "environment": environment}
    print(json.dumps({**task, **{name: str(path) for name, path in outputs.items()}}), file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n", (folder / "log").read_text()
    return checked(*(output.read_text() for output in outputs.values()), home)


def checked(stdout, stderr, home):
    assert "RESULTS " in stdout, stderr
    output = stdout + stderr
    for token in (TOKEN, READ_TOKEN):
        assert token not in output
        assert not holding(token, home)
    return json.loads(stdout.split("RESULTS ")[1]), output


def holding(token, folder):
    return [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def call(name, *arguments, **options):
    return [name, [str(argument) for argument in arguments], options]


def push(server, home, *calls, **environment):
    results, output = client(server, home, PUSH, calls, **environment)
    print(output)
    return results


def publish(folder, repo_id="user/name", **options):
    return call("publish", folder, repo_id, **{"token": TOKEN, **options})


LOAD = """
import json, sys, time
time.sleep = lambda seconds: None
import numpy as np, torch
torch.set_num_threads(1)
# The client keeps what arrived in whole chunks, of 10 MiB; the files here are small.
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000
from diffusers_mp import MPDiTPipeline
results, tasks = [], json.load(sys.stdin)
for task in tasks["loads"]:
    try:
        pipe = MPDiTPipeline.from_pretrained(**task["options"])
        pipe.set_progress_bar_config(disable=True)
        np.save(task["output"], pipe(**tasks["inputs"], generator=torch.Generator().manual_seed(0)).images)
        results.append({})
    except Exception as error:
        results.append({"error": type(error).__name__, "message": str(error)})
for block in tasks.get("blocks", []):
    exec(block, {})
print("RESULTS " + json.dumps(results))
"""


def load(server, home, *options, blocks=()):
    """Load with each of the options, a dict with "pretrained_model_name_or_path"; the images or the error of each."""
    home.mkdir()
    options = [{"pretrained_model_name_or_path": "user/name", **each} for each in options]
    loads = [{"options": each, "output": str(home / f"{k}.npy")} for k, each in enumerate(options)]
    tasks = {"loads": loads, "inputs": INPUTS, "blocks": list(blocks)}
    results, _ = client(server, home, LOAD, tasks)
    return [result if result else np.load(home / f"{k}.npy") for k, result in enumerate(results)]
