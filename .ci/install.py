"""Makes or mends .venv, with all that `make` needs at the versions of constraints.txt. `make install` runs it.

TORCH, in the environment: where torch comes from, a package index, a folder with its wheel or the wheel; empty: where
pip finds it. This runs before anything is installed.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


TORCH = os.environ.get("TORCH", "").strip()
MINOR = "{}.{}".format(*sys.version_info)
PYTHON = f"Python {sys.version.split()[0]} ({sys.executable})"
VENV, STAMP, LOG = Path(".venv"), Path(".venv/.installed"), Path(".venv/install.log")
BIN, SITE = VENV / "bin" / "python", VENV / "lib" / f"python{MINOR}" / "site-packages"
# It shows its own progress; its warnings and errors go to the log.
PIP_INSTALL = (BIN, "-m", "pip", "install", "--disable-pip-version-check", "--log", LOG)
# A warning is of one attempt, and the next may have succeeded, but for the last.
NO_NETWORK = r"(?m)Retry\(total=0|^(?!.*WARNING).*(Max retries|timed out|IncompleteRead|Connection(\w*Error| broken))"


def stop(problem):
    sys.exit(f"Not installed: {problem}")


def explain(errors):
    """What a failed command wrote, in one line."""
    if re.search("No space left on device|Disk quota exceeded", errors):
        return "the disk is full, that of .venv or of TMPDIR. Make room and run the same command again."
    if re.search(NO_NETWORK, errors):
        return "no answer from the package index. Check network and proxy, and run the same command again."
    told = re.findall(r"(?m)^\S*\s*ERROR: (?!Exception|\[)(.+)", errors) or errors.strip().splitlines()[-1:]
    return f"{told[0].rstrip('.') if told else 'a command was ended from outside'}."


def run(*command, about="", **options):
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", close_fds=False, **options)
    if done.returncode:
        log = LOG.read_text(errors="replace") if LOG.exists() else ""
        stop(about + explain(log + done.stderr) + f" Details: {LOG}" * bool(log))


def wait_for_others():
    """Whether there were some. Until this script and its pip, which may outlive it, have ended, no other installs."""
    folder = os.open(".", os.O_RDONLY)
    os.set_inheritable(folder, True)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another installation is going on here; waiting for its end.", flush=True)
        fcntl.flock(folder, fcntl.LOCK_EX)
        return True
    except OSError:
        return False  # a file system without locks


def whole(pattern):
    """The packages in .venv that are complete: pip writes RECORD anew at the end, now with INSTALLER in it."""
    records = SITE.glob(f"{pattern}.dist-info/RECORD")
    return [record.parent for record in records if "/INSTALLER," in record.read_text(errors="replace")]


def is_sound():
    """Whether .venv is of this Python and has a whole pip, and no change of a version was interrupted in it."""
    code = "import sys; print('{}.{}'.format(*sys.version_info), sys.prefix != sys.base_prefix)"
    try:
        answer = subprocess.run([BIN, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return False
    # Until a package is complete, pip keeps the version that it replaces as ~something.
    return answer == f"{MINOR} True" and bool(whole("pip-*")) and not any(SITE.glob("~*"))


def torch_arguments(pinned):
    """TORCH as arguments of pip."""
    torch = os.path.expanduser(TORCH)
    if "://" in torch:
        return ["--index-url", torch, f"torch=={pinned}"]
    if os.path.isdir(torch):
        return ["--no-index", "--find-links", torch, f"torch=={pinned}"]
    if not (torch.endswith(".whl") and os.path.isfile(torch)):
        stop(f"TORCH must be a package index's address, a folder with a torch wheel, or a .whl file; got {torch}.")
    if not re.match(rf"torch-{re.escape(pinned)}[+-]", os.path.basename(torch)):
        stop(f"TORCH must be torch {pinned}, as in constraints.txt; got {torch}.")
    return [torch]


def plan(pinned, num_packages, sound):
    there = [folder.stem.removeprefix("torch-") for folder in whole("torch-*") if sound]
    torch = f"and torch {pinned} with CUDA libraries, about 3 GB, unless pip is set up to find a CPU build first."
    if TORCH:
        torch = f"and torch {pinned} from {TORCH}."
    elif there and there[0].split("+")[0] == pinned:
        torch = f"while torch {there[0]} is there already."
    elif sys.platform != "linux":
        torch = f"and torch {pinned}, on this system without CUDA libraries."
    elif not shutil.which("nvidia-smi") and not os.path.exists("/proc/driver/nvidia/version"):
        torch += "\nNo NVIDIA driver was found. To do without CUDA libraries, press Ctrl+C, and give the same command"
        torch += " TORCH=..., the place of a CPU build: see CONTRIBUTING.md."
    what = f"diffusers-mp and the {num_packages} packages of constraints.txt into {VENV} with {PYTHON}"
    untested = f"\nMade for Python 3.11 to 3.13; this is {MINOR}." * (sys.version_info >= (3, 14))
    return f"Installing {what}: up to 260 MB to download, {torch}{untested}"


def main():
    if sys.version_info < (3, 11):  # noqa: UP036
        stop(f"Python must be 3.11 or newer; got {PYTHON}. Name another one: make install PYTHON=python3.12")
    if None in map(find_spec, ("venv", "ensurepip")):
        stop(f"{PYTHON} lacks ensurepip or venv. On Debian and Ubuntu: apt install python{MINOR}-venv")
    os.chdir(Path(__file__).resolve().parents[1])
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", Path("constraints.txt").read_text()))
    torch = torch_arguments(pins["torch"]) if TORCH else None
    os.environ.setdefault("PIP_RETRIES", "3")  # for the pips that pip starts, too
    if wait_for_others() and STAMP.exists() and TORCH in ("", STAMP.read_text()):
        return
    sound = is_sound()
    print(plan(pins["torch"], len(pins), sound), flush=True)
    STAMP.unlink(missing_ok=True)
    LOG.unlink(missing_ok=True)
    if not sound:
        if VENV.exists():
            print(f"{VENV} is made anew: it was left half made, or by another Python.", flush=True)
        # In two steps, since venv hides the errors of ensurepip; not by the Python of .venv, should it run this.
        run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--without-pip", "--clear", VENV)
        run(BIN, "-Im", "ensurepip", "--default-pip", stdout=subprocess.DEVNULL)
    for folder in {*SITE.glob("*.dist-info")} - {*whole("*")}:
        shutil.rmtree(folder)  # pip would take the package for installed
    if torch:
        run(*PIP_INSTALL, "--no-deps", "--force-reinstall", *torch, about=f"TORCH={TORCH}: ")
    run(*PIP_INSTALL, "--constraint", "constraints.txt", "--editable", ".[dev]")
    answer = subprocess.run([BIN, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    version = answer.stdout.strip() or answer.stderr.strip().rpartition("\n")[2]
    if version.split("+")[0] != pins["torch"]:
        stop(f"torch must be {pins['torch']}, as in constraints.txt; got {version}. Remove .venv to begin anew.")
    LOG.unlink(missing_ok=True)
    STAMP.write_text(TORCH)
    print(f"Installed into {VENV}: torch {version}.", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, OSError) as error:
        stop(explain(str(error) or "interrupted; the same command goes on from here"))
