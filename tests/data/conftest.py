from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vitok_hf.data.batches import Batch, DrawnBatches
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.loader import SourceSettings, make_dataset
from vitok_hf.data.views import CropView, NativeView


def write_video(path: Path, **options: str) -> None:
    """50 frames at 25 a second; frame i has brightness 5 i. `options` of the encoder."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"} | options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(50):
            picture = np.full((48, 64, 3), 5 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "ramp.mp4"
    write_video(path)
    return path


def write_noise(folder: Path, count: int, size: tuple[int, int] = (40, 32)) -> list[Path]:
    """Pictures of (width, height) `size` that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    paths = [folder / f"{index:03d}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def folder(tmp_path):
    """Three classes of 6, 3 and 2 pictures, which all differ."""
    for name, count in (("dog", 6), ("cat", 3), ("flag", 2)):
        write_noise(tmp_path / "data" / name, count)
    return tmp_path / "data"


@pytest.fixture
def files(folder):
    return LabelledFiles([folder])


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert len(ours.pixels) == len(theirs.pixels)
    assert all(torch.equal(x, y) for x, y in zip(ours.pixels, theirs.pixels))
    assert ours.skipped == theirs.skipped and ours.position == theirs.position
    assert (ours.labels is None) is (theirs.labels is None)
    assert ours.labels is None or torch.equal(ours.labels, theirs.labels)


def cut(view: CropView | NativeView, *sources: object, seed: int = 0) -> DrawnBatches:
    """Batches of a view from files and folders."""
    return make_dataset(view, SourceSettings(list(map(str, sources))), seed)
