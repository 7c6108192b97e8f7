import numpy as np
import pytest
import torch
from evaluate_min_psnr import choose, compare
from nest_channels import measure, nest

from tests.conftest import ASSETS
from vitok_hf import AutoencoderViTok
from vitok_hf.data.media import load_image


@pytest.fixture(scope="module")
def vae():
    return AutoencoderViTok.from_pretrained("vitok-tiny-f8x8", dtype=torch.float32)


@pytest.fixture(scope="module")
def pictures():
    """(16, 3, 1, 64, 64) uint8."""
    picture = torch.from_numpy(load_image(ASSETS / "astronaut.png")[128:384, 128:384].copy()).permute(2, 0, 1)
    return picture.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).flatten(0, 1).unsqueeze(2)


@pytest.mark.parametrize("counts", [[2, 4, 8], [4, 8, 12]])
@torch.no_grad()
def test_nest(vae, pictures, counts):
    nested = nest(vae, counts, measure(vae, [pictures])).eval()
    assert (nested.config.channel_counts, nested.config.latents_mean) == (counts, None)
    x = pictures[:, :, 0] / 127.5 - 1
    codes, original = nested.encode(x).latent_dist, vae.encode(x).latent_dist.mode()
    tokens = codes.mode().flatten(2).mT.flatten(0, 1)
    assert tokens.mean(dim=0).abs().max() < 1e-2
    assert torch.allclose(torch.cov(tokens.mT)[:8, :8], torch.eye(8), atol=1e-2)
    assert torch.allclose(tokens.std(dim=0), torch.ones(counts[-1]), atol=1e-2)
    assert torch.allclose(nested.decode(codes.mode()).sample, vae.decode(original).sample, atol=1e-2)
    assert torch.allclose(nested.decode(codes.mode()[:, :8]).sample, vae.decode(original).sample, atol=1e-2)

    def error(sample):
        return (sample - x).square().mean()

    first = original.clone()
    first[:, counts[0] :] = original.mean(dim=(0, 2, 3), keepdim=True)[:, counts[0] :]
    ours = codes.mode()
    ours[:, counts[0] :] = 0
    assert error(nested.decode(ours).sample) < 0.8 * error(vae.decode(first).sample)


def test_lengths_chosen_by_psnr():
    psnrs = np.array([[20.0, 25, 30], [28, 32, 36], [10, 15, 20]])
    assert choose(psnrs, 25).tolist() == [1, 0, 2] and choose(psnrs, 0).tolist() == [0, 0, 0]
    row = compare(psnrs[:2], [2, 4, 8], 25)  # 4 and 2 numbers: 25 and 28 dB
    error = -10 * np.log10((10**-2.5 + 10**-2.8) / 2)
    short, middle = (-10 * np.log10((10 ** -(a / 10) + 10 ** -(b / 10)) / 2) for a, b in ((20, 28), (25, 32)))
    equal = 2 ** (1 + (error - short) / (middle - short))
    assert row == pytest.approx(
        {"mean length": 3, "reached": 1, "PSNR": error, "equal": equal, "saved": 1 - 3 / equal}
    )
