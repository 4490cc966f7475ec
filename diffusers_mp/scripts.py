"""How a script ends that cannot go on: one line that says what to put right; a traceback only with `--debug`.

    if __name__ == "__main__":
        args = command_line(parse_args, make_parser())
    …
    if __name__ == "__main__":
        run_script(main, args, make_parser())

Nothing heavy is imported here, so that `--help` and wrong flags are answered at once.
"""

import argparse
import contextlib
import dis
import errno
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .arguments import FLAG_OF_ARGUMENT, check_paths
from .masking import mask


# What a wrong command line ends with, as argparse has it; what failed otherwise; and Ctrl+C, as shells have it.
USAGE, FAILURE, INTERRUPTED = 2, 1, 130
_MAX_FOREIGN = 400
_STARTED = time.time()
# Of a disk or a machine, and not of a path that was given.
_NOT_OF_A_PATH = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class RunFailedError(RuntimeError):
    """What was asked for rightly and failed all the same: a script ends with 1."""


class ScriptParser(argparse.ArgumentParser):
    """argparse's parser with `--debug`; refuses empty values, and says an error in one line, from one process."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.given: set[str] = set()
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_args(self, args=None, namespace=None):
        """As argparse's; `given` has the names of the flags that stand on the command line."""
        unset, names = object(), [action.dest for action in self._actions if action.dest != "help"]
        parsed = super().parse_args(args, argparse.Namespace(**dict.fromkeys(names, unset)))
        self.given = {name for name in names if getattr(parsed, name) is not unset}
        for name in set(names) - self.given:
            setattr(parsed, name, self.get_default(name))
        return parsed

    def _get_value(self, action, arg_string):
        if not arg_string.strip():
            rule = "must not be empty, as it is where a variable of the shell is not set"
            raise argparse.ArgumentError(action, rule)
        return super()._get_value(action, arg_string)

    def error(self, message: str):
        """End the script with a line and exit code 2."""
        if message.startswith("unrecognized arguments"):
            message += " (--help shows all flags)"
        end(f"{self.prog}: error: {message}", USAGE)


@contextlib.contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Within it, a `ValueError` or `OSError` ends the script as a wrong flag does: for checks of a command line."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(message_of(error, parser)[0])


def command_line(parse_args: Callable[[], argparse.Namespace], parser: ScriptParser) -> argparse.Namespace:
    """A script's arguments, or the end of it with a line; checks paths, which costs nothing, before the imports."""
    with refusals(parser):
        args = parse_args()
        check_paths(args)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop_importing)
    return args


def _stop_importing(*_) -> None:
    end(f"\n{Path(sys.argv[0]).name}: interrupted", INTERRUPTED)


def run_script(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    parser: ScriptParser,
    interrupted: str = "interrupted",
) -> None:
    """Run a script's `main`; what it raises becomes one line on stderr and an exit code.

        2     what the user can put right: a `ValueError`, an `OSError`; of this package a `RuntimeError`, `TypeError`
        1     what failed otherwise; where nobody has foreseen it, the line names the exception
        130   Ctrl+C

    Of several processes that a launcher has started on a machine, the first that meets an error says it.

    Args:
        main (callable): takes `args`.
        args (argparse.Namespace): the command line; with `debug`, errors are raised as they are.
        parser (ScriptParser): of the command line; tells which arguments of the package are its flags.
        interrupted (str): what is said after Ctrl+C.
    Raises:
        SystemExit: with the exit code.
    """
    if signal.getsignal(signal.SIGINT) is _stop_importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        end(f"\n{parser.prog}: {interrupted}", INTERRUPTED)
    except Exception as error:
        if args.debug:
            raise
        message, code = message_of(error, parser)
        end(f"{parser.prog}: error: {message}", code)


def end(line: str, code: int) -> None:
    """Leave the process with an exit code, after a line, without secrets, that no other process has said."""
    if _is_first_to_say():
        print(mask(line), file=sys.stderr, flush=True)
    sys.exit(code)


def message_of(error: BaseException, parser: argparse.ArgumentParser) -> tuple[str, int]:
    """An exception as one line, with the flags in place of the arguments that it names; and the exit code."""
    text, own, is_of_file = str(error) or "no message", _is_raised_here(error), isinstance(error, OSError)
    number = getattr(error, "errno", None)
    if is_of_file and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif found := re.search(r"\(os error (\d+)\)", text):  # what is written in Rust, such as safetensors
        number, is_of_file = int(found[1]), True
        text = f"a file could not be read or written: {text}"
    text = with_flags(" ".join(text.split()), parser).rstrip(".")
    if not own and len(text) > _MAX_FOREIGN:
        text = f"{text[:_MAX_FOREIGN]}…"
    if not own and not is_of_file:  # those are written for people
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    is_failure = isinstance(error, RunFailedError) or is_of_file and number in _NOT_OF_A_PATH
    is_usage = is_of_file or isinstance(error, ValueError) or own and isinstance(error, (RuntimeError, TypeError))
    return text, USAGE if is_usage and not is_failure else FAILURE


def with_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """A message of the package with `--flag` for each argument in backticks that the script has a flag for."""
    flags = {option for action in parser._actions for option in action.option_strings}
    positional = {action.dest for action in parser._actions if not action.option_strings}

    def flag_of(found: re.Match) -> str:
        name = found["name"]
        for candidate in (name, FLAG_OF_ARGUMENT.get(name)):
            if f"--{candidate}" in flags:
                return f"--{candidate}"
        return name if name in positional else found[0]

    message = re.sub(r"`(?P<name>\w+)(=True)?`", flag_of, message)
    return re.sub(r"`(--[^`]*)`", r"\1", message)  # a flag as it is typed, in the words of the package


def _is_raised_here(error: BaseException) -> bool:
    """Whether a `raise` of this package or of a script made it: then its message is for the user."""
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    is_raise = dis.opname[code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"  # and no call of what is written in C
    return is_raise and not _is_foreign(code.co_filename)


def _is_foreign(file_name: str) -> bool:
    """Whether a file is of the standard library or of another installed package."""
    path = Path(file_name)
    if path.is_relative_to(Path(__file__).parent):
        return False
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return installed or path.is_relative_to(sysconfig.get_paths()["stdlib"]) or file_name.startswith("<frozen")


def _is_first_to_say() -> bool:
    """Whether no other process of this launcher on this machine has ended with a line yet; so for a single process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    marker = Path(tempfile.gettempdir()) / f"diffusers_mp-{os.getuid()}-{os.getppid()}.said"
    try:
        # The process number of a launcher long gone may have come again.
        if marker.exists() and marker.stat().st_mtime < _STARTED - 60:
            marker.unlink()
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # said twice rather than never
        return True
    return True
