"""Trains a small classifier of pictures by the folder they are in; its features serve to compare sets of pictures.

    python examples/train_classifier.py --train_data_dir data/train --test_data_dir data/test

Every folder that holds pictures is a class, under its own name. Prints the accuracy on held-out pictures.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vitok_hf.commands import run_command
from vitok_hf.data.classes import class_of, limit_each_class
from vitok_hf.data.files import IMAGE_SUFFIXES, list_files
from vitok_hf.data.media import load_image, resize, resize_and_crop
from vitok_hf.evaluation.features import Classifier
from vitok_hf.precision import MIXED_PRECISIONS, choose_mixed_precision


def list_pictures(folders: list[Path], limit: int | None) -> list[Path]:
    files = [file for folder in folders for file in list_files(folder, IMAGE_SUFFIXES)]
    return files if limit is None else limit_each_class(files, limit)


class FolderClasses(Dataset):
    """Item i: a random crop of at least half a picture's side, perhaps mirrored; classes are balanced."""

    def __init__(self, files: list[Path], size: int, length: int, random_flip: bool):
        self.size, self.length, self.random_flip, self.classes = size, length, random_flip, {}
        for file in files:
            self.classes.setdefault(class_of(file), []).append(file)
        self.names = sorted(self.classes)
        self.pictures: dict[Path, np.ndarray] = {}  # decoded ones, no larger than needed

    def _load(self, file: Path) -> np.ndarray:
        if file not in self.pictures:
            image = load_image(file)
            height, width = image.shape[:2]
            scale = min(1.0, 2 * self.size / min(height, width))
            self.pictures[file] = resize(image, (round(width * scale), round(height * scale)), (0, 0, width, height))
        return self.pictures[file]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        rng = np.random.default_rng(index)
        label = int(rng.integers(len(self.names)))
        files = self.classes[self.names[label]]
        image = self._load(files[rng.integers(len(files))])
        side = min(image.shape[:2]) * rng.uniform(0.5, 1.0)
        top, left = (rng.uniform(0, length - side) for length in image.shape[:2])
        crop = resize(image, (self.size, self.size), (left, top, left + side, top + side))
        if self.random_flip and rng.random() < 0.5:
            crop = crop[:, ::-1]
        return torch.from_numpy(crop.copy()).permute(2, 0, 1), label


def test_pictures(files: list[Path], names: list[str], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(files), 128):
        batch = files[start : start + 128]
        pictures = np.stack([resize_and_crop(load_image(file), size) for file in batch])
        labels = torch.tensor([names.index(class_of(file)) for file in batch])
        yield torch.from_numpy(pictures).permute(0, 3, 1, 2), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, nargs="+", required=True)
    parser.add_argument("--test_data_dir", type=Path, nargs="+", required=True)
    parser.add_argument("--max_train_files", type=int, help="of larger classes, a fixed random choice of so many")
    parser.add_argument("--max_test_files", type=int)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--random_flip", action="store_true", help="mirror half of the training pictures")
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--mixed_precision", default="auto", choices=MIXED_PRECISIONS)
    parser.add_argument("--dataloader_num_workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("classifier.safetensors"))
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision=choose_mixed_precision(args.mixed_precision))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train, test = (
        list_pictures(folders, limit)
        for folders, limit in ((args.train_data_dir, args.max_train_files), (args.test_data_dir, args.max_test_files))
    )
    data = FolderClasses(train, args.size, args.max_train_steps * args.train_batch_size, args.random_flip)
    test = [file for file in test if class_of(file) in data.names]
    if not test:
        raise ValueError(f"There is no held-out picture of the classes {data.names}: name other --test_data_dir.")
    classifier = Classifier(data.names)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.learning_rate, weight_decay=0.05)
    loader = DataLoader(data, args.train_batch_size, num_workers=args.dataloader_num_workers)
    model, optimizer, loader = accelerator.prepare(classifier, optimizer, loader)

    bar = tqdm(loader)
    for step, (pictures, labels) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * 0.5 * (1 + math.cos(math.pi * step / len(loader)))
        loss = F.cross_entropy(model(pictures).float(), labels, label_smoothing=0.1)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    if not accelerator.is_main_process:
        return
    classifier.eval().save(args.output)
    right = total = 0
    with torch.no_grad():
        for pictures, labels in test_pictures(test, data.names, args.size):
            predicted = classifier(pictures.to(accelerator.device)).argmax(dim=1).cpu()
            right, total = right + int((predicted == labels).sum()), total + len(labels)
    print(f"{len(data.names)} classes, accuracy on {total} held-out pictures: {right / total:.3f}")
    print(f"Saved {args.output}")


if __name__ == "__main__":
    run_command(main)
