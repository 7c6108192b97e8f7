r"""Estimates what a training run costs, from the operations and the saved tensors of one picture.

    python examples/estimate_training.py --variant S-B/16 --resolution 256 --batch_size 1024 --max_train_steps 100000 \
        --num_devices 8 --teraflops 989 --utilization 0.4

Memory is that of weights, gradients, AdamW and, in stage 2, EMA and discriminator in float32, and of the activations
of a device's part of the batch in bfloat16, those of LPIPS in float32; buffers of kernels and of communication come on
top. `--teraflops` is the peak of a device in bfloat16, `--float32_teraflops` that of convolutions in float32, as LPIPS
has them, and `--utilization` the share of these that the run reaches.
"""

import argparse
from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitok_hf import AutoencoderViTok
from vitok_hf.clips import fold_frames
from vitok_hf.commands import make_parser, run_command
from vitok_hf.training.discriminator import Discriminator


def make_step(args: argparse.Namespace, device: str) -> tuple[list[nn.Module], Callable[[], object]]:
    """The models, and a function that runs forward and backward passes of one picture or clip through them."""
    from lpips import LPIPS  # of an extra

    with torch.device(device):
        vae = AutoencoderViTok.from_variant(args.variant).bfloat16()
        frames = () if vae.is_image_model else (vae.config.sample_frames,)
        x = torch.zeros(1, 3, *frames, args.resolution, args.resolution, dtype=torch.bfloat16)
        lpips = LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False).requires_grad_(False)
        lpips.to(device)
        models = [vae, lpips]
        if args.stage == 2:
            vae.encoder.requires_grad_(False)
            models.append(Discriminator(args.resolution).bfloat16())
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()

    def step() -> None:
        sample, target = fold_frames(vae(x).sample), fold_frames(x)
        if args.stage == 2:
            fake, real = models[2]([sample.detach()], [target])
            (fake.mean() - real.mean()).backward()
        pair = sample.float(), target.float()  # as in training
        loss = (pair[0] - pair[1]).square().mean() + lpips(*pair).mean()
        if args.stage == 2:
            models[2].requires_grad_(False)
            loss = loss + models[2]([sample])[0].mean()
        loss.backward()

    return models, step


def count_operations(args: argparse.Namespace) -> tuple[int, int]:
    """Of everything in bfloat16, and of LPIPS, which is in float32."""
    _, step = make_step(args, "meta")
    with FlopCounterMode(display=False) as counter, attention_backend("native"), sdpa_kernel(SDPBackend.MATH):
        step()
    in_float32 = sum(counter.get_flop_counts()["LPIPS"].values())
    return counter.get_total_flops() - in_float32, in_float32


def count_activations(args: argparse.Namespace) -> int:
    """Bytes that are kept for the backward passes at once, an upper bound: those of all of them."""
    models, step = make_step(args, "cpu")
    weights = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def main():
    parser = make_parser("estimate_training.py", __doc__)
    parser.add_argument("--variant", default="S-B/16")
    parser.add_argument("--stage", type=int, default=1, choices=[1, 2])
    parser.add_argument("--resolution", type=int, default=256, help="side of the crops in pixels")
    parser.add_argument("--batch_size", type=int, default=1024, help="pictures or clips a step, on all devices")
    parser.add_argument("--max_train_steps", type=int, default=100_000)
    parser.add_argument("--num_devices", type=int, default=8)
    parser.add_argument("--teraflops", type=float, default=989.0)
    parser.add_argument(
        "--float32_teraflops", type=float, help="default: half of --teraflops, as of TF32, in which PyTorch convolves"
    )
    parser.add_argument("--utilization", type=float, default=0.4)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()

    models, _ = make_step(args, "meta")
    trained = sum(x.numel() for model in models for x in model.parameters() if x.requires_grad)
    fixed = sum(x.numel() for model in models for x in model.parameters() if not x.requires_grad)
    ema = sum(x.numel() for x in models[0].decoder.parameters()) if args.stage == 2 else 0
    states = 4 * (4 * trained + ema + fixed)  # weights, gradients and two moments of AdamW, 4 bytes each
    operations, activations = count_operations(args), count_activations(args)
    speeds = args.teraflops, args.float32_teraflops or args.teraflops / 2
    on_device = args.batch_size / args.num_devices
    on_one = sum(count / (speed * 1e12) for count, speed in zip(operations, speeds))
    seconds = on_one * args.batch_size / (args.num_devices * args.utilization)
    print(f"{args.variant}, stage {args.stage}, {args.resolution} px, {args.batch_size} a step on {args.num_devices}")
    print(f"operations   {sum(operations) / 1e9:8.0f} GFLOP a picture or clip, {operations[1] / 1e9:.0f} in float32")
    print(f"             {sum(operations) * args.batch_size / 1e15:8.2f} PFLOP a step")
    print(f"memory       {states / 1e9:8.1f} GB of weights and states")
    print(f"             {activations / 1e9:8.3f} GB of activations for each picture or clip")
    print(f"on a device  {(states + activations * on_device) / 1e9:8.1f} GB with {on_device:g} at a time")
    print(f"time         {seconds:8.3f} s a step, {seconds * args.max_train_steps / 3600:.1f} hours in all")


if __name__ == "__main__":
    run_command(main)
