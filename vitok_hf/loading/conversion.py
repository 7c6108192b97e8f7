"""The author's ViTok-v2 weights converted to diffusers' layout, and back, bit for bit.

`autoencoder_class` is `AutoencoderViTok`, which stands above this folder; `hub` are arguments of `from_pretrained`:
`subfolder`, `revision`, `token` and `cache_dir`.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import model_info, parse_safetensors_file_metadata, snapshot_download
from safetensors.torch import load_file, save_file

from ..presets import V2_ARCHITECTURE
from .strict import check_shards, read_header, read_index
from .vitok_v2 import TOWERS, check_headers, empty_vitok_v2, fetch_vitok_v2, key_plan, load_vitok_v2, to_vitok_v2


V2_BOOLEANS = [name for name, value in V2_ARCHITECTURE.items() if isinstance(value, bool)] + ["use_bias"]

MODEL_CARD = """---
library_name: vitok_hf
pipeline_tag: image-to-image
license: {license}
{base_model}tags:
- vitok
- autoencoder
- diffusers
---

# {title}

An image autoencoder: the ViTok-v2 weights of [{source}]({link}), converted to diffusers' layout. The numbers are
those of the source; {dtype}. {channels} latent channels for each patch of {patch_size} x {patch_size} pixels.

```python
import torch
from vitok_hf import AutoencoderViTok

vae = AutoencoderViTok.from_pretrained("{title}", torch_dtype=torch.bfloat16)  # this folder, or its Hub id
images = [torch.rand(3, 250, 333) * 2 - 1, torch.rand(3, 96, 64) * 2 - 1]  # any sizes, in [-1, 1]
with torch.no_grad():
    reconstructions = vae([image.to(vae.device, vae.dtype) for image in images]).sample
```

## Source and licence

The weights are the work of the ViTok-v2 authors (https://github.com/Na-VAE/vitok-release, whose README states the MIT
licence for the code). {license_note}
"""


def plan_conversion(
    autoencoder_class: type[ModelMixin], source: str, variant: str | None = None, **hub: Any
) -> list[str]:
    """Lines: the author's tensors, their shapes and the parameters that they become; reads no weights.

    Raises:
        ValueError: If they do not fit.
    """
    if os.path.isdir(source):
        headers = {tower: read_header(path) for tower, path in fetch_vitok_v2(source, TOWERS, **hub).items()}
    else:
        prefix = f"{hub['subfolder']}/" if hub.get("subfolder") else ""
        headers = {}
        for tower in TOWERS:
            metadata = parse_safetensors_file_metadata(
                source, f"{prefix}{tower}.safetensors", revision=hub.get("revision"), token=hub.get("token")
            )
            headers[tower] = {key: tuple(info.shape) for key, info in metadata.tensors.items()}
    model = empty_vitok_v2(autoencoder_class, source, headers, variant, hub.get("subfolder"))
    lines = []
    for (tower, key), names in key_plan(model).items():
        lines.append(f"{tower}.safetensors  {key} {headers[tower].get(key, 'missing')}  ->  {', '.join(names)}")
    check_headers(model, headers, source)
    count, parameters = sum(map(len, headers.values())), model.num_parameters() / 1e6
    return [*lines, f"All {count} tensors fit; {parameters:.1f} M parameters."]


def write_diffusers(
    autoencoder_class: type[ModelMixin],
    source: str,
    folder: Path,
    title: str,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    licence: str | None = None,
    **hub: Any,
) -> None:
    """config.json, sharded weights and a model card from the author's files.

    Args:
        title: Of the card: the name of the result, or its Hub id.
        variant: The architecture, if the name of the source does not tell.
        dtype: By default every tensor keeps its own.
        licence: For the card, if the source does not state it.
    """
    vae = load_vitok_v2(autoencoder_class, source, variant, torch_dtype="auto" if dtype is None else dtype, **hub)
    vae.register_to_config(_name_or_path=title.split("/")[-1])
    vae.save_pretrained(folder, max_shard_size=max_shard_size)
    is_folder = os.path.isdir(source)
    if licence is None and not is_folder:
        stated = model_info(source, revision=hub.get("revision"), token=hub.get("token")).card_data
        licence = stated.get("license") if stated else None
    note = f"The source states the licence of the weights as `{licence}`." if licence else "The source states none."
    card = MODEL_CARD.format(
        title=title,
        license=licence or "unknown",
        license_note=note,
        source=Path(source).name if is_folder else source,
        link="https://github.com/Na-VAE/vitok-release" if is_folder else f"https://huggingface.co/{source}",
        base_model="" if is_folder else f"base_model: {source}\n",
        dtype="they were not changed" if dtype is None else f"stored as {str(dtype).removeprefix('torch.')}",
        channels=vae.config.latent_channels,
        patch_size=vae.config.patch_size,
    )
    (folder / "README.md").write_text(card)


def write_vitok_v2(
    autoencoder_class: type[ModelMixin], source: str, folder: Path, dtype: torch.dtype | None = None, **hub: Any
) -> None:
    """encoder.safetensors and decoder.safetensors, by default in the dtype of the source.

    Raises:
        ValueError: If the source has another architecture, or weights that do not fit its config.
    """
    subfolder, origin = hub.pop("subfolder", None) or "", Path(source)
    if not origin.is_dir():
        origin = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"], **hub))
    origin = origin / subfolder
    with init_empty_weights():
        model = autoencoder_class.from_config(autoencoder_class.load_config(origin))
    foreign = [name for name in V2_BOOLEANS if model.config[name] != V2_ARCHITECTURE.get(name, False)]
    new = ("channel_counts", "token_counts", "num_latent_tokens", "causal")  # of which the layout does not tell
    foreign += [name for name in new if model.config[name]]
    if foreign:
        raise ValueError(f"{source} has no ViTok-v2 architecture: {', '.join(foreign)} differ.")
    _, files = read_index(origin, variant=None)
    check_shards(files, (), {})
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        state_dict |= load_file(file)
    state_dict = {name: tensor for name, tensor in state_dict.items() if ".to_qkv." not in name}  # a fused copy
    expected, found = ({name: x.shape for name, x in weights.items()} for weights in (model.state_dict(), state_dict))
    if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise ValueError(
            f"The weights of {source} do not fit its config: {len(different)} tensors are missing, unexpected "
            f"or of another shape ({', '.join(different[:5])}). Use the config that they were saved with."
        )
    state_dict = {name: tensor.to(dtype) for name, tensor in state_dict.items()}  # `None`: as it is
    for tower, tensors in to_vitok_v2(state_dict, model).items():
        save_file(tensors, folder / f"{tower}.safetensors")
