import logging
from urllib.error import URLError

import lpips
import pytest
import torch
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from vitok_hf.clips import to_float
from vitok_hf.evaluation.metrics import ssim
from vitok_hf.training import losses
from vitok_hf.training.arguments import LossSettings
from vitok_hf.training.losses import ReconstructionLoss


def make_loss(border=1.0, dino_model="", **weights):
    """The loss of one batch: `loss(sample, target, kl, num_latents)`; of all terms, only those that are named."""
    weights = {f"{name}_weight": weight for name, weight in ({"lpips": 0.0, "kl": 0.0} | weights).items()}
    settings = LossSettings(**weights, patch_border_weight=border, dino_model_name_or_path=dino_model)
    module = ReconstructionLoss(settings, patch_size=8)

    def loss(sample, target, kl=None, num_latents=1):
        return module([sample], [target], kl, num_latents)

    loss.module = module
    return loss


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2)]


class TestTerms:
    def test_weighted_sum(self, pair):
        kl = torch.tensor([10.0, 30.0])
        loss, logs = make_loss(mse=2.0, l1=0.5, kl=0.1)(*pair, kl, num_latents=2 * 4)
        assert logs["mse"].item() == pytest.approx(F.mse_loss(*pair).item())
        assert logs["l1"].item() == pytest.approx(F.l1_loss(*pair).item())
        assert logs["kl"].item() == 5.0
        expected = 2.0 * logs["mse"] + 0.5 * logs["l1"] + 0.1 * logs["kl"]
        torch.testing.assert_close(loss, expected)

    def test_charbonnier(self, pair):
        expected = torch.sqrt((pair[0] - pair[1]).square() + 1e-3**2).mean()
        torch.testing.assert_close(make_loss(mse=0.0, charbonnier=2.0)(*pair)[0], 2.0 * expected)

    def test_ssim(self):
        pixels = torch.randint(0, 256, (2, 1, 3, 40, 48), dtype=torch.uint8)
        pixels[1] = pixels[0] // 2 + pixels[1] // 2
        loss, logs = make_loss(mse=0.0, ssim=0.1)(*map(to_float, pixels))
        assert logs["ssim"].item() == pytest.approx(1.0 - ssim(*pixels).item(), abs=0.02)  # other borders
        torch.testing.assert_close(loss, 0.1 * logs["ssim"])

    def test_sizes_in_a_batch_count_by_their_pixels(self):
        samples = [torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 13, 21)]
        targets = [torch.ones(1, 3, 16, 16), torch.full((2, 3, 13, 21), 2.0)]
        loss, logs = make_loss().module(samples, targets)
        expected = (256 + 4 * 546) / (256 + 546)
        assert loss.item() == pytest.approx(expected) and logs["mse"].item() == pytest.approx(expected)

    def test_kl_of_items_of_several_sizes(self):
        zero = torch.zeros(1, 3, 8, 8)
        module = make_loss(mse=0.0, kl=1.0).module
        loss, _ = module([zero, zero], [zero, zero], torch.tensor([4.0, 60.0]), num_latents=4 + 20)
        assert loss.item() == pytest.approx(64 / 24)  # every latent element counts alike

    def test_no_loss_at_all(self):
        for settings in (LossSettings(0.0, lpips_weight=0.0), LossSettings(0.0, lpips_weight=0.0, kl_weight=0.0)):
            with pytest.raises(ValueError, match="All weights are 0"):
                ReconstructionLoss(settings, 8, with_kl=False)

    def test_gradients_and_dtype(self, pair):
        sample = pair[0].bfloat16().requires_grad_()
        loss, _ = make_loss(l1=1.0)(sample, pair[1])
        loss.backward()
        assert loss.dtype == torch.float32 and sample.grad.abs().sum() > 0

    def test_border_weight(self):
        target, border, inside = torch.zeros(3, 1, 3, 16, 16)
        border[..., 0, :] = inside[..., 4, :] = 1.0
        for weight in (1.0, 1.5):
            of_border, of_inside = (make_loss(border=weight)(x, target)[0] for x in (border, inside))
            # a row at the border has 8 heavy pixels a patch, one inside has 2
            assert (of_border / of_inside).item() == pytest.approx(8 * weight / (2 * weight + 6))
        assert make_loss()(border, target)[0] == 1 / 16
        everywhere = make_loss(border=1.5)(torch.ones_like(target), target)[0]
        assert everywhere.item() == pytest.approx(1.0)


class TestLPIPS:
    @pytest.fixture
    def random_vgg(self, monkeypatch):
        torch.manual_seed(0)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        monkeypatch.setattr(losses, "load_lpips", lambda: network)
        return network

    def test_adds_its_value_and_its_gradient(self, random_vgg, pair):
        gradients = []
        for weight in (0.0, 2.0):
            sample = pair[0].clone().requires_grad_()
            loss, logs = make_loss(lpips=weight)(sample, pair[1])
            loss.backward()
            gradients.append(sample.grad)
        torch.testing.assert_close(loss, logs["mse"] + 2.0 * logs["lpips"])
        assert logs["lpips"] > 0
        assert (gradients[1] - gradients[0]).abs().max() > 1e-6
        assert all(parameter.grad is None for parameter in random_vgg.parameters())

    def test_frames_of_a_video_count_alike(self, random_vgg):
        sample, target = torch.rand(2, 1, 3, 2, 32, 32)
        video = make_loss(lpips=1.0)(sample, target)[1]["lpips"]
        frames = [make_loss(lpips=1.0)(sample[:, :, i], target[:, :, i])[1]["lpips"] for i in (0, 1)]
        torch.testing.assert_close(video, sum(frames) / 2)

    def test_without_weights_it_is_off_and_says_so(self, monkeypatch, caplog, pair):
        def no_network(*args, **kwargs):
            raise URLError("no network")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
        with caplog.at_level(logging.WARNING):
            loss = make_loss(lpips=1.0)
        assert loss.module.weights["lpips"] == 0.0 and "LPIPS loss is OFF" in caplog.text and "VGG-16" in caplog.text
        assert "Install" not in caplog.text  # it is
        assert "lpips" not in loss(*pair)[1]


class TestDINO:
    @pytest.fixture
    def network(self, tmp_path):
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)
        Dinov2Model(config).save_pretrained(tmp_path / "dino")
        return str(tmp_path / "dino")

    def test_adds_its_value_and_its_gradient(self, network, pair):
        sample = pair[0].clone().requires_grad_()
        loss, logs = make_loss(mse=0.0, dino=500.0, dino_model=network)(sample, pair[1])
        loss.backward()
        torch.testing.assert_close(loss, 500.0 * logs["dino"])
        assert logs["dino"] > 0 and sample.grad.abs().max() > 0

    def test_says_what_is_missing(self, tmp_path):
        with pytest.raises(ValueError, match="dino_model_name_or_path"):
            make_loss(dino=1.0, dino_model=str(tmp_path / "nothing"))
