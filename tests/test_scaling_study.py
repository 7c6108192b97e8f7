import csv
import sys
from functools import partial

import numpy as np
import pytest
import scaling_study
from PIL import Image
from studies.scaling import CODES, STUDIES, Point, r_squared, report_codes

from tests.data.conftest import write_noise
from vitok_hf import AutoencoderViTok


class TestGrid:
    def test_floats(self):
        floats = [point.floats for point in STUDIES["bottleneck"]]
        assert len(floats) >= 12 and min(floats) == 2**5 and max(floats) == 2**11
        assert {point.floats for study in ("encoder", "decoder", "precision") for point in STUDIES[study]} == {512}

    def test_models(self):
        points = {point for study in STUDIES.values() for point in study}
        assert len({point.name for point in points}) == len(points)
        for point in points:
            vae = AutoencoderViTok(**point.model_config())
            config = vae.config
            assert config.latent_channels * vae.count_tokens((64, 64)) == point.floats == max(point.lengths)
            assert config.encoder_num_layers == point.encoder_layers
            assert config.decoder_num_layers == point.decoder_layers

    def test_lengths(self):
        nested = Point(8, 16, channel_counts=(2, 4, 16))
        assert nested.lengths == {128: {"num_channels": 2}, 256: {"num_channels": 4}, 1024: {"num_channels": 16}}
        masked = Point(num_latent_tokens=32, token_counts=(8, 32), passes=2)
        assert masked.lengths == {64: {"num_tokens": 8}, 256: {"num_tokens": 32}} and masked.name.endswith(
            "l32-t8.32-x2"
        )
        for study, columns in CODES.items():  # as long as a model for each length, or as all of them
            first, *others = columns.values()
            for point in (
                point for points in others for point in points if point.channel_counts or point.token_counts
            ):
                assert point.passes in (1, len(first)), study
                assert sorted(point.lengths) == sorted(point.floats for point in first)


def test_table_of_codes(tmp_path):
    first, nested = Point(8, 2, mixed_precision="no"), CODES["nested"]["nested, equal steps"][0]
    rows = [{"name": first.name, "floats": 128, "psnr": psnr} for psnr in (20.0, 21.0)]
    rows += [{"name": nested.name, "floats": floats, "psnr": 20.0 + floats / 256} for floats in (128, 256)]
    table = report_codes("nested", rows, tmp_path)
    assert table[1:] == [
        "| E | a model for each | nested, equal steps | nested, equal total |",
        "|---|---|---|---|",
        "| 128 | 20.50 (1.00) | 20.50 (0.00) +0.00 |  |",
        "| 256 |  | 21.00 (0.00) |  |",
    ]
    assert (tmp_path / "nested.png").is_file()
    assert report_codes("nested", rows[2:], tmp_path) == []


def test_r_squared():
    x = np.arange(8.0)
    assert r_squared(x, 3 * x - 2) == pytest.approx(1.0)
    assert r_squared(x, np.array([1.0, -1, -1, 1, 1, -1, -1, 1])) == pytest.approx(0.0)
    noisy = x + np.array([1.0, -1, 1, -1, 1, -1, 1, -1])
    assert r_squared(x, noisy) == pytest.approx(np.corrcoef(x, noisy)[0, 1] ** 2)


class TestRuns:
    """Training is stood in for by random weights, or by the real script on one point (slow)."""

    @pytest.fixture
    def study(self, tmp_path, monkeypatch):
        for split in ("train", "test"):
            write_noise(tmp_path / split, 3)
        monkeypatch.setitem(scaling_study.STUDIES, "encoder", [Point(16, 2, layers, 1) for layers in (1, 2, 3)])
        options = {"train_data_dir": tmp_path / "train", "test_data_dir": tmp_path / "test", "studies": "encoder"}
        options |= {"seeds": 0, "max_train_steps": 2, "num_crops": 150}
        options["output_dir"] = tmp_path / "study"

        def run(**overrides):
            command = [
                part for name, value in (options | overrides).items() for part in (f"--{name}", *str(value).split())
            ]
            monkeypatch.setattr(sys, "argv", ["scaling_study.py", *command])
            scaling_study.main()
            with open(tmp_path / "study" / "results.csv", newline="") as file:
                return list(csv.DictReader(file))

        return run

    def test_goes_on_where_it_stopped(self, study, monkeypatch, tmp_path):
        trained = []

        def train(point, seed, folder, args, most):
            if len(trained) == most:
                raise KeyboardInterrupt
            trained.append((point.encoder_layers, seed))
            AutoencoderViTok(**point.model_config()).save_pretrained(folder / "vae")

        monkeypatch.setattr(scaling_study, "train", partial(train, most=2))
        with pytest.raises(KeyboardInterrupt):
            study()
        monkeypatch.setattr(scaling_study, "train", partial(train, most=9))
        rows = study(seeds="0 1")
        assert len(rows) == 6
        assert trained == [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1)]  # none twice
        parameters = [int(row["encoder_parameters"]) for row in rows[:3]]
        assert parameters == sorted(parameters) and len({row["decoder_parameters"] for row in rows}) == 1
        assert "| encoder | 6 | " in (tmp_path / "study" / "report.md").read_text()
        assert (tmp_path / "study" / "encoder.png").is_file()
        with pytest.raises(ValueError, match="max_train_steps 2, not 3: name another folder"):
            study(max_train_steps=3)

    def test_other_pictures(self, study, monkeypatch, tmp_path):
        """Neither finished runs nor the crops are those of other pictures."""

        def train(point, seed, folder, args):
            assert len(list(scaling_study.cut_crops(args).iterdir())) == 200
            AutoencoderViTok(**point.model_config()).save_pretrained(folder / "vae")

        monkeypatch.setattr(scaling_study, "train", train)
        rows = study()
        with pytest.raises(
            ValueError, match=r"with num_crops 150, not 300; weights \[None\], not \[0.5\]: name another"
        ):
            study(num_crops=300, train_data_dir=f"{tmp_path / 'train'}:0.5")
        picture, good = tmp_path / "train" / "001.png", (tmp_path / "train" / "001.png").read_bytes()
        Image.new("RGB", (40, 32), "red").save(picture)
        with pytest.raises(ValueError, match=r"with other files, 1 changed \(train/001.png\): name another folder"):
            study()
        picture.write_bytes(good)
        (tmp_path / "test" / "002.png").rename(tmp_path / "test" / "003.png")
        with pytest.raises(ValueError, match=r"1 missing \(test/002.png\), 1 new \(test/003.png\)"):
            study()
        (tmp_path / "test" / "003.png").rename(tmp_path / "test" / "002.png")
        assert study() == rows

    @pytest.mark.slow
    def test_trains(self, study, monkeypatch, tmp_path):
        monkeypatch.setitem(scaling_study.STUDIES, "encoder", [Point(16, 2, 1, 1)])
        monkeypatch.setitem(scaling_study.TRAINING, "compile", False)
        assert float(study()[0]["psnr"]) > 3
        crops = list((tmp_path / "study" / "crops").iterdir())
        assert len(crops) == 200 and Image.open(crops[0]).size == (64, 64)
