"""Reconstructions measured: every codec on the same pictures, under one protocol."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..checks import check_int
from ..clips import COLOURS, sha256_each
from ..data.held_out import Codec, EvaluationData
from .costs import mean_costs, peak_memory, reset_peak_memory
from .distributions import DistributionMetrics
from .metrics import Metric, frame_values, ms_ssim, psnr, ssim
from .networks import FeatureNetwork
from .processes import gather_rows, share_of
from .reconstruction import reconstruct
from .results import Result, bootstrap_interval


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: Its name.
        codec: Maps uint8 (B, C, T, H, W) to its reconstruction, uint8 of the same shape.
        costs: Gives what is known of its costs, in every process, after all pictures went through `codec`.
    """

    name: str
    codec: Codec
    costs: Callable[[], dict[str, float]] = dict


def autoencoder_row(
    name: str, vae: ModelMixin, shapes: Mapping[tuple[int, ...], int], lengths: dict[str, int] | None = None
) -> Row:
    """The row of an autoencoder, whose codes are cut to `lengths`; `shapes` are those of the evaluator."""
    return Row(name, partial(reconstruct, vae, lengths=lengths), partial(mean_costs, vae, shapes, lengths))


class ReconstructionEvaluator:
    """Measures codecs on one data set: PSNR, SSIM, MS-SSIM, LPIPS, rFID, rIS, rFDD and, of clips, rFVD.

    Every process of a run measures its share of the pictures, and all get the whole result; all must call it. Features
    of the originals are computed once, for all codecs.

    Args:
        data: Pictures or clips.
        data_name: Name of the data in the results.
        networks, unavailable: What `load_networks` gives; metrics whose network is missing have its reason. Networks
            see grey repeated, and RGBA on grey; of data with other numbers of channels, they measure nothing.
        batch_size: Pictures or clips at a time.
        device: Where networks compute.

    Raises:
        ValueError: If `batch_size` is not at least 1.

    Attributes:
        shapes: (C, T, H, W) -> how many pictures or clips have it.
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
        self.data, self.data_name, self.device = data, data_name, device
        self.batch_size = check_int("batch_size", batch_size)
        networks, unavailable = networks or {}, unavailable or {}
        if data.protocol.channels not in COLOURS:
            reason = f"networks see colours, but these data have {data.protocol.channels} channels"
            networks, unavailable = {}, dict.fromkeys(networks | unavailable, reason)
        self.metrics: dict[str, Metric] = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
        if "lpips" in networks:
            self.metrics["lpips"] = networks["lpips"].module
        names = {"inception": ("rFID", "rIS"), "dino": ("rFDD",), "i3d": ("rFVD",), "lpips": ("lpips",)}
        self.unavailable = {name: reason for key, reason in unavailable.items() for name in names[key]}
        self.sets = DistributionMetrics(networks, "r")
        digests = {key: {"name": network.name, "sha256": network.sha256} for key, network in networks.items()}
        self.protocol = replace(data.protocol, networks=digests)

        self.share = share_of(len(data))
        checksums, shapes = [], []
        for images in self._batches():
            self.sets.update(images.to(device), real=True)
            checksums.append(sha256_each(images))
            shapes += [images.shape[1:]] * len(images)
        self.shapes = Counter(map(tuple, gather_rows(torch.tensor(shapes)).tolist()))
        self.data_sha256 = hashlib.sha256(gather_rows(torch.cat(checksums)).numpy().tobytes()).hexdigest()

    def _batches(self) -> Iterator[torch.Tensor]:
        return self.data.batches(self.share, self.batch_size)

    @torch.no_grad()
    def evaluate(self, row: Row) -> tuple[Result, dict[str, torch.Tensor]]:
        """Sends all pictures through the codec of a row.

        Returns:
            The result, whose costs are those of the row and, measured, "seconds" a picture in its codec, without the
            first batch if there are more, and "memory_MB", by how much it raises the peak of memory; and metric -> its
            value for each picture (N,), float64, in the order of `data`.
        """
        self.sets.reset_generated()
        unavailable = dict(self.unavailable)
        parts = {metric: [torch.empty(0).double()] for metric in self.metrics}
        timings, risen = [], 0
        for images in self._batches():
            reconstructions, seconds, rise = self._run(row.codec, images, unavailable)
            timings.append((seconds, len(images)))
            risen = max(risen, rise)
            pair = reconstructions.to(self.device), images.to(self.device)
            self.sets.update(pair[0], real=False)
            for metric, function in self.metrics.items():
                try:
                    parts[metric].append(frame_values(function, *pair).double().cpu().mean(dim=1))
                except ValueError as error:  # the picture is too small for it
                    unavailable[metric] = str(error)
        # each process gathers alike: a metric may be missing for pictures of another one
        gathered = {metric: gather_rows(torch.cat(columns)) for metric, columns in parts.items()}
        values = {metric: column for metric, column in gathered.items() if len(column) == len(self.data)}
        for metric in gathered.keys() - values.keys():
            unavailable.setdefault(metric, "some of the pictures are too small for it")
        distances, missing = self.sets.compute()
        result = Result(
            name=row.name,
            data=self.data_name,
            num_items=len(self.data),
            data_sha256=self.data_sha256,
            metrics={metric: column.mean().item() for metric, column in values.items()} | distances,
            protocol=self.protocol,
            intervals={
                metric: bootstrap_interval(column)
                for metric, column in values.items()
                if len(column) > 1 and column.isfinite().all()
            },
            unavailable=unavailable | missing,
            costs=row.costs() | self._measured(timings, risen, unavailable),
        )
        return result, values

    @staticmethod
    def _measured(timings: list[tuple[float, int]], risen: int, unavailable: dict[str, str]) -> dict[str, float]:
        seconds, count = gather_rows(torch.tensor(timings[1:] or timings, dtype=torch.float64)).sum(dim=0).tolist()
        measured = {"seconds": seconds / count}
        if "memory_MB" not in unavailable:
            measured["memory_MB"] = gather_rows(torch.tensor([risen])).max().item() / 1e6
        return measured

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
