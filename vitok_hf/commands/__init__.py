"""The program `vitok` starts commands, and ends them: what the user can mend is one line, not a traceback."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError


COMMANDS = {  # in the file of that name: what it does, and the extra with what it needs beyond the base requirements
    "reconstruct": ("send pictures or videos through an autoencoder", None),
    "generate": ("draw samples of a class-conditional pipeline", None),
    "train": ("train an autoencoder, both stages of the paper", "train"),
    "train-dit": ("train a class-conditional diffusion transformer on latents", "train"),
    "cache-latents": ("write the latents of pictures by class, for train-dit", "train"),
    "evaluate": ("measure how well autoencoders reconstruct", "eval"),
    "export-onnx": ("write an autoencoder or generator as ONNX files, and check them", "onnx"),
    "demo": ("show an autoencoder and a generator in the browser", "demo"),
    "convert": ("convert the author's ViTok-v2 weights to diffusers' layout, and back", None),
}
EXTRAS = 'if it belongs to an extra, pip install "vitok-hf[train]" (or eval, onnx, data, demo) brings it'
HELP = "\n".join(
    [
        "usage: vitok COMMAND ...",
        "       vitok --version",
        "",
        "Autoencoders for images and videos, and generators on their latents.",
        "",
    ]
    + [f"  {name:15}{text}" for name, (text, _) in COMMANDS.items()]
    + ["", "`vitok COMMAND --help` lists the settings of a command. What you can mend ends it with one line;"]
    + ["VITOK_TRACEBACK=1 in the environment shows the traceback."]
)


def main(*argv: str) -> None:
    """The program, on `argv` or else on the command line: a command and its arguments."""
    name, *rest = argv or sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
    elif name == "--version":
        print(f"vitok {import_module('vitok_hf').__version__}")
    elif name not in COMMANDS:
        print(f'vitok: there is no command "{name}": choose from {", ".join(COMMANDS)}.', file=sys.stderr)
        sys.exit(2)
    else:
        extra = COMMANDS[name][1]
        run_command(lambda: start(name, rest), f"vitok {name}", extra and f'pip install "vitok-hf[{extra}]" brings it')


def start(name: str, argv: list[str]) -> None:
    """Parses the arguments of a command, which takes no PyTorch, and runs it."""
    command = import_module(f"{__name__}.{name.replace('-', '_')}")
    args = command.parse(argv, f"vitok {name}")
    import_module("vitok_hf.public")  # see there, and vitok_hf/__init__
    command.run(args)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default of each option that has one, unless its help says it."""

    def add_argument(self, action: argparse.Action) -> None:
        default, help = action.default, action.help or ""
        is_none = default is None or default is False or default == [] or default == argparse.SUPPRESS
        if action.option_strings and help != argparse.SUPPRESS and not is_none and "default" not in help:
            action.help = f"{help} (default: %(default)s)" if help else "default: %(default)s"
        super().add_argument(action)


def make_parser(program: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(program, description=description, formatter_class=HelpFormatter, **options)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])


def run_command(main: Callable[[], object], name: str | None = None, extras: str | None = None) -> None:
    """Calls the `main` of a command and exits with 2, and with a line on stderr, for an error that the user can mend.

    Such are wrong values, files that cannot be read or written, packages that are not installed, and what the Hub
    refuses: `ValueError`, `OSError`, `ImportError`, and the errors of HTTP and of safetensors files. With
    VITOK_TRACEBACK=1 in the environment these have their traceback too; other exceptions, which are faults of the
    program, always do. An interrupted command exits with 130. In a run of several processes the line has the
    process's number.

    Args:
        main: What to call.
        name: Of the command, by default of the script.
        extras: Where to find a package that is not installed, by default any of the extras.
    """
    name = name or Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:  # which has said why, unless it was killed
        if error.returncode < 0:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (ValueError, OSError, ImportError, HTTPError, SafetensorError) as error:
        if os.environ.get("VITOK_TRACEBACK") == "1":
            raise
        text = str(error) or type(error).__name__
        if text.startswith("Caught "):  # by a worker that reads data: its traceback is part of the text
            text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
        if not isinstance(error, ValueError):  # those of libraries may be whole paragraphs
            text = " ".join(text.split())
        if isinstance(error, ModuleNotFoundError):
            text += f": {extras or EXTRAS}"
        rank = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{name}{rank}: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
