"""What networks, tables and videos make of other channels than three."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import TINY
from tests.evaluation.test_reconstruct_files import write_film
from vitok_hf import AutoencoderViTok
from vitok_hf.clips import to_colours, to_float
from vitok_hf.data.held_out import EvaluationData, Protocol
from vitok_hf.data.items import Decoded
from vitok_hf.data.video import iterate_timed_frames
from vitok_hf.evaluation.evaluator import ReconstructionEvaluator, Row
from vitok_hf.evaluation.networks import FeatureNetwork, LPIPSDistance
from vitok_hf.evaluation.reconstruct_files import reconstruct_file
from vitok_hf.evaluation.visuals import error_map


class Recorder(nn.Module):
    """Means of the colours, and notes what it sees."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor, references: torch.Tensor | None = None) -> torch.Tensor:
        self.seen += [images] if references is None else [images, references]
        return images.float().mean(dim=(2, 3))[:, : 3 if references is None else 1]


def measure(channels: int):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, channels), dtype=np.uint8)
    dino, lpips = Recorder(), Recorder()
    networks = {"dino": FeatureNetwork("d", dino, ""), "lpips": FeatureNetwork("l", LPIPSDistance(lpips), "")}
    data = EvaluationData([Decoded(picture) for picture in pixels], Protocol(16, channels=channels))
    evaluator = ReconstructionEvaluator(data, "data", networks, {"inception": "no weights"}, batch_size=4)
    result, _ = evaluator.evaluate(Row("inverse", lambda images: 255 - images))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), result, dino.seen, lpips.seen


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_networks_see_colours(channels):
    images, result, dino, lpips = measure(channels)
    assert torch.equal(dino[0], to_colours(images)) and torch.equal(dino[1], to_colours(255 - images))
    assert torch.equal(lpips[1], to_float(to_colours(images)))
    assert {"psnr", "ssim", "lpips", "rFDD"} <= result.metrics.keys()
    assert result.unavailable["rFID"] == "no weights" and result.protocol.networks.keys() == {"dino", "lpips"}


def test_of_other_channels_they_measure_nothing():
    _, result, dino, lpips = measure(5)
    assert not dino and not lpips and result.metrics.keys() == {"psnr", "ssim"}
    reason = "networks see colours, but these data have 5 channels"
    assert all(result.unavailable[name] == reason for name in ("rFID", "rIS", "rFDD", "lpips"))
    assert not result.protocol.networks


def test_grey_videos(tmp_path):
    video = write_film(tmp_path / "x.mp4", 6)
    torch.manual_seed(0)
    vae = AutoencoderViTok(**TINY | {"in_channels": 1}).eval()
    assert "x.mp4, 6 frames: 24x16" in reconstruct_file(vae, tmp_path / "x.mp4", str(tmp_path / "y"))
    frames = [frame for _, frame in iterate_timed_frames(tmp_path / "y_comparison.mp4")]
    assert len(frames) == 6 and frames[0].shape == (16, 2 * 24, 3)
    grey = np.asarray(Image.fromarray(video[0, :, 0].permute(1, 2, 0).numpy()).convert("L"))
    assert frames[0].std(axis=2).max() < 3 and np.abs(frames[0][:, :24, 0].astype(int) - grey).mean() < 5
    with pytest.raises(ValueError, match="Frames of videos become 1 or 3 channels, not 4"):
        reconstruct_file(AutoencoderViTok(**TINY | {"in_channels": 4}), tmp_path / "x.mp4", str(tmp_path / "z"))


def test_error_maps_are_shown():
    images = torch.zeros(1, 5, 1, 4, 4, dtype=torch.uint8)
    shown = error_map(images, images + 10)
    assert shown.shape == (1, 3, 1, 4, 4) and (shown == 40).all()
