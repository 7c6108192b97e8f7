"""Pictures of any number of channels, from arrays of NumPy and from TIFF files with a grey page for each channel.

Values become 8 bits: uint8 is taken as it is, of uint16 the full range, 0 to 65535, and of floats [0, 1]. Channels
come first, (C, H, W); of one channel, (H, W) will do.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence


NUMPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"  # with which .npy and .npz files begin


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """uint8 of values of any of the types above, as greys of 16 bits are scaled; raises `ValueError` for others."""
    kind = values.dtype.kind, values.dtype.itemsize
    if kind[0] == "f":
        low, high = values.min(), values.max()
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"its values go from {low} to {high}: floats must be in [0, 1]")
        values, kind = (values.astype(np.float64) * 65535).round().astype(np.uint16), ("u", 2)
    if kind == ("u", 2):
        return (values >> 8).astype(np.uint8)
    if kind != ("u", 1):
        raise ValueError(f"it holds {values.dtype}: save uint8 (0 to 255), uint16 (0 to 65535) or floats in [0, 1]")
    return values


def to_pixels_last(values: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) -> (H, W, C) uint8; raises `ValueError` for other numbers of channels, and for channels last."""
    values = values[None] if values.ndim == 2 and channels == 1 else values
    if values.ndim != 3 or len(values) != channels or not values.size:
        wanted, hint = f"({channels}, height, width)", ""
        if values.ndim == 3 and values.shape[2] == channels:
            wanted, hint = f"{(channels, *values.shape[:2])}", ": move the channels, `numpy.moveaxis(array, -1, 0)`"
        raise ValueError(f"it has shape {values.shape}, but must have {wanted}{hint}")
    return np.ascontiguousarray(to_8_bits(values).transpose(1, 2, 0))


def read_array(file: str | BytesIO, channels: int) -> np.ndarray | None:
    """(H, W, channels) uint8 of a .npy file, or a .npz file with one array; `None`, if it is neither.

    Raises:
        ValueError: If the array has other channels, or values of another type or range.
    """
    if isinstance(file, BytesIO):
        begin = file.getvalue()[: len(NUMPY)]
    else:
        with Path(file).open("rb") as opened:
            begin = opened.read(len(NUMPY))
    if not begin.startswith((NUMPY, ZIP)):
        return None
    content = np.load(file)  # which refuses what would be unpickled
    if isinstance(content, np.ndarray):
        return to_pixels_last(content, channels)
    with content:
        if len(content.files) != 1:
            raise ValueError(f"it holds {len(content.files)} arrays ({', '.join(content.files)}), but must hold one")
        return to_pixels_last(content[content.files[0]], channels)


def read_pages(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, channels) uint8 of an open TIFF file with so many grey pages of one size and type.

    Raises:
        ValueError: If there are others.
    """
    count = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or count != channels:
        raise ValueError(
            f"it is {image.format} with {count} page(s), but {channels} channels come from TIFF with {channels} "
            "pages, or from .npy and .npz"
        )
    pages, modes = [], set()
    for page in ImageSequence.Iterator(image):
        pages.append(np.asarray(page))
        modes.add((page.mode, page.size))
    if len(modes) > 1 or pages[0].ndim != 2 or image.mode == "P":
        raise ValueError(f"its pages have modes and sizes {sorted(modes)}, but must all be grey and of one size")
    return to_pixels_last(np.stack(pages), channels)
