"""Models of grey, of RGBA and of more channels: trained, tried on files, and measured."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import ASSETS, TINY
from tests.training.conftest import make_arguments, make_stage2, next_batches, read_log, run
from vitok_hf import AutoencoderViTok
from vitok_hf.clips import to_colours
from vitok_hf.commands import main
from vitok_hf.evaluation.autoencoders import read_channels
from vitok_hf.training import losses
from vitok_hf.training.arguments import LossSettings
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.losses import ReconstructionLoss


CHANNELS = (1, 4, 5)


def write_data(folder: Path, channels: int, count: int = 4, side: int = 40) -> Path:
    """Grey pictures, RGBA pictures, or arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (side, side + 8, channels), dtype=np.uint8)
        if channels == 5:
            np.save(folder / f"{index}.npy", pixels.transpose(2, 0, 1))
        else:
            Image.fromarray(pixels.squeeze()).save(folder / f"{index}.png")
    return folder


@pytest.fixture(params=CHANNELS)
def channels(request):
    return request.param


@pytest.fixture
def data(tmp_path, channels):
    return write_data(tmp_path / "data", channels)


class TestTraining:
    def test_three_steps(self, tmp_path, channels, data):
        options = {"train_data_dir": [str(data)], "validation_data_dir": [str(data)], "validation_steps": 3}
        trainer = run(make_arguments(tmp_path, TINY | {"in_channels": channels}, max_train_steps=3, **options))
        assert trainer.held_out["data"].shape == (4, channels, 1, 32, 32)
        assert len(read_log(tmp_path / "run")) == 3 and 5 < read_log(tmp_path / "run", "data_psnr")[3] < 40
        assert np.asarray(Image.open(tmp_path / "run" / "samples" / "data_0000003.png")).shape == (4 * 32, 2 * 32, 3)
        vae = AutoencoderViTok.from_pretrained(tmp_path / "run" / "vae")
        assert vae.config.in_channels == channels
        inputs = json.loads((tmp_path / "run" / "made_from.json").read_text())
        assert len(inputs["files"]) == 4

    def test_stage_2(self, tmp_path, channels, data):
        config = TINY | {"in_channels": channels}
        trainer = run(make_stage2(tmp_path, config, train_data_dir=[str(data)], max_train_steps=3))
        assert trainer.adversary.trained.unwrapped.conv_in.in_channels == channels
        assert len(read_log(tmp_path / "run", "discriminator_loss")) == 3

    def test_by_name(self, tmp_path, channels, data):
        options = {"variant": "w32_d1_h2/1x8x4", "in_channels": channels, "train_data_dir": [str(data)]}
        trainer = AutoencoderTrainer(make_arguments(tmp_path, **options))
        assert next_batches(trainer)[0].pixels[0].shape[1] == trainer.config.in_channels == channels

    def test_of_a_pretrained_model_they_are_fixed(self, tmp_path):
        with pytest.raises(ValueError, match="`in_channels` 1 cannot be changed in a pretrained model"):
            make_arguments(tmp_path, pretrained_model_name_or_path="x", in_channels=1)

    def test_data_of_other_channels(self, tmp_path):
        write_data(tmp_path / "data", 5)
        config = TINY | {"in_channels": 6}
        with pytest.raises(ValueError, match=r"could not be read.*shape \(5, 40, 48\), but must have \(6, height"):
            run(make_arguments(tmp_path, config, train_data_dir=[str(tmp_path / "data")]))
        with pytest.raises(ValueError, match="holds no file that ends in .npy, .npz, .tif, .tiff"):
            run(make_arguments(tmp_path, config, train_data_dir=[str(ASSETS)], output_dir=str(tmp_path / "other")))

    def test_videos_of_other_channels(self, tmp_path):
        config = TINY | {"in_channels": 4, "temporal_patch_size": 2, "sample_frames": 4}
        with pytest.raises(ValueError, match="Clips of 4 frames are read with 1 or 3 channels, not 4"):
            AutoencoderTrainer(make_arguments(tmp_path, config))


class TestLosses:
    @pytest.mark.parametrize("name", ["lpips", "dino"])
    def test_networks_see_colours(self, monkeypatch, name):
        class Network(nn.Module):
            def forward(self, x, y):
                seen.extend([x, y])
                return (x - y).square().mean()

        seen: list[torch.Tensor] = []
        monkeypatch.setattr(losses, "load_lpips", Network)
        monkeypatch.setattr(losses, "load_dino", lambda name: Network())
        weights = {f"{x}_weight": float(x == name) for x in ("mse", "lpips", "dino", "kl")}
        for channels in (1, 4):
            loss = ReconstructionLoss(LossSettings(**weights), 8, in_channels=channels)
            x, y = torch.rand(2, 2, channels, 1, 16, 16)
            loss([x], [y])
            assert torch.equal(seen.pop(), to_colours(y[:, :, 0])) and torch.equal(seen.pop(), to_colours(x[:, :, 0]))
        with pytest.raises(ValueError, match=f"`{name}_weight` is 1.0, but its network .* in_channels 5: set it to 0"):
            ReconstructionLoss(LossSettings(**weights), 8, in_channels=5)

    def test_ssim(self, channels):
        settings = LossSettings(mse_weight=0.0, lpips_weight=0.0, kl_weight=0.0, ssim_weight=1.0)
        loss, pixels = ReconstructionLoss(settings, 8, in_channels=channels), torch.rand(2, channels, 1, 16, 16)
        assert loss([pixels], [pixels])[0].item() == pytest.approx(0.0, abs=1e-5)
        assert loss([pixels], [-pixels])[0].item() > 0.1


@pytest.fixture
def model(tmp_path, channels):
    torch.manual_seed(0)
    AutoencoderViTok(**TINY | {"in_channels": channels}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestReconstruct:
    def test_files(self, tmp_path, monkeypatch, channels, data, model, capsys):
        monkeypatch.chdir(tmp_path)
        main("reconstruct", "--input", "data", "--model", "model", "--output_dir", "out", "--dtype", "float32")
        assert f"{64 * channels} values become 4" in (out := capsys.readouterr().out) and out.count("PSNR") == 4
        assert np.asarray(Image.open("out/1_comparison.png")).shape == (40, 2 * 48, 3)
        if channels == 5:
            saved = np.load("out/1_reconstruction.npy")
            assert saved.shape == (5, 40, 48) and saved.dtype == np.uint8
        else:
            saved = Image.open("out/1_reconstruction.png")
            assert saved.mode == {1: "L", 4: "RGBA"}[channels] and saved.size == (48, 40)

    def test_arrays_stay_arrays(self, tmp_path, monkeypatch):
        """Also those with the channels of pictures: their colours are premultiplied, and stay so."""
        monkeypatch.chdir(tmp_path)
        AutoencoderViTok(**TINY | {"in_channels": 4}).save_pretrained("model")
        np.save("x.npy", np.zeros((4, 16, 24), np.float32))
        main("reconstruct", "--input", "x.npy", "--model", "model", "--output_dir", "out")
        assert np.load("out/x_reconstruction.npy").shape == (4, 16, 24)
        assert not Path("out/x_reconstruction.png").exists()

    def test_wrong_channels(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        write_data(Path("data"), 5)
        AutoencoderViTok(**TINY | {"in_channels": 7}).save_pretrained("model")
        with pytest.raises(SystemExit) as error:
            main("reconstruct", "--input", "data", "--model", "model")
        assert "4 of 4 files failed" in str(error.value) and "must have (7, height, width)" in str(error.value)
        with pytest.raises(SystemExit):
            main("reconstruct", "--input", str(ASSETS / "coffee.png"), "--model", "model")
        assert "holds no file that ends in .npy, .npz, .tif, .tiff" in capsys.readouterr().err


class TestEvaluate:
    def test_table(self, tmp_path, monkeypatch, channels, data, model, capsys):
        monkeypatch.chdir(tmp_path)
        options = ("--resolution", "24", "--networks", "--num_examples", "2")
        main("evaluate", "--models", "model", "--data_dir", "data", *options)
        (row,) = csv.DictReader(open("evaluation/data/table.csv", newline=""))
        assert 3 < float(row["psnr"]) < 40 and float(row["compression"]) == 64 * channels / 4
        reason = "No rFID: networks see colours, but these data have 5 channels."
        assert (reason in capsys.readouterr().out) == (channels == 5)
        assert np.asarray(Image.open("evaluation/data/model/worst.png")).shape == (4 * 24, 3 * 24, 3)
        (result,) = json.loads(Path("evaluation/data/results.json").read_text())
        assert result["protocol"]["channels"] == channels

    def test_models_of_different_channels(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        for channels in (1, 3):
            AutoencoderViTok(**TINY | {"in_channels": channels}).save_pretrained(f"model{channels}")
        with pytest.raises(SystemExit):
            main("evaluate", "--models", "model1", "model3", "--data_dir", str(ASSETS), "--networks")
        assert "of different numbers of channels, model1 has 1, model3 has 3: measure them" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main("evaluate", "--models", "model1", "--teacher", "model3", "--data_dir", str(ASSETS), "--networks")
        assert "of different numbers of channels, model1 has 1, model3 has 3: measure them" in capsys.readouterr().err
        assert read_channels("vitok-tiny-f8x8") == 3
