"""Autoencoders and denoisers as ONNX graphs, for batches and pictures of any size, checked with onnxruntime."""

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checks import check_int
from ..disk import replace_durably
from .autoencoder_vitok import AutoencoderViTok
from .codes import FILL
from .transformer_vitok_dit import ViTokDiTModel


TOLERANCE = 1e-3
LARGE = 1024  # numbers of a tensor that is worth a node of its own, to be stored in half of the bytes


class Part(torch.nn.Module):
    """What one file computes, with tensors in and out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model


class Encoder(Part):
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (posterior,) = self.model.encode(pixel_values, return_dict=False)
        return (posterior.mode(), posterior.std) if self.model.config.variational else (posterior.mode(),)


class Decoder(Part):
    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return self.model.decode(latents, return_dict=False)


class Denoiser(Part):
    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor]:
        return self.model(hidden_states, timestep, class_labels, return_dict=False)


@dataclass
class Graph:
    """A part and its inputs: (B, channels, [T,] H, W), whose sizes are multiples of `steps`.

    `frames` are those of a causal model, whose number cannot vary; `steps` are then without them.

    Raises:
        ValueError: If one of `shapes` is no such multiple.
    """

    part: Part
    outputs: tuple[str, ...]
    channels: int
    steps: tuple[int, ...]
    shapes: list[tuple[int, ...]]  # [T,] H, W for the check
    frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for shape in self.shapes:
            if any(side < step or side % step for side, step in zip(shape[-len(self.steps) :], self.steps)):
                raise ValueError(
                    f"Sizes for the check must be positive multiples of {self.steps}, but one is {shape}."
                )

    def inputs(self, batch_size: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        x = torch.rand(batch_size, self.channels, *shape) * 2 - 1
        if not isinstance(self.part, Denoiser):
            return (x,)
        labels = torch.randint(self.part.model.config.num_classes + 1, (batch_size,))
        return x, 1000 * torch.rand(batch_size), labels

    def export(self, opset: int) -> Any:
        """An `ONNXProgram`."""
        names, first = ("t", "h", "w")[-len(self.steps) :], 2 + len(self.frames)
        batch = torch.export.Dim("batch")
        sides = {
            axis: step * torch.export.Dim(name) for axis, step, name in zip(itertools.count(first), self.steps, names)
        }
        inputs = self.inputs(2, (*self.frames, *(step * length for step, length in zip(self.steps, (5, 3, 4)))))
        program = torch.onnx.export(
            self.part.eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=({0: batch} | sides, *({0: batch} for _ in inputs[1:])),
            output_names=self.outputs,
            opset_version=opset,
            verbose=False,
        )
        assert program is not None  # it is of `dynamo`
        graph = program.model.graph
        for node in (graph, *graph):
            node.metadata_props.clear()  # stack traces, with the paths of this machine
        if isinstance(self.part, Encoder):  # the exporter calls these s0, s1, ...
            for output, (axis, name) in itertools.product(graph.outputs, enumerate(names, first)):
                assert output.shape is not None
                output.shape[axis] = name
        return program


def halve(program: Any) -> None:
    """Stores the large tensors that float16 holds exactly in it; a node makes float32 of each."""
    import onnx_ir  # of an extra

    graph, casts = program.model.graph, []
    for value in list(graph.initializers.values()):
        numbers = value.const_value.numpy()
        if numbers.dtype != "float32" or numbers.size < LARGE or (numbers.astype("float16") != numbers).any():
            continue
        cast = onnx_ir.node("Cast", [None], {"to": onnx_ir.DataType.FLOAT}, name=f"{value.name}_cast")
        output = cast.outputs[0]
        output.name, output.shape, output.dtype = f"{value.name}_float32", value.shape, value.dtype
        onnx_ir.convenience.replace_all_uses_with(value, output)
        cast.replace_input_with(0, value)
        value.const_value, value.dtype = onnx_ir.tensor(numbers.astype("float16")), onnx_ir.DataType.FLOAT16
        casts.append(cast)
    graph.insert_before(graph[0], casts)


def round_weights(model: torch.nn.Module) -> None:
    """To numbers that float16 holds; `ValueError` if one is too large."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.half().float()
        if not parameter.isfinite().all():
            raise ValueError(f"`{name}` has numbers beyond 65504, the largest of float16: leave out --half.")


@torch.inference_mode()
def check(part: Part, path: Path, inputs: tuple[torch.Tensor, ...], rounds: int) -> None:
    """Prints the largest difference from PyTorch and the median times; `ValueError` if it is too large."""
    import onnxruntime  # of an extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # in PyTorch's turn
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs)}
    calls = (lambda: session.run(None, feed), lambda: part(*inputs))
    outputs, expected = (call() for call in calls)
    error = torch.stack([(torch.from_numpy(a) - b).abs().max() for a, b in zip(outputs, expected)]).max().item()
    timings: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):  # in turns, so that a disturbance meets both
        for call, milliseconds in zip(calls, timings):
            began = time.perf_counter()
            call()
            milliseconds.append(1e3 * (time.perf_counter() - began))
    medians = "onnxruntime {:.1f} ms  PyTorch {:.1f} ms".format(*map(statistics.median, timings))
    shape = tuple(inputs[0].shape)
    print(f"  {shape}  max error {error:.1e}  {medians}", flush=True)
    if not error <= TOLERANCE:
        raise ValueError(f"{path.name} differs from PyTorch by {error:.1e} for {shape}.")


def describe(vae: AutoencoderViTok) -> dict[str, Any]:
    """What is to be known of the latents: their sizes, normalisation, and how codes are cut."""
    config = vae.config
    names = ("in_channels", "latent_channels", "patch_size", "temporal_patch_size", "scaling_factor", "channel_counts")
    return {name: config[name] for name in names} | {
        "latents_mean": config.latents_mean or [config.shift_factor or 0.0] * config.latent_channels,
        "latents_std": config.latents_std or [1.0] * config.latent_channels,
        "fill": FILL,
    }


def autoencoder_graphs(vae: AutoencoderViTok, sizes: list[tuple[int, int]]) -> dict[str, Graph]:
    """Those of the halves that the model has, by name. `sizes` are (height, width) in pixels, for the check.

    Raises:
        ValueError: If codes are 1-D, whose decoder needs a size besides.
    """
    if vae.config.num_latent_tokens is not None:
        raise ValueError(
            f"Graphs are of codes on grids, but the config has `num_latent_tokens` {vae.config.num_latent_tokens}: "
            "`torch.export` takes such models, at one size for the decoder."
        )
    config, q, p = vae.config, vae.temporal_compression_ratio, vae.spatial_compression_ratio
    patch = (p, p) if vae.is_image_model or config.causal else (q, p, p)
    num_frames = max(config.sample_frames, config.num_frames(1))
    time = [() if vae.is_image_model else (frames,) for frames in (num_frames, config.num_latent_frames(num_frames))]
    fixed = time if config.causal else [(), ()]
    clips = [(*time[0], *size) for size in sizes]
    grids = [(*time[1], height // p, width // p) for height, width in sizes]
    outputs = ("latents", "std") if config.variational else ("latents",)
    graphs = {
        "encoder": Graph(Encoder(vae), outputs, config.in_channels, patch, clips, fixed[0]),
        "decoder": Graph(Decoder(vae), ("sample",), config.latent_channels, (1,) * len(patch), grids, fixed[1]),
    }
    return {name: graph for name, graph in graphs.items() if config.component in (None, name)}


def denoiser_graph(transformer: ViTokDiTModel, grids: list[tuple[int, ...]]) -> Graph:
    """`grids` are [t,] h, w of latents, for the check."""
    p = transformer.config.patch_size
    steps = (*(1,) * (len(grids[0]) - 2), p, p)
    return Graph(Denoiser(transformer), ("sample",), transformer.config.in_channels, steps, grids)


def export_onnx(
    graphs: dict[str, Graph],
    description: dict[str, Any],
    output_dir: Path,
    opset: int,
    batch_sizes: list[int],
    rounds: int,
    half: bool = False,
) -> None:
    """Writes each graph as NAME.onnx, and `description` as model.json and into their metadata; prints what they are.

    Args:
        graphs: Of models in float32.
        description: Can be written as JSON.
        output_dir: Is made if needed.
        opset: Below 23, ONNX has no attention operator.
        batch_sizes: Of the check.
        rounds: The median of so many timings counts.
        half: Stores weights in float16, to which those of the models are rounded; what is computed is float32.

    Raises:
        ValueError: If a graph differs from PyTorch by more than `TOLERANCE`, or a weight is beyond float16; then
            nothing is written.
    """
    import onnxruntime  # noqa: F401, missed before the work
    import onnxscript  # noqa: F401

    for batch_size in batch_sizes:
        check_int("batch_sizes", batch_size)
    check_int("rounds", rounds)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, suffix=".incomplete") as folder:
        for name, graph in graphs.items():
            path = Path(folder) / f"{name}.onnx"
            if half:
                round_weights(graph.part)
            program = graph.export(opset)
            if half:
                halve(program)
            program.model.metadata_props.update({key: json.dumps(value) for key, value in description.items()})
            program.save(path)
            print(f"{path.name}, opset {opset}, {torch.get_num_threads()} threads")
            for batch_size, shape in itertools.product(batch_sizes, graph.shapes):
                check(graph.part, path, graph.inputs(batch_size, shape), rounds)
        Path(folder, "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for path in sorted(Path(folder).iterdir(), reverse=True):  # weights above 1.5 GB (x.onnx.data) before x.onnx
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
            replace_durably(path, output_dir / path.name)
