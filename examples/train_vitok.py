"""Trains ViTok autoencoders, both stages of the paper.

    python examples/train_vitok.py --stage 1 --variant S-B/16 --latent_channels 16 \
        --train_data_dir photos:0.5 film:0.5 --validation_data_dir held_out --output_dir output
    python examples/train_vitok.py --stage 2 --pretrained_model_name_or_path output/vae \
        --train_data_dir photos:0.5 film:0.5 --validation_data_dir held_out --output_dir output2

runs on one process; `accelerate launch examples/train_vitok.py ...` on whatever `accelerate config` describes, or
`--config_file examples/accelerate_configs/...`. `--config examples/configs/....yaml` reads settings from a file.
"""

from vitok_hf.commands import run_command
from vitok_hf.training.arguments import AutoencoderArguments, parse_arguments
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


def main():
    AutoencoderTrainer(parse_arguments(AutoencoderArguments, description=__doc__)).train()


if __name__ == "__main__":
    run_command(main)
