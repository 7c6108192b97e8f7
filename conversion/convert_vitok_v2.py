"""Converts the author's ViTok-v2 weights, and back: `vitok convert`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("convert", *sys.argv[1:])
