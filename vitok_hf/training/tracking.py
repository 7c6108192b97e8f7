import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image


class Window:
    """Means of the logs, and throughput, since the last line of metrics.jsonl."""

    def __init__(self):
        self.began, self.items, self.pixels, self.logs = time.monotonic(), 0, 0, {}

    def add(self, logs: dict[str, torch.Tensor], items: int, pixels: int) -> None:
        self.items += items
        self.pixels += pixels
        for name, value in logs.items():
            self.logs.setdefault(name, []).append(torch.as_tensor(value).float())

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over the steps and the processes; all processes must call it."""
        seconds = time.monotonic() - self.began
        rates = {
            "items_per_second": self.items * accelerator.num_processes / seconds,
            "megapixels_per_second": self.pixels * accelerator.num_processes / seconds / 1e6,
        }
        means = {
            name: accelerator.reduce(torch.stack(values).mean().to(accelerator.device), "mean").item()
            for name, values in self.logs.items()
        }
        return means | rates


class Log:
    """Writes metrics.jsonl in `output_dir`, and the trackers that the accelerator has; on the main process."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, project: str, settings: dict):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
        # TensorBoard takes plain values only, and a token has no place in a log
        settings = {name: value for name, value in settings.items() if name != "hub_token"}
        plain = {key: x if isinstance(x, int | float | str) else str(x) for key, x in settings.items()}
        accelerator.init_trackers(project, plain)

    def write(self, step: int, values: dict[str, float]) -> None:
        if values and self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    def show(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Saves pictures, (H, W, 3) uint8, as samples/<name>_<step>.png, and gives them to TensorBoard and W&B."""
        if not self.accelerator.is_main_process:
            return
        for name, picture in pictures.items():
            path = self.path.with_name("samples") / f"{name}_{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
        batches = {name: picture[None] for name, picture in pictures.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images(batches, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images(batches, step=step)
