"""Generated pictures in one file, as the evaluation suite of ADM (Dhariwal and Nichol, 2021) reads them.

A .npz file has `arr_0`, (N, H, W, 3) uint8, and may have the class ids, `arr_1`, (N,).
"""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ..disk import atomic_file
from .items import Decoded


def _check(name: str, pixels: np.ndarray, labels: np.ndarray | None) -> None:
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(
            f'"{name}" must have `arr_0`, (N, height, width, 3) uint8, but has {pixels.dtype} of {pixels.shape}: '
            "bring the pictures to one size, RGB of 8 bits."
        )
    if labels is not None and (labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f'"{name}" must have as `arr_1` the class ids of {len(pixels)} pictures, integers, but has {labels.dtype} '
            f"of {labels.shape}: correct it, or leave it out."
        )


def write_samples_file(path: str | Path, pixels: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes pictures, (N, H, W, 3) uint8, and their class ids, (N,), whole or not at all.

    Raises:
        ValueError: If they have another shape or type, or the name does not end in .npz.
    """
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f'"{path}" must end in .npz.')
    _check(str(path), pixels, labels)
    arrays = [pixels] if labels is None else [pixels, labels]
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *arrays)


class SamplesFile:
    """The pictures of such a file, all in memory; what else is in it is not read.

    Args:
        path: Where it is.

    Attributes:
        labels: (N,) class ids, or `None`.

    Raises:
        ValueError: If it is no such file.
    """

    def __init__(self, path: str | Path):
        try:
            with np.load(path) as arrays:
                names = set(arrays)
                self.pixels = arrays["arr_0"] if "arr_0" in names else np.zeros(0)
                self.labels = arrays["arr_1"] if "arr_1" in names else None
        except (ValueError, EOFError, BadZipFile, TypeError, AttributeError) as error:  # .npy, pickles, anything else
            raise ValueError(f'"{path}" is no .npz file of pictures, or damaged ({error}): name another.') from error
        _check(str(path), self.pixels, self.labels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Decoded:
        return Decoded(self.pixels[index])
