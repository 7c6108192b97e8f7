"""Runs: what comes in comes back in the same form, and the models take them as they take lists."""

import pytest
import torch

from tests.conftest import make_vae
from vitok_hf.clips import fold_frames, pad_to_size, to_float, to_runs, to_uint8, unfold_frames


ITEMS = [(3, 8, 8), (3, 2, 8, 8), (3, 8, 16), (3, 8, 8), (3, 2, 8, 8), (3, 1, 8, 8)]


def make(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) * 2 - 1 for shape in shapes]


class TestForms:
    @pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 1, 8, 8), (2, 3, 4, 8, 8)])
    def test_batch(self, shape):
        (x,) = make(shape)
        (run,), form = to_runs(x)
        assert run.shape == (2, 3, shape[2] if len(shape) == 5 else 1, 8, 8)
        assert torch.equal(form.give_back([run]), x)

    def test_list(self):
        items = make(*ITEMS)
        runs, form = to_runs(items)
        assert [tuple(run.shape) for run in runs] == [
            (2, 3, 1, 8, 8),
            (2, 3, 2, 8, 8),
            (1, 3, 1, 8, 16),
            (1, 3, 1, 8, 8),
        ]
        assert torch.equal(runs[0][1, :, 0], items[3])
        back = form.give_back(runs)
        assert len(back) == len(items) and all(map(torch.equal, back, items))

    def test_runs(self):
        x = make((2, 3, 1, 8, 8), (1, 3, 4, 8, 16))
        runs, form = to_runs(x)
        assert all(map(torch.equal, runs, x)) and all(map(torch.equal, form.give_back(runs), x))

    def test_padding(self):
        (image,) = make((3, 7, 9))
        (run,), _ = to_runs([image], multiple=4)
        assert run.shape == (1, 3, 1, 8, 12)
        assert (
            torch.equal(run[0, :, 0, :7, :9], image) and run[..., 7:, :].abs().max() == run[..., 9:].abs().max() == 0
        )


class TestModel:
    @torch.no_grad()
    @pytest.mark.parametrize("name", ["v1", "v2", "video"])
    def test_runs_are_lists_of_equal_items(self, name):
        vae = make_vae(name)
        frames = 1 if vae.is_image_model else 4
        runs = make((2, 3, frames, 16, 16), (1, 3, frames, 9, 24))
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        output = vae(runs, sample_posterior=True, generator=generators)
        assert [sample.shape for sample in output.sample] == [run.shape for run in runs]
        items = [item for run in runs for item in run]
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        expected = vae(items, sample_posterior=True, generator=generators)
        samples = [sample for run in output.sample for sample in run]
        for sample, other in zip(samples, expected.sample):
            torch.testing.assert_close(sample, other, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.kl, expected.kl)

    def test_errors(self):
        vae = make_vae("v1")
        with pytest.raises(ValueError, match=r"`sample\[1\]` must be \(n, C, T, H, W\), but has shape \(3, 8, 8\)"):
            vae(make((2, 3, 1, 8, 8), (3, 8, 8)))
        with pytest.raises(ValueError, match=r"`x\[0\]` must be \(C, H, W\) or \(C, T, H, W\)"):
            vae.encode(make((2, 3, 1, 8, 8)))
        with pytest.raises(ValueError, match="`generator` has 2 entries for 3 items"):
            vae(make((3, 3, 1, 8, 8)), generator=[torch.Generator(), torch.Generator()])


class TestPixels:
    def test_uint8_and_back(self):
        levels = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(to_uint8(to_float(levels)), levels)
        assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]

    def test_frames(self):
        (clip,) = make((2, 3, 4, 5, 6))
        folded = fold_frames(clip)
        assert torch.equal(folded[5], clip[1, :, 1]) and torch.equal(unfold_frames(folded, 4), clip)

    def test_pad(self):
        (clip,) = make((1, 3, 2, 3, 3))
        padded = pad_to_size(clip, (3, 4, 5))
        assert padded.shape == (1, 3, 3, 4, 5) and torch.equal(padded[0, :, 2, 3, 4], clip[0, :, 1, 2, 2])
