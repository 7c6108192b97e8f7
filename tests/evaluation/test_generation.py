import pytest
import torch

from tests.dit import make_pipeline
from vitok_hf.evaluation.features import Classifier
from vitok_hf.evaluation.generation import classify, generate_samples, nearest_neighbours, resize_all


def pictures(count, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


def test_samples_do_not_depend_on_the_batch():
    pipe = make_pipeline()
    options = {"num_inference_steps": 3, "seed": 5}
    whole = generate_samples(pipe, [0, 4, 4], **options)
    parts = generate_samples(pipe, [0, 4, 4], batch_size=2, **options)
    assert whole.dtype == torch.uint8 and whole.shape == (3, 3, 32, 32)
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert not torch.equal(whole[1], whole[2])  # another seed
    generator = torch.Generator().manual_seed(6)
    again = pipe([4], generator=generator, num_inference_steps=3, output_type="np").images[0]
    assert (torch.from_numpy(again * 255).round().int() - whole[1].permute(1, 2, 0).int()).abs().max() <= 1


def test_resize():
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    flat[1] = 200
    small = resize_all(flat, 8)
    assert small.shape == (2, 3, 8, 8) and small.dtype == torch.uint8
    assert small[0].unique().tolist() == [77] and small[1].unique().tolist() == [200]


def test_classify():
    torch.manual_seed(0)
    classifier, images = Classifier(["a", "b", "c"]).eval(), pictures(5)
    with torch.no_grad():
        assert torch.equal(classify(images, classifier, batch_size=2), classifier(images).argmax(dim=1))


class TestNeighbours:
    def test_finds_copies_and_mirror_images(self):
        references = pictures(6)
        images = torch.stack([references[4], references[2].flip(-1), references[0]])
        distances, indices = nearest_neighbours(images, references, side=16)
        assert indices.tolist() == [4, 2, 0]
        assert distances.abs().max() < 0.5

    @pytest.mark.parametrize("difference", [3, 40])
    def test_is_in_grey_levels(self, difference):
        references = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
        distances, _ = nearest_neighbours(references + difference, references, side=4)
        assert distances.item() == pytest.approx(difference, abs=0.01)
