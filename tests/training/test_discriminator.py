import pytest
import torch
from torch.nn import functional as F

from vitok_hf.training.discriminator import (
    Discriminator,
    LeCam,
    blur_downsample,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return Discriminator(32, channels=8)


def pictures(*shape, seed=0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestBlur:
    def test_is_the_binomial_filter(self):
        x = pictures(1, 2, 16, 16)
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(row, row).expand(2, 1, 4, 4)
        expected = F.conv2d(x, kernel, stride=2, padding=1, groups=2)
        torch.testing.assert_close(blur_downsample(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])

    def test_borders_and_odd_sides(self):
        assert blur_downsample(torch.ones(1, 1, 7, 4)).shape == (1, 1, 4, 2)
        torch.testing.assert_close(blur_downsample(torch.ones(1, 1, 8, 6)), torch.ones(1, 1, 4, 3))


class TestDiscriminator:
    def test_halves_down_to_four(self):
        assert [len(Discriminator(side, channels=4).blocks) for side in (8, 32, 256)] == [1, 3, 6]
        assert Discriminator(64, channels=8, max_channels=16).logit.in_features == 16
        with pytest.raises(ValueError, match="at least 8 pixels, but is 4"):
            Discriminator(4)

    def test_any_size(self, discriminator):
        fake, real = discriminator([pictures(1, 3, 40, 24), pictures(2, 3, 8, 72)], [pictures(4, 3, 32, 32)])
        assert fake.shape == (3,) and real.shape == (4,)
        assert fake.isfinite().all()

    def test_groups_do_not_see_each_other(self, discriminator):
        fake, real = pictures(4, 3, 32, 32), pictures(4, 3, 32, 32, seed=1)
        together = discriminator([fake], [real])
        torch.testing.assert_close(together[0], discriminator([fake])[0])
        torch.testing.assert_close(together[1], discriminator([real])[0])

    def test_minibatch_stddev(self, discriminator):
        one = pictures(1, 3, 32, 32)
        alike, different = one.expand(4, -1, -1, -1), pictures(4, 3, 32, 32, seed=1)
        different = torch.cat([one, different[1:]])
        (first,), (second,) = discriminator([alike]), discriminator([different])
        assert (first[0] - second[0]).abs() > 1e-3
        without = Discriminator(32, channels=8, minibatch_stddev=False)
        torch.testing.assert_close(without([alike])[0][0], without([different])[0][0])

    def test_learns_to_tell_sharp_from_blurred(self):
        torch.manual_seed(0)
        discriminator = Discriminator(16, channels=8)
        optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
        for _ in range(80):
            real = torch.randn(8, 3, 16, 16)
            fake = F.avg_pool2d(real, 3, stride=1, padding=1)
            logits_fake, logits_real = discriminator([fake / fake.std()], [real])
            loss = discriminator_loss(logits_real, logits_fake, "hinge")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.1


class TestLosses:
    REAL, FAKE = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])

    def test_hinge(self):
        assert discriminator_loss(self.REAL, self.FAKE, "hinge").item() == pytest.approx(0.5 * (0.25 + 0.5))
        assert generator_loss(self.FAKE, "hinge").item() == pytest.approx(1.5)

    def test_non_saturating(self):
        expected = 0.5 * (
            F.binary_cross_entropy_with_logits(self.REAL, torch.ones(2))
            + F.binary_cross_entropy_with_logits(self.FAKE, torch.zeros(2))
        )
        torch.testing.assert_close(discriminator_loss(self.REAL, self.FAKE, "non_saturating"), expected)
        expected = F.binary_cross_entropy_with_logits(self.FAKE, torch.ones(2))
        torch.testing.assert_close(generator_loss(self.FAKE, "non_saturating"), expected)

    def test_r1_of_a_linear_function(self):
        weight = torch.randn(3, 4, 4, requires_grad=True)
        groups = [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(1, 3, 4, 4, requires_grad=True)]
        logits = torch.cat([(x * weight).sum(dim=(1, 2, 3)) for x in groups])
        penalty = r1_penalty(logits, groups)
        torch.testing.assert_close(penalty, weight.square().sum())
        penalty.backward()
        torch.testing.assert_close(weight.grad, 2 * weight)

    def test_lecam(self):
        lecam = LeCam(decay=0.5)
        for _ in range(20):
            lecam.update(torch.tensor(1.0), torch.tensor(-1.0))
        assert lecam.mean_real.item() == pytest.approx(1.0, abs=1e-3)
        real, fake = torch.tensor([3.0]), torch.tensor([-2.0])
        assert lecam(real, fake).item() == pytest.approx((3 + 1) ** 2 + (1 + 2) ** 2, rel=1e-2)
        assert set(lecam.state_dict()) == {"mean_real", "mean_fake"}
