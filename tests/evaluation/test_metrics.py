import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.conftest import ASSETS
from vitok_hf.clips import fold_frames
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.evaluation.metrics import frame_values, ms_ssim, psnr, ssim


@pytest.fixture(scope="module")
def pairs():
    images = fold_frames(load_evaluation_images(ASSETS, 128, 4))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [2.0, 8, 20, 60]
    ).view(-1, 1, 1, 1)
    return images, (images + noise).clamp(0, 255).round().to(torch.uint8)


def test_psnr_agrees_with_scikit_image(pairs):
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255) for x, y in zip(*pairs)]
    torch.testing.assert_close(psnr(pairs[1], pairs[0]), torch.tensor(expected, dtype=torch.float64))


def test_values_of_the_frames_of_clips(pairs):
    clips, noisy = (x.unflatten(0, (2, 2)).transpose(1, 2) for x in pairs)  # (2, 3, 2, 128, 128)
    assert torch.equal(frame_values(ssim, noisy, clips), ssim(pairs[1], pairs[0]).view(2, 2))


def test_psnr_of_equal_pictures(pairs):
    """That of rounding to whole numbers: a mean square of 1/12, 10 log10(12 * 255^2) = 58.92 dB, and no more."""
    expected = 10 * np.log10(12 * 255.0**2)
    assert psnr(pairs[0], pairs[0]).tolist() == pytest.approx([expected] * 4) and round(expected, 2) == 58.92
    almost = pairs[0].clone()
    almost[0, 0, 0, 0] ^= 1
    assert psnr(almost, pairs[0])[0].item() == pytest.approx(expected)
    off_by_one = torch.full((1, 3, 16, 16), 7, dtype=torch.uint8)  # a mean square of 1 is no rounding
    assert psnr(off_by_one, off_by_one + 1).item() == pytest.approx(20 * np.log10(255.0))
    mean = psnr(torch.cat([off_by_one, off_by_one + 1]), torch.cat([off_by_one] * 2)).mean().item()
    assert mean == pytest.approx((expected + 20 * np.log10(255.0)) / 2)


@pytest.mark.parametrize("metric, exponent", [(ssim, 1.0), (ms_ssim, 0.1333)])
def test_pictures_of_one_colour(metric, exponent):
    """No structure to differ in: only the term of brightness is left, on the coarsest scale for MS-SSIM."""
    grey, other = (torch.full((1, 3, 176, 176), level, dtype=torch.uint8) for level in (100, 120))
    assert metric(grey, grey).item() == pytest.approx(1.0, abs=1e-6)
    brightness = (2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025)
    assert metric(other, grey).item() == pytest.approx(brightness**exponent, abs=1e-6)


def test_ssim_agrees_with_scikit_image(pairs):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [structural_similarity(x.numpy(), y.numpy(), channel_axis=0, **options) for x, y in zip(*pairs)]
    torch.testing.assert_close(
        ssim(pairs[1], pairs[0]), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4
    )


def plain_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang, Simoncelli and Bovik (2003) on two float64 pictures (C, H, W) of even sides, windows inside."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image):
        blurred = correlate1d(correlate1d(image, window, axis=1), window, axis=2)
        return blurred[:, 5:-5, 5:-5]

    product = np.ones(len(x))
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mean_x, mean_y = blur(x), blur(y)
        variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        term = (2 * (blur(x * y) - mean_x * mean_y) + 58.5225) / (variances + 58.5225)  # (0.03 * 255)^2
        if scale == 4:
            term = term * (2 * mean_x * mean_y + 6.5025) / (mean_x**2 + mean_y**2 + 6.5025)
        product *= np.maximum(term.mean(axis=(1, 2)), 0) ** exponent
        x, y = (z.reshape(len(z), z.shape[1] // 2, 2, z.shape[2] // 2, 2).mean(axis=(2, 4)) for z in (x, y))
    return product.mean()


def test_ms_ssim_agrees_with_the_definition():
    images = fold_frames(load_evaluation_images(ASSETS, 192, 2))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 30
    noisy = (images + noise).clamp(0, 255).round().to(torch.uint8)
    expected = [plain_ms_ssim(x.double().numpy(), y.double().numpy()) for x, y in zip(noisy, images)]
    torch.testing.assert_close(ms_ssim(noisy, images), torch.tensor(expected), rtol=0, atol=1e-5)
    assert expected[0] < 0.97 and torch.equal(ms_ssim(images, images), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("metric, name, least", [(ssim, "SSIM", 11), (ms_ssim, "MS-SSIM", 161)])
def test_small_pictures_are_refused(metric, name, least):
    images = torch.zeros(1, 3, 200, least - 1, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=f"^{name} needs {least} pixels a side, but the pictures are 200 x {least - 1}"
    ):
        metric(images, images)
