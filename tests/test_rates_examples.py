import numpy as np
import pytest
import torch
from add_channels import grow
from evaluate_rates import choose, compare
from nest_channels import measure, nest
from PIL import Image

from tests.conftest import ASSETS, TINY
from tests.data.conftest import write_noise
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


@torch.no_grad()
def test_nest(vae, pictures):
    x = pictures[:, :, 0] / 127.5 - 1
    nested = AutoencoderViTok.from_pretrained("vitok-tiny-f8x8", dtype=torch.float32)
    nest(nested, [2, 4, 8], measure(nested, [pictures]))
    assert (nested.config.channel_counts, nested.config.latents_mean) == ([2, 4, 8], None)
    codes, original = nested.encode(x).latent_dist, vae.encode(x).latent_dist
    tokens = codes.mode().flatten(2).mT.flatten(0, 1)
    assert tokens.mean(dim=0).abs().max() < 1e-2
    assert torch.allclose(torch.cov(tokens.mT), torch.eye(8), atol=1e-2)
    assert torch.allclose(nested.decode(codes.mode()).sample, vae.decode(original.mode()).sample, atol=1e-2)
    variances = original.var.mean(dim=(0, 2, 3)) / original.mode().var(dim=(0, 2, 3))  # of codes as wide
    assert variances.min() / 4 < codes.var.min() and codes.var.max() < 4 * variances.max()

    def error(vae, codes):
        codes[:, 2:] = codes[:, 2:].mean(dim=(0, 2, 3), keepdim=True)
        return (vae.decode(codes).sample - x).square().mean()

    assert error(nested, codes.mode()) < 0.8 * error(vae, original.mode())


@torch.no_grad()
def test_added_channels(pictures):
    """The first say as much as before, the new ones something else."""
    x = pictures[:, :, 0] / 127.5 - 1
    nested = AutoencoderViTok.from_pretrained("vitok-tiny-f8x8", dtype=torch.float32)
    nest(nested, [2, 4, 8], measure(nested, [pictures]))
    grown = grow(nested, [2, 4, 8, 12], [pictures])
    posterior, old = grown.encode(x).latent_dist, nested.encode(x).latent_dist
    assert torch.allclose(posterior.mode()[:, :8], old.mode(), atol=1e-3)
    assert torch.allclose(posterior.std[:, 8:], torch.tensor(-2.0).exp())
    assert torch.allclose(grown.decode(old.mode()).sample, nested.decode(old.mode()).sample, atol=1e-3)
    tokens = posterior.mode().flatten(2).mT.flatten(0, 1)
    assert tokens[:, 8:].mean(dim=0).abs().max() < 1e-2 and (tokens[:, 8:].std(dim=0) - 1).abs().max() < 1e-2
    assert torch.cov(tokens.mT)[:8, 8:].abs().max() < 2e-2


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


def test_scripts(tmp_path, run_example):
    write_noise(tmp_path / "train", 3)
    AutoencoderViTok(**TINY).save_pretrained(tmp_path / "vae")
    counts, data = ("--channel_counts", 2, 3, 4), ("--train_data_dir", "train", "--num_batches", 1)
    run_example("nest_channels.py", "--model", "vae", *counts, *data, "--output_dir", "nested")
    nested = AutoencoderViTok.from_pretrained(tmp_path / "nested")
    assert nested.config.channel_counts == [2, 3, 4]
    options = ("--min_psnr", 1, 99, "--resolution", 32, "--dtype", "float32")
    out = run_example("evaluate_rates.py", "--model", "nested", "--data_dir", "train", *options)
    assert "| train | 1 | 2.00 | 100% |" in out and "| train | 99 | 4.00 | 0% |" in out
    assert Image.open(tmp_path / "rates" / "samples.png").size == (4 * 32, 2 * 32)
    assert Image.open(tmp_path / "rates" / "extremes.png").size == (4 * 32, 6 * 32)
    assert (tmp_path / "rates" / "histograms.png").is_file()
    with pytest.raises(ValueError, match="`channel_counts` must end with `latent_channels`, 4"):
        run_example("nest_channels.py", "--model", "vae", "--channel_counts", 2, *data, "--output_dir", "x")
    run_example("add_channels.py", "--model", "vae", "--channel_counts", 2, 4, 6, *data, "--output_dir", "grown")
    assert AutoencoderViTok.from_pretrained(tmp_path / "grown").config.channel_counts == [2, 4, 6]
    for wrong, message in (
        ((2, 6), "go beyond the model's 4 and name it"),
        ((4, 2, 6), "an increasing list"),
        ((4, 33), "add at most 28 channels to the model's 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run_example("add_channels.py", "--model", "vae", "--channel_counts", *wrong, *data, "--output_dir", "x")
    run_example("add_channels.py", "--model", "vae", "--channel_counts", 4, 32, *data, "--output_dir", "most")
    assert all(x.isfinite().all() for x in AutoencoderViTok.from_pretrained(tmp_path / "most").state_dict().values())
    for change in ({"variational": False}, {"token_counts": [2]}):
        AutoencoderViTok(**TINY | change).save_pretrained(tmp_path / "plain")
        with pytest.raises(ValueError, match="plain must be a variational autoencoder of pictures"):
            run_example("nest_channels.py", "--model", "plain", *counts, *data, "--output_dir", "x")
    masked = run_example(
        "evaluate_rates.py", "--model", "plain", "--data_dir", "train", *options
    )  # 16 tokens a picture
    assert "| train | 1 | 2.00 | 100% |" in masked and "| train | 99 | 16.00 | 0% |" in masked
    with pytest.raises(SystemExit):
        run_example("evaluate_rates.py", "--model", "nested", "--data_dir", "train", "--min_psnr", "nan")
    with pytest.raises(SystemExit):
        run_example("evaluate_rates.py", "--model", "vae", "--data_dir", "train")


def test_pictures_that_are_all_alike(vae):
    with pytest.raises(ValueError, match=r"Channels \[0, .*7\] of the codes are constant in these pictures"):
        nest(vae, [2, 4, 8], measure(vae, [torch.full((4, 3, 1, 64, 64), 9, dtype=torch.uint8)]))


def test_grey_pictures_and_other_patches(tmp_path, run_example):
    write_noise(tmp_path / "train", 2)
    AutoencoderViTok(**TINY | {"in_channels": 1, "patch_size": 12}).save_pretrained(tmp_path / "vae")
    data = ("--train_data_dir", "train", "--num_batches", 1)
    for name, counts in (("nest", (2, 4)), ("add", (2, 4, 6))):
        run_example(f"{name}_channels.py", "--model", "vae", "--channel_counts", *counts, *data, "--output_dir", name)
        out = run_example("evaluate_rates.py", "--model", name, "--data_dir", "train", "--resolution", 24)
        assert f"| train | 26 | {counts[-1]:.2f} | 0% |" in out
