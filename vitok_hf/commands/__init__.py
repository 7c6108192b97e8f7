"""Starts commands, and ends them: what the user can mend is one line, not a traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError


EXTRAS = 'if it belongs to an extra, pip install "vitok-hf[train]" (or eval, onnx, data) brings it'


def run_command(main: Callable[[], object]) -> None:
    """Calls the `main` of a command and exits with 2, and with a line on stderr, for an error that the user can mend.

    Such are wrong values, files that cannot be read or written, packages that are not installed, and what the Hub
    refuses: `ValueError`, `OSError`, `ImportError`, and the errors of HTTP and of safetensors files. With
    VITOK_TRACEBACK=1 in the environment these have their traceback too; other exceptions, which are faults of the
    program, always do. An interrupted command exits with 130. In a run of several processes the line has the
    process's number.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:  # which has said why, unless it was killed
        if error.returncode < 0:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (ValueError, OSError, ImportError, HTTPError, SafetensorError) as error:
        if os.environ.get("VITOK_TRACEBACK") == "1":
            raise
        text = str(error) or type(error).__name__
        if not isinstance(error, ValueError):  # those of libraries may be whole paragraphs
            text = " ".join(text.split())
        if isinstance(error, ModuleNotFoundError):
            text += f": {EXTRAS}"
        rank = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{Path(sys.argv[0]).name}{rank}: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
