"""The grid of `scaling_study.py`, and its report: a table of results, plots, and straight lines through them."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np


SIZE = 64  # pixels a side
WIDTH, HEADS = 192, 3


@dataclass(frozen=True)
class Point:
    patch_size: int = 8
    latent_channels: int = 8
    encoder_layers: int = 2
    decoder_layers: int = 4
    mixed_precision: str = "bf16"

    @property
    def floats(self) -> int:
        """E of the paper: numbers in the code of a picture."""
        return (SIZE // self.patch_size) ** 2 * self.latent_channels

    @property
    def name(self) -> str:
        precision = "" if self.mixed_precision == "bf16" else "-fp32"
        return f"p{self.patch_size}-c{self.latent_channels}-{self.encoder_layers}-{self.decoder_layers}{precision}"

    def model_config(self) -> dict:
        towers = {}
        for tower, layers in (("encoder", self.encoder_layers), ("decoder", self.decoder_layers)):
            sizes = {"hidden_size": WIDTH, "num_layers": layers, "num_attention_heads": HEADS}
            towers |= {f"{tower}_{name}": value for name, value in sizes.items()}
        return towers | {"patch_size": self.patch_size, "latent_channels": self.latent_channels, "sample_size": SIZE}


CHANNELS = {16: (2, 4, 8, 16, 32, 64), 8: (2, 4, 8, 16, 32), 4: (1, 2, 4, 8)}  # of each patch size
DEPTHS = (1, 2, 4, 8)
STUDIES = {
    "bottleneck": [Point(patch, channels) for patch, several in CHANNELS.items() for channels in several],
    "encoder": [Point(encoder_layers=layers) for layers in DEPTHS],
    "decoder": [Point(decoder_layers=layers) for layers in DEPTHS],
    "precision": [Point(), Point(mixed_precision="no")],
}
COLUMNS = {"bottleneck": "floats", "encoder": "encoder_parameters", "decoder": "decoder_parameters"}
METRICS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "frechet_distance": "Frechet distance",
    "log2_frechet_distance": "log2 of Frechet distance",
}


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Coefficient of determination of the straight line through (N,) points; NaN if all `y` are equal."""
    return np.corrcoef(x, y)[0, 1] ** 2 if np.ptp(y) else math.nan


def report_study(study: str, rows: list[dict], metrics: list[str], output_dir: Path) -> list[str]:
    """A plot of each metric, points by patch size over a line against the logarithm; lines of a table with the R2."""
    from matplotlib.figure import Figure  # of an extra

    names = {point.name for point in STUDIES[study]}
    rows = [row for row in rows if row["name"] in names]
    x = np.log2([row[COLUMNS[study]] for row in rows])
    if len(np.unique(x)) < 3:
        return []
    y = {name: np.array([row[name] for row in rows]) for name in metrics}
    groups = np.array([f"patch size {row['patch_size']}" for row in rows])
    subsets = {study: np.full(len(x), True)}
    if len(np.unique(groups)) > 1:
        subsets |= {f"{study}, {group}": groups == group for group in dict.fromkeys(groups)}

    figure = Figure(figsize=(4 * len(metrics), 3.5), dpi=100, layout="constrained")
    for name, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0]):
        for group in dict.fromkeys(groups):
            axes.plot(2 ** x[groups == group], y[name][groups == group], "o", label=group, alpha=0.7)
        line = np.array([x.min(), x.max()])
        axes.plot(2**line, np.polyval(np.polyfit(x, y[name], 1), line), color="grey", linewidth=1)
        axes.set_xscale("log", base=2)
        title = f"R2 = {r_squared(x, y[name]):.2f}"
        axes.set(xlabel=COLUMNS[study].replace("_", " "), ylabel=METRICS[name], title=title)
    axes.legend()
    figure.savefig(output_dir / f"{study}.png")
    return [
        f"| {subset} | {mask.sum()} | {' | '.join(f'{r_squared(x[mask], y[name][mask]):.3f}' for name in metrics)} |"
        for subset, mask in subsets.items()
        if len(np.unique(x[mask])) > 2
    ]


def report(rows: list[dict], output_dir: Path) -> None:
    """results.csv, plots and report.md of all that there is."""
    with open(output_dir / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    metrics = [name for name in METRICS if name in rows[0]]
    lines = ["| study | runs | " + " | ".join(f"R2, {METRICS[name]}" for name in metrics) + " |"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for study in COLUMNS:
        lines += report_study(study, rows, metrics, output_dir)
    lines += ["", "| run | seeds | E | " + " | ".join(METRICS[name] for name in metrics) + " |"]
    lines.append("|---" * (3 + len(metrics)) + "|")
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = [row for row in rows if row["name"] == name]
        columns = [np.array([row[metric] for row in seeds]) for metric in metrics]
        cells = [f"{values.mean():.3f} ({np.ptp(values):.3f})" for values in columns]
        lines.append(f"| {name} | {len(seeds)} | {seeds[0]['floats']} | {' | '.join(cells)} |")
    lines += ["", "In brackets: the largest value of a seed minus the smallest.", ""]
    (output_dir / "report.md").write_text("\n".join(lines))
    print("\n".join(lines))
