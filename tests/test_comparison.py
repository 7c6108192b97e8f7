"""The table of features in docs/compare.md, each cell by running a tiny model of the class."""

import inspect
from collections.abc import Callable
from functools import cache, partial

import diffusers
import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from tests.conftest import ASSETS, TINY
from vitok_hf import AutoencoderViTok


SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 32}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
DC = {"latent_channels": 4, "attention_head_dim": 4}
DC |= {f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")}
DC |= {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
DC |= {f"{half}_block_types": ("ResBlock", "EfficientViTBlock") for half in ("encoder", "decoder")}
DC |= {f"{half}_qkv_multiscales": ((), (5,)) for half in ("encoder", "decoder")}
RAE = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 56, "patch_size": 8}
RAE |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
VIDTOK = {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "tempo_ds": [0], "tempo_us": [1]}
VIDTOK |= {"spatial_ds": [0, 1], "spatial_us": [1, 2]}
H3 = {"block_out_channels": (8,) * 6, "layers_per_block": 1, "norm_num_groups": 4, "decoder_num_layers": 1}
H3 |= {"decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16}
TAESD = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
TAESD |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
MODELS: dict[str, Callable] = {
    "ViTok": partial(AutoencoderViTok, **TINY),
    "KL": partial(diffusers.AutoencoderKL, **SMALL | BLOCKS),
    "DC": partial(diffusers.AutoencoderDC, **DC),
    "RAE": partial(diffusers.AutoencoderRAE, **RAE),
    "VidTok": partial(diffusers.AutoencoderVidTok, **VIDTOK),
    "MiniMax-H3": partial(diffusers.AutoencoderKLMiniMaxH3, **H3),
    "Tiny": partial(diffusers.AutoencoderTiny, **TAESD),
}
CLIPS = {"VidTok": 17, "MiniMax-H3": 22}  # frames that these take


@cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@torch.no_grad()
def run(name: str, *shape: int) -> tuple[int, ...] | str:
    """The shape of what comes back for pixels of this one, or the error's name."""
    try:
        return tuple(model(name)(torch.rand(shape)).sample.shape)
    except Exception as error:
        return type(error).__name__


def keeps(name: str, *shape: int) -> bool:
    return run(name, *shape) == shape


def sized(name: str, height: int, width: int) -> tuple[int, ...]:
    return (1, 3, *([CLIPS[name]] if name in CLIPS else []), height, width)


def misfit(name: str) -> str:
    """What becomes of 61 x 67 pixels."""
    shape = run(name, *sized(name, 61, 67))
    return f"`{shape}`" if isinstance(shape, str) else "{} x {}".format(*shape[-2:])


@torch.no_grad()
def takes_lists(name: str) -> bool:
    try:
        posterior = model(name).encode([torch.rand(3, 64, 64), torch.rand(3, 96, 64)]).latent_dist
        return [sample.shape[1:] for sample in model(name).decode(posterior.mode()).sample] == [(64, 64), (96, 64)]
    except AttributeError:
        return False


def switches(name: str, what: str) -> bool:
    vae = MODELS[name]()
    try:
        getattr(vae, f"enable_{what}")()
        return getattr(vae, f"use_{what}")
    except NotImplementedError:
        return False


def tiles_time(name: str) -> bool:
    return "tile_sample_min_frames" in inspect.signature(model(name).enable_tiling).parameters


@torch.no_grad()
def fuses(name: str) -> bool:
    vae = MODELS[name]()
    getattr(vae, "fuse_qkv_projections", lambda: None)()
    return any(".to_qkv." in name for name, _ in vae.named_parameters())


def changes_backend(name: str) -> bool:
    """Whether there are processors that `set_attention_backend` reaches."""
    modules = (module for module in model(name).modules() if isinstance(module, AttentionModuleMixin))
    return any(hasattr(module.processor, "_attention_backend") for module in modules)


def knows(*arguments: str) -> Callable[[str], bool]:
    return lambda name: {*arguments} <= {*inspect.signature(type(model(name)).__init__).parameters}


ROWS: dict[str, Callable[[str], bool | str]] = {
    "pictures, (B, 3, H, W)": lambda name: len(run(name, 1, 3, 64, 64)) == 4,
    "videos, (B, 3, T, H, W)": lambda name: keeps(name, 1, 3, CLIPS.get(name, 17), 64, 64),
    "other sizes than that of training": lambda name: keeps(name, *sized(name, 96, 64)),
    "61 x 67 pixels, which fit no patch, come back as": misfit,
    "a list of pictures of different sizes": takes_lists,
    "a posterior, to sample from": lambda name: hasattr(
        model(name).encode(torch.rand(sized(name, 64, 64))), "latent_dist"
    ),
    "causal in time, as an option": lambda name: knows("causal")(name) or knows("is_causal")(name),
    "streams of any length, with public methods": lambda name: hasattr(model(name), "encode_stream"),
    "slicing": lambda name: switches(name, "slicing"),
    "tiling": lambda name: switches(name, "tiling"),
    "tiling in time, with a size to set": tiles_time,
    "local attention": lambda name: hasattr(model(name), "enable_sliding_window"),
    "codes that can be cut": knows("channel_counts", "token_counts"),
    "encoder or decoder alone": knows("component"),
    "gradient checkpointing": lambda name: type(model(name))._supports_gradient_checkpointing,
    "LoRA adapters": lambda name: hasattr(model(name), "add_adapter"),
    "`set_attention_backend` has an effect": changes_backend,
    "`fuse_qkv_projections` has an effect": fuses,
    "`compile_repeated_blocks`": lambda name: bool(type(model(name))._repeated_blocks),
}


def table() -> list[list[str]]:
    """Of the page: without the line below the header."""
    lines = (ASSETS.parents[1] / "docs" / "compare.md").read_text().split("## Feature by feature")[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 2 + len(ROWS)]]
    return cells[:1] + cells[2:]


def test_all_rows_are_there():
    (_, *names), *rows = table()
    assert names == [*MODELS]
    assert [row[0] for row in rows] == [*ROWS]


@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    cells = next(cells[1:] for cells in table() if cells[0] == row)
    found = [ROWS[row](name) for name in MODELS]
    assert cells == [cell if isinstance(cell, str) else "yes" if cell else "no" for cell in found]
