"""Runs the scripts that measure, as a user would."""

import argparse
import csv
import json
import re
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from datasets import config as datasets_config
from diffusers import AutoencoderTiny
from PIL import Image
from vitok_hf.evaluation.peers import PEERS, make_peer

from tests.conftest import ASSETS, make_vae
from tests.data.conftest import write_video


@pytest.fixture
def models(tmp_path):
    make_vae("v1").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    AutoencoderTiny(**channels, **blocks).save_pretrained(tmp_path / "tiny" / "vae")
    return tmp_path


class TestEvaluateReconstruction:
    def test_pictures_and_baselines(self, run_example, models):
        out = run_example(
            *("evaluate_reconstruction.py", "--models", "model", "--data_dir", ASSETS, "--resolution", 176),
            *("--baselines", "pca", "jpeg", "webp", "--pca_data_dir", ASSETS, "--networks", "--batch_size", 2),
            *("--latent_bits", 2),
        )
        folder = models / "evaluation" / "assets"
        rows = {row["name"]: row for row in csv.DictReader(open(folder / "table.csv", newline=""))}
        numbers = 4 * 22 * 22
        assert list(rows) == [
            *(
                "model",
                "model, 2-bit latents",
                "PCA, 4 of 8 x 8 pixels",
                f"JPEG, {numbers} x 16 bits",
                f"JPEG, {numbers} x 8 bits",
            ),
            *(f"WEBP, {numbers} x 16 bits", f"WEBP, {numbers} x 8 bits"),
        ]
        psnr = {name: float(row["psnr"]) for name, row in rows.items()}
        assert psnr["PCA, 4 of 8 x 8 pixels"] > psnr["model"] + 5  # whose weights are random
        assert psnr[f"WEBP, {numbers} x 16 bits"] > psnr[f"WEBP, {numbers} x 8 bits"] > 20
        assert 0.8 * numbers < float(rows[f"JPEG, {numbers} x 8 bits"]["bytes"]) <= numbers
        assert float(rows["model, 2-bit latents"]["bytes"]) == numbers / 4 + 8 * 4
        assert float(rows["model"]["E"]) == numbers and float(rows["model"]["ms_ssim"]) < 1
        assert "| model | " in out and "No rFID: left out." in out
        assert out.strip().endswith((folder / "table.md").read_text().strip())
        (result, *_) = json.loads((folder / "results.json").read_text())
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
            *(
                "evaluate_reconstruction.py",
                "--models",
                "model",
                "--dataset_name",
                "photos",
                "--dataset_split",
                "train",
            ),
            *("--resolution", 32, "--networks", "--num_examples", 1),
        )
        assert "photos train, 2 pictures" in out

    @pytest.mark.parametrize(
        "options, message",
        [
            ((), "either --data_dir or --dataset_name"),
            (("--data_dir", "x", "--baselines", "pca"), "needs --pca_data_dir"),
            (("--data_dir", "x", "--baselines", "jpeg", "--num_frames", 4), "pictures of one --resolution"),
            (("--data_dir", "x", "--latent_bits", 20), "--latent_bits must be from 1 to 16, but is 20"),
        ],
    )
    def test_wrong_arguments(self, run_example, options, message, capsys):
        with pytest.raises(SystemExit):
            run_example("evaluate_reconstruction.py", "--models", "model", *options)
        assert message in capsys.readouterr().err


class TestPaperTables:
    def test_ours_agree_with_the_paper(self, run_example, monkeypatch):
        monkeypatch.setattr("vitok_hf.evaluation.peers.PEERS", {"Wan 2.1": PEERS["Wan 2.1"]})
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
        monkeypatch.syspath_prepend(str(ASSETS.parent))
        import paper_tables

        monkeypatch.setattr(paper_tables, "make_model", lambda name: make_vae("v1"))
        assert 0 < paper_tables.seconds("S-B/16", (3, 16, 16), torch.bfloat16, rounds=1) < 5
        args = argparse.Namespace(dtype="float32", rounds=1)
        assert float(paper_tables.timed_cell("S-B/16", (3, 16, 16), args)) < 5
        monkeypatch.setattr(paper_tables, "reconstruct", Mock(side_effect=NotImplementedError("no such kernel")))
        assert paper_tables.timed_cell("S-B/16", (3, 16, 16), args) == "none: no such kernel"


def test_peers_have_the_sizes_of_the_published_ones():
    """Millions of parameters, by which another configuration is told."""
    sizes = {"SD-VAE": 83.7, "SDXL-VAE": 83.7, "DC-AE f32c32": 323, "Cosmos CV8x8x8": 105, "Wan 2.1": 127}
    for name, expected in sizes.items():
        with torch.device("meta"):
            peer = make_peer(name)
        assert sum(parameter.numel() for parameter in peer.parameters()) / 1e6 == pytest.approx(expected, rel=0.01)
    with pytest.raises(ValueError, match='no peer "VAE": choose from SD-VAE'):
        make_peer("VAE")
