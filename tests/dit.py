"""Tiny pipelines that generate noise, and ways to look at what they do."""

import torch
from diffusers import DDIMScheduler
from torch import nn

from tests.conftest import TINY as VAE
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline


NULL = 5  # the class that stands for none
TRANSFORMER = {"sample_size": 4, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
TRANSFORMER |= {"num_classes": NULL}
STATISTICS = {"latents_mean": [0.5, -0.5, 1.0, 0.0], "latents_std": [2.0, 0.5, 1.0, 1.5], "scaling_factor": 0.7}
ID2LABEL = {0: "cat", 1: "golden retriever, retriever", 2: "crane", 3: "crane, lifting device", 4: "dog"}


def make_transformer(**config):
    """With random weights everywhere, because untrained models are zero."""
    torch.manual_seed(0)
    model = ViTokDiTModel(**config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def make_pipeline(kind="image", scheduler=None, id2label=ID2LABEL, guidance=None, **config):
    transformer_config, vae_config = TRANSFORMER, VAE | STATISTICS
    if kind == "video":
        transformer_config = TRANSFORMER | {"sample_frames": 2}
        vae_config = vae_config | {"temporal_patch_size": 2, "sample_frames": 4}
    transformer = make_transformer(**transformer_config | config)
    vae = AutoencoderViTok(**vae_config).eval()
    pipe = ViTokDiTPipeline(
        transformer, vae, scheduler or DDIMScheduler(clip_sample=False), id2label, **guidance or {}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def sample(pipe, labels=("cat", "dog"), **arguments):
    """Latents of four steps."""
    labels = list(labels) if isinstance(labels, tuple) else labels
    arguments = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 4} | arguments
    return pipe(labels, output_type="latent", return_dict=False, **arguments)[0]


def record_batches(pipe):
    """What the transformer is called with from now on: the labels of each batch."""
    batches = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    return batches
