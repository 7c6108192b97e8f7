"""Test sets by name: where on the Hub they are, and how many pictures they have."""

from dataclasses import dataclass

from .items import PICTURE, Clip
from .sources import HubRows


@dataclass(frozen=True)
class NamedSet:
    """A split of a dataset of the Hub, with pictures in its column "image".

    Args:
        dataset: Its id.
        split: Its split.
        count: Pictures that it has.
        data_files: The files of the split, where the dataset has others.
    """

    dataset: str
    split: str
    count: int
    data_files: str | None = None


TEST_SETS = {
    "coco-val2017": NamedSet("lmms-lab/COCO-Caption2017", "val", 5000, "data/val-*"),
    "imagenet-val": NamedSet("ILSVRC/imagenet-1k", "validation", 50_000, "data/validation-*"),
    "div8k": NamedSet("Iceclear/DIV8K_TrainingSet", "train", 1500),
}


def open_test_set(name: str, clip: Clip = PICTURE, first: int | None = None) -> HubRows:
    """The pictures of one of `TEST_SETS`, or the `first` of them, downloaded to the cache of `datasets`.

    "imagenet-val" needs an account that accepted the conditions of ImageNet, "div8k" 46 GB.

    Raises:
        ValueError: If the name is unknown, or the dataset has another number of pictures now.
        ImportError: If the package `datasets` is not installed.
    """
    if name not in TEST_SETS:
        raise ValueError(f'There is no test set "{name}": choose from {", ".join(TEST_SETS)}.')
    test_set, expected = TEST_SETS[name], TEST_SETS[name].count
    split = test_set.split
    if first is not None and first < expected:
        split, expected = f"{split}[:{first}]", first
    rows = HubRows(test_set.dataset, None, split, "image", clip, test_set.data_files)
    if len(rows) != expected:
        raise ValueError(
            f'"{test_set.dataset}" has {len(rows)} pictures in its split {split}, but {name} has {expected}: it is '
            "another set now; name one by `dataset_name`."
        )
    return rows
