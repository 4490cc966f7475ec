"""`make install`: what it says, repairs and refuses, on a small project without network, with wheels made here."""

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT


# Installs itself in the development mode, as setuptools would, which is not here.
BACKEND = """
from pathlib import Path
from zipfile import ZipFile

def build_editable(folder, config_settings=None, metadata_directory=None):
    with ZipFile(Path(folder) / "small-1-py3-none-any.whl", "w") as wheel:
        for file in Path("small-1.dist-info").iterdir():
            wheel.write(file)
    return "small-1-py3-none-any.whl"
"""


def write_info(folder, name, version, *metadata):
    """What makes a wheel one: the files of `folder` and those of its .dist-info."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *metadata, ""]
    (info / "METADATA").write_text("\n".join(lines))
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").write_text("".join(f"{file.relative_to(folder)},,\n" for file in sorted(folder.rglob("*.*"))))


def write_wheel(folder, name, version, version_inside=None):
    """A wheel in `folder` with a module of its name, which may be of another version than the wheel says."""
    with tempfile.TemporaryDirectory() as content:
        (Path(content) / f"{name}.py").write_text(f"__version__ = '{version_inside or version}'\n")
        write_info(Path(content), name, version)
        path = shutil.make_archive(str(folder / f"{name}-{version}-py3-none-any"), "zip", content)
    return Path(path).rename(path.removesuffix(".zip") + ".whl")


def heed_interrupts():
    # A shell has its background jobs ignore them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(project, *arguments, **variables):
    """`make install` with nothing but what is here."""
    ours = {key: value for key, value in os.environ.items() if not re.match("MAKE|MFLAGS|TORCH|PYTHON|PIP_", key)}
    return subprocess.Popen(
        ["make", "install", f"PYTHON={sys.executable}", *arguments],
        cwd=project,
        env={**ours, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def install(project, *arguments, **variables):
    process = start(project, *arguments, **variables)
    output, errors = process.communicate()
    return process.returncode, output.splitlines(), errors.splitlines()


def refusal(project, *arguments, **variables):
    """The one line that an installation fails with, beside make's own."""
    code, _, errors = install(project, *arguments, **variables)
    assert code == 2
    (line,) = [error for error in errors if not error.startswith("make: ***")]
    assert line.startswith("Not installed: ")
    return line.removeprefix("Not installed: ")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with this one's Makefile, where an environment was left half made."""
    folder = tmp_path_factory.mktemp("project")
    (folder / ".ci").mkdir()
    for name in ("Makefile", ".ci/install.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "constraints.txt").write_text("# A comment.\npart==1.0\ntorch==2.13.0\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "small"\nbackend-path = ["."]'
    )
    (folder / "small.py").write_text(BACKEND)
    extra = [f'Requires-Dist: {name}; extra == "dev"' for name in ("torch", "part")]
    write_info(folder, "small", "1", "Provides-Extra: dev", *extra)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    for name in ("parts", "liar", "wheels", "other"):
        (folder / name).mkdir()
    write_wheel(folder / "parts", "part", "1.0")
    write_wheel(folder / "parts", "part", "2.0")  # constraints.txt has the other one
    return folder


@pytest.fixture(scope="module")
def first(project):
    """The first installation, of a torch that is not what its wheel says. One for all: it is most of the time."""
    write_wheel(project / "liar", "torch", "2.13.0+cpu", "2.12.1")
    return install(project, PIP_FIND_LINKS="liar parts")


@pytest.fixture
def script(project, monkeypatch):
    """The script as a module, in the folder of the project."""
    spec = importlib.util.spec_from_file_location("install", project / ".ci" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(project)
    return module


def test_torch_is_looked_at_when_it_is_installed(first):
    code, output, errors = first
    assert code == 2
    assert output[0].startswith(
        "Installing diffusers-mp and the 2 packages of constraints.txt into .venv with Python 3."
    )
    assert "up to 260 MB to download" in output[0]
    assert ".venv is made anew: it was left half made, or by another Python." in output[1:3]
    assert errors[0].startswith("Not installed: torch must be 2.13.0, as in constraints.txt; got 2.12.1.")


def test_install_repair_refuse(project, first, script):
    stamp, site = project / ".venv" / ".installed", project / script.SITE
    assert not stamp.exists()
    # A package whose installation was killed, as pip leaves it: the RECORD of the wheel, and not all of its files.
    record = site / "part-1.0.dist-info" / "RECORD"
    assert "INSTALLER" in record.read_text()
    record.write_text(re.sub(".*INSTALLER.*\n", "", record.read_text()))
    (site / "part.py").unlink()
    # It is mended; and another TORCH replaces torch, though it has the same version.
    wheels = write_wheel(project / "wheels", "torch", "2.13.0+cpu").parent
    code, output, errors = install(project, f"TORCH={wheels}", PIP_FIND_LINKS="parts")
    assert (code, errors) == (0, [])
    assert f"and torch 2.13.0 from {wheels}." in output[0]
    assert output[-1] == "Installed into .venv: torch 2.13.0+cpu."
    assert (site / "part.py").exists()
    # Done is done, with and without TORCH; another TORCH is not.
    for arguments, expected in ([], False), ([f"TORCH={wheels}"], False), (["TORCH=elsewhere"], True):
        assert any(".ci/install.py" in line for line in install(project, "--dry-run", *arguments)[1]) == expected
    # What is refused at once changes nothing.
    other = write_wheel(project / "other", "torch", "2.12.1+cpu")
    assert refusal(project, f"TORCH={other}") == f"TORCH must be torch 2.13.0, as in constraints.txt; got {other}."
    assert refusal(project, "TORCH=nowhere.whl").endswith(
        "a folder with a torch wheel, or a .whl file; got nowhere.whl."
    )
    assert stamp.exists()


class TestOnceInstalled:
    @pytest.fixture(autouse=True)
    def _stamp(self, project, first):
        (project / ".venv" / ".installed").touch()

    def test_an_index_or_a_folder_is_asked_for_the_version_of_constraints(self, script, monkeypatch):
        for torch, option in ("https://index/cpu", "--index-url"), (".", "--find-links"):
            monkeypatch.setattr(script, "TORCH", torch)
            assert script.torch_arguments("2.13.0")[-3:] == [option, torch, "torch==2.13.0"]

    def test_no_network(self, project):
        # Nothing listens at port 9.
        line = refusal(project, "TORCH=http://127.0.0.1:9/simple", PIP_NO_INDEX="0", PIP_RETRIES="1")
        assert line.startswith("TORCH=http://127.0.0.1:9/simple: no answer from the package index. Check network")
        assert line.endswith(" Details: .venv/install.log")
        assert not (project / ".venv" / ".installed").exists()  # torch might have been half replaced
        assert "http://127.0.0.1:9/simple/torch/" in (project / ".venv" / "install.log").read_text()

    @pytest.mark.parametrize("signal_number", [None, signal.SIGINT])
    def test_waits_for_another_installation(self, project, signal_number):
        folder = os.open(project, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        process = start(project, "--always-make")
        said = process.stdout.readline()
        if signal_number:
            os.killpg(process.pid, signal_number)
        os.close(folder)
        output, errors = process.communicate()
        assert said == "Another installation is going on here; waiting for its end.\n"
        # What the other one did is not done again.
        assert output == ""
        assert (process.returncode == 0) == (signal_number is None)
        if signal_number:
            assert "Not installed: interrupted; the same command goes on from here.\n" in errors
            assert "Traceback" not in errors

    def test_an_environment_is_sound_if_python_and_pip_are_whole(self, project, script):
        assert script.is_sound()
        (pip,) = script.SITE.glob("pip-*.dist-info")
        for path, broken in (
            (project / ".venv" / "pyvenv.cfg", None),  # else pip would install into the Python that made it
            (project / ".venv" / "bin" / "python", "#!/bin/sh\necho 3.9 True"),
            (project / ".venv" / "bin" / "python", None),
            (pip / "RECORD", "pip/__init__.py,,\n"),
        ):
            kept = path.rename(project / "kept")
            if broken:
                path.write_text(broken)
                path.chmod(0o755)
            assert not script.is_sound(), path
            kept.rename(path)
        leftover = script.SITE / "~orch"
        leftover.mkdir()
        assert not script.is_sound()
        leftover.rmdir()
        assert script.is_sound()

    def test_the_plan_says_what_torch_will_be(self, script, monkeypatch):
        assert "while torch 2.13.0+cpu is there already." in script.plan("2.13.0", 2, sound=True)
        monkeypatch.setattr(sys, "platform", "linux")
        for driver in ("nvidia-smi", "/proc/driver/nvidia/version", ""):
            monkeypatch.setattr(shutil, "which", lambda name, driver=driver: name if name == driver else None)
            monkeypatch.setattr(os.path, "exists", lambda path, driver=driver: path == driver)
            # Another version, or an environment that will be made anew.
            for plan in script.plan("2.14.0", 2, sound=True), script.plan("2.13.0", 2, sound=False):
                assert "with CUDA libraries, about 3 GB" in plan
                assert ("TORCH=..." in plan) == ("No NVIDIA driver was found" in plan) == (not driver)
        monkeypatch.setattr(sys, "platform", "darwin")
        assert "without CUDA libraries." in script.plan("2.14.0", 2, sound=True)
        assert ("Made for Python 3.11" in script.plan("2.13.0", 2, sound=True)) == (sys.version_info >= (3, 14))


def test_a_python_that_cannot_make_environments(project, tmp_path):
    # As Debian's python3 is without python3-venv.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None")
    line = refusal(project, "--always-make", PYTHONPATH=str(tmp_path))
    assert line.endswith(f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv")


def test_an_old_python(project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 10, 13, 'final', 0)")
    line = refusal(project, "--always-make", PYTHONPATH=str(tmp_path))
    assert line.startswith("Python must be 3.11 or newer; got Python 3.")
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "log, line",
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "the disk is full",
        ),
        ("Traceback\nOSError: [Errno 122] Disk quota exceeded: '/tmp/x'", "the disk is full"),
        ("2026-11-30   WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'x'", "no answer"),
        ("pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool: Read timed out.", "no answer"),
        # The second attempt succeeded: something else is wrong.
        (
            "  WARNING: Retrying (Retry(total=2)) after connection broken by 'NewConnectionError()'\n"
            "2026-11-30 ERROR: Exception:\n2026-11-30 ERROR: Cannot install a and b.\n2026-11-30 ERROR: Failed\nlast",
            "Cannot install a and b.",
        ),
        ("Error: Command died\nlast line", "last line."),
        ("", "a command was ended from outside."),
    ],
)
def test_what_pip_writes_becomes_a_line(script, log, line):
    assert script.explain(log).startswith(line)
    assert "\n" not in script.explain(log)


def test_torch_is_pinned_once():
    assert len(re.findall(r"(?m)^torch==[\d.]+$", (ROOT / "constraints.txt").read_text())) == 1
