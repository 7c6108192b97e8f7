import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import fsspec
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from tests.conftest import ASSETS
from vitok_hf.data.media import evenly_spaced, load_image
from vitok_hf.data.video import probe_video


RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deviation(data: bytes, expected: np.ndarray) -> int:
    return np.abs(load_image(data).astype(int) - expected).max()


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 by its definition; CMYK goes through Lab, greys through XYZ."""
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    header = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02400000, b"prtr", space, connection)
    header += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3I", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + table + body


WHITE = b"XYZ " + struct.pack(">4I", 0, 63190, 65536, 54061)
LINEAR_GREY = profile(b"GRAY", {b"wtpt": WHITE, b"kTRC": b"curv" + struct.pack(">II", 0, 0)})


def cmyk_profile() -> bytes:
    """Ink of the last colour alone counts: lightness falls from 100 to 0."""
    line = bytes(range(256))
    nodes = b"".join(bytes([0 if number % 2 else 255, 128, 128]) for number in range(16))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return profile(b"CMYK", {b"wtpt": WHITE, b"A2B0": table + line * 4 + nodes + line * 3})


class TestProfiles:
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
    def test_swapped_primaries(self, kind):
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
        smooth = np.full((16, 16, 3), (200, 90, 30), np.uint8)
        data = encode(smooth, kind, icc_profile=SWAPPED, **options)
        assert deviation(data, np.array([90, 200, 30])) <= 2
        if kind != "JPEG":
            assert deviation(encode(COLOURS, kind, icc_profile=SWAPPED, **options), COLOURS[..., [1, 0, 2]]) <= 2

    def test_pictures_in_srgb_stay_as_they_are(self):
        assert deviation(encode(COLOURS, icc_profile=SRGB), COLOURS) == 0

    @pytest.mark.parametrize(
        "damaged",
        [SWAPPED[:60], SWAPPED[: len(SWAPPED) // 2], b"\0" * 500, b"x", LINEAR_GREY, cmyk_profile()],
        ids=["start", "half", "zeros", "text", "grey", "cmyk"],  # profiles have the second of their making in them
    )
    def test_damaged_and_foreign_profiles_are_passed_over(self, damaged):
        assert deviation(encode(COLOURS, icc_profile=damaged), COLOURS) == 0

    def test_greys(self):
        """Of linear light; dark levels of 16 bits are not those that 8 bits can tell apart."""
        for levels in (np.arange(256, dtype=np.uint8)[None], np.arange(0, 65536, 64, dtype=np.uint16)[None]):
            light = levels / np.iinfo(levels.dtype).max
            expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
            assert deviation(encode(levels, icc_profile=LINEAR_GREY), expected[..., None].round().astype(int)) <= 1
        assert deviation(encode(RAMP, icc_profile=SRGB), RAMP[..., None]) == 0  # of colours, in a grey picture

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
    def test_inks(self, kind):
        for black, level in ((0, 255), (128, 118), (255, 0)):  # L* of 49.8 is level 118
            data = encode(Image.new("CMYK", (8, 8), (255, 0, 0, black)), kind, icc_profile=cmyk_profile())
            assert deviation(data, np.array([level])) <= 2
        assert deviation(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), kind), np.array([0, 255, 255])) <= 2

    def test_transparency_and_palettes(self):
        picture = Image.fromarray(COLOURS)
        picture.putalpha(Image.fromarray(np.where(np.arange(16) < 8, 255, 0).astype(np.uint8)[None].repeat(12, 0)))
        expected = np.where(np.arange(16)[:, None] < 8, COLOURS[..., [1, 0, 2]], 255)
        assert deviation(encode(picture, icc_profile=SWAPPED), expected) <= 2
        palette = Image.new("P", (4, 4))
        palette.putpalette([200, 90, 30])
        assert deviation(encode(palette, icc_profile=SWAPPED), np.array([90, 200, 30])) <= 2


def by_hand(bits: int, kind: int, rows: np.ndarray, *extra: bytes) -> bytes:
    """A PNG of big-endian rows."""
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


GREY = np.repeat(RAMP[..., None], 3, axis=2)
KINDS = {
    "16 bits": (encode(RAMP.astype(np.uint16) * 257), RAMP),
    "16 bits, TIFF": (encode(RAMP.astype(np.uint16) * 257, "TIFF"), RAMP),
    "16 bits, JPEG 2000": (encode(RAMP.astype(np.uint16) * 257, "JPEG2000"), RAMP),
    "16 bits, PGM": (b"P5 8 8 65535\n" + (RAMP.astype(">u2") * 257).tobytes(), RAMP),
    "16 bits, RGB": (by_hand(16, 2, GREY.astype(">u2") * 257), RAMP),
    "16 bits and alpha": (by_hand(16, 4, np.dstack([RAMP, 255 - 0 * RAMP]).astype(">u2") * 257), RAMP),
    "32 bits": (encode(RAMP.astype(np.int32) * 257, "TIFF"), RAMP),
    "32 bits, to 255": (encode(RAMP.astype(np.int32), "TIFF"), RAMP),
    "floats to 1": (encode((RAMP / 255).astype(np.float32), "TIFF"), RAMP),
    "floats to 255": (encode(RAMP.astype(np.float32), "TIFF"), RAMP),
    "floats, PFM": (b"Pf\n8 8\n-1.0\n" + (RAMP[::-1] / 255).astype("<f4").tobytes(), RAMP),
    "1 bit": (encode(Image.fromarray((RAMP > 99).astype(np.uint8) * 255).convert("1")), (RAMP > 99) * 255),
    "grey and alpha": (
        encode(Image.merge("LA", [Image.fromarray(RAMP)] * 2)),
        255 - (255 - RAMP.astype(int)) * RAMP / 255,
    ),
    "GIF": (encode(Image.fromarray(RAMP), "GIF"), RAMP),
    "transparent GIF": (encode(Image.fromarray(RAMP), "GIF", transparency=0), np.where(RAMP, RAMP, 255)),
    "transparent palette": (encode(Image.fromarray(GREY).quantize(64), transparency=bytes(64)), 255 + 0 * RAMP),
    "inks": (encode(Image.fromarray(255 - GREY).convert("CMYK"), "TIFF"), 255 - RAMP),
}


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_greys(self, kind):
        data, expected = KINDS[kind]
        assert deviation(data, np.asarray(expected)[..., None]) <= 1

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "AVIF", "TIFF"])
    def test_first_frame_of_animations(self, kind):
        first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "lime"))
        assert deviation(encode(first, kind, save_all=True, append_images=[second]), np.array([255, 0, 0])) <= 2

    @pytest.mark.parametrize("white, over", [(1.0, 0.0001), (1.0, 0.009), (255.0, 2.0), (65535.0, 100.0)])
    def test_floats_that_overshoot(self, white, over):
        """As resampling leaves them."""
        values = np.linspace(-over, white + over, 64, dtype=np.float32).reshape(8, 8)
        expected = (values.clip(0, white) * (255 / white))[..., None]
        assert deviation(encode(values, "TIFF"), expected.astype(int)) <= 1

    def test_transparent_grey_of_16_bits(self):
        picture = np.full((4, 4), 1000, np.uint16)
        picture[0] = 40000
        expected = np.full((4, 4, 1), 255)
        expected[0] = 40000 >> 8
        assert deviation(encode(picture, transparency=1000), expected) <= 1

    @pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 70000.0), (0.0, np.nan)])
    def test_values_that_tell_nothing(self, low, high):
        with pytest.raises(ValueError, match="its values go from .*: save it with 8 or 16 bits"):
            load_image(encode(np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8), "TIFF"))

    @pytest.mark.parametrize("kind", ["TIFF", "WEBP", "AVIF", "PNG"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_upright(self, kind, orientation):
        """Where the first row and the first column of the stored pixels lie."""
        rows = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
        turned = [rows, rows[:, ::-1], rows[::-1, ::-1], rows[::-1]]
        turned += [rows.T, rows[::-1].T, rows[::-1, ::-1].T, rows[:, ::-1].T]
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
        picture = Image.fromarray(rows).convert("RGB")
        assert (
            deviation(encode(picture, kind, exif=exif.tobytes(), **options), turned[orientation - 1][..., None]) <= 2
        )


def with_exif(kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "maker"
    return encode(COLOURS, kind, exif=exif.tobytes(), **options)


def with_text(**options) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a comment")
    return encode(COLOURS, pnginfo=text, **options)


class TestDamage:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
    def test_exif(self, kind):
        options = {"JPEG": {"quality": 95}, "AVIF": {"quality": 100}}.get(kind, {"lossless": True})
        data, plain = with_exif(kind, **options), load_image(encode(COLOURS, kind, **options))
        assert b"MM\0*" in data and deviation(data, plain) == 0
        for wrong in (b"MM\0x", b"xxxx", b"\0\0\0\0"):
            assert deviation(data.replace(b"MM\0*", wrong), plain) == 0

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data.replace(b"a comment", b"a Comment"),  # the checksum is wrong
            lambda data: data.replace(b"a comment", b"a com"),  # cut short
            lambda data: data.replace(b"\0\0\0\x11tEXt", b"\0\xff\0\x11tEXt"),
            lambda data: data.replace(b"tEXt", b"t\xff\0t"),
            lambda data: data[:33] + chunk(b"pHYs", b"\0") + data[33:],
            lambda data: data[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26))) + data[33:],
            lambda data: data[:-12] + chunk(b"tEXt", b"k\0v")[:9],  # the end is lost
        ],
    )
    def test_chunks(self, damage):
        data = with_text(icc_profile=SWAPPED)
        assert damage(data) != data and deviation(damage(data), COLOURS[..., [1, 0, 2]]) <= 2

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data.replace(b"IDAT", b"I\0\1T"),
            lambda data: data[: data.index(b"IDAT") + 60],
            lambda data: data[: data.index(b"IDAT") + 60] + bytes(40) + data[data.index(b"IDAT") + 100 :],
            lambda data: data[:16] + b"\0\0\0\0" + data[20:],
            lambda data: b"",
            lambda data: data[:8],
        ],
    )
    def test_pixels(self, damage):
        for data in (with_text(), with_text().replace(b"a comment", b"a Comment")):
            with pytest.raises(ValueError, match="^x: cannot be read as a picture"):
                load_image(damage(data), "x")


class TestSize:
    @pytest.fixture(autouse=True)
    def limit(self, monkeypatch):
        """Above 100 pixels Pillow warns, above 200 it refuses."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF", "BMP", "JPEG2000"])
    def test_any_size_is_read(self, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for side in (12, 40):  # of 144 and 1600 pixels
                assert load_image(encode(Image.new("RGB", (side, side)), kind)).shape == (side, side, 3)
        assert Image.MAX_IMAGE_PIXELS == 100

    def test_threads_leave_the_limit_alone(self):
        data = encode(np.zeros((200, 200), np.uint8))
        with ThreadPoolExecutor(8) as pool:
            shapes = list(pool.map(lambda _: load_image(data).shape, range(64)))
        assert shapes == [(200, 200, 3)] * 64 and Image.MAX_IMAGE_PIXELS == 100
        with pytest.raises(Image.DecompressionBombError):
            Image.open(BytesIO(data))


def test_bytes_and_addresses():
    data, expected = (ASSETS / "rocket.jpg").read_bytes(), load_image(ASSETS / "rocket.jpg")
    fsspec.filesystem("memory").pipe("/pictures/rocket.jpg", data)
    assert np.array_equal(load_image(data), expected)
    assert np.array_equal(load_image("memory://pictures/rocket.jpg"), expected)
    with pytest.raises(ValueError, match="^memory://pictures/none.jpg: cannot be read .*FileNotFoundError"):
        load_image("memory://pictures/none.jpg")
    with pytest.raises(ValueError, match="^a sample: cannot be read"):
        load_image(data[:100], "a sample")


def test_evenly_spaced():
    assert evenly_spaced(5, None) == evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(5, 3) == [0, 2, 4] and evenly_spaced(5, 0) == []
    with pytest.raises(ValueError, match="must not be negative, but is -1"):
        evenly_spaced(5, -1)


@pytest.mark.parametrize("read", [load_image, probe_video])
def test_messages_do_not_change_between_runs(read):
    messages = []
    for _ in range(2):
        with pytest.raises(ValueError, match="^it: cannot be read") as error:
            read(b"no such format" * 10, "it")
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "0x" not in messages[0]
