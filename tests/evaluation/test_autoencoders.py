"""Every class of diffusers that the tables name, tiny and random, from folders as they are saved."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCosmos,
    AutoencoderKLWan,
    AutoencoderRAE,
    AutoencoderTiny,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN, make_vae
from vitok_hf import AutoencoderViTok
from vitok_hf.clips import fold_frames, to_float, to_uint8
from vitok_hf.evaluation.autoencoders import fit_shape, load_autoencoder
from vitok_hf.evaluation.costs import count_macs, mean_costs
from vitok_hf.evaluation.reconstruction import reconstruct


MODELS = {
    "kl": lambda: AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "dc": lambda: AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ),
    "rae": lambda: AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        patch_size=4,
        encoder_input_size=56,
    ),
    "cosmos": lambda: AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    ),
    "wan": lambda: AutoencoderKLWan(
        base_dim=3, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ),
    "vitok": lambda: make_vae("v1"),
    "vitok-video": lambda: make_vae("video"),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    model.save_pretrained(tmp_path / "vae")
    return request.param, model, tmp_path


class TestLoad:
    @torch.no_grad()
    def test_gives_the_model_that_was_saved(self, saved):
        _, model, folder = saved
        loaded = load_autoencoder(folder, subfolder="vae")
        assert type(loaded) is type(model) and not loaded.training
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())

    def test_bundled_and_the_authors_layout(self):
        assert isinstance(load_autoencoder("vitok-tiny-f8x8", dtype=torch.bfloat16), AutoencoderViTok)
        loaded = load_autoencoder(GOLDEN, variant="w64_d2_h4-w96_d3_h4/1x8x16")
        assert loaded.config.latent_channels == 16

    def test_refuses_other_models_and_other_weights(self, tmp_path):
        UNet2DModel(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ).save_pretrained(tmp_path / "unet")
        (tmp_path / "svd").mkdir()
        (tmp_path / "svd" / "config.json").write_text('{"_class_name": "AutoencoderKLTemporalDecoder"}')
        with pytest.raises(ValueError, match="not supported: it encodes pictures and decodes videos"):
            load_autoencoder(tmp_path / "svd")
        with pytest.raises(ValueError, match="class UNet2DModel, which has no `encode` and `decode`"):
            load_autoencoder(tmp_path / "unet")
        MODELS["tiny"]().save_pretrained(tmp_path / "tiny")
        weights = tmp_path / "tiny" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        tensors.pop(next(iter(tensors)))
        save_file(tensors, weights)
        with pytest.raises(ValueError, match="1 tensors are missing"):
            load_autoencoder(tmp_path / "tiny")
        (tmp_path / "tiny" / "config.json").write_text(json.dumps({"_class_name": "NoSuchClass"}))
        with pytest.raises(ValueError, match="class NoSuchClass"):
            load_autoencoder(tmp_path / "tiny")


class TestReconstruct:
    # model -> shape that it takes for pictures of 30 x 28 and for clips of 4 such frames
    FITTED = {
        "kl": ((2, 3, 30, 28), (8, 3, 30, 28)),
        "tiny": ((2, 3, 30, 28), (8, 3, 30, 28)),
        "dc": ((2, 3, 30, 28), (8, 3, 30, 28)),
        "rae": ((2, 3, 16, 16), (8, 3, 16, 16)),
        "cosmos": ((2, 3, 1, 32, 32), (2, 3, 9, 32, 32)),
        "wan": ((2, 3, 1, 32, 32), (2, 3, 5, 32, 32)),
        "vitok": ((2, 3, 1, 32, 32), (2, 3, 4, 32, 32)),
        "vitok-video": ((2, 3, 2, 32, 32), (2, 3, 4, 32, 32)),
    }

    @torch.no_grad()
    def test_pictures_and_clips(self, saved):
        name, vae, _ = saved
        size = (16, 16) if name == "rae" else (30, 28)
        for shape, fitted in zip(((2, 3, 1, *size), (2, 3, 4, *size)), self.FITTED[name]):
            images = torch.randint(0, 256, shape, dtype=torch.uint8)
            assert fit_shape(vae, shape) == fitted
            reconstructions = reconstruct(vae, images)
            assert reconstructions.shape == shape and reconstructions.dtype == torch.uint8

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["kl", "tiny", "rae"])
    def test_decodes_the_mode_of_pixels_in_the_range_of_the_model(self, name):
        torch.manual_seed(0)
        vae = MODELS[name]().eval()
        images = torch.randint(0, 256, (2, 3, 1, 16, 16), dtype=torch.uint8)
        pixels = to_float(fold_frames(images))
        if name == "rae":
            expected = vae.decode(vae.encode((pixels + 1) / 2).latent).sample * 2 - 1
        elif name == "tiny":
            expected = vae.decode(vae.encode(pixels).latents).sample
        else:
            expected = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        assert torch.equal(fold_frames(reconstruct(vae, images)), to_uint8(expected))

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["kl", "rae", "vitok"])
    def test_latents_can_be_changed(self, name):
        vae = MODELS[name]().eval()
        images = torch.randint(0, 256, (2, 3, 1, 16, 16), dtype=torch.uint8)
        expected = reconstruct(vae, images, lambda latents: latents.flip(0)).flip(0)
        error = (expected.int() - reconstruct(vae, images).int()).abs()
        assert error.max() <= 1 and not torch.equal(expected[0], expected[1])

    def test_a_model_of_one_size_says_so(self):
        with pytest.raises(
            ValueError, match="AutoencoderRAE gives \\(1, 3, 16, 16\\) for .* bring the pictures to what it gives"
        ):
            reconstruct(MODELS["rae"](), torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8))


class TestCosts:
    LATENTS = {"kl": 4 * 256, "tiny": 4 * 256, "dc": 4 * 256, "rae": 64 * 16, "cosmos": 4 * 16, "wan": 4 * 16}

    @torch.no_grad()
    def test_counts(self, saved):
        name, vae, _ = saved
        costs = mean_costs(vae, {(3, 1, 32, 32): 1})
        assert costs["E"] == self.LATENTS.get(name, 4 * 16)  # a code of 4 x 4 x 4 for the others
        assert costs["compression"] == 3 * 32 * 32 / costs["E"] and costs["bytes"] == 2 * costs["E"]
        assert costs["parameters_M"] == sum(parameter.numel() for parameter in vae.parameters()) / 1e6
        assert costs["GMACs"] == count_macs(vae, fit_shape(vae, (1, 3, 1, 32, 32))) / 1e9 > 0

    def test_of_a_block(self):
        """A block of `AutoencoderTiny` has three convolutions with 9 products for each pair of channels of a pixel."""

        def count(blocks: int) -> int:
            model = AutoencoderTiny(
                encoder_block_out_channels=(8,),
                decoder_block_out_channels=(8,),
                num_encoder_blocks=(blocks,),
                num_decoder_blocks=(1,),
            )
            return count_macs(model, (1, 3, 32, 32))

        assert count(2) - count(1) == 3 * 9 * 8 * 8 * 32 * 32
