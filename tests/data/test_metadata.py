"""Captions and JSON beside pictures, in caches of latents."""

import pytest

from tests.data.conftest import write_noise
from tests.data.test_latent_cache import state, write
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.latent_cache import LatentCache


@pytest.fixture
def pictures(tmp_path):
    paths = write_noise(tmp_path / "data" / "a", 5)
    paths[1].with_suffix(".txt").write_text("a grüne Wiese\n", encoding="utf-8")
    paths[3].with_suffix(".json").write_text('{"caption": "b", "size": [4, 2.5]}')
    return paths


def labelled(paths) -> LabelledFiles:
    return LabelledFiles([str(paths[0].parents[1])])


def test_it_goes_along(pictures, tmp_path):
    pictures[0].write_bytes(b"broken")  # is left out
    write(labelled(pictures), tmp_path / "cache", shard_size=3)
    cache = LatentCache(tmp_path / "cache")
    expected = [{"caption": "a grüne Wiese"}, {}, {"caption": "b", "size": [4, 2.5]}, {}]
    assert [cache.metadata(index) for index in range(len(cache))] == expected


def test_without_any_there_is_nothing(tmp_path):
    paths = write_noise(tmp_path / "data" / "a", 2)
    write(labelled(paths), tmp_path / "cache")
    assert LatentCache(tmp_path / "cache").metadata(1) == {}


def test_changed_captions_are_written(pictures, tmp_path):
    write(labelled(pictures), tmp_path / "cache", shard_size=3)
    before = state(tmp_path / "cache")
    pictures[4].with_suffix(".txt").write_text("new")
    write(labelled(pictures), tmp_path / "cache", shard_size=3)
    after = state(tmp_path / "cache")
    assert LatentCache(tmp_path / "cache").metadata(4) == {"caption": "new"}
    assert {name for name in before if before[name] != after[name]} == {"index.json", "latents-00001.safetensors"}


def test_captions_that_are_no_text(pictures, tmp_path):
    pictures[2].with_suffix(".txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"002.txt\" is no text in UTF-8"):
        write(labelled(pictures), tmp_path / "cache")


def test_json_that_is_no_object(pictures, tmp_path):
    pictures[2].with_suffix(".json").write_text("[1]")
    with pytest.raises(ValueError, match=r"002.json\" must hold a JSON object, but holds \[1\]"):
        write(labelled(pictures), tmp_path / "cache")
