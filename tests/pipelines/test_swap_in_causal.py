"""Causal models, q = 4, as `vae=` of diffusers' own video pipelines: with the numbers of frames that these document.

LTX's are of q = 8, hence of q = 4 too. Pictures that a video starts with go in alone (LTX, CogVideoX, HunyuanVideo) or
with grey frames after them (Wan, SkyReelsV2).
"""

import json
from functools import partial

import pytest
import torch

from tests.conftest import assert_close
from tests.pipelines.test_swap_in import COGVIDEOX, GRID, LTX, STATISTICS, TOKENS, WIDTH, C, Case, make_pipeline, run
from tests.pipelines.test_swap_in import reload as reload_pipeline


CAUSAL = {"temporal_patch_size": 4, "sample_frames": 17, "causal": True}
FACTORS = {"scaling_factor": 0.5}
WAN = partial(Case, "WanTransformer3DModel", vae=STATISTICS)
HUNYUAN = partial(Case, "HunyuanVideoTransformer3DModel", vae=FACTORS)
HEADS = {"attention_head_dim": 12}
WITH_PICTURE = HEADS | {"in_channels": 2 * C + 4}  # and a mask of q channels
ROPE = {"rope_axes_dim": (2, 2, 4), "num_refiner_layers": 1}
# By the name of the pipeline: `frames` are those to ask for, and those that the autoencoder encodes in a call.
CASES = {
    "LTXPipeline": LTX(vae=STATISTICS, frames=(161, 0)),
    "LTXImageToVideoPipeline": LTX(vae=STATISTICS, frames=(161, 1)),
    "WanPipeline": WAN(HEADS, frames=(81, 0)),
    "WanImageToVideoPipeline": WAN(WITH_PICTURE, frames=(81, 81)),
    "WanVideoToVideoPipeline": WAN(HEADS, frames=(81, 81)),
    "SkyReelsV2Pipeline": Case("SkyReelsV2Transformer3DModel", HEADS, vae=STATISTICS, frames=(97, 0)),
    "SkyReelsV2ImageToVideoPipeline": Case(
        "SkyReelsV2Transformer3DModel", WITH_PICTURE | {"image_dim": WIDTH}, vae=STATISTICS, frames=(97, 97)
    ),
    "CogVideoXPipeline": COGVIDEOX({"sample_frames": 49}, vae=FACTORS, frames=(49, 0)),
    "CogVideoXImageToVideoPipeline": COGVIDEOX(
        {"sample_frames": 49, "in_channels": 2 * C}, vae=FACTORS, frames=(49, 1)
    ),
    "CogVideoXVideoToVideoPipeline": COGVIDEOX({"sample_frames": 49}, vae=FACTORS, frames=(49, 49)),
    "HunyuanVideoPipeline": HUNYUAN(ROPE, frames=(61, 0)),
    "HunyuanSkyreelsImageToVideoPipeline": HUNYUAN(ROPE | {"in_channels": 2 * C}, frames=(97, 1)),
}


def make(name: str):
    case = CASES[name]
    pipe = make_pipeline(name, case=case, **CAUSAL)
    if (
        name == "SkyReelsV2ImageToVideoPipeline"
    ):  # which has a CLIP for the picture, and takes no embedding in its place
        pipe.encode_image = lambda image, device: torch.ones(1, TOKENS, WIDTH)
    return pipe, case


@pytest.mark.parametrize("name", CASES)
def test_output_has_the_documented_number_of_frames(name, monkeypatch):
    (pipe, case), encoded = make(name), []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: encoded.append(x) or encode(x))
    output = run(pipe, case)
    assert output.shape == (1, case.frames[0], 3, GRID * 8, GRID * 8)
    assert output.isfinite().all() and output.std() > 0
    assert [x.shape[2] for x in encoded] == [case.frames[1]] * (case.frames[1] > 0)
    for x in encoded:  # the picture is red
        assert_close(x[0, :, 0, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("name", ["WanImageToVideoPipeline", "LTXImageToVideoPipeline"])
def test_reloads_from_a_folder(name, tmp_path):
    pipe, case = make(name)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["causal"] is True
    assert_close(run(reload_pipeline(pipe, tmp_path), case), run(pipe, case), atol=1e-5)


def test_the_picture_is_the_first_latent_frame_whatever_follows():
    vae = make("WanPipeline")[0].vae
    picture, rest = torch.rand(1, 3, 1, 64, 64) * 2 - 1, torch.zeros(1, 3, 80, 64, 64)
    with torch.no_grad():
        alone, first = (
            vae.encode(x).latent_dist.mode()[:, :, 0] for x in (picture, torch.cat([picture, rest], dim=2))
        )
    assert_close(alone, first)
