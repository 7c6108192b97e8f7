"""Against closed forms and plain formulas; linear maps stand for the networks."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from tests.conftest import run_on_two_processes
from vitok_hf.evaluation.distributions import DistributionMetrics, SetMetrics
from vitok_hf.evaluation.networks import FeatureNetwork
from vitok_hf.evaluation.processes import gather_rows


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    return images.double().flatten(2).mean(dim=2)


def colour_and_logits(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = mean_colour(images)
    return features, (features - 128.0) / 20.0


def pictures(seed: int, count: int, mean: float = 128.0, std: float = 20.0) -> torch.Tensor:
    """(N, 3, 4, 4) uint8, each of one colour."""
    rng = np.random.default_rng(seed)
    colours = rng.normal(mean, std, (count, 3, 1, 1)).clip(0, 255).round().astype(np.uint8)
    return torch.from_numpy(colours).expand(-1, -1, 4, 4)


def measure(metrics: SetMetrics, generated: torch.Tensor, real: torch.Tensor, batch_size: int = 50):
    for images, kind in ((real, True), (generated, False)):
        for batch in images.split(batch_size):
            metrics.update(batch, real=kind)
    return metrics.compute()


class TestFrechetDistance:
    def test_exact_and_independent_of_batches(self):
        """Against scipy's matrix square root, in float64: the same to 12 digits far from the origin."""
        rng = np.random.default_rng(1)
        sets = [1e3 + rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) for _ in range(2)]
        means, covariances = zip(*((x.mean(axis=0), np.cov(x, rowvar=False)) for x in sets))
        root = linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
        for batch_size in (7, 40):
            values, _ = measure(SetMetrics(lambda x: x), *map(torch.from_numpy, sets), batch_size)
            assert values["frechet_distance"] == pytest.approx(expected, rel=1e-7)


class TestInceptionScore:
    def test_agrees_with_the_definition(self):
        values, _ = measure(SetMetrics(colour_and_logits), pictures(0, 60), pictures(1, 60))
        logits = colour_and_logits(pictures(0, 60))[1].numpy()
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        probabilities = probabilities[np.random.RandomState(2020).permutation(60)]
        scores = []
        for part in probabilities.reshape(10, 6, 3):
            scores.append(math.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
        assert values["inception_score"] == pytest.approx(np.mean(scores), rel=1e-9)

    def test_needs_ten_pictures(self):
        values, missing = measure(SetMetrics(colour_and_logits), pictures(0, 9), pictures(1, 9))
        assert set(values) == {"frechet_distance"}
        assert missing == {"inception_score": "needs 10 pictures, has 9"}


class TestPrecisionRecall:
    def test_agrees_with_the_definition(self):
        """A point is covered if it lies within the distance of some point of the other set to its 3rd neighbour."""
        generated, real = pictures(0, 40, std=10), pictures(1, 50, mean=140)
        values, _ = measure(SetMetrics(mean_colour, precision_recall=True), generated, real)
        sets = [mean_colour(x).numpy() for x in (generated, real)]

        def covered(points, others):
            radii = np.sort(np.linalg.norm(others[:, None] - others, axis=2), axis=1)[:, 3]
            return (np.linalg.norm(points[:, None] - others, axis=2) <= radii).any(axis=1).mean()

        expected = {"precision": covered(*sets), "recall": covered(*sets[::-1])}
        assert values["precision"] == pytest.approx(expected["precision"], abs=1e-6)
        assert values["recall"] == pytest.approx(expected["recall"], abs=1e-6)
        assert expected["precision"] - expected["recall"] > 0.2  # the generated ones are fewer kinds

    def test_needs_four_pictures(self):
        _, missing = measure(SetMetrics(mean_colour, precision_recall=True), pictures(0, 3), pictures(1, 9))
        assert missing["recall"] == "needs 4 real and generated pictures, has 9 and 3"


class TestSetMetrics:
    def test_reset_keeps_the_real_ones(self):
        metrics = SetMetrics(colour_and_logits, precision_recall=True)
        measure(metrics, pictures(0, 30), pictures(1, 30))
        metrics.reset_generated()
        metrics.update(pictures(2, 20), real=False)
        fresh = measure(SetMetrics(colour_and_logits, precision_recall=True), pictures(2, 20), pictures(1, 30))
        assert metrics.compute() == fresh

    def test_nothing_to_measure(self):
        metrics = SetMetrics(mean_colour)
        metrics.update(pictures(0, 3), real=True)
        with pytest.raises(ValueError, match=r"\[\[3, 0\]\], but each needs some of both"):
            metrics.compute()


class TestDistributionMetrics:
    NETWORKS = {
        "inception": FeatureNetwork("tiny", colour_and_logits, "0"),
        "dino": FeatureNetwork("tiny", mean_colour, "1"),
        "i3d": FeatureNetwork("tiny", mean_colour, "2"),
    }

    def test_names_and_frames(self):
        metrics = DistributionMetrics(self.NETWORKS, "g", precision_recall=True)
        for seed in (0, 1):
            metrics.update(pictures(seed, 40).unflatten(0, (-1, 2)).transpose(1, 2), bool(seed))  # (20, 3, 2, ...)
        values, missing = metrics.compute()
        assert set(values) == {"gFID", "gIS", "gFDD", "gFVD", "precision", "recall"} and not missing
        of_frames, _ = measure(SetMetrics(mean_colour), pictures(0, 40), pictures(1, 40))
        assert values["gFID"] == values["gFDD"] == pytest.approx(of_frames["frechet_distance"])
        assert values["gFVD"] != pytest.approx(values["gFID"], rel=0.01)

    def test_pictures_have_no_fvd(self):
        metrics = DistributionMetrics(self.NETWORKS, "r")
        for seed in (0, 1):
            metrics.update(pictures(seed, 20)[:, :, None], bool(seed))
        values, missing = metrics.compute()
        assert set(values) == {"rFID", "rIS", "rFDD"}
        assert missing == {"rFVD": "of clips only: these are pictures"}


def measure_share(path: str) -> None:
    """Of two processes, the first has 25 pictures and the second 15."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    share = slice(0, 25) if state.process_index == 0 else slice(25, 40)
    metrics = SetMetrics(colour_and_logits, precision_recall=True)
    values, _ = measure(metrics, pictures(0, 40)[share], pictures(1, 40, mean=140)[share], 10)
    rows = gather_rows(torch.arange(40)[share].view(-1, 1))
    torch.save((state.num_processes, values, rows), f"{path}.{state.process_index}")


def test_two_processes_measure_as_one(tmp_path):
    run_on_two_processes(measure_share, str(tmp_path / "x"))
    whole = SetMetrics(colour_and_logits, precision_recall=True)
    expected, _ = measure(whole, pictures(0, 40), pictures(1, 40, mean=140))
    for rank in (0, 1):
        num_processes, values, rows = torch.load(tmp_path / f"x.{rank}")
        assert num_processes == 2 and torch.equal(rows, torch.arange(40).view(-1, 1))
        assert values == pytest.approx(expected, rel=1e-9)
