import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from ..checks import check_finite, check_generator, check_tensor, refuse


class ViTokPosterior(DiagonalGaussianDistribution):
    """Diagonal Gaussian over latents of any rank, (B, c, ...), computed in float32 and returned in the model's dtype.

    With `deterministic=True`, `parameters` are the latents themselves and the Kullback-Leibler divergence is zero.
    """

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        if deterministic:
            self.mean = parameters.float()
            self.std = self.var = torch.zeros_like(self.mean)
            self.logvar = torch.full_like(self.mean, -torch.inf)
        else:
            self.mean, self.logvar = parameters.float().chunk(2, dim=1)
            self.logvar = self.logvar.clamp(-30.0, 20.0)
            self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """A sample (B, c, ...); a list holds one generator for each item of the batch."""
        check_generator(generator, len(self.mean))
        if self.deterministic:
            return self.mode()
        if generator is None:  # `randn_tensor` breaks compilation for other sizes
            noise = torch.randn(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)
        else:
            noise = randn_tensor(self.mean.shape, generator, self.mean.device, self.mean.dtype)
        return (self.mean + self.std * noise).to(self.parameters.dtype)

    def mode(self) -> torch.Tensor:
        return self.mean.to(self.parameters.dtype)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> torch.Tensor:
        """Divergence from `other`, by default the standard normal, summed over all but the batch: (B,), float32."""
        if other is not None and getattr(getattr(other, "mean", None), "shape", None) != self.mean.shape:
            refuse("other", f"None or a posterior of shape {tuple(self.mean.shape)}", getattr(other, "mean", other))
        if other is not None and other.deterministic and not self.deterministic:
            raise ValueError("`other` is deterministic, and the divergence from it infinite: pass a variational one.")
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = ((self.mean - other.mean).square() + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)

    def nll(self, sample: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of `sample`, summed over all but the batch: (B,), float32."""
        check_tensor("sample", sample)
        if sample.shape != self.mean.shape:
            refuse("sample", f"a tensor of shape {tuple(self.mean.shape)}", sample)
        check_finite("sample", sample)
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.flatten(1).sum(dim=1)


class PosteriorList:
    """Posteriors of a list: of items, whose latents come without a batch dimension, or of runs, (n, c, t, h, w)."""

    def __init__(self, posteriors: list[ViTokPosterior], give_back: Callable[[list], list]):
        self.posteriors, self.give_back = posteriors, give_back

    def __len__(self) -> int:
        return len(self.posteriors)

    def __getitem__(self, index: int) -> ViTokPosterior:
        return self.posteriors[index]

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> list[torch.Tensor]:
        """Samples (c, ...); a list holds one generator for each item, also of runs."""
        counts = [len(posterior.mean) for posterior in self.posteriors]
        check_generator(generator, sum(counts))
        generators = [generator] * len(self)
        if isinstance(generator, list):
            rest = iter(generator)
            generators = [list(itertools.islice(rest, count)) for count in counts]
        return self.give_back([posterior.sample(g) for posterior, g in zip(self.posteriors, generators)])

    def mode(self) -> list[torch.Tensor]:
        return self.give_back([posterior.mode() for posterior in self.posteriors])

    @property
    def parameters(self) -> list[torch.Tensor]:
        return self.give_back([posterior.parameters for posterior in self.posteriors])

    def kl(self) -> torch.Tensor:
        """(N,), of all items."""
        return torch.cat([posterior.kl() for posterior in self.posteriors])


@dataclass
class ViTokOutput(DecoderOutput):
    """The reconstruction `sample`, and `kl`, (B,): the posterior's divergence, summed over all latents of an item.

    `parameters` are the posterior's means and log-variances, (B, 2c, ...), or, without variances, (B, c, ...). For a
    list of items, `sample` and `parameters` are lists.
    """

    kl: torch.Tensor | None = None
    parameters: torch.Tensor | list[torch.Tensor] | None = None
