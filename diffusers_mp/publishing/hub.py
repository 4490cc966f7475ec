"""Publication of a trained pipeline's or a rotation adapter's folder on the Hub, in one commit.

The folder of a run holds more than may leave the machine: optimiser states, pickles, latents, arguments, paths. What
is uploaded is therefore a list of what belongs, never the folder less what does not.
"""

import argparse
import json
import re
import time
import traceback
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id

from .. import __version__
from ..files import component_names
from ..masking import mask, masked


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


CARD_NAME, GRID_NAME, CURVE_NAME = "README.md", "sample_grid.png", "training_curve.png"
HEAT_MAP_NAME = "evaluation.png"
WEIGHTS = "diffusion_pytorch_model*.safetensors"
_WEIGHTS_INDEX = f"{WEIGHTS}.index*.json"  # of a variant, its name stands before the last dot
_MODEL_FILES = ("config.json", WEIGHTS, _WEIGHTS_INDEX)
# Components of a pipeline.
_MODELS = ("transformer", "vae", "guidance_transformer")
_AVERAGES = "transformer_ema_[0-9]*"  # by their width, as the trainer names them
_GUIDER_CONFIG = "guider/guider_config.json"
_PUBLISHED = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    _GUIDER_CONFIG,
    *(f"{folder}/{name}" for folder in (*_MODELS, _AVERAGES) for name in _MODEL_FILES),
    *(CARD_NAME, GRID_NAME, CURVE_NAME, HEAT_MAP_NAME),
)
# What `save_rotation_adapter` writes.
ADAPTER_CONFIG_NAME = "adapter_config.json"
_PUBLISHED_ADAPTER = (ADAPTER_CONFIG_NAME, "adapter_model.safetensors", CARD_NAME)
# Trackers that keep to what they are given; others record the command line, and with it `--hub_token`.
_LOCAL_TRACKERS = ("none", "tensorboard")
_REPO_PATTERN = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Arguments that are a local path or an id of the Hub; cards name the ids.
_SOURCES = ("pretrained_model_name_or_path", "vae", "dataset_name")
# Between the attempts at a commit; each of its uploads has been tried six times by the Hub's client before.
_SECONDS_BEFORE_RETRY = (5, 30)


class HubError(RuntimeError):
    """Access to the Hub was refused or lost; the message never holds the token."""


# Secrets


def public_arguments(arguments: argparse.Namespace | Mapping, token: str | None = None) -> dict:
    """Arguments of a script as they may be logged, tracked and written: without `hub_token`, other secrets masked.

    Sources that are local (`pretrained_model_name_or_path`, `vae`, `dataset_name`) become absolute paths.

    Args:
        arguments (argparse.Namespace or mapping): the arguments; left as they are.
        token (str, optional): a token to mask wherever it stands, beside `hub_token` and what `masked` knows.
    Returns:
        dict: a copy.
    """
    arguments = dict(arguments if isinstance(arguments, Mapping) else vars(arguments))
    secrets = [secret for secret in (arguments.pop("hub_token", None), token) if secret]
    for name in _SOURCES:
        # A relative path would pass for an id of the Hub as soon as the card is written in another folder.
        if isinstance(arguments.get(name), (str, Path)) and Path(arguments[name]).exists():
            arguments[name] = str(Path(arguments[name]).absolute())
    return masked(arguments, *secrets)


def mask_places(pipeline: "DiffusionPipeline") -> None:
    """Take secrets out of the places that a pipeline and its parts come from, which `save_pretrained` would write.

    Args:
        pipeline (DiffusionPipeline): changed in place, where there is a secret.
    """
    for part in (pipeline, *pipeline.components.values()):
        place = getattr(part, "config", {}).get("_name_or_path")
        if isinstance(place, str) and mask(place) != place:
            part.register_to_config(_name_or_path=mask(place))


def check_trackers(report_to: str, arguments: Mapping) -> None:
    """Refuse secrets on the command line beside a tracker that records the command line.

    Args:
        report_to (str): name of the tracker, or "none".
        arguments (mapping): the command line by the names of its arguments.
    Raises:
        ValueError: naming the argument; a token that `hf auth login` or `HF_TOKEN` knows goes with every tracker.
    """
    if report_to in _LOCAL_TRACKERS:
        return
    recorded = f"together with `report_to={report_to!r}`, which may record the command line"
    if arguments.get("hub_token") is not None:
        raise ValueError(
            f"`hub_token` must not be given {recorded}; use `hf auth login` or the environment variable HF_TOKEN "
            "instead."
        )
    for name, value in arguments.items():
        if mask(str(value)) != str(value):
            raise ValueError(f"`{name}` must hold no token or password {recorded}, got {mask(str(value))}.")


def _find_token(token: str | None) -> str:
    token = (token or get_token() or "").strip()
    if not token:
        raise HubError(
            "publishing needs a token with write access, and there is none: use `hf auth login`, the environment "
            "variable HF_TOKEN, or `hub_token`."
        )
    # The HTTP client would quote a header that it cannot send.
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise HubError("the token must be printable ASCII without spaces; the one given (not shown here) is not.")
    return token


def _raise_hub_error(message: str, error: Exception, token: str) -> NoReturn:
    # The Hub's client says which file failed, and its cause says why.
    reasons, reason = [message], error
    while reason is not None:
        reasons.append(str(reason).strip() or type(reason).__name__)
        reason = reason.__cause__
    shown = "".join(traceback.format_exception(error))
    raise HubError(mask(": ".join(reasons), token)) from (error if mask(shown, token) == shown else None)


# Publishing


def check_hub_access(
    repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Make sure, before weeks of training, that their result can be published; creates the repository.

    Args:
        repo_id (str): "user/name", "organisation/name", or a name for a repository of the token's user.
        token (str, optional): token with write access. By default that of HF_TOKEN or `hf auth login`.
        private (bool, optional): whether a new repository is private, by default as its owner's account says. With
            True an existing public one is refused.
        revision (str, optional): branch to publish on, created from `main` if it is not there.
    Returns:
        str: the repository's full id.
    Raises:
        ValueError: if `repo_id` is no id of a repository.
        HubError: naming what is missing: the token, its right to write, the connection, or privacy.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` must be 'user/name', got {mask(str(repo_id))!r}.") from error
    token = _find_token(token)
    api = _api(token)
    try:
        user = api.whoami()["name"]
    except Exception as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
        what = "does not know the token (expired, revoked or mistyped)" if refused else "did not answer"
        _raise_hub_error(f"the Hub {what}", error, token)
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        is_private = api.model_info(repo_id).private
    except Exception as error:
        _raise_hub_error(f"the token of {user!r} cannot create or write to {repo_id!r}", error, token)
    if private and not is_private:
        raise HubError(
            f"{repo_id!r} must be private, but exists and is public; change that in its settings or choose another."
        )
    if revision is not None:
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except Exception as error:
            _raise_hub_error(f"cannot create the branch {revision!r} of {repo_id!r}", error, token)
    return repo_id


def files_to_publish(folder: str | Path) -> list[str]:
    """Paths of what belongs on the Hub: the pipeline's configurations and safetensors, the card and its images.

    Args:
        folder (str or Path): the folder of a pipeline (ours, or a `DiTPipeline`) or of a rotation adapter.
    Returns:
        list of str: sorted, relative to `folder`.
    Raises:
        ValueError: if the folder holds no complete pipeline and no complete adapter, or one of each.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return _adapter_files(folder)
    found = sorted({path.relative_to(folder).as_posix() for pattern in _PUBLISHED for path in folder.glob(pattern)})
    if "model_index.json" not in found:
        raise ValueError(f"`folder` must hold a saved pipeline, {folder} has no model_index.json.")
    known = (*_MODELS, "scheduler", "guider")
    others = [name for name in component_names(folder) if name not in known]
    if others:
        raise ValueError(
            f"`folder` must hold a pipeline of {', '.join(known)}: of these alone it is known which files belong on "
            f"the Hub; {folder} has {', '.join(others)} as well. For a swapped transformer in another pipeline "
            "publish the adapter (`save_rotation_adapter`)."
        )
    if has_component(folder, "guider") and _GUIDER_CONFIG not in found:
        raise ValueError(f"`folder` must hold a complete pipeline, {folder} lacks {_GUIDER_CONFIG}.")
    components = [name for name in _MODELS if has_component(folder, name)]
    for component in (*components, *(path.name for path in average_folders(folder))):
        indexed = set()
        for index in (folder / component).glob(_WEIGHTS_INDEX):
            indexed.update(json.loads(index.read_text())["weight_map"].values())
        needed = [f"{component}/{name}" for name in ("config.json", *sorted(indexed))]
        missing = [name for name in needed if name not in found]
        if not any(fnmatchcase(name, f"{component}/{WEIGHTS}") for name in found):
            missing.append(f"{component}/{WEIGHTS}")
        if missing:
            raise ValueError(f"`folder` must hold a complete pipeline, {folder} lacks {', '.join(missing)}.")
    index = json.loads((folder / "model_index.json").read_text())
    for component in components:
        told = index[component][1]
        saved = json.loads((folder / component / "config.json").read_text()).get("_class_name", told)
        if told != saved:
            raise ValueError(
                f"`folder` must hold a pipeline that names its classes, model_index.json of {folder} has {told} as "
                f"the {component} and {component}/config.json has {saved}. After a swap in a pipeline assign the "
                f"{component} anew (`pipe.{component} = pipe.{component}`), and save once more."
            )
    return found


def average_folders(folder: Path) -> list[Path]:
    """Folders of the averages beside a pipeline's own, sorted."""
    return sorted(path for path in folder.glob(_AVERAGES) if path.is_dir())


def _adapter_files(folder: Path) -> list[str]:
    if (folder / "model_index.json").is_file():
        raise ValueError(f"`folder` must hold a pipeline or an adapter, {folder} holds both.")
    found = [name for name in _PUBLISHED_ADAPTER if (folder / name).is_file()]
    missing = sorted(set(_PUBLISHED_ADAPTER) - {CARD_NAME, *found})
    if missing:
        raise ValueError(f"`folder` must hold a complete adapter, {folder} lacks {', '.join(missing)}.")
    return sorted(found)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload the folder of a pipeline or of a rotation adapter in one commit, which is seen whole or not at all.

    What was published before and is no longer in the folder (an average of another width, shards) is deleted in the
    same commit. A lost connection is tried again; files that arrived are not sent twice. Without changes there is no
    new commit.

    Args:
        folder (str or Path): the folder, with the card of `write_model_card` or `write_rotation_card`.
        repo_id (str): "user/name".
        token, private, revision: as in `check_hub_access`.
        commit_message (str, optional): first line of the commit.
    Returns:
        str: URL of the commit.
    Raises:
        ValueError: if the folder holds no complete pipeline or adapter, or no card.
        HubError: if access was refused or lost, or a file that would be published holds the token.
    """
    folder = Path(folder)
    names = files_to_publish(folder)
    if CARD_NAME not in names:
        raise ValueError(f"`folder` must hold a {CARD_NAME}, {folder} does not; `write_model_card` makes one.")
    token = _find_token(token)
    for name in names:
        if not name.endswith(".safetensors") and token.encode() in (folder / name).read_bytes():
            raise HubError(f"{folder / name} holds the token; nothing was published.")
    repo_id = check_hub_access(repo_id, token=token, private=private, revision=revision)

    api = _api(token)
    # The same files for each attempt, but new operations: a commit whose answer was lost is then found to be there.
    contents = {name: _content(folder, name, names) for name in names}
    for seconds in (*_SECONDS_BEFORE_RETRY, None):
        try:
            published = api.list_repo_files(repo_id, revision=revision)
            stale = [name for name in published if name not in names and _belongs(name)]
            commit = api.create_commit(
                repo_id,
                operations=[
                    *(CommitOperationAdd(name, content) for name, content in contents.items()),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=commit_message or "Upload with diffusers-mp",
                revision=revision,
            )
            return commit.commit_url
        except Exception as error:
            if seconds is None or not _is_transient(error):
                _raise_hub_error(
                    f"publishing to {repo_id!r} failed and left it as it was; {folder} is intact, and "
                    f"`diffusers_mp.publishing.hub.publish({str(folder)!r}, {repo_id!r})` tries again",
                    error,
                    token,
                )
        time.sleep(seconds)


def download_pipeline(
    repo_id: str, *, token: str | None = None, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Fetch a published pipeline with all that was published beside it: averages, card and images.

    Args:
        repo_id (str): "user/name".
        token (str, optional): for a private repository. By default that of HF_TOKEN or `hf auth login`.
        revision (str, optional): branch or commit.
        cache_dir (str or Path, optional): where files of the Hub are kept.
    Returns:
        Path: a folder in the cache, not to be written to.
    Raises:
        ValueError: if the repository holds no complete pipeline.
    """
    patterns = list(_PUBLISHED)
    folder = Path(
        snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns)
    )
    files_to_publish(folder)
    return folder


def _api(token: str) -> HfApi:
    return HfApi(token=token, library_name="diffusers_mp", library_version=__version__)


def _belongs(name: str) -> bool:
    # fnmatch's * also stands for slashes.
    patterns = (*_PUBLISHED, *_PUBLISHED_ADAPTER)
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def has_component(folder: Path, name: str) -> bool:
    """Whether the pipeline in a folder has a component of this name."""
    return name in component_names(folder)


def _content(folder: Path, name: str, names: list[str]) -> Path | bytes:
    """The file, or a configuration as it is published."""
    if not name.endswith(".json"):
        return folder / name
    config = json.loads((folder / name).read_text())
    original = dict(config)
    # Loading sets it again; a local path is private, and may look like an id of the Hub.
    config.pop("_name_or_path", None)
    if "base_model_name_or_path" in config and not is_repo_id(config["base_model_name_or_path"]):
        config["base_model_name_or_path"] = None
    averages = [name for name in names if name.startswith("transformer_ema_")]
    if name == "model_index.json" and averages:
        # Otherwise loading the pipeline would also download every other average.
        config["_ignore_files"] = averages
    if config == original:
        return folder / name
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def is_repo_id(name: str | None) -> bool:
    """Whether a source is a repository on the Hub: of the shape of an id, and nothing that is there locally."""
    return bool(name and _REPO_PATTERN.fullmatch(name)) and not Path(name).exists()


def _is_transient(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, httpx.TransportError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response.status_code >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False
