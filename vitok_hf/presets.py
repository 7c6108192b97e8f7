"""Names of published models -> constructor arguments of `AutoencoderViTok` and `ViTokDiTModel`."""

import math
import re
from typing import Any

from .checks import refuse


Size = tuple[int, int, int]  # hidden size, number of layers, number of attention heads

V1_SIZES = {"S": (768, 6, 12), "B": (768, 12, 12), "L": (1152, 24, 16)}
V2_SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "G": (1728, 32, 24), "T": (3072, 40, 24), "E": (4096, 48, 32)}

# The same of the diffusion transformers in the DiT paper (arXiv 2212.09748, table 1).
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

# What sets the v2 architecture apart from v1, the constructor's default.
V2_ARCHITECTURE = {
    "parallel_blocks": True,
    "qk_norm": True,
    "layer_scale_init": 1e-4,
    "final_norm": False,
    "latent_norm": True,
    "variational": False,
}
V2_MLP_RATIO = 2.67

# The published repositories, whose names stand for the variants.
V2_REPOSITORIES = {
    f"ViTok-v2-{size}-f{patch_size}x{channels}": f"{towers}/1x{patch_size}x{channels}"
    for size, towers, patch_size, all_channels in (
        ("350M", "Ld4-Ld24", 16, (16, 32, 64)),
        ("5B", "Td4-T", 16, (16, 32, 64)),
        ("5B", "Td4-T", 32, (64, 128, 256)),
    )
    for channels in all_channels
}

V1_PATTERN = re.compile(r"([A-Z])-([A-Z])/(?:(\d+)x)?(\d+)", re.ASCII)
V2_PATTERN = re.compile(r"([A-Za-z0-9_.]+)(?:-([A-Za-z0-9_.]+))?/(\d+)x(\d+)x(\d+)", re.ASCII)
V2_SIZE_PATTERN = re.compile(r"([A-Z]?)((?:_?[wdhm][0-9.]+)*)")

HELP = (
    f'known names are "ENC-DEC/p" or "ENC-DEC/qxp" with sizes {", ".join(V1_SIZES)} (the paper, "S-B/16"), and '
    f'"ENC-DEC/qxpxc" with sizes {", ".join(V2_SIZES)}, an optional depth, width, heads or MLP ratio after the '
    'letter, or all spelled out (v2, "Ld4-Ld24/1x16x64", "w64_d2_h4-w96_d3_h4/1x8x16"), where one size, as '
    '"B/1x16x64", is that of both towers.'
)


# More than anyone has trained, and few enough that a typing error is refused and not built.
LARGEST = {"w": 2**17, "d": 2**10, "h": 2**10, "m": 2**6, "patch size": 2**10, "channels": 2**14}


def _read(text: str, kind: str, variant: str) -> Any:
    """A number of a name: a fraction for MLP ratios (m), else a whole one."""
    try:
        number = (float if kind == "m" else int)(text) if len(text) < 20 else math.inf
    except ValueError as error:
        raise ValueError(f'Variant "{variant}" has a number that cannot be read, {kind} "{text}".') from error
    if not 0 < number <= LARGEST[kind]:
        raise ValueError(
            f'Variant "{variant[:80]}" has {kind} {text[:20]}, which must be from 1 to {LARGEST[kind]}: {HELP}'
        )
    return number


def _check_type(variant: Any, example: str) -> None:
    if not isinstance(variant, str):
        refuse("variant", f'a name, such as "{example}"', variant)


def _parse_v2_size(size: str, variant: str) -> tuple[Size, float]:
    """Hidden size, layers and heads; and the MLP ratio."""
    match = V2_SIZE_PATTERN.fullmatch(size)
    pairs = re.findall(r"([wdhm])([0-9.]+)", size)
    fields = dict(pairs)
    if (
        match is None
        or len(fields) < len(pairs)  # one twice
        or (match[1] and match[1] not in V2_SIZES)
        or (not match[1] and not {"w", "d", "h"} <= set(fields))
    ):
        raise ValueError(f'Unknown size "{size}" in variant "{variant}": {HELP}')
    numbers: dict[str, Any] = dict(zip("wdh", V2_SIZES.get(match[1], ()))) | {"m": V2_MLP_RATIO}
    numbers |= {kind: _read(text, kind, variant) for kind, text in pairs}
    return (numbers["w"], numbers["d"], numbers["h"]), numbers["m"]


def _tower(prefix: str, size: Size) -> dict[str, Any]:
    names = ("hidden_size", "num_layers", "num_attention_heads")
    return {prefix + name: value for name, value in zip(names, size)}


def dit_variant_to_config(variant: str) -> dict[str, Any]:
    """Constructor arguments of a `ViTokDiTModel` by its size in the DiT paper. Raises `ValueError` if unknown."""
    _check_type(variant, "XL")
    if variant not in DIT_SIZES:
        raise ValueError(
            f'Unknown variant "{variant[:80]}": the sizes are {", ".join(DIT_SIZES)}; pass `patch_size` and all '
            "else apart."
        )
    return _tower("", DIT_SIZES[variant])


def variant_to_config(variant: str, causal: bool = False) -> dict[str, Any]:
    """Constructor arguments of a variant: the paper's "S-B/16", "S-B/4x8" or v2's "Ld4-Ld24/1x16x64", "B/1x16x64".

    Names of the paper leave `latent_channels` open and have two sizes; of v2, one size is that of both towers. Clips
    of `causal` models have one frame more. Raises `ValueError` for an unknown name, or numbers that no model has.
    """
    _check_type(variant, "S-B/16")
    if match := V1_PATTERN.fullmatch(variant):
        encoder, decoder, temporal_patch_size, patch_size = match.groups()
        if encoder not in V1_SIZES or decoder not in V1_SIZES:
            raise ValueError(f'Unknown variant "{variant}": {HELP}')
        config = _tower("encoder_", V1_SIZES[encoder]) | _tower("decoder_", V1_SIZES[decoder])
        config["patch_size"] = _read(patch_size, "patch size", variant)
        if temporal_patch_size is not None:  # the paper's videos are 16 x 128 x 128
            q = _read(temporal_patch_size, "patch size", variant)
            frames = 16 + (1 - 16) % q if causal else 16  # the least from 16 on that fits: 17
            config |= {"temporal_patch_size": q, "sample_size": 128, "sample_frames": frames}
        return config
    if match := V2_PATTERN.fullmatch(variant):
        encoder, decoder, *numbers = match.groups()
        kinds = ("patch size", "patch size", "channels")
        q, p, latent_channels = (_read(number, kind, variant) for number, kind in zip(numbers, kinds))
        encoder_size, encoder_mlp_ratio = _parse_v2_size(encoder, variant)
        decoder_size, decoder_mlp_ratio = _parse_v2_size(decoder or encoder, variant)
        if encoder_mlp_ratio != decoder_mlp_ratio:
            raise ValueError(
                f'Variant "{variant}" has MLP ratios {encoder_mlp_ratio} and {decoder_mlp_ratio}: '
                "encoder and decoder share one `mlp_ratio`."
            )
        config = _tower("encoder_", encoder_size) | _tower("decoder_", decoder_size) | V2_ARCHITECTURE
        config |= {"mlp_ratio": encoder_mlp_ratio, "temporal_patch_size": q}
        return config | {"patch_size": p, "latent_channels": latent_channels}
    raise ValueError(f'Unknown variant "{variant[:80]}": {HELP}')
