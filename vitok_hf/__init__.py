"""ViTok, vision-transformer autoencoders for images and videos (arXiv 2501.09755), for diffusers."""

import diffusers
from diffusers import ModelMixin  # noqa: F401, whose subclasses diffusers' loader looks for in a registered package
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .latents import compute_latent_statistics, denormalize_latents, normalize_latents
from .loading import list_bundled
from .models import AutoencoderViTok, ViTokDiTModel
from .pipelines import ViTokDiTPipeline


# Saved pipelines then name the package, not the file, and load from folders and from the Hub.
LOADABLE_CLASSES["vitok_hf"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
for _class in (AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline):
    setattr(diffusers, _class.__name__, _class)  # where `AutoModel` and `DiffusionPipeline` look for classes

__version__ = "0.1.0"
__all__ = [
    "AutoencoderViTok",
    "ViTokDiTModel",
    "ViTokDiTPipeline",
    "compute_latent_statistics",
    "denormalize_latents",
    "list_bundled",
    "normalize_latents",
]
