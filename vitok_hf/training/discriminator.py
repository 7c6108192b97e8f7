"""The adversary of stage 2: a StyleGAN-type discriminator and its losses."""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from ..clips import Runs, fold_frames


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, kind: str) -> torch.Tensor:
    """Hinge (Lim and Ye, 2017) or logistic (Goodfellow et al., 2014) loss of logits, any shapes; a mean."""
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: torch.Tensor, kind: str) -> torch.Tensor:
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def r1_penalty(real_logits: torch.Tensor, real: Runs) -> torch.Tensor:
    """Mean over the frames of the squared gradient norm at real frames (Mescheder et al., 2018)."""
    gradients = torch.autograd.grad(real_logits.float().sum(), real, create_graph=True)
    return torch.cat([fold_frames(x).float().square().flatten(1).sum(dim=1) for x in gradients]).mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al., 2021): logits stay near the running means of those of the other kind."""

    mean_real: torch.Tensor
    mean_fake: torch.Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return F.relu(real - self.mean_fake).square().mean() + F.relu(self.mean_real - fake).square().mean()

    def update(self, mean_real: torch.Tensor, mean_fake: torch.Tensor) -> None:
        """Takes the means over all processes."""
        self.mean_real.lerp_(mean_real.float(), 1.0 - self.decay)
        self.mean_fake.lerp_(mean_fake.float(), 1.0 - self.decay)


def blur_downsample(x: torch.Tensor) -> torch.Tensor:
    """Low-pass filter (1, 3, 3, 1) / 8 on both axes, then every second row and column; odd sides are rounded up.

    Three box filters in a row, which is several times faster than a depthwise convolution on a CPU.
    """
    x = F.avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2, ceil_mode=True)


class DiscriminatorBlock(nn.Module):
    """Residual block of StyleGAN2's discriminator; halves the sides."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden_states = F.leaky_relu(self.conv1(x), 0.2)
        hidden_states = F.leaky_relu(self.conv2(blur_downsample(hidden_states)), 0.2)
        return (hidden_states + self.shortcut(blur_downsample(x))) * 2**-0.5


class Discriminator(ModelMixin, ConfigMixin):
    """Discriminator of StyleGAN2 (Karras et al., 2020) with blur down-sampling, for pictures of any size.

    Halves pictures of `resolution` down to 4 x 4; what is left of other sizes is averaged to 4 x 4.

    Args:
        resolution: Side in pixels of the training crops, at least 8.
        channels: Channels of the first block; every block doubles them, up to `max_channels`.
        minibatch_stddev: Append the standard deviation within groups of 4 neighbours as a channel; of 2, or none,
            in batches of another multiple.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int,
        channels: int = 64,
        minibatch_stddev: bool = True,
        in_channels: int = 3,
        max_channels: int = 512,
    ):
        super().__init__()
        if resolution < 8:
            raise ValueError(f"`resolution` must be at least 8 pixels, but is {resolution}.")
        widths = [min(max_channels, channels * 2**level) for level in range(int(math.log2(resolution / 4)) + 1)]
        self.minibatch_stddev = minibatch_stddev
        self.conv_in = nn.Conv2d(in_channels, widths[0], 1)
        self.blocks = nn.ModuleList([DiscriminatorBlock(*pair) for pair in zip(widths, widths[1:])])
        self.conv_out = nn.Conv2d(widths[-1] + minibatch_stddev, widths[-1], 3, padding=1)
        self.hidden = nn.Linear(16 * widths[-1], widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, a=0.2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.logit.weight, std=widths[-1] ** -0.5)

    def _append_stddev(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C + 1, h, w)"""
        group = math.gcd(x.shape[0], 4)
        groups = x.float().unflatten(0, (-1, group))  # (B / group, group, C, h, w)
        stddev = (groups.var(dim=1, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (B / group,)
        stddev = stddev.repeat_interleave(group).to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return torch.cat([x, stddev], dim=1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, widths[-1], 4, 4)"""
        x = x.contiguous(memory_format=torch.channels_last)  # several times faster
        x = F.leaky_relu(self.conv_in(x), 0.2)
        for block in self.blocks:
            x = block(x)
        return x if x.shape[-2:] == (4, 4) else F.adaptive_avg_pool2d(x, 4)

    def forward(self, *groups: Runs) -> list[torch.Tensor]:
        """Logits, (N,) for each group of N frames in all.

        Args:
            groups: As `fakes, reals`: runs in [-1, 1], of any sizes. The standard deviation is taken within a group.
                One call for all of them, because DDP wants one forward pass for a backward pass.
        """
        logits = []
        for group in groups:
            x = torch.cat([self.features(fold_frames(run)) for run in group])  # (N, C, 4, 4)
            x = self._append_stddev(x) if self.minibatch_stddev else x
            x = F.leaky_relu(self.conv_out(x), 0.2)
            x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2)
            logits.append(self.logit(x).squeeze(1).float())
        return logits
