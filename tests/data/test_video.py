import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest

from tests.data.conftest import write_video
from vitok_hf.data import video as video_module
from vitok_hf.data.items import Clip, Item
from vitok_hf.data.video import iterate_timed_frames, load_clip, probe_rate, probe_video


BLOCK = 16
CODECS = {
    "libx264": {"bf": "3", "g": "20"},
    "libx264 open": {"bf": "3", "g": "20", "x264-params": "open-gop=1"},
    "libx264 refresh": {"g": "20", "x264-params": "intra-refresh=1"},
    "libx264 long": {"bf": "3"},
    "libx265": {"x265-params": "log-level=none:keyint=20:open-gop=1:bframes=4:pools=none:frame-threads=1"},
    "mpeg4": {"bf": "2", "g": "20"},
    "mpeg1video": {"bf": "2", "g": "15"},
    "mpeg2video": {"bf": "2", "g": "15"},
    "libvpx": {"g": "20", "lag-in-frames": "10"},
    "libvpx-vp9": {"g": "20", "lag-in-frames": "10", "cpu-used": "8"},
    "libsvtav1": {"g": "20", "preset": "12", "svtav1-params": "lp=1"},
    "mjpeg": {},
    "ffv1": {},
}
CONTAINERS = {
    "mp4": [*CODECS.keys() - {"libvpx"}],
    "mov": ["libx264", "libx264 open", "libx265", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg"],
    "m4v": ["libx264", "libx264 open", "mpeg4"],
    "mkv": [*CODECS],
    "webm": ["libvpx", "libvpx-vp9", "libsvtav1"],
    "avi": [*CODECS.keys() - {"libx265"}],
    "mpg": ["libx264", "libx264 open", "libx265", "mpeg4", "mpeg1video", "mpeg2video"],
    "mpeg": ["libx264", "mpeg2video"],
    "raw.mpg": ["libx264", "libx265", "mpeg4", "mpeg1video", "mpeg2video"],
}
RAW = {"libx264": "h264", "libx265": "hevc", "mpeg4": "m4v"}


def numbered(number: int) -> np.ndarray:
    """(48, 64, 3): eight blocks, white where the bit of `number` is set, over a grey strip."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    rows = np.array([bits[:4], bits[4:], [128] * 4], np.uint8)
    return np.repeat(rows.repeat(BLOCK, 0).repeat(BLOCK, 1)[..., None], 3, axis=2)


def numbers(frames: Sequence[np.ndarray]) -> list[int]:
    """Of `numbered` frames, whatever their size."""
    found = []
    for frame in frames:
        height, width = frame.shape[0] / 3, frame.shape[1] / 4
        centres = [(int((bit // 4 + 0.5) * height), int((bit % 4 + 0.5) * width)) for bit in range(8)]
        found.append(sum(int(frame[y, x].mean() > 128) << bit for bit, (y, x) in enumerate(centres)))
    return found


def every_frame(source: Path | bytes | str, name: str | None = None) -> list[np.ndarray]:
    return [frame for _, frame in iterate_timed_frames(source, name)]


def encode(
    target: Path | BytesIO,
    codec: str = "libx264",
    times: Sequence[float | Fraction] | None = None,
    rate: int | Fraction = 25,
    format: str | None = None,
    sound: float = 0.0,
    prepare: Callable = lambda stream: None,
    pixels: Callable[[int], np.ndarray] = numbered,
    pixel_format: str | None = None,
    muxer: dict[str, str] | None = None,
) -> None:
    """Frame i at second `times`[i], by default 60 of them at `rate` from 0 on; then `sound` seconds of silence."""
    rate = Fraction(rate)
    times = [Fraction(index) / rate for index in range(60)] if times is None else times
    name, options = codec.split()[0], CODECS.get(codec, {}) | {"threads": "1"}  # more spin where cores are busy
    file = f"file:{target}" if isinstance(target, Path) else target
    with av.open(file, "w", format=format, options=muxer or {}) as container:
        stream = container.add_stream(name, rate=rate, options=options)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = pixel_format or ("yuvj420p" if name == "mjpeg" else "yuv420p")
        stream.time_base = stream.codec_context.time_base = 1 / rate
        prepare(stream)
        if sound:
            silence = container.add_stream("aac" if str(target).endswith("mp4") else "libopus", rate=48000)
            silence.layout = "stereo"
        for index, time in enumerate(times):
            picture = pixels(index)
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = round(time * rate), 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for index in range(int(sound * 50)):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 48000, index * 960 + int(times[0] * 48000)
            container.mux(silence.encode(frame))
        if sound:
            container.mux(silence.encode())


class TestTimes:
    @pytest.mark.parametrize("rate, offset", [(25, 0), (Fraction(30000, 1001), 0), (24, 100)], ids=str)
    @pytest.mark.parametrize(
        "container, codec",
        [(container, codec) for container, codecs in CONTAINERS.items() for codec in sorted(codecs)],
    )
    def test_clips_begin_with_what_is_shown(self, container, codec, rate, offset, tmp_path):
        if container == "avi":
            offset = 0  # it has no other
        if container == "mpg" and codec == "mpeg4":
            rate = int(rate)  # it tells no rate but that of its clock
        path, times = tmp_path / f"x.{container}", [offset + index / Fraction(rate) for index in range(60)]
        form = RAW.get(codec, codec) if container == "raw.mpg" else None
        encode(path, codec, times, rate, form)
        assert numbers(every_frame(path)) == [*range(60)]
        for number in (0, 1, 13, 18, 19, 20, 21, 31, 44, 57):
            for part in (0.0, 0.5):
                clip = load_clip(path, float((number + part) / rate), 3)
                assert numbers(clip) == [number, number + 1, number + 2], (number, part)
        for start in (0.0, 0.37, 1.22):
            expected = [int((start + index / 8) * rate + 1e-6) for index in range(6)]
            assert numbers(load_clip(path, start, 6, fps=8)) == expected
        seconds, measured = probe_video(path)
        assert seconds == pytest.approx(60 / rate, abs=0.002) and measured == pytest.approx(float(rate))

    @pytest.mark.parametrize(
        "container, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mjpeg")]
    )
    def test_variable_rate(self, container, codec, tmp_path):
        path, later = tmp_path / f"x.{container}", [3 + Fraction(index, 25) for index in range(20)]
        encode(path, codec, [Fraction(0), *later])
        assert numbers(load_clip(path, 0.0, 7, fps=2)) == [0, 0, 0, 0, 0, 0, 1]
        assert numbers(load_clip(path, 2.9, 3, fps=25)) == [0, 0, 0]
        assert numbers(load_clip(path, 2.9, 3)) == [0, 1, 2]  # every frame
        assert numbers(load_clip(path, 3.0, 3)) == [1, 2, 3]
        assert [second for second, _ in iterate_timed_frames(path)] == pytest.approx(
            [0.0, *map(float, later)], abs=1e-3
        )
        assert probe_video(path)[0] == pytest.approx(3.8, abs=0.002)

    def test_milliseconds_are_not_exact(self, tmp_path):
        """Matroska stores 0.033, 0.067 and 0.1 for thirtieths of a second."""
        encode(tmp_path / "x.mkv", rate=30)
        assert numbers(load_clip(tmp_path / "x.mkv", 0.0, 30, fps=30)) == [*range(30)]

    def test_decodes_from_the_key_frame_on(self, tmp_path, monkeypatch):
        for container, codec in (("mkv", "libx264"), ("mp4", "mpeg2video"), ("avi", "mpeg4"), ("mpg", "mpeg2video")):
            path = tmp_path / f"x.{container}"
            encode(path, codec)
            times = decoded_times(path, 1.9, monkeypatch)
            assert times[0] >= 1.0 and times[-1] < 2.2

    @pytest.mark.parametrize("fps", [8.0, None])
    def test_random_clips_fit(self, fps, tmp_path):
        """Dense at first and sparse later: few starts leave enough of every frame."""
        times = [Fraction(index, 25) for index in range(30)] + [Fraction(2 + 5 * index) for index in range(6)]
        encode(tmp_path / "x.mkv", times=times)
        item, firsts = Item("x", tmp_path / "x.mkv", True), set()
        for seed in range(30):
            clip = Clip(16, fps).load(item, np.random.default_rng(seed))
            firsts.add(numbers(clip)[0])
        assert max(firsts) >= 15 and (fps or max(firsts) <= 20)


def decoded_times(path: Path, start: float, monkeypatch) -> list[float]:
    """Of the frames that leave the decoder for one frame from second `start` on."""
    decode, times = video_module.Video.decode, []

    def record(self, packets):
        for item in decode(self, packets):
            times.append(item[0])
            yield item

    monkeypatch.setattr(video_module.Video, "decode", record)
    load_clip(path, start, 1)
    monkeypatch.undo()
    return times


class TestLength:
    @pytest.mark.parametrize("container, codec", [("mkv", "libx264"), ("webm", "libvpx"), ("mp4", "libx264")])
    @pytest.mark.parametrize("start", [0, 100])
    def test_of_the_pictures(self, container, codec, start, tmp_path):
        path = tmp_path / f"x.{container}"
        encode(path, codec, [start + Fraction(index, 25) for index in range(50)], sound=30.0)
        assert probe_video(path)[0] == pytest.approx(2.0, abs=0.002)
        for seed in range(5):
            assert len(Clip(16, 8.0).load(Item("x", path, True), np.random.default_rng(seed))) == 16

    @pytest.mark.parametrize(
        "codec, form, muxer",
        [("libvpx", "webm", {"live": "1"}), ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"})],
    )
    def test_recordings_of_browsers(self, codec, form, muxer, tmp_path):
        """Written to a stream: without a length, and without an index."""
        stream = BytesIO()
        stream.seekable = lambda: False
        encode(stream, codec, format=form, muxer=muxer)
        assert probe_video(stream.getvalue()) == pytest.approx((2.4, 25.0))
        firsts = set()
        for seed in range(8):
            clip = Clip(4).load(Item("x", stream.getvalue(), True), np.random.default_rng(seed))
            firsts.add(numbers(clip)[0])
        assert max(firsts) > 30
        path = tmp_path / "x.webm"
        path.write_bytes(stream.getvalue())
        assert probe_video(path) == pytest.approx((2.4, 25.0))
        encode(path, "libvpx", [Fraction(index, 25) for index in range(10)], format="webm")
        assert probe_video(path)[0] == pytest.approx(0.4)  # of the new file


class TestPictures:
    @pytest.mark.parametrize(
        "ratio, width", [(2, 128), (Fraction(1, 2), 32), (Fraction(8, 9), 57), (Fraction(129, 128), 64)]
    )
    def test_square_pixels(self, ratio, width, tmp_path):
        def prepare(stream):
            stream.codec_context.sample_aspect_ratio = ratio

        encode(tmp_path / "x.mp4", prepare=prepare)
        clip = load_clip(tmp_path / "x.mp4", 1.0, 3)
        assert clip.shape == (3, 48, width, 3) and numbers(clip) == [25, 26, 27]
        assert every_frame(tmp_path / "x.mp4")[0].shape == (48, width, 3)

    @pytest.mark.parametrize(
        "container, codec, pixel_format",
        [
            ("webm", "libvpx-vp9", "yuva420p"),
            ("mov", "png", "rgba"),
            ("mov", "qtrle", "argb"),
        ],
    )
    def test_transparency_is_put_on_white(self, container, codec, pixel_format, tmp_path):
        def half(_):
            picture = np.full((48, 64, 4), (255, 0, 0, 255), np.uint8)
            picture[:, 32:, 3] = 0
            return picture

        path = tmp_path / f"x.{container}"
        encode(path, codec, pixels=half, pixel_format=pixel_format)
        for frame in (load_clip(path, 0.0, 1)[0], load_clip(path, 1.5, 1)[0], every_frame(path)[0]):
            np.testing.assert_allclose(frame[:, :28].mean((0, 1)), (255, 0, 0), atol=6)
            np.testing.assert_allclose(frame[:, 36:].mean((0, 1)), (255, 255, 255), atol=6)

    @pytest.mark.parametrize(
        "codec, pixel_format", [("ffv1", "gray"), ("ffv1", "yuv420p10le"), ("ffv1", "yuv444p12le")]
    )
    def test_other_formats(self, codec, pixel_format, tmp_path):
        encode(tmp_path / "x.mkv", codec, pixel_format=pixel_format)
        clip = load_clip(tmp_path / "x.mkv", 1.0, 3)
        assert numbers(clip) == [25, 26, 27]
        np.testing.assert_allclose(clip[0, :BLOCK, :BLOCK], 255, atol=3)
        np.testing.assert_allclose(clip[0, 2 * BLOCK :], 128, atol=3)

    @pytest.mark.parametrize("name, codec", [("x.webm", "libvpx"), ("x.mkv", "libvpx-vp9"), ("x.avi", "mjpeg")])
    def test_a_change_of_size(self, name, codec, tmp_path):
        """All frames get the size that the file tells, that of the first."""
        path = tmp_path / name
        pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, pixel_format, Fraction(1, 25)
            for first, width, height in ((0, 64, 48), (10, 96, 64)):
                encoder = av.CodecContext.create(codec, "w")
                encoder.width, encoder.height, encoder.pix_fmt = width, height, pixel_format
                encoder.time_base, encoder.framerate, packets = Fraction(1, 25), 25, []
                for index in range(first, first + 10):
                    frame = av.VideoFrame.from_ndarray(numbered(index)).reformat(width, height, pixel_format)
                    frame.pts, frame.time_base = index, Fraction(1, 25)
                    packets += encoder.encode(frame)
                for packet in packets + encoder.encode():
                    packet.stream, packet.time_base = stream, Fraction(1, 25)
                    container.mux(packet)
        assert load_clip(path, 0.0, 20).shape == (20, 48, 64, 3)
        assert numbers(every_frame(path)) == numbers(load_clip(path, 0.0, 20)) == [*range(20)]
        assert load_clip(path, 0.6, 3).shape == (3, 48, 64, 3)


class TestWhatIsNoVideo:
    @pytest.mark.parametrize("cover", [False, True])
    def test_sound(self, cover, tmp_path):
        path = tmp_path / "song.mp4"
        with av.open(str(path), "w") as container:
            silence = container.add_stream("aac", rate=48000)
            silence.layout = "stereo"
            if cover:
                stream = container.add_stream("mjpeg")
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
                stream.disposition = av.stream.Disposition.attached_pic
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(5))))
                container.mux(stream.encode())
            for index in range(50):
                frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
                frame.sample_rate, frame.pts = 48000, index * 1024
                container.mux(silence.encode(frame))
            container.mux(silence.encode())
        with av.open(str(path)) as container:
            assert len(container.streams.video) == cover
        calls = (
            probe_video,
            probe_rate,
            lambda path: load_clip(path, 0.0, 1),
            lambda path: every_frame(path)[0],
        )
        for call in calls:
            with pytest.raises(ValueError, match="song.mp4: cannot be read as a video .*no moving pictures.*remove"):
                call(path)

    def test_broken_streams(self, tmp_path):
        encode(tmp_path / "x.mkv")
        content = (tmp_path / "x.mkv").read_bytes()
        for broken in (content[:600], b"", content[600:]):
            with pytest.raises(ValueError, match="^clip: "):
                load_clip(broken, 0.0, 60, name="clip")
            with pytest.raises(ValueError, match="^clip: "):
                Clip(16, 8.0).load(Item("clip", broken, True), np.random.default_rng(0))


def test_addresses(tmp_path):
    for container, codec in (("mp4", "libx264"), ("mpg", "mpeg2video"), ("mkv", "libx264")):
        path = tmp_path / f"x.{container}"
        encode(path, codec)
        fsspec.filesystem("memory").pipe(f"/clips/x.{container}", path.read_bytes())
        for source in (f"memory://clips/x.{container}", path.read_bytes()):
            assert np.array_equal(load_clip(source, 1.3, 4), load_clip(path, 1.3, 4))
            assert probe_video(source) == probe_video(path)


class TestVideo:
    def test_seeks(self, tmp_path):
        """What comes before the key frame is damaged."""
        write_video(tmp_path / "keys.mp4", g="5", bf="0")
        content = bytearray((tmp_path / "keys.mp4").read_bytes())
        start = content.index(b"mdat") + 4
        half = int.from_bytes(content[start - 8 : start - 4], "big") // 2
        content[start : start + half] = bytes(half)
        np.testing.assert_allclose(load_clip(bytes(content), 1.4, 3).mean((1, 2, 3)) / 5, [35, 36, 37], atol=0.5)
        with pytest.raises(ValueError, match="cannot be read as a video"):
            load_clip(bytes(content), 0.0, 3)

    def test_videos_that_break_off(self, video):
        content = bytearray(video.read_bytes())
        start = content.index(b"mdat") + 4
        content[start : start + 200] = bytes(200)
        with pytest.raises(ValueError, match="^clip: cannot be read as a video .*remove or replace it"):
            every_frame(bytes(content), "clip")

    @pytest.mark.parametrize(
        "matrix, show",
        [
            ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),  # clockwise
            ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
            ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
            ((1, 0, 0, -1), lambda frame: frame[::-1]),
            ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
            ((0, 0, 0, 0), lambda frame: frame),
        ],
    )
    def test_frames_are_upright(self, tmp_path, matrix, show):
        """By the matrix in the track's header: pixel (x, y) is shown at (a x + c y, b x + d y)."""
        path = tmp_path / "ramp.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[:16, :16] = 200  # a corner
            for _ in range(4):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        content, (a, b, c, d) = bytearray(path.read_bytes()), matrix
        start, one = content.index(b"tkhd") + 44, 2**16
        content[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 2**30)
        expected = show(load_clip(path, 0.0, 1)[0])
        assert np.array_equal(load_clip(bytes(content), 0.0, 1)[0], expected)
        assert np.array_equal(every_frame(bytes(content))[0], expected)

    def test_end_of_the_video(self, video):
        assert probe_video(video)[0] == pytest.approx(2.0, abs=0.05)
        with pytest.raises(ValueError, match="has 5 frames from 1.80 s"):
            load_clip(video, 1.8, 8)
