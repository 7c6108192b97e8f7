import numpy as np
import pytest
import torch
from PIL import Image
from studies.samples import NearestNeighbours, resize_all, save_samples, thumbnails

from tests.dit import NULL, make_pipeline, record_batches
from tests.faults.state import held_lock
from vitok_hf.evaluation.generation import generate_samples


def pictures(count, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 1, side, side), generator=generator).to(torch.uint8)


def test_resize():
    flat = torch.full((2, 3, 1, 32, 32), 77, dtype=torch.uint8)
    flat[1] = 200
    small = resize_all(flat, 8)
    assert small.shape == (2, 3, 8, 8) and small.dtype == torch.uint8
    assert small[0].unique().tolist() == [77] and small[1].unique().tolist() == [200]


class TestSaveSamples:
    def test_files(self, tmp_path):
        pipe = make_pipeline()
        save_samples(pipe, [0, 4, 4], tmp_path, batch_size=2, seed=5, num_inference_steps=3)
        files = [tmp_path / "cat" / "000000.png", tmp_path / "dog" / "000001.png", tmp_path / "dog" / "000002.png"]
        assert sorted(tmp_path.rglob("*.*")) == [tmp_path / ".lock", *files]
        expected = generate_samples(pipe, [0, 4, 4], seed=5, num_inference_steps=3)
        for file, image in zip(files, expected):
            assert np.abs(np.asarray(Image.open(file)).astype(int) - image.permute(1, 2, 0).numpy()).max() <= 1

    def test_makes_what_is_missing(self, tmp_path):
        pipe = make_pipeline()
        options = {"batch_size": 2, "num_inference_steps": 2}
        save_samples(pipe, [0, 0, 1, 1], tmp_path, **options)
        contents = {file: file.read_bytes() for file in tmp_path.rglob("*.png")}
        (tmp_path / "cat" / "000001.png").unlink()
        batches = record_batches(pipe)
        save_samples(pipe, [0, 0, 1, 1], tmp_path, **options)
        assert {label for batch in batches for label in batch} == {0, NULL} and len(batches) == 2
        assert {file: file.read_bytes() for file in tmp_path.rglob("*.png")} == contents

    def test_names_that_lead_out(self, tmp_path):
        """They come with a model, which may be anybody's."""
        for name in ("../../x", str(tmp_path / "x")):
            pipe = make_pipeline(id2label={0: name})
            with pytest.raises(ValueError, match=f'"{name}" is no name for files in .*, for it leads out of it'):
                save_samples(pipe, [0], tmp_path / "samples", num_inference_steps=1)
        assert not list(tmp_path.iterdir())

    def test_one_at_a_time(self, tmp_path):
        with held_lock(tmp_path) as child, pytest.raises(ValueError, match=f"is in use by process {child}"):
            save_samples(make_pipeline(), [0], tmp_path, num_inference_steps=1)


class TestNearestNeighbours:
    def test_finds_copies_and_mirror_images(self):
        references = pictures(6)
        images = torch.stack([references[4], references[2].flip(-1), references[0]])
        search = NearestNeighbours(thumbnails(images, 16))
        for start in (0, 4):  # their numbers are 10 to 15
            part = references[start : start + 4]
            search.update(thumbnails(part, 16), range(10 + start, 10 + start + len(part)))
        distances, indices = search.compute()
        assert indices.tolist() == [14, 12, 10]
        assert distances.abs().max() < 0.5

    def test_copies_among_many_are_at_no_distance(self):
        images = thumbnails(pictures(40))
        search = NearestNeighbours(images)
        search.update(images, range(40))
        distances, indices = search.compute()
        assert distances.max() < 1e-4 and indices.tolist() == list(range(40))

    @pytest.mark.parametrize("difference", [3, 40])
    def test_is_in_grey_levels(self, difference):
        references = torch.full((1, 3, 1, 32, 32), 100, dtype=torch.uint8)
        search = NearestNeighbours(thumbnails(references + difference))
        search.update(thumbnails(references), [0])
        assert search.compute()[0].item() == pytest.approx(difference, abs=0.01)
