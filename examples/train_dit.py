"""Trains a diffusion transformer on the latents of a ViTok: `vitok train-dit`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("train-dit", *sys.argv[1:])
