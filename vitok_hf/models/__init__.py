from .autoencoder_vitok import AutoencoderViTok
from .transformer_vitok_dit import ViTokDiTModel


__all__ = ["AutoencoderViTok", "ViTokDiTModel"]
