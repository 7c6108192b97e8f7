"""Bad arguments for every public function: a table of what each argument is, times what is bad for one of its kind."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.conftest import assert_close, make_vae
from tests.dit import TRANSFORMER, make_pipeline, make_transformer
from tests.faults import Case, judge, limited
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline
from vitok_hf.latents import (
    LatentStatistics,
    compute_latent_statistics,
    denormalize_latents,
    encode_mode,
    normalize_latents,
    summarize_latents,
)
from vitok_hf.models.posterior import ViTokPosterior
from vitok_hf.presets import dit_variant_to_config, variant_to_config


NAN, INF = float("nan"), float("inf")


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in range(count)]


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeds(1)[0]) * 2 - 1


@cache
def vae(kind: str = "v1") -> AutoencoderViTok:
    return make_vae(kind)


@cache
def pipe(kind: str = "image") -> ViTokDiTPipeline:
    return make_pipeline(kind)


@cache
def transformer() -> ViTokDiTModel:
    return make_transformer(**TRANSFORMER)


def draw(kind: str = "image", **arguments: Any) -> torch.Tensor:
    defaults = {"class_labels": ["cat", 4], "num_inference_steps": 1, "generator": seeds(2), "output_type": "latent"}
    return pipe(kind)(**defaults | arguments, return_dict=False)[0]


def posterior(deterministic: bool = False) -> ViTokPosterior:
    return ViTokPosterior(pixels(2, 8, 2, 3), deterministic)


def with_value(good: torch.Tensor, value: float) -> torch.Tensor:
    return good.flatten().index_fill(0, torch.tensor([7]), value).view(good.shape)


def but(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without those of these names."""
    return {name: value for name, value in values.items() if name not in names}


# What is bad for a kind: a name for each, and the value, or for tensors a function of a good one.
# fmt: off
JUNK = {
    "None": None, "text": "cat", "bytes": b"\x01", "complex": 1j, "object": object(), "dict": {"a": 1}, "type": int,
}
TENSORS = {name: lambda good, value=value: value for name, value in JUNK.items()} | {
    "int": lambda good: 5, "float": lambda good: 1.5, "array": lambda good: good.numpy(),
    "picture": lambda good: Image.new("RGB", (16, 16)), "empty list": lambda good: [],
    **{
        str(dtype): lambda good, dtype=dtype: (good * 100).to(dtype)
        for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64, torch.int8)
    },
    "NaN": lambda good: with_value(good, NAN), "infinite": lambda good: with_value(good, INF),
    "minus infinity": lambda good: with_value(good, -INF), "sparse": lambda good: good.to_sparse(),
    "0-d": lambda good: good.flatten()[0], "1-d": lambda good: good.flatten(),
    "7-d": lambda good: good[(None,) * (7 - good.ndim)], "no items": lambda good: good[:0],
    "posterior": lambda good: posterior(), "output": lambda good: vae().encode(pixels(1, 3, 16, 16)),
    "list of text": lambda good: ["cat"], "list of arrays": lambda good: [good[0].numpy()],
    "list of None": lambda good: [None, good[0]],
}
SHAPES = {  # where these matter
    "no height": lambda good: good[..., :0, :], "channels": lambda good: good[:, :2],
    "no channels": lambda good: good[:, :0],
}
DTYPES = {
    str(dtype): lambda good, dtype=dtype: good.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)
}
LISTS = {
    "mixed dtypes": lambda good: [good[0], good[1].double()],
    "mixed devices": lambda good: [good[0], good[1].to("meta")], "mixed channels": lambda good: [good[0], good[1][:2]],
    "list of lists": lambda good: [[good[0]]], "tuple with None": lambda good: (good[0], None),
    "NaN in a list": lambda good: [good[0], with_value(good[1], NAN)],
    "uint8 in a list": lambda good: [good[0].to(torch.uint8)], "posterior in a list": lambda good: [posterior()],
    "0-d in a list": lambda good: [torch.tensor(1.0)], "empty in a list": lambda good: [good[0][..., :0]],
    "meta": lambda good: good.to("meta"),
}
NUMBERS = JUNK | {
    "True": True, "NumPy True": np.True_, "NaN": NAN, "infinite": INF, "minus infinity": -INF, "10**400": 10**400,
    "10**5000": 10**5000, "-1e9": -1e9, "list": [1], "tuple": (1, 2), "array": np.array([1, 2]),
    "tensor of two": torch.ones(2), "tensor of booleans": torch.tensor(True),
}
INTS = NUMBERS | {
    "0": 0, "-1": -1, "10**9": 10**9, "10**30": 10**30, "1.5": 1.5, "float": 8.0, "NumPy float": np.float32(8),
    "tensor of a float": torch.tensor(8.0),
}
BOOLEANS = JUNK | {"1": 1, "0": 0, "2.0": 2.0, "tensor": torch.tensor(True)}
LABELS = but(NUMBERS, "None", "text", "list", "tuple", "array") | {
    "6": 6, "-1": -1, "1.0": 1.0, "10**30": 10**30, "no name": "no such class", "several ids": "crane",
    "bytes of a name": b"cat", "None in a list": ["cat", None], "True in a list": [True], "NaN in a list": [NAN],
    "set": {1}, "endless": itertools.count(), "floats": torch.tensor([1.0, 2.0]),
    "array of floats": np.array([1.0, 2.0]), "booleans": np.array([True, False]), "7": torch.tensor(7),
}
CLASS_TENSORS = JUNK | {
    "list": [0, 1], "int": 3, "array": np.array([0, 1]), "floats": torch.ones(2), "booleans": torch.ones(2).bool(),
    "uint8": torch.ones(2, dtype=torch.uint8), "too high": torch.tensor([0, 6]), "negative": torch.tensor([0, -1]),
    "one": torch.tensor([1]), "0-d": torch.tensor(1), "column": torch.tensor([[1], [2]]),
}
GENERATORS = but(JUNK, "None") | {
    "seed": 5, "True": True, "tuple": tuple(seeds(2)), "seeds": [1, 2], "None in a list": [None, None],
    "NumPy": np.random.default_rng(0), "class": torch.Generator, "mixed": [seeds(1)[0], 2], "nested": [seeds(2)],
}
COUNTS = {"no generators": [], "one for two": seeds(1), "three for two": seeds(3)}
VARIANTS = but(JUNK, "text") | {
    name: name
    for name in (
        "", "S", "S-B", "X-B/16", "S-B/16x", "S-B/1x2x3x4", "S-B/0", "S-B/0x8", "S-B/4x0", "S-B/99999999",
        "S-B/9999x8",
        "Ld0-L/1x16x64", "Ld999999999-L/1x16x64", "Lw0-L/1x16x64", "Lw99999999-L/1x16x64", "Lh0-L/1x16x64",
        "Lh999999-L/1x16x64", "Lm0-Lm0/1x16x64", "Lm1000000-Lm1000000/1x16x64", "Lm1.2.3-L/1x16x64", "Ld1.5/1x16x64",
        "B/0x16x64", "B/1x0x64", "B/1x16x0", "B/1x16x999999999", "B/1x999999x64", "B/999999x16x64", "Ld-L/1x16x64",
        "s-b/16", " S-B/16", "S-B/16\n", "S-B/-16", "Bd4d5/1x16x64", "w64_d2/1x8x16",
    )
} | {
    "digits": f"S-B/{'9' * 5000}", "digits of depth": f"Ld{'9' * 5000}-L/1x16x64",
    "digits of channels": f"B/1x16x{'9' * 5000}", "int": 5, "list": ["S-B/16"],
}  # fmt: skip
SIZES = but(JUNK, "None") | {
    "int": 16, "pair": (16, 24), "ints": [16, 24], "text in a pair": [("16", 24), (16, 24)],
    "floats": [(16.0, 24), (16, 24)], "booleans": [(True, 24), (16, 24)], "negative": [(-1, 24), (16, 24)],
    "zero": [(0, 24), (16, 24)], "triples": [(16, 24, 3)] * 2, "one": [(16, 24)], "too large": [(17, 24), (16, 24)],
    "huge": [(10**30, 24), (16, 24)], "NaN": [(NAN, 24), (16, 24)], "array": np.array([[16, 24], [16, 24]]),
}
INTERVALS = JUNK | {
    "float": 0.5, "one": (0.5,), "three": (0.0, 0.5, 1.0), "texts": ("0", "1"), "letters": "01", "NaN": (NAN, 1.0),
    "booleans": (False, True), "reversed": (0.8, 0.2), "negative": (-0.1, 1.0), "beyond": (0.0, 1.1),
    "Nones": (None, None), "array": np.array([0.0, 1.0]), "set": {0.0, 1.0},
}
CALLBACKS = but(JUNK, "None", "type") | {
    "int": 5, "list": [print], "returns a tensor": lambda *args: args[-1]["latents"],
    "returns text": lambda *args: "latents", "returns None for latents": lambda *args: {"latents": None},
    "returns another shape": lambda *args: {"latents": torch.zeros(1)},
    "returns an array": lambda *args: {"latents": np.zeros((2, 4, 4, 4))[0]},
}
NAMES = but(JUNK, "None") | {
    "letters": "latents", "unknown": ["noise"], "Nones": [None], "lists": [["latents"]], "5": 5,
}
OUTPUT_TYPES = JUNK | {"png": "png", "PIL": "PIL", "list": ["pil"], "array": np.array(["pil", "np"]), "5": 5}
STREAMS = but(JUNK, "dict") | {
    "clip": pixels(1, 3, 2, 16, 16), "5": 5, "None in a list": [None], "arrays": [np.zeros((1, 3, 2, 16, 16))],
    "uint8": [torch.zeros(1, 3, 2, 16, 16, dtype=torch.uint8)], "float64": [torch.zeros(1, 3, 2, 16, 16).double()],
    "NaN": [torch.full((1, 3, 2, 16, 16), NAN)], "pictures": [torch.zeros(1, 3, 16, 16)],
    "channels": [torch.zeros(1, 2, 2, 16, 16)],
    "other sizes": [torch.zeros(1, 3, 2, 16, 16), torch.zeros(1, 3, 2, 16, 8)],
    "other batch": [torch.zeros(1, 3, 2, 16, 16), torch.zeros(2, 3, 2, 16, 16)],
    "other dtype": [torch.zeros(1, 3, 2, 16, 16), torch.zeros(1, 3, 2, 16, 16).double()], "text in a list": ["cat"],
}
BATCHES = but(JUNK, "dict") | {
    "one tensor": torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "floats": [torch.zeros(2, 3, 16, 16)],
    "float list": [[torch.zeros(3, 16, 16)]], "float tuple": [(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))],
    "arrays": [np.zeros((2, 3, 16, 16), dtype=np.uint8)], "texts": ["cat"], "None in a list": [None], "ints": [1, 2],
    "0-d": [torch.tensor(3, dtype=torch.uint8)], "list of arrays": [[np.zeros((3, 16, 16), dtype=np.uint8)]],
    "channels": [torch.zeros(2, 4, 16, 16, dtype=torch.uint8)],
}
MOMENTS = JUNK | {
    "one tensor": torch.zeros(2, 4, 2, 2), "tensors": [torch.randn(3, 4, 2, 2)],
    "single": [(torch.randn(2, 4, 2, 2),)], "texts": [("a", "b")],
    "std of another shape": [(torch.randn(2, 4, 2, 2), torch.ones(2, 4, 2, 1))],
    "std that broadcasts": [(torch.randn(2, 4, 2, 2), torch.ones(4, 2, 2))],
    "negative std": [(torch.randn(2, 4, 2, 2), -torch.ones(2, 4, 2, 2))],
    "NaN std": [(torch.randn(2, 4, 2, 2), torch.full((2, 4, 2, 2), NAN))],
    "float std": [(torch.randn(2, 4, 2, 2), 1.0)], "integers": [(torch.ones(2, 4, 2, 2, dtype=torch.int64), None)],
    "complex latents": [(torch.randn(2, 4, 2, 2) * 1j, None)], "arrays": [(np.ones((2, 4, 2, 2)), None)],
    "nothing": [],
}
MODELS = JUNK | {"module": torch.nn.Linear(2, 2), "5": 5}
ID2LABELS = but(JUNK, "None") | {
    "list": ["cat"], "floats": {1.5: "cat"}, "booleans": {True: "cat"}, "texts": {"one": "cat"}, "ints": {0: 1},
    "Nones": {0: None}, "lists": {0: ["cat"]}, "None": {None: "cat"}, "negative": {-1: "cat"}, "too high": {5: "cat"},
    "huge": {10**5000: "cat"}, "text of a float": {"1.5": "cat"},
}
OTHERS = but(JUNK, "None") | {
    "tensor": torch.zeros(2, 4, 2, 3), "other shape": ViTokPosterior(torch.zeros(1, 8, 2, 3)),
    "deterministic": posterior(deterministic=True), "list": [posterior()],
}
TIMESTEPS = NUMBERS | {
    "NaN tensor": torch.tensor([1.0, NAN]), "infinite tensor": torch.tensor(INF), "huge tensor": torch.tensor(1e30),
    "three": torch.ones(3), "column": torch.ones(2, 1), "complex tensor": torch.ones(2) * 1j,
    "boolean tensor": torch.ones(2).bool(), "huge": 1e30,
}
# fmt: on


@dataclass
class Entry:
    """An argument of a function. Of bad values, `accepts` are those that are good here: with which they must agree."""

    name: str
    argument: str
    call: Callable[[Any], Any]
    bad: dict[str, Any]
    good: torch.Tensor | None = None  # of tensors, to make bad ones of
    accepts: dict[str, Any] = field(default_factory=dict)
    leaves_out: tuple[str, ...] = ()  # what is no mistake here, and cannot be compared
    names: tuple[str, ...] = ()  # by which messages call it, besides its own


def tensor_entries() -> Iterator[Entry]:
    picture, clip, latents = pixels(2, 3, 16, 24), pixels(2, 3, 4, 16, 24), pixels(2, 4, 2, 3)
    of_model = TENSORS | SHAPES | DTYPES | LISTS
    size = ("Height and width", "number of frames")
    for kind, x in (("v1", picture), ("video", clip)):
        model, z = vae(kind), vae(kind).encode(x).latent_dist.mode().detach()
        pair = {"tuple": lambda good: tuple(good)}
        yield Entry(f"{kind}.encode", "x", lambda x, m=model: m.encode(x).latent_dist.mode(), of_model | pair, x,
                    {"tuple": list(x)}, names=size)  # fmt: skip
        yield Entry(f"{kind}.decode", "z", lambda z, m=model: m.decode(z).sample, of_model | pair, z,
                    {"tuple": list(z)}, names=size)  # fmt: skip
        yield Entry(f"{kind}.forward", "sample", lambda x, m=model: m(x).sample, of_model | pair, x,
                    {"tuple": list(x)}, names=size)  # fmt: skip
    of_dit = but(of_model, *but(LISTS, "meta"))
    yield Entry("dit", "hidden_states", lambda x: transformer()(x, 1, torch.tensor([0, 1])).sample, of_dit, latents)
    any_dtype = but(TENSORS, "no items")
    for function in (normalize_latents, denormalize_latents):
        yield Entry(function.__name__, "latents", lambda z, f=function: f(z, pipe().vae), any_dtype | SHAPES, latents,
                    leaves_out=("no height",), names=("Latents",))  # fmt: skip
    shape = pipe().get_latent_shape(2)
    noise = any_dtype | SHAPES
    yield Entry("pipe", "latents", lambda z: draw(latents=z), noise, pixels(*shape), {"None": None}, names=("height",))
    yield Entry("prepare_latents", "latents", lambda z: pipe().prepare_latents(2, None, None, None, None, "cpu", z),
                noise, pixels(*shape), leaves_out=("None",), names=("height",))  # fmt: skip
    yield Entry("nll", "sample", lambda x: posterior().nll(x), TENSORS | SHAPES, latents)
    yield Entry("encode_mode", "pixels", lambda x: encode_mode(vae(), x), of_model, picture, names=("x", *size))


def number_entries() -> Iterator[Entry]:
    def on_copy(method: str, argument: str, kind: str = "video") -> Callable[[Any], Any]:
        return lambda value: getattr(copy.copy(vae(kind)), method)(**{argument: value})

    fits = ("10**9",)  # a tile or a window may be larger than any picture
    for name in ("tile_sample_min_size", "tile_sample_min_frames"):
        yield Entry("enable_tiling", name, on_copy("enable_tiling", name), INTS, leaves_out=("None", *fits))
    for name, kind in (("radius", "video"), ("frames", "causal")):
        yield Entry("enable_sliding_window", name, on_copy("enable_sliding_window", name, kind), INTS,
                    leaves_out=("None", *fits))  # fmt: skip
    for method in ("encode_stream", "decode_stream"):
        yield Entry(method, "max_cached_frames",
                    lambda value, method=method: getattr(vae("causal"), method)([], max_cached_frames=value), INTS,
                    leaves_out=("None", *fits))  # fmt: skip
    overlap = "tile_overlap_factor"
    yield Entry("enable_tiling", overlap, on_copy("enable_tiling", overlap), NUMBERS | {"0.6": 0.6, "-0.1": -0.1})
    yield Entry("pipe", "num_images_per_label", lambda n: draw(num_images_per_label=n, generator=None), INTS)
    for name in ("num_inference_steps", "height", "width"):
        accepts = {"None": None} if name in ("height", "width") else {}
        more = {"huge": 10_000_000, "odd": 31} if accepts else {}
        yield Entry("pipe", name, lambda value, name=name: draw(**{name: value}), INTS | more, accepts=accepts)
    yield Entry("video pipe", "num_frames", lambda n: draw("video", num_frames=n),
                INTS | {"huge": 10_000_000, "odd": 3},
                accepts={"None": None})  # fmt: skip
    yield Entry("get_latent_shape", "batch_size", lambda n: pipe().get_latent_shape(n), INTS,
                names=("num_images_per_label",))  # fmt: skip
    yield Entry("get_latent_shape", "height", lambda n: pipe().get_latent_shape(2, height=n), INTS,
                accepts={"None": None})  # fmt: skip
    for name in ("guidance_scale", "guidance_rescale"):
        yield Entry("pipe", name, lambda value, name=name: draw(**{name: value}), NUMBERS | {"-0.5": -0.5},
                    accepts={"None": None})  # fmt: skip
    yield Entry("pipe", "eta", lambda value: draw(eta=value), NUMBERS | {"1.1": 1.1}, accepts={"None": None})
    x = pixels(2, 4, 2, 3)
    yield Entry("dit", "timestep", lambda t: transformer()(x, t, torch.tensor([0, 1])).sample, TIMESTEPS,
                accepts={"tensor of two": torch.ones(2)})  # fmt: skip


def other_entries() -> Iterator[Entry]:
    x, z = pixels(2, 3, 16, 24), pixels(2, 4, 2, 3)
    items = vae().encode([x[0], x[1][:, :8]]).latent_dist
    statistics = LatentStatistics([0.0], [1.0], 0.0, 1.0, 1, 1)
    parts = {"transformer": pipe().transformer, "vae": pipe().vae, "scheduler": pipe().scheduler}
    for name, call in {
        "encode": lambda value: vae().encode(x, return_dict=value),
        "decode": lambda value: vae().decode(z, return_dict=value),
        "forward": lambda value: vae()(x, return_dict=value),
        "dit": lambda value: transformer()(z, 1, return_dict=value),
        "pipe": lambda value: pipe()(1, num_inference_steps=1, output_type="latent", return_dict=value),
    }.items():
        yield Entry(name, "return_dict", call, BOOLEANS)
    yield Entry("forward", "sample_posterior", lambda value: vae()(x, sample_posterior=value), BOOLEANS)
    yield Entry("to_config", "per_channel", lambda value: statistics.to_config(per_channel=value), BOOLEANS)
    yield Entry("decode", "timestep", lambda value: vae().decode(z, value), {**JUNK, "0": 0, "0.5": 0.5},
                leaves_out=("None",))  # fmt: skip
    class_names = ("class", "Classes")
    yield Entry("pipe", "class_labels", lambda value: draw(class_labels=value, generator=None), LABELS | {"[]": []},
                names=class_names)  # fmt: skip
    yield Entry("get_label_ids", "class_labels", lambda value: pipe().get_label_ids(value), LABELS, names=class_names)
    yield Entry("dit", "class_labels", lambda value: transformer()(z, 1, value).sample, CLASS_TENSORS,
                accepts={"None": torch.tensor([5, 5])})  # fmt: skip
    yield Entry("pipe", "generator", lambda g: draw(generator=g), GENERATORS | COUNTS)
    yield Entry("prepare_latents", "generator",
                lambda g: pipe().prepare_latents(2, None, None, None, g, "cpu"), GENERATORS | COUNTS)  # fmt: skip
    yield Entry("posterior.sample", "generator", lambda g: posterior().sample(g), GENERATORS | COUNTS)
    yield Entry("posteriors.sample", "generator", lambda g: items.sample(g), GENERATORS | COUNTS)
    yield Entry("forward", "generator", lambda g: vae()(x, True, generator=g), GENERATORS | COUNTS)
    yield Entry("forward to the mode", "generator", lambda g: vae()(x, generator=g), GENERATORS)
    yield Entry("decode", "generator", lambda g: vae().decode(z, generator=g), GENERATORS)
    for function in (variant_to_config, AutoencoderViTok.from_variant):
        yield Entry(function.__name__, "variant", function, VARIANTS, names=("Variant", "variant "))
    for function in (dit_variant_to_config, ViTokDiTModel.from_variant):
        few = {name: value for name, value in VARIANTS.items() if not isinstance(value, str)} | {"XXL": "XXL", "": ""}
        yield Entry(f"dit {function.__name__}", "variant", function, few, names=("variant ",))
    yield Entry("decode", "sizes", lambda sizes: vae().decode(list(z), sizes=sizes).sample, SIZES)
    yield Entry("pipe", "guidance_interval", lambda value: draw(guidance_interval=value), INTERVALS)
    yield Entry("pipe", "callback_on_step_end", lambda value: draw(callback_on_step_end=value), CALLBACKS)
    yield Entry("pipe", "callback_on_step_end_tensor_inputs",
                lambda value: draw(callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=value),
                NAMES)  # fmt: skip
    yield Entry("pipe", "output_type", lambda value: draw(output_type=value), OUTPUT_TYPES)
    yield Entry("encode_stream", "pieces", lambda value: list(vae().encode_stream(value)), STREAMS)
    of_latents = {name: [t.repeat(1, 2, 1, 1, 1)[:, :4] if isinstance(t, torch.Tensor) and t.shape[1] == 3 else t
                         for t in value] if isinstance(value, list) else value for name, value in STREAMS.items()
                  }  # fmt: skip
    yield Entry("decode_stream", "pieces", lambda value: list(vae().decode_stream(value)), of_latents)
    yield Entry("compute_latent_statistics", "batches", lambda b: compute_latent_statistics(vae(), b), BATCHES,
                names=("channels", "shape"))  # fmt: skip
    yield Entry("compute_latent_statistics", "vae", lambda v: compute_latent_statistics(v, [torch.zeros(1)]), MODELS)
    yield Entry("summarize_latents", "batches", summarize_latents, MOMENTS, names=("latents", "pictures"))
    yield Entry("normalize_latents", "vae", lambda v: normalize_latents(z, v), MODELS)
    yield Entry("encode_mode", "vae", lambda v: encode_mode(v, x), MODELS)
    for name in parts:
        yield Entry("init", name, lambda value, name=name: ViTokDiTPipeline(**parts | {name: value}), MODELS,
                    leaves_out=("None",))  # fmt: skip
    yield Entry("init", "id2label", lambda value: ViTokDiTPipeline(**parts, id2label=value), ID2LABELS,
                names=("class",))  # fmt: skip
    yield Entry("kl", "other", lambda value: posterior().kl(value), OTHERS)


def run_one(entry: Entry, label: str) -> str:
    bad = entry.bad[label]
    bad = bad(entry.good) if entry.good is not None else bad
    try:
        with torch.no_grad():
            result = entry.call(bad)
            if label not in entry.accepts:
                return "silent"
            assert_close(result, entry.call(entry.accepts[label]))
        return "harmless"
    except AssertionError:
        return "silent"
    except Exception as error:
        return judge(error, rf"`{entry.argument}[`\[]", *entry.names)


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    """All of the table, or as many as `count` by chance."""
    table = [
        (f"{entry.name}({entry.argument}={label})", partial(limited, partial(run_one, entry, label)))
        for entry in itertools.chain(tensor_entries(), number_entries(), other_entries())
        for label in entry.bad
        if label not in entry.leaves_out
    ]
    yield from table if count >= len(table) else random.Random(seed).sample(table, count)
