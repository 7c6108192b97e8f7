"""Distances between two sets of pictures or clips: FID, Inception score, FDD, FVD, precision and recall.

Means and covariances are summed up in float64 batch by batch, logits and features kept where a metric needs them all.
Each process sees its share; all get the result of the whole.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..clips import fold_frames
from .networks import FeatureNetwork
from .processes import gather_rows


INCEPTION_SPLITS = 10
NEIGHBORS = 3


class _Given(nn.Identity):
    """Stands for the network of torchmetrics where features are at hand."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


class SetMetrics:
    """Metrics of generated pictures or clips against real ones in the features of one network.

    Args:
        extractor: Maps uint8 (B, 3, [T,] H, W) to features (B, D), or to a pair of features and logits of classes
            (B, K), of which the Inception score is made.
        precision_recall: Also improved precision and recall (Kynkaanniemi et al., 2019) with 3 neighbours; all
            features are kept.
    """

    def __init__(self, extractor: Callable[[torch.Tensor], torch.Tensor | tuple], precision_recall: bool = False):
        self.extractor, self.precision_recall = extractor, precision_recall
        self._frechet = None
        self._features: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        self._logits: list[torch.Tensor] = []
        self._counts = {True: 0, False: 0}

    @torch.no_grad()
    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W), real or generated."""
        from torchmetrics.image.fid import FrechetInceptionDistance  # of an extra

        output = self.extractor(images)
        features, logits = output if isinstance(output, tuple) else (output, None)
        features = features.double()
        if self._frechet is None:
            given = _Given(features.shape[1])
            self._frechet = FrechetInceptionDistance(given, reset_real_features=False).to(features.device)
        self._frechet.update(features, real=real)
        self._counts[real] += len(features)
        if self.precision_recall:
            self._features[real].append(features.cpu())
        if logits is not None and not real:
            self._logits.append(logits.cpu())

    @property
    def is_empty(self) -> bool:
        return self._frechet is None

    def reset_generated(self) -> None:
        """Forgets the generated pictures and keeps the real ones."""
        if self._frechet is not None:
            self._frechet.reset()
        self._features[False], self._logits, self._counts[False] = [], [], 0

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """The values of all pictures in all processes, and for each value that cannot be had the reason.

        Keys: "frechet_distance"; with logits "inception_score", the mean of 10 splits after a seeded shuffle; with
        `precision_recall`, "precision" and "recall". The Frechet distance is biased upwards, the more so the fewer
        the pictures: compare sets of equal sizes only.

        Raises:
            ValueError: If one process has no picture of one kind.
        """
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # of an extra
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        counts = [self._counts[True], self._counts[False]]
        totals = gather_rows(torch.tensor([counts]))
        if totals.min() == 0:
            raise ValueError(
                f"Real and generated pictures in each process: {totals.tolist()}, but each needs some of both: take "
                "more pictures, or fewer processes."
            )
        real, generated = totals.sum(dim=0).tolist()
        values, missing = {}, {}
        if min(real, generated) > 1:
            values["frechet_distance"] = self._frechet.compute().clamp(min=0.0).item()
        else:
            missing["frechet_distance"] = f"needs 2 real and 2 generated pictures, has {real} and {generated}"
        if self._logits:
            logits = gather_rows(torch.cat(self._logits))
            if generated >= INCEPTION_SPLITS:
                score = isc_features_to_metric(logits, splits=INCEPTION_SPLITS)[KEY_METRIC_ISC_MEAN]
                values["inception_score"] = score
            else:
                missing["inception_score"] = f"needs {INCEPTION_SPLITS} pictures, has {generated}"
        if self.precision_recall:
            sets = [gather_rows(torch.cat(self._features[kind])) for kind in (False, True)]  # generated, real
            if min(real, generated) > NEIGHBORS:
                options = {"prc_neighborhood": NEIGHBORS, "save_cpu_ram": True, "verbose": False}
                found = prc_features_to_metric(*sets, **options)
                values |= {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}
            else:
                reason = f"needs {NEIGHBORS + 1} real and generated pictures, has {real} and {generated}"
                missing |= {"precision": reason, "recall": reason}
        return values, missing


# network, whether it takes clips whole, and the name of its Frechet distance
SETS = (("inception", False, "FID"), ("dino", False, "FDD"), ("i3d", True, "FVD"))


class DistributionMetrics:
    """The metrics of all networks that are at hand: rFID, rIS, rFDD and rFVD, or gFID and so on.

    Args:
        networks: What `load_networks` gives; those for single pictures see the frames of clips one by one.
        prefix: "r" for reconstructions, "g" for generated pictures.
        precision_recall: Also "precision" and "recall" in the features of Inception.
    """

    def __init__(self, networks: dict[str, FeatureNetwork], prefix: str, precision_recall: bool = False):
        self.prefix, self._sets = prefix, []
        for network, clips, name in SETS:
            if network in networks:
                metrics = SetMetrics(networks[network].module, precision_recall and network == "inception")
                self._sets.append((metrics, clips, name))

    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W), on the networks' device."""
        for metrics, clips, _ in self._sets:
            if not clips:
                metrics.update(fold_frames(images), real)
            elif images.ndim == 5:
                metrics.update(images, real)

    def reset_generated(self) -> None:
        """Forgets the generated pictures and keeps the real ones."""
        for metrics, _, _ in self._sets:
            metrics.reset_generated()

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """Metric -> value, and metric -> reason why it has none; see `SetMetrics.compute`."""
        values, missing = {}, {}
        for metrics, clips, name in self._sets:
            if clips and metrics.is_empty:
                missing[self.prefix + name] = "of clips only: these are pictures"
                continue
            names = {"frechet_distance": self.prefix + name, "inception_score": f"{self.prefix}IS"}
            for source, target in zip(metrics.compute(), (values, missing)):
                target |= {names.get(key, key): value for key, value in source.items()}
        return values, missing
