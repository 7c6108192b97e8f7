"""Sends pictures or videos through an autoencoder: `vitok reconstruct`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("reconstruct", *sys.argv[1:])
