"""Published autoencoders that diffusers has, in their published configurations."""

import diffusers
from diffusers import ModelMixin


_SD = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3

# name -> class, what differs from its defaults
PEERS = {
    "SD-VAE": ("AutoencoderKL", _SD | {"sample_size": 512}),  # stabilityai/sd-vae-ft-mse
    "SDXL-VAE": ("AutoencoderKL", _SD | {"sample_size": 1024, "scaling_factor": 0.13025}),  # stabilityai/sdxl-vae
    "DC-AE f32c32": (  # mit-han-lab/dc-ae-f32c32-in-1.0-diffusers
        "AutoencoderDC",
        {
            "encoder_block_types": _DC_BLOCKS,
            "decoder_block_types": _DC_BLOCKS,
            "encoder_layers_per_block": (0, 4, 8, 2, 2, 2),
            "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
            "encoder_qkv_multiscales": ((),) * 6,
            "decoder_qkv_multiscales": ((),) * 6,
            "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
            "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
        },
    ),
    "Cosmos CV8x8x8": ("AutoencoderKLCosmos", {}),  # nvidia/Cosmos-1.0-Tokenizer-CV8x8x8
    "Wan 2.1": ("AutoencoderKLWan", {}),  # Wan-AI/Wan2.1-T2V-1.3B-Diffusers
}


def make_peer(name: str) -> ModelMixin:
    """The autoencoder of this name in `PEERS` with random weights, which cost the same as trained ones.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in PEERS:
        raise ValueError(f'There is no peer "{name}": choose from {", ".join(PEERS)}.')
    class_name, config = PEERS[name]
    return getattr(diffusers, class_name)(**config).eval()
