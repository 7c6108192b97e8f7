"""Writes encoder.onnx and decoder.onnx, for batches and pictures of any size, and checks them with onnxruntime.

    python examples/export_onnx.py --model vitok-tiny-f8x8 --output_dir onnx

The encoder takes `pixel_values`, (B, 3, H, W) in [-1, 1] or (B, 3, T, H, W) for a video model, and gives `latents`,
the mode of the posterior, and if the model is variational its `std`: latents + std * noise is a sample. The decoder
takes `latents` and gives `sample`. All are float32. Diffusion models see (latents - latents_mean) / latents_std *
scaling_factor: the metadata of both files has these, as JSON. Files that do not agree with PyTorch are not written.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import run_command
from vitok_hf.data.cropping import parse_size
from vitok_hf.disk import replace_durably


TOLERANCE = 1e-3


class Encoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderViTok):
        super().__init__()
        self.vae = vae
        self.outputs = ["latents", "std"] if vae.config.variational else ["latents"]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        posterior = self.vae.encode(pixel_values).latent_dist
        return (posterior.mode(), posterior.std)[: len(self.outputs)]


class Decoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderViTok):
        super().__init__()
        self.vae = vae
        self.outputs = ["sample"]

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return self.vae.decode(latents, return_dict=False)


def export(half: Encoder | Decoder, channels: int, steps: tuple[int, ...], opset: int) -> torch.onnx.ONNXProgram:
    """For inputs (B, channels, [T,] H, W) whose frames, height and width are any multiples of `steps`."""
    names = ("t", "h", "w")[-len(steps) :]
    axes = {axis: step * torch.export.Dim(name) for axis, (step, name) in enumerate(zip(steps, names), start=2)}
    example = torch.rand(2, channels, *(step * length for step, length in zip(steps, (5, 3, 4))))
    shapes = ({0: torch.export.Dim("batch")} | axes,)
    options = {"output_names": half.outputs, "opset_version": opset, "verbose": False}
    program = torch.onnx.export(half.eval(), (example,), dynamo=True, dynamic_shapes=shapes, **options)
    graph, config = program.model.graph, half.vae.config
    for part in (graph, *graph):
        part.metadata_props.clear()  # stack traces, with the paths of this machine
    if isinstance(half, Encoder):  # the exporter calls these s0, s1, ...
        for output, (axis, name) in itertools.product(graph.outputs, enumerate(names, start=2)):
            output.shape[axis] = name
    values = {key: config[key] for key in ("latent_channels", "patch_size", "temporal_patch_size", "scaling_factor")}
    values["latents_mean"] = config.latents_mean or [config.shift_factor or 0.0] * config.latent_channels
    values["latents_std"] = config.latents_std or [1.0] * config.latent_channels
    program.model.metadata_props.update({key: json.dumps(value) for key, value in values.items()})
    return program


@torch.inference_mode()
def check(half: Encoder | Decoder, path: Path, x: torch.Tensor, rounds: int) -> None:
    """Prints the largest difference from PyTorch and the median times; `ValueError` if it is too large."""
    import onnxruntime  # of an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # in PyTorch's turn
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    runs = (lambda: session.run(None, feed), lambda: half(x))
    outputs, expected = (run() for run in runs)
    error = torch.stack([(torch.from_numpy(a) - b).abs().max() for a, b in zip(outputs, expected)]).max().item()
    timings = ([], [])
    for _ in range(rounds):  # in turns, so that a disturbance meets both
        for run, milliseconds in zip(runs, timings):
            began = time.perf_counter()
            run()
            milliseconds.append(1e3 * (time.perf_counter() - began))
    medians = "onnxruntime {:.1f} ms  PyTorch {:.1f} ms".format(*map(statistics.median, timings))
    print(f"  {tuple(x.shape)}  max error {error:.1e}  {medians}", flush=True)
    if not error <= TOLERANCE:
        raise ValueError(f"{path.name} differs from PyTorch by {error:.1e} for {tuple(x.shape)}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="folder, Hub id or bundled name")
    parser.add_argument("--opset", type=int, default=23, help="lower ones have no attention operator")
    parser.add_argument("--sizes", nargs="+", default=["256x256", "512x384"], help="HEIGHTxWIDTH, for the check")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4], help="for the check")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many timings counts")
    parser.add_argument("--output_dir", type=Path, default=Path("onnx"))
    args = parser.parse_args()

    vae = AutoencoderViTok.from_pretrained(args.model, dtype=torch.float32)
    q, p = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    patch = (p, p) if vae.is_image_model else (q, p, p)
    clips = [(max(vae.config.sample_frames, q), *parse_size(size)[:2])[-len(patch) :] for size in args.sizes]
    grids = [tuple(side // step for side, step in zip(clip, patch)) for clip in clips]
    halves = {
        "encoder": (Encoder(vae), vae.config.in_channels, patch, clips),
        "decoder": (Decoder(vae), vae.config.latent_channels, (1,) * len(patch), grids),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, suffix=".incomplete") as folder:
        for name, (half, channels, steps, sizes) in halves.items():
            if vae.config.component not in (None, name):
                continue
            path = Path(folder) / f"{name}.onnx"
            export(half, channels, steps, args.opset).save(path)
            print(f"{path.name}, opset {args.opset}, {torch.get_num_threads()} threads")
            for batch_size, size in itertools.product(args.batch_sizes, sizes):
                check(half, path, torch.rand(batch_size, channels, *size) * 2 - 1, args.rounds)
        for path in sorted(Path(folder).iterdir(), reverse=True):  # weights above 1.5 GB (x.onnx.data) before x.onnx
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
            replace_durably(path, args.output_dir / path.name)


if __name__ == "__main__":
    run_command(main)
