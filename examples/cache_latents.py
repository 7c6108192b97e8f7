"""Writes the latents of pictures by class: `vitok cache-latents`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("cache-latents", *sys.argv[1:])
