import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS, make_vae, run_on_two_processes
from tests.evaluation.test_distributions import colour_and_logits
from tests.training.conftest import write_video
from vitok_hf.evaluation.codecs import ImageCodec, decode
from vitok_hf.evaluation.data import EvaluationData
from vitok_hf.evaluation.evaluator import ReconstructionEvaluator
from vitok_hf.evaluation.metrics import psnr, ssim
from vitok_hf.evaluation.networks import FeatureNetwork
from vitok_hf.evaluation.protocol import Protocol
from vitok_hf.evaluation.reconstruction import reconstruct
from vitok_hf.training.files import list_files
from vitok_hf.training.items import load_evaluation_images
from vitok_hf.training.media import load_image
from vitok_hf.training.sources import FolderFiles
from vitok_hf.training.video import load_clip


NETWORKS = {
    "inception": FeatureNetwork("tiny", colour_and_logits, "0"),
    "lpips": FeatureNetwork("tiny", lambda x, y: (x.float() - y.float()).abs().mean(dim=(1, 2, 3)), "1"),
}


def make_data(limit: int | None = None, **protocol) -> EvaluationData:
    return EvaluationData(FolderFiles(str(ASSETS)), Protocol(**{"resolution": 64} | protocol), limit)


def darken(images: torch.Tensor) -> torch.Tensor:
    """A codec whose error differs from picture to picture."""
    return (images.double() * 0.9).round().to(torch.uint8)


class TestEvaluationData:
    def test_is_what_training_evaluates_on(self):
        data = make_data(3)
        (images,) = data.batches(range(len(data)), 8)
        assert torch.equal(images, load_evaluation_images(ASSETS, 64, 3))

    def test_whole_pictures_go_apart(self):
        data = make_data(resolution=None)
        batches = list(data.batches(range(len(data)), 8))
        files = list_files(ASSETS)
        assert sum(len(batch) for batch in batches) == len(files) and len(batches) > 1
        first = batches[0][0].permute(1, 2, 0).numpy()
        assert np.array_equal(first, load_image(files[0]))

    def test_clips(self, tmp_path):
        write_video(tmp_path / "ramp.mp4")
        protocol = Protocol(resolution=None, num_frames=4)
        data = EvaluationData(FolderFiles(str(tmp_path), 4), protocol)
        expected = torch.from_numpy(load_clip(tmp_path / "ramp.mp4", 0.0, 4)).permute(3, 0, 1, 2)
        assert torch.equal(data[0], expected)

    def test_no_pictures(self):
        with pytest.raises(ValueError, match="no pictures"):
            EvaluationData([], Protocol())


class TestReconstructionEvaluator:
    def test_values(self):
        data = make_data()
        evaluator = ReconstructionEvaluator(data, "assets", NETWORKS, {"dino": "no weights"}, batch_size=2)
        result, values = evaluator.evaluate("darker", darken, {"parameters_M": 1.0})
        (images,) = data.batches(range(len(data)), 8)
        expected = {"psnr": psnr(darken(images), images), "ssim": ssim(darken(images), images)}
        for name, column in expected.items():
            torch.testing.assert_close(values[name], column)
            assert result.metrics[name] == pytest.approx(column.mean().item())
            low, high = result.intervals[name]
            assert column.min() <= low < result.metrics[name] < high <= column.max()
        assert result.metrics["rFID"] > 10 and "rIS" in result.unavailable and result.metrics["lpips"] > 1
        assert result.unavailable["rFDD"] == "no weights"
        assert result.unavailable["ms_ssim"] == "MS-SSIM needs 161 pixels a side, but the pictures are 64 x 64."
        assert result.costs["parameters_M"] == 1.0 and result.costs["seconds"] > 0
        assert result.protocol.networks["inception"] == {"name": "tiny", "sha256": "0"}
        assert (result.num_items, result.data) == (len(data), "assets")

    def test_rows_are_independent_and_identical_pictures_are_infinite(self):
        evaluator = ReconstructionEvaluator(make_data(), "assets", NETWORKS)
        first, _ = evaluator.evaluate("darker", darken)
        same, _ = evaluator.evaluate("same", torch.clone)
        again, _ = evaluator.evaluate("darker", darken)
        assert first.metrics == again.metrics
        assert same.metrics["psnr"] == float("inf") and abs(same.metrics["rFID"]) < 1e-6
        assert "psnr" not in same.intervals and same.intervals["ssim"] == (1.0, 1.0)

    def test_other_pictures_have_another_checksum(self):
        checksums = {ReconstructionEvaluator(make_data(limit), "x").data_sha256 for limit in (None, None, 2)}
        assert len(checksums) == 2

    def test_clips_count_by_the_mean_of_their_frames(self, tmp_path):
        write_video(tmp_path / "ramp.mp4")
        data = EvaluationData(FolderFiles(str(tmp_path), 4), Protocol(resolution=32, num_frames=4))
        vae = make_vae("video", sample_size=16)
        evaluator = ReconstructionEvaluator(data, "ramp", NETWORKS)
        result, values = evaluator.evaluate("video", lambda clips: reconstruct(vae, clips))
        clip, reconstruction = data[0], reconstruct(vae, data[0][None])[0]
        expected = psnr(reconstruction.transpose(0, 1), clip.transpose(0, 1)).mean()
        assert values["psnr"].shape == (1,) and result.metrics["psnr"] == pytest.approx(expected.item())

    def test_memory_that_cannot_be_measured_is_named(self, monkeypatch):
        def fail(device):
            raise FileNotFoundError("no such file: /proc/self/clear_refs")

        monkeypatch.setattr("vitok_hf.evaluation.evaluator.reset_peak_memory", fail)
        result, _ = ReconstructionEvaluator(make_data(2), "assets").evaluate("darker", darken)
        assert "memory_MB" not in result.costs and "/proc/self" in result.unavailable["memory_MB"]

    def test_a_codec_must_keep_the_size(self):
        with pytest.raises(ValueError, match=r"uint8 of \(.*32\) for uint8 pictures of \(.*64\)"):
            ReconstructionEvaluator(make_data(1), "assets").evaluate("crop", lambda x: x[..., :32])


def evaluate_share(path: str) -> None:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    evaluator = ReconstructionEvaluator(make_data(3), "assets", NETWORKS, batch_size=2)
    torch.save((len(evaluator.share), *evaluator.evaluate("darker", darken)), f"{path}.{state.process_index}")


def test_two_processes_measure_as_one(tmp_path):
    run_on_two_processes(evaluate_share, str(tmp_path / "x"))
    expected, values = ReconstructionEvaluator(make_data(3), "assets", NETWORKS).evaluate("darker", darken)
    shares = []
    for rank in (0, 1):
        share, result, columns = torch.load(tmp_path / f"x.{rank}", weights_only=False)
        shares.append(share)
        assert torch.equal(columns["psnr"], values["psnr"])
        assert result.metrics == pytest.approx(expected.metrics) and result.intervals == expected.intervals
        assert result.data_sha256 == expected.data_sha256
    assert shares == [2, 1]


class TestImageCodec:
    @pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
    def test_is_the_best_within_the_budget(self, file_format):
        images = load_evaluation_images(ASSETS, 64, 2)
        codec = ImageCodec(file_format, 1500)
        decoded = codec(images)
        assert decoded.shape == images.shape and psnr(decoded, images).min() > 20
        for image in images:
            data = codec.compress(image)
            assert len(data) <= 1500
            picture, errors = Image.fromarray(image.permute(1, 2, 0).numpy()), []
            for settings in codec.SETTINGS[file_format]:
                within = []
                for quality in range(1, 101):
                    file = io.BytesIO()
                    picture.save(file, file_format, quality=quality, optimize=True, **settings)
                    within += [file.getvalue()] if len(file.getvalue()) <= 1500 else []
                decoded = torch.from_numpy(decode(max(within, key=len))).permute(2, 0, 1)
                errors.append(psnr(decoded[None], image[None]).item())
            best = torch.from_numpy(decode(data)).permute(2, 0, 1)
            assert psnr(best[None], image[None]).item() == max(errors)
        assert codec.num_items == 4 and codec.num_above_budget == 0 and 4 * 1000 < codec.num_bytes <= 4 * 1500

    def test_above_the_budget(self):
        codec = ImageCodec("JPEG", 100)
        images = load_evaluation_images(ASSETS, 64, 2)
        codec(images)
        assert codec.num_above_budget == 2
        picture, file = Image.fromarray(images[0].permute(1, 2, 0).numpy()), io.BytesIO()
        picture.save(file, "JPEG", quality=1, optimize=True, subsampling="4:2:0")
        assert len(codec.compress(images[0])) == len(file.getvalue())

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match='no codec "PNG": choose from JPEG, WEBP'):
            ImageCodec("PNG", 100)
        with pytest.raises(ValueError, match="`max_bytes` is 0"):
            ImageCodec("JPEG", 0)
