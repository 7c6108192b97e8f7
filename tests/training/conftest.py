import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.conftest import ASSETS, TINY
from tests.data.conftest import video as video
from vitok_hf import AutoencoderViTok
from vitok_hf.clips import to_runs
from vitok_hf.data.batches import Batch
from vitok_hf.training.arguments import AutoencoderArguments
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.trainer import Trainer


def make_arguments(folder: Path, config: dict = TINY, **overrides) -> AutoencoderArguments:
    """Settings of a tiny run in `folder`/run."""
    (folder / "config.json").write_text(json.dumps(config))
    defaults = {
        "output_dir": str(folder / "run"),
        "train_data_dir": [str(ASSETS)],
        "crop_sizes": ["16", "8x32"],
        "resolution": 16,
        "train_batch_size": 8,
        "dataloader_num_workers": 0,
        "lpips_weight": 0.0,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "discriminator_channels": 4,
        "discriminator_learning_rate": 1e-3,
        "discriminator_warmup_steps": 2,
        "max_train_steps": 6,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        "mixed_precision": "no",
        "report_to": "none",
    }
    if not {"variant", "pretrained_model_name_or_path"} & set(overrides):
        defaults["model_config"] = str(folder / "config.json")
    return AutoencoderArguments(**defaults | overrides)


def make_stage2(folder: Path, config: dict = TINY, **overrides) -> AutoencoderArguments:
    """Settings of a tiny run of stage 2 in `folder`/run, from a random model."""
    if not (folder / "pretrained").exists():
        torch.manual_seed(1)
        AutoencoderViTok(**config).save_pretrained(folder / "pretrained")
    source = {"pretrained_model_name_or_path": str(folder / "pretrained")}
    return make_arguments(folder, **{"stage": 2, "gan_weight": 0.1} | source | overrides)


@pytest.fixture
def arguments(tmp_path):
    return partial(make_arguments, tmp_path)


@pytest.fixture
def stage2(tmp_path):
    return partial(make_stage2, tmp_path)


def run(args: AutoencoderArguments) -> AutoencoderTrainer:
    trainer = AutoencoderTrainer(args)
    trainer.train()
    return trainer


def next_batches(trainer: Trainer, count: int = 1) -> list[Batch]:
    return list(itertools.islice(trainer.loader, count))


def split_batch(batch: Batch, counts: list[int]) -> list[Batch]:
    """Batches of so many items each, in their order."""
    items = iter([item for run in batch.pixels for item in run])
    pixels = [to_runs(list(itertools.islice(items, count)))[0] if batch.pixels else [] for count in counts]
    parts = [[None] * len(counts) if x is None else x.split(counts) for x in (batch.moments, batch.labels)]
    return [Batch(*part) for part in zip(pixels, *parts)]


def keep_gradients(trainer: Trainer) -> None:
    """Steps of the first model leave its weights as they are, and the gradients in place."""
    trainer.trained.optimizer.step = trainer.trained.optimizer.zero_grad = lambda: None


def read_log(output_dir: str | Path, key: str = "loss") -> dict[int, float]:
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line[key] for line in map(json.loads, lines) if key in line}
