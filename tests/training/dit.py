"""Tiny runs of the diffusion transformer's training."""

import json
from pathlib import Path

import torch

from tests.conftest import TINY
from tests.data.conftest import write_noise
from vitok_hf import AutoencoderViTok
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.latent_cache import write_latents
from vitok_hf.training.arguments import DiTArguments
from vitok_hf.training.dit_trainer import DiTTrainer


MODEL = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
CLASSES = ["cat", "dog", "flag"]


def make_dit_arguments(folder: Path, vae: dict | str | None = None, model: dict = MODEL, **overrides) -> DiTArguments:
    """Settings of a tiny run in `folder`/run: three classes, 2 x 2 latents. `vae`: a config or a name."""
    if not (folder / "data").exists():
        for split, count in (("data", 5), ("held_out", 2)):
            for index, name in enumerate(CLASSES):
                write_noise(folder / split / name, count + index)
    if not isinstance(vae, str):
        if vae is not None or not (folder / "vae").exists():
            torch.manual_seed(1)
            AutoencoderViTok(**vae or TINY).save_pretrained(folder / "vae")
        vae = str(folder / "vae")
    (folder / "dit.json").write_text(json.dumps(model))
    defaults = {
        "output_dir": str(folder / "run"),
        "vae_name_or_path": vae,
        "validation_data_dir": [str(folder / "held_out")],
        "num_validation_images": 4,
        "resolution": 16,
        "train_batch_size": 8,
        "dataloader_num_workers": 0,
        "num_statistics_images": 16,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_timestep_buckets": 2,
        "num_samples_per_class": 2,
        "num_inference_steps": 2,
        "mixed_precision": "no",
        "report_to": "none",
    }
    if "latents_dir" not in overrides:
        defaults["train_data_dir"] = [str(folder / "data")]
    if "variant" not in overrides:
        defaults["model_config"] = str(folder / "dit.json")
    return DiTArguments(**defaults | overrides)


def write_cache(args: DiTArguments, **options) -> str:
    """A cache of the latents of the settings' pictures, beside their output_dir."""
    vae, folder = AutoencoderViTok.from_pretrained(args.vae_name_or_path), Path(args.output_dir).with_name("cache")
    write_latents(vae, "vae", LabelledFiles(args.train_data_dir), folder, 16, **options)
    return str(folder)


def run(args: DiTArguments) -> DiTTrainer:
    trainer = DiTTrainer(args)
    trainer.train()
    return trainer
