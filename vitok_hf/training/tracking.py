"""What a run logs: means and throughput since the line before, metrics.jsonl, and the trackers of accelerate."""

import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..disk import atomic_file, decide, naming_full_disks


def finished_time() -> float:
    """The time in seconds at which an accelerator, if there is one, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.monotonic()


class Window:
    """Means of the logs, and throughput, since the last line of metrics.jsonl.

    Throughput is that of training, waiting for data included: what happens in `paused` does not count.
    """

    def __init__(self):
        self.logs: dict[str, list[torch.Tensor]] = {}
        self.start_clock()

    def start_clock(self) -> None:
        """Throughput counts from here on."""
        self.began, self.items, self.pixels = finished_time(), 0, 0

    @contextmanager
    def paused(self):
        """The clock stands still in this block."""
        stopped = finished_time()
        yield
        self.began += finished_time() - stopped

    def add(self, logs: dict[str, torch.Tensor], items: int, pixels: int) -> None:
        self.items += items
        self.pixels += pixels
        for name, value in logs.items():
            self.logs.setdefault(name, []).append(torch.as_tensor(value).float())

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over the steps and the processes; all processes must call it. No throughput where no items were timed."""
        seconds = finished_time() - self.began
        counts = torch.tensor([self.items, self.pixels], dtype=torch.float32, device=accelerator.device)
        items, pixels = accelerator.reduce(counts, "sum").tolist()
        rates = {"items_per_second": items / seconds, "megapixels_per_second": pixels / seconds / 1e6} if items else {}
        means = {
            name: accelerator.reduce(torch.stack(values).mean().to(accelerator.device), "mean").item()
            for name, values in self.logs.items()
        }
        return means | rates


def read_lines(path: Path) -> list[dict]:
    """What the lines hold that are whole and have a step."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            lines.append(content)
    return lines


def drop_lines(path: Path, is_stale: Callable[[dict], bool]) -> None:
    """Rewrites a file of a JSON object a line without the stale ones, and without a last line that was torn off."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if not is_stale(line)]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


class Log:
    """Writes metrics.jsonl in `output_dir`, and the trackers that the accelerator has; on the main process.

    What was logged there of steps after `step`, from which the run goes on, is dropped, and hidden in TensorBoard:
    these steps are made again. In metrics.jsonl, numbers that are not finite are null, as the norm of gradients that
    overflowed.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, project: str, settings: dict, step: int = 0):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            drop_lines(self.path, lambda line: line["step"] > step)
        # TensorBoard takes plain values only, and a token has no place in a log
        settings = {name: value for name, value in settings.items() if name != "hub_token"}
        plain = {key: x if isinstance(x, int | float | str) else str(x) for key, x in settings.items()}
        accelerator.init_trackers(project, plain, {"tensorboard": {"purge_step": step + 1}})

    def write(self, step: int, values: dict[str, float], replace: bool = False) -> None:
        """Adds a line; with `replace`, without those of this step that have one of its names."""
        if values and self.accelerator.is_main_process:
            if replace:
                drop_lines(self.path, lambda line: line["step"] == step and not values.keys().isdisjoint(line))
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with naming_full_disks(self.path), open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
        self.accelerator.log(values, step=step)

    def lacks_evaluation(self, step: int) -> bool:
        """The same answer on every process; lines of training have a learning rate."""
        return decide(
            lambda: not any(line["step"] == step and "learning_rate" not in line for line in read_lines(self.path))
        )

    def show(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Saves pictures, (H, W, 3) uint8, as samples/<name>_<step>.png, and gives them to TensorBoard and W&B."""
        if not self.accelerator.is_main_process:
            return
        for name, picture in pictures.items():
            path = self.path.with_name("samples") / f"{name}_{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as temporary:
                Image.fromarray(picture).save(temporary, "PNG")
        batches = {name: picture[None] for name, picture in pictures.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images(batches, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images(batches, step=step)
