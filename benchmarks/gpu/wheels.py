"""What the run needs beside torch, on a machine without network: wheels that travel there, and a floor for torch."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
# `torch.compiler.is_exporting`, which every training step asks, came with it; the tests run on a later one.
TORCH_FLOOR = (2, 7)
# Of the run, beside the package's own requirements.
TOOLS = ("pytest", "matplotlib", "scikit-learn")
# A machine for training has them, and what they require. All but torch are compiled, and together they are large.
THERE = ("torch", "matplotlib", "numpy", "pandas", "pillow", "pyarrow", "scikit-learn")


def collect(folder: Path, python_version: str) -> None:
    """Download the wheels that another machine wants, at the versions of this environment.

    Args:
        folder (Path): gets them.
        python_version (str): of the other machine, as in "3.12"; its platform must be this one's.
    Raises:
        subprocess.CalledProcessError: if pip fails, which has said why.
    """
    pins = [f"{name}=={version}" for name, version in needed().items()]
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", python_version, "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *pins], check=True)


def needed() -> dict[str, str]:
    """Name and version of each distribution that is required here, directly or not, and is not `THERE`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, there = _closure([*project["dependencies"], *TOOLS], stop=THERE), _closure(THERE)
    return {name: version for name, version in sorted(found.items()) if name not in there}


def _closure(requirements, stop=()):
    # A machine that is given wheels need not have it before.
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found, waiting = {}, list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_wanted and name not in found and name not in stop:
            found[name] = importlib.metadata.version(name)
            waiting += importlib.metadata.requires(name) or ()
    return found


def install(folder: Path) -> Path:
    """Install the wheels of a folder into a new one, which this process and those that it starts look into first.

    Args:
        folder (Path): what `collect` has filled; wheels that the machine need not have may be deleted from it.
    Returns:
        Path: the new folder, to be removed at the end.
    Raises:
        SystemExit: if there is no wheel, or one is not for this Python.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"--wheels must be a folder of wheels, got {folder} with none: make one by --vendor {folder}")
    target = Path(tempfile.mkdtemp(prefix="wheels-"))
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, *wheels])
    if done.returncode:
        shutil.rmtree(target)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"--wheels must be for Python {version}, got what pip refuses above: --vendor --python_version {version}"
        )
    look_first_into(target)
    return target


def look_first_into(folder: Path) -> None:
    """For imports of this process and of those that it starts."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def check_torch() -> str:
    """The installed version of torch.

    Raises:
        SystemExit: if there is none, or it is below `TORCH_FLOOR`.
    """
    floor = ".".join(map(str, TORCH_FLOOR))
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"torch must be at least {floor}, got none: run this by the Python that has it, make gpu PYTHON=...")
    if tuple(map(int, version.split(".")[:2])) < TORCH_FLOOR:
        sys.exit(f"torch must be at least {floor}, got {version}: install a later one")
    return version
