import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from tests.conftest import make_vae
from vitok_hf.data.video import iterate_timed_frames
from vitok_hf.evaluation import sound as sound_module
from vitok_hf.evaluation.reconstruct_files import reconstruct_file
from vitok_hf.evaluation.visuals import VideoWriter


RATE = 48000


def write_film(
    path, codec: str, rate: int = RATE, start: Fraction = Fraction(0), late: Fraction = Fraction(0)
) -> None:
    """Two seconds of black pictures from second `start` on, and of a tone that begins `late` seconds later."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 24, 16, "yuv420p"
        sound = container.add_stream(codec, rate=rate, layout="stereo")
        wave = (np.sin(np.arange(2 * rate) * 2 * np.pi * 440 / rate) * 8000).astype(np.int16)
        for index in range(16):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 24, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = int((start + Fraction(index, 8)) * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
            part = wave[index * rate // 8 : (index + 1) * rate // 8].repeat(2)[None]  # interleaved
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="stereo")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = index * rate // 8 + int((start + late) * rate)
            container.mux(sound.encode(frame))
        container.mux(video.encode())
        container.mux(sound.encode())


def packets_of(path) -> list[tuple[float, bytes]]:
    """Of the sound, with their times since the first picture."""
    with av.open(str(path)) as container:
        (sound,), video = container.streams.audio, container.streams.video[0]
        origin = video.start_time * video.time_base
        packets = [packet for packet in container.demux(sound) if packet.size]
        return [(float(x.pts * x.time_base - origin), bytes(x)) for x in packets]


def waves_of(path) -> tuple[np.ndarray, float]:
    """Samples of the sound between -1 and 1, of one channel, and the second at which it begins."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    samples = np.concatenate([x.to_ndarray()[0] for x in frames])
    return samples, frames[0].time


def copy(source, target) -> None:
    with VideoWriter(target, Fraction(8), source) as writer:
        for index in range(4):
            writer.write(torch.zeros(4, 16, 24, 3, dtype=torch.uint8), [(4 * index + k) / 8 for k in range(4)])


@pytest.mark.parametrize(
    "name, codec, start, late",
    [
        ("x.mp4", "aac", 0, 0),
        ("x.mkv", "aac", 3, Fraction(1, 4)),
        ("x.mkv", "libopus", 0, Fraction(1, 2)),
        ("x.avi", "libmp3lame", 0, 0),
        ("x.mkv", "flac", 0, 0),
        ("x.mpg", "mp2", 0, 0),
    ],
)
def test_packets_are_copied_at_their_times(tmp_path, name, codec, start, late):
    write_film(tmp_path / name, codec, start=Fraction(start), late=Fraction(late))
    copy(tmp_path / name, tmp_path / "y.mp4")
    expected, packets = packets_of(tmp_path / name), packets_of(tmp_path / "y.mp4")
    assert [data for _, data in packets] == [data for _, data in expected]
    times = [second for second, _ in expected]
    assert [second for second, _ in packets] == pytest.approx(times, abs=1.1e-3)  # Matroska has milliseconds
    assert times[0] == pytest.approx(float(late), abs=0.05)
    assert len(list(iterate_timed_frames(tmp_path / "y.mp4"))) == 16


def test_reconstructions_and_comparisons_have_the_sound(tmp_path):
    write_film(tmp_path / "x.mp4", "aac")
    reconstruct_file(make_vae("causal"), tmp_path / "x.mp4", str(tmp_path / "y"))
    for name in ("reconstruction", "comparison"):
        ours, theirs = packets_of(tmp_path / f"y_{name}.mp4"), packets_of(tmp_path / "x.mp4")
        assert [data for _, data in ours] == [data for _, data in theirs]
        assert len(list(iterate_timed_frames(tmp_path / f"y_{name}.mp4"))) == 16


@pytest.mark.parametrize("name, codec, rate, late", [("x.avi", "adpcm_ms", 44100, 0), ("x.mkv", "pcm_u8", 6000, 0.25)])
def test_what_mp4_cannot_hold_is_encoded(tmp_path, name, codec, rate, late):
    write_film(tmp_path / name, codec, rate, late=Fraction(late))
    copy(tmp_path / name, tmp_path / "y.mp4")
    samples, start = waves_of(tmp_path / "y.mp4")
    with av.open(str(tmp_path / "y.mp4")) as container:
        sound = container.streams.audio[0]
        ours = sound.rate
        assert sound.codec_context.name == "aac"
    assert start == pytest.approx(late, abs=0.06) and len(samples) / ours == pytest.approx(2.0, abs=0.15)
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() / len(samples) * ours == pytest.approx(440, abs=2)
    assert np.abs(samples).max() == pytest.approx(8000 / 2**15, rel=0.25)


def test_videos_without_sound_stay_so(tmp_path, caplog):
    copy(None, tmp_path / "x.mp4")
    copy(tmp_path / "x.mp4", tmp_path / "y.mp4")
    with av.open(str(tmp_path / "y.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
    assert not caplog.records


def test_the_picture_outlives_the_sound(tmp_path, caplog):
    write_film(tmp_path / "x.mkv", "aac")
    (tmp_path / "broken.mkv").write_bytes((tmp_path / "x.mkv").read_bytes()[:200])
    copy(tmp_path / "broken.mkv", tmp_path / "y.mp4")
    assert len(list(iterate_timed_frames(tmp_path / "y.mp4"))) == 16
    assert "broken.mkv: its sound cannot be read from second 0.0 on" in caplog.text


def test_sound_that_breaks_off(tmp_path, caplog, monkeypatch):
    write_film(tmp_path / "x.mp4", "aac")

    def read(video, sound):
        yield from itertools.islice(video.container.demux(sound), 40)
        raise av.InvalidDataError(1, "broken")

    monkeypatch.setattr(sound_module, "_read", read)
    copy(tmp_path / "x.mp4", tmp_path / "y.mp4")
    assert len(packets_of(tmp_path / "y.mp4")) == 40 and len(list(iterate_timed_frames(tmp_path / "y.mp4"))) == 16
    assert "its sound cannot be read from second 0.8 on (InvalidDataError" in caplog.text
