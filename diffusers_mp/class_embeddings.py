"""Another set of classes for a model that has one already: rows of names that stay are kept, the others drawn anew."""

from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from . import functional
from .transformer_mpdit import MPDiTTransformer2DModel


@torch.no_grad()
def resize_class_embeddings_(
    model: MPDiTTransformer2DModel | DiTTransformer2DModel,
    old_id2label: Mapping[int | str, str] | None,
    new_id2label: Mapping[int | str, str],
    generator: torch.Generator | None = None,
) -> MPDiTTransformer2DModel | DiTTransformer2DModel:
    """Give a model the label table of another set of classes, in place, before an optimiser is made.

    The row of a class whose name is in both sets is kept to the bit, whatever its ids; so is that of the null
    condition, which stays last. The other rows are drawn from N(0, 1) and scaled to the RMS that the old rows have
    over all classes, which for rows of RMS 1 is 1: directions that the model does not know, at a magnitude that it
    does. Nothing else changes, so that the classes kept are predicted as before.

    Args:
        model (MPDiTTransformer2DModel or DiTTransformer2DModel): a model of classes. Each block of a DiT has its
            table, and all get the same new rows, up to that magnitude.
        old_id2label (dict, optional): names of the classes that the model knows, of the ids 0 to num_classes - 1; None
            keeps no row but the last.
        new_id2label (dict): names of the classes that it is to know, likewise.
        generator (torch.Generator, optional): of the CPU, for the rows drawn.
    Returns:
        MPDiTTransformer2DModel or DiTTransformer2DModel: the model itself, its config changed in `num_classes`
        (`num_embeds_ada_norm` of a DiT).
    Raises:
        TypeError: if the model is of another class, or names are not a mapping.
        ValueError: if it knows no classes, if names are not those of consecutive ids from 0, or if a name stands for
            several classes, and for another number of them in the other set.
    """
    if isinstance(model, MPDiTTransformer2DModel):
        key, tables, labelers = "num_classes", [model.conditioning_embedder.class_embedder], []
    elif isinstance(model, DiTTransformer2DModel):
        key, labelers = "num_embeds_ada_norm", [block.norm1.emb.class_embedder for block in model.transformer_blocks]
        tables = [labeler.embedding_table for labeler in labelers]
    else:
        raise TypeError(
            f"`model` must be an MPDiTTransformer2DModel or a DiTTransformer2DModel, got {type(model).__name__}."
        )
    old_count = model.config[key]
    if old_count is None:
        raise ValueError("`model` must have a label table, got one without classes (`num_classes=None`).")
    new_names = _names("new_id2label", new_id2label, None)
    old_names = None if old_id2label is None else _names("old_id2label", old_id2label, old_count)
    kept = {} if old_names is None else _kept(old_names, new_names)

    noise = torch.randn(len(new_names), tables[0].embedding_dim, generator=generator)
    for table in tables:
        old = table.weight
        rms = functional.magnitude(old[:-1])
        rows = (functional.unit_magnitude(noise.to(rms)) * rms).to(old.dtype)
        for new_id, old_id in kept.items():
            rows[new_id] = old[old_id]
        table.weight = nn.Parameter(torch.cat([rows, old[-1:]]), requires_grad=old.requires_grad)
        table.num_embeddings = len(table.weight)
    for labeler in labelers:
        labeler.num_classes = len(new_names)  # the null id, which it puts in place of labels in training mode
    model.register_to_config(**{key: len(new_names)})
    return model


def _names(argument: str, id2label: Mapping[int | str, str], count: int | None) -> list[str]:
    if not isinstance(id2label, Mapping):
        raise TypeError(
            f"`{argument}` must map ids to names, as `dict(enumerate(names))` does, got a {type(id2label).__name__}."
        )
    # JSON knows string keys only.
    names = {int(id): name for id, name in id2label.items()}
    if not names or sorted(names) != list(range(len(names) if count is None else count)):
        expected = "0 to their number - 1" if count is None else f"0 to {count - 1}"
        raise ValueError(f"`{argument}` must name the ids {expected}, got {len(names)} ids: {_some(names)}.")
    return [names[id] for id in range(len(names))]


def _some(names: Mapping[int, str]) -> str:
    ids = sorted(names)
    return ", ".join(map(str, ids if len(ids) <= 8 else [*ids[:4], "...", *ids[-3:]]))


def _kept(old_names: list[str], new_names: list[str]) -> dict[int, int]:
    """New id → old id of each class whose name is in both sets; the k-th of a name is the k-th of that name."""
    old_counts, new_counts = Counter(old_names), Counter(new_names)
    for name in old_counts.keys() & new_counts.keys():
        if old_counts[name] != new_counts[name]:
            raise ValueError(
                f"`new_id2label` must have the name {name!r} as often as `old_id2label`, where it stands for "
                f"{old_counts[name]} classes; got it {new_counts[name]} times. Make the names distinct."
            )
    old_ids = defaultdict(list)
    for id, name in enumerate(old_names):
        old_ids[name].append(id)
    return {id: old_ids[name].pop(0) for id, name in enumerate(new_names) if old_ids[name]}
