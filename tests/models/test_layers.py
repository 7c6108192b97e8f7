import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitok_hf.models import layers
from vitok_hf.models.causal import Causal
from vitok_hf.models.layers import Packing, RMSNorm, make_packing, packed_attention, patchify, unpatchify
from vitok_hf.models.rotary import apply_rotary_embedding, rotary_embedding, split_rotary_pairs


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


def attend_one_by_one(query, key, value, lengths):
    """What each sequence of (1, L, heads, head_dim) gives by itself."""
    parts = zip(*(x.split(lengths, dim=1) for x in (query, key, value)))
    outputs = [F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in part)).transpose(1, 2) for part in parts]
    return torch.cat(outputs, dim=1)


def reference_kernel(query, key, value, query_bounds, key_bounds, longest_query, longest_key):
    """What `torch.nn.attention.varlen.varlen_attn` does, which is for CUDA alone."""
    assert torch.equal(query_bounds, key_bounds) and query_bounds.dtype == torch.int32 and query.ndim == 3
    lengths = query_bounds.diff().tolist()
    assert longest_query == longest_key == max(lengths) and sum(lengths) == len(query)
    return attend_one_by_one(query[None], key[None], value[None], lengths)[0]


class TestPackedAttention:
    grids, counts, lengths = [(2, 3), (4, 1), (1, 1)], [2, 1, 3], [6, 6, 4, 1, 1, 1]

    def tensors(self, dtype=torch.float32, device="cpu"):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(1, 19, 2, 16, generator=generator).to(device, dtype) for _ in range(3)]

    def test_equals_one_by_one(self):
        tensors = self.tensors()
        packed = packed_attention(*tensors, Packing(self.counts, self.grids), None, None)
        torch.testing.assert_close(packed, attend_one_by_one(*tensors, self.lengths), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "dtype, backend, is_served",
        [
            (torch.bfloat16, None, True),
            (torch.float16, "native", True),
            (torch.float32, None, False),
            (torch.bfloat16, "_native_math", False),
        ],
    )
    def test_one_kernel_takes_all(self, dtype, backend, is_served, monkeypatch):
        """With the boundaries that a CUDA device gets, and PyTorch's kernel replaced."""
        calls, bounds = [], torch.tensor([0, 6, 12, 16, 17, 18, 19], dtype=torch.int32)

        def kernel(*args):
            calls.append(args)
            return reference_kernel(*args)

        monkeypatch.setattr(layers, "varlen_attn", kernel)
        tensors, packing = self.tensors(dtype), Packing(self.counts, self.grids, boundaries=bounds)
        packed = packed_attention(*tensors, packing, backend, None)
        assert len(calls) == is_served
        torch.testing.assert_close(packed, attend_one_by_one(*tensors, self.lengths), rtol=0, atol=1e-2)

    def test_boundaries(self, monkeypatch):
        monkeypatch.setattr(layers, "varlen_attn", reference_kernel)
        runs = [torch.zeros(n, math.prod(grid), 8) for n, grid in zip(self.counts, self.grids)]
        assert make_packing(runs, self.grids).boundaries is None  # on a CPU, whose kernels take equal sequences
        meta = [run.to("meta") for run in runs]
        monkeypatch.setattr(layers, "VARLEN_DEVICES", ("meta",))
        assert make_packing(meta, self.grids).boundaries.shape == (7,)
        assert make_packing(meta, self.grids, window_radius=2).boundaries is None
        assert make_packing(meta[:1], self.grids[:1]).boundaries is None
        assert make_packing(meta, self.grids, causal=Causal()).boundaries is None

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernel is for CUDA")
    def test_on_cuda(self):
        tensors = self.tensors(torch.bfloat16, "cuda")
        runs = [torch.zeros(n, math.prod(grid), 8, device="cuda") for n, grid in zip(self.counts, self.grids)]
        packing = make_packing(runs, self.grids)
        assert packing.boundaries.tolist() == [0, 6, 12, 16, 17, 18, 19]
        packed = packed_attention(*tensors, packing, None, None)
        torch.testing.assert_close(packed, attend_one_by_one(*tensors, self.lengths), rtol=0, atol=2e-2)


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
