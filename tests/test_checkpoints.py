import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import vitok_hf
from tests.conftest import ASSETS
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline, checkpoints
from vitok_hf.evaluation.generation import generate_samples
from vitok_hf.evaluation.metrics import high_frequency_energy
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction, patch_border_ratio, reconstruct_in_tiles
from vitok_hf.training.items import load_evaluation_images
from vitok_hf.training.media import list_files, load_image


def test_list():
    assert {"vitok-tiny-f8x8", "vitok-tiny-f8x8-gan", "vitok-dit-emoji"} <= set(vitok_hf.list_bundled())


def test_other_names_are_left_to_diffusers(tmp_path):
    assert checkpoints.resolve_bundled("owner/name") == "owner/name"
    assert checkpoints.resolve_bundled(tmp_path) == tmp_path


def test_folders_go_before_bundled_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(checkpoints.resolve_bundled(Path("vitok-tiny-f8x8"))).is_dir()
    Path("vitok-tiny-f8x8").mkdir()
    assert checkpoints.resolve_bundled("vitok-tiny-f8x8") == "vitok-tiny-f8x8"


# what the checkpoint reaches at 256 pixels, in dB
PSNR = {"astronaut": 26.67, "chelsea": 30.82, "coffee": 29.37, "rocket": 31.50}


@pytest.fixture(scope="module")
def vae():
    return AutoencoderViTok.from_pretrained("vitok-tiny-f8x8")


class TestTiny:
    def test_files(self):
        folder = Path(checkpoints.resolve_bundled("vitok-tiny-f8x8"))
        assert {path.name for path in folder.iterdir()} >= {"README.md", "config.json"}
        assert sum(path.stat().st_size for path in folder.iterdir()) < 30 * 2**20
        config = json.loads((folder / "config.json").read_text())
        assert len(config["latents_mean"]) == len(config["latents_std"]) == config["latent_channels"] == 8

    def test_needs_no_network(self, monkeypatch):
        import socket

        def refuse(*args, **kwargs):
            raise AssertionError("a connection was tried")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        AutoencoderViTok.from_pretrained("vitok-tiny-f8x8")

    @pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
    def test_reconstructs_photographs(self, vae, name):
        (file,) = [file for file in list_files(ASSETS) if file.stem == name]
        image = load_evaluation_images(file, 256, 1)
        metrics, _ = evaluate_reconstruction(vae, image)
        assert metrics["psnr"] > PSNR[name] - 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_costs_little(self, vae, dtype):
        images = load_evaluation_images(ASSETS, 256, 4)
        half = AutoencoderViTok.from_pretrained("vitok-tiny-f8x8", dtype=dtype)
        difference = evaluate_reconstruction(vae, images)[0]["psnr"] - evaluate_reconstruction(half, images)[0]["psnr"]
        assert abs(difference) < 0.3

    def test_latents_have_the_recorded_statistics(self, vae):
        images = load_evaluation_images(ASSETS, 256, 4).float() / 127.5 - 1.0
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        normalized = (latents - mean) / std
        assert normalized.mean().abs() < 0.3
        assert 0.6 < normalized.std() < 1.6

    def test_quality_does_not_depend_on_the_size(self, vae):
        image = torch.from_numpy(load_image(ASSETS / "astronaut.png").copy()).permute(2, 0, 1)[None]
        psnr = {}
        for height, width in ((64, 64), (256, 256), (512, 512), (128, 512)):
            tiles = reconstruct_in_tiles(vae, image, height, width, batch_size=max(1, 2**18 // (height * width)))
            error = (tiles.double() - image.double()).square().mean()
            psnr[height, width] = (10 * torch.log10(255**2 / error)).item()
            assert patch_border_ratio(image, tiles, 8) < 1.15
        assert min(psnr.values()) > psnr[64, 64] - 0.2


class TestTinyGan:
    @pytest.fixture(scope="class")
    def stage2(self):
        return AutoencoderViTok.from_pretrained("vitok-tiny-f8x8-gan")

    def test_has_the_encoder_of_stage_1(self, vae, stage2):
        ours, theirs = stage2.encoder.state_dict(), vae.encoder.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert stage2.config.latents_std == vae.config.latents_std

    def test_is_sharper_and_costs_less_than_a_decibel(self, vae, stage2):
        images = load_evaluation_images(ASSETS, 256, 4)
        energy = high_frequency_energy(images)
        (first, blurred), (second, sharp) = (evaluate_reconstruction(model, images) for model in (vae, stage2))
        assert 1.3 * high_frequency_energy(blurred) < high_frequency_energy(sharp) < energy
        assert second["psnr"] > first["psnr"] - 1.0


class TestGenerator:
    """The bundled `vitok-dit-emoji`."""

    @pytest.fixture(scope="class")
    def pipe(self):
        pipe = ViTokDiTPipeline.from_pretrained("vitok-dit-emoji")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_files(self):
        folder = Path(checkpoints.resolve_bundled("vitok-dit-emoji"))
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40 * 2**20
        # its own statistics would be ignored: the weights and the config are those of the autoencoder
        config = json.loads((folder / "vae" / "config.json").read_text())
        assert config == json.loads(
            Path(checkpoints.resolve_bundled(config["_name_or_path"]), "config.json").read_text()
        )

    def test_shares_the_autoencoder(self, pipe, vae):
        assert set(pipe.labels) == {"face", "hand", "person", "animal", "food", "transport", "place", "flag"}
        alone = AutoencoderViTok.from_pretrained("vitok-dit-emoji", subfolder="vae")
        assert pipe.vae.config.latents_mean == alone.config.latents_mean == vae.config.latents_mean
        for ours, theirs, others in zip(pipe.vae.parameters(), vae.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs) and torch.equal(others, theirs)

    def test_by_folder(self, vae, tmp_path, monkeypatch):
        """Whichever path leads there, and a copy."""
        folder = Path(checkpoints.resolve_bundled("vitok-dit-emoji"))
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(folder.parent)
        for path in ("vitok-dit-emoji", "../checkpoints/vitok-dit-emoji", tmp_path / "copy", tmp_path / "link"):
            loaded = ViTokDiTPipeline.from_pretrained(path).vae
            alone = AutoencoderViTok.from_pretrained(path, subfolder="vae")
            for weights in (loaded, alone):
                assert torch.equal(weights.decoder.proj_out.weight, vae.decoder.proj_out.weight)

    def test_saves_all_of_it(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        again = DiffusionPipeline.from_pretrained(tmp_path)
        options = {"class_labels": "flag", "num_inference_steps": 2, "output_type": "np", "return_dict": False}
        images = [p(generator=torch.Generator().manual_seed(0), **options)[0] for p in (pipe, again)]
        assert (images[0] == images[1]).all()

    def test_knows_its_classes(self, pipe):
        """Flags fill the picture, or nearly, and are of few colours; hands are on white, and of the colour of skin."""
        images = generate_samples(pipe, ["flag"] * 4 + ["hand"] * 4, num_inference_steps=20).float()
        corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # (8, 3, 4)
        assert (corners[4:] > 240).float().mean() > 0.9
        centres = images[4:, :, 40:88, 40:88].mean(dim=(0, 2, 3))
        assert centres[0] > centres[2] + 20  # more red than blue
