"""Reading clips from videos: what players show, at the second at which they show it."""

import math
import os
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.format import Flags
from av.stream import Disposition
from PIL import Image

from .media import Source, describe, errors_name, open_source, resize


MAX_TOLERANCE = 2e-3  # seconds; Matroska rounds time stamps to milliseconds
FAR = 1e9  # seconds
MAX_RATE = 1000  # of frames; more is the unit of time in place of a rate
MAX_SEEKS = 4
COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
IDR = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")  # marks an h264 key frame that nothing shown before it follows
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave the transparency out


class Video:
    """The pictures of an open file. Times are in seconds since the first of them."""

    def __init__(self, source: Source):
        self.file = open_source(source)
        self._start()

    def rewind(self) -> None:
        """Opens the file again, the one way to the beginning that every format has."""
        self.container.close()
        if not isinstance(self.file, str):
            self.file.seek(0)
        self._start()

    def _start(self) -> None:
        # else "a:b.mp4" names a protocol
        self.container = av.open(f"file:{self.file}" if isinstance(self.file, str) else self.file)
        streams = [stream for stream in self.container.streams.video if not stream.disposition & COVERS]
        if not streams:
            raise ValueError("it has no moving pictures, at most sound and a cover")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self.decoder = self.stream.codec_context
        if self.stream.metadata.get("alpha_mode") == "1" and self.decoder.name in ALPHA_DECODERS:
            self.decoder = av.CodecContext.create(ALPHA_DECODERS[self.decoder.name], "r")
        width, ratio = self.stream.width, self.stream.sample_aspect_ratio or 1
        if abs(width * ratio - width) >= 1:  # less is a rounded size, no shape
            width = max(1, round(width * ratio))
        self.size = width, self.stream.height
        flags = self.container.format.flags
        self.has_times = not flags & Flags.no_timestamps.value
        self.can_seek = self.has_times and not flags & Flags.ts_discont.value  # else, times depend on where one starts
        self.is_avi = self.container.format.name == "avi"
        rates = (self.stream.average_rate if self.has_times else None), self.stream.guessed_rate, 25
        self.rate = float(next(rate for rate in rates if rate and rate <= MAX_RATE))
        self.tick = float(self.stream.time_base)
        # fine time stamps are rounded, by less than a tick; coarse ones, which count frames, are not
        self.tolerance = 0.99 * self.tick if self.tick < MAX_TOLERANCE else 1e-6
        self.origin = (self.stream.start_time or 0) * self.tick

    def close(self) -> None:
        self.container.close()

    def seconds(self, stamp: int) -> float:
        return stamp * self.tick - self.origin

    def decode(self, packets: Iterable[av.Packet]) -> Iterator[tuple[float, float, av.VideoFrame]]:
        """The second from which on a frame is shown, the one until which it is due to be, and the frame.

        AVI tells the number of each packet, but not which picture is in it: the next picture has the next number.
        """
        time, following, step = -math.inf, 0.0, 1 / self.rate
        numbers: deque[int] = deque()
        delay, counts = self.stream.codec_context.has_b_frames, not self.has_times
        for packet in packets:
            step = (packet.duration or 0) * self.tick or step
            if self.is_avi:
                numbers.append(packet.dts)
            for frame in self.decoder.decode(packet):
                counts |= frame.pts is None and not self.can_seek  # the demuxer has lost track
                if self.is_avi and frame.pts is not None and numbers:
                    while time == -math.inf and numbers[0] < frame.pts - delay and len(numbers) > 1:
                        numbers.popleft()  # of pictures before the key frame that cannot be decoded
                    following = self.seconds(numbers.popleft())
                elif frame.pts is not None and not counts:
                    following = self.seconds(frame.pts)
                time = max(time, following)
                following = time + step
                yield time, following, frame

    def frames_from(self, start: float) -> Iterator[tuple[float, float, av.VideoFrame]]:
        """The frames from the one shown at second `start` on, or from an earlier one: from when, until when, which."""
        for packets in self._starts(start):
            frames = self.decode(packets)
            first = next(frames, None)
            if first is not None and first[0] <= start + self.tolerance:
                break
        while first is not None:
            (time, end, frame), following = first, next(frames, None)
            yield time, following[0] if following else end, frame
            first = following

    def _starts(self, start: float) -> Iterator[Iterable[av.Packet]]:
        """Packets from a key frame on that may be early enough, the nearest first; then those of the whole file."""
        if start > self.tolerance:
            if self.can_seek:
                yield from self._seek(start)
            if self.has_times and not self.is_avi:
                self.rewind()
                yield self._scan(start)
            self.rewind()
        yield self.container.demux(self.stream)

    def _seek(self, start: float) -> Iterator[Iterable[av.Packet]]:
        hides_order = self.is_avi and self.stream.codec_context.name == "h264"  # of what precedes other key frames
        target = start
        for _ in range(MAX_SEEKS):
            try:
                self._go_to(target)
            except av.FFmpegError:  # there is no index
                return
            packets = dropwhile(lambda packet: not packet.is_keyframe, self.container.demux(self.stream))
            key = next(packets, None)
            if key is None or key.dts is None:
                return
            if not hides_order or IDR.search(bytes(key)):
                yield chain([key], packets)
            target = min(target, self.seconds(key.dts)) - self.tick  # formats seek by when a frame is decoded

    def _go_to(self, second: float) -> None:
        self.container.seek(math.floor((second + self.origin + self.tolerance) / self.tick), stream=self.stream)

    def _scan(self, start: float) -> Iterable[av.Packet]:
        """Reads on to second `start`, and keeps what follows the last key frame."""
        kept: list[av.Packet] = []
        packets, known = self.container.demux(self.stream), True
        for packet in packets:
            known &= packet.pts is not None  # else, those that follow may be wrong, too
            if known and packet.is_keyframe and self.seconds(packet.pts) <= start + self.tolerance:
                kept.clear()
            kept.append(packet)
            if packet.dts is not None and self.seconds(packet.dts) > start + self.tolerance:
                break
        return chain(kept, packets)

    def clip(self, start: float, num_frames: int, fps: float | None) -> list[np.ndarray]:
        """The frames of `load_clip`, or fewer, if there are no more."""
        pictures, due = [], start
        for _, until, frame in self.frames_from(start):
            while due < until - self.tolerance:  # more than once, if `fps` is above the video's rate
                pictures.append(self.picture(frame))
                if len(pictures) == num_frames:
                    return pictures
                if fps is None:
                    due = -math.inf
                    break
                due = start + len(pictures) / fps
        return pictures

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8, as players show it: upright, in square pixels, in the size of the whole video, on white."""
        if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            image = Image.fromarray(frame.to_ndarray(format="rgba"))
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(image.convert("RGB"))
        else:
            pixels = frame.to_ndarray(format="rgb24")
        if (frame.width, frame.height) != self.size:
            pixels = resize(pixels, self.size, (0, 0, frame.width, frame.height))
        return _upright(pixels, frame)

    def times(self) -> list[float]:
        """When each of the pictures that follow is shown, in order, and at last when the last of them ends."""
        stamps: list[Any] = []
        duration = 0  # of the last packet
        for packet in self.container.demux(self.stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.dts if self.is_avi else packet.pts)
                duration = packet.duration or 0
        if not stamps:
            return []
        step = duration * self.tick or 1 / self.rate
        if not self.has_times or None in stamps:
            return [index * step for index in range(len(stamps) + 1)]
        times = sorted(map(self.seconds, stamps))
        return [*times, times[-1] + step]

    def length(self) -> float:
        """Seconds of pictures, whatever the length of the sound."""
        if self.can_seek and self.stream.duration:
            return self.stream.duration * self.tick
        if self.can_seek:
            with suppress(av.FFmpegError):
                self._go_to(FAR)
                if times := self.times():
                    return times[-1]
            self.rewind()
        if not (times := self.times()):
            raise ValueError("it has no pictures")
        return times[-1]


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turned and mirrored as players do: telephones store videos as the sensor lies."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    if a * d == b * c:  # nothing that can be shown
        return pixels
    return np.rot90(pixels[::-1] if a * d < b * c else pixels, round(frame.rotation / 90))


@contextmanager
def _open_video(source: Source, name: str | None) -> Iterator[Video]:
    with errors_name(name or describe(source), "video"):
        video = Video(source)
        with closing(video):
            yield video


def load_clip(
    source: Source, start: float, num_frames: int, fps: float | None = None, name: str | None = None
) -> np.ndarray:
    """`num_frames` frames (T, H, W, 3) uint8 from second `start` on, counted from the first frame.

    Frame k is the one that players show at second `start` + k / `fps`, so that an `fps` above the video's rate repeats
    frames; with `fps` `None`, every frame from the one shown at `start` on. Decodes from the key frame before `start`
    on, not from the beginning. Frames are upright, in square pixels, on white where they are transparent, and all of
    the size that the file tells.

    Raises:
        ValueError: "name: reason", if it is no video or ends too early.
    """
    with _open_video(source, name) as video:
        pictures = video.clip(start, num_frames, fps)
    if len(pictures) < num_frames:
        raise ValueError(
            f"{name or describe(source)}: has {len(pictures)} frames from {start:.2f} s on at fps={fps}, but needs "
            f"{num_frames}."
        )
    return np.stack(pictures)


def load_random_clip(
    source: Source, num_frames: int, fps: float | None, rng: np.random.Generator, name: str | None = None
) -> np.ndarray:
    """What `load_clip` gives from a random second on, such that the clip fits.

    Raises:
        ValueError: "name: reason", if it is no video or too short.
    """
    seconds, rate = probe_video(source, name)
    latest = seconds - (num_frames - 1) / (fps or rate) - 2 * MAX_TOLERANCE
    start = rng.uniform(0.0, max(0.0, latest))
    with _open_video(source, name) as video:
        pictures = video.clip(start, num_frames, fps)
        if len(pictures) < num_frames and start > 0.0:  # the header is wrong, or the rate varies
            video.rewind()
            *times, end = video.times() or [0.0, 0.0]
            last = times[-num_frames:][:1]  # every frame from this one on is a clip
            latest = end - (num_frames - 1) / fps - 2 * MAX_TOLERANCE if fps else max(last, default=0.0)
            start = rng.uniform(0.0, max(0.0, latest))
    if len(pictures) == num_frames:
        return np.stack(pictures)
    return load_clip(source, start, num_frames, fps, name)


def iterate_timed_frames(source: Source, name: str | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame of a video and the second at which it is first shown, decoded as it is asked for.

    Raises:
        ValueError: "name: reason", if it is no video or breaks off.
    """
    with _open_video(source, name) as video:
        for second, _, frame in video.frames_from(0.0):
            yield second, np.ascontiguousarray(video.picture(frame))


def probe_rate(source: Source, name: str | None = None) -> float:
    """Frames a second, as the container tells them, without decoding.

    Raises:
        ValueError: "name: reason", if it is no video.
    """
    with _open_video(source, name) as video:
        return video.rate


def probe_video(source: Source, name: str | None = None) -> tuple[float, float]:
    """Length in seconds of the pictures and frames a second, without decoding.

    Files that do not tell their length, as those that browsers record, are read once in a process.

    Raises:
        ValueError: "name: reason", if it is no video.
    """
    if isinstance(source, str | Path) and os.path.isfile(source):
        stat = os.stat(source)
        return _probe_file(source, name, stat.st_size, stat.st_mtime_ns)
    return _probe(source, name)


def _probe(source: Source, name: str | None) -> tuple[float, float]:
    with _open_video(source, name) as video:
        return video.length(), video.rate


@lru_cache(maxsize=2**16)
def _probe_file(path: str | Path, name: str | None, size: int, changed: int) -> tuple[float, float]:
    return _probe(path, name)
