"""Processes that know nothing of this package yet, but have imported what it stands on: they start in a moment.

They are forked from the server of `multiprocessing`, which imports the packages below once. A test for which the
imports of a process are the point starts one by `subprocess` instead. A worker of xdist needs the packages too: it
imports them before it collects tests, and the server is a fork of it.
"""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
import textwrap
import time
import types
import warnings
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).parents[1]
PRELOADED = [
    *("torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard"),
    *("diffusers.models.autoencoders.autoencoder_kl", "diffusers.pipelines.pipeline_utils", "diffusers.guiders"),
    *("diffusers.loaders.peft", "diffusers.loaders.single_file_utils", "diffusers.optimization"),
    *("accelerate", "datasets", "transformers", "peft", "safetensors.torch", "huggingface_hub"),
]
# Processes that do not agree wait for each other. No slow machine needs so long.
TIMEOUT = 1200


def fork_server():
    """Start the server as a fork of this process, which has imported nothing but what is needed here."""
    for name in PRELOADED:
        importlib.import_module(name)
    resource_tracker.ensure_running()

    def fork(executable, arguments, descriptors):
        if pid := os.fork():
            return pid
        try:
            # Pipes of the worker that stay open here would not end with it.
            kept = {0, 1, 2, resource_tracker.getfd(), *descriptors}
            for name in os.listdir("/proc/self/fd"):
                if int(name) not in kept:
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            # pytest's filters make errors of warnings; these are Python's.
            warnings.resetwarnings()
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            # What `multiprocessing` would have a new interpreter execute.
            exec(arguments[-1], {})
        finally:
            os._exit(0)

    with mock.patch.object(util, "spawnv_passfds", fork):
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def _run(code, script, arguments, environment, folder, paths, output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # As in a process that nobody forked: workers of a loader see that it ended.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [str(script or "-c"), *arguments]
    sys.path[:0] = paths
    try:
        if code is None:
            runpy.run_path(script, run_name="__main__")
        else:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(code, "<test>", "exec"), main.__dict__)
    finally:
        atexit._run_exitfuncs()


def start(code=None, script=None, arguments=(), environment=(), paths=(), folder=None, output=os.devnull):
    """Start a process that runs code or a script; `multiprocessing.Process`, which has a `pid` and an `exitcode`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict(environment)}
    if script is not None:
        script, paths = str(script), [str(Path(script).resolve().parent), *paths]
    arguments, paths = [str(argument) for argument in arguments], [*map(str, paths), str(ROOT)]
    process = context.Process(
        target=_run, args=(code, script, arguments, environment, str(folder or os.getcwd()), paths, str(output))
    )
    process.start()
    return process


def _finish(processes, outputs):
    """Wait for all, or until one has failed, which ends the others; what the first that failed has printed, or all."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.01)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()
    return [process.exitcode for process in processes], [Path(output).read_text() for output in outputs]


def run_python(code, *arguments, package=None):
    """Run code in a process that sees `package` (a folder that contains one) first; what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        paths = [package or ROOT]
        process = start(textwrap.dedent(code), arguments=arguments, paths=paths, output=output)
        (exitcode,), (printed,) = _finish([process], [output])
    assert exitcode == 0, printed[-8000:]
    return printed


def run_processes(script, *arguments, num_processes=2, **environment):
    """Run a script as several processes on the CPU, one thread each, as torchrun does; what they print."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **{"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
        **{"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)},
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(num_processes)]
        processes = [
            start(
                script=script,
                arguments=arguments,
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
                paths=[ROOT / "tests"],
                output=output,
            )
            for rank, output in enumerate(outputs)
        ]
        exitcodes, printed = _finish(processes, outputs)
    failed = [text for text, exitcode in zip(printed, exitcodes, strict=True) if exitcode]
    # Of all: a script's error is said by one of its processes.
    assert not failed, "".join(failed)[-8000:]
    return "".join(printed)
