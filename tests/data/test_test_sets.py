import csv
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.conftest import make_vae
from tests.data.conftest import write_noise
from vitok_hf.commands import evaluate
from vitok_hf.data import test_sets
from vitok_hf.data.held_out import EvaluationData, Protocol
from vitok_hf.data.items import Item
from vitok_hf.data.media import resize_then_crop
from vitok_hf.data.test_sets import TEST_SETS, NamedSet, open_test_set


CARD = """---
dataset_info:
  features: [{name: image, dtype: image}]
  splits: [{name: val, num_bytes: 9, num_examples: 6}, {name: test, num_bytes: 9, num_examples: 1}]
configs:
- {config_name: default, data_files: [{split: val, path: data/val-*}, {split: test, path: data/test-*}]}
---
"""


@pytest.fixture
def coco(hub, tmp_path, monkeypatch):
    """A Hub with a dataset of two splits: that of the test set has six pictures in two files."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(TEST_SETS, "coco-val2017", NamedSet("lmms-lab/COCO-Caption2017", "val", 6, "data/val-*"))
    folder = hub.root / "datasets" / "lmms-lab" / "COCO-Caption2017"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    files = write_noise(tmp_path / "pictures", 7, (40, 32))
    features = datasets.Features({"image": datasets.Image()})
    for name, part in (("val-0", files[:4]), ("val-1", files[4:6]), ("test-0", files[6:])):
        rows = datasets.Dataset.from_dict({"image": [str(file) for file in part]}, features=features)
        rows.to_parquet(folder / "data" / f"{name}.parquet")
    return hub


def test_the_published_sets():
    assert list(TEST_SETS) == evaluate.TEST_SETS
    for name, count in (("coco-val2017", 5000), ("imagenet-val", 50_000), ("div8k", 1500)):
        assert TEST_SETS[name].count == count
    with pytest.raises(ValueError, match='no test set "coco": choose from coco-val2017, imagenet-val, div8k'):
        open_test_set("coco")


class TestFromTheHub:
    def test_one_split_is_downloaded(self, coco, tmp_path):
        rows = open_test_set("coco-val2017")
        data = EvaluationData(rows, Protocol(None))
        expected = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "pictures").iterdir())[:6]]
        assert len(data) == 6
        assert all(np.array_equal(data[index][:, 0].permute(1, 2, 0), expected[index]) for index in range(6))
        parquets = [path for path in coco.downloads if path.endswith(".parquet")]
        assert len(parquets) == 2 and not any("test-0" in path for path in parquets)
        assert len(open_test_set("coco-val2017", first=5)) == 5

    def test_another_number_of_pictures(self, coco, monkeypatch):
        monkeypatch.setitem(TEST_SETS, "coco-val2017", NamedSet("lmms-lab/COCO-Caption2017", "val", 7, "data/val-*"))
        with pytest.raises(ValueError, match="has 6 pictures in its split val, but coco-val2017 has 7"):
            open_test_set("coco-val2017")

    @pytest.mark.parametrize("protocol", ["default", "vitok-v2"])
    def test_evaluate(self, coco, tmp_path, monkeypatch, protocol, capsys):
        monkeypatch.chdir(tmp_path)
        make_vae("v1").save_pretrained("model")
        options = ["--test_set", "coco-val2017", "--resolution", "24", "--networks", "--num_examples", "1"]
        evaluate.run(evaluate.parse(["--models", "model", "--protocol", protocol, *options], "evaluate"))
        out = capsys.readouterr().out
        assert "coco-val2017, 6 pictures" in out
        assert ("Crop and filter are those of ViTok-v2; it compares values that" in out) == (protocol == "vitok-v2")
        folder = tmp_path / "evaluation" / "coco-val2017"
        (result,) = json.loads((folder / "results.json").read_text())
        assert result["protocol"]["crop"].endswith("of the resized picture") == (protocol == "vitok-v2")
        (row,) = csv.DictReader(open(folder / "table.csv", newline=""))
        assert row["num_items"] == "6"

    def test_the_first_pictures_for_vitok_v2(self, coco, monkeypatch):
        asked = []
        monkeypatch.setattr(test_sets, "open_test_set", lambda *args: asked.append(args))
        for protocol in ("default", "vitok-v2"):
            args = evaluate.parse(["--models", "x", "--test_set", "div8k", "--protocol", protocol], "evaluate")
            evaluate.open_sources(args, Protocol())
        assert [args[2] for args in asked] == [None, 5000]


class TestProtocol:
    def test_as_torchvision_crops(self):
        transform = v2.Compose([v2.Resize(24, v2.InterpolationMode.BICUBIC), v2.CenterCrop(24)])
        for height, width in ((97, 131), (64, 48), (20, 33), (24, 24)):
            pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            expected = np.asarray(transform(Image.fromarray(pixels)))
            assert np.array_equal(resize_then_crop(pixels, 24), expected)

    def test_it_differs_from_ours(self, tmp_path):
        (file,) = write_noise(tmp_path, 1, (130, 97))
        ours, theirs = (EvaluationData([Item("x", file)], p)[0] for p in (Protocol(24), Protocol.vitok_v2(24)))
        assert ours.shape == theirs.shape == (3, 1, 24, 24) and not torch.equal(ours, theirs)
        assert Protocol.vitok_v2().differences(Protocol()) == ["crop", "resize_filter"]
        assert Protocol.vitok_v2().resolution == 256

    def test_unknown_crops(self):
        with pytest.raises(ValueError, match='no `crop` "corner": choose from central square, central'):
            EvaluationData([Item("x", None)], Protocol(crop="corner"))

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--test_set", "div8k", "--num_frames", "4"], "a --test_set has pictures, and no clips"),
            (["--data_dir", "x", "--num_frames", "4"], "--protocol vitok-v2 is of pictures of one --resolution"),
            (["--data_dir", "x", "--resolution", "0"], "--protocol vitok-v2 is of pictures of one --resolution"),
            (["--data_dir", "x", "--test_set", "div8k"], "give either --data_dir or --dataset_name or --test_set"),
        ],
    )
    def test_what_does_not_go_together(self, options, message, capsys):
        with pytest.raises(SystemExit):
            evaluate.parse(["--models", "x", "--protocol", "vitok-v2", *options], "evaluate")
        assert message in capsys.readouterr().err
