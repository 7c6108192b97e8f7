"""The demo as a folder that is a Space of the Hugging Face Hub: `hf upload --repo-type space NAME FOLDER`."""

import json
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path


PACKAGE = Path(__file__).parents[1]
FOLDERS = ("model", "compare", "pipeline")
CARD = """---
title: {title}
sdk: gradio
sdk_version: {version}
app_file: app.py
license: apache-2.0
tags:
- vitok
---

Pictures and videos through a ViTok, an autoencoder that is a vision transformer (arXiv 2501.09755).

`app.py` starts the demo of the package in `vitok_hf/`, whose code is under Apache-2.0; the licence of other weights is
to be added by whoever publishes them.
"""
APP = """from vitok_hf.commands import main


main({arguments})
"""


def requirements() -> list[str]:
    """What the installed package and its demo need, as in a requirements.txt."""
    lines = [line.replace("'", '"').split(";") for line in metadata.requires("vitok-hf") or []]
    return [line[0].strip() for line in lines if len(line) == 1 or 'extra == "demo"' in line[1]]


def write_space(folder: Path, options: Mapping[str, str | None]) -> None:
    """Writes README.md, app.py, requirements.txt and the package to a new folder.

    Args:
        folder: Must not be there, or be empty.
        options: Arguments of the demo, without dashes. Folders among them are copied: the Space has no others.

    Raises:
        ValueError: If the folder is not empty.
        ModuleNotFoundError: If the package is not installed, for its requirements are then not known.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f'"{folder}" is not empty: name a new folder for the Space.')
    needed, version = requirements(), metadata.version("gradio")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    arguments = ["demo"]
    for name, value in options.items():
        if value is not None and name in FOLDERS and Path(value).is_dir():
            shutil.copytree(value, folder / name)
            value = name
        arguments += [] if value is None else [f"--{name}", value]
    title = json.dumps(f"ViTok {Path(options.get('model') or 'demo').name}")
    (folder / "README.md").write_text(CARD.format(title=title, version=version))
    (folder / "app.py").write_text(APP.format(arguments=", ".join(map(json.dumps, arguments))))
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")
