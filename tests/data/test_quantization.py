import logging

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ASSETS, make_vae
from vitok_hf.commands import main
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.latent_cache import LatentCache, round_to_bits, write_latents
from vitok_hf.data.quantization import coarse_channels, dequantize, quantize


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5, 7), (3, 2, 4, 2, 5, 7), (3, 2, 4, 9)])
def test_off_by_half_a_step_at_most(bits, shape):
    torch.manual_seed(0)
    moments = torch.randn(shape) * torch.tensor([0.1, 1.0, 10.0, 1.0]).view(-1, *[1] * (len(shape) - 3))
    moments[:, :, 3] = 2.5  # a channel that is constant
    codes, grid = quantize(moments, bits)
    assert codes.dtype == torch.uint8 and codes.numel() == moments.numel() * bits // 8
    found = dequantize(codes, grid, bits)
    assert found.shape == moments.shape
    errors = (found - moments).abs().transpose(0, 2).flatten(1).amax(dim=1)
    assert (errors <= 0.5001 * grid[1] + 1e-6).all() and torch.equal(found[:, :, 3], moments[:, :, 3])
    ranges = moments.transpose(0, 2).flatten(1)
    torch.testing.assert_close(grid[1][:3], ((ranges.amax(1) - ranges.amin(1)) / (2**bits - 1))[:3])


def test_channels_that_need_more_bits(caplog):
    means = torch.tensor([0.0, 1.5]).view(2, 1, 1, 1, 1).expand(2, 2, 3, 1, 1)  # a step of 0.1 in 4 bits
    stds = torch.tensor([0.02, 0.04, 0.0]).view(1, 1, 3, 1, 1).expand(2, 2, 3, 1, 1)  # errors: 0.1 / sqrt(12), 0.029
    assert coarse_channels(quantize(means, 4)[1], stds) == [0]
    with caplog.at_level(logging.WARNING):
        round_to_bits({"mean": means, "std": stds, "labels": torch.zeros(2)}, 4)
    assert "Rounding to 4 bits moves the latents of channels [0] by more" in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
def test_caches(bits, tmp_path):
    vae, files = make_vae("v1"), LabelledFiles([ASSETS])
    options = {"resolution": 16, "batch_size": 2, "shard_size": 4}
    write_latents(vae, "tiny", files, tmp_path / "exact", dtype=torch.float32, **options)
    write_latents(vae, "tiny", files, tmp_path / "few", bits=bits, **options)
    exact, few = LatentCache(tmp_path / "exact"), LatentCache(tmp_path / "few")
    assert len(few) == len(exact) and few[0].shape == exact[0].shape
    shard = load_file(tmp_path / "few" / "latents-00000.safetensors")
    for place, name in enumerate(("mean", "std")):
        error = (few[1][:, place] - exact[1][:, place]).abs().amax(dim=(0, 2, 3, 4))
        assert (error <= 0.501 * shard[f"{name}_grid"][1]).all() and error.any()
    with pytest.raises(ValueError, match="bits"):  # other settings
        write_latents(vae, "tiny", files, tmp_path / "few", bits=12 - bits, **options)


def test_command(tmp_path):
    make_vae("v1").save_pretrained(tmp_path / "vae")
    options = ["--train_data_dir", str(ASSETS), "--resolution", "16", "--num_workers", "0", "--bits", "4"]
    main("cache-latents", "--vae_name_or_path", str(tmp_path / "vae"), *options, "--output_dir", str(tmp_path / "few"))
    assert LatentCache(tmp_path / "few").bits == 4
    with pytest.raises(ValueError, match="`bits` must be 8, 4 or None, but is 3"):
        write_latents(make_vae("v1"), "tiny", LabelledFiles([ASSETS]), tmp_path / "three", 16, bits=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard_size": 0}, "`shard_size` must be an integer from 1"),
        ({"shard_size": -2}, "`shard_size` must be an integer from 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer from 1"),
        ({"num_workers": -1}, "`num_workers` must be an integer from 0"),
        ({"resolution": 15}, "`resolution` 15 must be a multiple of the patch size, 8"),
    ],
)
def test_wrong_settings_leave_no_folder(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_latents(make_vae("v1"), "tiny", LabelledFiles([ASSETS]), tmp_path / "x", **{"resolution": 16} | options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"dtype": torch.float32}, {"bits": 8}])
def test_latents_that_are_not_finite(tmp_path, options):
    vae = make_vae("v1")
    vae.encoder.proj_out.bias.data[0] = 1e5 if options.get("dtype") == torch.float16 else torch.inf
    with pytest.raises(ValueError, match=r"The latents of .*astronaut.png are not finite in torch.float"):
        write_latents(vae, "tiny", LabelledFiles([ASSETS]), tmp_path / "x", 16, **options)
