"""The sound of a video, put beside new pictures in an mp4 file."""

import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from io import BytesIO
from itertools import chain
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import OutputContainer

from ..data.video import Video


logger = logging.getLogger(__name__)

RATE = 48000  # samples a second, of what has a rate that AAC has not


def _in_mp4(sound: AudioStream, first: av.Packet) -> bool:
    """Whether mp4 holds it as it is: tried, for that depends on more than the codec."""
    try:
        with av.open(BytesIO(), "w", format="mp4") as trial:
            first.stream = trial.add_stream_from_template(sound)
            trial.mux(first)
        return True
    except (ValueError, av.FFmpegError):
        return False


def _encode(packets: Iterable[av.Packet], encoded: AudioStream) -> Iterator[av.Packet]:
    for packet in packets:
        with suppress(av.FFmpegError):  # a damaged packet is left out, as players do
            for frame in packet.decode():
                yield from encoded.encode(frame)
    yield from encoded.encode()


def _read(video: Video, sound: AudioStream) -> Iterator[av.Packet]:
    """Its packets, with times since the first picture; the last one is empty, and makes a decoder give the rest."""
    for packet in video.container.demux(sound):
        if packet.dts is not None:
            shift = round(video.origin / packet.time_base)
            packet.pts = (packet.dts if packet.pts is None else packet.pts) - shift
            packet.dts -= shift
        yield packet


def _copy(video: Video, sound: AudioStream, output: OutputContainer) -> Iterator[float]:
    packets = _read(video, sound)
    first = next(packets)
    if first.dts is None:  # there are none
        return
    if is_copied := _in_mp4(sound, first):
        target = output.add_stream_from_template(sound)
    else:
        rate = sound.rate if sound.rate in (av.Codec("aac", "w").audio_rates or ()) else RATE
        target = output.add_stream("aac", rate, layout="mono" if sound.channels == 1 else "stereo")
    first.stream, packets = sound, chain([first], packets)
    for packet in packets if is_copied else _encode(packets, target):
        if packet.dts is not None:
            yield float(packet.dts * packet.time_base)
            packet.stream = target
            output.mux(packet)


def copy_sound(source: Path | None, output: OutputContainer) -> Generator[float, None, None]:
    """Copies the packets of a file's sound, or encodes it as AAC if mp4 cannot hold these, of one or two channels.

    Times stay as they are in the file, counted from the first picture.

    Adds the stream, if there is sound, when it is asked for the first time, which must be before anything is written.
    What cannot be read is missing, and a warning says so.

    Yields:
        The second, since the first picture, of each packet, before it is written.
    """
    second = 0.0
    if source is None:
        return
    try:
        with closing(Video(source)) as video:
            sound = video.container.streams.best("audio", related=video.stream)
            if sound is not None:
                for second in _copy(video, sound, output):
                    yield second
    except Exception as error:  # of broken files, PyAV raises a dozen types
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%s: its sound cannot be read from second %.1f on (%s).", source, max(second, 0.0), reason)
