"""Classes by name: from the `id2label` of a pipeline to the ids that its model takes."""

import difflib
from collections.abc import Sequence
from typing import Any

from ..checks import LARGEST, check_int, refuse


MAX_NAMED = 20  # classes in a message


def label_names(text: str) -> list[str]:
    """Those of an entry of `id2label`: ImageNet's "tench, Tinca tinca" has two."""
    return [name.strip() for name in text.split(",")]


def label_table(id2label: dict[int, str]) -> dict[str, int]:
    """Name -> id, in alphabetical order; the first id of a name that several classes have."""
    table: dict[str, int] = {}
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
    names = ", ".join(list(lower.values())[:MAX_NAMED]) + (", ..." if len(lower) > MAX_NAMED else "")
    hint = f"did you mean {' or '.join(close)}?" if close else f"`labels` has them all, {names}."
    raise ValueError(f'There is no class "{name}": {hint}')


def flatten(labels: Any) -> list:
    """What is in lists, tensors and arrays of any depth, in order: diffusers' DiT takes [[1], [2]] as well.

    Not in sets, which have no order, in dicts, or in iterators, which may have no end.
    """
    if hasattr(labels, "tolist"):
        labels = labels.tolist()
    if isinstance(labels, (str, bytes, bytearray)) or not isinstance(labels, Sequence):
        return [labels]
    return [leaf for label in labels for leaf in flatten(label)]


def to_label_ids(labels: Any, id2label: dict[int, str], num_classes: int) -> list[int]:
    """Names or ids, one, several or a tensor -> ids, of which `num_classes` means no class."""
    ids = [find_label(label, id2label) if isinstance(label, str) else label for label in flatten(labels)]
    wanted = f"a name, or an id from 0 to {num_classes - 1} ({num_classes} means no class)"
    return [check_int("class_labels", label, 0, num_classes, wanted) for label in ids]


def check_id2label(id2label: Any) -> dict[int, str]:
    """With integers for keys, of which JSON makes strings."""
    wanted, table = "a dict of class ids and names", dict[int, str]()
    if id2label is None:
        return table
    if not isinstance(id2label, dict):
        refuse("id2label", wanted, id2label)
    for index, text in id2label.items():
        if not isinstance(text, str):
            refuse("id2label", wanted, id2label)
        is_text = isinstance(index, str) and index.isdecimal() and len(index) < 10
        number = check_int("id2label", int(index) if is_text else index, -LARGEST, LARGEST, wanted)
        if number in table:
            raise ValueError(
                f"`id2label` has the id {number} twice, for {table[number]!r} and {text!r}: leave one out."
            )
        table[number] = text
    return table
