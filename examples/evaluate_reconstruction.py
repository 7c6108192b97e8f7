"""Measures how well autoencoders reconstruct: `vitok evaluate`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("evaluate", *sys.argv[1:])
