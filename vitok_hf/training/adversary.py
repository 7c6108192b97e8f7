"""The GAN loss of stage 2, both sides of it."""

from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from .arguments import AutoencoderArguments
from .discriminator import Discriminator, LeCam, discriminator_loss, generator_loss, r1_penalty
from .loop import TrainedModel


@contextmanager
def frozen(model: nn.Module):
    """Inside this context, forward passes of `model` give its parameters no gradients."""
    model.requires_grad_(False)
    try:
        yield model
    finally:
        model.requires_grad_(True)


class Adversary:
    """A discriminator in training, and the loss that it gives the decoder.

    Pictures are lists of (B, C, H, W) in [-1, 1], one entry for each size in the batch; videos come as frames.
    """

    def __init__(self, args: AutoencoderArguments, accelerator: Accelerator, resolution: int, in_channels: int):
        self.args, self.accelerator = args, accelerator
        discriminator = Discriminator(
            resolution, args.discriminator_channels, args.discriminator_minibatch_stddev, in_channels
        )
        self.trained = TrainedModel(
            discriminator,
            accelerator,
            args,
            args.discriminator_learning_rate,
            args.discriminator_warmup_steps,
            replicated=True,
        )
        self.lecam = LeCam().to(accelerator.device) if args.lecam_weight > 0.0 else None
        if self.lecam is not None:
            accelerator.register_for_checkpointing(self.lecam)

    def discriminator_step(
        self, fakes: list[torch.Tensor], reals: list[torch.Tensor], step: int
    ) -> dict[str, torch.Tensor]:
        """Backward and, at the end of an accumulation, the optimiser's step. Returns logs."""
        args = self.args
        penalized = args.r1_weight > 0.0 and step % args.r1_every == 0
        fakes = [pictures.detach() for pictures in fakes]
        reals = [pictures.detach().requires_grad_(penalized) for pictures in reals]
        with self.trained.accumulate():
            with self.accelerator.autocast():
                fake, real = self.trained.model(fakes, reals)
            loss = discriminator_loss(real, fake, args.gan_loss)
            logs = {
                "discriminator_loss": loss.detach(),
                "logits_real": real.detach().mean(),
                "logits_fake": fake.detach().mean(),
            }
            if self.lecam is not None:
                logs["lecam"] = self.lecam(real, fake)
                loss = loss + args.lecam_weight * logs["lecam"]
                self.lecam.update(
                    *(self.accelerator.reduce(logs[f"logits_{kind}"], "mean") for kind in ("real", "fake"))
                )
            if penalized:
                logs["r1"] = r1_penalty(real, reals)
                loss = loss + 0.5 * args.r1_weight * args.r1_every * logs["r1"]
            self.accelerator.backward(loss)
            logs |= {f"discriminator_{name}": value for name, value in self.trained.update(step).items()}
        return {name: value.detach() for name, value in logs.items()}

    def weight(self, step: int) -> float:
        """Of the decoder's GAN loss: 0 until `gan_start_step`, then a linear ramp of `gan_ramp_steps`."""
        since_start = step - self.args.gan_start_step
        if since_start < 0:
            return 0.0
        return self.args.gan_weight * min(1.0, (since_start + 1) / (self.args.gan_ramp_steps + 1))

    def generator_loss(
        self, fakes: list[torch.Tensor], reconstruction_loss: torch.Tensor, step: int
    ) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
        """The decoder's GAN loss with its weight, and logs.

        With `adaptive_gan_weight`, the weight is multiplied by the ratio of the norms of the two losses' gradients
        (Esser et al., 2021), bounded. They are taken at the reconstructed pixels, not at the last layer's weights, and
        so in the same way whether or not these are sharded.
        """
        weight = self.weight(step)
        if weight == 0.0:
            return 0.0, {"gan_weight": reconstruction_loss.new_zeros(())}
        # The bare module: there is nothing for DDP to reduce.
        with frozen(self.trained.unwrapped) as discriminator, self.accelerator.autocast():
            (logits,) = discriminator(fakes)
        loss = generator_loss(logits, self.args.gan_loss)
        weight = torch.tensor(weight, device=loss.device)
        if self.args.adaptive_gan_weight is not None:
            norms = [self._gradient_norm(x, fakes) for x in (reconstruction_loss, loss)]
            weight = weight * (norms[0] / (norms[1] + 1e-12)).clamp(max=self.args.adaptive_gan_weight)
        return weight * loss, {"gan": loss.detach(), "gan_weight": weight}

    def _gradient_norm(self, loss: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        """In float32, over all processes."""
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        return self.accelerator.reduce(squares, "sum").sqrt()
