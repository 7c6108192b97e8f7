import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.conftest import ASSETS
from vitok_hf.evaluation.metrics import high_frequency_energy, psnr, ssim
from vitok_hf.training.media import load_evaluation_images


@pytest.fixture(scope="module")
def pairs():
    images = load_evaluation_images(ASSETS, 128, 4)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [2.0, 8, 20, 60]
    ).view(-1, 1, 1, 1)
    return images, (images + noise).clamp(0, 255).round().to(torch.uint8)


def test_psnr_agrees_with_scikit_image(pairs):
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255) for x, y in zip(*pairs)]
    torch.testing.assert_close(psnr(pairs[1], pairs[0]), torch.tensor(expected, dtype=torch.float64))


def test_psnr_of_equal_pictures(pairs):
    assert psnr(pairs[0], pairs[0]).isinf().all()


def test_ssim_agrees_with_scikit_image(pairs):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, **options) for x, y in zip(*pairs)]
    torch.testing.assert_close(
        ssim(pairs[1], pairs[0]), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_high_frequency_energy(pairs):
    checkerboard = 255 * (torch.arange(16).view(16, 1) + torch.arange(16)) % 510
    checkerboard = checkerboard.clamp(max=255).to(torch.uint8).expand(2, 3, 16, 16)
    assert high_frequency_energy(checkerboard) == pytest.approx(0.25)  # the blur makes it grey
    ramp = torch.arange(0, 128, 8, dtype=torch.uint8).expand(1, 3, 16, 16)
    assert high_frequency_energy(ramp) == pytest.approx(0.0, abs=1e-12)
    images, noisy = pairs
    assert high_frequency_energy(images) < high_frequency_energy(noisy)
