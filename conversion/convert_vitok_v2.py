"""Converts the author's ViTok-v2 weights to diffusers' layout, and back, bit for bit.

python -m conversion.convert_vitok_v2 philippehansen/ViTok-v2-350M-f16x64 ViTok-v2-350M-f16x64
python -m conversion.convert_vitok_v2 philippehansen/ViTok-v2-350M-f16x64 --dry_run
python -m conversion.convert_vitok_v2 --to_vitok_v2 ViTok-v2-350M-f16x64 original
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState, init_empty_weights
from huggingface_hub import HfApi, model_info, parse_safetensors_file_metadata, snapshot_download
from safetensors.torch import load_file, save_file

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import run_command
from vitok_hf.loading.strict import check_shards, read_header, read_index
from vitok_hf.loading.vitok_v2 import (
    TOWERS,
    check_headers,
    empty_vitok_v2,
    fetch_vitok_v2,
    key_plan,
    load_vitok_v2,
    to_vitok_v2,
)
from vitok_hf.presets import V2_ARCHITECTURE
from vitok_hf.training.checkpointing import atomic_folder


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("output_dir", type=Path, nargs="?", help="a folder that does not exist yet")
    parser.add_argument("--variant", help="the architecture, if the name of the source does not tell")
    parser.add_argument("--subfolder")
    parser.add_argument("--revision")
    parser.add_argument("--token")
    parser.add_argument("--cache_dir")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--license", help="for the model card, if the source does not state it")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the result to this repository as well")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, check the shapes, read no weights")
    parser.add_argument("--to_vitok_v2", action="store_true", help="diffusers' layout -> the author's two files")
    args = parser.parse_args(argv)
    hub = {key: getattr(args, key) for key in ("subfolder", "revision", "token", "cache_dir")}
    if args.dry_run:
        print_plan(args, hub)
        return
    if args.output_dir is None:
        raise ValueError("Give the folder to write to, or --dry_run.")
    if args.output_dir.exists():
        raise ValueError(f"{args.output_dir} exists already: name a folder that does not.")
    with atomic_folder(args.output_dir, PartialState()) as folder:
        (write_vitok_v2 if args.to_vitok_v2 else write_diffusers)(args, hub, folder)
    print(f"Saved {args.output_dir}")
    if args.push_to_hub:
        api = HfApi(token=args.token)
        api.create_repo(args.push_to_hub, exist_ok=True)
        print(api.upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir))


def print_plan(args: argparse.Namespace, hub: dict[str, str | None]) -> None:
    """The author's tensors, their shapes and the parameters that they become; `ValueError` for what does not fit."""
    if os.path.isdir(args.source):
        headers = {tower: read_header(path) for tower, path in fetch_vitok_v2(args.source, TOWERS, **hub).items()}
    else:
        prefix = f"{args.subfolder}/" if args.subfolder else ""
        headers = {}
        for tower in TOWERS:
            metadata = parse_safetensors_file_metadata(
                args.source, f"{prefix}{tower}.safetensors", revision=args.revision, token=args.token
            )
            headers[tower] = {key: tuple(info.shape) for key, info in metadata.tensors.items()}
    model = empty_vitok_v2(AutoencoderViTok, args.source, headers, args.variant, args.subfolder)
    for (tower, key), names in key_plan(model).items():
        print(f"{tower}.safetensors  {key} {headers[tower].get(key, 'missing')}  ->  {', '.join(names)}")
    check_headers(model, headers, args.source)
    print(f"All {sum(map(len, headers.values()))} tensors fit; {model.num_parameters() / 1e6:.1f} M parameters.")


def write_diffusers(args: argparse.Namespace, hub: dict[str, str | None], folder: Path) -> None:
    """config.json, sharded weights and a model card from the author's files."""
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    vae = load_vitok_v2(AutoencoderViTok, args.source, args.variant, torch_dtype=dtype, **hub)
    vae.register_to_config(_name_or_path=args.output_dir.name)
    vae.save_pretrained(folder, max_shard_size=args.max_shard_size)
    is_folder = os.path.isdir(args.source)
    licence = args.license or (None if is_folder else source_licence(args.source, args.revision, args.token))
    note = f"The source states the licence of the weights as `{licence}`." if licence else "The source states none."
    card = MODEL_CARD.format(
        title=args.push_to_hub or args.output_dir.name,
        license=licence or "unknown",
        license_note=note,
        source=Path(args.source).name if is_folder else args.source,
        link="https://github.com/Na-VAE/vitok-release" if is_folder else f"https://huggingface.co/{args.source}",
        base_model="" if is_folder else f"base_model: {args.source}\n",
        dtype="they were not changed" if args.dtype == "auto" else f"stored as {args.dtype}",
        channels=vae.config.latent_channels,
        patch_size=vae.config.patch_size,
    )
    (folder / "README.md").write_text(card)


def source_licence(repository: str, revision: str | None, token: str | None) -> str | None:
    card = model_info(repository, revision=revision, token=token).card_data
    return card.get("license") if card else None


def write_vitok_v2(args: argparse.Namespace, hub: dict[str, str | None], folder: Path) -> None:
    """encoder.safetensors and decoder.safetensors, in the dtype of the source unless `--dtype` says otherwise."""
    source, patterns = Path(args.source), ["config.json", "*.safetensors", "*.json"]
    if not source.is_dir():
        options = {key: hub[key] for key in ("revision", "token", "cache_dir")}
        source = Path(snapshot_download(args.source, allow_patterns=patterns, **options))
    source = source / (args.subfolder or "")
    with init_empty_weights():
        model = AutoencoderViTok.from_config(AutoencoderViTok.load_config(source))
    foreign = [name for name in V2_BOOLEANS if model.config[name] != V2_ARCHITECTURE.get(name, False)]
    if foreign:
        raise ValueError(f"{args.source} has no ViTok-v2 architecture: {', '.join(foreign)} differ.")
    _, files = read_index(source, variant=None)
    check_shards(files, (), {})
    state_dict = {}
    for file in files:
        state_dict |= load_file(file)
    state_dict = {name: tensor for name, tensor in state_dict.items() if ".to_qkv." not in name}  # a fused copy
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state_dict.items()}
    if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise ValueError(
            f"The weights of {args.source} do not fit its config: {len(different)} tensors are missing, unexpected "
            f"or of another shape ({', '.join(different[:5])}). Use the config that they were saved with."
        )
    if args.dtype != "auto":
        state_dict = {name: tensor.to(getattr(torch, args.dtype)) for name, tensor in state_dict.items()}
    for tower, tensors in to_vitok_v2(state_dict, model).items():
        save_file(tensors, folder / f"{tower}.safetensors")


if __name__ == "__main__":
    run_command(main)
