"""Shows an autoencoder and a generator in the browser: `vitok demo`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("demo", *sys.argv[1:])
