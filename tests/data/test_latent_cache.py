import json
import logging
import pickle
import runpy
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from tests.conftest import ASSETS, make_vae
from tests.data.conftest import write_noise, write_video
from tests.faults.state import held_lock
from vitok_hf import compute_latent_statistics
from vitok_hf.clips import to_float
from vitok_hf.data import latent_cache
from vitok_hf.data.batches import DrawnBatches
from vitok_hf.data.claims import RECORD
from vitok_hf.data.classes import ClassSampler, LabelledFiles
from vitok_hf.data.items import Choice, Clip
from vitok_hf.data.latent_cache import LatentCache, fingerprint, write_latents
from vitok_hf.data.loader import iterate_pixels
from vitok_hf.data.views import LatentView, SquareView
from vitok_hf.disk import checksum, seal
from vitok_hf.latents import summarize_latents


def draw(data, view, seed=0, **options):
    return DrawnBatches(data, ClassSampler(data.labels, data.classes, **options), view, seed)


def write(files, folder, vae=None, **overrides):
    options = {"resolution": 16, "batch_size": 2, "shard_size": 4, "dtype": torch.float32} | overrides
    return write_latents(vae or make_vae("v1"), "tiny", files, folder, **options)


def state(folder):
    """When each file was written, but that of the lock."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}


class TestCache:
    def test_equals_fresh_latents(self, files, tmp_path):
        """The same pictures in the same batches, in all classes and mirrored where they are."""
        vae = make_vae("v1")
        index = write(files, tmp_path / "cache", vae)
        assert index["num_shards"] == 3 and [shard["num_items"] for shard in index["shards"].values()] == [4, 4, 3]
        options = {"no_flip_classes": ["flag"], "class_balanced": True}
        cache = LatentCache(tmp_path / "cache")
        assert cache.labels.tolist() == files.labels.tolist() and cache.classes == files.classes
        cached, fresh = draw(cache, LatentView(8), **options), draw(files, SquareView(16, 8), **options)
        for number in range(3):
            ours, theirs = cached[number], fresh[number]
            posterior = vae.encode(to_float(theirs.pixels[0])).latent_dist
            assert torch.equal(ours.labels, theirs.labels)
            torch.testing.assert_close(ours.moments[:, 0], posterior.mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.moments[:, 1], posterior.std, rtol=1e-4, atol=1e-4)

    def test_half_precision(self, files, tmp_path):
        write(files, tmp_path / "whole", num_workers=1)
        write(files, tmp_path / "half", dtype=torch.float16, batch_size=3)
        whole, half = LatentCache(tmp_path / "whole"), LatentCache(tmp_path / "half")
        for index in range(11):
            ours, theirs = half[index], whole[index]
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
            assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)

    def test_draws_the_same_videos_as_without(self, tmp_path):
        """Mirrored alike; the clips are random without it."""
        for name in ("a", "b", "c", "d"):
            (tmp_path / "data" / name).mkdir(parents=True)
            write_video(tmp_path / "data" / name / "ramp.mp4")
        files = LabelledFiles([tmp_path / "data"], clip=Clip(4))
        write(files, tmp_path / "cache", make_vae("video"), fps=12.5)
        cache, choices = LatentCache(tmp_path / "cache"), []
        assert cache[0].shape == (2, 2, 4, 2, 2, 2)

        class Noted(ClassSampler):
            def __call__(self, rng):
                choices.append(super().__call__(rng))
                return choices[-1]

        sampler = Noted(files.labels, files.classes)
        cached = DrawnBatches(cache, sampler, LatentView(8), 3)[5]
        fresh = DrawnBatches(files, sampler, SquareView(16, 8, Clip(4, 12.5)), 3)[5]
        assert torch.equal(cached.labels, fresh.labels) and choices[:8] == choices[8:]
        assert all(torch.equal(x, cache[place][int(flip)]) for x, (place, flip, _) in zip(cached.moments, choices))
        assert len({int(clip[0, 0].float().mean()) for clip in fresh.pixels[0]}) > 4  # clips of four equal videos

    def test_resumes(self, files, tmp_path, monkeypatch):
        write(files, tmp_path / "whole")
        encode, calls = latent_cache.encode_shard, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return encode(*args)

        monkeypatch.setattr(latent_cache, "encode_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(files, tmp_path / "parts")
        with pytest.raises(ValueError, match="has 1 of 3 shards: run `vitok cache-latents` again"):
            LatentCache(tmp_path / "parts")
        before = state(tmp_path / "parts")
        write(files, tmp_path / "parts")
        assert len(calls) == 4  # the first shard was kept
        after = state(tmp_path / "parts")
        assert after["latents-00000.safetensors"] == before["latents-00000.safetensors"]
        assert sorted(after) == ["index.json", *(f"latents-0000{number}.safetensors" for number in range(3)), RECORD]
        whole, parts = LatentCache(tmp_path / "whole"), LatentCache(tmp_path / "parts")
        assert whole.index == parts.index
        assert all(torch.equal(whole[index], parts[index]) for index in range(11))

    def test_corrupted_shards(self, files, tmp_path):
        write(files, tmp_path / "cache")
        path = tmp_path / "cache" / "latents-00001.safetensors"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        for read in (LatentCache, partial(write, files)):
            with pytest.raises(ValueError, match='latents-00001.safetensors" has changed since it was written'):
                read(tmp_path / "cache")
        path.unlink()
        with pytest.raises(ValueError, match='latents-00001.safetensors" is missing: delete it and run `vitok'):
            LatentCache(tmp_path / "cache")
        write(files, tmp_path / "cache")
        assert path.read_bytes() == good and len(LatentCache(tmp_path / "cache")) == 11

    @pytest.mark.parametrize("damage", ["classes", "num_items", "vae", "cut"])
    def test_a_damaged_index(self, files, tmp_path, damage):
        index, path = write(files, tmp_path / "cache"), tmp_path / "cache" / "index.json"
        changes = {"classes": index["classes"][::-1], "vae": "other"}
        changes["shards"] = index["shards"] | {"1": index["shards"]["1"] | {"num_items": 3}}
        text = json.dumps(index | {damage: changes.get(damage)})
        path.write_text(text[:-9] if damage == "cut" else text)
        for read in (LatentCache, partial(write, files)):
            with pytest.raises(ValueError, match='index.json" (has changed since it was written|is no JSON file)'):
                read(tmp_path / "cache")
        path.unlink()
        assert write(files, tmp_path / "cache") == index

    @pytest.mark.parametrize(
        "changes",
        [{"labels": torch.tensor([0, 1, 2, 3])}, {"labels": torch.tensor([0])}, {"std": torch.zeros(4, 2, 4, 1, 1)}],
    )
    def test_shards_that_do_not_fit_the_index(self, files, tmp_path, changes):
        index, path = write(files, tmp_path / "cache"), tmp_path / "cache" / "latents-00001.safetensors"
        save_file(load_file(path) | changes, path)
        index["shards"]["1"]["sha256"] = checksum(path)
        (tmp_path / "cache" / "index.json").write_text(json.dumps(seal(index)))
        with pytest.raises(ValueError, match='latents-00001.safetensors" does not hold 4 latents of 3 classes'):
            LatentCache(tmp_path / "cache")

    def test_shards_elsewhere(self, files, tmp_path):
        index = write(files, tmp_path / "cache")
        for name in ("../x.safetensors", str(tmp_path / "x.safetensors")):
            index["shards"]["0"]["file"] = name
            (tmp_path / "cache" / "index.json").write_text(json.dumps(seal(index)))
            with pytest.raises(ValueError, match=f'"{name}" is no name for files in .*cache", for it leads out of it'):
                LatentCache(tmp_path / "cache")

    def test_two_writers(self, files, tmp_path):
        with (
            held_lock(tmp_path / "cache") as child,
            pytest.raises(ValueError, match=f'cache" is in use by process {child}'),
        ):
            write(files, tmp_path / "cache")

    def test_other_settings(self, files, tmp_path):
        write(files, tmp_path / "cache")
        with pytest.raises(
            ValueError, match="has results with resolution 16, not 32; dtype float32, not float16: name another"
        ):
            write(files, tmp_path / "cache", resolution=32, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"has results with vae_sha256 \w{64}, not \w{64}: name another"):
            write(files, tmp_path / "cache", make_vae("v1", qk_norm=True))
        with pytest.raises(ValueError, match="has no index.json: write it with `vitok cache-latents`"):
            LatentCache(tmp_path)

    @pytest.mark.parametrize(
        "setting, words",
        [
            ({"batch_size": 0}, "`batch_size` must be an integer from 1 to .* but is 0"),
            ({"shard_size": 0}, "`shard_size` must be an integer from 1 to .* but is 0"),
            ({"resolution": 0}, "`resolution` must be an integer from 1 to .* but is 0"),
            ({"resolution": 17}, "`resolution` 17 must be a multiple of the patch size, 8"),
        ],
    )
    def test_numbers_out_of_their_range_leave_no_folder(self, files, tmp_path, setting, words):
        with pytest.raises(ValueError, match=words):
            write(files, tmp_path / "cache", **setting)
        assert not (tmp_path / "cache").exists()

    def test_fingerprint(self):
        vae = make_vae("v1")
        same = make_vae("v1", latents_mean=[1.0] * 4).half().float()
        assert fingerprint(vae) == fingerprint(same)
        with torch.no_grad():
            same.encoder.transformer_blocks[0] = torch.compile(same.encoder.transformer_blocks[0])
            assert fingerprint(vae) == fingerprint(same)
            same.encoder = torch.compile(same.encoder)
            assert fingerprint(vae) == fingerprint(same)
            same.encoder.proj_out.weight[0] += 1.0
        assert fingerprint(vae) != fingerprint(same)

    def test_broken_files_are_left_out(self, files, folder, tmp_path, caplog):
        for path in (folder / "dog" / "001.png", folder / "flag" / "000.png", folder / "flag" / "001.png"):
            path.write_bytes(b"x")
        with caplog.at_level(logging.WARNING):
            index = write(files, tmp_path / "cache", shard_size=1)
        assert caplog.text.count("cannot be read as a picture") == 3
        assert sorted(number for shard in index["shards"].values() for number in shard["skipped"]) == [4, 9, 10]
        cache = LatentCache(tmp_path / "cache")
        assert np.bincount(cache.labels).tolist() == [3, 5] and cache[7].shape == (2, 2, 4, 1, 2, 2)
        assert write(files, tmp_path / "cache", shard_size=1) == index

    def test_what_failed_is_tried_again(self, files, folder, tmp_path, monkeypatch):
        """A file that could not be read, for a while or until it was mended; other shards stay as they are."""
        broken, good = folder / "dog" / "001.png", (folder / "dog" / "001.png").read_bytes()
        broken.write_bytes(b"x")
        assert write(files, tmp_path / "cache")["shards"]["1"]["num_items"] == 3
        before = state(tmp_path / "cache")
        write(files, tmp_path / "cache")
        assert state(tmp_path / "cache") == before  # it still cannot be read
        broken.write_bytes(good)
        index = write(files, tmp_path / "cache")
        assert index["shards"]["1"]["num_items"] == 4 and index["shards"]["1"]["skipped"] == []
        after = state(tmp_path / "cache")
        assert [name for name in sorted(after) if after[name] != before[name]] == [
            *("index.json", "latents-00001.safetensors", RECORD),
        ]
        write(files, tmp_path / "whole")
        whole, mended = LatentCache(tmp_path / "whole"), LatentCache(tmp_path / "cache")
        assert len(mended) == 11
        assert all(torch.equal(whole[index], mended[index]) for index in range(11))

        load = SquareView.load
        with monkeypatch.context() as patch:

            def fail_once(view, item, rng):
                if item.name.endswith("cat/000.png"):
                    raise ValueError("the disk is gone")
                return load(view, item, rng)

            patch.setattr(SquareView, "load", fail_once)
            assert write(files, tmp_path / "other")["shards"]["0"]["num_items"] == 3
        assert write(files, tmp_path / "other")["shards"] == LatentCache(tmp_path / "whole").index["shards"]

    def test_workers(self, files, tmp_path):
        """Each opens the files itself."""
        write(files, tmp_path / "cache")
        cache = LatentCache(tmp_path / "cache")
        assert pickle.loads(pickle.dumps(cache))[5].equal(cache[5])
        batches = draw(cache, LatentView(4))
        (batch,) = DataLoader(batches, None, sampler=[2], num_workers=1)
        assert torch.equal(batch.moments, batches[2].moments)

    def test_statistics(self, files, tmp_path):
        vae = make_vae("v1")
        write(files, tmp_path / "cache", vae)
        cached = summarize_latents(LatentCache(tmp_path / "cache").iterate_moments(100))
        assert cached.num_items == 11 and cached.num_latents == 11 * 4
        order = iter(range(11))
        squares = DrawnBatches(files, lambda rng: Choice(next(order), label=0), SquareView(16, 11))
        fresh = compute_latent_statistics(vae, iterate_pixels(squares, 1))
        assert cached.channel_mean == pytest.approx(fresh.channel_mean, rel=1e-3)
        assert cached.channel_std == pytest.approx(fresh.channel_std, rel=1e-3)


class TestInputs:
    """A cache is of one set of files, whatever happens to it."""

    @pytest.fixture
    def other(self, tmp_path):
        """Another folder of the same names, with other pictures."""
        for name, count in (("dog", 6), ("cat", 3), ("flag", 2)):
            write_noise(tmp_path / "other" / name, count, size=(48, 32))
        return LabelledFiles([str(tmp_path / "other")])

    def test_another_folder_of_the_same_names(self, files, other, tmp_path):
        write(files, tmp_path / "cache")
        before = LatentCache(tmp_path / "cache")[5]
        (tmp_path / "cache" / "latents-00001.safetensors").unlink()
        message = (
            r'cache" has results with other files, 11 changed \(cat/000.png, cat/001.png, cat/002.png, ...\): name'
        )
        with pytest.raises(ValueError, match=message):
            write(other, tmp_path / "cache")
        write(files, tmp_path / "cache")
        assert torch.equal(LatentCache(tmp_path / "cache")[5], before)

    def test_a_shard_of_other_files_is_written_again(self, files, other, tmp_path):
        """Somebody brought its file and its entry in the index from the cache of another folder."""
        for source, name in ((files, "cache"), (other, "foreign")):
            write(source, tmp_path / name)
        indices = [json.loads((tmp_path / name / "index.json").read_text()) for name in ("cache", "foreign")]
        expected = LatentCache(tmp_path / "cache")[5]
        indices[0]["shards"]["1"] = indices[1]["shards"]["1"]
        (tmp_path / "cache" / "index.json").write_text(json.dumps(indices[0]))
        with pytest.raises(ValueError, match='index.json" has changed since it was written: restore it, or delete'):
            write(files, tmp_path / "cache")
        (tmp_path / "cache" / "index.json").write_text(json.dumps(seal(indices[0])))
        (tmp_path / "foreign" / "latents-00001.safetensors").replace(tmp_path / "cache" / "latents-00001.safetensors")
        assert not torch.equal(LatentCache(tmp_path / "cache")[5], expected)
        write(files, tmp_path / "cache")
        assert torch.equal(LatentCache(tmp_path / "cache")[5], expected)

    def test_the_same_data_elsewhere(self, files, folder, tmp_path):
        """Moved, or copied with other times: nothing is encoded again."""
        index = write(files, tmp_path / "cache")
        before = state(tmp_path / "cache")
        shutil.copytree(folder, tmp_path / "copy" / "deep", copy_function=shutil.copyfile)
        assert write(LabelledFiles([str(tmp_path / "copy" / "deep")]), tmp_path / "cache") == index
        folder.rename(tmp_path / "moved")
        assert write(LabelledFiles([str(tmp_path / "moved")]), tmp_path / "cache", make_vae("v1")) == index
        after = state(tmp_path / "cache")
        assert {name for name in after if after[name] != before[name]} == {RECORD}

    def test_caches_of_earlier_versions(self, files, tmp_path):
        """They did not say what they hold."""
        index = write(files, tmp_path / "cache")
        del index["format"]
        (tmp_path / "cache" / "index.json").write_text(json.dumps(index))
        for read in (LatentCache, partial(write, files)):
            with pytest.raises(ValueError, match="of another version, of format None, not 3: write it anew"):
                read(tmp_path / "cache")


def test_example(folder, tmp_path, monkeypatch, capsys):
    make_vae("v1").save_pretrained(tmp_path / "vae")
    options = {"vae_name_or_path": tmp_path / "vae", "train_data_dir": folder, "output_dir": tmp_path / "cache"}
    command = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["cache_latents.py", *command, "--resolution", "24", "--shard_size", "5"])
    runpy.run_path(str(ASSETS.parent / "cache_latents.py"), run_name="__main__")
    assert "11 latents of 3 classes" in capsys.readouterr().out
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index["vae"] == "vae" and index["resolution"] == 24 and str(tmp_path) not in json.dumps(index)
    assert LatentCache(tmp_path / "cache")[0].shape == (2, 2, 4, 1, 3, 3)
