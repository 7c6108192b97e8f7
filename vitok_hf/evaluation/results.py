"""What was measured: stored with its protocol, and compared under one protocol only."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..data.held_out import Protocol
from ..disk import write_json
from ..loading.strict import read_json


@dataclass
class Result:
    """What was measured of one model, on which data, and how.

    Args:
        name: Of the model or codec.
        data: Of the data.
        num_items: Pictures or clips.
        data_sha256: Of the reference pixels, in order.
        metrics: Metric -> value: PSNR in dB. Those that are not finite go to `unavailable`: JSON has no such numbers.
        intervals: Metric -> bounds of the 95 % confidence interval of a mean over pictures.
        unavailable: Metric or cost -> reason why it has no value.
        costs: Name -> value, with the unit in the name.
        protocol: How.
    """

    name: str
    data: str
    num_items: int
    data_sha256: str
    metrics: dict[str, float]
    protocol: Protocol
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        lost = {name: f"is {value}" for name, value in self.metrics.items() if not math.isfinite(value)}
        self.unavailable = self.unavailable | lost
        self.metrics = {name: value for name, value in self.metrics.items() if name not in lost}

    @classmethod
    def from_dict(cls, values: dict) -> "Result":
        intervals = {name: tuple(bounds) for name, bounds in values["intervals"].items()}
        return cls(**values | {"protocol": Protocol.from_dict(values["protocol"]), "intervals": intervals})


def save_results(path: str | Path, results: Sequence[Result]) -> None:
    """Writes results with their protocols as JSON."""
    write_json(Path(path), [asdict(result) for result in results])


def load_results(path: str | Path) -> list[Result]:
    """Reads what `save_results` wrote; raises `ValueError` for a protocol of other fields, as of another version."""
    try:
        return [Result.from_dict(values) for values in read_json(path)]
    except (KeyError, TypeError) as error:
        raise ValueError(f'"{path}" holds no results ({error!r}): name what `save_results` wrote.') from error


def check_comparable(results: Sequence[Result]) -> None:
    """Raises `ValueError`, naming what differs, unless all results have one protocol and the same pictures."""
    for index, first in enumerate(results):
        for other in results[index + 1 :]:
            reasons = [
                f"protocol.{name} ({_entry(first.protocol, name)} and {_entry(other.protocol, name)})"
                for name in first.protocol.differences(other.protocol)
            ]
            for name in ("num_items", "data_sha256"):
                if getattr(first, name) != getattr(other, name):
                    reasons.append(f"{name} ({getattr(first, name)} and {getattr(other, name)})")
            if reasons:
                raise ValueError(
                    f'"{first.name}" and "{other.name}" cannot be compared, they differ in {"; ".join(reasons)}: '
                    "measure both in one way."
                )


def _entry(protocol: Protocol, name: str):
    name, _, network = name.partition(".")
    value = getattr(protocol, name)
    return value[network] if network else value


def bootstrap_interval(values: torch.Tensor, seed: int = 0, num_resamples: int = 1000) -> tuple[float, float]:
    """Bounds of the 95 % confidence interval of the mean of (N,), by the percentile bootstrap.

    Says how far the mean may be off for other pictures of the same kind; not how far a trained model is from one with
    another seed.

    Raises:
        ValueError: If there are fewer than two values, or some are not finite.
    """
    if len(values) < 2 or not values.isfinite().all():
        raise ValueError(f"A confidence interval needs two or more values, all finite, but got {values}.")
    from scipy.stats import bootstrap  # of an extra

    interval = bootstrap(
        (values.double().cpu().numpy(),),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, 2**24 // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
