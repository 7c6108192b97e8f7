"""The GAN loss of stage 2, both sides of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator

from ..clips import Runs
from ..loading import load_strictly
from .arguments import AutoencoderArguments
from .discriminator import Discriminator, LeCam, discriminator_loss, generator_loss, r1_penalty
from .trained_model import M, TrainedModel


@contextmanager
def frozen(model: M) -> Iterator[M]:
    """Inside this context, forward passes of `model` give its parameters no gradients."""
    model.requires_grad_(False)
    try:
        yield model
    finally:
        model.requires_grad_(True)


def load_discriminator(name_or_path: str, in_channels: int) -> Discriminator:
    """What a run has left in its folder `discriminator`, to go on with, float32; also from the Hub.

    Raises:
        ValueError: If its weights do not fit its config, or it is for pictures of other channels.
    """
    discriminator = load_strictly(Discriminator.from_pretrained, name_or_path, dtype=torch.float32)
    if discriminator.config.in_channels != in_channels:
        raise ValueError(
            f'`discriminator_name_or_path` "{name_or_path}" sees {discriminator.config.in_channels} channels, but the '
            f"pictures have {in_channels}: name another, or leave it out."
        )
    return discriminator.train()


class Adversary:
    """A discriminator in training, and the loss that it gives the decoder; pixels are in [-1, 1]."""

    def __init__(self, args: AutoencoderArguments, accelerator: Accelerator, resolution: int, in_channels: int):
        self.args, self.accelerator = args, accelerator
        if args.discriminator_name_or_path is None:
            discriminator = Discriminator(
                resolution, args.discriminator_channels, args.discriminator_minibatch_stddev, in_channels
            )
        else:
            discriminator = load_discriminator(args.discriminator_name_or_path, in_channels)
        rate, warmup = args.discriminator_learning_rate, args.discriminator_warmup_steps
        settings = replace(args, learning_rate=rate, lr_warmup_steps=warmup)
        self.trained = TrainedModel(discriminator, accelerator, settings, replicated=True)
        self.lecam = LeCam().to(accelerator.device) if args.lecam_weight > 0.0 else None

    def discriminator_step(
        self, fakes: Runs, reals: Runs, step: int, share: torch.Tensor | float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Backward and, at the end of an accumulation, the optimiser's step. Returns logs.

        The losses, means over frames, are multiplied by `share`: that of the batch in the frames of the step,
        over that of an average batch.
        """
        args = self.args
        penalized = args.r1_weight > 0.0 and step % args.r1_every == 0
        fakes = [run.detach() for run in fakes]
        reals = [run.detach().requires_grad_(penalized) for run in reals]
        with self.trained.accumulate():
            with self.accelerator.autocast():
                fake, real = self.trained.model(fakes, reals)
            loss = share * discriminator_loss(real, fake, args.gan_loss)
            logs = {
                "discriminator_loss": loss,
                "logits_real": share * real.mean(),
                "logits_fake": share * fake.mean(),
            }
            if self.lecam is not None:
                logs["lecam"] = share * self.lecam(real, fake)
                loss = loss + args.lecam_weight * logs["lecam"]
            if penalized:
                logs["r1"] = share * r1_penalty(real, reals)
                loss = loss + 0.5 * args.r1_weight * args.r1_every * logs["r1"]
            self.accelerator.backward(loss)
            logs |= {f"discriminator_{name}": value for name, value in self.trained.update(step).items()}
        return {name: value.detach() for name, value in logs.items()}

    def end_step(self, logs: list[dict[str, torch.Tensor]]) -> None:
        """Moves the running means of LeCam by the logits of all batches of a step, on all processes."""
        if self.lecam is not None:
            means = (torch.stack([log[f"logits_{kind}"] for log in logs]).mean() for kind in ("real", "fake"))
            self.lecam.update(*(self.accelerator.reduce(mean, "mean") for mean in means))

    def weight(self, step: int) -> float:
        """Of the decoder's GAN loss: 0 until `gan_start_step`, then a linear ramp of `gan_ramp_steps`."""
        since_start = step - self.args.gan_start_step
        if since_start < 0:
            return 0.0
        return self.args.gan_weight * min(1.0, (since_start + 1) / (self.args.gan_ramp_steps + 1))

    def is_adaptive(self, step: int) -> bool:
        return self.args.adaptive_gan_weight is not None and self.weight(step) > 0.0

    def generator_loss(
        self,
        fakes: Runs,
        reconstruction_loss: torch.Tensor,
        step: int,
        share: torch.Tensor | float = 1.0,
        squares: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The decoder's GAN loss with its weight, times `share` as in `discriminator_step`, and logs.

        With `adaptive_gan_weight`, the weight is multiplied by the ratio of the norms of the two losses' gradients
        (Esser et al., 2021), bounded. They are taken at the reconstructed pixels, not at the last layer's weights, and
        so in the same way whether or not these are sharded. Where the step has more batches, `squares` is the sum of
        what `gradient_squares` gives for all of them.
        """
        weight = torch.tensor(self.weight(step), device=reconstruction_loss.device)
        if self.weight(step) == 0.0:
            return weight, {"gan_weight": weight}
        loss = share * self._gan_loss(fakes)
        if self.args.adaptive_gan_weight is not None:
            squares = self._squares(fakes, reconstruction_loss, loss) if squares is None else squares
            of_reconstruction, of_gan = self.accelerator.reduce(squares, "sum").sqrt()
            weight = weight * (of_reconstruction / (of_gan + 1e-12)).clamp(max=self.args.adaptive_gan_weight)
        return weight * loss, {"gan": loss.detach(), "gan_weight": weight}

    def gradient_squares(
        self, fakes: Runs, reconstruction_loss: torch.Tensor, share: torch.Tensor | float
    ) -> torch.Tensor:
        """(2,): squared norms of the gradients of the reconstruction and the GAN loss of one batch, in float32."""
        return self._squares(fakes, reconstruction_loss, share * self._gan_loss(fakes))

    def _squares(self, fakes: Runs, *losses: torch.Tensor) -> torch.Tensor:
        gradients = (torch.autograd.grad(loss, fakes, retain_graph=True) for loss in losses)
        return torch.stack([torch.stack([x.float().square().sum() for x in runs]).sum() for runs in gradients])

    def _gan_loss(self, fakes: Runs) -> torch.Tensor:
        # The bare module: there is nothing for DDP to reduce.
        with frozen(self.trained.unwrapped) as discriminator, self.accelerator.autocast():
            (logits,) = discriminator(fakes)
        return generator_loss(logits, self.args.gan_loss)
