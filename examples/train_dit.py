"""Trains a class-conditional diffusion transformer on the latents of a ViTok.

    python examples/train_dit.py --vae_name_or_path vitok-tiny-f8x8 --variant S --train_data_dir pictures \
        --resolution 64 --validation_data_dir held_out --prediction_type flow_prediction --output_dir output

The class of a picture is the name of the folder that holds it. `cache_latents.py` writes the latents once, for
`--latents_dir` in place of `--train_data_dir`. Runs on one process; `accelerate launch examples/train_dit.py ...` on
whatever `accelerate config` describes, or `--config_file examples/accelerate_configs/...`.
`--config examples/configs/....yaml` reads settings from a file.
"""

from vitok_hf.commands import run_command
from vitok_hf.training.arguments import DiTArguments, parse_arguments
from vitok_hf.training.dit_trainer import DiTTrainer


def main():
    DiTTrainer(parse_arguments(DiTArguments, description=__doc__)).train()


if __name__ == "__main__":
    run_command(main)
