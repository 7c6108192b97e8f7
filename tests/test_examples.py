"""Runs the scripts of examples/ as a user would."""

import argparse
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import estimate_training
import lpips
import numpy as np
import onnxruntime
import pytest
import torch
from demo_data.download import run as run_tool
from demo_data.emoji import SKIN_TONES, normal_code, render_emoji, squash
from demo_data.photos import OPEN_LICENCE, photo_rows
from PIL import Image

from tests.conftest import ASSETS, EXAMPLES, TINY, launch_example, make_input, make_vae
from tests.data.conftest import write_noise, write_video
from tests.dit import make_pipeline
from vitok_hf import AutoencoderViTok
from vitok_hf.commands import start
from vitok_hf.data.video import iterate_timed_frames
from vitok_hf.evaluation.features import Classifier
from vitok_hf.evaluation.results import load_results
from vitok_hf.evaluation.visuals import VideoWriter


@pytest.fixture
def model(tmp_path):
    make_vae("v1").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_colours(folder):
    """Reddish and bluish noise, in folders red and blue of train (8 pictures each) and test (4)."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                picture = np.clip(rng.normal(colour, 20, (48, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / split / name / f"{index}.png")


class TestReconstruct:
    def test_folder_and_padding(self, run_example, model, tmp_path):
        Image.new("RGB", (300, 5)).save(tmp_path / "bar.png")
        out = run_example("reconstruct.py", "--input", "bar.png", ASSETS, "--model", model, "--output_dir", "out")
        assert "bar.png: 300x5 (padded)" in out and "SSIM needs 11 pixels a side" in out
        assert "chelsea.png: 451x300 (padded)" in out and "rocket.jpg" in out
        assert Image.open(tmp_path / "out" / "chelsea_reconstruction.png").size == (451, 300)

    def test_goes_on_after_files_that_cannot_be_read(self, run_example, model, tmp_path, capsys):
        write_noise(tmp_path / "folder" / "cats.png", 2, (16, 16))
        for name in ("broken.png", "no_film.mp4"):
            (tmp_path / "folder" / name).write_bytes(b"nothing")
        os.link(tmp_path / "folder" / "cats.png" / "000.png", os.fsencode(tmp_path / "folder") + b"/\xff.png")
        with pytest.raises(SystemExit) as end:
            run_example("reconstruct.py", "--input", "folder", "--model", model, "--output_dir", "out")
        lines = str(end.value).splitlines()
        assert lines[0] == "2 of 5 files failed:" and len(lines) == 3  # a message: the exit code is 1
        assert lines[1].startswith("folder/broken.png: cannot be read as a picture")
        assert lines[2].startswith("folder/no_film.mp4: cannot be read as a video")
        out = capsys.readouterr().out
        assert "000.png: 16x16  PSNR" in out and "001.png: 16x16  PSNR" in out and "\\udcff.png: 16x16" in out
        assert len(list((tmp_path / "out").rglob("*_comparison.png"))) == 3

    def test_inputs_are_not_replaced(self, run_example, model, tmp_path):
        for name in ("a.png", "a_reconstruction.png"):
            Image.new("RGB", (16, 16), "red").save(tmp_path / name)
        before = (tmp_path / "a_reconstruction.png").read_bytes()
        with pytest.raises(ValueError, match="a_reconstruction.png.* is an input and may not be replaced"):
            run_example("reconstruct.py", "--input", ".", "--model", model, "--output_dir", ".")
        assert (tmp_path / "a_reconstruction.png").read_bytes() == before

    def test_settings_that_do_not_fit_end_the_command(self, run_example, model):
        with pytest.raises(ValueError, match="`max_cached_frames` is 3, but videos through models not causal go"):
            run_example("reconstruct.py", "--model", model, "--max_cached_frames", 3)

    def test_results_are_no_inputs(self, run_example, model, tmp_path):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
        for _ in range(2):
            out = run_example("reconstruct.py", "--input", ".", "--model", model)
            assert out.count("PSNR") == 1
        assert len(list(tmp_path.rglob("*.png"))) == 3

    @pytest.mark.parametrize("architecture", ["v1", "video", "causal"])
    def test_video(self, run_example, tmp_path, architecture):
        write_video(tmp_path / "ramp.mp4")
        make_vae(architecture, sample_size=16).save_pretrained(tmp_path / "model")
        out = run_example("reconstruct.py", "--input", "ramp.mp4", "--model", "model", "--output_dir", "out")
        assert "ramp.mp4, 50 frames: 64x48  PSNR" in out
        with av.open(str(tmp_path / "out" / "ramp_comparison.mp4")) as container:
            assert container.streams.video[0].codec_context.colorspace == 6  # BT.601 is told, and not left to guesses
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 50 and frames[0].shape == (48, 128, 3)
        assert abs(frames[30][:, :60].mean() - 150) < 4  # the original is on the left
        assert (tmp_path / "out" / "ramp_reconstruction.mp4").stat().st_size > 0
        assert Image.open(tmp_path / "out" / "ramp_frames.png").size == (8 * 64, 2 * 48)

    def test_video_of_a_variable_rate(self, run_example, tmp_path):
        times = [Fraction(0), *(3 + Fraction(index, 25) for index in range(4))]
        with VideoWriter(tmp_path / "x.mp4", Fraction(25)) as video:
            video.write(torch.zeros(5, 16, 16, 3, dtype=torch.uint8), times)
        make_vae("v1", sample_size=16).save_pretrained(tmp_path / "model")
        run_example("reconstruct.py", "--input", "x.mp4", "--model", "model", "--output_dir", "out")
        shown = [second for second, _ in iterate_timed_frames(tmp_path / "out" / "x_comparison.mp4")]
        assert shown == pytest.approx([float(time) for time in times], abs=1e-3)


class TestTraining:
    DATA = ("--train_data_dir", f"{ASSETS}:2", "--crop_sizes", "16:2", "8x32", "--resolution", 16)
    SHORT = ("--train_batch_size", 4, "--max_train_steps", 2, "--lpips_weight", 0, "--report_to", "none")

    def test_both_stages_and_export(self, run_example, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(TINY))
        (tmp_path / "run.yaml").write_text("stage: 1\nmodel_config: config.json\nlearning_rate: 1e-3\n")
        run_example("train_vitok.py", "--config", "run.yaml", *self.DATA, *self.SHORT, "--output_dir", "first")
        run_example(
            *("train_vitok.py", "--stage", 2, "--pretrained_model_name_or_path", "first/vae", *self.DATA, *self.SHORT),
            *("--discriminator_channels", 4, "--use_ema", "--output_dir", "second"),
        )
        encoders = [AutoencoderViTok.from_pretrained(tmp_path / run / "vae").encoder for run in ("first", "second")]
        assert all(torch.equal(*pair) for pair in zip(*(encoder.parameters() for encoder in encoders)))
        run_example(
            *("export_checkpoint.py", "--model", "second/checkpoint-2/vae_ema", "--train_data_dir", ASSETS),
            *("--num_batches", 2, "--size", 64, "--output_dir", "exported"),
        )
        vae = AutoencoderViTok.from_pretrained(tmp_path / "exported")
        assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 4
        assert min(vae.config.latents_std) > 0

    def test_estimate(self, run_example):
        small = ("--variant", "w32_d1_h2-w32_d1_h2/1x8x4", "--resolution", 32, "--batch_size", 16, "--num_devices", 2)
        hours = []
        for options in (("--stage", 1), ("--stage", 2), ("--stage", 1, "--max_train_steps", 200_000)):
            out = run_example("estimate_training.py", *small, *options)
            assert "with 8 at a time" in out
            hours.append(float(out.split("GFLOP a picture")[0].split("operations")[1]))
        assert hours[1] > hours[0] > 0

    def test_lpips_is_estimated_in_float32(self, run_example, monkeypatch):
        """As it runs: in the bytes that are kept, and in the time, by --float32_teraflops."""
        args = argparse.Namespace(variant="w32_d1_h2-w32_d1_h2/1x8x4", stage=1, resolution=32)
        args.gradient_checkpointing = False
        network = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False).requires_grad_(False)
        picture, kept = torch.rand(1, 3, 32, 32), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x
        ):
            network(picture.clone().requires_grad_(), picture).sum()
        weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        alone = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights)
        assert alone < estimate_training.count_activations(args) < 1.3 * alone  # the tiny ViTok has little
        command = ("--variant", args.variant, "--resolution", 32, "--batch_size", 10**6, "--num_devices", 1)
        seconds = []
        for speed in (1, 2):
            options = ("--teraflops", 4, "--float32_teraflops", speed, "--utilization", 1)
            out = run_example("estimate_training.py", *command, *options)
            seconds.append(float(out.split("\ntime")[1].split()[0]))
        flops = estimate_training.count_operations(args)[1]
        assert seconds[0] - seconds[1] == pytest.approx(flops * 10**6 / 2e12, rel=1e-3)
        assert f"{flops / 1e9:.0f} in float32" in out

    def test_classifier_and_sharpness(self, run_example, model, tmp_path):
        write_colours(tmp_path)
        out = run_example(
            *("train_classifier.py", "--train_data_dir", "train", "--validation_data_dir", "test"),
            *("--resolution", 32, "--max_train_steps", 8, "--train_batch_size", 16, "--dataloader_num_workers", 0),
            *("--random_flip", "--report_to", "none"),
        )
        assert float(out.split("test_accuracy: ")[1].split()[0]) >= 0.5
        vae = AutoencoderViTok.from_pretrained(model)
        vae.decoder.proj_out.weight.data *= 0.1
        vae.save_pretrained(tmp_path / "other")
        out = run_example(
            *("evaluate_sharpness.py", "--models", "model", "other", "--data_dir", "test/red", "test/blue"),
            *("--classifier", "output-classifier/classifier/classifier.safetensors", "--resolution", 32, "--crop", 16),
        )
        rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("| red")]
        assert [row[2] for row in rows] == ["model", "other"]
        assert float(rows[0][5]) > 10 * float(rows[1][5]) > 0 and float(rows[0][6]) > 0
        assert Image.open(tmp_path / "sharpness" / "red.png").size == (3 * 16 * 4, 4 * 16 * 4)


class TestGenerate:
    @pytest.fixture
    def pipeline(self, tmp_path):
        make_pipeline(id2label={0: "blue", 1: "red"}, num_classes=2).save_pretrained(tmp_path / "pipeline")
        return tmp_path / "pipeline"

    def test_grid(self, run_example, pipeline, tmp_path):
        arguments = ("--num_images_per_label", 3, "--num_inference_steps", 2)
        out = run_example("generate.py", "--model", pipeline, *arguments)
        assert "Rows: blue, red" in out and "6 pictures in " in out
        grid = np.asarray(Image.open(tmp_path / "samples.png"))
        assert grid.shape == (2 * 32, 3 * 32, 3)
        # a sample depends on its own seed alone
        run_example("generate.py", "--model", pipeline, *arguments, "--class_labels", "red", "--seed", 3)
        alone = np.asarray(Image.open(tmp_path / "samples.png")).astype(int)
        assert np.abs(alone - grid[32:]).max() <= 1
        assert "Rows: red" in run_example("generate.py", "--model", pipeline, *arguments, "--class_labels", 1)
        with pytest.raises(ValueError, match="draw 0 pictures of 2 classes"):
            run_example("generate.py", "--model", pipeline, "--num_images_per_label", 0)

    def test_evaluation(self, run_example, pipeline, tmp_path):
        write_colours(tmp_path)
        torch.manual_seed(0)
        Classifier(["blue", "green", "red"]).save(tmp_path / "classifier.safetensors")
        command = [
            *("evaluate_generation.py", "--model", str(pipeline), "--classifier", "classifier.safetensors"),
            *("--train_data_dir", "train/red", "train/blue", "--test_data_dir", "test/red", "test/blue"),
            *("--max_test_files", "3", "--num_inference_steps", "2", "--classifier_size", "32", "--networks"),
        ]
        out = run_example(*command)
        rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("| ")]
        sets = {row[1]: row for row in rows if len(row) == 7}  # the first table
        assert [sets[name][2] for name in ("samples", "training pictures")] == ["6"] * 2
        assert float(sets["held-out pictures"][5]) == pytest.approx(0.0, abs=1e-2)
        assert float(sets["samples"][5]) > float(sets["training pictures"][5]) > 0
        names = ("samples", "held-out pictures")
        distances = {row[1]: [float(cell) for cell in row[2:5]] for row in rows if len(row) == 6 and row[1] in names}
        assert distances["samples"] == sorted(distances["samples"])
        assert min(distances["samples"]) > max(distances["held-out pictures"])  # noise of an untrained model
        picture = Image.open(tmp_path / "evaluation" / "neighbours_samples.png")
        assert picture.size == (2 * 6 * 32, 2 * 32)
        (result,) = load_results(tmp_path / "evaluation" / "results.json")
        assert result.num_items == 6 and result.protocol.resolution == 32

        with pytest.raises(ValueError, match="num_inference_steps 2, not 3: name another folder"):
            run_example(*command, "--num_inference_steps", "3")
        vae = AutoencoderViTok.from_pretrained(pipeline / "vae")
        std = vae.config.latents_std
        vae.register_to_config(latents_std=[9.0] * 4)  # with the same weights, other pictures
        vae.save_pretrained(pipeline / "vae")
        with pytest.raises(ValueError, match=r'samples" has results with vae_sha256 \w{64}, not \w{64}: name another'):
            run_example(*command)
        vae.register_to_config(latents_std=std)
        vae.save_pretrained(pipeline / "vae")
        launched = launch_example(*command, "--output_dir", "shared", "--batch_size", "2", folder=tmp_path)
        numbers = [re.findall(r"\d+\.\d+", text) for text in (out, launched)]
        assert len(numbers[0]) > 10
        assert [float(x) for x in numbers[1]] == pytest.approx([float(x) for x in numbers[0]], rel=0.01, abs=0.01)
        (shared,) = load_results(tmp_path / "shared" / "results.json")
        assert shared.data_sha256 == result.data_sha256


def test_benchmark_dit(run_example):
    out = run_example("benchmark_dit.py", "--variants", "S", "--sample_size", 4, "--rounds", 2, "--no_compile")
    assert "DiT-S: batch 2, 16 tokens" in out
    assert "x floor" in out.split("ViTokDiT ")[1] and "1.00 x as fast" in out.split("DiTTransformer2DModel ")[1]


def test_benchmark_of_streams(run_example, monkeypatch):
    monkeypatch.setattr("studies.baselines.make_peer", lambda name: make_vae("causal", temporal_patch_size=4))
    variant = ("--variant", "w32_d1_h2-w32_d1_h2/4x8x4", "--max_cached_frames", 2)
    out = run_example("benchmark_streams.py", *variant, "--size", 16, "--frames", 1, 20)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["1", "21", "1", "21", "4", "20", "1", "21"]
    assert all(0 <= float(row[2]) <= float(row[3]) < 10 for row in rows)


class TestExportOnnx:
    @pytest.mark.parametrize("architecture, opset", [("v2", 20), ("video", 23), ("causal", 23)])
    @torch.no_grad()
    def test_any_size(self, run_example, tmp_path, architecture, opset):
        small = {"encoder_num_layers": 1, "decoder_num_layers": 1}
        vae = make_vae(architecture, shift_factor=0.5, scaling_factor=0.25, **small)
        vae.save_pretrained(tmp_path / "model")
        out = run_example(
            *("export_onnx.py", "--model", "model", "--opset", opset),
            *("--sizes", "24x16", "--batch_sizes", 2, "--rounds", 1),
        )
        assert out.count("max error") == 2 and f"opset {opset}" in out
        *files, described = sorted((tmp_path / "onnx").iterdir())
        assert [file.name for file in (*files, described)] == ["decoder.onnx", "encoder.onnx", "model.json"]
        assert not any(str(EXAMPLES.parent).encode() in file.read_bytes() for file in files)
        decoder, encoder = (onnxruntime.InferenceSession(file) for file in files)
        for session in (encoder, decoder):
            metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
            assert metadata == json.loads(described.read_text())
            assert metadata["patch_size"] == 8 and metadata["scaling_factor"] == 0.25
            assert metadata["latents_mean"] == [0.5] * 4 and metadata["latents_std"] == [1.0] * 4
        for batch_size, height, width, frames in ((1, 8, 40, 2), (3, 56, 8, 4)):
            x = make_input(vae, batch_size, height, width)
            x = x[:, :, :frames] if architecture == "video" else x
            outputs = encoder.run(None, {"pixel_values": x.numpy()})
            posterior = vae.encode(x).latent_dist
            expected = [posterior.mode(), posterior.std] if vae.config.variational else [posterior.mode()]
            outputs += decoder.run(None, {"latents": outputs[0]})
            torch.testing.assert_close(
                [torch.from_numpy(output) for output in outputs],
                [*expected, vae.decode(posterior.mode()).sample],
                rtol=0,
                atol=1e-4,
            )

    @pytest.mark.parametrize(
        "option, words",
        [
            (("--sizes", "65x64"), r"multiples of \(8, 8\), but one is \(65, 64\)"),
            (("--sizes", "0x64"), r"positive multiples of \(8, 8\), but one is \(0, 64\)"),
            (("--batch_sizes", "0"), "`batch_sizes` .* but is 0"),
            (("--rounds", "0"), "`rounds` .* but is 0"),
        ],
    )
    def test_checks_of_nothing(self, tmp_path, option, words):
        with pytest.raises(ValueError, match=words):
            start("export-onnx", [*option, "--output_dir", str(tmp_path / "onnx")])
        assert not (tmp_path / "onnx").exists()

    def test_writes_nothing_that_differs(self, monkeypatch, tmp_path):
        make_vae("v1", component="decoder", decoder_num_layers=1).save_pretrained(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("vitok_hf.models.onnx.TOLERANCE", -1.0)
        with pytest.raises(ValueError, match=r"decoder.onnx differs from PyTorch by .* for \(1, 4, 2, 3\)"):
            start("export-onnx", ["--model", "model", "--sizes", "16x24", "--rounds", "1"])
        assert list((tmp_path / "onnx").iterdir()) == []

    def test_weights_that_float16_does_not_hold(self, monkeypatch, tmp_path):
        vae = make_vae("v1", component="decoder", decoder_num_layers=1)
        vae.decoder.proj_out.weight.data[0, 0] = 70000
        vae.save_pretrained(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="`model.decoder.proj_out.weight` has numbers beyond 65504"):
            start("export-onnx", ["--model", "model", "--half"])
        assert list((tmp_path / "onnx").iterdir()) == []

    def test_codes_without_a_grid_are_refused(self, monkeypatch, tmp_path):
        make_vae("v1", num_latent_tokens=3).save_pretrained(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="the config has `num_latent_tokens` 3"):
            start("export-onnx", ["--model", "model"])


@pytest.mark.parametrize("options", [(), ("--train",)])
def test_benchmark(run_example, options):
    arguments = ("--variant", "w32_d1_h2-w32_d1_h2/1x8x4", "--size", 32, "--batch_size", 1, "--rounds", 2)
    out = run_example("benchmark.py", *arguments, "--peer_rounds", 1, "--no_compile", *options)
    assert "floor" in out and "x floor" in out.split("eager")[1]
    assert ("times faster" in out) == (not options)


def test_evaluate_demo(run_example, model, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("film", "photos", "clip", "emoji"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            coarse = rng.integers(0, 256, (18, 18, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((576, 576)).save(folder / "x.png")
    out = run_example("evaluate_demo.py", "--model", model, "--data_dir", "data", "--limit", 2, "--pca_batches", 1)
    rows = [line for line in out.splitlines() if line.startswith("| emoji, 64 px")]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert float(cells[2]) - float(cells[3]) == pytest.approx(float(cells[4]), abs=0.02)
    assert "| photos, 1 crops of 512 px |" in out
    assert Image.open(Path("evaluation") / "film_256.png").size == (3 * 256, 256)


class TestDemoData:
    def test_splits_do_not_overlap(self):
        photos = photo_rows()
        assert len(photos) == len({path for _, path in photos}) == 61
        assert sum(row["split"] == "test" for row, _ in photos) == 15
        open_ones = [row for row, _ in photos if row["split"] == "train" and OPEN_LICENCE.match(row["licence"])]
        assert len(open_ones) == 9
        assert not any("SA" in row["licence"] or "GPL" in row["licence"] for row in open_ones)

    def test_codes(self):
        assert normal_code("1f44b-1f3ff-fe0f") == "1F44B-1F3FF"
        assert normal_code("1f44b-1f3ff", dropped=SKIN_TONES) == "1F44B"
        assert squash("Mrs. Claus") == squash("mrs-claus")

    def test_drawings_are_put_on_white(self, tmp_path):
        square = b'<rect width="1" height="1" fill="#f00"/>'
        svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1">' + square + b"</svg>"
        assert render_emoji((svg, tmp_path / "x.png", 8)) is None
        picture = Image.open(tmp_path / "x.png")
        assert picture.size == (8, 8)
        assert picture.getpixel((1, 4)) == (255, 0, 0) and picture.getpixel((6, 4)) == (255, 255, 255)
        assert "empty" in render_emoji((svg.replace(b"#f00", b"#fff"), tmp_path / "y.png", 8))

    def test_other_options_in_one_folder(self, run_example, tmp_path, monkeypatch):
        """Finished files are skipped: they must be what is asked for."""
        monkeypatch.setattr("demo_data.emoji.prepare_emoji", lambda *args: [])
        command = ("prepare_demo_data.py", "--output_dir", tmp_path / "data", "--sets", "emoji")
        for _ in range(2):
            assert "0 problems" in run_example(*command)
        with pytest.raises(ValueError, match="has results with include_share_alike False, not True: name another"):
            run_example(*command, "--include_share_alike")

    def test_missing_tools_are_named(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="'emoji' cannot be built: the program 'no-such-tool'.*--sets"):
            run_tool("emoji", ["no-such-tool"], tmp_path)
