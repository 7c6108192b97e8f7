"""Damaged checkpoints, and such that would run programs."""

import logging
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import checkpoint as distributed

from tests.faults.code import plain, saved
from tests.training.conftest import make_arguments, run
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.checkpointing import MANIFEST, find_damage, write_manifest
from vitok_hf.training.run_state import find_program, random_state, set_random_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return Path(run(make_arguments(folder, use_ema=True, max_train_steps=3, checkpointing_steps=1)).args.output_dir)


@pytest.fixture
def resume(arguments, whole, tmp_path):
    """Resumes from a copy of the run, `tmp_path`/run."""
    shutil.copytree(whole, tmp_path / "run")

    def resume(name="latest"):
        return AutoencoderTrainer(arguments(use_ema=True, resume_from_checkpoint=name))

    return resume


class TestDamage:
    def test_a_named_checkpoint(self, resume, tmp_path):
        path = tmp_path / "run" / "checkpoint-3"
        for name in ("state/random_0.safetensors", "state/average.safetensors", "state/data_0.json"):
            good = (path / name).read_bytes()
            for damaged in (good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
                (path / name).write_bytes(damaged)
                with pytest.raises(ValueError, match=f'checkpoint-3" is damaged: {name} .*. Name an older one'):
                    resume(str(path))
            (path / name).unlink()
            with pytest.raises(ValueError, match=f"{name} is missing"):
                resume(str(path))
            (path / name).write_bytes(good)
        assert resume(str(path)).step == 3

    def test_latest_takes_the_newest_sound_one(self, resume, tmp_path, caplog):
        (tmp_path / "run" / "checkpoint-3" / "state" / "optimizer.bin").unlink()
        (tmp_path / "run" / "checkpoint-2" / "state" / "data_0.json").write_text("{")
        (tmp_path / "run" / "checkpoint-3.damaged").mkdir()
        with caplog.at_level(logging.WARNING):
            assert resume().step == 1
        assert 'checkpoint-3" is damaged: state/optimizer.bin is missing. Going on from' in caplog.text
        assert 'checkpoint-2" is damaged: state/data_0.json has 1 bytes' in caplog.text
        names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert names == ["checkpoint-1", "checkpoint-2.damaged", "checkpoint-3.damaged", "checkpoint-3.damaged1"]

    def test_what_is_no_damage(self, resume, tmp_path):
        """Models of a checkpoint may be edited or moved, and systems put hidden files beside."""
        shutil.rmtree(tmp_path / "run" / "checkpoint-3" / "vae_ema")
        (tmp_path / "run" / "checkpoint-3" / "vae" / "config.json").write_text("{}")
        (tmp_path / "run" / "checkpoint-3" / "state" / ".DS_Store").write_bytes(b"x")
        assert resume().step == 3

    def test_all_are_damaged(self, resume, tmp_path):
        for step in (1, 2, 3):
            (tmp_path / "run" / f"checkpoint-{step}" / MANIFEST).unlink()
        with pytest.raises(ValueError, match="damaged .checkpoint-3: .*manifest.json is missing.*; checkpoint-1: "):
            resume()
        assert len(list((tmp_path / "run").glob("checkpoint-?"))) == 3

    def test_a_model_of_another_shape(self, resume, arguments, tmp_path):
        with pytest.raises(ValueError, match='checkpoint-3" does not fit this run .*size mismatch.*: resume with'):
            AutoencoderTrainer(arguments(use_ema=True, latent_channels=8, resume_from_checkpoint="latest"))


class TestPrograms:
    def test_there_are_no_pickles_of_ours(self, whole):
        names = {path.name for path in (whole / "checkpoint-3" / "state").iterdir()}
        assert names == {
            *("model.safetensors", "optimizer.bin", "average.safetensors"),
            *("random_0.safetensors", "data_0.json", "manifest.json"),
        }

    @pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_0.safetensors"])
    @pytest.mark.parametrize("form", [plain, saved])
    def test_planted(self, resume, tmp_path, name, form):
        """By somebody who makes the manifest fit."""
        path = tmp_path / "run" / "checkpoint-3"
        (path / "state" / name).write_bytes(form(tmp_path / "marker"))
        if name == "custom_checkpoint_0.pkl":
            with pytest.raises(ValueError, match=f"state/{name} does not belong to it"):
                resume(str(path))
        (path / MANIFEST).unlink()
        write_manifest(path)
        with pytest.raises(ValueError, match=f"is damaged: state/{name} holds other things than numbers"):
            resume(str(path))
        assert not (tmp_path / "marker").exists()

    def test_in_the_index_of_a_sharded_checkpoint(self, tmp_path):
        state = {"weight": torch.ones(2, dtype=torch.bfloat16), "step": 3, "betas": (0.9, 0.95)}
        distributed.save(state, storage_writer=distributed.FileSystemWriter(tmp_path / "optimizer_0"))
        names = ["optimizer_0/.metadata", "optimizer_0/__0_0.distcp"]
        assert find_program(tmp_path, names) is None
        (tmp_path / names[0]).write_bytes(plain(tmp_path / "marker"))
        assert "optimizer_0/.metadata holds other things than numbers" in find_program(tmp_path, names)
        assert not (tmp_path / "marker").exists()


def test_the_state_of_a_device(monkeypatch):
    """Of the one that the process has."""
    backend, device = Mock(get_rng_state=Mock(return_value=torch.arange(3))), torch.device("cuda", 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    state = random_state(device)
    backend.get_rng_state.assert_called_once_with(device)
    set_random_state(state, device)
    backend.set_rng_state.assert_called_once_with(state["cuda"], device)
    set_random_state(state, torch.device("cpu"))
    assert backend.set_rng_state.call_count == 1


def test_checkpoints_of_earlier_versions(resume, tmp_path):
    path = tmp_path / "run" / "checkpoint-3"
    (path / MANIFEST).unlink()
    assert "manifest.json is missing, without which it is damaged or of an earlier version" in find_damage(path)
    with pytest.raises(ValueError, match="or of an earlier version"):
        resume(str(path))
