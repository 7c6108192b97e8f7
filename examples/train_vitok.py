"""Trains ViTok autoencoders.

    python examples/train_vitok.py --stage 1 --variant S-B/16 --latent_channels 16 --train_data photos film:0.5 \
        --eval_data held_out --output_dir output

runs on one process; `accelerate launch examples/train_vitok.py ...` on whatever `accelerate config` describes.
`--help` lists the settings.
"""

from transformers import HfArgumentParser

from vitok_hf.training.autoencoder import AutoencoderTrainer, TrainingArguments


def main():
    parser = HfArgumentParser(TrainingArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses()
    AutoencoderTrainer(args).train()


if __name__ == "__main__":
    main()
