"""Draws curves of one or several runs' metrics.jsonl, of the keys that are asked for.

    python examples/plot_metrics.py --metrics output/metrics.jsonl --keys loss test_ema_loss --output loss.png

`NAME=FILE` in --metrics puts the name before the keys of that file in the legend.
"""

import json
from pathlib import Path

import numpy as np

from vitok_hf.commands import make_parser, run_command


def read_curves(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """(N, 2) steps and values of each key that the file has. Raises `ValueError` if it has none of them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {key: [line for line in lines if line.get(key) is not None] for key in keys}  # null: not finite
    curves = {key: np.array([(line["step"], line[key]) for line in found[key]]) for key in keys}
    curves = {key: curve for key, curve in curves.items() if len(curve)}
    if not curves:
        known = sorted({key for line in lines for key in line} - {"step"})
        raise ValueError(f'`keys` {keys} are not in "{path}", which has {", ".join(known)}.')
    return curves


def main():
    parser = make_parser("plot_metrics.py", __doc__)
    parser.add_argument("--metrics", nargs="+", required=True, help="FILE or NAME=FILE")
    parser.add_argument("--keys", nargs="+", default=["loss"])
    parser.add_argument("--logarithmic", action="store_true", help="logarithmic values")
    parser.add_argument("--output", type=Path, default=Path("metrics.png"))
    args = parser.parse_args()
    from matplotlib.figure import Figure  # of an extra

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for source in args.metrics:
        whole = "=" not in source or Path(source).exists()
        name, path = ("", source) if whole else source.split("=", 1)
        for key, curve in read_curves(Path(path), args.keys).items():
            marker = "." if len(curve) < 30 else None
            axes.plot(curve[:, 0], curve[:, 1], marker=marker, label=f"{name} {key}".strip())
    axes.set(xlabel="step", yscale="log" if args.logarithmic else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    print(f"Saved {args.output}")


if __name__ == "__main__":
    run_command(main)
