r"""Codes of every length: pictures, and what a length for each picture saves.

    python examples/evaluate_rates.py --model my-dial --data_dir data/test/film data/test/photos data/test/emoji \
        --min_psnr 26 28 30 32 --output_dir rates

Prints, for each `--min_psnr`, the mean of the shortest lengths that reach it, which `encode(min_psnr=...)` takes where
PSNR rises with the length; the share of the pictures that reach it; the PSNR of the mean squared error over them all;
and the length, the same for all, that has the same error: it lies on straight lines between the model's lengths
(error in decibels against their logarithm). Saves histograms.png of the lengths; and pictures with reconstructions,
from the shortest code to the longest: samples.png, some of each folder, and extremes.png, the three easiest and the
three hardest of all.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import add_dtype, make_parser, run_command
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.media import evenly_spaced
from vitok_hf.evaluation.metrics import frame_values, psnr
from vitok_hf.evaluation.reconstruction import reconstruct, side_by_side
from vitok_hf.precision import choose_dtype


def choose(psnrs: np.ndarray, min_psnr: float) -> np.ndarray:
    """(N,) of (N, lengths): the place of the first length that reaches it, else of the last."""
    reached = psnrs >= min_psnr
    return np.where(reached.any(axis=1), reached.argmax(axis=1), psnrs.shape[1] - 1)


def pooled(psnrs: np.ndarray) -> np.ndarray:
    """PSNR of the mean squared error of (N, ...) pictures."""
    return -10 * np.log10(np.mean(10 ** (-psnrs / 10), axis=0))


def compare(psnrs: np.ndarray, lengths: list[int], min_psnr: float) -> dict[str, float]:
    """Lengths that are chosen, and the length, the same for all pictures, with an equal error."""
    places = choose(psnrs, min_psnr)
    chosen = psnrs[np.arange(len(psnrs)), places]
    mean, error = np.take(lengths, places).mean(), pooled(chosen)
    equal = 2 ** np.interp(error, pooled(psnrs), np.log2(lengths))
    saved = 1 - mean / equal
    return {"mean length": mean, "reached": np.mean(chosen >= min_psnr), "PSNR": error, "equal": equal, "saved": saved}


def plot(psnrs: np.ndarray, lengths: list[int], limits: list[float], path: Path) -> None:
    from matplotlib.figure import Figure  # of an extra

    figure = Figure(figsize=(3 * len(limits), 2.5), dpi=100, layout="constrained")
    for limit, axes in zip(limits, figure.subplots(1, len(limits), squeeze=False, sharey=True)[0]):
        counts = np.bincount(choose(psnrs, limit), minlength=len(lengths))
        axes.bar([str(length) for length in lengths], counts)
        axes.set(title=f"{limit:g} dB", xlabel="length")
    figure.savefig(path)


def main():
    parser = make_parser("evaluate_rates.py", __doc__)
    parser.add_argument("--model", required=True, help="what `from_pretrained` takes, with channel or token counts")
    parser.add_argument("--data_dir", nargs="+", required=True, help="folders of held-out pictures")
    parser.add_argument("--min_psnr", nargs="+", type=float, default=[26.0, 28.0, 30.0, 32.0], help="in decibels")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--limit", type=int, default=100, help="pictures a folder")
    add_dtype(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("rates"))
    args = parser.parse_args()
    if args.limit < 1 or not np.isfinite(args.min_psnr).all():
        parser.error(f"--limit must be at least 1, but is {args.limit}, and --min_psnr finite: {args.min_psnr}")

    dtype = getattr(torch, choose_dtype(args.dtype))
    vae = AutoencoderViTok.from_pretrained(args.model, dtype=dtype).to(PartialState().default_device)
    counts, size = vae.config.token_counts or vae.config.channel_counts, (args.resolution, args.resolution)
    if not counts:
        parser.error(f"{args.model} has codes of one length: its config has neither channel_counts nor token_counts")
    name, whole = "num_channels", vae.config.latent_channels
    if vae.config.token_counts:
        name, whole = "num_tokens", vae.count_tokens(size)
    lengths = [count for count in counts if count < whole] + [whole]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print("| data | min_psnr | mean length | reached | PSNR | equal length | saved |\n|---|---|---|---|---|---|---|")
    rows, strips = [], []
    for path in args.data_dir:
        images = load_evaluation_images(path, args.resolution, args.limit, channels=vae.config.in_channels)
        samples = [
            torch.cat([reconstruct(vae, batch, lengths=cut) for batch in images.split(8)])
            for cut in [{name: length} for length in lengths[:-1]] + [None]
        ]
        rows.append(torch.cat([frame_values(psnr, sample, images) for sample in samples], dim=1).cpu().numpy())
        strips.append(side_by_side(images, *samples))
        for limit in args.min_psnr:
            row = compare(rows[-1], lengths, limit)
            cells = [f"{row['mean length']:.2f}", f"{row['reached']:.0%}", f"{row['PSNR']:.2f}"]
            cells += [f"{row['equal']:.2f}", f"{row['saved']:.0%}"]
            print(f"| {Path(path).name} | {limit:g} | {' | '.join(cells)} |", flush=True)
    psnrs = np.concatenate(rows)
    plot(psnrs, lengths, args.min_psnr, args.output_dir / "histograms.png")
    order = np.argsort(-psnrs[:, -1])
    extremes = torch.cat(strips)[np.concatenate([order[:3], order[-3:]])]
    some = torch.cat([strip[evenly_spaced(len(strip), 2)] for strip in strips])
    for file, pictures in (("extremes.png", extremes), ("samples.png", some)):
        Image.fromarray(pictures.flatten(0, 1).numpy()).save(args.output_dir / file)


if __name__ == "__main__":
    run_command(main)
