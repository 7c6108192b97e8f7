"""Programs planted in files that are downloaded and shared, and names that lead out of a folder: none may be run."""

import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from examples.studies.samples import save_samples
from tests.conftest import make_vae
from tests.dit import make_pipeline
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline
from vitok_hf.data.latent_cache import LatentCache
from vitok_hf.disk import seal
from vitok_hf.evaluation.features import Classifier
from vitok_hf.training.checkpointing import MANIFEST, write_manifest

from . import Case, judge
from .state import Runs, write_cache


class Planted:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker, 0o777, True)


def plain(marker: Path) -> bytes:
    return pickle.dumps(Planted(marker))


def in_a_dictionary(marker: Path) -> bytes:
    return pickle.dumps({"step": 0, "shadow_params": [Planted(marker)], "state": Planted(marker)}, protocol=2)


def saved(marker: Path, zipped: bool = True) -> bytes:
    path = marker.with_suffix(".pt")
    torch.save({"state": {0: Planted(marker)}, "param_groups": []}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.unlink()
    return content


def saved_as_before(marker: Path) -> bytes:
    return saved(marker, zipped=False)


FORMS = (plain, in_a_dictionary, saved, saved_as_before)
# Besides those of a checkpoint, names that accelerate and PyTorch read, or did in some version.
NAMES = [f"state/{name}" for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "random_0.pkl", "scaler.pt")]
NAMES += [f"state/{name}" for name in ("scheduler.bin", "sampler.bin", "dl_state_dict.bin", "pytorch_model.bin")]
NAMES += [f"state/{name}" for name in ("optimizer.pt", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata")]
NAMES += ["state/pytorch_model_fsdp_0/__0_0.distcp", "state/average.bin", "vae/diffusion_pytorch_model.bin"]


def watched(folder: Path, marker: Path, act: Callable[[], object], *names: str) -> str:
    """What becomes of an act: nothing but an error or, if it returns the right thing, nothing at all."""
    try:
        right = act()
        outcome = "silent" if right is False else "harmless"
    except Exception as error:
        outcome = judge(error, *names, str(folder))
    return "executed" if marker.exists() else outcome


def resume_cases(runs: Runs) -> list[Case]:
    template = runs.folder / "template" / "checkpoint-4"
    files = [str(path.relative_to(template)) for path in template.rglob("*") if path.is_file()]

    def resume(name: str, form: Callable, rewritten: bool, alone: bool) -> str:
        output_dir = runs.copy()
        checkpoint, marker = output_dir / "checkpoint-4", runs.folder / f"marker-{runs.count}"
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(form(marker))
        if alone:  # in place of the safe file
            (checkpoint / "state" / "model.safetensors").unlink()
        if rewritten:
            (checkpoint / MANIFEST).unlink()
            write_manifest(checkpoint)
        outcome = runs.resume(output_dir, "explicit", name)
        return "executed" if marker.exists() else outcome

    return [
        (f"{form.__name__} as {name}{', in the manifest' * rewritten}", partial(resume, name, form, rewritten, alone))
        for name in [*files, *NAMES]
        for form in FORMS
        for rewritten, alone in ((False, False), (True, False), *([(True, True)] * (name == NAMES[7])))
    ]


def load_pipeline(folder: Path) -> None:
    """Also as diffusers does it, whose messages are not ours."""
    with suppress(Exception):
        DiffusionPipeline.from_pretrained(folder)
    ViTokDiTPipeline.from_pretrained(folder)


LOADERS = {
    "vae": AutoencoderViTok.from_pretrained,
    "transformer": ViTokDiTModel.from_pretrained,
    "pipeline": load_pipeline,
    "classifier": lambda path: Classifier.load(path / "classifier.safetensors"),
    "cache": LatentCache,
}


class Saved:
    """One of each that is loaded, in a folder, and copies in which something is planted."""

    def __init__(self, folder: Path):
        self.folder, self.numbers, pipe = folder, itertools.count(), make_pipeline()
        write_cache(folder)
        make_vae("v1").save_pretrained(folder / "vae")
        pipe.transformer.save_pretrained(folder / "transformer")
        pipe.save_pretrained(folder / "pipeline")
        (folder / "classifier").mkdir()
        Classifier(["cat", "dog"]).save(folder / "classifier" / "classifier.safetensors")

    def load(self, kind: str, plant: Callable[[Path, Path], None], *names: str) -> str:
        """What becomes of loading a copy after `plant(copy, marker)`."""
        number = next(self.numbers)
        copy, marker = self.folder / f"copy-{number}", self.folder / f"marker-{number}"
        shutil.copytree(self.folder / kind, copy)
        plant(copy, marker)
        return watched(copy, marker, lambda: LOADERS[kind](copy), *names)


def load_cases(saved: Saved) -> list[Case]:
    def load(kind: str, name: str, form: Callable, alone: bool) -> str:
        def plant(copy: Path, marker: Path) -> None:
            (copy / name).write_bytes(form(marker))
            for path in copy.rglob("diffusion_pytorch_model.safetensors") if alone else ():
                path.unlink()

        return saved.load(kind, plant, name)

    found = []
    for kind in LOADERS:
        paths = [path for path in (saved.folder / kind).rglob("*") if path.is_file()]
        names = [str(path.relative_to(saved.folder / kind)) for path in paths]
        names = [(name, False) for name in names if name not in (".lock", "made_from.json")]
        weights = [name for name, _ in names if name.endswith("diffusion_pytorch_model.safetensors")]
        names += [(name.replace(".safetensors", ".bin"), True) for name in weights]
        found += [(kind, name, form, alone) for name, alone in names for form in FORMS]
    return [(f"{case[2].__name__} as {case[1]} of a {case[0]}", partial(load, *case)) for case in found]


def foreign_class_cases(saved: Saved) -> list[Case]:
    """Classes and modules that JSON files name; the marker is what they would make."""
    program = "import os\nos.makedirs({marker!r}, exist_ok=True)\nclass Planted:\n    pass\n"

    def load(kind: str, name: str, changes: dict) -> str:
        def plant(copy: Path, marker: Path) -> None:
            for path in (copy / "planted.py", copy / "pipeline.py", copy / "vae" / "planted.py"):
                if path.parent.is_dir():
                    path.write_text(program.format(marker=str(marker)))
            (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | changes))

        return saved.load(kind, plant, name, *changes, "function (system|exec)")

    model = [{"_class_name": "Planted"}, {"_class_name": ["planted", "X"]}]
    model += [{"auto_map": {"AutoModel": "planted.Planted"}}]
    found = [(kind, "config.json", change) for kind in ("vae", "transformer") for change in model]
    parts = [{"vae": ["planted", "Planted"]}, {"vae": ["os", "system"]}, {"_class_name": ["pipeline", "Planted"]}]
    parts += [{"extra": ["planted", "Planted"]}, {"_class_name": "Planted"}, {"scheduler": ["builtins", "exec"]}]
    found += [("pipeline", "model_index.json", change) for change in parts]
    found += [("pipeline", "vae/config.json", change) for change in model]
    return [(f"{change} in {name} of a {kind}", partial(load, kind, name, change)) for kind, name, change in found]


def path_cases(saved: Saved) -> list[Case]:
    """Names that lead out: of classes, and of the shards of a cache."""
    pipe, folder = make_pipeline(), saved.folder
    outside = folder / "outside"

    def write(label: str) -> str:
        pipe.register_to_config(id2label={0: label})
        samples = folder / "samples" / "deep"
        return watched(folder, outside, lambda: save_samples(pipe, [0], samples, num_inference_steps=1), "leads out")

    def read(name: str) -> str:
        def plant(copy: Path, marker: Path) -> None:
            shutil.copy(copy / "latents-00000.safetensors", folder / "foreign.safetensors")
            index = json.loads((copy / "index.json").read_text())
            index["shards"]["0"]["file"] = name
            (copy / "index.json").write_text(json.dumps(seal(index)))

        outcome = saved.load("cache", plant, "leads out")
        return "silent" if outcome == "harmless" else outcome

    labels = ["../../outside", str(outside), "a/../../../outside", "../../outside/a/.."]
    shards = ["../foreign.safetensors", str(folder / "foreign.safetensors"), "a/../../foreign.safetensors"]
    found = [(f"class {label}", partial(write, label)) for label in labels]
    return found + [(f"shard {name}", partial(read, name)) for name in shards]


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    rng, saved = random.Random(seed), Saved(folder / "models")
    groups = [resume_cases(Runs(folder / "runs")), load_cases(saved), foreign_class_cases(saved), path_cases(saved)]
    share = max(2, count // len(groups))
    for group in groups:
        yield from rng.sample(group, min(share, len(group)))
