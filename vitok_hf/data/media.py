"""Reading pictures of all the kinds that Pillow reads, from files, bytes and addresses, upright and of 8 bits.

The number of channels says what becomes of them: 1 is grey, 3 sRGB, 4 sRGB with premultiplied colours and alpha; of
any other number they are stacks of channels, see `stacks`.
"""

import functools
import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from ..clips import COLOURS
from .stacks import read_array, read_pages


Source = str | Path | bytes | Exception | None

TRANSPOSES = {  # by the orientation in EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PROFILE_MODES = {"GRAY": ("L", "I;16"), "RGB ": ("RGB", "L", "I;16"), "CMYK": ("CMYK",)}  # modes that a profile fits

VIDEO_CHANNELS = (1, 3)

_no_limit = threading.Lock()


@contextmanager
def _any_size():
    """Lifts Pillow's limit of 179 megapixels, which guards servers against the pictures of strangers."""
    with _no_limit:
        limit: int | None = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _without_damaged_metadata(data: bytes) -> bytes:
    """The chunks of a PNG that make its pixels, and those of its profile and orientation if they are sound.

    Pillow opens no PNG with a damaged chunk, and no AVIF with damaged EXIF, which is given an unknown name here.
    """
    if data[4:8] == b"ftyp":  # AVIF
        return data.replace(b"Exif", b"none")
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    chunks, end = [data[:8]], 8
    for match in re.finditer(rb"IHDR|PLTE|tRNS|IDAT|IEND|iCCP|eXIf", data):
        start, body = match.start() - 4, match.end()
        if start < end:
            continue  # chance, inside a chunk
        stop = body + int.from_bytes(data[start : start + 4], "big")
        sound = zlib.crc32(data[body - 4 : stop]).to_bytes(4, "big") == data[stop : stop + 4]
        if sound or match[0] not in (b"iCCP", b"eXIf"):
            chunks.append(data[start : stop + 4])
            end = stop + 4
    return b"".join(chunks)


def _upright_picture(image: Image.Image) -> Image.Image:
    """As it is to be shown: cameras store pictures as the sensor lies."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises half a dozen types on damaged EXIF
        return image
    return image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image


def _to_16_bits(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, integers or floats, which `convert` would cut off at 255, as "I;16".

    Greys of 32 bits do not tell what is white: the least of 1 (of floats alone), 255 and 65535 that none exceeds, of
    floats by more than a hundredth, as resampling does, which is cut off.
    """
    values, white = np.asarray(image), 65535
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        whites, slack = ((1, 255, 65535), 0.01) if image.mode == "F" else ((255, 65535), 0.0)
        low, high = values.min(), values.max()
        white = next((white for white in whites if high <= (1 + slack) * white), 0)
        if not white or not -slack * high <= low:
            raise ValueError(f"its values go from {low} to {high}: save it with 8 or 16 bits")
        values = values.clip(0, white)
    return Image.fromarray((values * (65535 / white)).round().astype(np.uint16))


@functools.lru_cache(maxsize=8)  # the pictures of a data set share their profiles
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From pictures with a colour profile to sRGB; `None` if it changes no colour by more than 2 of 255."""
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode in PROFILE_MODES["GRAY"]:
        flags |= ImageCms.Flags.NOOPTIMIZE  # else dark greys are wrong by up to 10 levels
    transform = ImageCms.buildTransform(
        BytesIO(profile),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags,
    )
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours: np.ndarray = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    if mode != "RGB":
        colours = colours[..., 0] if mode == "L" else colours[..., 0].astype(np.uint16) * 257
    before = Image.fromarray(colours)
    change = np.asarray(transform.apply(before)).astype(int) - np.asarray(_to_8_bits(before).convert("RGB"))
    return transform if np.abs(change).max() > 2 else None


def _to_8_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode == "I;16" else image


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB of a picture, by its profile if there is one for its mode that is not damaged."""
    try:
        space = ImageCms.ImageCmsProfile(BytesIO(profile or b"")).profile.xcolor_space
        if image.mode in PROFILE_MODES.get(space, ()):
            image = _to_8_bits(image).convert("RGB") if space == "RGB " else image
            transform = _srgb_transform(profile, image.mode)
            image = transform.apply(image) if transform else image
    except (OSError, TypeError, ImageCms.PyCMSError):
        pass
    return _to_8_bits(image).convert("RGB")


def _decode(file: str | BytesIO, channels: int) -> np.ndarray:
    with Image.open(file) as image:
        if channels not in COLOURS:
            return read_pages(image, channels)
        if channels == 4 and image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise ValueError("RGBA has one page: save four channels that are no RGBA as .npy")
        image.load()
        profile, alpha = image.info.get("icc_profile"), None
        image, transparent = _upright_picture(image), image.info.get("transparency")
        if image.mode[0] in "IF":
            if isinstance(transparent, int):  # a grey of a PNG of 16 bits
                alpha = Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))
            image = _to_16_bits(image)
        elif image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
        if image.mode in ("1", "LA"):
            image = image.convert("L")
        elif image.mode not in ("L", "I;16", "CMYK"):
            image = image.convert("RGB" if alpha is None else "RGBA").convert("RGB")
        image = _to_srgb(image, profile)
        if channels == 4:
            image.putalpha(255 if alpha is None else alpha)
            return np.asarray(image.convert("RGBa"))  # premultiplied
        if alpha is not None:
            image.putalpha(alpha)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return to_channels(np.asarray(image), channels)


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W, channels): the same, or grey; raises `ValueError` for others."""
    if channels not in VIDEO_CHANNELS:
        raise ValueError(f"Frames of videos become 1 or 3 channels, not {channels}.")
    return image if channels == 3 else np.asarray(Image.fromarray(image).convert("L"))[..., None]


def read_picture(file: str | BytesIO, channels: int = 3) -> np.ndarray:
    """(H, W, channels) uint8 of a path or open file; see `load_image`."""
    try:
        return _decode(file, channels)
    except Exception:  # too large for Pillow, or damaged: perhaps in what does not matter
        data = file.getvalue() if isinstance(file, BytesIO) else Path(file).read_bytes()
        with _any_size():
            return _decode(BytesIO(_without_damaged_metadata(data)), channels)


def describe(source: Source) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def open_source(source: Source) -> str | BytesIO:
    """A path, or the content of what is no local file. Raises whatever its opening raises."""
    if isinstance(source, Exception):
        raise source
    if source is None:
        raise ValueError("it holds neither bytes nor a path")
    if isinstance(source, bytes):
        return BytesIO(source)
    if "://" in str(source) and not os.path.exists(source):
        with fsspec.open(source, "rb") as file:
            return BytesIO(file.read())
    return os.path.abspath(source)  # of "a:b.mp4", PyAV would take "a" for a protocol


@contextmanager
def errors_name(name: str, kind: str) -> Iterator[None]:
    """Makes a `ValueError` that names the file of whatever is raised while it is read."""
    try:
        yield
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise ValueError(f"{name}: cannot be read as a {kind} (unknown format); remove or replace it.") from error
    except Exception as error:  # on broken files, Pillow and PyAV raise a dozen types
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: cannot be read as a {kind} ({reason}); remove or replace it.") from error


def load_image(source: Source, name: str | None = None, channels: int = 3) -> np.ndarray:
    """(H, W, channels) uint8, upright, of any size; of an animation, the first frame.

    Greys of 16 and 32 bits are scaled to 8 bits, colour profiles converted to sRGB. Damaged metadata are passed over.

    Args:
        source: Where it is.
        name: What messages call it, by default the path.
        channels: 3: sRGB, transparent pictures on white. 1: the luma of that, as Pillow's "L". 4: sRGB with alpha, by
            which the colours are multiplied. Of these, and of any other number but 3, arrays (`stacks.read_array`);
            of other numbers, TIFF files with a page for each (`stacks.read_pages`).

    Raises:
        ValueError: "name: reason", if it is no picture, or has not these channels.
    """
    with errors_name(name or describe(source), "picture"):
        file = open_source(source)
        array = None if channels == 3 else read_array(file, channels)
        return read_picture(file, channels) if array is None else array


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    reducing_gap: float | None = 3.0,
) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of (H, W, C) at `size` (width, height): bicubic, antialiased."""

    def resized(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box, reducing_gap))

    if image.shape[2] == 3:
        return resized(image)
    # plane by plane: of four, Pillow would take the last for an alpha that is not applied yet
    return np.stack([resized(plane) for plane in np.moveaxis(image, 2, 0)], axis=2)


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size` (bicubic, antialiased), then the central square: (size, size, C) uint8."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return resize(image, (size, size), box)


def resize_then_crop(image: np.ndarray, size: int) -> np.ndarray:
    """As torchvision's `Resize` and `CenterCrop` of a picture of Pillow: (size, size, C) uint8.

    The shorter side becomes `size` (bicubic, antialiased), the longer one is rounded down; then the central square.
    """
    height, width = image.shape[:2]
    scaled = [int(size * side / min(height, width)) for side in (height, width)]
    top, left = (round((side - size) / 2) for side in scaled)
    resized = resize(image, (scaled[1], scaled[0]), (0, 0, width, height), reducing_gap=None)
    return resized[top : top + size, left : left + size]


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` indices below `count`, the first and the last among them; `None`: all.

    Raises:
        ValueError: If `limit` is negative.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"The number of items must not be negative, but is {limit}.")
    return np.linspace(0, count - 1, count if limit is None else min(limit, count)).round().astype(int).tolist()
