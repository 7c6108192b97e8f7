from .autoencoder_vitok import AutoencoderViTok


__all__ = ["AutoencoderViTok"]
