"""The grid of `scaling_study.py`, and its report: a table of results, plots, and straight lines through them."""

import csv
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np


SIZE = 64  # pixels a side
WIDTH, HEADS = 192, 3
SHAPE = ("patch_size", "latent_channels")


Counts = tuple[int, ...] | None


@dataclass(frozen=True)
class Point:
    patch_size: int = 8
    latent_channels: int = 8
    encoder_layers: int = 2
    decoder_layers: int = 4
    mixed_precision: str = "bf16"
    num_latent_tokens: int | None = None
    channel_counts: Counts = None
    token_counts: Counts = None
    passes: int = 1  # of the steps that every other model gets

    @property
    def num_tokens(self) -> int:
        return self.num_latent_tokens or (SIZE // self.patch_size) ** 2

    @property
    def floats(self) -> int:
        """E of the paper: numbers in the code of a picture."""
        return self.num_tokens * self.latent_channels

    @property
    def lengths(self) -> dict[int, dict[str, int]]:
        """E of each length that codes may have -> arguments of the model for it."""
        lengths = {count * self.latent_channels: {"num_tokens": count} for count in self.token_counts or ()}
        lengths |= {count * self.num_tokens: {"num_channels": count} for count in self.channel_counts or ()}
        return lengths or {self.floats: {}}

    @property
    def name(self) -> str:
        parts = [f"p{self.patch_size}-c{self.latent_channels}-{self.encoder_layers}-{self.decoder_layers}"]
        parts += [f"l{self.num_latent_tokens}"] * (self.num_latent_tokens is not None)
        for letter, counts in (("c", self.channel_counts), ("t", self.token_counts)):
            parts += [letter + ".".join(map(str, counts))] if counts else []
        parts += ["fp32"] * (self.mixed_precision != "bf16") + [f"x{self.passes}"] * (self.passes > 1)
        return "-".join(parts)

    def model_config(self) -> dict:
        towers = {}
        for tower, layers in (("encoder", self.encoder_layers), ("decoder", self.decoder_layers)):
            sizes = {"hidden_size": WIDTH, "num_layers": layers, "num_attention_heads": HEADS}
            towers |= {f"{tower}_{name}": value for name, value in sizes.items()}
        codes = {name: getattr(self, name) for name in ("num_latent_tokens", "channel_counts", "token_counts")}
        codes = {name: list(value) if isinstance(value, tuple) else value for name, value in codes.items() if value}
        return towers | codes | {name: getattr(self, name) for name in SHAPE} | {"sample_size": SIZE}


CHANNELS = {16: (2, 4, 8, 16, 32, 64), 8: (2, 4, 8, 16, 32), 4: (1, 2, 4, 8)}  # of each patch size
DEPTHS = (1, 2, 4, 8)
STUDIES = {
    "bottleneck": [Point(patch, channels) for patch, several in CHANNELS.items() for channels in several],
    "encoder": [Point(encoder_layers=layers) for layers in DEPTHS],
    "decoder": [Point(decoder_layers=layers) for layers in DEPTHS],
    "precision": [Point(), Point(mixed_precision="no")],
}

# Codes that can be cut. What they are compared with is trained in float32, too: study -> column of its table -> runs
Simple = partial(Point, mixed_precision="no")
Nested = partial(Simple, 8, 16, channel_counts=(2, 4, 8, 16))
Masked = partial(Simple, token_counts=(16, 32, 64))
CODES = {
    "latent": {
        "grid, fewer channels": [Simple(8, channels) for channels in (2, 4, 8, 16)],
        "grid, larger patches": [Simple(16), Simple()],
        "1-D, fewer tokens": [Simple(num_latent_tokens=tokens) for tokens in (16, 32, 64)],
    },
    "nested": {
        "a model for each": [Simple(8, channels) for channels in (2, 4, 8, 16)],
        "nested, equal steps": [Nested()],
        "nested, equal total": [Nested(passes=4)],
    },
    "masked": {
        "a model for each": [*(Simple(num_latent_tokens=tokens) for tokens in (16, 32)), Simple()],
        "Masked, equal steps": [Masked()],
        "Masked, equal total": [Masked(passes=3)],
        "Mask Latent, equal steps": [Masked(num_latent_tokens=64)],
        "Mask Latent, equal total": [Masked(num_latent_tokens=64, passes=3)],
    },
}
STUDIES |= {study: [point for points in columns.values() for point in points] for study, columns in CODES.items()}

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


def report_codes(study: str, rows: list[dict], output_dir: Path) -> list[str]:
    """A plot of PSNR against E, and lines of a table with a column for each kind of run: means, and gaps to the first.

    Empty if the first kind of run has not been measured.
    """
    from matplotlib.figure import Figure  # of an extra

    found = {
        name: [row for row in rows if row["name"] in {p.name for p in points}] for name, points in CODES[study].items()
    }
    curves = {}
    for column, several in found.items():
        floats = sorted({row["floats"] for row in several})
        curves[column] = {e: np.array([row["psnr"] for row in several if row["floats"] == e]) for e in floats}
    first, *others = curves
    if not curves[first]:
        return []
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for column, curve in curves.items():
        axes.plot([*curve], [values.mean() for values in curve.values()], "o-", label=column)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="E, numbers in the code", ylabel=METRICS["psnr"])
    axes.legend()
    figure.savefig(output_dir / f"{study}.png")
    lines = ["", f"| E | {' | '.join(curves)} |", "|---" * (1 + len(curves)) + "|"]
    for floats in sorted({e for curve in curves.values() for e in curve}):
        cells = [
            f"{curve[floats].mean():.2f} ({np.ptp(curve[floats]):.2f})" if floats in curve else ""
            for curve in curves.values()
        ]
        base = curves[first].get(floats)
        for index, column in enumerate(others, 1):
            if floats in curves[column] and base is not None:
                cells[index] += f" {curves[column][floats].mean() - base.mean():+.2f}"
        lines.append(f"| {floats} | {' | '.join(cells)} |")
    return lines


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
    for study in CODES:
        lines += report_codes(study, rows, output_dir)
    lines += ["", "| run | seeds | E | " + " | ".join(METRICS[name] for name in metrics) + " |"]
    lines.append("|---" * (3 + len(metrics)) + "|")
    for name, floats in dict.fromkeys((row["name"], row["floats"]) for row in rows):
        seeds = [row for row in rows if (row["name"], row["floats"]) == (name, floats)]
        columns = [np.array([row[metric] for row in seeds]) for metric in metrics]
        cells = [f"{values.mean():.3f} ({np.ptp(values):.3f})" for values in columns]
        lines.append(f"| {name} | {len(seeds)} | {floats} | {' | '.join(cells)} |")
    lines += ["", "In brackets: the largest value of a seed minus the smallest.", ""]
    (output_dir / "report.md").write_text("\n".join(lines))
    print("\n".join(lines))
