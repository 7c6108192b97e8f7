"""Codes of a number of bytes: quantized latents, and the picture codecs of Pillow."""

from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitok_hf.evaluation.processes import gather_rows


class Quantizer:
    """Latents (B, c, ...) rounded to 2 ** `bits` levels, evenly from the least to the largest of each channel.

    `num_bytes` are those of an item seen last, with two float32 for each channel.
    """

    def __init__(self, bits: int):
        self.bits, self.num_bytes = bits, 0

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        self.num_bytes = -(-latents[0].numel() * self.bits // 8) + 8 * latents.shape[1]
        flat = latents.flatten(2).float()
        low, high = flat.aminmax(dim=2, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).clamp(min=torch.finfo(flat.dtype).tiny)
        return (((flat - low) / step).round() * step + low).view_as(latents).to(latents.dtype)


def decode(data: bytes) -> np.ndarray:
    """A picture file -> (H, W, 3) uint8."""
    with Image.open(BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


class ImageCodec:
    """A lossy picture codec of Pillow at the highest quality that keeps each picture within a number of bytes.

    The whole file counts, headers included. Where even the lowest quality takes more, that is used, and counted in
    "above_budget": the row then has an advantage. JPEG is tried with colours at the full resolution (4:4:4) and at
    half of it (4:2:0); the file with the lower squared error counts.
    """

    SETTINGS: dict[str, list[dict[str, Any]]] = {
        "JPEG": [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}],
        "WEBP": [{}],
    }

    def __init__(self, file_format: str, max_bytes: int):
        self.file_format, self.max_bytes = file_format, max_bytes
        self.sizes: list[int] = []  # of the files of all pictures so far

    def _fill_budget(self, picture: Image.Image, **settings: Any) -> bytes:
        """Sizes are taken to grow with the quality: bisection."""

        def encode(quality: int) -> bytes:
            file = BytesIO()
            picture.save(file, self.file_format, quality=quality, optimize=True, **settings)
            return file.getvalue()

        low, high = 1, 100
        best = encode(low)
        while low < high:
            middle = (low + high + 1) // 2
            if len(data := encode(middle)) <= self.max_bytes:
                low, best = middle, data
            else:
                high = middle - 1
        return best

    def compress(self, image: torch.Tensor) -> bytes:
        """The file for one picture, (3, 1, H, W) uint8."""
        pixels = image[:, 0].permute(1, 2, 0).contiguous().cpu().numpy()
        picture = Image.fromarray(pixels)

        def rank(data: bytes) -> tuple[int, float]:
            return max(len(data), self.max_bytes), np.square(decode(data) - pixels.astype(np.float32)).mean()

        files = (self._fill_budget(picture, **settings) for settings in self.SETTINGS[self.file_format])
        best = min(files, key=rank)
        self.sizes.append(len(best))
        return best

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 pictures (B, 3, 1, H, W) -> what the files hold, the same shape."""
        decoded = [torch.from_numpy(decode(self.compress(image))).permute(2, 0, 1)[:, None] for image in images]
        return torch.stack(decoded).to(images.device)

    def costs(self) -> dict[str, float]:
        """Mean bytes a picture, and pictures above the budget, over all processes, which must all call it."""
        sizes = gather_rows(torch.tensor(self.sizes))
        above = float((sizes > self.max_bytes).sum())
        return {"bytes": sizes.double().mean().item()} | ({"above_budget": above} if above else {})
