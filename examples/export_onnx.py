"""Writes encoder.onnx and decoder.onnx: `vitok export-onnx`, whose arguments it takes."""

import sys

from vitok_hf.commands import main


if __name__ == "__main__":
    main("export-onnx", *sys.argv[1:])
