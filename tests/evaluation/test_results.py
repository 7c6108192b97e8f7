import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from vitok_hf.data.held_out import Protocol
from vitok_hf.evaluation.results import (
    Result,
    bootstrap_interval,
    check_comparable,
    load_results,
    save_results,
)
from vitok_hf.evaluation.tables import markdown_table, write_csv


INCEPTION = {"inception": {"name": "inception-v3-compat", "sha256": "ab"}}


def make_result(name: str = "model", protocol: Protocol | None = None, **overrides) -> Result:
    values = {
        "data": "film",
        "num_items": 4,
        "data_sha256": "cd",
        "metrics": {"psnr": 31.394, "rFID": 4.5},
        "intervals": {"psnr": (30.1, 32.0)},
        "unavailable": {"lpips": "no weights: no network"},
        "costs": {"parameters_M": 12.6},
    }
    return Result(name=name, protocol=protocol or Protocol(networks=INCEPTION), **values | overrides)


class TestProtocol:
    @pytest.mark.parametrize(
        "change, name",
        [
            ({"resolution": 512}, "resolution"),
            ({"num_frames": 16}, "num_frames"),
            ({"fps": 8.0}, "fps"),
            ({"crop": "none"}, "crop"),
            ({"resize_filter": "bilinear"}, "resize_filter"),
            ({"value_range": "0 to 1"}, "value_range"),
            ({"rounding": "none"}, "rounding"),
            ({"averaging": "over all pixels"}, "averaging"),
            ({"statistics": "float32"}, "statistics"),
            ({"networks": {"inception": {"name": "inception-v3-compat", "sha256": "ef"}}}, "networks.inception"),
        ],
    )
    def test_other_protocols_are_refused(self, change, name):
        other = make_result("other", replace(make_result().protocol, **change))
        check_comparable([make_result(), make_result("same")])
        with pytest.raises(ValueError, match=rf'"model" and "other" cannot be compared.*protocol\.{name} \('):
            markdown_table([make_result(), make_result("same"), other])

    def test_other_pictures_are_refused(self):
        with pytest.raises(ValueError, match="num_items .4 and 5.; data_sha256 .cd and ef."):
            check_comparable([make_result(), make_result("other", num_items=5, data_sha256="ef")])

    def test_a_network_that_one_lacks_is_no_difference(self):
        check_comparable([make_result(), make_result("other", Protocol(), metrics={"psnr": 30.0})])

    def test_protocols_of_other_versions_are_refused(self):
        values = asdict(make_result())
        del values["protocol"]["rounding"]
        values["protocol"]["gamma"] = 2.2
        with pytest.raises(ValueError, match="differ in the fields gamma, rounding: measure again"):
            Result.from_dict(values)

    def test_whole_pictures(self):
        assert Protocol(resolution=None).crop == Protocol(resolution=None).resize_filter == "none"
        with pytest.raises(ValueError, match="`resolution` is 0, but must be positive"):
            Protocol(resolution=0)


class TestFiles:
    def test_json_round_trip(self, tmp_path):
        results = [make_result(), make_result("other", Protocol(resolution=None, num_frames=16, fps=8.0))]
        save_results(tmp_path / "results.json", results)
        assert load_results(tmp_path / "results.json") == results
        assert json.loads((tmp_path / "results.json").read_text())[0]["protocol"]["networks"] == INCEPTION

    @pytest.mark.parametrize("text, message", [("[{", "is no JSON file"), ('[{"name": "x"}]', "holds no results")])
    def test_other_files(self, tmp_path, text, message):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=f'other.json" {message}'):
            load_results(tmp_path / "other.json")

    def test_markdown(self):
        lines = markdown_table([make_result(), make_result("other", metrics={"psnr": 30.0}, costs={})]).splitlines()
        assert lines[0] == "|  | psnr | rFID | parameters_M |" and lines[1] == "|---|---|---|---|"
        assert lines[2] == "| model | 31.39 [30.10, 32.00] | 4.500 | 12.6 |"
        assert lines[3] == "| other | 30.00 [30.10, 32.00] |  |  |"
        assert lines[5:] == ["No lpips: no weights: no network."]

    def test_other_numbers_of_the_same_name(self):
        dino = Protocol(networks={"dino": {"name": "Dinov2Model 1024, class token, bicubic to 224", "sha256": ""}})
        line = "rFDD is of Dinov2Model 1024, class token, bicubic to 224; that of ViTok-v2, of DINOv3-B at 512 px on"
        table = markdown_table([make_result(metrics={"rFDD": 1.0}, protocol=dino)] * 2)
        assert table.count(line) == 1 and "Crop and filter" not in table
        theirs = markdown_table([make_result(protocol=Protocol.vitok_v2())])
        assert "Crop and filter are those of ViTok-v2" in theirs and "rFDD" not in theirs

    def test_protocols_of_before_had_three_channels(self):
        values = asdict(make_result())
        del values["protocol"]["channels"]
        assert Result.from_dict(values) == make_result()

    def test_csv(self, tmp_path):
        write_csv(tmp_path / "table.csv", [make_result(), make_result("other", intervals={})])
        with open(tmp_path / "table.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["psnr"] == "31.394" and rows[0]["psnr_low"] == "30.1" and rows[1]["psnr_low"] == ""
        assert rows[1]["name"] == "other" and rows[1]["parameters_M"] == "12.6"


class TestBootstrap:
    def test_covers_the_mean(self):
        """As wide as the normal approximation says, and reproducible."""
        values = torch.from_numpy(np.random.default_rng(0).normal(30.0, 2.0, 400))
        low, high = bootstrap_interval(values)
        half = 1.96 * values.std().item() / 20
        assert low == pytest.approx(values.mean().item() - half, abs=0.03)
        assert high == pytest.approx(values.mean().item() + half, abs=0.03)
        assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)

    @pytest.mark.parametrize("values", [[1.0], [1.0, float("inf")]])
    def test_refuses(self, values):
        with pytest.raises(ValueError, match="two or more values, all finite"):
            bootstrap_interval(torch.tensor(values))
