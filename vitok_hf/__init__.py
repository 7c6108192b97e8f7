"""ViTok, vision-transformer autoencoders for images and videos (arXiv 2501.09755), for diffusers."""

from .checkpoints import list_bundled
from .models import AutoencoderViTok


__version__ = "0.1.0"
__all__ = ["AutoencoderViTok", "list_bundled"]
