"""ViTok, vision-transformer autoencoders for images and videos (arXiv 2501.09755), for diffusers."""

import sys
from importlib import import_module
from pathlib import Path


__version__ = "0.2.0"
__all__ = [
    "AutoencoderViTok",
    "ViTokDiTModel",
    "ViTokDiTPipeline",
    "compute_latent_statistics",
    "denormalize_latents",
    "list_bundled",
    "normalize_latents",
]

# Whoever imports the package registers its classes with diffusers. Only the program `vitok` (its script or `python -m
# vitok_hf.commands`, also under `accelerate launch`) does so after the arguments are parsed: `--help` must be quick.
# Its names are there on first use. A process of workers that looks like another program imports all at once, too.
if Path(sys.argv[0]).name in ("vitok", "vitok.exe") or "vitok_hf.commands" in sys.orig_argv:

    def __getattr__(name: str):
        if name in (*__all__, "ModelMixin"):
            return getattr(import_module("vitok_hf.public"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    from .public import (
        AutoencoderViTok,
        ModelMixin,  # noqa: F401, whose subclasses diffusers' loader looks for in a registered package
        ViTokDiTModel,
        ViTokDiTPipeline,
        compute_latent_statistics,
        denormalize_latents,
        list_bundled,
        normalize_latents,
    )
