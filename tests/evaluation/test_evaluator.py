import json
import math
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS, make_vae, run_on_two_processes
from tests.data.conftest import write_video
from tests.evaluation.test_distributions import colour_and_logits
from vitok_hf.clips import fold_frames
from vitok_hf.data.held_out import EvaluationData, Protocol
from vitok_hf.data.items import Clip
from vitok_hf.data.sources import FolderFiles
from vitok_hf.evaluation.costs import count_macs, reset_peak_memory
from vitok_hf.evaluation.evaluator import ReconstructionEvaluator, Row, autoencoder_row
from vitok_hf.evaluation.metrics import psnr, ssim
from vitok_hf.evaluation.networks import FeatureNetwork
from vitok_hf.evaluation.reconstruction import reconstruct
from vitok_hf.evaluation.results import load_results, save_results
from vitok_hf.evaluation.tables import markdown_table


NETWORKS = {
    "inception": FeatureNetwork("tiny", colour_and_logits, "0"),
    "lpips": FeatureNetwork("tiny", lambda x, y: (x.float() - y.float()).abs().mean(dim=(1, 2, 3)), "1"),
}


def make_data(limit: int | None = None, **protocol) -> EvaluationData:
    return EvaluationData(FolderFiles(str(ASSETS)), Protocol(**{"resolution": 64} | protocol), limit)


def darken(images: torch.Tensor) -> torch.Tensor:
    """A codec whose error differs from picture to picture."""
    return (images.double() * 0.9).round().to(torch.uint8)


DARKER = Row("darker", darken)


class TestReconstructionEvaluator:
    def test_values(self):
        data = make_data()
        evaluator = ReconstructionEvaluator(data, "assets", NETWORKS, {"dino": "no weights"}, batch_size=2)
        result, values = evaluator.evaluate(Row("darker", darken, lambda: {"parameters_M": 1.0}))
        (images,) = map(fold_frames, data.batches(range(len(data)), 8))
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

    def test_rows_are_independent_and_identical_pictures_are_finite(self):
        evaluator = ReconstructionEvaluator(make_data(), "assets", NETWORKS)
        first, _ = evaluator.evaluate(DARKER)
        same, _ = evaluator.evaluate(Row("same", torch.clone))
        again, _ = evaluator.evaluate(DARKER)
        assert first.metrics == again.metrics
        best = 10 * math.log10(12 * 255**2)
        assert same.metrics["psnr"] == pytest.approx(best) and 0 <= same.metrics["rFID"] < 1e-6
        assert same.intervals["psnr"] == pytest.approx((best, best)) and same.intervals["ssim"] == (1.0, 1.0)

    def test_metrics_that_are_not_finite_are_named(self, tmp_path):
        networks = {"lpips": FeatureNetwork("broken", lambda x, y: torch.full((len(x),), torch.nan), "1")}
        result, _ = ReconstructionEvaluator(make_data(2), "assets", networks).evaluate(DARKER)
        assert "lpips" not in result.metrics and result.unavailable["lpips"] == "is nan"
        save_results(tmp_path / "results.json", [result])
        json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # for any reader
        assert load_results(tmp_path / "results.json") == [result]
        assert "No lpips: is nan." in markdown_table([result])

    @pytest.mark.parametrize("count", [1, 2])
    def test_few_pictures(self, count):
        """Fewer than features: distances that are numbers, or a reason; no interval of a single picture."""
        result, _ = ReconstructionEvaluator(make_data(count), "assets", NETWORKS).evaluate(DARKER)
        assert ("rFID" in result.metrics) == ("psnr" in result.intervals) == (count == 2)
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert count == 2 or result.unavailable["rFID"] == "needs 2 real and 2 generated pictures, has 1 and 1"

    def test_costs_are_those_of_all_sizes(self, tmp_path):
        """Two pictures of 16 x 24 and one of 40 x 32, of which 2 x 3 and 5 x 4 patches with 4 channels are left."""
        for index, size in enumerate(((24, 16), (24, 16), (32, 40))):
            Image.new("RGB", size, (index, 0, 0)).save(tmp_path / f"{index}.png")
        data = EvaluationData(FolderFiles(str(tmp_path)), Protocol(resolution=None))
        evaluator, vae = ReconstructionEvaluator(data, "sizes"), make_vae("v1")
        assert evaluator.shapes == {(3, 1, 16, 24): 2, (3, 1, 40, 32): 1}
        costs = evaluator.evaluate(autoencoder_row("tiny", vae, evaluator.shapes))[0].costs
        assert costs["E"] == pytest.approx((24 + 24 + 80) / 3) and costs["bytes"] == pytest.approx(2 * costs["E"])
        assert costs["compression"] == pytest.approx(3 * (2 * 16 * 24 + 40 * 32) / (24 + 24 + 80))
        small, large = (count_macs(vae, (1, 3, 1, *size)) / 1e9 for size in ((16, 24), (40, 32)))
        assert costs["GMACs"] == pytest.approx((2 * small + large) / 3) and large > 3 * small

    @pytest.mark.parametrize("batch_size", [0, -1, 1.5])
    def test_batches_of_nothing(self, batch_size):
        with pytest.raises(ValueError, match=f"`batch_size` must be an integer from 1 .* but is {batch_size}"):
            ReconstructionEvaluator(make_data(2), "assets", batch_size=batch_size)

    def test_other_pictures_have_another_checksum(self):
        checksums = {ReconstructionEvaluator(make_data(limit), "x").data_sha256 for limit in (None, None, 2)}
        assert len(checksums) == 2

    def test_clips_count_by_the_mean_of_their_frames(self, tmp_path):
        """Each by its own, in a batch of two clips: of the same video, but from other seconds."""
        for name in ("a.mp4", "b.mp4"):
            write_video(tmp_path / name)
        data = EvaluationData(
            FolderFiles(str(tmp_path), Clip(4)), Protocol(resolution=32, num_frames=4), random_clips=True
        )
        vae = make_vae("video", sample_size=16)
        evaluator = ReconstructionEvaluator(data, "ramp", NETWORKS)
        result, values = evaluator.evaluate(autoencoder_row("video", vae, evaluator.shapes))
        (clips,) = data.batches(range(2), 2)
        pairs = zip(reconstruct(vae, clips).transpose(1, 2), clips.transpose(1, 2))  # frames first
        expected = torch.stack([psnr(*pair).mean() for pair in pairs])
        assert (expected[0] - expected[1]).abs() > 0.1
        torch.testing.assert_close(values["psnr"], expected)
        assert result.metrics["psnr"] == pytest.approx(expected.mean().item())

    def test_memory_that_cannot_be_measured_is_named(self, monkeypatch):
        def fail(device):
            raise FileNotFoundError("no such file: /proc/self/clear_refs")

        monkeypatch.setattr("vitok_hf.evaluation.evaluator.reset_peak_memory", fail)
        result, _ = ReconstructionEvaluator(make_data(2), "assets").evaluate(DARKER)
        assert "memory_MB" not in result.costs and "/proc/self" in result.unavailable["memory_MB"]

    @pytest.mark.parametrize("missing", [True, False])
    def test_memory_of_an_accelerator(self, monkeypatch, missing):
        ours, others = Mock(max_memory_allocated=lambda device: 7), Mock(max_memory_allocated=lambda device: 8)
        if missing:  # as in PyTorch 2.6
            del ours.max_memory_allocated
        monkeypatch.setattr("torch.accelerator", ours)
        monkeypatch.setattr("torch.get_device_module", lambda device: others)
        assert reset_peak_memory("cuda") == (8 if missing else 7)
        (others if missing else ours).reset_peak_memory_stats.assert_called_once_with("cuda")

    def test_a_codec_must_keep_the_size(self):
        with pytest.raises(ValueError, match=r"uint8 of \(.*32\) for uint8 pictures of \(.*64\)"):
            ReconstructionEvaluator(make_data(1), "assets").evaluate(Row("crop", lambda x: x[..., :32]))


def evaluate_share(path: str) -> None:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    evaluator = ReconstructionEvaluator(make_data(3), "assets", NETWORKS, batch_size=2)
    torch.save((len(evaluator.share), evaluator.shapes, *evaluator.evaluate(DARKER)), f"{path}.{state.process_index}")


def test_two_processes_measure_as_one(tmp_path):
    run_on_two_processes(evaluate_share, str(tmp_path / "x"))
    expected, values = ReconstructionEvaluator(make_data(3), "assets", NETWORKS).evaluate(DARKER)
    shares = []
    for rank in (0, 1):
        share, counts, result, columns = torch.load(tmp_path / f"x.{rank}", weights_only=False)
        shares.append(share)
        assert torch.equal(columns["psnr"], values["psnr"])
        assert result.metrics == pytest.approx(expected.metrics) and result.intervals == expected.intervals
        assert result.data_sha256 == expected.data_sha256
        assert counts == {(3, 1, 64, 64): 3}
    assert shares == [2, 1]
