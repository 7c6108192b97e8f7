"""The author's ViTok-v2 weights: two safetensors files and no config, under other names than in this package.

Queries, keys and values are one matrix there, and the rotary pairs of a head are (2 i, 2 i + 1), here (i, i + d / 2).
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers.models.model_loading_utils import _determine_device_map
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import safe_open

from ..presets import V2_MLP_RATIO, V2_PATTERN, V2_REPOSITORIES, variant_to_config
from .strict import Header, check_values, read_header, reading, to_dtype


TOWERS = ("encoder", "decoder")
DEVICE_PLANS = ("auto", "balanced", "balanced_low_0", "sequential")  # other strings are devices
HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")

# Per tower: parts of a name here -> parts of a name there.
RENAMED = {
    "encoder": {"transformer_blocks.": "encoder_blocks.", "proj_in.": "patch_embed.", "proj_out.": "to_code."},
    "decoder": {"transformer_blocks.": "decoder_blocks.", "proj_in.": "decoder_embed.", "proj_out.": "to_pixels."},
}
RENAMED_IN_BLOCKS = {
    "attn.to_q.": "attn.qkv_proj.",
    "attn.to_k.": "attn.qkv_proj.",
    "attn.to_v.": "attn.qkv_proj.",
    "attn.to_out.0.": "attn.out_proj.",
    "ff.net.0.proj.": "ffn.fc1.",
    "ff.net.2.": "ffn.fc2.",
    "residual1.": "layer_scale.",
}


def author_name(name: str) -> tuple[str, str]:
    """A parameter's name here -> the tower and the tensor's name in that tower's file."""
    tower, name = name.split(".", 1)
    for here, there in (RENAMED[tower] | RENAMED_IN_BLOCKS).items():
        name = name.replace(here, there)
    return tower, name


def key_plan(model: ModelMixin) -> dict[tuple[str, str], list[str]]:
    """(tower, author's tensor) -> the parameters of `model` that it holds, one above the other."""
    plan: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in model.state_dict():
        plan[author_name(name)].append(name)
    return dict(plan)


def expected_headers(model: ModelMixin) -> dict[str, Header]:
    """The tensors of the author's files for the architecture of `model`: tower -> name -> shape."""
    parameters = model.state_dict()
    headers: dict[str, Header] = defaultdict(dict)
    for (tower, key), names in key_plan(model).items():
        shapes = [parameters[name].shape for name in names]
        headers[tower][key] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return dict(headers)


def rotary_groups(name: str, config: dict[str, Any]) -> int:
    """The number of heads whose rows rotary position embedding pairs up in this parameter; 0 where it does not."""
    if ".to_q." in name or ".to_k." in name:
        return config[f"{name.split('.')[0]}_num_attention_heads"]
    return 1 if ".norm_q." in name or ".norm_k." in name else 0


def to_half_split(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows in rotary pairs (2 i, 2 i + 1) of each group -> (i, i + d / 2)."""
    return weight.unflatten(0, (groups, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Inverse of `to_half_split`."""
    return weight.unflatten(0, (groups, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_vitok_v2(state_dict: dict[str, torch.Tensor], model: ModelMixin) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of this package's `model` -> the author's: tower -> name -> tensor, bit for bit."""
    towers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for (tower, key), names in key_plan(model).items():
        parts = []
        for name in names:
            groups = rotary_groups(name, model.config)
            parts.append(to_interleaved(state_dict[name], groups) if groups else state_dict[name])
        towers[tower][key] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return dict(towers)


def read_parameters(files: dict[str, Path], model: ModelMixin) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of `model`, one at a time, from the author's files."""
    for (tower, key), names in key_plan(model).items():
        # A file that stayed open would stay mapped, and count as a second copy of the weights.
        with safe_open(files[tower], framework="pt") as file:
            parts = file.get_tensor(key).chunk(len(names))
        for name, part in zip(names, parts):
            groups = rotary_groups(name, model.config)
            yield name, to_half_split(part, groups) if groups else part


def guess_variant(headers: dict[str, Header]) -> str | None:
    """The variant that the shapes in the headers suggest, with temporal patch size 1; `None` if they do not."""
    sizes = {}
    try:
        for tower, header in headers.items():
            width = header[f"{RENAMED[tower]['proj_in.']}weight"][0]
            head_dim = header[f"{tower}_blocks.0.attn.norm_q.weight"][0]
            mlp_ratio = header[f"{tower}_blocks.0.ffn.fc2.weight"][1] / width
            depth = len({key.split(".")[1] for key in header if key.startswith(f"{tower}_blocks.")})
            default = (int(V2_MLP_RATIO * width) + 8) // 16 * 16
            suffix = "" if round(mlp_ratio * width) == default else f"_m{mlp_ratio:g}"
            sizes[tower] = f"w{width}_d{depth}_h{width // head_dim}{suffix}"
        if "encoder" in headers:
            pixels, channels = headers["encoder"]["patch_embed.weight"][1], headers["encoder"]["to_code.weight"][0]
        else:
            pixels, channels = headers["decoder"]["to_pixels.weight"][0], headers["decoder"]["decoder_embed.weight"][1]
    except (KeyError, IndexError, ZeroDivisionError):  # they are of another architecture, or damaged
        return None
    some_size = next(iter(sizes.values()))
    towers = dict.fromkeys(sizes.get(tower, some_size) for tower in TOWERS)  # equal ones are named once
    return f"{'-'.join(towers)}/1x{round((pixels / 3) ** 0.5)}x{channels}"


def find_variant(name_or_path: str | os.PathLike, subfolder: str | None, headers: dict[str, Header]) -> str:
    """The variant by the name of the repository or folder. Raises `ValueError` if the name does not tell.

    The name, whole, of the folder, of its repository, or of the repository that a folder of the Hub's cache is of.
    """
    place = Path(name_or_path).absolute() if os.path.isdir(name_or_path) else Path(name_or_path)
    folders = (*place.parts[-3:], *Path(subfolder or "").parts)  # models--<owner>--<name>/snapshots/<revision>
    names = [name for folder in folders for name in folder.split("--") if name in V2_REPOSITORIES]
    if names:
        return V2_REPOSITORIES[names[-1]]
    guess = guess_variant(headers)
    raise ValueError(
        f'The architecture of the ViTok-v2 weights in "{name_or_path}" cannot be told from its name '
        f"(known: {', '.join(V2_REPOSITORIES)}): pass it, for instance "
        + (f'variant="{guess}", which the shapes suggest.' if guess else 'variant="Ld4-Ld24/1x16x64".')
    )


def is_vitok_v2(name_or_path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> bool:
    """Whether there is no config.json, but one of the author's files. Raises `OSError` without cache and network."""
    files = [f"{tower}.safetensors" for tower in TOWERS]
    if os.path.isdir(name_or_path):
        folder = Path(name_or_path, subfolder or "")
        return not (folder / "config.json").is_file() and any((folder / file).is_file() for file in files)
    repository = str(name_or_path)
    prefix = f"{subfolder}/" if subfolder else ""
    lookup = {key: hub_kwargs.get(key) for key in ("revision", "token")}
    try:
        hf_hub_download(repository, "config.json", subfolder=subfolder, **hub_kwargs)
    except LocalEntryNotFoundError as error:
        cache = {key: hub_kwargs.get(key) for key in ("cache_dir", "revision")}
        if any(isinstance(try_to_load_from_cache(repository, prefix + file, **cache), str) for file in files):
            return True
        raise OSError(
            f'"{repository}" is not in the cache, and the Hub could not be asked for it: {error} Connect (and unset '
            "HF_HUB_OFFLINE and local_files_only), or give a folder that exists."
        ) from error
    except EntryNotFoundError:
        return any(file_exists(repository, prefix + file, **lookup) for file in files)
    except GatedRepoError as error:
        raise OSError(
            f'Access to "{repository}" is restricted: accept the conditions on its page, and log in or pass `token`.'
        ) from error
    except (HfHubHTTPError, HFValidationError):
        return False  # diffusers says what is wrong with the repository, the revision or the token
    return False


def fetch_vitok_v2(
    name_or_path: str | os.PathLike, towers: Sequence[str], subfolder: str | None = None, **hub_kwargs: Any
) -> dict[str, Path]:
    """The author's files of `towers`, downloaded unless they are in a folder or in the cache."""
    files = {}
    for tower in towers:
        name = f"{tower}.safetensors"
        if os.path.isdir(name_or_path):
            files[tower] = Path(name_or_path, subfolder or "", name)
            exists = files[tower].is_file()
        else:
            try:
                files[tower] = Path(hf_hub_download(str(name_or_path), name, subfolder=subfolder, **hub_kwargs))
                exists = True
            except LocalEntryNotFoundError as error:
                raise OSError(
                    f'{name} of "{name_or_path}" is not in the cache, and the Hub could not be asked for it: {error}'
                ) from error
            except EntryNotFoundError:
                exists = False
            except Exception as error:  # of the HTTP client, which huggingface_hub has changed once
                raise OSError(
                    f'{name} of "{name_or_path}" could not be downloaded ({error!r}). Try again: files that '
                    "are complete are kept in the cache."
                ) from error
        if not exists:
            raise OSError(
                f'There is no {name} in "{name_or_path}": ViTok-v2 weights are encoder.safetensors and '
                'decoder.safetensors. component="encoder" or "decoder" loads one of them.'
            )
    return files


def empty_vitok_v2(
    model_class: type[ModelMixin],
    name_or_path: str | os.PathLike,
    headers: dict[str, Header],
    variant: str | None = None,
    subfolder: str | None = None,
) -> ModelMixin:
    """The model without weights (on the meta device) whose tensors the author's files should hold."""
    variant = variant or find_variant(name_or_path, subfolder, headers)
    if not V2_PATTERN.fullmatch(variant):
        raise ValueError(
            f'"{name_or_path}" holds the author\'s ViTok-v2 weights: `variant` must be their architecture '
            f'("Ld4-Ld24/1x16x64"), but is "{variant}".'
        )
    component = None if len(headers) == 2 else next(iter(headers))
    with init_empty_weights():
        return model_class(**variant_to_config(variant), component=component)


def load_vitok_v2(
    model_class: type[ModelMixin],
    name_or_path: str | os.PathLike,
    variant: str | None = None,
    component: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike | None = None,
    low_cpu_mem_usage: bool | None = None,
    use_safetensors: bool | None = None,
    output_loading_info: bool = False,
    check_finite: bool | None = None,
    **hub_kwargs: Any,
) -> ModelMixin:
    """Loads the author's weights: the model is built without memory, each tensor goes straight to its place and dtype.

    Args:
        model_class: `AutoencoderViTok`.
        name_or_path: Folder or Hub id.
        variant: Such as `"Ld4-Ld24/1x16x64"`; by default by the name of the repository or folder.
        component: `"encoder"` or `"decoder"` for that half alone.
        torch_dtype, dtype: Of the weights, by default float32; `"auto"` keeps that of the files.
        device_map, max_memory, offload_folder: As in diffusers.
        low_cpu_mem_usage, use_safetensors: As they are always set here; other values are refused.
        check_finite: See `load_strictly`.
        hub_kwargs: `HUB_ARGUMENTS`.

    Raises:
        ValueError: If a tensor is missing, unexpected, misshapen or not finite, a file is damaged, or the variant is
            unknown.
        OSError: If a file cannot be found or fetched.
    """
    hub_kwargs = {name: value for name, value in hub_kwargs.items() if name in HUB_ARGUMENTS or value}
    if unknown := sorted(set(hub_kwargs) - set(HUB_ARGUMENTS)):
        raise ValueError(
            f"{', '.join(unknown)}: not possible with ViTok-v2 weights in the author's layout. Load them without, "
            "write them by `save_pretrained`, and load the folder that it wrote."
        )
    if low_cpu_mem_usage is False or use_safetensors is False:
        raise ValueError("The author's ViTok-v2 weights are read with low_cpu_mem_usage and use_safetensors only.")
    dtype = dtype if dtype is not None else torch_dtype
    wanted = None if dtype == "auto" else to_dtype(dtype) or torch.get_default_dtype()
    if component not in (None, *TOWERS):
        raise ValueError(f'`component` must be "encoder", "decoder" or None (both), but is {component!r}.')
    files = fetch_vitok_v2(name_or_path, [component] if component else TOWERS, **hub_kwargs)
    headers = {tower: read_header(path) for tower, path in files.items()}
    model = empty_vitok_v2(model_class, name_or_path, headers, variant, hub_kwargs.get("subfolder"))
    check_headers(model, headers, name_or_path)

    if device_map is not None and not isinstance(device_map, dict) and device_map not in DEVICE_PLANS:
        device_map = {"": device_map}
    devices: dict[str, Any] | None = _determine_device_map(model, device_map, max_memory, wanted)
    for name, tensor in read_parameters(files, model):
        device = "cpu" if devices is None else find_device(name, devices)
        tensor = tensor.to(
            device="cpu" if device == "disk" else device,
            dtype=wanted,
            copy=not rotary_groups(name, model.config),  # the others are a copy already, not a view of the file
        )
        set_module_tensor_to_device(model, name, tensor.device, value=tensor, dtype=tensor.dtype)
    with reading(check_finite):
        check_values(model, name_or_path)
    if devices is not None:
        dispatch_model(model, device_map=devices, offload_dir=offload_folder)
    model.register_to_config(_name_or_path=str(name_or_path))
    model.eval()
    info: dict[str, list] = {key: [] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    return (model, info) if output_loading_info else model


def check_headers(model: ModelMixin, headers: dict[str, Header], name_or_path: str | os.PathLike) -> None:
    """Raises `ValueError` with all differences between the author's files and what `model` needs."""
    lines = []
    for tower, expected in expected_headers(model).items():
        found = headers[tower]
        differences = {key: f"missing, expected {shape}" for key, shape in expected.items() if key not in found}
        for key, shape in found.items():
            if shape != expected.get(key):
                differences[key] = (
                    f"expected {expected[key]}, found {shape}" if key in expected else f"unexpected, {shape}"
                )
        lines += [f"{tower}.safetensors, {key}: {difference}" for key, difference in differences.items()]
    if lines:
        guess = guess_variant(headers)
        raise ValueError(
            f'The weights in "{name_or_path}" are not of the variant that was asked for or that the name tells '
            f"({len(lines)} differences):\n"
            + "\n".join(lines[:10])
            + ("\n..." if lines[10:] else "")
            + (f'\nThe shapes suggest variant="{guess}".' if guess else "")
        )


def find_device(name: str, device_map: dict[str, Any]) -> Any:
    """The device of the innermost module in `device_map` around the parameter."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    if name not in device_map:
        raise ValueError(f'`device_map` has no device for every module: add an entry for "". It is {device_map}.')
    return device_map[name]
