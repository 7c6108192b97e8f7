"""Codes that are cut: what is refused, and faults that were found by trying."""

import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import DDIMScheduler

from tests.conftest import TINY, assert_close, make_input
from tests.dit import TRANSFORMER, make_transformer
from tests.models.test_codes import make
from tests.models.test_codes import no_grad as no_grad
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline, compute_latent_statistics


class TestErrors:
    @pytest.mark.parametrize(
        "name, arguments, message",
        [
            ("channels", {"num_channels": 3}, r"`num_channels` must be one of \[1, 2, 4\], but is 3"),
            ("channels", {"num_channels": [1, 3]}, r"`num_channels` must be one of \[1, 2, 4\], but is 3"),
            ("channels", {"num_channels": [1]}, "`num_channels` has 1 entries for 2 items"),
            ("channels", {"num_tokens": 3}, "`num_tokens` is 3, but the model has no `token_counts`"),
            ("tokens", {"num_tokens": 2}, r"`num_tokens` must be one of \[1, 3, 6\], but is 2"),
            ("tokens", {"num_tokens": [2, 7]}, "`num_tokens` must be from 1 to 6, but is 7"),
            ("tokens", {"num_tokens": 2.5}, r"`num_tokens` must be one of \[1, 3, 6\], but is 2.5"),
            ("tokens", {"num_tokens": 0}, r"`num_tokens` must be one of \[1, 3, 6\], but is 0"),
            (
                "tokens",
                {"num_tokens": 3, "min_psnr": 30.0},
                "chooses the length, which `num_tokens` fix: leave one of them out",
            ),
            ("both", {"min_psnr": math.nan}, "`min_psnr` must be a number from 0"),
            ("latent", {"min_psnr": 30.0}, "the codes of this model have one length"),
        ],
    )
    def test_encode(self, name, arguments, message):
        vae = make(name)
        with pytest.raises(ValueError, match=message):
            vae.encode(make_input(vae), **arguments)

    @pytest.mark.parametrize(
        "name, shape, sizes, message",
        [
            ("channels", (1, 3, 2, 2), None, "`z` must have 4 channels"),
            ("channels", (1, 4, 3), None, "codes of this model are on grids"),
            ("tokens", (1, 4, 7), [(16, 24)], "must have 1 to 6 tokens for 16 x 24 pixels, but has 7"),
            ("latent", (1, 4, 3), [(16, 24)], "must have 5 tokens"),
            ("latent", (4, 5), None, "`z` must be"),
            ("latent", (2, 4, 5), [(16, 24)], "`sizes` has 1 entries for 2 codes"),
            ("latent", (2, 4, 5), [(16, 24), (16, 16)], "`sizes` of a batch must be equal"),
        ],
    )
    def test_decode(self, name, shape, sizes, message):
        with pytest.raises(ValueError, match=message):
            make(name).decode(torch.zeros(shape), sizes=sizes)

    def test_what_is_no_code(self):
        vae = make("latent")
        with pytest.raises(ValueError, match="`z` is an empty list"):
            vae.decode([])
        with pytest.raises(ValueError, match=r"`z` must be a tensor of floats, .*pass its `.latent_dist.mode\(\)`"):
            vae.decode(vae.encode(make_input(vae)))

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"channel_counts": [2, 8]}, "must end with `latent_channels`, 4"),
            ({"channel_counts": [2, 2, 4]}, "must be an increasing list"),
            ({"token_counts": []}, "must be an increasing list"),
            ({"token_counts": [0, 4]}, "must be an increasing list"),
            ({"token_counts": [2, 4], "num_latent_tokens": 8}, "must end with `num_latent_tokens`, 8"),
            ({"num_latent_tokens": 0}, "num_latent_tokens"),
        ],
    )
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            AutoencoderViTok(**TINY | config)


class TestFaults:
    """What was found by trying."""

    @pytest.mark.parametrize("hook", [cpu_offload, cpu_offload_with_hook])
    def test_offloaded_mask_token(self, hook):
        vae, offloaded = make("tokens"), make("tokens")
        hook(offloaded, execution_device=torch.device("cpu"))
        x, code = make_input(vae), torch.randn(2, 4, 3)
        assert_close(
            offloaded.decode(code, sizes=[(16, 24)] * 2).sample, vae.decode(code, sizes=[(16, 24)] * 2).sample
        )
        assert_close(offloaded(x, num_tokens=3).sample, vae(x, num_tokens=3).sample)
        assert len(offloaded.encode(x, min_psnr=500.0).latent_dist.mode()) == 2

    @pytest.mark.parametrize("name", ["causal", "video"])
    def test_streams_of_channel_prefixes(self, name):
        vae = make(name, channel_counts=[2, 4])
        code = vae.encode(make_input(vae), num_channels=2).latent_dist.mode()
        assert_close(torch.cat(list(vae.decode_stream([code])), dim=2), vae.decode(code).sample)

    @pytest.mark.parametrize(
        "name, code, sizes, message",
        [
            ("channels", [(4, 2, 3)] * 2, [(500, 500)] * 2, "do not fit a list of latents"),
            ("channels", (2, 4, 2, 3), [(3, 3)] * 2, "do not fit a list of latents"),
            ("causal", (1, 4, 3), [(12, 16, 24)], r"`sizes\[0\]` must be 1 plus a multiple .* is 12: make it"),
            ("tokens", (2, 3, 7), None, "with c 4, but has 3 channels"),
            ("both", (2, 3, 7), None, r"with c one of \[.*4\], but has 3 channels"),
            ("tokens", [()], None, r"`z\[0\]` must be a tensor of 2 or 3 or 4 dimensions"),
        ],
    )
    def test_codes_that_do_not_fit(self, name, code, sizes, message):
        z = torch.randn(code) if isinstance(code, tuple) else [torch.randn(shape) for shape in code]
        with pytest.raises(ValueError, match=message):
            make(name).decode(z, sizes=sizes)

    @pytest.mark.parametrize("name", ["channels", "latent", "causal"])
    @pytest.mark.parametrize(
        "latents, message",
        [
            ("x", "`latents` must be a tensor of floats"),
            (torch.zeros(2, 3, 2, 3), "`latents` must have 4 channels"),
            (torch.zeros(2, 4, 2, 3).double(), "`latents` must be torch.float32, as the weights are"),
            (torch.full((2, 4, 2, 3), math.nan), "`latents` must be finite"),
            ([torch.zeros(2, 3, 1, 2, 3)], r"`latents\[0\]` must have 4 channels"),
        ],
    )
    def test_latents_of_another_model(self, name, latents, message):
        with pytest.raises(ValueError, match=message):
            make(name)(torch.zeros(2, 3, 16, 24), latents=latents, encode=False)

    @pytest.mark.parametrize("size", [16, (16,), None, "ab", (0, 8), (16.0, 24), (1, 2, 3, 4)])
    def test_sizes_that_are_none(self, size):
        with pytest.raises(ValueError, match="`sizes"):
            make("tokens").count_tokens(size)

    def test_sizes_that_are_arrays(self):
        vae, code = make("tokens"), torch.randn(2, 4, 3)
        sizes = [(np.array(16), np.int64(24))] * 2
        assert_close(vae.decode(code, sizes=sizes).sample, vae.decode(code, sizes=[(16, 24)] * 2).sample)

    def test_statistics_of_lists_of_sequences(self):
        images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
        batch, items = (compute_latent_statistics(make("latent"), [x]) for x in (images, list(images)))
        assert items.channel_mean == pytest.approx(batch.channel_mean, abs=1e-5) and items.num_items == 2

    def test_sequences_have_no_patches(self):
        with pytest.raises(ValueError, match="codes are sequences, but the transformer has patch_size=2"):
            ViTokDiTPipeline(make_transformer(**TRANSFORMER | {"patch_size": 2}), make("latent"), DDIMScheduler())

    def test_half_a_model(self):
        with pytest.raises(ValueError, match="holds only its encoder"):
            make("tokens", component="encoder").decode(torch.randn(1, 4, 3))

    def test_fewer_tokens_than_any_count(self):
        with pytest.raises(ValueError, match="from 1 to 1, but is 3: pass a list, for 1 tokens are fewer than 3"):
            make("tokens", token_counts=[3, 6]).encode(torch.zeros(1, 3, 8, 8), num_tokens=3)

    def test_search_keeps_no_graph(self):
        vae, grads = make("channels"), []
        vae.decoder.register_forward_pre_hook(lambda *args: grads.append(torch.is_grad_enabled()))
        with torch.enable_grad():
            codes = vae.encode(make_input(vae), min_psnr=20.0).latent_dist.mode()
        assert grads and not any(grads) and codes[0].requires_grad
