import logging
from urllib.error import URLError

import lpips
import pytest
import torch
from torch.nn import functional as F

from vitok_hf.training import losses
from vitok_hf.training.losses import ReconstructionLoss


def make_loss(mse=1.0, l1=0.0, lpips=0.0, kl=0.0, border=1.0, patch_size=8) -> ReconstructionLoss:
    return ReconstructionLoss(mse, l1, lpips, kl, border, patch_size)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2)]


class TestTerms:
    def test_weighted_sum(self, pair):
        kl = torch.tensor([10.0, 30.0])
        loss, logs = make_loss(mse=2.0, l1=0.5, kl=0.1)(*pair, kl, latents_per_item=4)
        assert logs["mse"].item() == pytest.approx(F.mse_loss(*pair).item())
        assert logs["l1"].item() == pytest.approx(F.l1_loss(*pair).item())
        assert logs["kl"].item() == 5.0
        expected = 2.0 * logs["mse"] + 0.5 * logs["l1"] + 0.1 * logs["kl"]
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(logs["loss"], expected)

    def test_kl_weight_does_not_depend_on_the_resolution(self):
        loss = make_loss(mse=0.0, kl=1.0)
        small, large = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16)
        assert loss(small, small, torch.tensor([6.0]), latents_per_item=4)[0] == 1.5
        assert loss(large, large, torch.tensor([24.0]), latents_per_item=16)[0] == 1.5

    def test_gradients_and_dtype(self, pair):
        sample = pair[0].bfloat16().requires_grad_()
        loss, _ = make_loss(l1=1.0)(sample, pair[1], None, 1)
        loss.backward()
        assert loss.dtype == torch.float32 and sample.grad.abs().sum() > 0

    def test_border_weight(self):
        target, border, inside = torch.zeros(3, 1, 3, 16, 16)
        border[..., 0, :] = inside[..., 4, :] = 1.0
        for weight in (1.0, 1.5):
            of_border, of_inside = (make_loss(border=weight)(x, target, None, 1)[0] for x in (border, inside))
            # a row at the border has 8 heavy pixels a patch, one inside has 2
            assert (of_border / of_inside).item() == pytest.approx(8 * weight / (2 * weight + 6))
        assert make_loss()(border, target, None, 1)[0] == 1 / 16
        everywhere = make_loss(border=1.5)(torch.ones_like(target), target, None, 1)[0]
        assert everywhere.item() == pytest.approx(1.0)

    def test_videos(self):
        sample, target = torch.rand(2, 1, 3, 4, 16, 16)
        torch.testing.assert_close(make_loss()(sample, target, None, 1)[0], F.mse_loss(sample, target))


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
            loss, logs = make_loss(lpips=weight)(sample, pair[1], None, 1)
            loss.backward()
            gradients.append(sample.grad)
        torch.testing.assert_close(loss, logs["mse"] + 2.0 * logs["lpips"])
        assert logs["lpips"] > 0
        assert (gradients[1] - gradients[0]).abs().max() > 1e-6
        assert all(parameter.grad is None for parameter in random_vgg.parameters())

    def test_frames_of_a_video_count_alike(self, random_vgg):
        sample, target = torch.rand(2, 1, 3, 2, 32, 32)
        video = make_loss(lpips=1.0)(sample, target, None, 1)[1]["lpips"]
        frames = [make_loss(lpips=1.0)(sample[:, :, i], target[:, :, i], None, 1)[1]["lpips"] for i in (0, 1)]
        torch.testing.assert_close(video, sum(frames) / 2)

    def test_without_weights_it_is_off_and_says_so(self, monkeypatch, caplog, pair):
        def no_network(*args, **kwargs):
            raise URLError("no network")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
        with caplog.at_level(logging.WARNING):
            loss = make_loss(lpips=1.0)
        assert loss.lpips_weight == 0.0 and "LPIPS loss is OFF" in caplog.text and "VGG-16" in caplog.text
        assert "lpips" not in loss(*pair, None, 1)[1]
