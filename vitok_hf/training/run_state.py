"""The state of a run, in files that hold numbers and text alone; those of accelerate are read as if they did."""

import json
import os
import pickle
import random
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException


# What the index of a checkpoint that FSDP has sharded is made of: plain classes, and functions that look up names.
INDEX_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
}
FORCE, ALLOW = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and name not in INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return super().find_class(module, name)


def find_program(checkpoint: Path, names: Iterable[str]) -> str | None:
    """Which of the files would run a program when it is read, or is not of the format that it should have."""
    for name in names:
        path = checkpoint / name
        try:
            if path.name == ".metadata":
                with open(path, "rb") as file:
                    _IndexUnpickler(file).load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix != ".distcp":  # which is read with its index
                torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # whatever the bytes of a stranger give
            return f"{name} holds other things than numbers, or is damaged ({type(error).__name__})"
    return None


@contextmanager
def _numbers_only():
    """`torch.load` calls nothing that a file names, whatever its caller allows."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, ALLOW)}
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ |= {name: value for name, value in before.items() if value is not None}


def write_tree(path: Path, tree: Any) -> None:
    """Dictionaries and lists of tensors and JSON-able values, as safetensors with the form as JSON beside."""
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"items": [[key, pack(item)] for key, item in value.items()]}
        return [pack(item) for item in value] if isinstance(value, list | tuple) else value

    form = json.dumps(pack(tree))
    save_file(tensors, path, {"form": form})


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote, tuples as lists."""
    with safe_open(path, framework="pt") as file:

        def unpack(value: Any) -> Any:
            if isinstance(value, list):
                return [unpack(item) for item in value]
            if isinstance(value, dict):
                if "tensor" in value:
                    return file.get_tensor(str(value["tensor"]))
                return {key: unpack(item) for key, item in value["items"]}
            return value

        return unpack(json.loads(file.metadata()["form"]))


def random_state(device: torch.device) -> dict[str, Any]:
    """Of the generators of Python, numpy, PyTorch and the device."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (that of libraries)
    numpy_state = [kind, torch.from_numpy(keys), *rest]
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    backend = torch.get_device_module(device)
    return state | ({device.type: backend.get_rng_state(device)} if hasattr(backend, "get_rng_state_all") else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)


def save_state(accelerator: Accelerator, folder: Path, objects: dict[str, Any]) -> None:
    """Models and optimisers as accelerate saves them, `objects` by their `state_dict`, and the random states."""
    accelerator.save_state(str(folder))
    (folder / f"random_states_{accelerator.process_index}.pkl").unlink()  # a pickle
    write_tree(folder / f"random_{accelerator.process_index}.safetensors", random_state(accelerator.device))
    for name, item in objects.items():
        state = item.state_dict()
        if accelerator.is_main_process:
            write_tree(folder / f"{name}.safetensors", state)


@contextmanager
def naming_misfits(checkpoint: Path):
    """Errors of any kind in this block, of files that are whole, become a `ValueError` with the folder's name."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ValueError(
            f'"{checkpoint}" does not fit this run ({reason}): resume with the settings and the number of processes '
            "that it was written with, or start from its model (`pretrained_model_name_or_path`)."
        ) from error


def load_state(accelerator: Accelerator, folder: Path, objects: dict[str, Any]) -> None:
    """Loads all but the random states, which a process may not have had before."""
    with _numbers_only():
        accelerator.load_state(str(folder))
    for name, item in objects.items():
        item.load_state_dict(read_tree(folder / f"{name}.safetensors"))
