"""Judges a class-conditional pipeline by a small classifier: samples beside training and held-out pictures.

    python examples/evaluate_generation.py --model vitok-dit-emoji --classifier classifier.safetensors \
        --train_data_dir data/train/emoji/{face,hand,person,animal,food,transport,place,flag} \
        --test_data_dir data/test/emoji/{face,hand,person,animal,food,transport,place,flag} --output_dir evaluation

train_classifier.py trains the classifier, on the same folders. The class of a picture is the name of its folder; all
sets have as many pictures of a class as the held-out one. Prints how often the classifier agrees with the class,
Frechet distances of its features, and distances to the nearest training picture, which tell of memorised ones; saves
samples beside these neighbours.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image

from vitok_hf import ViTokDiTPipeline
from vitok_hf.evaluation.features import Classifier, frechet_distance
from vitok_hf.evaluation.generation import classify, generate_samples, nearest_neighbours, resize_all
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction
from vitok_hf.training.latent_data import LabelledFiles, load_square


def load_pictures(files: LabelledFiles, indices: np.ndarray, side: int) -> torch.Tensor:
    """(N, 3, side, side) uint8"""
    squares = [load_square(files[index], side, 1, None, np.random.default_rng(0))[0] for index in indices]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


def choose(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Indices of `counts[label]` random items of each class."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label, count in enumerate(counts):
        (members,) = np.nonzero(labels == label)
        chosen.append(rng.choice(members, count, replace=count > len(members)))
    return np.concatenate(chosen)


def save_neighbours(
    path: Path, samples: torch.Tensor, references: torch.Tensor, ids: np.ndarray, distances: torch.Tensor, count: int
) -> None:
    """A row for each class: the `count` samples that are closest to a training picture, each beside that one."""
    rows = []
    for label in np.unique(ids):
        (members,) = np.nonzero(ids == label)
        closest = members[np.argsort(distances[members].numpy())[:count]]
        rows.append(rearrange([samples[closest], references[closest]], "two n c h w -> h (n two w) c"))
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vitok-dit-emoji", help="what `from_pretrained` takes")
    parser.add_argument("--classifier", type=Path, required=True, help="output of train_classifier.py")
    parser.add_argument("--classifier_size", type=int, default=64, help="side of the pictures that it was trained on")
    parser.add_argument("--train_data_dir", nargs="+", required=True, help="folders, with the classes of the pipeline")
    parser.add_argument("--test_data_dir", nargs="+", required=True)
    parser.add_argument("--max_train_files", type=int, default=2000, help="of a class, as for cache_latents.py")
    parser.add_argument("--max_test_files", type=int, default=250, help="of a class")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="1 is none")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    args = parser.parse_args()

    device = PartialState().default_device
    pipe = ViTokDiTPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    classifier = Classifier.load(args.classifier).to(device)
    classes = [pipe.config.id2label[index] for index in range(len(pipe.config.id2label))]
    side = pipe.transformer.config.sample_size * pipe.vae.spatial_compression_ratio
    train, test = (
        LabelledFiles(folders, classes, max_files_per_class=limit)
        for folders, limit in ((args.train_data_dir, args.max_train_files), (args.test_data_dir, args.max_test_files))
    )
    counts = np.bincount(test.labels, minlength=len(classes))
    ids = np.repeat(np.arange(len(classes)), counts)

    options = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    held_out, known = (load_pictures(files, np.arange(len(files)), side) for files in (test, train))
    sets = {"samples": (generate_samples(pipe, ids.tolist(), args.batch_size, args.seed, **options), ids)}
    sets["reconstructions"] = (evaluate_reconstruction(pipe.vae, held_out)[1], test.labels)
    chosen = choose(train.labels, counts, args.seed)
    sets["training pictures"] = (known[chosen], train.labels[chosen])
    sets["held-out pictures"] = (held_out, test.labels)

    small = {name: resize_all(images, args.classifier_size).to(device) for name, (images, _) in sets.items()}
    to_classifier = np.array([classifier.class_names.index(name) for name in classes])
    print("| set | pictures | as their class | classes | Frechet distance to held-out |\n|---|---|---|---|---|")
    for name, (images, labels) in sets.items():
        right = classify(small[name], classifier).cpu().numpy() == to_classifier[labels]
        each = ", ".join(f"{text} {right[labels == label].mean():.0%}" for label, text in enumerate(classes))
        distance = frechet_distance(small[name], small["held-out pictures"], classifier)
        print(f"| {name} | {len(images)} | {right.mean():.1%} | {each} | {distance:.3f} |", flush=True)

    print("\n| distance to the nearest training picture, grey levels | 1 % | 10 % | median |\n|---|---|---|---|")
    for name in ("samples", "held-out pictures"):
        distances, indices = nearest_neighbours(sets[name][0], known)
        values = " | ".join(f"{distances.quantile(part):.1f}" for part in (0.01, 0.1, 0.5))
        print(f"| {name} | {values} |")
        path = args.output_dir / f"neighbours_{name.split()[0]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_neighbours(path, sets[name][0], known[indices], sets[name][1], distances, 6)
    print(f"\nSaved pictures of the closest ones, each left of its neighbour, in {args.output_dir}.")


if __name__ == "__main__":
    main()
