"""Features of a small classifier that is trained on one's own data, for distances between sets of pictures.

They take the place of Inception's where its weights cannot be had or its domain does not fit; distances are comparable
for one and the same classifier only.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from ..clips import fold_frames, to_float
from ..disk import atomic_file
from .distributions import frechet_distance


class Classifier(nn.Module):
    """ResNet-18 with the folder names of its training pictures.

    Args:
        class_names: Names of the classes, in the order of the logits.
    """

    num_features = 512

    def __init__(self, class_names: list[str]):
        from torchvision.models import resnet18  # of an extra

        super().__init__()
        self.class_names = list(class_names)
        self.network = resnet18(weights=None, num_classes=len(class_names))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> (B, 512)"""
        head, self.network.fc = self.network.fc, nn.Identity()
        try:
            return self.network(to_float(images).contiguous(memory_format=torch.channels_last))
        finally:
            self.network.fc = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> logits (B, classes)"""
        return self.network.fc(self.features(images))

    @torch.no_grad()
    def distance(self, images: torch.Tensor, references: torch.Tensor, batch_size: int = 64) -> float:
        """Frechet distance of the features of two sets of uint8 pictures or clips, (N, 3, T, H, W) each.

        Raises:
            ValueError: If a set has less than two pictures.
        """
        sets = fold_frames(images), fold_frames(references)
        if min(map(len, sets)) < 2:
            raise ValueError(
                f"A Frechet distance needs sets of two or more, but they have {len(sets[0]), len(sets[1])}."
            )
        return frechet_distance(
            *(torch.cat([self.features(x) for x in pictures.split(batch_size)]) for pictures in sets)
        )

    def save(self, path: str | Path) -> None:
        with atomic_file(path) as temporary:
            save_model(self, temporary, metadata={"class_names": "\n".join(self.class_names)})

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError:
            metadata = {}
        if "class_names" not in metadata:
            raise ValueError(f'"{path}" is no classifier: name a file that `Classifier.save` wrote.')
        classifier = cls(metadata["class_names"].split("\n"))
        load_model(classifier, str(path))
        return classifier.eval()
