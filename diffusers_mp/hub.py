"""A model card for a trained pipeline's folder, and its publication on the Hub in one commit.

The folder of a run holds more than may leave the machine: optimiser states, pickles, latents, arguments, paths. What
is uploaded is therefore a list of what belongs, never the folder less what does not.
"""

import argparse
import json
import math
import re
import struct
import time
import traceback
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from PIL import Image

from . import __version__


CARD_NAME, GRID_NAME, CURVE_NAME = "README.md", "sample_grid.png", "training_curve.png"
_WEIGHTS = "diffusion_pytorch_model*.safetensors"
_WEIGHTS_INDEX = f"{_WEIGHTS}.index.json"
_MODEL_FILES = ("config.json", _WEIGHTS, _WEIGHTS_INDEX)
_PUBLISHED = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{folder}/{name}" for folder in ("transformer", "transformer_ema_*", "vae") for name in _MODEL_FILES),
    *(CARD_NAME, GRID_NAME, CURVE_NAME),
)
# Trackers that keep to what they are given; others record the command line, and with it `--hub_token`.
_LOCAL_TRACKERS = ("none", "tensorboard")
_TOKEN_PATTERN = re.compile(r"hf_[A-Za-z0-9]{16,}")
_REPO_PATTERN = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MASK = "[token removed]"
# Between the attempts at a commit; each of its uploads has been tried six times by the Hub's client before.
_SECONDS_BEFORE_RETRY = (5, 30)
_NUM_CURVE_ROWS = 10
_REPORTED_ARGUMENTS = (
    *("preset", "configuration", "variance_type", "prediction_type", "resolution", "random_flip", "seed"),
    *("class_dropout_prob", "optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_constant_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "mixed_precision", "ema_stds", "snr_gamma"),
    *("logit_mean", "logit_std"),
)
_CITATION = """@article{bill2025exploring,
  title   = {Exploring Magnitude Preservation and Rotation Modulation in Diffusion Transformers},
  author  = {Bill, Eric Tillman and Perez Jensen, Cristian and Anagnostidis, Sotiris and von R{\\"u}tte, Dimitri},
  journal = {arXiv preprint arXiv:2505.19122},
  year    = {2025}
}"""


class HubError(RuntimeError):
    """Access to the Hub was refused or lost; the message never holds the token."""


# Secrets


def public_arguments(arguments: argparse.Namespace | Mapping, token: str | None = None) -> dict:
    """Arguments of a script as they may be logged, tracked and written: without `hub_token`, tokens masked elsewhere.

    Args:
        arguments (argparse.Namespace or mapping): the arguments; left as they are.
        token (str, optional): a token to mask wherever it stands, beside `hub_token` and what looks like one.
    Returns:
        dict: a copy.
    """
    arguments = dict(arguments if isinstance(arguments, Mapping) else vars(arguments))
    secrets = [secret for secret in (arguments.pop("hub_token", None), token) if secret]

    def masked(value):
        if isinstance(value, Mapping):
            return {masked(key): masked(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [masked(item) for item in value]
        if isinstance(value, (str, Path)) and _mask(str(value), *secrets) != str(value):
            return _mask(str(value), *secrets)
        return value

    return masked(arguments)


def check_trackers(report_to: str, hub_token: str | None) -> None:
    """Refuse a token on the command line beside a tracker that records the command line.

    Args:
        report_to (str): name of the tracker, or "none".
        hub_token (str, optional): the token as given on the command line.
    Raises:
        ValueError: if both are given; a token that `hf auth login` or `HF_TOKEN` knows goes with every tracker.
    """
    if hub_token is not None and report_to not in _LOCAL_TRACKERS:
        raise ValueError(
            f"`hub_token` must not be given together with `report_to={report_to!r}`, which may record the command "
            "line; use `hf auth login` or the environment variable HF_TOKEN instead."
        )


def _mask(text: str, *secrets: str) -> str:
    for secret in secrets:
        text = text.replace(secret, _MASK)
    return _TOKEN_PATTERN.sub(_MASK, text)


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
    raise HubError(_mask(": ".join(reasons), token)) from (error if _mask(shown, token) == shown else None)


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
        raise ValueError(f"`repo_id` must be 'user/name', got {_mask(str(repo_id))!r}.") from error
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
    """Paths of what belongs on the Hub: the pipeline's configurations and safetensors, the card and its pictures.

    Args:
        folder (str or Path): the pipeline's folder.
    Returns:
        list of str: sorted, relative to `folder`.
    Raises:
        ValueError: if the folder holds no complete pipeline.
    """
    folder = Path(folder)
    found = sorted({path.relative_to(folder).as_posix() for pattern in _PUBLISHED for path in folder.glob(pattern)})
    if "model_index.json" not in found:
        raise ValueError(f"`folder` must hold a saved pipeline, {folder} has no model_index.json.")
    components = [name for name in ("transformer", "vae") if _has_component(folder, name)]
    for component in (*components, *sorted(path.name for path in folder.glob("transformer_ema_*"))):
        indexed = set()
        for index in (folder / component).glob(_WEIGHTS_INDEX):
            indexed.update(json.loads(index.read_text())["weight_map"].values())
        needed = [f"{component}/{name}" for name in ("config.json", *sorted(indexed))]
        missing = [name for name in needed if name not in found]
        if not any(fnmatchcase(name, f"{component}/{_WEIGHTS}") for name in found):
            missing.append(f"{component}/{_WEIGHTS}")
        if missing:
            raise ValueError(f"`folder` must hold a complete pipeline, {folder} lacks {', '.join(missing)}.")
    return found


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a pipeline's folder in one commit, which is seen whole or not at all.

    What was published before and is no longer in the folder (an average of another width, shards) is deleted in the
    same commit. A lost connection is tried again; files that arrived are not sent twice. Without changes there is no
    new commit.

    Args:
        folder (str or Path): the pipeline's folder, with the card of `write_model_card`.
        repo_id (str): "user/name".
        token, private, revision: as in `check_hub_access`.
        commit_message (str, optional): first line of the commit.
    Returns:
        str: URL of the commit.
    Raises:
        ValueError: if the folder holds no complete pipeline, or no card.
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
                commit_message=commit_message or "MPDiT pipeline",
                revision=revision,
            )
            return commit.commit_url
        except Exception as error:
            if seconds is None or not _is_transient(error):
                _raise_hub_error(
                    f"publishing to {repo_id!r} failed and left it as it was; {folder} is intact, and "
                    f"`diffusers_mp.hub.publish({str(folder)!r}, {repo_id!r})` tries again",
                    error,
                    token,
                )
        time.sleep(seconds)


def _api(token: str) -> HfApi:
    return HfApi(token=token, library_name="diffusers_mp", library_version=__version__)


def _belongs(name: str) -> bool:
    # fnmatch's * also stands for slashes.
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _PUBLISHED)


def _has_component(folder: Path, name: str) -> bool:
    return (json.loads((folder / "model_index.json").read_text()).get(name) or [None])[0] is not None


def _content(folder: Path, name: str, names: list[str]) -> Path | bytes:
    """The file, or a configuration as it is published."""
    if not name.endswith(".json"):
        return folder / name
    config = json.loads((folder / name).read_text())
    # The local path that a component was loaded from is nobody's business.
    if "_name_or_path" in config and not _is_repo_id(config["_name_or_path"]):
        del config["_name_or_path"]
    elif name == "model_index.json" and any(name.startswith("transformer_ema_") for name in names):
        # Else everyone who loads the pipeline would also download every other average.
        config["_ignore_files"] = [name for name in names if name.startswith("transformer_ema_")]
    else:
        return folder / name
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _is_repo_id(name: str | None) -> bool:
    return bool(name and _REPO_PATTERN.fullmatch(name)) and not Path(name).exists()


def _is_transient(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, httpx.TransportError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response.status_code >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


# The card


def write_model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    data: str | None = None,
    sample_grid: str | Path | None = None,
    num_images_seen: int | None = None,
    num_seconds: float | None = None,
    hardware: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
) -> ModelCard:
    """Write README.md, the sample grid and the training curve of a pipeline's folder.

    The facts come from the files that `examples/train_mpdit.py` leaves there; those that are missing are left out. Of
    the arguments only named ones are told, and no local path. The curve is a table, and a picture where matplotlib is
    installed. An existing README.md is replaced.

    Args:
        folder (str or Path): the pipeline's folder.
        repo_id (str, optional): where it will be published, for the card's code; without it the code says "folder".
        revision (str, optional): branch it will be published on.
        license (str, optional): licence of the weights, such as "apache-2.0", or "other" with the next two.
        license_name, license_link (str, optional): name and address of another licence.
        data (str, optional): what the training data are, in place of what the arguments tell.
        sample_grid (str or Path, optional): picture of samples; by default the last of `samples/`.
        num_images_seen (int, optional): images in all updates together.
        num_seconds (float, optional): duration of the training; by default that of the updates, from the log's
            images per second, where `num_images_seen` is given.
        hardware (str, optional): what it was trained on.
        metrics (mapping, optional): names and values of measurements made after training.
    Returns:
        ModelCard: the card as written.
    Raises:
        ValueError: if the folder holds no complete pipeline.
    """
    folder = Path(folder)
    files_to_publish(folder)
    index, config = _read_json(folder / "model_index.json"), _read_json(folder / "transformer" / "config.json")
    arguments = _read_json(folder / "training_arguments.json")
    log = _read_log(folder / (arguments.get("logging_dir") or "logs") / "metrics.jsonl")
    num_updates = max((entry["step"] for entry in log), default=None)
    num_classes = config.get("num_classes")
    kind = "Unconditional" if num_classes is None else "Class-conditional"
    dataset = arguments.get("dataset_name")

    sections = [
        f"# {_text(repo_id.split('/')[-1]) if repo_id else 'Magnitude-preserving diffusion transformer'}",
        f"{kind} image generation with a magnitude-preserving diffusion transformer (MPDiT), after "
        "[arXiv 2505.19122](https://arxiv.org/abs/2505.19122), trained with `diffusers-mp`.",
        _grid_section(folder, sample_grid, arguments),
        "## How to use\n\n" + _usage(folder, index, config, repo_id, revision),
        "## Data\n\n" + _data(folder, index, config, arguments, data),
        "## VAE\n\n" + _vae(folder, arguments),
        "## Model\n\n" + _model(folder, config, arguments),
        "## Training\n\n" + _training(folder, log, arguments, num_updates, num_images_seen, num_seconds, hardware),
        _metrics(log, metrics),
        "## Licence of the weights\n\n" + _licence(license, license_name, license_link),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    card_data = ModelCardData(
        library_name="diffusers",
        license=license,
        license_name=license_name,
        license_link=license_link,
        datasets=[dataset] if _is_repo_id(dataset) and data is None else None,
        pipeline_tag="unconditional-image-generation" if num_classes is None else None,
        tags=[
            *("diffusers", "diffusers-mp", "diffusion-transformer", "magnitude-preserving"),
            *(["unconditional-image-generation"] if num_classes is None else ["class-conditional"]),
            "arxiv:2505.19122",
        ],
    )
    text = "\n\n".join(section for section in sections if section)
    card = ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{_mask(text)}\n")
    card.save(folder / CARD_NAME)
    return card


def _grid_section(folder: Path, sample_grid: str | Path | None, arguments: dict) -> str | None:
    samples = sorted((folder / "samples").glob("step-*.png"), key=lambda path: int(path.stem.removeprefix("step-")))
    source = sample_grid or (samples[-1] if samples else None)
    if source is None:
        (folder / GRID_NAME).unlink(missing_ok=True)
        return None
    with Image.open(source) as picture:
        # Pixels alone, without what a picture's metadata may tell.
        picture = picture.convert("L" if picture.mode == "L" else "RGB")
    Image.frombytes(picture.mode, picture.size, picture.tobytes()).save(folder / GRID_NAME, format="PNG")
    caption = "Samples."
    if sample_grid is None and "validation_inference_steps" in arguments:
        scale = arguments.get("validation_guidance_scale")
        caption = f"Samples at the end of training, {arguments['validation_inference_steps']} steps, guidance scale "
        caption += f"{'as the pipeline has it' if scale is None else f'{scale:g}'}, not selected."
    return f"![samples]({GRID_NAME})\n\n{caption}"


def _usage(folder: Path, index: dict, config: dict, repo_id: str | None, revision: str | None) -> str:
    source = repr(repo_id or "folder") + (f", revision={revision!r}" if revision else "")
    names = [name for _, name in sorted((index.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    num_classes = config.get("num_classes")
    call = "num_images_per_class=2"
    if num_classes is not None:
        plain = len(set(names)) == len(names) and not any("," in name for name in names)
        call = f"class_labels={names[:2] if names and plain else list(range(min(2, num_classes)))!r}"
    text = f"""```python
from diffusers_mp import MPDiTPipeline

pipe = MPDiTPipeline.from_pretrained({source})
images = pipe({call}, num_inference_steps=50).images
```

`DiffusionPipeline.from_pretrained` does not know this class: import it from `diffusers_mp` as above."""
    others = sorted(path.name for path in folder.glob("transformer_ema_*"))
    if others:
        text += f"""

Averages of the weights of other widths are beside it: {", ".join(f"`{name}`" for name in others)}.

```python
from diffusers_mp import MPDiTPipeline, MPDiTTransformer2DModel

transformer = MPDiTTransformer2DModel.from_pretrained({source}, subfolder={others[0]!r})
pipe = MPDiTPipeline.from_pretrained({source}, transformer=transformer)
```"""
    return text


def _data(folder: Path, index: dict, config: dict, arguments: dict, data: str | None) -> str:
    dataset, latents = arguments.get("dataset_name"), _read_json(folder / "latents" / "index.json")
    source = "a data set on the author's machine"
    if data is not None:
        source = _text(data)
    elif _is_repo_id(dataset):
        source = f"[{dataset}](../../datasets/{dataset})"
        if arguments.get("dataset_config_name"):
            source += f", configuration {_text(arguments['dataset_config_name'])}"
        source += f", split {_text(arguments.get('dataset_split') or 'train')}"
    lines = [f"- source: {source}"]
    if "num_samples" in latents:
        lines.append(f"- images: {latents['num_samples']:,} (those held out for validation among them)")
    if "resolution" in latents:
        lines.append(f"- resolution: {latents['resolution']} pixels, centre crop")
    names = [_text(name) for _, name in sorted((index.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    if names:
        lines.append(f"- classes: {len(names)} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})")
    elif config.get("num_classes") is not None:
        lines.append(f"- classes: {config['num_classes']}")
    return "\n".join(lines)


def _vae(folder: Path, arguments: dict) -> str:
    if not _has_component(folder, "vae"):
        return "None: the transformer works on pixels."
    config = _read_json(folder / "vae" / "config.json")
    name = arguments.get("vae")
    source = f"[{name}](../../{name})" if _is_repo_id(name) else "of the author's own"
    return (
        f"`{_text(config.get('_class_name'))}` {source}, {config.get('latent_channels')} latent channels, factor "
        f"{2 ** (len(config.get('block_out_channels', [0])) - 1)}, {_num_parameters(folder / 'vae'):,} parameters, in "
        "`vae/`. The transformer sees its latents standardised by the statistics in `model_index.json`."
    )


def _model(folder: Path, config: dict, arguments: dict) -> str:
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    text = f"{_num_parameters(folder / 'transformer'):,} parameters (without the VAE). Configuration:\n\n"
    text += _table(("key", "value"), [(key, value) for key, value in config.items() if not key.startswith("_")])
    keys = ("num_train_timesteps", "beta_schedule", "prediction_type", "variance_type")
    facts = [f"{key} {_text(scheduler[key])}" for key in keys if scheduler.get(key) is not None]
    text += f"\n\nScheduler: `{_text(scheduler.get('_class_name'))}`{', ' if facts else ''}{', '.join(facts)}."
    if arguments.get("ema_stds"):
        text += f" `transformer/` holds the average of the weights of relative width {arguments['ema_stds'][0]:g}."
    return text


def _training(folder, log, arguments, num_updates, num_images_seen, num_seconds, hardware) -> str:
    seconds_of = "in all"
    if num_seconds is None and num_updates and num_images_seen:
        num_seconds, seconds_of = _seconds_of_updates(log, num_images_seen / num_updates), "in updates"
    costs = [
        ("updates", None if num_updates is None else f"{num_updates:,}"),
        ("images seen", None if num_images_seen is None else f"{num_images_seen:,}"),
        (f"seconds {seconds_of}", None if num_seconds is None else f"{num_seconds:,.0f}"),
        ("trained on", hardware),
    ]
    text = _table(("cost", ""), [(name, "not recorded" if value is None else value) for name, value in costs])
    told = [(key, arguments[key]) for key in _REPORTED_ARGUMENTS if arguments.get(key) is not None]
    if told:
        text += "\n\n" + _table(("argument", "value"), told)
    rows = _curve_rows(log)
    if rows:
        if _draw_curve(log, folder / CURVE_NAME):
            text += f"\n\n![training curve]({CURVE_NAME})"
        text += "\n\n" + _table(("update", "training loss since the row above", "validation loss"), rows)
    return text


def _metrics(log: list[dict], metrics: Mapping | None) -> str | None:
    rows = [(name, value) for name, value in (metrics or {}).items()]
    validations = [entry for entry in log if any(key.startswith("validation/") for key in entry)]
    if validations:
        last = validations[-1]
        of_log = [(key.removeprefix("validation/"), value) for key, value in last.items() if key != "step"]
        rows += [(f"validation {name} at update {last['step']}", value) for name, value in of_log]
    return "## Metrics\n\n" + _table(("metric", "value"), rows) if rows else None


def _licence(license: str | None, license_name: str | None, license_link: str | None) -> str:
    if license is None:
        return "None was given: ask the author before you use them."
    name = _text(license_name or license)
    return f"[{name}]({license_link})" if license_link else name


def _draw_curve(log: list[dict], picture: Path) -> bool:
    """Draw the losses over updates, if matplotlib is installed."""
    picture.unlink(missing_ok=True)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    smallest = math.inf
    for key, label in (("train/loss", "training"), ("validation/loss", "validation, averaged weights")):
        points = [(entry["step"], entry[key]) for entry in log if math.isfinite(entry.get(key, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "validation/loss" else None)
            smallest = min(smallest, *(loss for _, loss in points), math.inf)
    axes.set(xlabel="update", ylabel="loss", yscale="log" if 0 < smallest < math.inf else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(picture, dpi=120, bbox_inches="tight", metadata={"Software": None})
    return True


def _curve_rows(log: list[dict]) -> list[tuple]:
    """Mean training loss of up to ten equal stretches of the log, and the last validation loss in each."""
    steps = [entry["step"] for entry in log if "train/loss" in entry]
    if not steps:
        return []
    num_rows = min(_NUM_CURVE_ROWS, len(steps))
    ends = [steps[math.ceil(len(steps) * (row + 1) / num_rows) - 1] for row in range(num_rows)]
    rows = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        stretch = [entry for entry in log if start < entry["step"] <= end]
        losses = [entry["train/loss"] for entry in stretch if "train/loss" in entry]
        validation = [entry["validation/loss"] for entry in stretch if "validation/loss" in entry]
        rows.append((f"{end:,}", sum(losses) / len(losses), validation[-1] if validation else ""))
    return rows


def _seconds_of_updates(log: list[dict], total_batch_size: float) -> float | None:
    seconds, previous = 0.0, 0
    for entry in log:
        if entry.get("train/images_per_second"):
            seconds += (entry["step"] - previous) * total_batch_size / entry["train/images_per_second"]
            previous = entry["step"]
    return seconds or None


def _num_parameters(folder: Path) -> int:
    """Number of parameters, from the headers of the safetensors files."""
    count = 0
    for path in folder.glob(_WEIGHTS):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_log(path: Path) -> list[dict]:
    """Entries of the log in order, without a last line that a kill cut off."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return sorted(entries, key=lambda entry: entry["step"])


def _text(value) -> str:
    """A value on one line of Markdown that starts no markup of its own."""
    if isinstance(value, float):
        value = f"{value:.5g}"
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]|<>])", r"\\\1", text)


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ["---"] * len(header), *(map(_text, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
