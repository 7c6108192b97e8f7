"""The weights that are installed with the package, one `from_pretrained` folder each."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode


def list_bundled() -> list[str]:
    """Names of the bundled checkpoints, autoencoders and pipelines alike, for `from_pretrained`."""
    root = Path(__file__).parent
    return sorted(
        folder.parent.name for name in ("config.json", "model_index.json") for folder in root.glob(f"*/{name}")
    )


def resolve_bundled(name_or_path):
    """The folder of a bundled checkpoint, or the argument itself if it names none, or a folder that there is.

    A bundled pipeline, or a copy of it, may have no weights in its folder `vae`, but a config that names a bundled
    autoencoder.
    """
    root, folder, config = Path(__file__).parent, Path(name_or_path), Path(name_or_path, "config.json")
    if str(name_or_path) in list_bundled() and not folder.is_dir():
        return str(root / name_or_path)
    if folder.absolute().name == "vae" and config.is_file() and not any(folder.glob("diffusion_pytorch_model*")):
        named = [name for name in list_bundled() if f'"_name_or_path": "{name}"' in config.read_text()]
        return str(root / named[0]) if named else name_or_path
    return name_or_path


def load_strictly(from_pretrained: Callable, name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """What diffusers' `from_pretrained` gives, unless tensors are missing or unexpected, which raises `ValueError`."""
    if is_offline_mode():  # diffusers asks the Hub about sharded weights unless it is told not to
        kwargs["local_files_only"] = True
    output_loading_info = kwargs.pop("output_loading_info", False)
    folder = resolve_bundled(name_or_path)
    if kwargs.get("subfolder") and Path(folder, kwargs["subfolder"]).is_dir():
        folder = resolve_bundled(Path(folder, kwargs.pop("subfolder")))
    model, info = from_pretrained(folder, output_loading_info=True, **kwargs)
    check_loading_info(info, model.config.get("component"), name_or_path)
    return (model, info) if output_loading_info else model


def check_loading_info(info: dict[str, Any], component: str | None, name_or_path: str | os.PathLike) -> None:
    """Raises `ValueError` if diffusers left weights of the model unset, or weights of the checkpoint unused.

    A model that has one `component` leaves the weights of the other half unused, and they are taken off the list.
    """
    other_half = {None: (), "encoder": "decoder.", "decoder": "encoder."}[component]
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not key.startswith(other_half)]
    for problem in ("missing", "unexpected"):
        if keys := sorted(info[f"{problem}_keys"]):
            raise ValueError(
                f"The weights of {name_or_path} do not fit its config: {len(keys)} tensors are {problem} "
                f"({', '.join(keys[:5])}{', ...' if keys[5:] else ''}). Use the config that they were saved with."
            )
