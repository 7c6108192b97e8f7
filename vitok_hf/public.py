"""The public names, and what diffusers has to know of them."""

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .latents import compute_latent_statistics, denormalize_latents, normalize_latents
from .loading import list_bundled
from .models import AutoencoderViTok, ViTokDiTModel
from .pipelines import ViTokDiTPipeline


__all__ = ["AutoencoderViTok", "ModelMixin", "ViTokDiTModel", "ViTokDiTPipeline", "list_bundled"]
__all__ += ["compute_latent_statistics", "denormalize_latents", "normalize_latents"]

# Saved pipelines then name the package, not the file, and load from folders and from the Hub.
LOADABLE_CLASSES["vitok_hf"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
for _class in (AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline):
    setattr(diffusers, _class.__name__, _class)  # where `AutoModel` and `DiffusionPipeline` look for classes
