"""Names of classes and their ids: a label of several names, such as "tench, Tinca tinca", has them all."""

from collections.abc import Mapping, Sequence


def ids_by_name(id2label: Mapping[int, str] | None) -> dict[str, set[int]]:
    """Ids by name and by each of its comma-separated synonyms; several where classes share one.

    Args:
        id2label (mapping, optional): ids to labels.
    """
    ids_of: dict[str, set[int]] = {}
    for id_, label in (id2label or {}).items():
        for name in (label, *label.split(",")):
            ids_of.setdefault(name.strip(), set()).add(id_)
    return ids_of


def typed_labels(labels: Sequence[str], id2label: Mapping[int, str] | None) -> list[int | str]:
    """What a user typed as the pipeline takes it: a name where a class has it, else an id if it is a number.

    Args:
        labels (sequence of str): names, or ids in decimal.
        id2label (mapping, optional): ids to labels.
    """
    names = ids_by_name(id2label)
    return [int(label) if label not in names and label.isdecimal() else label for label in map(str.strip, labels)]
