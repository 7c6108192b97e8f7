"""Judges samples of a class-conditional pipeline beside training and held-out pictures.

    python examples/evaluate_generation.py --model vitok-dit-emoji --classifier classifier.safetensors \
        --train_data_dir data/train/emoji/{face,hand,person,animal,food,transport,place,flag} \
        --test_data_dir data/test/emoji/{face,hand,person,animal,food,transport,place,flag} --output_dir evaluation

The class of a picture is the name of its folder; all sets have as many pictures of a class as the held-out one. Prints

- gFID, gIS, gFDD, precision and recall against the held-out pictures, or why there is none;
- with a classifier that train_classifier.py trained on the same folders: how often it agrees with the class, and
  Frechet distances of its features, which small sets of an uncommon domain need;
- distances to the nearest training picture, which tell of memorised ones.

Saves the samples that are closest to training pictures beside these, and results.json with the protocol.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image

from vitok_hf import ViTokDiTPipeline
from vitok_hf.evaluation.distributions import DistributionMetrics
from vitok_hf.evaluation.features import Classifier, frechet_distance
from vitok_hf.evaluation.generation import classify, generate_samples, nearest_neighbours, resize_all
from vitok_hf.evaluation.networks import load_networks
from vitok_hf.evaluation.pixels import sha256_each
from vitok_hf.evaluation.protocol import Protocol
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction
from vitok_hf.evaluation.results import Result, save_results
from vitok_hf.training.latent_data import LabelledFiles, load_square


NETWORKS = ("inception", "dino")
Labelled = tuple[torch.Tensor, np.ndarray]  # (N, 3, H, W) uint8, and their class ids (N,)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vitok-dit-emoji", help="what `from_pretrained` takes")
    parser.add_argument("--train_data_dir", nargs="+", required=True, help="folders, with the classes of the pipeline")
    parser.add_argument("--test_data_dir", nargs="+", required=True)
    parser.add_argument("--max_train_files", type=int, default=2000, help="of a class, as for cache_latents.py")
    parser.add_argument("--max_test_files", type=int, default=250, help="of a class")
    parser.add_argument("--classifier", type=Path, help="output of train_classifier.py")
    parser.add_argument("--classifier_size", type=int, default=64, help="side of the pictures that it was trained on")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--inception_weights", help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity")
    parser.add_argument("--dino", help="folder or Hub id of a DINOv2; default: facebook/dinov2-large")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="1 is none")
    parser.add_argument("--guidance_rescale", type=float, default=1.0, help="0 is none")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    return parser.parse_args()


def load_pictures(folders: list[str], classes: list[str], limit: int, side: int) -> Labelled:
    files = LabelledFiles(folders, classes, max_files_per_class=limit)
    squares = [load_square(item, side, 1, None, np.random.default_rng(0))[0] for item in files.items]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous(), files.labels


def choose(pictures: Labelled, counts: np.ndarray, seed: int) -> Labelled:
    """`counts[label]` random pictures of each class."""
    rng, (images, labels) = np.random.default_rng(seed), pictures
    members = [np.flatnonzero(labels == label) for label in range(len(counts))]
    chosen = np.concatenate([rng.choice(group, count, replace=False) for group, count in zip(members, counts)])
    return images[chosen], labels[chosen]


def print_distances(args: argparse.Namespace, samples: Labelled, held_out: Labelled) -> Result:
    """gFID and so on."""
    device = PartialState().device
    paths = {"inception": args.inception_weights, "dino": args.dino}
    networks, unavailable = load_networks(args.networks, paths, device)
    metrics = DistributionMetrics(networks, "g", precision_recall=True)
    for (images, _), real in ((held_out, True), (samples, False)):
        for batch in images.split(args.batch_size):
            metrics.update(batch.to(device), real)
    values, missing = metrics.compute()
    digests = {name: {"name": network.name, "sha256": network.sha256} for name, network in networks.items()}
    for name, value in values.items():
        print(f"{name}: {value:.3f}")
    for name, reason in (unavailable | missing).items():
        print(f"No {name}: {reason}.")
    return Result(
        name=f"{args.model}, guidance {args.guidance_scale}, rescale {args.guidance_rescale}, "
        f"{args.num_inference_steps} steps",
        data=", ".join(Path(folder).name for folder in args.test_data_dir),
        num_items=len(samples[0]),
        data_sha256=hashlib.sha256(sha256_each(held_out[0]).numpy()).hexdigest(),
        metrics=values,
        unavailable=unavailable | missing,
        protocol=Protocol(held_out[0].shape[-1], networks=digests),
    )


def print_classification(args: argparse.Namespace, sets: dict[str, Labelled], classes: list[str]) -> None:
    classifier = Classifier.load(args.classifier).to(PartialState().device)
    to_classifier = np.array([classifier.class_names.index(name) for name in classes])
    small = {
        name: resize_all(images, args.classifier_size).to(PartialState().device) for name, (images, _) in sets.items()
    }
    print("\n| set | pictures | as their class | classes | Frechet distance to held-out |\n|---|---|---|---|---|")
    for name, (images, labels) in sets.items():
        right = classify(small[name], classifier).cpu().numpy() == to_classifier[labels]
        each = ", ".join(f"{text} {right[labels == label].mean():.0%}" for label, text in enumerate(classes))
        distance = frechet_distance(small[name], small["held-out pictures"], classifier)
        print(f"| {name} | {len(images)} | {right.mean():.1%} | {each} | {distance:.3f} |", flush=True)


def print_neighbours(folder: Path, sets: dict[str, Labelled], known: torch.Tensor, count: int = 6) -> None:
    """Saves a row for each class: the `count` pictures closest to a training picture, each beside that one."""
    print("\n| grey levels to the nearest training picture | 1 % | 10 % | median |\n|---|---|---|---|")
    for name, (images, labels) in sets.items():
        distances, indices = nearest_neighbours(images, known)
        print(f"| {name} | {' | '.join(f'{distances.quantile(part):.1f}' for part in (0.01, 0.1, 0.5))} |")
        rows = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            closest = members[np.argsort(distances[members].numpy())[:count]]
            pair = [images[closest], known[indices[closest]]]
            row = rearrange(pair, "two n c h w -> h (n two w) c").numpy()
            rows.append(np.pad(row, ((0, 0), (0, 2 * count * images.shape[-1] - row.shape[1]), (0, 0))))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(rows)).save(folder / f"neighbours_{name.split()[0]}.png")


def main():
    args = parse_args()
    pipe = ViTokDiTPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.to(PartialState().device).set_progress_bar_config(disable=True)
    classes = [pipe.config.id2label[index] for index in range(len(pipe.config.id2label))]
    side = pipe.transformer.config.sample_size * pipe.vae.spatial_compression_ratio
    known = load_pictures(args.train_data_dir, classes, args.max_train_files, side)
    held_out = load_pictures(args.test_data_dir, classes, args.max_test_files, side)
    counts = np.bincount(held_out[1], minlength=len(classes))
    ids = np.repeat(np.arange(len(classes)), counts)
    options = {name: getattr(args, name) for name in ("guidance_scale", "guidance_rescale", "num_inference_steps")}
    samples = generate_samples(pipe, ids.tolist(), args.batch_size, args.seed, **options), ids
    result = print_distances(args, samples, held_out)
    if args.classifier is not None:
        sets = {"samples": samples, "training pictures": choose(known, counts, args.seed)}
        sets["reconstructions of held-out ones"] = evaluate_reconstruction(pipe.vae, held_out[0])[1], held_out[1]
        print_classification(args, sets | {"held-out pictures": held_out}, classes)
    print_neighbours(args.output_dir, {"samples": samples, "held-out pictures": held_out}, known[0])
    save_results(args.output_dir / "results.json", [result])
    print(f"\nSaved results.json, and pictures beside their neighbours, in {args.output_dir}.")


if __name__ == "__main__":
    main()
