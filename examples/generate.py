"""Draws samples of a class-conditional pipeline: `vitok generate`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("generate", *sys.argv[1:])
