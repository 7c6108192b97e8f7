r"""Trains a class-conditional diffusion transformer on the latents of a ViTok.

    vitok train-dit --vae_name_or_path vitok-tiny-f8x8 --variant S --train_data_dir pictures \
        --resolution 64 --validation_data_dir held_out --prediction_type flow_prediction --output_dir output

The class of a picture is the name of the folder that holds it. `vitok cache-latents` writes the latents once, for
`--latents_dir` in place of `--train_data_dir`. Runs on one process; `accelerate launch -m vitok_hf.commands
train-dit ...` on whatever `accelerate config` describes. `--config settings.yaml` reads settings from a file.
"""

from typing import Any

from ..training.arguments import DiTArguments
from .settings import parse_settings


def parse(argv: list[str], program: str) -> dict[str, Any]:
    return parse_settings(DiTArguments, argv, program, __doc__)


def run(args: dict[str, Any]) -> None:
    from ..training.dit_trainer import DiTTrainer

    DiTTrainer(DiTArguments(**args)).train()
