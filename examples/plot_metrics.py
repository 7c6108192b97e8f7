"""Draws curves of one or several runs' metrics.jsonl, of the keys that are asked for.

    python examples/plot_metrics.py --metrics output/metrics.jsonl --keys loss test_ema_loss --output loss.png

`NAME=FILE` in --metrics puts the name before the keys of that file in the legend.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"]
SIZE, MARGIN = (800, 400), (60, 16, 20, 40)  # pixels; left, top, right, bottom
NUM_TICKS = 5
SCALE = 2  # lines are drawn so much larger and scaled down, against steps


def read_curves(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """(N, 2) steps and values of each key that the file has. Raises `ValueError` if it has none of them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    curves = {key: np.array([(line["step"], line[key]) for line in lines if key in line]) for key in keys}
    curves = {key: curve for key, curve in curves.items() if len(curve)}
    if not curves:
        known = sorted({key for line in lines for key in line} - {"step"})
        raise ValueError(f'`keys` {keys} are not in "{path}", which has {", ".join(known)}.')
    return curves


def draw(curves: dict[str, np.ndarray], logarithmic: bool = False) -> Image.Image:
    """A plot of the curves over their steps, with a legend."""
    points = np.concatenate(list(curves.values()))
    if logarithmic and points[:, 1].min() <= 0:
        raise ValueError(f"A logarithmic axis needs positive values, but one is {points[:, 1].min()}.")
    scale = np.log if logarithmic else np.asarray
    low, high = scale(points[:, 1].min()), scale(points[:, 1].max())
    high = high if high > low else low + 1.0
    left, top, right, bottom = (side * SCALE for side in MARGIN)
    width, height = SIZE[0] * SCALE - left - right, SIZE[1] * SCALE - top - bottom
    image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size=13 * SCALE)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + width * step / points[:, 0].max(), top + height * (high - value) / (high - low)

    for fraction in np.linspace(0.0, 1.0, NUM_TICKS):
        step, value = fraction * points[:, 0].max(), low + fraction * (high - low)
        (x, y), label = place(step, value), np.exp(value) if logarithmic else value
        canvas.line([(left, y), (left + width, y)], fill="#dddddd", width=SCALE)
        canvas.text((left - 6 * SCALE, y), f"{label:.3g}", "black", font, anchor="rm")
        canvas.text((x, top + height + 6 * SCALE), f"{step:.0f}", "black", font, anchor="mt")
    canvas.text((left + width / 2, SIZE[1] * SCALE - 4 * SCALE), "step", "black", font, anchor="mb")
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = [place(step, value) for step, value in zip(curve[:, 0], scale(curve[:, 1]))]
        canvas.line(path, fill=colour, width=2 * SCALE, joint="curve")
        if len(path) < 30:
            for x, y in path:
                canvas.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], fill=colour)
        canvas.text((left + width - 4 * SCALE, top + 16 * SCALE * index), name, colour, font, anchor="rt")
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", nargs="+", required=True, help="FILE or NAME=FILE")
    parser.add_argument("--keys", nargs="+", default=["loss"])
    parser.add_argument("--logarithmic", action="store_true", help="logarithmic values")
    parser.add_argument("--output", type=Path, default=Path("metrics.png"))
    args = parser.parse_args()

    curves = {}
    for source in args.metrics:
        name, _, path = source.rpartition("=")
        found = read_curves(Path(path), args.keys)
        curves |= {f"{name} {key}".strip(): curve for key, curve in found.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, args.logarithmic).save(args.output, optimize=True)
    print(f"Saved {args.output}")


if __name__ == "__main__":
    main()
