"""Several processes on the CPU, through the configuration files that users launch with; and processes that die."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from tests.conftest import ASSETS, TINY, launcher, run_launched
from tests.data.conftest import write_noise
from tests.training.conftest import make_stage2, next_batches, read_log
from vitok_hf import AutoencoderViTok
from vitok_hf.clips import to_runs
from vitok_hf.data.batches import Batch
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


CONFIG = TINY | {"variational": False}  # no noise, which would differ between processes


def start(settings, *command: str, **extra) -> subprocess.CompletedProcess:
    path = Path(f"{settings.output_dir}.json")
    path.write_text(json.dumps(vars(settings) | extra))
    return run_launched([*command, str(Path(__file__).with_name("worker.py")), str(path)])


def launch(settings, engine: str, **extra) -> subprocess.CompletedProcess:
    return start(settings, *launcher(engine), **extra)


class Pairs:
    """A loader whose batches are two of another loader's in one."""

    def __init__(self, loader):
        self.loader, self.state_dict = loader, loader.state_dict

    def __iter__(self):
        batches = iter(self.loader)
        for batch in batches:
            items = [item for part in (batch, next(batches)) for run in part.pixels for item in run]
            yield Batch(to_runs(items)[0])


def make_settings(folder: Path, name: str, **overrides):
    """Settings of a run of stage 2, in `folder`/name, with everything that processes have to agree on."""
    defaults = {
        "output_dir": str(folder / name),
        "freeze_encoder": False,
        "crop_sizes": ["16"],
        "train_batch_size": 4,
        "max_train_steps": 4,
        "max_grad_norm": 1e9,
        "checkpointing_steps": 2,
        "use_ema": True,
        "lecam_weight": 0.1,
        "r1_weight": 1.0,
        "r1_every": 2,
        "adaptive_gan_weight": 10.0,
        "validation_data_dir": [str(ASSETS)],
        "validation_resolution": 16,
        "num_validation_images": 3,
        "validation_steps": 4,
    }
    return make_stage2(folder, CONFIG, **defaults | overrides)


@pytest.fixture
def settings(tmp_path):
    return partial(make_settings, tmp_path)


def metrics(output_dir) -> dict[tuple[str, int], float]:
    keys = ["loss", "grad_norm", "discriminator_grad_norm", "logits_fake", "gan_weight", "lecam", "learning_rate"]
    keys += ["discriminator_learning_rate", "assets_psnr", "assets_ema_psnr", "assets_ssim"]
    return {(key, step): value for key in keys for step, value in read_log(output_dir, key).items()}


class TestEngines:
    @pytest.fixture(scope="class", params=["ddp", "fsdp2"])
    def engine(self, request):
        return request.param

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory, engine):
        """With a run of two processes, `two`."""
        folder = tmp_path_factory.mktemp(engine)
        process = launch(make_settings(folder, "two"), engine)
        assert process.returncode == 0, process.stderr[-3000:]
        assert ("FSDPAutoencoderViTok" if engine == "fsdp2" else "DistributedDataParallel") in process.stdout
        return folder

    def test_two_processes_equal_one(self, folder):
        """2 x batch 4 against 1 x batch 8: every metric, gradient norms among them, and the weights after 4 steps."""
        alone = AutoencoderTrainer(make_settings(folder, "one"))
        alone.loader = Pairs(alone.loader)
        alone.train()
        expected = metrics(folder / "one")
        assert len(expected) == 8 * 4 + 3
        assert metrics(folder / "two") == pytest.approx(expected, rel=2e-4)
        for name in ("vae", "checkpoint-4/vae", "checkpoint-4/vae_ema", "checkpoint-2/vae"):
            models = [AutoencoderViTok.from_pretrained(folder / run / name) for run in ("one", "two")]
            for ours, theirs in zip(*(model.parameters() for model in models)):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    def test_discriminators_are_identical(self, folder):
        ranks = [torch.load(folder / "two" / f"rank{rank}.pt") for rank in (0, 1)]
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])

    def test_resumes(self, folder, engine):
        """From the newest checkpoint that is sound: all processes from the same."""
        shutil.copytree(folder / "two", folder / "resumed")
        (folder / "resumed" / "checkpoint-4" / "state" / "data_0.json").write_text("{}")
        process = launch(make_settings(folder, "resumed", resume_from_checkpoint="latest"), engine)
        assert process.returncode == 0, process.stderr[-3000:]
        assert 'checkpoint-4" is damaged: state/data_0.json has 2 bytes' in process.stderr
        assert metrics(folder / "resumed") == pytest.approx(metrics(folder / "two"), rel=1e-6)
        assert (folder / "resumed" / "checkpoint-4.damaged").is_dir()
        names = {path.name for path in (folder / "two" / "checkpoint-2" / "state").rglob("*") if path.is_file()}
        assert not any(name.endswith(".pkl") for name in names) and "random_1.safetensors" in names


def test_accumulation_on_two_processes(settings, tmp_path):
    """2 processes x 2 batches x 4 against 2 x batch 8, over both models."""
    overrides = {"gradient_accumulation_steps": 2, "max_train_steps": 2}
    process = launch(settings("parts", **overrides), "ddp")
    assert process.returncode == 0, process.stderr[-3000:]
    alone = AutoencoderTrainer(settings("whole", **overrides))
    alone.loader = Pairs(alone.loader)
    alone.train()
    assert metrics(tmp_path / "parts") == pytest.approx(metrics(tmp_path / "whole"), rel=2e-4)


def test_processes_with_other_numbers_of_pictures(settings, tmp_path):
    """Every picture counts alike, and not every process: 2 batches of native sizes against all in one."""
    overrides = {"max_tokens": 24, "resolution": 32, "crop_sizes": [], "max_train_steps": 2, "seed": 1}
    overrides["gradient_accumulation_steps"] = 2
    sizes = [(8, 8), (32, 32), (30, 17), (9, 40)]
    overrides["train_data_dir"] = [str(write_noise(tmp_path / str(size), 2, size)[0].parent) for size in sizes]
    overrides["discriminator_minibatch_stddev"] = False
    process = launch(settings("parts", **overrides), "ddp")
    assert process.returncode == 0, process.stderr[-3000:]
    alone = AutoencoderTrainer(settings("whole", **overrides))
    alone.loader = Pairs(alone.loader)
    counts = [batch.num_items for batch in next_batches(AutoencoderTrainer(alone.args), 4)]
    assert counts[0] != counts[1]
    alone.train()
    assert metrics(tmp_path / "parts") == pytest.approx(metrics(tmp_path / "whole"), rel=2e-4)


def test_a_dead_process_ends_the_run(settings):
    process = launch(settings("killed"), "ddp", kill=(1, 2))
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL) received" in process.stderr and "local_rank: 1" in process.stderr


def test_killed_while_saving(settings, tmp_path):
    """Killed at step 10 with half a model on the disk, resumed from step 5: the losses of an unbroken run."""
    overrides = {"max_train_steps": 20, "checkpointing_steps": 5, "validation_steps": 100}
    whole = settings("whole", **overrides)
    AutoencoderTrainer(whole).train()
    killed = settings("killed", **overrides)
    assert start(killed, sys.executable, kill_saving=10).returncode == -9
    found = [path.name for path in (tmp_path / "killed").glob("*checkpoint-*")]
    assert len(found) == 2 and "checkpoint-5" in found and any(name.endswith(".incomplete") for name in found)
    resumed = AutoencoderTrainer(settings("killed", **overrides, resume_from_checkpoint="latest"))
    assert resumed.step == 5
    resumed.train()
    losses = read_log(tmp_path / "killed")
    assert sorted(losses) == list(range(1, 21))
    assert losses == pytest.approx(read_log(tmp_path / "whole"), rel=1e-6)
    assert (tmp_path / "killed" / "checkpoint-20").is_dir()
    assert not list((tmp_path / "killed").glob(".checkpoint-*"))


def test_two_runs_in_one_folder(settings, tmp_path):
    """The second ends at once, and goes on as soon as the first is killed."""
    overrides = {"max_train_steps": 1000, "checkpointing_steps": 1}
    first = settings("run", **overrides)
    path = tmp_path / "first.json"
    path.write_text(json.dumps(vars(first)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoint-1").exists():
        assert process.poll() is None
        time.sleep(0.1)
    for name in (None, "latest"):
        with pytest.raises(ValueError, match=f'run" is in use by process {process.pid} on .*: wait for its end, or'):
            AutoencoderTrainer(settings("run", **overrides, resume_from_checkpoint=name))
    process.kill()
    process.wait()
    assert AutoencoderTrainer(settings("run", **overrides, resume_from_checkpoint="latest")).step >= 1


@pytest.mark.parametrize("engine, remedy", [("FSDP", "set `fsdp_version: 2`"), ("DEEPSPEED", "FSDP2 shards the same")])
def test_engines_that_are_not_supported(settings, monkeypatch, engine, remedy):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(engine), raising=False)
    with pytest.raises(ValueError, match=remedy):
        AutoencoderTrainer(settings("x"))
