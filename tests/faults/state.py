"""Damaged checkpoints, caches and settings, full disks, killed runs, and two runs in one folder."""

import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch

from tests.conftest import ASSETS, make_vae
from tests.data.conftest import write_noise
from tests.training.conftest import make_arguments, run
from tests.training.test_arguments import SOURCES, bad_values
from vitok_hf import disk
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.latent_cache import LatentCache, write_latents
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer

from . import Case, judge
from ._damages import DAMAGES, flip


WORKER = Path(__file__).parents[1] / "training" / "worker.py"


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """What the package warns of in this block."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("vitok_hf").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("vitok_hf").removeHandler(handler)


class Runs:
    """A tiny run of 6 steps with checkpoints after 2, 4 and 6, and its copies up to step 4."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True)
        self.weights = self.state(run(self.arguments(output_dir=str(folder / "whole"))))
        shutil.copytree(folder / "whole", folder / "template")
        for name in ("checkpoint-6", "vae"):
            shutil.rmtree(folder / "template" / name)

    def arguments(self, **overrides):
        defaults = {"checkpointing_steps": 2, "use_ema": True, "crop_sizes": ["16"], "train_batch_size": 4}
        data = {"validation_data_dir": [str(ASSETS)], "validation_resolution": 16, "num_validation_images": 1}
        return make_arguments(self.folder, **defaults | data | {"validation_steps": 2} | overrides)

    def state(self, trainer: AutoencoderTrainer) -> list[torch.Tensor]:
        return [x.detach().clone() for x in (*trainer.vae.parameters(), *trainer.average.shadow_params)]

    def copy(self) -> Path:
        self.count += 1
        shutil.copytree(self.folder / "template", self.folder / str(self.count))
        return self.folder / str(self.count)

    def resume(self, output_dir: Path, name: str, *names: str, newest: int = 4) -> str:
        """Goes on to the end: what becomes of it, after a fault that an error should name by one of `names`."""
        checkpoint = str(output_dir / f"checkpoint-{newest}") if name == "explicit" else name
        with recorded_warnings() as messages:
            try:
                trainer = run(self.arguments(output_dir=str(output_dir), resume_from_checkpoint=checkpoint))
            except Exception as error:
                return judge(error, *names)
        said = trainer.checkpoint.name == f"checkpoint-{newest}" or any("damaged" in text for text in messages)
        same = all(map(torch.equal, self.state(trainer), self.weights))
        shutil.rmtree(output_dir)
        return "harmless" if same and said else "silent"


def checkpoint_cases(runs: Runs, rng: random.Random) -> list[Case]:
    template = runs.folder / "template" / "checkpoint-4"
    files = sorted(path.relative_to(template) for path in template.rglob("*") if path.is_file())
    files += [Path("..", name) for name in ("made_from.json", "metrics.jsonl", ".lock")]

    def damaged(file: Path, damage: Callable, name: str, both: bool) -> str:
        output_dir = runs.copy()
        for step in (2, 4) if both and file.parts[0] != ".." else (4,):
            damage(output_dir / f"checkpoint-{step}" / file, rng)
        return runs.resume(output_dir, name, str(file).removeprefix("../"))

    return [
        (f"{damage.__name__} {file}, {name}{' of both' * both}", partial(damaged, file, damage, name, both))
        for file in files
        for damage in DAMAGES
        for name, both in (("explicit", False), ("latest", False), ("latest", True))
    ]


def setting_cases() -> list[Case]:
    def make(kind: type, name: str, value: object) -> str:
        try:
            kind(**SOURCES[kind] | {name: value})
        except Exception as error:
            return judge(error, f"`{name}`")
        return "silent"

    return [
        (f"{name} {value!r}", partial(make, kind, name, value))
        for kind in SOURCES
        for name, setting in kind.__dataclass_fields__.items()
        for value in bad_values(setting, get_type_hints(kind)[name])
    ]


def reorder_classes(path: Path, rng: random.Random) -> None:
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"classes": index["classes"][::-1]}))


def write_cache(folder: Path, **options: Any) -> None:
    """Pictures of two classes in `folder`/data, and their latents in `folder`/cache."""
    for name in ("cat", "dog"):
        write_noise(folder / "data" / name, 3)
    write_latents(make_vae("v1"), "tiny", LabelledFiles([folder / "data"]), folder / "cache", 16, **options)


def cache_cases(folder: Path, rng: random.Random) -> list[Case]:
    write_cache(folder, shard_size=3)
    whole = LatentCache(folder / "cache")
    files = sorted(path.name for path in (folder / "cache").iterdir())

    def damaged(number: int, file: str, damage: Callable) -> str:
        copy = folder / str(number)
        shutil.copytree(folder / "cache", copy)
        damage(copy / file, rng)
        try:
            cache = LatentCache(copy)
            same = cache.classes == whole.classes and cache.labels.tolist() == whole.labels.tolist()
            same = same and all(torch.equal(cache[i], whole[i]) for i in range(len(whole)))
        except Exception as error:
            return judge(error, file)
        return "harmless" if same else "silent"

    chosen = [(file, damage) for file in files for damage in DAMAGES for _ in range(5 if damage is flip else 1)]
    chosen.append(("index.json", reorder_classes))
    return [
        (f"{damage.__name__} {file} of a cache", partial(damaged, number, file, damage))
        for number, (file, damage) in enumerate(chosen)
    ]


@contextmanager
def file_size_limit(size: int):
    """No file can grow beyond it, whoever writes: what a full disk is to libraries."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def disk_cases(runs: Runs, rng: random.Random) -> list[Case]:
    def full(size: int) -> str:
        output_dir = runs.copy()
        trainer = AutoencoderTrainer(runs.arguments(output_dir=str(output_dir), resume_from_checkpoint="latest"))
        try:
            with redirect_stderr(io.StringIO()), file_size_limit(size):  # the log may be a file
                trainer.train()
        except Exception as error:
            outcome = judge(error, f"No space left on the disk.*{output_dir}")
            resumed = runs.resume(output_dir, "latest")
            return outcome if resumed == "harmless" else resumed
        return "harmless"

    sizes = sorted({path.stat().st_size for path in (runs.folder / "template").rglob("*") if path.is_file()})
    sizes = [0, 100, *(size + part for size in sizes for part in (-1, -(size // 2)))]
    return [(f"disk full after {size} bytes", partial(full, size)) for size in sizes]


@contextmanager
def held_lock(folder: Path) -> Iterator[int]:
    """Another process has locked a folder in this block; it is then killed. Yields its number."""
    end, begin = os.pipe()
    child = os.fork()
    if not child:  # without any computation, which might hang in a fork
        disk._lock(folder, take_over=False)
        os.write(begin, b"x")
        signal.pause()
    os.read(end, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def lock_cases(runs: Runs, cache_folder: Path) -> list[Case]:
    def beside(kind: str) -> str:
        output_dir = cache_folder / "cache" if kind == "cache" else runs.copy()
        if lock := disk._locks.get(str(output_dir.resolve())):
            lock.release()
        with held_lock(output_dir) as child:
            try:
                if kind == "cache":
                    write_latents(make_vae("v1"), "tiny", LabelledFiles([cache_folder / "data"]), output_dir, 16)
                else:
                    AutoencoderTrainer(runs.arguments(output_dir=str(output_dir), resume_from_checkpoint=kind))
            except Exception as error:
                return judge(error, f'"{output_dir}" is in use by process {child} on ')
        return "silent"

    return [(f"two runs, {kind}", partial(beside, kind)) for kind in (None, "latest", "cache")]


def kill_cases(runs: Runs, rng: random.Random) -> list[Case]:
    def killed(extra: dict) -> str:
        output_dir = runs.folder / f"killed-{'-'.join(map(str, extra))}-{rng.random()}"
        settings = vars(runs.arguments(output_dir=str(output_dir)))
        path = Path(f"{output_dir}.json")
        path.write_text(json.dumps(settings | extra))
        environment = os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "ACCELERATE_USE_CPU": "true"}
        subprocess.run([sys.executable, str(WORKER), str(path)], env=environment, capture_output=True)
        step = max((int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")), default=None)
        if step is None:
            return "harmless"
        return runs.resume(output_dir, "latest", newest=step)

    extras = [{"kill": (0, step)} for step in (3, 4, 5)] + [{"kill_saving": step} for step in (4, 6)]
    return [(f"killed, {extra}", partial(killed, extra)) for extra in extras]


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    rng, runs = random.Random(seed), Runs(folder / "runs")
    groups = [checkpoint_cases(runs, rng), disk_cases(runs, rng), cache_cases(folder / "caches", rng)]
    groups += [setting_cases(), lock_cases(runs, folder / "caches"), kill_cases(runs, rng) if count >= 200 else []]
    share = max(2, count // len(groups))
    for group in groups:
        yield from rng.sample(group, min(share, len(group)))
