from .pipeline_vitok_dit import ViTokDiTPipeline, ViTokVideoPipelineOutput


__all__ = ["ViTokDiTPipeline", "ViTokVideoPipelineOutput"]
