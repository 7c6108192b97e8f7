"""Runs the scripts that measure, as a user would."""

import argparse
import csv
import io
import json
import re
from unittest.mock import Mock

import av
import numpy as np
import paper_tables
import pytest
import torch
from datasets import config as datasets_config
from diffusers import AutoencoderTiny
from evaluate_demo import patch_border_ratio, reconstruct_in_tiles
from evaluate_sharpness import high_frequency_energy
from PIL import Image
from studies.baselines import PEERS, PatchPCA, make_peer
from studies.codecs import ImageCodec, Quantizer, decode

from tests.conftest import ASSETS, make_vae
from tests.data.conftest import write_video
from vitok_hf.clips import to_float
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.evaluation.metrics import psnr
from vitok_hf.evaluation.reconstruction import reconstruct


@pytest.fixture
def models(tmp_path):
    make_vae("v1").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    AutoencoderTiny(**channels, **blocks).save_pretrained(tmp_path / "tiny" / "vae")
    return tmp_path


class TestEvaluateReconstruction:
    def test_pictures(self, run_example, models):
        out = run_example(
            *("evaluate_reconstruction.py", "--models", "model", "--data_dir", ASSETS, "--resolution", 176),
            *("--networks", "--batch_size", 2),
        )
        folder = models / "evaluation" / "assets"
        (row,) = csv.DictReader(open(folder / "table.csv", newline=""))
        assert float(row["E"]) == 4 * 22 * 22 and float(row["ms_ssim"]) < 1
        assert "| model | " in out and "No rFID: left out." in out
        assert out.strip().endswith((folder / "table.md").read_text().strip())
        (result,) = json.loads((folder / "results.json").read_text())
        assert result["protocol"]["resolution"] == 176 and len(result["data_sha256"]) == 64
        with Image.open(folder / "model" / "worst.png") as picture:
            worst = np.array(picture)
        assert worst.shape == (4 * 176, 3 * 176, 3) and (folder / "model" / "examples.png").is_file()
        difference = np.abs(worst[:, :176].astype(float) - worst[:, 176:352]).mean(axis=2)
        np.testing.assert_allclose(worst[:, 352:, 0], np.minimum(4 * difference, 255), atol=0.51)
        errors = np.square(worst[:, :176].astype(float) - worst[:, 176:352]).reshape(4, -1).mean(axis=1)
        assert list(errors) == sorted(errors, reverse=True)

    def test_other_autoencoders_and_stored_results(self, run_example, models):
        small = ("--networks", "--resolution", 32, "--limit", 2, "--num_examples", 1)
        run_example("evaluate_reconstruction.py", "--models", "model", "--data_dir", ASSETS, *small)
        stored = (models / "evaluation" / "assets" / "results.json").rename(models / "stored.json")
        options = ("evaluate_reconstruction.py", "--models", "tiny", "--subfolder", "vae", "--data_dir", ASSETS)
        out = run_example(*options, *small, "--add_results", stored)
        assert "| tiny | " in out and "| model | " in out
        with pytest.raises(ValueError, match=r"protocol\.resolution \(16 and 32\)"):
            run_example(*options, *small, "--resolution", 16, "--add_results", stored)

    def test_videos(self, run_example, models):
        write_video(models / "ramp.mp4")
        make_vae("video", sample_size=16).save_pretrained(models / "video")
        out = run_example(
            *("evaluate_reconstruction.py", "--models", "video", "model", "--data_dir", "ramp.mp4"),
            *("--num_frames", 6, "--resolution", 32, "--networks", "i3d", "--num_examples", 1),
        )
        assert "ramp.mp4, 1 clips" in out and "No rFVD: no weights: no library downloads I3D" in out
        for name in ("video", "model"):
            with av.open(str(models / "evaluation" / "ramp.mp4" / name / "worst_00.mp4")) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(frames) == 6 and frames[0].shape == (32, 96, 3)

    def test_dataset_of_the_hub(self, run_example, models, monkeypatch):
        """In the form of a local folder, which `datasets` loads alike."""
        monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", models / "cache")
        (models / "photos").mkdir()
        for name in ("coffee.png", "astronaut.png"):
            (models / "photos" / name).symlink_to(ASSETS / name)
        out = run_example(
            *("evaluate_reconstruction.py", "--models", "model", "--dataset_name", "photos"),
            *("--dataset_split", "train", "--resolution", 32, "--networks", "--num_examples", 1),
        )
        assert "photos train, 2 pictures" in out

    def test_wrong_arguments(self, run_example, capsys):
        with pytest.raises(SystemExit):
            run_example("evaluate_reconstruction.py", "--models", "model")
        assert "either --data_dir or --dataset_name" in capsys.readouterr().err
        with pytest.raises(ValueError, match="`limit` must be an integer from 1 .* but is 0"):
            run_example("evaluate_reconstruction.py", "--models", "model", "--data_dir", ASSETS, "--limit", 0)


class TestCompareCodecs:
    def test_table(self, run_example, models):
        run_example(
            *("compare_codecs.py", "--models", "model", "--data_dir", ASSETS, "--resolution", 176, "--networks"),
            *("--baselines", "pca", "jpeg", "webp", "--pca_data_dir", ASSETS, "--batch_size", 2, "--latent_bits", 2),
        )
        with open(models / "evaluation" / "assets" / "table.csv", newline="") as file:
            rows = {row["name"]: row for row in csv.DictReader(file)}
        numbers = 4 * 22 * 22
        codecs = [f"{name}, {numbers} x {bits} bits" for name in ("JPEG", "WEBP") for bits in (16, 8)]
        assert list(rows) == ["model", "model, 2-bit latents", "PCA, 4 of 8 x 8 pixels", *codecs]
        psnr = {name: float(row["psnr"]) for name, row in rows.items()}
        assert psnr["PCA, 4 of 8 x 8 pixels"] > psnr["model"] + 5  # whose weights are random
        assert psnr[codecs[2]] > psnr[codecs[3]] > 20
        assert 0.8 * numbers < float(rows[codecs[1]]["bytes"]) <= numbers
        assert float(rows["model, 2-bit latents"]["bytes"]) == numbers / 4 + 8 * 4
        assert float(rows["model"]["E"]) == numbers and float(rows["model"]["bytes"]) == 2 * numbers

    @pytest.mark.parametrize(
        "options, message",
        [
            (("--baselines", "pca"), "needs --pca_data_dir"),
            (("--baselines", "pca", "--pca_data_dir", ASSETS, "--pca_limit", 0), "--pca_limit from 1, not 0"),
            (("--teacher", "vitok-tiny-f8x8"), "--teacher is of `vitok evaluate` alone"),
            (("--num_frames", 4), "pictures of one --resolution"),
            (("--latent_bits", 20), "--latent_bits must be from 1 to 16, but is 20"),
        ],
    )
    def test_wrong_arguments(self, run_example, options, message, capsys):
        with pytest.raises(SystemExit):
            run_example("compare_codecs.py", "--models", "model", "--data_dir", "x", *options)
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
    def test_is_the_best_within_the_budget(self, file_format):
        images = load_evaluation_images(ASSETS, 64, 2)
        codec = ImageCodec(file_format, 1500)
        decoded = codec(images)
        assert decoded.shape == images.shape and psnr(decoded, images).min() > 20
        for image in images[:, :, 0].permute(0, 2, 3, 1).numpy():
            data = codec.compress(torch.from_numpy(image).permute(2, 0, 1)[:, None])
            picture, errors = Image.fromarray(image), []
            for settings in codec.SETTINGS[file_format]:
                within = []
                for quality in range(1, 101):
                    file = io.BytesIO()
                    picture.save(file, file_format, quality=quality, optimize=True, **settings)
                    within += [file.getvalue()] if len(file.getvalue()) <= 1500 else []
                errors.append(np.square(decode(max(within, key=len)) - image.astype(float)).mean())
            assert np.square(decode(data) - image.astype(float)).mean() == min(errors)
        assert len(codec.sizes) == 4 and max(codec.sizes) <= 1500 and "above_budget" not in codec.costs()
        assert 1000 < codec.costs()["bytes"] == sum(codec.sizes) / 4

    def test_above_the_budget(self):
        codec = ImageCodec("JPEG", 100)
        images = load_evaluation_images(ASSETS, 64, 2)
        codec(images)
        assert codec.costs()["above_budget"] == 2
        picture, file = Image.fromarray(images[0, :, 0].permute(1, 2, 0).numpy()), io.BytesIO()
        picture.save(file, "JPEG", quality=1, optimize=True, subsampling="4:2:0")
        assert len(codec.compress(images[0])) == len(file.getvalue())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_quantized_latents(self, dtype):
        latents = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
        latents[:, 1] *= 100  # each channel has a range of its own
        latents[:, 2] = 4.0
        quantizer = Quantizer(3)
        quantized = quantizer(latents)
        assert quantized.dtype == dtype and quantized.shape == latents.shape
        ranges = latents.flatten(2).amax(2) - latents.flatten(2).amin(2)
        half = ranges.float().view(2, 3, 1, 1) / 14
        assert ((quantized - latents).abs() <= half * 1.01 + 8 * half * torch.finfo(dtype).eps).all()
        assert len(quantized[0, 0].unique()) == 8 and (quantized[:, 2] == 4.0).all()
        assert quantizer.num_bytes == 3 * 3 * 200 / 8 + 8 * 3


class TestPCA:
    @pytest.fixture(scope="class")
    def images(self):
        return load_evaluation_images(ASSETS, 64, 4)

    def test_all_components_reconstruct_exactly(self, images):
        assert torch.equal(PatchPCA(4, 48, [images]).reconstruct(images), images)

    def test_is_the_best_linear_code(self, images):
        images = images // 2 + 64  # no reconstruction leaves the range, where clipping would help it
        patches = to_float(images[:, :, 0]).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)
        patches = patches.flatten(0, 2).flatten(1).double()
        discarded = torch.linalg.svdvals(patches - patches.mean(dim=0))[6:].square().sum() / patches.numel()
        reconstruction = PatchPCA(8, 6, images.split(1)).reconstruct(images)
        error = (to_float(reconstruction) - to_float(images)).square().mean()
        assert error.item() == pytest.approx(discarded.item(), rel=0.01)  # rounding to uint8


def test_tiles():
    images, vae = load_evaluation_images(ASSETS, 64, 2), make_vae("v1")
    tiles = reconstruct_in_tiles(vae, images, 16, 32)
    assert torch.equal(tiles[..., 16:32, 32:], reconstruct(vae, images[..., 16:32, 32:].contiguous()))
    assert torch.equal(reconstruct_in_tiles(vae, images, 64, 64), reconstruct(vae, images))


def test_patch_border_ratio():
    images = torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8)
    reconstructions = torch.ones(1, 3, 1, 16, 16, dtype=torch.uint8)
    assert patch_border_ratio(images, reconstructions, 8) == 1.0
    reconstructions[..., [0, 7, 8, 15]] = 2  # columns: outer error 4, inner 1; rows: 7 / 4 + 1 = 1.75 throughout
    assert patch_border_ratio(images, reconstructions, 8) == pytest.approx((4 + 1.75) / (1 + 1.75))
    assert patch_border_ratio(images, images, 8) == 1.0


def test_high_frequency_energy():
    checkerboard = 255 * ((torch.arange(16).view(16, 1) + torch.arange(16)) % 2)
    checkerboard = checkerboard.to(torch.uint8).expand(2, 3, 1, 16, 16)
    assert high_frequency_energy(checkerboard) == pytest.approx(0.25)  # the blur makes it grey
    ramp = torch.arange(0, 128, 8, dtype=torch.uint8).expand(1, 3, 1, 16, 16)
    assert high_frequency_energy(ramp) == pytest.approx(0.0, abs=1e-12)


class TestPaperTables:
    def test_ours_agree_with_the_paper(self, run_example, monkeypatch):
        monkeypatch.setattr("studies.baselines.PEERS", {"Wan 2.1": PEERS["Wan 2.1"]})
        out = run_example("paper_tables.py")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
        assert [row[4:] for row in rows if row[0] == "S"] == [["43.1", "43.3", "11.6", "11.6"]]
        models = [row for row in rows if row[0].startswith("S-")]
        for _, parameters, paper_parameters, gmacs, paper_gmacs, _ in models:
            assert float(gmacs) == pytest.approx(float(paper_gmacs), rel=0.03)
            assert not paper_parameters or float(parameters) == pytest.approx(float(paper_parameters), rel=0.015)
        assert len(models) == 6 and sum(row[0] == "Wan 2.1" for row in rows) == 3

    def test_chosen_models(self, run_example):
        out = run_example("paper_tables.py", "--models", "S-L/16", "SD-VAE").split("Tables 3 to 5")
        names = [re.findall(r"^\| (S-.*?|SD-.*?) \|", table, flags=re.MULTILINE) for table in out[1:]]
        assert names == [["S-L/16", "SD-VAE"], ["SD-VAE"], ["SD-VAE"]]

    def test_timing(self, monkeypatch):
        monkeypatch.setattr(paper_tables, "make_model", lambda name: make_vae("v1"))
        assert 0 < paper_tables.seconds("S-B/16", (3, 1, 16, 16), torch.bfloat16, rounds=1) < 5
        args = argparse.Namespace(dtype="float32", rounds=1)
        assert float(paper_tables.timed_cell("S-B/16", (3, 1, 16, 16), args)) < 5
        monkeypatch.setattr(paper_tables, "reconstruct", Mock(side_effect=NotImplementedError("no such kernel")))
        assert paper_tables.timed_cell("S-B/16", (3, 1, 16, 16), args) == "none: no such kernel"


def test_peers_have_the_sizes_of_the_published_ones():
    """Millions of parameters, by which another configuration is told."""
    sizes = {"SD-VAE": 83.7, "SDXL-VAE": 83.7, "DC-AE f32c32": 323, "Cosmos CV8x8x8": 105, "Wan 2.1": 127}
    for name, expected in sizes.items():
        with torch.device("meta"):
            peer = make_peer(name)
        assert sum(parameter.numel() for parameter in peer.parameters()) / 1e6 == pytest.approx(expected, rel=0.01)
