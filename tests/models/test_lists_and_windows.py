"""Pictures of different sizes in one batch, local attention, and models of one half."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.nn import functional as F

from tests.conftest import TINY, assert_close, frames_of, make_input, make_vae
from vitok_hf import AutoencoderViTok
from vitok_hf.models.layers import windowed_attention


SIZES = [(20, 31), (8, 8), (64, 16), (20, 31), (1, 50)]
CPU_BACKENDS = ["native", "_native_math", "_native_flash", "flex"]


def make_list(vae, sizes=SIZES):
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *frames_of(vae), *size, generator=generator) * 2 - 1 for size in sizes]


def pad(item, p=8):
    return F.pad(item, (0, -item.shape[-1] % p, 0, -item.shape[-2] % p))


class TestLists:
    @torch.no_grad()
    def test_equal_to_one_at_a_time(self, vae):
        items = make_list(vae)
        latents = vae.encode(items).latent_dist.mode()
        samples = vae.decode(latents, sizes=[item.shape[-2:] for item in items]).sample
        output = vae(items)
        for index, item in enumerate(items):
            alone = vae.encode(pad(item).unsqueeze(0)).latent_dist
            torch.testing.assert_close(latents[index], alone.mode()[0], rtol=0, atol=1e-5)
            sample = vae.decode(alone.mode()).sample[0, ..., : item.shape[-2], : item.shape[-1]]
            torch.testing.assert_close(samples[index], sample, rtol=0, atol=1e-5)
            torch.testing.assert_close(output.sample[index], sample, rtol=0, atol=1e-5)
            torch.testing.assert_close(output.kl[index], alone.kl()[0])

    @torch.no_grad()
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("other", [0.0, 100.0])
    def test_does_not_depend_on_the_rest_of_the_batch(self, backend, other):
        vae = make_vae("v2")
        items = make_list(vae)
        expected = [vae([item]).sample[0] for item in items]
        with attention_backend(backend):
            for index in range(len(items)):
                batch = [x if i == index else torch.full_like(x, other) for i, x in enumerate(items)]
                torch.testing.assert_close(vae(batch).sample[index], expected[index], rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_frames_of_an_image_model(self):
        vae = make_vae("v1")
        items = [torch.rand(3, 2, 9, 16), torch.rand(3, 9, 16), torch.rand(3, 3, 24, 8)]
        samples = vae(items).sample
        assert [sample.shape for sample in samples] == [item.shape for item in items]
        torch.testing.assert_close(samples[0][:, 1], vae([items[0][:, 1]]).sample[0], rtol=0, atol=1e-5)

    def test_a_list_in_a_few_products(self, vae):
        """All items go through the linear layers together."""
        calls = []
        vae.encoder.proj_in.register_forward_hook(lambda module, args, output: calls.append(output.shape[:2]))
        vae.encode(make_list(vae))
        frames = 1 if vae.is_image_model else 2
        assert calls == [(1, frames * (12 + 1 + 16 + 12 + 7))]
        calls.clear()
        vae.encode(make_list(vae, [(16, 16)] * 3))
        assert calls == [(3, frames * 4)]

    @torch.no_grad()
    def test_slicing(self, vae):
        items = make_list(vae)
        expected = vae(items).sample
        calls = []
        vae.encoder.proj_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))
        vae.enable_slicing()
        for sample, other in zip(vae(items).sample, expected):
            torch.testing.assert_close(sample, other, rtol=0, atol=1e-5)
        assert calls == [1] * len(items)

    def test_sampling(self):
        vae = make_vae("v1")
        items = make_list(vae)
        posterior = vae.encode(items).latent_dist
        first, second = (
            posterior.sample([torch.Generator().manual_seed(i) for i in range(len(items))]) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        alone = vae.encode(items[4:]).latent_dist.sample([torch.Generator().manual_seed(4)])
        torch.testing.assert_close(alone[0], first[4], rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="1 entries for 5 items"):
            posterior.sample([torch.Generator()])

    def test_gradients(self, vae):
        items = make_list(vae)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                vae.enable_gradient_checkpointing()
            vae.zero_grad()
            sum(sample.square().mean() for sample in vae.train()(items).sample).backward()
            gradients.append([parameter.grad.clone() for parameter in vae.parameters()])
        assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
        torch.testing.assert_close(gradients[0], gradients[1])

    @pytest.mark.parametrize(
        "items, message",
        [
            ([], "`x` is an empty list"),
            ([torch.zeros(3, 8, 8), torch.zeros(4, 8, 8)], r"`x\[1\]` must have 3 channels in dimension 0"),
            ([torch.zeros(1, 3, 2, 8, 8)], r"must be \(C, H, W\) or \(C, T, H, W\)"),
        ],
    )
    def test_errors(self, items, message):
        with pytest.raises(ValueError, match=message):
            make_vae("v1").encode(items)

    def test_items_of_another_dtype(self):
        with pytest.raises(ValueError, match=r"pass `x\[0\].to\(torch.float32\)`"):
            make_vae("v1").encode([torch.zeros(3, 8, 8).double()])

    @pytest.mark.parametrize("sizes", [[(8, 8)], [(8, 8), (16, 9)], [(8, 8), (8, 8)]])
    def test_wrong_sizes(self, sizes):
        latents = [torch.zeros(4, 1, 1), torch.zeros(4, 2, 1)]
        with pytest.raises(ValueError, match="do not fit a list of latents"):
            make_vae("v1").decode(latents, sizes=sizes)
        with pytest.raises(ValueError, match="are for a list of latents, but `z` is a batch"):
            make_vae("v1").decode(torch.zeros(2, 4, 1, 1), sizes=[(8, 8)] * 2)


def masked_attention(query, key, value, mask):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class TestSlidingWindow:
    @pytest.mark.parametrize("grid, radius", [((7, 10), 3), ((4, 4), 1), ((3, 9, 5), 2), ((12,), 5), ((2, 2), 8)])
    def test_equal_to_a_mask(self, grid, radius):
        """A query sees what is at most `radius` away from its block of `radius` tokens a side, on every axis."""
        length = torch.Size(grid).numel()
        query, key, value = torch.randn(3, 2, length, 2, 8).unbind()
        places = torch.cartesian_prod(*map(torch.arange, grid)).view(length, len(grid))
        start = (places // radius * radius).unsqueeze(1)
        mask = ((places >= start - radius) & (places < start + 2 * radius)).all(dim=-1)  # (queries, keys)
        output = windowed_attention(query, key, value, grid, radius, lambda q, k, v: masked_attention(q, k, v, None))
        torch.testing.assert_close(output, masked_attention(query, key, value, mask))

    @torch.no_grad()
    def test_on_and_off(self, vae):
        x = make_input(vae, height=64, width=64)
        full = vae(x).sample
        vae.enable_sliding_window(8)  # as large as the grid
        torch.testing.assert_close(vae(x).sample, full, rtol=0, atol=1e-5)
        vae.enable_sliding_window(2)
        assert not torch.allclose(vae(x).sample, full, atol=1e-4)
        vae.disable_sliding_window()
        assert torch.equal(vae(x).sample, full)

    @torch.no_grad()
    def test_far_pixels_have_no_influence(self):
        vae = make_vae("v2", encoder_num_layers=1)
        vae.enable_sliding_window(2)
        x = make_input(vae, height=64, width=64)
        changed = x.clone()
        changed[..., 40:, :] = 0
        latents, others = (vae.encode(pixels).latent_dist.mode() for pixels in (x, changed))
        torch.testing.assert_close(latents[:, :, :2], others[:, :, :2])  # blocks of 2 rows: 0 to 1 see rows 0 to 3
        assert not torch.allclose(latents[:, :, 4], others[:, :, 4])

    @torch.no_grad()
    def test_lists(self, vae):
        vae.enable_sliding_window(2)
        items = make_list(vae)
        for sample, item in zip(vae(items).sample, items):
            torch.testing.assert_close(sample, vae([item]).sample[0], rtol=0, atol=1e-5)

    def test_radius(self):
        vae = make_vae("v1")
        for radius in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"`radius` must be an integer from 1 to .*, but is {radius}"):
                vae.enable_sliding_window(radius)
        assert vae.window_radius is None


class TestComponent:
    @torch.no_grad()
    @pytest.mark.parametrize("component", ["encoder", "decoder"])
    def test_one_half_of_a_checkpoint(self, vae, component, tmp_path):
        vae.save_pretrained(tmp_path)
        x = make_input(vae)
        latents = vae.encode(x).latent_dist.mode()
        half = AutoencoderViTok.from_pretrained(tmp_path, component=component)
        assert half.num_parameters() == getattr(vae, component).proj_in.weight.numel() + sum(
            parameter.numel()
            for name, parameter in vae.named_parameters()
            if name.startswith(component) and name != f"{component}.proj_in.weight"
        )
        if component == "encoder":
            assert_close(half.encode(x).latent_dist.mode(), latents)
            with pytest.raises(ValueError, match="holds only its encoder"):
                half.decode(latents)
        else:
            assert_close(half.decode(latents).sample, vae.decode(latents).sample)
            with pytest.raises(ValueError, match="holds only its decoder"):
                half.encode(x)
        with pytest.raises(ValueError, match=f"holds only its {component}"):
            half(x)

    def test_a_saved_half_loads_as_one(self, tmp_path):
        vae = make_vae("v1", component="decoder")
        vae.save_pretrained(tmp_path)
        latents = torch.randn(1, 4, 2, 2)
        assert_close(AutoencoderViTok.from_pretrained(tmp_path).decode(latents).sample, vae.decode(latents).sample)
        with pytest.raises(ValueError, match="missing"):
            AutoencoderViTok.from_pretrained(tmp_path, component=None)

    def test_unknown(self):
        with pytest.raises(ValueError, match="but is 'middle'"):
            AutoencoderViTok(**TINY, component="middle")
