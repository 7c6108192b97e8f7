"""Damaged checkpoints: models in one file and in shards, in the author's layout, and pipelines, own and bundled."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch

from tests.conftest import GOLDEN, make_input, make_vae
from tests.dit import make_pipeline
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline
from vitok_hf.loading import resolve_bundled

from . import Case, judge, limited
from ._damages import ALL_DAMAGES, flip


GOLDEN_VARIANT = json.loads((GOLDEN / "variant.json").read_text())["variant"]
BAD_VALUES = (0, -1, 0.5, -7, 1e30, 10**9, float("nan"), float("inf"), "", "yes", True, None, [], [0.0], {}, [[1]])
# file, shards, pipeline, author's, bundled: how often each is drawn
SOURCES = {"single": 4, "shards": 6, "transformer": 3, "pipeline": 6, "author": 4, "bundled": 1}


def save_all(folder: Path) -> None:
    make_vae("v1").save_pretrained(folder / "single")
    make_vae("everything").save_pretrained(folder / "shards", max_shard_size="40KB")
    make_pipeline().transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    make_pipeline().save_pretrained(folder / "pipeline")
    shutil.copytree(GOLDEN, folder / "author")
    shutil.copytree(resolve_bundled("vitok-dit-emoji"), folder / "bundled")


def load(source: str, folder: Path):
    if source in ("pipeline", "bundled"):
        pipe = ViTokDiTPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    if source == "transformer":
        return ViTokDiTModel.from_pretrained(folder)
    return AutoencoderViTok.from_pretrained(folder, **({"variant": GOLDEN_VARIANT} if source == "author" else {}))


@torch.no_grad()
def use(loaded) -> dict[str, torch.Tensor]:
    """What a user gets of it, and all that it holds."""
    if isinstance(loaded, ViTokDiTPipeline):
        options = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False}
        (latents,) = loaded([0, 1], generator=torch.Generator().manual_seed(0), **options)
        outputs = {"latents": latents, "pixels": loaded._decode(latents, "pt")}
        modules, configs = (loaded.vae, loaded.transformer), (loaded.vae, loaded.transformer, loaded.scheduler, loaded)
    elif isinstance(loaded, ViTokDiTModel):
        inputs = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        outputs = {"sample": loaded(inputs, 500, torch.tensor([0, 1])).sample}
        modules = configs = (loaded,)
    else:
        outputs = {"sample": loaded(make_input(loaded)).sample}
        modules = configs = (loaded,)
    settings = [{k: v for k, v in part.config.items() if not k.startswith("_")} for part in configs]
    weights = {f"{i} {name}": weight for i, m in enumerate(modules) for name, weight in m.state_dict().items()}
    return outputs | weights | {"settings": json.dumps(settings, sort_keys=True, default=str)}


@cache
def undamaged(source: str, folder: Path) -> dict:
    return use(load(source, folder))


def read_parts(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_parts(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def damage_header(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        return flip(path, rng, 8 + size)
    header, data = read_parts(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.choice(["dtype", "shape", "name", "drop", "offsets"])
    if kind == "dtype":
        header[name]["dtype"] = rng.choice(["U32", "I32", "I8", "BOOL", "C64", "F64", "BF16", "F31", 7])
    elif kind == "shape":
        header[name]["shape"] = rng.choice([header[name]["shape"][::-1], [-1], [0], [10**12], "3", []])
    elif kind == "name":
        header[name[:-1] + chr(ord(name[-1]) ^ 1)] = header.pop(name)
    elif kind == "drop":
        del header[name]
    else:
        header[name]["data_offsets"] = [rng.randrange(len(data)) for _ in range(2)]
    write_parts(path, header, data)


def damage_values(path: Path, rng: random.Random) -> None:
    header, data = read_parts(path)
    data = bytearray(data)
    if rng.random() < 0.5:
        place = rng.randrange(0, len(data) - 4, 4)
        data[place : place + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf")]))
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    write_parts(path, header, bytes(data))


def damage_json(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.25:
        texts = ["", "{", "[]", "7", "null", "\xff", "[" * 100_000, path.read_text()[: rng.randrange(1, 40)]]
        return path.write_bytes(rng.choice(texts).encode("latin-1")) and None
    content = json.loads(path.read_text())
    place = content
    if isinstance(inner := content.get(rng.choice([*content])), dict) and inner:  # of an index, or id2label
        place = inner
    key = rng.choice([*place])
    kind = rng.random()
    if kind < 0.7:
        place[key] = rng.choice([*BAD_VALUES, "../../x", [rng.choice(BAD_VALUES)] * 4])
    elif kind < 0.85:
        place[key[:-1] + chr(ord(key[-1]) ^ 1)] = place.pop(key)
    else:
        del place[key]
    path.write_text(json.dumps(content))


def damage(folder: Path, rng: random.Random) -> tuple[Path, Callable]:
    """Damages a file, and says which and how."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    weights = [path for path in files if path.suffix == ".safetensors"]
    any_damage = rng.choice(ALL_DAMAGES)
    if rng.random() < 0.35 or len(files) == len(weights):
        path, how = rng.choice(weights), rng.choice([damage_header, damage_header, damage_values, any_damage])
    else:
        path = rng.choice([path for path in files if path not in weights])
        how = rng.choice([damage_json, damage_json, damage_json, any_damage])
    content = path.read_bytes()
    path.unlink()  # it is a hard link
    path.write_bytes(content)
    how(path, rng)
    return path, how


def run_case(source: str, original: Path, copy: Path, path: Path) -> str:
    try:
        loaded = load(source, copy)
    except Exception as error:
        outcome = judge(error, path.name, str(copy))
        if outcome == "unclear":
            print(f"{path.relative_to(copy)}: {type(error).__name__}: {str(error)[:300]}")
        return outcome
    try:
        found, expected = use(loaded), undamaged(source, original)
    except Exception as error:
        print(f"late, {path.relative_to(copy)}: {type(error).__name__}: {str(error)[:300]}")
        return "late"
    if any(not torch.isfinite(x).all() for x in found.values() if isinstance(x, torch.Tensor)):
        return "silent"
    same = found.keys() == expected.keys() and all(
        torch.equal(x, expected[k]) if isinstance(x, torch.Tensor) else x == expected[k] for k, x in found.items()
    )
    if not same and path.suffix == ".safetensors":  # a few bits of values are all that may differ
        weights = [name for name in expected if name[0].isdigit()]
        changed = sum(int((found[name] != expected[name]).sum()) for name in weights)
        return "unseen" if found.keys() == expected.keys() and changed <= 64 else "silent"
    return "harmless" if same else "unseen"


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    save_all(folder)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        source = rng.choices([*SOURCES], [*SOURCES.values()])[0]
        copy = folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / source, copy, copy_function=os.link)
        path, how = damage(copy, rng)
        name = f"{number}, {source}, {how.__name__} of {path.relative_to(copy)}"
        yield name, partial(limited, partial(run_case, source, folder / source, copy, path))
