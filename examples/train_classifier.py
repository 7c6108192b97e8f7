"""Trains a small classifier of pictures by the folder they are in; its features serve to compare sets of pictures.

    python examples/train_classifier.py --train_data_dir data/train --validation_data_dir data/test

Every folder that holds pictures is a class, under its own name. Prints the accuracy on held-out pictures; the
classifier is the file output-classifier/classifier/classifier.safetensors.
"""

import sys

from vitok_hf.commands import run_command
from vitok_hf.commands.settings import parse_settings
from vitok_hf.training.arguments import ClassifierArguments


def main():
    settings = parse_settings(ClassifierArguments, sys.argv[1:], sys.argv[0], __doc__)
    from vitok_hf.training.classifier_trainer import ClassifierTrainer  # not for --help

    trainer = ClassifierTrainer(ClassifierArguments(**settings))
    trainer.train()
    if trainer.accelerator.is_main_process:
        for name, value in trainer.metrics.items():
            print(f"{name}: {value:.3f}")
        print(f"Saved {trainer.output_dir / trainer.result / trainer.file}, of {len(trainer.classes)} classes")


if __name__ == "__main__":
    run_command(main)
