"""Reconstructions measured: every codec on the same pictures, under one protocol."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from ..clips import fold_frames, sha256_each
from ..data.held_out import Codec, EvaluationData
from .distributions import DistributionMetrics
from .memory import peak_memory, reset_peak_memory
from .metrics import ms_ssim, psnr, ssim
from .networks import FeatureNetwork
from .processes import gather_rows, share_of
from .results import Result, bootstrap_interval


class ReconstructionEvaluator:
    """Measures codecs on one data set: PSNR, SSIM, MS-SSIM, LPIPS, rFID, rIS, rFDD and, of clips, rFVD.

    Every process of a run measures its share of the pictures, and all get the whole result; all must call it. Features
    of the originals are computed once, for all codecs.

    Args:
        data: Pictures or clips.
        data_name: Name of the data in the results.
        networks, unavailable: What `load_networks` gives; metrics whose network is missing have its reason.
        batch_size: Pictures or clips at a time.
        device: Where networks compute.

    Attributes:
        shapes: (C, [T,] H, W) -> how many pictures or clips have it.
    """

    def __init__(
        self,
        data: EvaluationData,
        data_name: str,
        networks: dict[str, FeatureNetwork] | None = None,
        unavailable: dict[str, str] | None = None,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
    ):
        self.data, self.data_name, self.batch_size, self.device = data, data_name, batch_size, device
        self.networks = networks or {}
        names = {"inception": ("rFID", "rIS"), "dino": ("rFDD",), "i3d": ("rFVD",), "lpips": ("lpips",)}
        self.unavailable = {name: reason for key, reason in (unavailable or {}).items() for name in names[key]}
        self.sets = DistributionMetrics(self.networks, "r")
        digests = {key: {"name": network.name, "sha256": network.sha256} for key, network in self.networks.items()}
        self.protocol = replace(data.protocol, networks=digests)

        self.share = share_of(len(data))
        checksums, shapes = [], []
        for images in self._batches():
            self.sets.update(images.to(device), real=True)
            checksums.append(sha256_each(images))
            shapes += [images.shape[1:]] * len(images)
        self.shapes = Counter(map(tuple, gather_rows(torch.tensor(shapes)).tolist()))
        self.data_sha256 = hashlib.sha256(gather_rows(torch.cat(checksums)).numpy()).hexdigest()

    def _batches(self):
        return self.data.batches(self.share, self.batch_size)

    def _per_picture(self) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        functions = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
        if "lpips" in self.networks:
            functions["lpips"] = self.networks["lpips"].module
        return functions

    @torch.no_grad()
    def evaluate(
        self, name: str, codec: Codec, costs: dict[str, float] | None = None
    ) -> tuple[Result, dict[str, torch.Tensor]]:
        """Sends all pictures through `codec`.

        Args:
            name: Of the row.
            codec: Maps uint8 (B, 3, [T,] H, W) to its reconstruction, uint8 of the same shape.
            costs: Numbers to store with the result; measured and added are "seconds" a picture in `codec`, without the
                first batch if there are more, and "memory_MB", by how much it raises the peak of memory.

        Returns:
            The result, and metric -> its value for each picture (N,), float64, in the order of `data`.
        """
        self.sets.reset_generated()
        functions = self._per_picture()
        unavailable = dict(self.unavailable)
        values: dict[str, list[torch.Tensor]] = {metric: [] for metric in functions}
        timings, risen = [], 0
        for images in self._batches():
            reconstructions, seconds, rise = self._run(codec, images, unavailable)
            timings.append((seconds, len(images)))
            risen = max(risen, rise)
            self.sets.update(reconstructions.to(self.device), real=False)
            pair = fold_frames(reconstructions).to(self.device), fold_frames(images).to(self.device)
            for metric, function in functions.items():
                try:
                    per_frame = function(*pair).double().cpu()
                except ValueError as error:  # the picture is too small for it
                    unavailable[metric] = str(error)
                else:
                    values[metric].append(per_frame.view(len(images), -1).mean(dim=1))
        # each process gathers alike: a metric may be missing for pictures of another one
        values = {
            metric: gather_rows(torch.cat([*parts, torch.empty(0).double()])) for metric, parts in values.items()
        }
        values = {metric: column for metric, column in values.items() if len(column) == len(self.data)}
        for metric in functions.keys() - values.keys():
            unavailable.setdefault(metric, "some of the pictures are too small for it")
        metrics = {metric: column.mean().item() for metric, column in values.items()}
        distances, missing = self.sets.compute()
        timed = gather_rows(torch.tensor(timings[1:] or timings, dtype=torch.float64)).sum(dim=0)
        measured = {"seconds": (timed[0] / timed[1]).item()}
        if "memory_MB" not in unavailable:
            measured["memory_MB"] = gather_rows(torch.tensor([risen])).max().item() / 1e6
        result = Result(
            name=name,
            data=self.data_name,
            num_items=len(self.data),
            data_sha256=self.data_sha256,
            metrics=metrics | distances,
            protocol=self.protocol,
            intervals={
                metric: bootstrap_interval(column)
                for metric, column in values.items()
                if len(column) > 1 and column.isfinite().all()
            },
            unavailable=unavailable | missing,
            costs=(costs or {}) | measured,
        )
        return result, values

    def _run(self, codec: Codec, images: torch.Tensor, unavailable: dict[str, str]) -> tuple[torch.Tensor, float, int]:
        """Reconstructions, seconds, and bytes by which the peak of memory rose."""
        try:
            before = reset_peak_memory(self.device)
        except OSError as error:
            unavailable["memory_MB"], before = f"not on this system: {error}", None
        began = time.perf_counter()
        reconstructions = codec(images)
        if torch.device(self.device).type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - began
        rise = 0 if before is None else peak_memory(self.device) - before
        if reconstructions.shape != images.shape or reconstructions.dtype != torch.uint8:
            raise ValueError(
                f"The codec gave {reconstructions.dtype} of {tuple(reconstructions.shape)} for uint8 pictures of "
                f"{tuple(images.shape)}: it must keep size and type."
            )
        return reconstructions, seconds, rise
