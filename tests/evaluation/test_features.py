import pytest
import torch

from vitok_hf.clips import fold_frames
from vitok_hf.evaluation.distributions import frechet_distance
from vitok_hf.evaluation.features import Classifier


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return Classifier(["cat", "dog", "a b"]).eval()


def pictures(seed: int, count: int = 40, mean: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-60, 60, (count, 3, 1, 32, 32), generator=generator)
    return (mean + noise).to(torch.uint8)


class TestClassifier:
    @torch.no_grad()
    def test_shapes(self, classifier):
        images = fold_frames(pictures(0, 2))
        features = classifier.features(images)
        assert features.shape == (2, classifier.num_features)
        torch.testing.assert_close(classifier(images), classifier.network.fc(features))

    @torch.no_grad()
    def test_save_and_load(self, classifier, tmp_path):
        classifier.save(tmp_path / "x.safetensors")
        loaded = Classifier.load(tmp_path / "x.safetensors")
        assert loaded.class_names == ["cat", "dog", "a b"] and not loaded.training
        images = fold_frames(pictures(0, 2))
        torch.testing.assert_close(loaded(images), classifier(images))


class TestDistance:
    def test_is_that_of_the_features(self, classifier):
        sets = [pictures(1), pictures(2, mean=140)]
        with torch.no_grad():
            expected = frechet_distance(*(classifier.features(fold_frames(images)) for images in sets))
        assert classifier.distance(*sets, batch_size=16) == pytest.approx(expected, rel=1e-3) and expected > 1e-3
        assert classifier.distance(*sets[:1] * 2) < 1e-3

    def test_needs_two(self, classifier):
        with pytest.raises(ValueError, match=r"sets of two or more, but they have \(1, 40\)"):
            classifier.distance(pictures(1, 1), pictures(1))
