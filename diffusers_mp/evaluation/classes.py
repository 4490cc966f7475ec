"""Which class each image of an evaluation is of: in the proportion of the reference where that is known, else in turn.

A distance compares two whole distributions. Of a data set that is to nine tenths of one class, classes in turn are far
from it even if each class is drawn perfectly.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..class_labels import ids_by_name, typed_labels


if TYPE_CHECKING:
    from ..pipeline_mpdit import MPDiTPipeline

NUM_TOLD = 12


@dataclass(frozen=True)
class ClassDraw:
    """Classes of the images, a function of their number and the classes' weights alone.

    Attributes:
        names (dict of int to str): of the classes by id, in the order in which they are drawn.
        weights (dict of int to int): their shares, not all 0.
        num_samples (int): how many images there are.
        mismatch (str, optional): why classes come in turn though the reference may have others.
    """

    names: dict[int, str]
    weights: dict[int, int]
    num_samples: int
    mismatch: str | None = None

    @property
    def counts(self) -> dict[int, int]:
        """Number of images of each class."""
        return dict(zip(self.weights, apportioned([*self.weights.values()], self.num_samples), strict=True))

    def class_ids(self) -> list[int]:
        """The class of each image."""
        ids, counts = [*self.weights], self.counts
        return [ids[place] for place in spread([counts[id_] for id_ in ids])]

    def description(self) -> dict[str, Any]:
        """As results have it."""
        return {
            "drawn": "in turn" if self.mismatch else "in the reference's proportion",
            "counts": {self.names[id_]: count for id_, count in self.counts.items()},
        }

    def line(self) -> str:
        """What is drawn, in words, with the ids that the names stand for."""
        told = [f"{self.names[id_]} (id {id_}) {count:,}" for id_, count in self.counts.items()]
        rest = f", … {len(told):,} classes" if len(told) > NUM_TOLD else ""
        return f"Classes, {self.description()['drawn']}: {', '.join(told[:NUM_TOLD])}{rest}"


def draw_classes(
    pipe: "MPDiTPipeline",
    labels: Sequence[str] | None,
    reference_counts: Mapping[str, int] | None,
    num_samples: int,
) -> ClassDraw | None:
    """Classes for the images of a pipeline, weighted as the reference has them where it has the pipeline's by name.

    Args:
        pipe (MPDiTPipeline): whose classes they are; weights are not needed.
        labels (sequence of str, optional): as in `label_ids`: the only classes to draw; all if left out.
        reference_counts (mapping of str to int, optional): images of the reference by the names of their classes.
        num_samples (int): how many images there will be.
    Returns:
        ClassDraw: None for a pipeline without classes.
    Raises:
        ValueError: as in `label_ids`.
    """
    num_classes = pipe.transformer.config.num_classes
    if num_classes is None:
        return None
    id2label = pipe.id2label or {id_: str(id_) for id_ in range(num_classes)}
    ids = label_ids(pipe, labels) if labels is not None else in_order(id2label)
    # A name that two classes share would be told once.
    shared = Counter(id2label.values())
    names = {id_: id2label[id_] if shared[id2label[id_]] == 1 else f"{id2label[id_]} (id {id_})" for id_ in ids}
    weights, mismatch = _weights(ids_by_name(id2label), reference_counts, ids)
    return ClassDraw(names, weights or dict.fromkeys(ids, 1), num_samples, mismatch)


def _weights(
    ids_of: Mapping[str, set[int]], reference_counts: Mapping[str, int] | None, ids: Sequence[int]
) -> tuple[dict[int, int] | None, str | None]:
    if reference_counts is None:
        return None, "the reference has no class labels that are known here"
    unknown = [name for name in reference_counts if len(ids_of.get(name.strip(), ())) != 1]
    if unknown:
        told = ", ".join(map(repr, unknown[:3])) + (", …" if len(unknown) > 3 else "")
        return None, f"the model has no class of the same name for {len(unknown):,} of the reference ({told})"
    weights = dict.fromkeys(ids, 0)
    for name, count in reference_counts.items():
        (id_,) = ids_of[name.strip()]
        if id_ in weights:
            weights[id_] += count
    if not any(weights.values()):
        return None, "the reference has no image of these classes"
    return weights, None


def label_ids(pipe: "MPDiTPipeline", labels: Sequence[str]) -> list[int]:
    """Ids for what was typed: names first, numbers only where no class has that name.

    Args:
        pipe (MPDiTPipeline): whose classes they are.
        labels (sequence of str): names, or ids in decimal.
    Returns:
        list of int: one for each.
    Raises:
        ValueError: if one is unknown (close names are told), ambiguous or out of range, or two are one class.
    """
    ids = pipe.get_label_ids(typed_labels(labels, pipe.id2label))
    for place, id_ in enumerate(ids):
        if id_ in ids[:place]:
            first = labels[ids.index(id_)]
            raise ValueError(
                f"`class_labels` must be of different classes, got {first!r} and {labels[place]!r}, both of id {id_}."
            )
    return ids


def in_order(id2label: Mapping[int, str]) -> list[int]:
    """Ids in the order of their names if those are whole numbers ("2" before "10"), else by id."""
    if all(name.isdecimal() for name in id2label.values()):
        return sorted(id2label, key=lambda id_: (int(id2label[id_]), id_))
    return sorted(id2label)


def apportioned(weights: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to weights, by largest remainder; of equal ones the first gets more.

    Args:
        weights (sequence of int): not negative, not all 0.
        total (int): sum of the result.
    Returns:
        list of int: each less than 1 away from its exact share.
    """
    shares = [divmod(weight * total, sum(weights)) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda place: (-shares[place][1], place))
    counts = [whole for whole, _ in shares]
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def spread(counts: Sequence[int]) -> list[int]:
    """Each number `counts[number]` times, evenly: the first images are nearly in proportion too.

    The k-th of n stands at (k + 1/2) / n of the way. Equal counts, and those that differ by 1, come in turn.

    Args:
        counts (sequence of int): not negative.
    Returns:
        list of int: numbers in [0, len(counts)).
    """
    # Rational numbers that are equal round to equal floats, and equal places go by number.
    places = [((2 * k + 1) / count, number) for number, count in enumerate(counts) for k in range(count)]
    return [number for _, number in sorted(places)]
