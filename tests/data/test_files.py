import logging
import os
import pickle
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.conftest import write_noise
from vitok_hf.data import classes, files, sources
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.files import FileList, list_files, printable, read_each, short_names
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.items import Clip
from vitok_hf.data.media import load_image
from vitok_hf.data.sources import FolderFiles, MixedSources, parse_source
from vitok_hf.data.video import load_clip, probe_rate, probe_video
from vitok_hf.evaluation.visuals import VideoWriter
from vitok_hf.training.publishing import last_folder


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def listed(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in list_files(folder)]


class TestLists:
    def test_list(self, tmp_path):
        for name in ("b/two.JPG", "a/one.png", "notes.txt", "film.mp4"):
            touch(tmp_path, name)
        assert [file.name for file in list_files(tmp_path)] == ["one.png", "two.JPG", "film.mp4"]
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no file"):
            list_files(tmp_path / "empty")
        with pytest.raises(ValueError, match="does not exist"):
            list_files(tmp_path / "missing")

    def test_order_is_that_of_paths(self, tmp_path):
        touch(
            tmp_path, "a/z.png", "a.png", "a-b/c.png", "a/b/c.png", "B.png", "a b/x.png", "ä.png", "a!.png", "a/b.png"
        )
        assert list_files(tmp_path) == sorted(tmp_path.rglob("*.png"))

    def test_endings(self, tmp_path):
        names = "a.tif a.TIFF a.gif a.jfif a.avif a.jpe a.jp2 a.ppm a.pgm a.apng a.bmp a.webp a.JPEG a.png".split()
        assert listed(touch(tmp_path, *names, "a.txt", "a.json")) == sorted(names)

    def test_what_is_left_out_is_told_once(self, tmp_path, caplog):
        touch(tmp_path, "a.jpg", "b.HEIC", "c/d.heic", "c/e.nef", "notes.txt", "._f.heic")
        assert listed(tmp_path) == ["a.jpg"]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "2 .heic, 1 .nef" in record.message
        caplog.clear()
        list_files(touch(tmp_path / "plain", "a.jpg", "notes.txt", "captions.json"))
        assert not caplog.records

    def test_folders_that_end_like_files(self, tmp_path):
        for name in ("cats.jpg", "film.mp4"):
            write_noise(tmp_path / name, 1, (16, 16))
        assert listed(tmp_path) == ["cats.jpg/000.png", "film.mp4/000.png"]
        assert load_evaluation_images(tmp_path, 16, 2).shape == (2, 3, 1, 16, 16)
        assert LabelledFiles([tmp_path]).classes == ["cats.jpg", "film.mp4"]

    def test_hidden_files_and_folders(self, tmp_path):
        hidden = "._x.jpg .x.jpg __MACOSX/cat/._x.jpg __MACOSX/x.jpg cat/.ipynb_checkpoints/x.jpg @eaDir/x.jpg".split()
        folder = touch(tmp_path / ".cache" / "data", *hidden, "$RECYCLE.BIN/x.jpg", "lost+found/x.jpg", "cat/x.jpg")
        assert listed(folder) == ["cat/x.jpg"]
        assert LabelledFiles([folder]).classes == ["cat"]
        assert list_files(folder / ".x.jpg") == [folder / ".x.jpg"]  # as it is asked for

    def test_nothing_is_asked_of_each_file(self, tmp_path, monkeypatch):
        touch(tmp_path, *(f"{index % 3}/{index}.png" for index in range(300)))
        asked = []
        for name in ("stat", "lstat"):
            ask = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda path, *args, ask=ask, **kw: asked.append(path) or ask(path, *args, **kw)
            )
        assert len(list_files(tmp_path)) == 300 and len(asked) < 100

    def test_folders_that_must_not_be_opened_are_named(self, tmp_path, monkeypatch, caplog):
        touch(tmp_path, "a/x.png", "secret/x.png")

        def scandir(folder: str):
            if folder.endswith("secret"):
                raise PermissionError(13, "Permission denied", folder)
            return scan(folder)

        scan = os.scandir
        monkeypatch.setattr(os, "scandir", scandir)
        assert listed(tmp_path) == ["a/x.png"] and "secret" in caplog.text


class TestLinks:
    def test_linked_class_folders_are_classes(self, tmp_path):
        write_noise(tmp_path / "store" / "17", 2, (16, 16))
        write_noise(tmp_path / "data" / "dog", 1, (16, 16))
        (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "17")
        data = LabelledFiles([tmp_path / "data"])
        assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 1]
        assert listed(tmp_path / "data") == ["cat/000.png", "cat/001.png", "dog/000.png"]

    def test_endless_links_end(self, tmp_path):
        data = touch(tmp_path / "data", "cat/x.png", "dog/y.png")
        touch(tmp_path / "other", "z.png")
        (data / "all").symlink_to(data)
        (data / "cat" / "up").symlink_to("..")
        (data / "out").symlink_to(tmp_path / "other")
        (tmp_path / "other" / "back").symlink_to(data)
        (data / "self").symlink_to("self")
        (data / "self.png").symlink_to("self.png")
        (data / "up").symlink_to(tmp_path)
        assert listed(data) == ["cat/x.png", "dog/y.png", "out/z.png", "self.png"]

    def test_a_link_to_what_is_there_anyway_adds_nothing(self, tmp_path):
        data = touch(tmp_path / "data", "cat/x.png", "cat/.blob.png", "dog/y.png")
        (data / "a_cat").symlink_to("cat")  # comes first, but the folder keeps its own name
        (data / "dog" / "x.png").symlink_to("../cat/x.png")
        (data / "dog" / "w.png").symlink_to("../a_cat/x.png")
        (data / "dog" / "hidden.png").symlink_to("../cat/.blob.png")  # else it would be nowhere
        assert listed(data) == ["cat/x.png", "dog/hidden.png", "dog/y.png"]

    def test_a_folder_linked_twice_counts_once(self, tmp_path):
        touch(tmp_path / "store", "x.png", "sub/y.png")
        data = touch(tmp_path / "data", "z.png")
        (data / "b").symlink_to(tmp_path / "store")
        (data / "a").symlink_to(tmp_path / "store")
        assert listed(data) == ["a/sub/y.png", "a/x.png", "z.png"]

    def test_broken_links_fail_where_they_are_read(self, tmp_path):
        (tmp_path / "x.png").symlink_to("nowhere.png")
        assert listed(tmp_path) == ["x.png"]
        with pytest.raises(ValueError, match="x.png: cannot be read as a picture .*FileNotFoundError"):
            load_evaluation_images(tmp_path, 16, 1)


ODD = "a:b 100% %03d x#1 what? -v [1] {0..2} http: pipe:1 concat:a \udcff ü".split() + ["two\nlines", "a b"]


class TestOddNames:
    @pytest.mark.parametrize("name", ODD)
    def test_pictures(self, tmp_path, monkeypatch, name):
        picture = write_noise(tmp_path / "plain", 1, (16, 16))[0]
        monkeypatch.chdir(tmp_path)
        Path(name).mkdir()
        Path(name, f"{name}.png").write_bytes(picture.read_bytes())
        (item,) = FolderFiles(name)
        assert item.source == Path(name, f"{name}.png")
        assert np.array_equal(load_image(item.source, item.name), load_image(picture))
        assert np.array_equal(load_image(f"{name}/{name}.png"), load_image(picture))
        assert LabelledFiles([name]).classes == [printable(name)] == short_names([name])
        assert printable(name).encode()

    @pytest.mark.parametrize("name", ODD)
    def test_videos(self, tmp_path, monkeypatch, video, name):
        monkeypatch.chdir(tmp_path)
        Path(name).mkdir()
        Path(name, f"{name}.mp4").write_bytes(video.read_bytes())
        Path(f"{name}.mp4").write_bytes(video.read_bytes())
        (item,) = FolderFiles(name, Clip(2))
        for source in (item.source, f"{name}.mp4", tmp_path / f"{name}.mp4"):
            assert probe_rate(source) == 25.0 and load_clip(source, 0.4, 1).mean() / 5 == pytest.approx(10, abs=0.5)
            assert probe_video(source)[0] == pytest.approx(2.0, abs=0.05)

    def test_addresses_that_are_folders(self, tmp_path, monkeypatch):
        write_noise(tmp_path / "memory:", 1, (16, 16))
        monkeypatch.chdir(tmp_path)
        assert load_image("memory://000.png").shape == (16, 16, 3)

    def test_written_videos(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with VideoWriter("a:b%03d.mp4", Fraction(25)) as writer:
            writer.write(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
        assert probe_rate("a:b%03d.mp4") == 25.0

    def test_weights_are_told_by_what_there_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert parse_source("a:0.5") == ("a", 0.5)
        touch(tmp_path, "a:0.5/x.png", "a/x.png")
        assert parse_source("a:0.5") == ("a:0.5", None) and parse_source("a:0.5:2") == ("a:0.5", 2.0)
        assert parse_source("a:nan") == ("a:nan", None) and parse_source("a:inf") == ("a:inf", None)
        assert [item.source for item in MixedSources(["a:0.5"])] == [Path("a:0.5/x.png")]
        assert last_folder("a:0.5") == "a:0.5"


@pytest.mark.parametrize(
    "paths, names",
    [
        ([], []),
        (["data/test/film", "photos/"], ["film", "photos"]),
        (["a/emoji/test", "a/film/test", "photos"], ["emoji-test", "film-test", "a-photos"]),
        (["a/film", "a/film/", "b"], ["film", "film", "b"]),
        (["film/test/..", "."], ["film", "a"]),
    ],
)
def test_short_names(paths, names, monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert short_names(paths) == names


class TestCompactLists:
    NAMES = [f"/data/imagenet/train/n{index % 1000:08d}/n{index % 1000:08d}_{index}.JPEG" for index in range(200_000)]

    def test_is_a_sequence_of_paths(self):
        names = ["a/x.png", "b/\udcff.png", "b/ü.png"]
        paths = FileList(names)
        assert list(paths) == list(map(Path, names)) and paths[-1] == Path("b/ü.png")
        assert paths[np.int64(1)] == Path(names[1]) and list(pickle.loads(pickle.dumps(paths))) == list(paths)
        with pytest.raises(IndexError):
            paths[3]

    @pytest.mark.parametrize("make", [lambda: FolderFiles("/data"), lambda: LabelledFiles(["/data"])])
    def test_memory_of_each_file(self, monkeypatch, make):
        """Its path, 8 bytes for where it ends, and 8 for a label."""
        for module in (files, sources, classes):
            monkeypatch.setattr(module, "iterate_files", lambda *_: iter(self.NAMES), raising=False)
        monkeypatch.setattr(files, "list_files", lambda *_: list(map(Path, self.NAMES)))
        make()  # what is loaded and cached once
        tracemalloc.start()
        data = make()
        held = tracemalloc.get_traced_memory()[0] / len(data)
        tracemalloc.stop()
        path = np.mean([len(name) for name in self.NAMES])
        assert held < path + 20 and len(pickle.dumps(data)) / len(data) < path + 20
        assert len(data) == 200_000 and data[123_456].source == Path(self.NAMES[123_456])


def test_reading_goes_on_after_what_cannot_be_read(tmp_path):
    paths = write_noise(tmp_path, 3, (16, 16))
    paths[1].write_bytes(b"")
    seen = []
    reasons = read_each(paths, lambda path: seen.append(load_image(path)))
    assert len(seen) == 2 and len(reasons) == 1 and reasons[0].startswith(f"{paths[1]}: cannot be read as a picture")

    def fail(_: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError):
        read_each(paths, fail)
