"""Codes that are cut, as `vitok reconstruct` and `vitok evaluate` measure them."""

import csv

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tests.conftest import ASSETS, TINY
from tests.data.conftest import video as video
from vitok_hf import AutoencoderViTok
from vitok_hf.commands import start
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.evaluation.reconstruct_files import CodecSettings, reconstruct_file
from vitok_hf.evaluation.reconstruction import reconstruct


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderViTok(**TINY | {"channel_counts": [1, 2, 4], "token_counts": [5, 16]}).eval()


@pytest.mark.parametrize(
    "lengths, numbers",
    [
        ({}, 4 * 16),
        ({"num_channels": 2}, 2 * 16),
        ({"num_tokens": 5}, 4 * 5),
        ({"num_tokens": 5, "num_channels": 1}, 5),
        ({"min_psnr": 0.0}, 4 * 5),
        ({"min_psnr": 500.0}, 4 * 16),
    ],
)
def test_reconstruct(vae, tmp_path, lengths, numbers):
    Image.open(ASSETS / "astronaut.png").resize((32, 32)).save(tmp_path / "x.png")
    line = reconstruct_file(vae, tmp_path / "x.png", str(tmp_path / "x"), CodecSettings(lengths=lengths))
    assert f"  {numbers} numbers  " in line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num_channels", "3"], r"`num_channels` must be one of \[1, 4\], but is 3"),
        (["--num_tokens", "3"], "the model has no `token_counts`"),
        (["--min_psnr", "nan"], "`min_psnr` must be"),
        (["--min_psnr", "30", "--num_channels", "1"], "which `num_channels` fix: leave one of them out"),
    ],
)
def test_what_no_file_can_have_is_said_once(tmp_path, options, message):
    AutoencoderViTok(**TINY | {"channel_counts": [1, 4]}).save_pretrained(tmp_path / "vae")
    paths = ["--input", str(ASSETS), "--model", str(tmp_path / "vae"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        start("reconstruct", [*paths, *options])
    assert not (tmp_path / "out").exists()


def test_what_fails_is_named(tmp_path, capsys):
    AutoencoderViTok(**TINY | {"token_counts": [2, 4]}).save_pretrained(tmp_path / "vae")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    paths = ["--input", str(tmp_path / "small.png"), "--model", str(tmp_path / "vae")]
    with pytest.raises(SystemExit) as caught:
        start("reconstruct", [*paths, "--num_tokens", "2", "--output_dir", str(tmp_path / "out")])
    assert f"{tmp_path / 'small.png'}: `num_tokens` must be from 1 to 1, but is 2" in str(caught.value)
    assert "Reconstructions" not in capsys.readouterr().out  # there are none


def test_autoencoders_without_lengths():
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4).eval()
    with pytest.raises(ValueError, match="num_channels cut the codes of a ViTok, but this is a AutoencoderKL"):
        reconstruct(vae, load_evaluation_images(ASSETS, 32, 1), lengths={"num_channels": 2})


@torch.no_grad()
@pytest.mark.parametrize(
    "config, lengths", [({"num_latent_tokens": 3}, {}), ({"token_counts": [5, 12]}, {"num_tokens": 5})]
)
def test_each_frame_has_a_sequence(video, config, lengths, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderViTok(**TINY | config).eval()
    images = torch.randint(0, 256, (2, 3, 4, 24, 32), dtype=torch.uint8)
    frames = torch.stack([reconstruct(vae, x[:, :, None], lengths=lengths) for x in images.unbind(2)], dim=2)
    assert torch.equal(reconstruct(vae, images, lengths=lengths), frames.squeeze(3))
    line = reconstruct_file(vae, video, str(tmp_path / "x"), CodecSettings(lengths=lengths))
    count = int(line.split(" frames")[0].split()[-1])
    assert f"  {count * 4 * lengths.get('num_tokens', 3)} numbers  " in line


def test_reconstruct_by_sequences(tmp_path):
    vae = AutoencoderViTok(**TINY | {"num_latent_tokens": 3}).eval()
    Image.open(ASSETS / "astronaut.png").resize((24, 40)).save(tmp_path / "x.png")
    line = reconstruct_file(vae, tmp_path / "x.png", str(tmp_path / "x"))
    assert "  12 numbers  " in line and Image.open(tmp_path / "x_reconstruction.png").size == (24, 40)


@torch.no_grad()
def test_batches(vae):
    images = load_evaluation_images(ASSETS, 32, 3)
    x = images.float() / 127.5 - 1
    expected = vae(x, num_tokens=5, num_channels=2).sample
    ours = reconstruct(vae, images, lengths={"num_tokens": 5, "num_channels": 2})
    assert (ours.float() / 127.5 - 1 - expected.clamp(-1, 1)).abs().max() < 0.005


def test_evaluate(vae, tmp_path, run_example):
    vae.save_pretrained(tmp_path / "vae")
    options = ["--data_dir", ASSETS, "--resolution", 32, "--networks", "--num_examples", 1, "--dtype", "float32"]
    rates = ["--num_channels", 1, 4, "--num_tokens", 5]
    run_example("evaluate_reconstruction.py", "--models", "vae", *options, *rates, "--output_dir", "out")
    folder = tmp_path / "out" / "assets"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["name"], float(row["E"])) for row in rows] == [
        ("vae, 1 channels", 16),
        ("vae, 4 channels", 64),
        ("vae, 5 tokens", 20),
    ]
    assert len({row["psnr"] for row in rows}) == 3 and float(rows[0]["compression"]) == 3 * 32 * 32 / 16
    assert Image.open(folder / "rates.png").size[0] > 300
