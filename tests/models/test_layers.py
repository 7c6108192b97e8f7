import pytest
import torch
from torch import nn

from vitok_hf.models.layers import (
    RMSNorm,
    apply_rotary_embedding,
    patchify,
    rotary_embedding,
    split_rotary_pairs,
    unpatchify,
)


class TestPatchify:
    def test_equals_a_strided_convolution(self):
        convolution = nn.Conv3d(3, 10, kernel_size=(2, 4, 4), stride=(2, 4, 4))
        video = torch.randn(2, 3, 4, 8, 12)
        expected = convolution(video).flatten(2).transpose(1, 2)  # (B, L, 10)
        weight = convolution.weight.flatten(1)
        torch.testing.assert_close(patchify(video, 2, 4, 4) @ weight.T + convolution.bias, expected)

    @pytest.mark.parametrize("frames_per_item", [2, 4])
    def test_round_trip(self, frames_per_item):
        video = torch.randn(2, 3, 4, 8, 12)
        tokens = patchify(video, 2, 4, frames_per_item)
        items = 4 // frames_per_item
        assert tokens.shape == (2 * items, frames_per_item // 2 * 2 * 3, 3 * 2 * 4 * 4)
        assert torch.equal(unpatchify(tokens, (frames_per_item // 2, 2, 3), 2, 4, items), video)


class TestRotaryEmbedding:
    @pytest.mark.parametrize(
        "head_dim, axes, pairs",
        [(64, 2, [16, 16]), (64, 3, [10, 11, 11]), (72, 3, [12, 12, 12]), (6, 3, [1, 1, 1]), (6, 2, [1, 2])],
    )
    def test_split(self, head_dim, axes, pairs):
        assert split_rotary_pairs(head_dim, axes) == pairs

    @pytest.mark.parametrize("head_dim, axes", [(4, 3), (7, 2), (2, 2)])
    def test_heads_that_are_too_small(self, head_dim, axes):
        with pytest.raises(ValueError, match=f"head size of {head_dim}"):
            split_rotary_pairs(head_dim, axes)

    def test_rotates_by_the_position_on_each_axis(self):
        grid, head_dim = (2, 3, 5), 16
        x = torch.randn(1, 30, 2, head_dim)
        rotated = apply_rotary_embedding(x, rotary_embedding(grid, head_dim, x.device, x.dtype))
        as_complex = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :])
        positions = torch.cartesian_prod(*[torch.arange(length) for length in grid])  # (30, 3), row-major
        pair = 0
        for axis, pairs in enumerate(split_rotary_pairs(head_dim, 3)):
            for index in range(pairs):
                angle = positions[:, axis] * 10000.0 ** (-index / pairs)
                expected = as_complex[..., pair] * torch.exp(1j * angle)[:, None]
                torch.testing.assert_close(rotated[..., pair], expected.real)
                torch.testing.assert_close(rotated[..., pair + head_dim // 2], expected.imag)
                pair += 1

    def test_no_ambiguity_when_tokens_and_heads_are_as_many(self):
        tables = rotary_embedding((2, 2), 8, torch.device("cpu"), torch.float32)
        x = torch.randn(1, 1, 4, 8).expand(1, 4, 4, 8)  # 4 tokens, 4 heads: equal tokens, distinct heads
        rotated = apply_rotary_embedding(x, tables)
        torch.testing.assert_close(rotated[:, 0], x[:, 0])  # position (0, 0) does not turn any head
        assert not torch.allclose(rotated[:, 3, 0], x[:, 3, 0])

    def test_half_precision_tables_are_rounded_once(self):
        full = rotary_embedding((64, 64), 64, torch.device("cpu"), torch.float32)
        half = rotary_embedding((64, 64), 64, torch.device("cpu"), torch.bfloat16)
        assert all(torch.equal(a.bfloat16(), b) for a, b in zip(full, half))


class TestRMSNorm:
    @pytest.mark.parametrize(
        "dtype, tolerance",
        [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    )
    def test_equals_torch(self, dtype, tolerance):
        x = torch.randn(4, 7, 96) * 30
        norm, reference = RMSNorm(96), nn.RMSNorm(96, eps=1e-6)
        nn.init.normal_(norm.weight)
        reference.weight = norm.weight
        out = norm.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), reference.float()(x.to(dtype).float()), rtol=tolerance, atol=tolerance)

    def test_large_float16_values_do_not_overflow(self):
        x = torch.full((1, 4096), 6e4, dtype=torch.float16)
        torch.testing.assert_close(RMSNorm(4096).half()(x), torch.ones_like(x), rtol=2e-3, atol=2e-3)

    def test_zeros(self):
        assert torch.equal(RMSNorm(8).half()(torch.zeros(1, 8, dtype=torch.float16)), torch.zeros(1, 8).half())
