"""Both halves of an autoencoder as ONNX graphs, for batches and pictures of any size, checked with onnxruntime."""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ..disk import replace_durably
from .autoencoder_vitok import AutoencoderViTok


TOLERANCE = 1e-3


class Half(torch.nn.Module):
    """Half of an autoencoder, with the names of its outputs."""

    def __init__(self, vae: AutoencoderViTok, *outputs: str):
        super().__init__()
        self.vae, self.outputs = vae, outputs


class Encoder(Half):
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (posterior,) = self.vae.encode(pixel_values, return_dict=False)
        return (posterior.mode(), posterior.std)[: len(self.outputs)]


class Decoder(Half):
    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return self.vae.decode(latents, return_dict=False)


def export(
    half: Half, channels: int, steps: tuple[int, ...], opset: int, frames: tuple[int, ...] = ()
) -> torch.onnx.ONNXProgram:
    """For inputs (B, channels, [T,] H, W) whose frames, height and width are any multiples of `steps`.

    `frames` are those of a causal model, whose number cannot vary; `steps` are then without them.
    """
    names, first = ("t", "h", "w")[-len(steps) :], 2 + len(frames)
    axes = {axis: step * torch.export.Dim(name) for axis, (step, name) in enumerate(zip(steps, names), start=first)}
    example = torch.rand(2, channels, *frames, *(step * length for step, length in zip(steps, (5, 3, 4))))
    shapes = ({0: torch.export.Dim("batch")} | axes,)
    program = torch.onnx.export(
        half.eval(),
        (example,),
        dynamo=True,
        dynamic_shapes=shapes,
        output_names=half.outputs,
        opset_version=opset,
        verbose=False,
    )
    assert program is not None  # it is of `dynamo`
    graph, config = program.model.graph, half.vae.config
    for part in (graph, *graph):
        part.metadata_props.clear()  # stack traces, with the paths of this machine
    if isinstance(half, Encoder):  # the exporter calls these s0, s1, ...
        for shape, (axis, name) in itertools.product(
            [output.shape for output in graph.outputs], enumerate(names, first)
        ):
            assert shape is not None
            shape[axis] = name
    values = {key: config[key] for key in ("latent_channels", "patch_size", "temporal_patch_size", "scaling_factor")}
    values["latents_mean"] = config.latents_mean or [config.shift_factor or 0.0] * config.latent_channels
    values["latents_std"] = config.latents_std or [1.0] * config.latent_channels
    program.model.metadata_props.update({key: json.dumps(value) for key, value in values.items()})
    return program


@torch.inference_mode()
def check(half: Half, path: Path, x: torch.Tensor, rounds: int) -> None:
    """Prints the largest difference from PyTorch and the median times; `ValueError` if it is too large."""
    import onnxruntime  # of an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # in PyTorch's turn
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    calls = (lambda: session.run(None, feed), lambda: half(x))
    outputs, expected = (call() for call in calls)
    error = torch.stack([(torch.from_numpy(a) - b).abs().max() for a, b in zip(outputs, expected)]).max().item()
    timings: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):  # in turns, so that a disturbance meets both
        for call, milliseconds in zip(calls, timings):
            began = time.perf_counter()
            call()
            milliseconds.append(1e3 * (time.perf_counter() - began))
    medians = "onnxruntime {:.1f} ms  PyTorch {:.1f} ms".format(*map(statistics.median, timings))
    print(f"  {tuple(x.shape)}  max error {error:.1e}  {medians}", flush=True)
    if not error <= TOLERANCE:
        raise ValueError(f"{path.name} differs from PyTorch by {error:.1e} for {tuple(x.shape)}.")


def export_onnx(
    vae: AutoencoderViTok,
    output_dir: Path,
    opset: int,
    sizes: list[tuple[int, int]],
    batch_sizes: list[int],
    rounds: int,
) -> None:
    """Writes encoder.onnx and decoder.onnx, those of the model's halves that it has, and prints what they are.

    Args:
        vae: In float32.
        output_dir: Is made if needed.
        opset: Below 23, ONNX has no attention operator.
        sizes: (height, width) of the pictures of the check. Clips have `sample_frames` frames, in the graphs of a
            causal model always.
        batch_sizes: Of the check.
        rounds: The median of so many timings counts.

    Raises:
        ValueError: If codes are 1-D, whose decoder needs a size besides, or a half differs from PyTorch by more than
            `TOLERANCE`; then nothing is written.
    """
    if vae.config.num_latent_tokens is not None:
        raise ValueError(
            f"Graphs are of codes on grids, but the config has `num_latent_tokens` {vae.config.num_latent_tokens}: "
            "`torch.export` takes such models, at one size for the decoder."
        )
    import onnxruntime  # noqa: F401, missed before the work
    import onnxscript  # noqa: F401

    config, q, p = vae.config, vae.temporal_compression_ratio, vae.spatial_compression_ratio
    patch = (p, p) if vae.is_image_model or config.causal else (q, p, p)
    num_frames = max(config.sample_frames, config.num_frames(1))
    time = [() if vae.is_image_model else (frames,) for frames in (num_frames, config.num_latent_frames(num_frames))]
    clips = [(*time[0], *size) for size in sizes]
    grids = [(*time[1], height // p, width // p) for height, width in sizes]
    outputs = ("latents", "std") if vae.config.variational else ("latents",)
    halves: dict[str, tuple[Half, int, tuple[int, ...], list[tuple[int, ...]]]] = {
        "encoder": (Encoder(vae, *outputs), vae.config.in_channels, patch, clips),
        "decoder": (Decoder(vae, "sample"), vae.config.latent_channels, (1,) * len(patch), grids),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, suffix=".incomplete") as folder:
        for name, (half, channels, steps, shapes) in halves.items():
            if vae.config.component not in (None, name):
                continue
            path = Path(folder) / f"{name}.onnx"
            export(half, channels, steps, opset, shapes[0][:1] if config.causal else ()).save(path)
            print(f"{path.name}, opset {opset}, {torch.get_num_threads()} threads")
            for batch_size, shape in itertools.product(batch_sizes, shapes):
                check(half, path, torch.rand(batch_size, channels, *shape) * 2 - 1, rounds)
        for path in sorted(Path(folder).iterdir(), reverse=True):  # weights above 1.5 GB (x.onnx.data) before x.onnx
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
            replace_durably(path, output_dir / path.name)
