"""Distances between two sets of pictures or clips: FID, Inception score, FDD, FVD, precision and recall.

Features are kept, and statistics made of them in float64. Each process sees its share; all get the result of the
whole.
"""

from collections.abc import Callable, Mapping

import torch

from ..clips import fold_frames, to_colours
from .networks import FeatureNetwork
from .processes import gather_rows


INCEPTION_SPLITS = 10
NEIGHBORS = 3


def frechet_distance(features: torch.Tensor, references: torch.Tensor) -> float:
    """Frechet distance of the normal distributions with the means and covariances of (N, D) and (M, D).

    It is biased upwards, the more so the fewer there are: compare sets of equal sizes only.
    """
    pair = features.double(), references.double()
    means, covariances = [x.mean(dim=0) for x in pair], [torch.cov(x.T) for x in pair]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return ((means[0] - means[1]).square().sum() + traces - 2 * roots).clamp(min=0.0).item()


class SetMetrics:
    """Metrics of generated pictures or clips against real ones in the features of one network.

    Args:
        extractor: Maps uint8 (B, 3, H, W) or, for clips, (B, 3, T, H, W) to features (B, D), or to a pair of features
            and logits of classes (B, K), of which the Inception score is made.
        precision_recall: Also improved precision and recall (Kynkaanniemi et al., 2019) with 3 neighbours.
    """

    def __init__(self, extractor: Callable[[torch.Tensor], torch.Tensor | tuple], precision_recall: bool = False):
        self.extractor, self.precision_recall = extractor, precision_recall
        self._features: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        self._logits: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds what the extractor takes, real or generated."""
        output = self.extractor(images)
        features, logits = output if isinstance(output, tuple) else (output, None)
        self._features[real].append(features.cpu())
        if logits is not None and not real:
            self._logits.append(logits.cpu())

    @property
    def is_empty(self) -> bool:
        return not any(self._features.values())

    def reset_generated(self) -> None:
        """Forgets the generated pictures and keeps the real ones."""
        self._features[False], self._logits = [], []

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """The values of all pictures in all processes, and for each value that cannot be had the reason.

        Keys: "frechet_distance"; with logits "inception_score", the mean of 10 splits after a seeded shuffle; with
        `precision_recall`, "precision" and "recall".

        Raises:
            ValueError: If one process has no picture of one kind.
        """
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # of an extra
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        totals = gather_rows(torch.tensor([[sum(map(len, self._features[real])) for real in (True, False)]]))
        if totals.min() == 0:
            raise ValueError(
                f"Real and generated pictures in each process: {totals.tolist()}, but each needs some of both: take "
                "more pictures, or fewer processes."
            )
        references, features = (gather_rows(torch.cat(self._features[real])) for real in (True, False))
        counts = f"has {len(references)} and {len(features)}"
        values, missing = {}, {}
        if min(len(references), len(features)) > 1:
            values["frechet_distance"] = frechet_distance(features, references)
        else:
            missing["frechet_distance"] = f"needs 2 real and 2 generated pictures, {counts}"
        if self._logits:
            logits = gather_rows(torch.cat(self._logits))
            if len(logits) >= INCEPTION_SPLITS:
                score = isc_features_to_metric(logits, splits=INCEPTION_SPLITS)[KEY_METRIC_ISC_MEAN]
                values["inception_score"] = score
            else:
                missing["inception_score"] = f"needs {INCEPTION_SPLITS} pictures, has {len(logits)}"
        if self.precision_recall:
            if min(len(references), len(features)) > NEIGHBORS:
                options = {"prc_neighborhood": NEIGHBORS, "save_cpu_ram": True, "verbose": False}
                found = prc_features_to_metric(features.double(), references.double(), **options)
                values |= {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}
            else:
                reason = f"needs {NEIGHBORS + 1} real and generated pictures, {counts}"
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

    def __init__(self, networks: Mapping[str, FeatureNetwork], prefix: str, precision_recall: bool = False):
        self.prefix = prefix
        self._sets = [
            (SetMetrics(networks[network].module, precision_recall and network == "inception"), takes_clips, name)
            for network, takes_clips, name in SETS
            if network in networks
        ]

    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds uint8 pictures or clips (B, C, T, H, W) on the networks' device, which see `to_colours` of them."""
        if self._sets:
            images = to_colours(images)
        for metrics, takes_clips, _ in self._sets:
            if not takes_clips:
                metrics.update(fold_frames(images), real)
            elif images.shape[2] > 1:
                metrics.update(images, real)

    def reset_generated(self) -> None:
        """Forgets the generated pictures and keeps the real ones."""
        for metrics, _, _ in self._sets:
            metrics.reset_generated()

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """Metric -> value, and metric -> reason why it has none; see `SetMetrics.compute`."""
        values: dict[str, float] = {}
        missing: dict[str, str] = {}
        for metrics, takes_clips, name in self._sets:
            if takes_clips and metrics.is_empty:
                missing[self.prefix + name] = "of clips only: these are pictures"
                continue
            names = {"frechet_distance": self.prefix + name, "inception_score": f"{self.prefix}IS"}
            found, reasons = metrics.compute()
            values |= {names.get(key, key): value for key, value in found.items()}
            missing |= {names.get(key, key): reason for key, reason in reasons.items()}
        return values, missing
