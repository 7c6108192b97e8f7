"""The weights that are installed with the package, one `from_pretrained` folder each."""

from pathlib import Path


def list_bundled() -> list[str]:
    """Names of the bundled checkpoints, autoencoders and pipelines alike, for `from_pretrained`."""
    root = Path(__file__).parent
    return sorted(
        folder.parent.name for name in ("config.json", "model_index.json") for folder in root.glob(f"*/{name}")
    )


def resolve_bundled(name_or_path):
    """The folder of a bundled checkpoint, or the argument itself if it names none."""
    return Path(__file__).parent / name_or_path if name_or_path in list_bundled() else name_or_path
