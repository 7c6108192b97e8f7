import io
import json
import sys
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ASSETS
from tests.data.conftest import assert_same, write_noise
from vitok_hf.data import sources
from vitok_hf.data.batches import DrawnBatches, StreamBatches
from vitok_hf.data.items import Clip, Item
from vitok_hf.data.loader import BatchLoader, SourceSettings, make_dataset
from vitok_hf.data.media import load_image
from vitok_hf.data.sources import DecodedPictures, FolderFiles, HubRows, HubStream, MixedSources, TarStream
from vitok_hf.data.views import CropView, NativeView


VIEW = CropView([(16, 16, 1.0), (8, 32, 1.0)], 4 * 256)


@pytest.fixture(autouse=True)
def local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """24 files; number 9 is broken."""
    paths = write_noise(tmp_path_factory.mktemp("pictures"), 24)
    paths[9].write_bytes(paths[9].read_bytes()[:200])
    return paths


def write_parquet(folder: Path, files: list[Path], shards: int, column: str = "image") -> str:
    kind = datasets.Image(decode=False) if column == "image" else datasets.Video(decode=False)
    folder.mkdir()
    for shard in range(shards):
        rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files[shard::shards]]
        columns = {column: rows, "label": list(range(len(rows)))}
        features = datasets.Features({column: kind, "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")
    return str(folder)


def write_tars(folder: Path, files: list[Path], shards: int) -> str:
    """Samples of a json and a picture each; the pattern that names the shards."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for file in files[shard::shards]:
                for name, content in ((f"{file.stem}.json", b"{}"), (file.name, file.read_bytes())):
                    member = tarfile.TarInfo(f"set/{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder}/{{00..{shards - 1:02d}}}.tar"


@pytest.fixture(scope="module")
def parquet(pictures, tmp_path_factory) -> str:
    return write_parquet(tmp_path_factory.mktemp("hub") / "parquet", pictures, 3)


@pytest.fixture(scope="module")
def tars(pictures, tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("wds") / "tars", pictures, 3)


def all_items(stream) -> list:
    return [item for shard in range(stream.num_shards) for item in stream.items(shard)]


class TestFolders:
    @pytest.mark.parametrize(
        "weights, shares", [(("", ""), (4, 1)), (("", ":0.5"), (2, 1)), ((":3", ""), (3, 1)), ((":1", ":9"), (1, 9))]
    )
    def test_weights(self, weights, shares):
        mixed = MixedSources([f"{path}{weight}" for path, weight in zip((ASSETS, ASSETS / "coffee.png"), weights)])
        rng, whole = np.random.default_rng(0), sum(shares)
        places = np.array([mixed.draw(rng).place for _ in range(4000)])
        assert (places == 4).mean() == pytest.approx(shares[1] / whole, abs=0.03)
        assert set(places.tolist()) == set(range(5))  # and alike inside of a source
        assert np.bincount(places)[:4].min() > 0.8 * np.bincount(places)[:4].max()

    def test_items(self):
        mixed, files = MixedSources([str(ASSETS / "coffee.png"), FolderFiles(ASSETS)]), FolderFiles(ASSETS)
        assert len(mixed) == 5 and [mixed[index] for index in range(1, 5)] == list(files)
        assert mixed[0].source == ASSETS / "coffee.png"

    @pytest.mark.parametrize("paths", [[f"{ASSETS}:0"], [f"{ASSETS}:1", f"{ASSETS}:-1"], []])
    def test_weights_that_make_no_distribution(self, paths):
        with pytest.raises(ValueError, match="must not be negative nor all 0"):
            MixedSources(paths)

    def test_decoded_pictures_are_bounded(self, video, tmp_path):
        items = [*(Item(str(file), file) for file in write_noise(tmp_path, 4, (10, 10))), Item("x", video, True)]
        decoded = DecodedPictures(items, 2 * 300)  # bytes of two pictures
        assert len(decoded) == 5 and decoded[4] == items[4] and not decoded.kept
        for index, kept in ((0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (0, [2, 0]), (3, [0, 3])):
            assert np.array_equal(decoded[index].pixels, load_image(items[index].source))
            assert [*decoded.kept] == kept and decoded.num_bytes == 300 * len(kept)
        assert decoded[3] is decoded[3] and len(DecodedPictures(items, 0)[0].pixels) == 10


class TestEverySource:
    @pytest.fixture(params=["folder", "rows", "hub stream", "tars"])
    def make(self, request, pictures, parquet, tars):
        arguments = {
            "folder": {"train_data_dir": [str(pictures[0].parent)]},
            "rows": {"dataset_name": parquet},
            "hub stream": {"dataset_name": parquet, "streaming": True, "shuffle_buffer": 5},
            "tars": {"train_shards": [tars], "shuffle_buffer": 5},
        }
        return lambda view=VIEW: make_dataset(view, SourceSettings(**arguments[request.param]))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resumes_exactly(self, make, num_workers):
        straight = list(islice(BatchLoader(make(), num_workers), 12))
        loader = BatchLoader(make(), num_workers)
        list(islice(loader, 5))
        resumed = BatchLoader(make(), num_workers)
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        for ours, theirs in zip(islice(resumed, 7), straight[5:], strict=True):
            assert_same(ours, theirs)
        reasons = {reason.split(": ")[0] for batch in straight for reason in batch.skipped}
        assert len(reasons) == 1 and reasons.pop().endswith("009.png")
        assert len({batch.pixels[0].numpy().tobytes() for batch in straight}) == 12

    def test_pictures_are_those_of_the_files(self, make, pictures):
        stored = {load_image(file).tobytes() for file in pictures if "009" not in file.name}
        batches = islice(BatchLoader(make(NativeView(9, 40 * 32, flip=False)), 0), 80)
        drawn = {x[:, 0].permute(1, 2, 0).numpy().tobytes() for batch in batches for run in batch.pixels for x in run}
        assert drawn <= stored and len(drawn) > 15


class TestHub:
    def test_rows(self, parquet, pictures):
        rows = HubRows(parquet)
        assert len(rows) == 24 and not rows[0].is_video
        assert rows[7].source == pictures[7 * 3].read_bytes()  # the first shard has every third file
        assert rows[np.int64(7)].name == f"{parquet}, row 7, 021.png"
        assert len(HubRows(parquet, split="train[:5]")) == 5

    def test_stream(self, parquet, pictures):
        stream = HubStream(parquet)
        assert stream.num_shards == 3
        assert [item.source for item in stream.items(1)] == [file.read_bytes() for file in pictures[1::3]]
        assert [item.name for item in stream.items(1)][7] == f"{parquet}, shard 1, row 7, 022.png"

    def test_workers_share_a_single_shard(self, pictures, tmp_path):
        name = write_parquet(tmp_path / "one", pictures[10:], 1)
        dataset = make_dataset(NativeView(1, 256, flip=False), SourceSettings(dataset_name=name, streaming=True))
        batches = islice(BatchLoader(dataset, 2), 14)
        assert len({batch.pixels[0].numpy().tobytes() for batch in batches}) == 14

    def test_streams_that_decode_in_threads_are_read_undecoded(self, parquet, pictures, monkeypatch):
        decoding = datasets.load_dataset(parquet, split="train", streaming=True).decode(num_threads=2)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: decoding)
        assert {item.source for item in all_items(HubStream(parquet))} == {file.read_bytes() for file in pictures}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_folders_of_pictures(self, pictures, tmp_path, streaming):
        for file in pictures[10:14]:
            (tmp_path / "data" / "train").mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / "train" / file.name).write_bytes(file.read_bytes())
        Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "data" / "train" / "transparent.png")
        places = SourceSettings(dataset_name=str(tmp_path / "data"), streaming=streaming)
        dataset = make_dataset(NativeView(4, 32 * 32), places)
        assert isinstance(dataset, StreamBatches if streaming else DrawnBatches)
        pixels = [x for batch in islice(BatchLoader(dataset, 0), 12) for run in batch.pixels for x in run]
        assert any((picture == 255).all() for picture in pixels)  # on white

    @pytest.mark.parametrize("streaming", [False, True])
    def test_videos(self, video, tmp_path, streaming):
        (tmp_path / "broken.mp4").write_bytes(b"")
        name = write_parquet(tmp_path / "clips", [video, tmp_path / "broken.mp4"] * 2, 1, column="video")
        clips = CropView([(8, 16, 1.0)], 4 * 4 * 128, Clip(4, 5.0))
        dataset = make_dataset(clips, SourceSettings(dataset_name=name, streaming=streaming))
        batch = next(iter(BatchLoader(dataset, 0)))
        assert batch.pixels[0].shape == (4, 3, 4, 8, 16) and "broken.mp4" in batch.skipped[0]
        frames = make_dataset(VIEW, SourceSettings(dataset_name=name, data_column="video", streaming=streaming))
        assert next(iter(BatchLoader(frames, 0))).pixels[0].shape[:3] == (4, 3, 1)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_without_a_picture(self, pictures, tmp_path, streaming):
        rows = [None, *({"bytes": file.read_bytes(), "path": None} for file in pictures[:3])]
        features = datasets.Features({"photo": datasets.Image(decode=False)})
        (tmp_path / "gaps").mkdir()
        datasets.Dataset.from_dict({"photo": rows}, features).to_parquet(tmp_path / "gaps" / "train.parquet")
        places = SourceSettings(dataset_name=str(tmp_path / "gaps"), data_column="photo", streaming=streaming)
        dataset = make_dataset(VIEW, places)
        reasons = {reason for batch in islice(BatchLoader(dataset, 0), 5) for reason in batch.skipped}
        assert (
            len(reasons) == 1 and "row 0: cannot be read as a picture (ValueError: it holds neither" in reasons.pop()
        )

    def test_broken_shards_are_named(self, parquet, pictures):
        stream = HubStream(parquet)
        file = Path(parquet) / "train-00001-of-00003.parquet"
        whole = file.read_bytes()
        try:
            file.write_bytes(whole[:-500])
            items = all_items(stream)
            assert len(items) == 17 and f"{parquet}, shard 1 after row 0" in [item.name for item in items]
            batches = list(islice(BatchLoader(StreamBatches(stream, VIEW), 0), 8))
        finally:
            file.write_bytes(whole)
        assert any("shard 1 after row 0: cannot be read" in reason for batch in batches for reason in batch.skipped)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_errors(self, parquet, streaming):
        with pytest.raises(ValueError, match='has no column "video": set `data_column` to one of image, label'):
            make_dataset(
                CropView([(8, 8, 1.0)], 64, Clip(2)), SourceSettings(dataset_name=parquet, streaming=streaming)
            )
        with pytest.raises(ValueError, match='has no column "photo"'):
            make_dataset(VIEW, SourceSettings(dataset_name=parquet, data_column="photo", streaming=streaming))

    def test_unknown_columns(self, tmp_path):
        (tmp_path / "lines").mkdir()
        (tmp_path / "lines" / "train.csv").write_text("image\na.png\n")
        with pytest.raises(ValueError, match="columns of .* are unknown before it is read: do not stream it"):
            HubStream(str(tmp_path / "lines"))


class TestTars:
    def test_shards(self, tars, pictures):
        stream = TarStream([tars])
        assert stream.num_shards == 3
        assert [item.source for item in stream.items(2)] == [file.read_bytes() for file in pictures[2::3]]
        assert next(stream.items(2)).name == f"{tars.split('{')[0]}02.tar/set/002.png"

    def test_the_first_picture_or_video_counts(self, tmp_path, video, pictures):
        for name, file in (("a.txt", pictures[0]), ("a.PNG", pictures[1]), ("a.mp4", video), ("b.json", pictures[0])):
            (tmp_path / name).write_bytes(file.read_bytes())
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name in ("a.txt", "a.PNG", "a.mp4", "b.json"):
                tar.add(tmp_path / name, name)
        path = str(tmp_path / "x.tar")
        pictures_of, clips_of = (list(TarStream([path], Clip(num_frames)).items(0)) for num_frames in (1, 4))
        assert (pictures_of[0].name, pictures_of[0].is_video) == (f"{path}/a.png", False)
        assert (clips_of[0].name, clips_of[0].is_video) == (f"{path}/a.mp4", True)
        assert pictures_of[1].name == f"{path}/b" and "no member ends in .apng, .avi," in str(pictures_of[1].source)

    def test_pictures_beside_clips(self, tmp_path, video, pictures):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, file in (("a.mp4", video), ("b.png", pictures[0])):
                tar.add(file, name)
        view = CropView([(16, 16, 1.0)], 6 * 4 * 256, Clip(4, with_pictures=True))
        dataset = make_dataset(view, SourceSettings(train_shards=[str(tmp_path / "x.tar")]))
        assert sorted(run.shape for run in next(iter(dataset)).pixels) == [(3, 3, 1, 16, 16), (3, 3, 4, 16, 16)]

    def test_hidden_members(self, tmp_path, pictures):
        """Of archives made by macOS, and by "tar -c .", whose names begin with a dot."""
        names = ["__MACOSX/a/x.png", "./__MACOSX/y.png", "a/._x.png", ".cache/z.png", "a/.ipynb_checkpoints/x.png"]
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, file in zip([*names, "./a/x.png", "a/y.TIF"], pictures):
                tar.add(file, name)
        path = str(tmp_path / "x.tar")
        items = list(TarStream([path]).items(0))
        assert [item.name for item in items] == [f"{path}/./a/x.png", f"{path}/a/y.tif"]
        assert [item.source for item in items] == [file.read_bytes() for file in pictures[5:7]]

    @pytest.mark.parametrize("name", ["a:b.tar", "{a,b}.tar", "x#1?.tar", "http:.tar"])
    def test_odd_names(self, tmp_path, monkeypatch, pictures, name):
        monkeypatch.chdir(tmp_path)
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(pictures[0], "x.png")
        (item,) = TarStream([name]).items(0)
        assert item == (f"{name}/x.png", pictures[0].read_bytes(), False)

    def test_broken_and_missing_tars(self, tmp_path, pictures):
        pattern = write_tars(tmp_path / "tars", pictures[10:22], 3)
        cut, missing = tmp_path / "tars" / "01.tar", tmp_path / "tars" / "02.tar"
        cut.write_bytes(cut.read_bytes()[:9000])
        missing.unlink()
        stream = TarStream([pattern])
        items = list(stream.items(1))
        kept = [item for item in items if isinstance(item.source, bytes)]
        assert [item.source for item in kept] == [file.read_bytes() for file in pictures[11 : 11 + 3 * len(kept) : 3]]
        assert 1 <= len(kept) < 4 and items[-1].name == str(cut)
        batches = list(islice(BatchLoader(StreamBatches(stream, VIEW), 0), 8))
        named = {reason.split(": ")[0] for batch in batches for reason in batch.skipped}
        assert {str(cut), str(missing)} <= named and {batch.num_items for batch in batches} == {4}
        reasons = "".join(reason for batch in batches for reason in batch.skipped)
        assert "ReadError" in reasons and "FileNotFoundError" in reasons

    def test_a_tar_is_read_on_after_a_name_that_comes_twice(self, tmp_path, pictures):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for file in (pictures[0], pictures[0], pictures[1]):
                tar.add(file, file.name)
        items = list(TarStream([str(tmp_path / "x.tar")]).items(0))
        assert [item.source for item in items[:2]] == [file.read_bytes() for file in pictures[:2]]
        assert len(items) == 3 and "duplicate file name" in str(items[2].source)


@pytest.mark.parametrize("package, make", [("datasets", HubRows), ("webdataset", lambda name: TarStream([name]))])
def test_packages_that_are_not_installed(monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f'"{package}": pip install "vitok-hf\\[train\\]"'):
        make("x")
    assert sources.import_optional("json") is json
