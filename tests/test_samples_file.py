"""Files of samples, as the evaluation suite of ADM reads them."""

import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import make_vae
from tests.dit import make_pipeline
from vitok_hf.commands import main
from vitok_hf.data.held_out import EvaluationData, Protocol
from vitok_hf.data.samples_file import SamplesFile, write_samples_file
from vitok_hf.evaluation.generation import generate_samples
from vitok_hf.evaluation.results import load_results


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class TestFile:
    def test_as_adm_reads_it(self, tmp_path):
        """It takes the header of the member "arr_0.npy", and then reads the pictures one after the other."""
        pixels, labels = noise(3, 8, 8, 3), np.array([4, 0, 4])
        write_samples_file(tmp_path / "x.npz", pixels, labels)
        with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            assert np.lib.format.read_array_header_1_0(member) == ((3, 8, 8, 3), False, np.dtype(np.uint8))
            assert member.read() == pixels.tobytes()
        file = SamplesFile(tmp_path / "x.npz")
        assert len(file) == 3 and np.array_equal(file[1].pixels, pixels[1]) and file.labels.tolist() == [4, 0, 4]
        data = EvaluationData(file, Protocol(8))
        assert np.array_equal(data[2][:, 0].permute(1, 2, 0), pixels[2])

    def test_references_with_statistics(self, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=noise(2, 8, 8, 3), mu=np.zeros(9), sigma=np.zeros((9, 9)))
        assert len(file := SamplesFile(tmp_path / "x.npz")) == 2 and file.labels is None

    @pytest.mark.parametrize(
        "arrays, message",
        [
            ([noise(2, 3, 8, 8)], r"\(N, height, width, 3\) uint8, but has uint8 of \(2, 3, 8, 8\)"),
            ([noise(8, 8, 3)], r"but has uint8 of \(8, 8, 3\)"),
            ([noise(2, 8, 8, 3) / 255], r"but has float64 of \(2, 8, 8, 3\)"),
            ([noise(0, 8, 8, 3)], r"but has uint8 of \(0, 8, 8, 3\)"),
            ([noise(2, 8, 8, 3), np.arange(3)], r"class ids of 2 pictures, integers, but has int64 of \(3,\)"),
            ([noise(2, 8, 8, 3), np.zeros(2)], r"class ids of 2 pictures, integers, but has float64"),
        ],
    )
    def test_other_sizes(self, tmp_path, arrays, message):
        with pytest.raises(ValueError, match=message):
            write_samples_file(tmp_path / "x.npz", *arrays)
        assert not (tmp_path / "x.npz").exists()
        np.savez(tmp_path / "x.npz", *arrays)
        with pytest.raises(ValueError, match=message):
            SamplesFile(tmp_path / "x.npz")

    def test_no_such_file(self, tmp_path):
        np.save(tmp_path / "x.npy", noise(2, 8, 8, 3))
        (tmp_path / "x.npz").write_bytes(b"PK\3\4 and no more")
        np.savez(tmp_path / "y.npz", pictures=noise(2, 8, 8, 3))
        for name, message in (("x.npy", "is no .npz file of pictures"), ("x.npz", "or damaged"), ("y.npz", "`arr_0`")):
            with pytest.raises(ValueError, match=message):
                SamplesFile(tmp_path / name)
        with pytest.raises(ValueError, match='x.npy" must end in .npz'):
            write_samples_file(tmp_path / "x.npy", noise(2, 8, 8, 3))

    def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
        write_samples_file(tmp_path / "x.npz", noise(2, 8, 8, 3))
        before = (tmp_path / "x.npz").read_bytes()
        monkeypatch.setattr(np, "savez", lambda file, *arrays: file.write(b"PK") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_samples_file(tmp_path / "x.npz", noise(3, 8, 8, 3))
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = make_pipeline(id2label={0: "blue", 1: "red"}, num_classes=2)
    pipe.save_pretrained("pipeline")
    return pipe


GENERATE = ("generate", "--model", "pipeline", "--num_images_per_label", "3", "--num_inference_steps", "2")


class TestGenerate:
    def test_all_samples(self, tmp_path, pipeline, capsys):
        main(*GENERATE, "--save_npz", "new/samples.npz")
        assert "saved new/samples.npz" in capsys.readouterr().out and not (tmp_path / "samples.png").exists()
        file = SamplesFile(tmp_path / "new" / "samples.npz")
        assert file.labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = generate_samples(pipeline, file.labels.tolist(), 3, num_inference_steps=2)
        assert (torch.from_numpy(file.pixels).permute(0, 3, 1, 2).int() - expected).abs().max() <= 1

    def test_and_a_picture(self, tmp_path, pipeline, capsys):
        main(*GENERATE, "--save_npz", "samples.npz", "--output", "x.png")
        assert "saved samples.npz and x.png" in capsys.readouterr().out
        grid = np.asarray(Image.open("x.png"))
        assert np.array_equal(grid[32:, :32], SamplesFile("samples.npz").pixels[3])

    def test_name(self, pipeline, capsys):
        with pytest.raises(SystemExit):
            main(*GENERATE, "--save_npz", "samples.npy")
        assert "--save_npz samples.npy must end in .npz" in capsys.readouterr().err


class TestEvaluation:
    @pytest.fixture
    def folders(self, pipeline, tmp_path):
        """Three held-out pictures of each class, also as a file, and as many to train on."""
        pixels = noise(12, 32, 32, 3)
        for index, (split, name) in enumerate((s, n) for s in ("test", "train") for n in ("blue", "red")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(pixels[3 * index + number]).save(tmp_path / split / name / f"{number}.png")
        write_samples_file(tmp_path / "test.npz", pixels[:6], np.repeat([0, 1], 3))
        return ("evaluate_generation.py", "--networks", "--model", "pipeline", "--num_inference_steps", "2")

    def test_files_in_place_of_folders(self, run_example, folders, tmp_path):
        train, test = ("--train_data_dir", "train"), ("--test_data_dir", "test")
        drawn = run_example(*folders, *train, *test, "--guidance_scale", "4", "--guidance_rescale", "0")
        main(*GENERATE, "--save_npz", "samples.npz")
        files = ("--samples", "samples.npz", "--reference", "test.npz")
        for sources in (test + files[:2], files):
            out = run_example(*folders, *train, *sources, "--output_dir", "other")
            assert re.findall(r"\| .*", out) == re.findall(r"\| .*", drawn)
        results = [load_results(tmp_path / name / "results.json")[0] for name in ("evaluation", "other")]
        assert results[0].data_sha256 == results[1].data_sha256
        assert results[1].name == "samples.npz" and results[1].data == "test.npz" and results[1].num_items == 6

    def test_files_alone(self, run_example, folders, tmp_path):
        out = run_example(*folders[:2], "--samples", "test.npz", "--reference", "test.npz")
        (result,) = load_results(tmp_path / "evaluation" / "results.json")
        assert result.num_items == 6 and result.protocol.resolution == 32 and "nearest" not in out

    def test_other_sizes_and_ids(self, run_example, folders, tmp_path):
        write_samples_file("small.npz", noise(4, 16, 16, 3), np.arange(4))
        write_samples_file("plain.npz", noise(4, 32, 32, 3))
        with pytest.raises(ValueError, match='small.npz" has pictures of 16 x 16 pixels, but they must be 32 x 32'):
            run_example(*folders, "--samples", "small.npz", "--reference", "test.npz")
        more = ("--train_data_dir", "train", "--test_data_dir", "test")
        with pytest.raises(ValueError, match='plain.npz" must have class ids from 0 to 1, but has none'):
            run_example(*folders, *more, "--samples", "plain.npz")
        write_samples_file("plain.npz", noise(4, 32, 32, 3), np.arange(4))
        with pytest.raises(ValueError, match="class ids from 0 to 1, but has 0 to 3"):
            run_example(*folders, *more, "--samples", "plain.npz")

    @pytest.mark.parametrize("options", [("--samples", "x"), ("--reference", "x"), ("--test_data_dir", "x")])
    def test_what_is_missing(self, run_example, options, capsys):
        with pytest.raises(SystemExit):
            run_example("evaluate_generation.py", *options)
        assert "give --train_data_dir and --test_data_dir, or --samples and --reference" in capsys.readouterr().err

    def test_reconstruction(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        make_vae("v1").save_pretrained("model")
        write_samples_file("x.npz", noise(3, 32, 32, 3))
        main("evaluate", "--models", "model", "--data_dir", "x.npz", "--resolution", "32", "--networks")
        assert "x.npz, 3 pictures" in capsys.readouterr().out
