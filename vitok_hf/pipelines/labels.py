"""Classes by name: from the `id2label` of a pipeline to the ids that its model takes."""

import difflib
from typing import Any


def check_labels(id2label: dict[int, str] | dict[str, str]) -> dict[int, str]:
    """Ids, of which JSON makes strings, as numbers; raises `ValueError` for what is no id or no name, or twice."""
    labels = {}
    for index, text in id2label.items() if isinstance(id2label, dict) else [(None, id2label)]:
        if isinstance(index, bool) or not str(index).isdecimal() or not isinstance(text, str) or int(index) in labels:
            raise ValueError(f"`id2label` must have an id and a name for each class, but has {index!r}: {text!r}.")
        labels[int(index)] = text
    return labels


def label_names(text: str) -> list[str]:
    """Those of an entry of `id2label`: ImageNet's "tench, Tinca tinca" has two."""
    return [name.strip() for name in text.split(",")]


def label_table(id2label: dict[int, str]) -> dict[str, int]:
    """Name -> id, in alphabetical order; the first id of a name that several classes have."""
    table = {}
    for name, index in sorted((name, index) for index, text in id2label.items() for name in label_names(text)):
        table.setdefault(name, index)
    return table


def find_label(name: str, id2label: dict[int, str]) -> int:
    """The id of a name or of a whole `id2label` entry. Raises `ValueError` if it is unknown or has several ids."""
    found = sorted(index for index, text in id2label.items() if name in (text, *label_names(text)))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f'Classes {", ".join(map(str, found))} are all called "{name}": pass one of these ids.')
    if not id2label:
        raise ValueError(f'This pipeline has no names for its classes, so "{name}" is unknown: pass ids.')
    lower = {known.lower(): known for known in label_table(id2label)}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower)]
    hint = f"did you mean {' or '.join(close)}?" if close else "`labels` has them all."
    raise ValueError(f'There is no class "{name}": {hint}')


def flatten(labels: Any) -> list:
    """What is in lists, tensors and arrays of any depth, in order: diffusers' DiT takes [[1], [2]] as well."""
    if hasattr(labels, "tolist"):
        labels = labels.tolist()
    if isinstance(labels, str) or not hasattr(labels, "__iter__"):
        return [labels]
    return [leaf for label in labels for leaf in flatten(label)]


def to_label_ids(labels: Any, id2label: dict[int, str], num_classes: int) -> list[int]:
    """Names or ids, one, several or a tensor -> ids, of which `num_classes` means no class."""
    ids = [find_label(label, id2label) if isinstance(label, str) else label for label in flatten(labels)]
    for label in ids:
        if not hasattr(label, "__index__") or not 0 <= label <= num_classes:
            raise ValueError(
                f"A class is a name, or an id from 0 to {num_classes - 1} ({num_classes} means no class), "
                f"but {label!r} is neither."
            )
    return [int(label) for label in ids]
