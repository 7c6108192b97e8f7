"""`AutoencoderViTok` as `vae=` of diffusers' own pipelines, with tiny random denoisers and no text.

Of the pipelines that read the same of a VAE, one is kept, if possible one that reads more:

| kept | reads | stands for |
|---|---|---|
| DiT | scaling_factor, no size | Lumina (p = 8) |
| StableDiffusionInpaint | block_out_channels, latent_channels; encodes | StableDiffusion (text, image to image), PixArtAlpha, PixArtSigma, HunyuanDiT (p = 8), CogView4 |
| StableDiffusionXLInpaint | also force_upcast, latents_mean, latents_std of the config | StableDiffusionXL (text, image to image), AuraFlow |
| FluxInpaint | also shift_factor | Flux, StableDiffusion3 (text, image to image both), Chroma, ZImage, Lumina2 (p = 8), PRX |
| Flux2 | bn, batch_norm_eps | Flux2Klein |
| Sana | encoder_block_out_channels | |
| QwenImageImg2Img | temperal_downsample, z_dim; encodes and decodes pictures as clips | QwenImage |
| Latte | the arguments of forward; decodes frames | |
| LTX | attributes: compression ratios, latents_mean, latents_std; timestep_conditioning; decodes with a timestep | HunyuanVideo, EasyAnimate |
| LTXImageToVideo | the same; encodes one frame | |
| Wan | scale_factor_spatial, scale_factor_temporal | |
| WanVideoToVideo | temperal_downsample with time; encodes clips | SkyReelsV2 |
| CogVideoXVideoToVideo | temporal_compression_ratio of the config; encodes clips | CogVideoX |
| CogVideoXImageToVideo | invert_scale_latents; encodes one frame | |
| Mochi | latents_mean where there is one; q = 6, p = 8 | |
| Kandinsky5T2V | spatial_compression_ratio of the config | HunyuanImage |
"""  # noqa: E501

import inspect
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from PIL import Image

from tests.conftest import TINY, assert_close
from vitok_hf import AutoencoderViTok


C, GRID = 4, 8  # channels and side of the latents
TOKENS, WIDTH = 8, 16  # of the embedded text
STATISTICS = {"latents_mean": [0.5, -0.5, 1.0, 0.0], "latents_std": [2.0, 0.5, 1.0, 1.5]}
VIDEO = STATISTICS | {"temporal_patch_size": 4, "sample_frames": 8}
NO_COMPRESSION_OF_TIME = STATISTICS | {"temporal_patch_size": 1, "sample_frames": 8}
WIDTHS = (
    "caption_channels cross_attention_dim ffn_dim freq_dim in_text_dim in_text_dim2 joint_attention_dim text_dim "
    "pooled_projection_dim text_embed_dim time_dim time_embed_dim timestep_guidance_channels"
)
# Small values for whatever a denoiser's constructor takes.
DENOISER = (
    dict.fromkeys(WIDTHS.split(), WIDTH)
    | dict.fromkeys(("in_channels", "out_channels", "in_visual_dim", "out_visual_dim"), C)
    | dict.fromkeys(("sample_size", "sample_height", "sample_width"), GRID)
    | dict.fromkeys(("num_attention_heads", "num_cross_attention_heads"), 2)
    | dict.fromkeys(("attention_head_dim", "cross_attention_head_dim", "max_sequence_length"), 8)
    | dict.fromkeys(("num_layers", "num_single_layers", "layers_per_block"), 1)
    | {"max_text_seq_length": TOKENS, "norm_num_groups": 4, "rope_max_seq_len": 32}
)
# Values for whatever a pipeline's call takes.
CALL = (
    dict.fromkeys(("prompt_embeds", "prompt_embeds_qwen"), torch.ones(1, TOKENS, WIDTH))
    | dict.fromkeys(("pooled_prompt_embeds", "prompt_embeds_clip"), torch.ones(1, WIDTH))
    | dict.fromkeys(("prompt_attention_mask", "prompt_embeds_mask"), torch.ones(1, TOKENS, dtype=torch.bool))
    | {"class_labels": [1], "guidance_scale": 1.0, "true_cfg_scale": 1.0, "strength": 0.5, "num_inference_steps": 2}
    | {"use_resolution_binning": False, "output_type": "pt"}
)
DDIM = partial(DDIMScheduler, steps_offset=1, clip_sample=False)


@dataclass
class Case:
    """A denoiser and what differs from `DENOISER` and `CALL`; `frames` are those to ask for and those to expect."""

    denoiser: str
    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable = FlowMatchEulerDiscreteScheduler
    frames: tuple[int, int] | None = None
    patch_sizes: tuple[int, ...] = (8, 32)


UNET = {
    "num_attention_heads": None,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
XL |= {"projection_class_embeddings_input_dim": 6 * 8 + WIDTH}
FLUX = {"in_channels": 4 * C, "out_channels": 4 * C, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
LTX = partial(Case, "LTXVideoTransformer3DModel")
WAN = partial(Case, "WanTransformer3DModel", {"attention_head_dim": 12}, vae=VIDEO)
COGVIDEOX = partial(Case, "CogVideoXTransformer3DModel", scheduler=DDIM)
CASES = {
    "DiTPipeline": Case("DiTTransformer2DModel", scheduler=DDIM),
    "StableDiffusionInpaintPipeline": Case("UNet2DConditionModel", UNET, scheduler=DDIM),
    "StableDiffusionXLInpaintPipeline": Case("UNet2DConditionModel", UNET | XL, vae=STATISTICS, scheduler=DDIM),
    "FluxInpaintPipeline": Case("FluxTransformer2DModel", FLUX),
    "Flux2Pipeline": Case("Flux2Transformer2DModel", FLUX | {"axes_dims_rope": (4, 4, 4, 4)}, vae=STATISTICS),
    "SanaPipeline": Case("SanaTransformer2DModel"),
    "QwenImageImg2ImgPipeline": Case("QwenImageTransformer2DModel", FLUX | {"out_channels": C}, vae=STATISTICS),
    "LattePipeline": Case(
        "LatteTransformer3DModel",
        {"out_channels": 2 * C, "patch_size": 2, "video_length": 2, "norm_type": "ada_norm_single"}
        | {"num_embeds_ada_norm": 1000},
        {"mask_feature": False, "video_length": 2},
        scheduler=DDIM,
        frames=(2, 2),
    ),
    "LTXPipeline": LTX(vae=VIDEO, frames=(8, 8)),
    "LTXImageToVideoPipeline": LTX(vae=NO_COMPRESSION_OF_TIME, frames=(5, 5)),
    "WanPipeline": WAN(frames=(5, 8)),
    "WanVideoToVideoPipeline": WAN(frames=(8, 8)),
    "CogVideoXVideoToVideoPipeline": COGVIDEOX({"sample_frames": 5}, vae=VIDEO, frames=(8, 8)),
    "CogVideoXImageToVideoPipeline": COGVIDEOX({"in_channels": 2 * C}, vae=NO_COMPRESSION_OF_TIME, frames=(5, 5)),
    "MochiPipeline": Case(
        "MochiTransformer3DModel",
        vae={"temporal_patch_size": 6, "sample_frames": 12},
        frames=(12, 12),
        patch_sizes=(8,),
    ),
    "Kandinsky5T2VPipeline": Case(
        "Kandinsky5Transformer3DModel",
        {"model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 4, 8)},
        {"prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32)},
        vae=VIDEO,
        frames=(5, 8),
    ),
}


def known(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def make_pipeline(name: str, patch_size: int = 8, case: Case | None = None, **vae: Any) -> DiffusionPipeline:
    case, pipeline = case or CASES[name], getattr(diffusers, name)
    torch.manual_seed(0)
    parameters = list(inspect.signature(pipeline.__init__).parameters.values())[1:]
    components = {parameter.name: None for parameter in parameters if parameter.default is inspect.Parameter.empty}
    denoiser = getattr(diffusers, case.denoiser)
    components["unet" if "unet" in components else "transformer"] = denoiser(
        **known(denoiser.__init__, DENOISER) | case.config
    ).eval()
    components["vae"] = AutoencoderViTok(**TINY | {"patch_size": patch_size} | case.vae | vae).eval()
    components["scheduler"] = case.scheduler()
    pipe = pipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: DiffusionPipeline, case: Case | None = None) -> torch.Tensor:
    case, size = case or CASES[type(pipe).__name__], GRID * pipe.vae.config.patch_size
    picture, mask = Image.new("RGB", (size, size), "red"), Image.new("L", (size, size), 255)
    inputs = {"height": size, "width": size, "image": picture, "mask_image": mask}
    if case.frames is not None:
        inputs |= {"num_frames": case.frames[0], "video": [picture] * case.frames[0]}
    call = CALL | inputs | case.call | {"generator": torch.Generator().manual_seed(0)}
    output = pipe(**known(pipe.__call__, call), return_dict=False)[0]
    return output if torch.is_tensor(output) else torch.from_numpy(output).movedim(-1, 1)  # DiT's has been an array


def reload(pipe: DiffusionPipeline, source: Path | str) -> DiffusionPipeline:
    missing = {name: None for name, component in pipe.components.items() if component is None}
    reloaded = DiffusionPipeline.from_pretrained(source, **missing)
    reloaded.set_progress_bar_config(disable=True)
    return reloaded


class TestPipelines:
    @pytest.mark.parametrize(
        ("name", "patch_size"), [(name, patch_size) for name, case in CASES.items() for patch_size in case.patch_sizes]
    )
    def test_output_has_the_requested_size(self, name, patch_size):
        output, frames = run(make_pipeline(name, patch_size)), CASES[name].frames
        size = GRID * patch_size
        assert output.shape == (1, *(() if frames is None else (frames[1],)), 3, size, size)
        assert output.isfinite().all()
        assert output.std() > 0

    @pytest.mark.parametrize("name", CASES)
    def test_reloads_from_a_folder(self, name, tmp_path):
        pipe = make_pipeline(name)
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["vitok_hf", "AutoencoderViTok"]
        assert_close(run(reload(pipe, tmp_path)), run(pipe), atol=1e-5)


class TestLoading:
    def test_from_a_hub_id(self, hub):
        pipe = make_pipeline("DiTPipeline")
        pipe.save_pretrained(hub.root / "owner" / "name")
        assert_close(run(reload(pipe, "owner/name")), run(pipe), atol=1e-5)

    def test_the_decoder_alone_suffices_to_generate(self):
        assert run(make_pipeline("DiTPipeline", component="decoder")).isfinite().all()

    def test_pickle(self):
        vae = make_pipeline("DiTPipeline").vae
        unpickled = pickle.loads(pickle.dumps(vae))
        assert unpickled.config == vae.config
        assert unpickled.config.z_dim == C

    def test_from_pipe_takes_the_vae_by_name(self):
        pipe = make_pipeline("StableDiffusionInpaintPipeline")
        assert diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae).vae is pipe.vae


class TestLimits:
    def test_a_single_frame_does_not_fill_a_tubelet(self):
        with pytest.raises(ValueError, match="multiple of temporal_patch_size=4, but is 1"):
            run(make_pipeline("LTXImageToVideoPipeline", **VIDEO))

    @pytest.mark.parametrize(("p", "q"), [(12, 4), (8, 6), (8, 16)])
    def test_halvings_cannot_be_counted(self, p, q):
        config = AutoencoderViTok(**TINY | VIDEO | {"patch_size": p, "temporal_patch_size": q}).config
        assert (config.scale_factor_spatial, config.scale_factor_temporal) == (p, q)
        with pytest.raises(AttributeError, match="no power of 2|exceeds"):
            _ = config.temperal_downsample

    def test_no_timestep(self):
        with pytest.raises(ValueError, match="`timestep` must be None"):
            make_pipeline("DiTPipeline").vae.decode(torch.zeros(1, C, 2, 2), torch.zeros(1))


class TestStatistics:
    def test_identity_without(self):
        vae = make_pipeline("DiTPipeline").vae
        assert torch.equal(vae.latents_mean, torch.zeros(C)) and torch.equal(vae.latents_std, torch.ones(C))

    def test_order_over_two_by_two_latents(self):
        vae = make_pipeline("Flux2Pipeline").vae
        for values, buffer in ((vae.latents_mean, vae.bn.running_mean), (vae.latents_std, vae.bn.running_var.sqrt())):
            latents = values.view(1, C, 1, 1).expand(1, C, 2, 2)
            torch.testing.assert_close(Flux2Pipeline._patchify_latents(latents).flatten(), buffer)
