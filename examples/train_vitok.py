"""Trains ViTok autoencoders, both stages of the paper: `vitok train`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("train", *sys.argv[1:])
