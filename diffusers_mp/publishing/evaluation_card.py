"""The results of an evaluation as a section of a pipeline's card."""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard

from ..files import whole_file
from ..masking import mask
from .cards import filled, table, text_of
from .hub import CARD_NAME, HEAT_MAP_NAME, files_to_publish, is_repo_id


# Options of samplers that images depend on most; results.json has all.
_TOLD = (
    *("prediction_type", "timestep_spacing", "algorithm_type", "solver_order", "solver_type", "use_karras_sigmas"),
    *("variance_type", "shift", "flow_shift"),
)


def write_evaluation(folder: str | Path, results: Mapping) -> ModelCard:
    """Put the results of `examples/evaluate.py` into the card of a pipeline's folder, in place of earlier ones.

    The rest of the card stays as it is. No local path of a model or data set is told. The heat map is shown if it is
    in the folder.

    Args:
        folder (str or Path): the pipeline's folder, with a card.
        results (mapping): content of `results.json`.
    Returns:
        ModelCard: the card as written.
    Raises:
        ValueError: if the folder holds no complete pipeline, or no card.
    """
    folder = Path(folder)
    if CARD_NAME not in files_to_publish(folder):
        raise ValueError(f"`folder` must hold a {CARD_NAME}, {folder} does not; `write_model_card` makes one.")
    section = _evaluation(folder, results)
    heading, _, _ = section.partition("\n")
    sections = re.split(r"^(?=## )", (folder / CARD_NAME).read_text(encoding="utf-8"), flags=re.MULTILINE)
    # Where the last one was; else before the licence, where the formal end of our own cards begins; else at the end.
    starts = [i for start in (f"{heading}\n", "## Licence") for i, one in enumerate(sections) if one.startswith(start)]
    place = starts[0] if starts else len(sections)
    sections = [other for other in sections if not other.startswith(f"{heading}\n")]
    sections[place - 1] = sections[place - 1].rstrip("\n") + "\n\n"
    sections.insert(place, mask(f"{section}\n\n"))
    text = "".join(sections).rstrip("\n") + "\n"
    with whole_file(folder / CARD_NAME) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return ModelCard(text)


def _evaluation(folder: Path, results: Mapping) -> str:
    settings, best = results["settings"], results["best"]
    classes, sampler = settings["classes"], settings["sampler"]
    told = [name for name in _TOLD if sampler.get(name) is not None]
    names = [text_of(_extractor_name(extractor)) for extractor in settings["extractors"]]
    measures = ("frechet_distance", "precision", "recall", "inception_score")
    columns = [(i, key) for i, metrics in enumerate(best["metrics"]) for key in measures if key in metrics]
    varied = {"guidance scale": "guidance_scale", "steps": "num_inference_steps"}
    if best["ema_std"] is not None:
        varied = {"width of the average": "ema_std", **varied}
    header = [f"{key.replace('_', ' ').replace('frechet', 'Fréchet')}, {names[i]}" for i, key in columns]
    rows = [
        (*(cell[key] for key in varied.values()), *(cell["metrics"][i][key] for i, key in columns))
        for cell in sorted(results["cells"], key=lambda cell: cell["metrics"][0]["frechet_distance"])
    ]
    notes = []
    for name, extractor, reference in zip(names, settings["extractors"], settings["references"], strict=True):
        facts = [f"{key} {text_of(value)}" for key, value in extractor.items() if key != "id" and value is not None]
        notes.append(
            f"Features of {name}: {'; '.join(facts)}. Reference: {reference['num_images']:,} images of "
            f"{reference['resolution']}x{reference['resolution']} pixels ({text_of(reference['preparation'])}), "
            f"content hash {reference['content_hash'][:16]}."
        )
    if "precision" in best["metrics"][0]:
        num_compared = f"{best['metrics'][0]['num_images_compared']:,}"
        notes.append(
            f"Precision and recall (arXiv 1904.06991): k = {settings['nearest_k']}, {num_compared} images each."
        )
    notes += [f"Warning: {text_of(warning)}" for warning in results["warnings"]]
    parts = {
        "num_samples": f"{settings['num_samples']:,}",
        "classes": "unconditional" if classes is None else f"{len(classes['counts']):,} classes {classes['drawn']}",
        "seed": settings["seed"],
        "scheduler": text_of(sampler["class"]),
        "sampler_options": "".join(f", {name} {text_of(sampler[name])}" for name in told),
        "dtype": settings["dtype"],
        **results["versions"],
        "heat_map": f"![Fréchet distances]({HEAT_MAP_NAME})" if (folder / HEAT_MAP_NAME).is_file() else "",
        "table": table((*varied, *header), rows),
        "notes": "\n".join(f"- {note}" for note in notes),
    }
    return filled(["evaluation"], parts)


def _extractor_name(extractor: Mapping) -> str:
    # An id of the Hub, or a function; of a folder its last part.
    name = extractor["id"]
    return name if is_repo_id(name) or "/" not in name else name.rstrip("/").split("/")[-1]
