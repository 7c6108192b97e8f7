"""Saving and loading of models, strictly, and whatever of them is compiled, fused or adapted."""

import hashlib
import inspect
import json
import os
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from ..checks import plain
from ..loading.strict import check_config_file, check_shards, check_values, public_config, read_header


def plain_name(name: str) -> str:
    """The name of a weight without what `torch.compile` puts into those of the modules that it wraps."""
    return name.replace("_orig_mod.", "")


@contextmanager
def uncompiled(model: nn.Module):
    """Inside this context, the submodules that `torch.compile` has wrapped are in their places without the wrapper."""
    children = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    wrapped = [(parent, name, child) for parent, name, child in children if is_compiled_module(child)]
    for parent, name, child in wrapped:
        setattr(parent, name, child._orig_mod)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def adapter_names(source: Any, weight_name: str | None, prefix: str | None) -> set[str]:
    """Of the tensors of a local adapter in PEFT's layout; empty of others, which diffusers fetches or converts."""
    names = set()
    if isinstance(source, dict):
        names = {*source}
    elif os.path.exists(source):
        path = Path(source, weight_name or LORA_WEIGHT_NAME_SAFE) if os.path.isdir(source) else Path(source)
        names = {*read_header(path)} if path.suffix == ".safetensors" and path.exists() else names
    names = {name.removeprefix(f"{prefix}.") for name in names}
    return names if all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names) else set()


class SavingMixin(PeftAdapterMixin):
    """Saves and loads under the names of a model of which nothing is compiled, as PEFT needs it to find the layers.

    Adding an adapter and loading weights unfuse the projections, whose weights are copies. Whoever changes weights in
    place fuses them again.
    """

    def register_to_config(self, **kwargs: Any) -> None:
        """As in diffusers; numbers of numpy become Python's."""
        super().register_to_config(**{name: plain(value) for name, value in kwargs.items()})

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        check_config_file(cls, loaded[0] if isinstance(loaded, tuple) else loaded, pretrained_model_name_or_path)
        return loaded

    @classmethod
    def has_entry(cls, name: str) -> bool:
        """Whether a config may have this entry."""
        return name in inspect.signature(cls.__init__).parameters

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, files, name_or_path, loaded_keys, **kwargs: Any) -> Any:
        if kwargs.get("hf_quantizer") is not None:  # others than floats, under other names
            return super()._load_pretrained_model(model, state_dict, files, name_or_path, loaded_keys, **kwargs)
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        if kwargs.get("ignore_mismatched_sizes"):
            shapes = {}
        shards = [file for file in files if str(file).endswith((".safetensors", ".bin"))]
        check_shards(shards, loaded_keys, shapes)
        other_half = {"encoder": "decoder.", "decoder": "encoder."}.get(model.config.get("component"))
        if other_half:  # diffusers would list all of it in a warning
            loaded_keys = [key for key in loaded_keys if not key.startswith(other_half)]
        loaded = super()._load_pretrained_model(model, state_dict, files, name_or_path, loaded_keys, **kwargs)
        check_values(model, name_or_path, shards)
        return loaded

    @wraps(ModelMixin.save_pretrained)  # whose arguments pipelines look for
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        with uncompiled(self):
            super().save_pretrained(*args, **kwargs)

    def save_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        with uncompiled(self):
            super().save_lora_adapter(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.unfuse_qkv_projections()  # whose weights are copies
        return super().load_state_dict(*args, **kwargs)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        self.unfuse_qkv_projections()
        with uncompiled(self):
            super().add_adapter(*args, **kwargs)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers, and raises `ValueError`, without the adapter, if one is damaged or of another model."""
        source = pretrained_model_name_or_path_or_dict
        self.unfuse_qkv_projections()
        before, saved = {*self._adapters()}, adapter_names(source, kwargs.get("weight_name"), prefix)
        with uncompiled(self):
            super().load_lora_adapter(source, prefix=prefix, hotswap=hotswap, **kwargs)
            for adapter in {*self._adapters()} - before:
                try:
                    self._check_adapter(adapter, saved, "of the dictionary" if isinstance(source, dict) else source)
                except ValueError:
                    self.delete_adapters(adapter)
                    raise

    def _adapters(self) -> dict[str, Any]:
        return getattr(self, "peft_config", {})

    def _check_adapter(self, adapter: str, saved: set[str], source: str | os.PathLike) -> None:
        names = {name.replace(f".{adapter}.", ".") for name, _ in self.named_parameters() if f".{adapter}." in name}
        if saved and (different := sorted(saved ^ names)):
            raise ValueError(
                f'The LoRA adapter "{source}" does not fit this model: {len(different)} tensors are missing or '
                f"unexpected ({', '.join(different[:5])}). Take the model that it was trained on."
            )
        check_values(self, source)


def weights_checksum(module: nn.Module, config: dict | None = None) -> str:
    """SHA-256 of a config, without what diffusers notes besides, and of weights in half precision."""
    digest = hashlib.sha256(json.dumps(public_config(config or {}), sort_keys=True).encode())
    for name, weight in sorted((plain_name(name), weight) for name, weight in module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
