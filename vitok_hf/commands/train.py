r"""Trains ViTok autoencoders, both stages of the paper.

    vitok train --stage 1 --variant S-B/16 --latent_channels 16 \
        --train_data_dir photos:0.5 film:0.5 --validation_data_dir held_out --output_dir output
    vitok train --stage 2 --pretrained_model_name_or_path output/vae \
        --train_data_dir photos:0.5 film:0.5 --validation_data_dir held_out --output_dir output2

runs on one process; `accelerate launch -m vitok_hf.commands train ...` on whatever `accelerate config` describes.
`--config settings.yaml` reads settings from a file.
"""

from typing import Any

from ..training.arguments import AutoencoderArguments
from .settings import parse_settings


def parse(argv: list[str], program: str) -> dict[str, Any]:
    return parse_settings(AutoencoderArguments, argv, program, __doc__)


def run(args: dict[str, Any]) -> None:
    from ..training.autoencoder_trainer import AutoencoderTrainer

    AutoencoderTrainer(AutoencoderArguments(**args)).train()
