"""Whether what a script was given by name can be had at all, asked before libraries that ask for a minute."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


_TIMEOUT = 10.0


def check_reachable(
    argument: str,
    name: str,
    files: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    repo_type: str = "model",
    instead: str = "a folder",
) -> None:
    """Refuse an id on the Hub that is neither in the cache nor within reach; a folder, and a Hub that answers, pass.

    The Hub's client repeats a failed request five times for each file, and diffusers then says that the file is not
    there. This asks once.

    Args:
        argument (str): what was given it, for the message.
        name (str): a path, or an id on the Hub.
        files (sequence of str): files in the repository; one of them in the cache is enough.
        cache_dir, revision, token, repo_type: of the Hub's client.
        instead (str): what to give where there is no network.
    Raises:
        ConnectionError: if the Hub does not answer, or must not be asked (HF_HUB_OFFLINE).
        FileNotFoundError: if `name` is neither a path that is there nor of the form of an id.
    """
    if Path(name).exists():
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    of_repo = {"repo_type": repo_type, "revision": revision}
    try:
        if any(isinstance(try_to_load_from_cache(name, file, cache_dir, **of_repo), str) for file in files):
            return
        get_hf_file_metadata(hf_hub_url(name, files[0], **of_repo), timeout=_TIMEOUT, token=token)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"`{argument}` must be a path or an id on the Hub, as user/name, got {name!r}, which is neither."
        ) from error
    except HfHubHTTPError:
        return  # it answers, and who loads is told what is missing
    except Exception as error:
        raise ConnectionError(
            f"`{argument}` {name!r} is no folder here and not in the cache, and the Hub cannot be reached over the "
            f"network ({_first_line(error)}): give {instead}, or fetch it beforehand with `hf download {name}`."
        ) from error


def check_dataset_reachable(name: str, cache_dir: str | Path | None = None) -> None:
    """As `check_reachable`, of a data set; what `datasets` has in its own cache passes.

    Args:
        name (str): what `datasets.load_dataset` is given.
        cache_dir (str or Path, optional): where `datasets` keeps its tables.
    Raises:
        ConnectionError: if the Hub does not answer.
    """
    import datasets

    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()
    # A name without a slash may be one of the formats that `datasets` reads.
    if "/" in name and not folder.exists():
        instead = "a folder by `train_data_dir`"
        check_reachable("dataset_name", name, ["README.md"], repo_type="dataset", instead=instead)


@contextlib.contextmanager
def naming(argument: str, name: str | Path) -> Iterator[None]:
    """Within it, what libraries say of a damaged or unsuitable source names the argument that it was given by.

    Args:
        argument (str): the argument, for the message.
        name (str or Path): what it was given.
    Raises:
        OSError, TypeError, RuntimeError: in place of one.
        ValueError: in place of any other exception, which comes of what a file holds.
    """
    try:
        yield
    except Exception as error:
        said = str(error) or type(error).__name__
        if argument in said or type(error).__name__ == "OutOfMemoryError":
            raise
        kinds = (FileNotFoundError, OSError, TypeError, RuntimeError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        raise kind(f"`{argument}` cannot be {str(name)!r}: {said}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
