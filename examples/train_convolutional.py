r"""Trains a small convolutional autoencoder of diffusers, whose latents a ViTok may learn.

    python examples/train_convolutional.py --train_data_dir data/train/film data/train/emoji \
        --validation_data_dir data/test/film --output_dir output-convolutional
    vitok train --model_config student.json --teacher_model_name_or_path output-convolutional/vae ...

An `AutoencoderKL` of 8 x 8 pixels and 4 channels, narrower than Stable Diffusion's, with squared error and a little KL
divergence. It is saved with the factors that give its latents zero mean and unit variance.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from vitok_hf import compute_latent_statistics
from vitok_hf.clips import fold_frames, to_float
from vitok_hf.commands import run_command
from vitok_hf.commands.settings import parse_settings
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.loader import SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.views import CropView
from vitok_hf.evaluation.reconstruction import comparison, evaluate_reconstruction
from vitok_hf.pipelines.model_card import ModelCard
from vitok_hf.training.arguments import TrainerArguments, argument
from vitok_hf.training.trainer import Trainer


@dataclass
class Arguments(TrainerArguments):
    output_dir: str = argument("output-convolutional", "Folder of checkpoints, logs and the model.")
    resolution: int = argument(128, "Side of the crops in pixels.", minimum=8)
    width: int = argument(32, "Channels of the first block, a multiple of 8; then 2, 4 and 4 times as many.")
    kl_weight: float = argument(1e-6, "Weight of the KL divergence, a mean over latent elements.", minimum=0)
    num_validation_images: int = argument(16, "Held-out pictures a folder.", minimum=1)


class Convolutional(AutoencoderKL):
    """Whose forward also gives the KL divergence."""

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample()).sample, posterior.kl().mean() / posterior.mean[0].numel()


class ConvolutionalTrainer(Trainer[Arguments, Convolutional]):
    result = "vae"

    def __init__(self, args: Arguments):
        super().__init__(args)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        widths = tuple(factor * args.width for factor in (1, 2, 4, 4))
        self.add_model("vae", Convolutional(**kinds, block_out_channels=widths, norm_num_groups=8))
        view = CropView([(args.resolution, args.resolution, 1.0)], args.train_batch_size * args.resolution**2)
        self.dataset = make_dataset(view, SourceSettings(args.train_data_dir), args.seed)
        self.start(self.dataset)

    def training_step(self, batches):
        logs = []
        for batch in batches:
            with self.trained.accumulate():
                pixels = fold_frames(to_float(batch.pixels[0].to(self.accelerator.device)))
                sample, kl = self.trained.model(pixels)
                mse = (sample.float() - pixels).square().mean()
                loss = mse + self.args.kl_weight * kl
                self.accelerator.backward(loss)
                log = {"loss": loss.detach(), "mse": mse.detach(), "kl": kl.detach()}
                logs.append(log | self.trained.update(self.step))
        return logs

    def load_held_out(self, path):
        return load_evaluation_images(path, self.args.resolution, self.args.num_validation_images)

    def measure(self, held_out):
        metrics, reconstructions = evaluate_reconstruction(self.trained.unwrapped, held_out)
        return metrics, comparison(held_out[:8], reconstructions[:8])

    def write_model(self, folder: Path, state_dict):
        plain = AutoencoderKL.from_config(self.trained.unwrapped.config)
        plain.load_state_dict(state_dict)
        batches = (batch[:, :, 0] for batch in iterate_pixels(self.dataset, 4))
        plain.register_to_config(**compute_latent_statistics(plain, batches).to_config(per_channel=False))
        plain.save_pretrained(folder)

    def model_card(self, name: str) -> ModelCard:
        code = f'from diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained("{name}")'
        return ModelCard(name, "autoencoder", "A convolutional autoencoder", code, "image-to-image")


def main():
    settings = parse_settings(Arguments, sys.argv[1:], sys.argv[0], __doc__)
    ConvolutionalTrainer(Arguments(**settings)).train()


if __name__ == "__main__":
    run_command(main)
