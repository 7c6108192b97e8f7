"""JPEG and WebP with as many bytes a picture as an autoencoder's latents, and an autoencoder as such a codec."""

from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image

from ..data.held_out import Codec
from .autoencoders import count_cost
from .processes import gather_rows
from .reconstruction import reconstruct


def decode(data: bytes) -> np.ndarray:
    """A picture file -> (H, W, 3) uint8."""
    with Image.open(BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


class ImageCodec:
    """A lossy picture codec of Pillow at the highest quality that keeps each picture within a number of bytes.

    The whole file counts, headers included. Where even the lowest quality takes more, that is used, and counted in
    `num_above_budget`: the row then has an advantage. JPEG is tried with colours at the full resolution (4:4:4) and at
    half of it (4:2:0); the file with the lower squared error counts.

    Args:
        file_format: "JPEG" (quality 1 to 100, optimised Huffman tables) or "WEBP" (1 to 100).
        max_bytes: Bytes a picture may take.

    Attributes:
        num_items, num_bytes, num_above_budget: Counted over all pictures so far.
    """

    SETTINGS = {"JPEG": [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}], "WEBP": [{}]}

    def __init__(self, file_format: str, max_bytes: int):
        if file_format not in self.SETTINGS:
            raise ValueError(f'There is no codec "{file_format}": choose from {", ".join(self.SETTINGS)}.')
        if max_bytes < 1:
            raise ValueError(f"`max_bytes` is {max_bytes}, but must be positive.")
        self.file_format, self.max_bytes = file_format, max_bytes
        self.num_items = self.num_bytes = self.num_above_budget = 0

    def _encode(self, picture: Image.Image, **settings: Any) -> bytes:
        file = BytesIO()
        picture.save(file, self.file_format, optimize=True, **settings)
        return file.getvalue()

    def _fill_budget(self, picture: Image.Image, **settings: Any) -> bytes:
        """Sizes are taken to grow with the quality: bisection."""
        low, high = 1, 100
        best = self._encode(picture, quality=low, **settings)
        while low < high:
            middle = (low + high + 1) // 2
            data = self._encode(picture, quality=middle, **settings)
            if len(data) <= self.max_bytes:
                low, best = middle, data
            else:
                high = middle - 1
        return best

    def compress(self, image: torch.Tensor) -> bytes:
        """The file for one picture, (3, H, W) uint8."""
        pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        files = [
            self._fill_budget(Image.fromarray(pixels), **settings) for settings in self.SETTINGS[self.file_format]
        ]

        def rank(data: bytes) -> tuple[int, float]:
            return max(len(data), self.max_bytes), np.square(decode(data) - pixels.astype(np.float32)).mean()

        best = min(files, key=rank)
        self.num_items += 1
        self.num_bytes += len(best)
        self.num_above_budget += len(best) > self.max_bytes
        return best

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 pictures (B, 3, H, W) -> what the files hold, the same shape."""
        decoded = [torch.from_numpy(decode(self.compress(image))).permute(2, 0, 1) for image in images]
        return torch.stack(decoded).to(images.device)

    def costs(self) -> dict[str, float]:
        """Mean bytes a picture, and pictures above the budget, over all processes, which must all call it."""
        counts = torch.tensor([[self.num_items, self.num_bytes, self.num_above_budget]])
        num_items, num_bytes, above = gather_rows(counts).sum(dim=0).tolist()
        return {"bytes": num_bytes / num_items} | ({"above_budget": float(above)} if above else {})


def autoencoder_codec(
    vae: ModelMixin, shapes: Mapping[tuple[int, ...], int], latent_bits: int | None = None
) -> tuple[Codec, dict[str, float]]:
    """Codec and costs for `ReconstructionEvaluator.evaluate`; `shapes` are the evaluator's, or {(C, [T,] H, W): 1}.

    The costs: parameters in millions; means over all pictures or clips of multiply-accumulates in units of 1e9, of
    the number of latents (E of the paper) and of their bytes, quantized to `latent_bits`, or, as they are, at 16 bits;
    and how many values of the pictures there are for each latent.
    """
    counted = [(count_cost(vae, shape), torch.Size(shape).numel(), number) for shape, number in shapes.items()]
    total = sum(number for *_, number in counted)

    def mean(values: Iterable[float]) -> float:
        return sum(value * number for value, (*_, number) in zip(values, counted)) / total

    num_latents = mean(cost.num_latents for cost, *_ in counted)
    costs = {
        "parameters_M": counted[0][0].parameters / 1e6,
        "GMACs": mean(cost.macs for cost, *_ in counted) / 1e9,
        "E": num_latents,
        "compression": mean(values for _, values, _ in counted) / num_latents,
        "bytes": mean(cost.num_bytes(latent_bits) for cost, *_ in counted),
    }
    return partial(reconstruct, vae, latent_bits=latent_bits), costs
