"""What `examples/build_web_page.py` writes, without the exports, whose files are written by `export`."""

import gzip
import json
from pathlib import Path

import build_web_page
import pytest

from tests.test_web_page import build


class TestBuild:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        def export(command, arguments):
            option, name, *_, target = arguments
            assert command == "export-onnx" and (option == "--pipeline") == (name == "vitok-dit-emoji")
            Path(target).mkdir(parents=True, exist_ok=True)
            for part, size in (("encoder", 1), ("decoder", 20), ("transformer", 300)):
                Path(target, f"{part}.onnx").write_bytes(bytes(size))
            channels = 1 if "grey" in name else 3
            Path(target, "model.json").write_text(json.dumps({"in_channels": channels, "temporal_patch_size": 1}))

        (tmp_path / "dist").mkdir()
        for name in build_web_page.RUNTIME:
            (tmp_path / "dist" / name).write_text(name)
        monkeypatch.setattr(build_web_page, "start", export)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_other_autoencoders(self, folder):
        build("--autoencoders", "vitok-tiny-f8x8", "mine/dial", "--onnxruntime_dir", "dist")
        content = json.loads((folder / "page" / "page.json").read_text())
        names = {"vitok-tiny-f8x8": "models/vitok-tiny-f8x8", "dial": "models/dial"}
        assert content["autoencoders"] == names and content["generator"] == "models/vitok-dit-emoji"
        assert content["bytes"]["generator"] - content["bytes"]["autoencoder"] == 299
        assert (
            (folder / "page" / "README.md").read_text().startswith("---\ntitle: ViTok in the browser\nsdk: static\n")
        )
        cards = (folder / "page" / "models" / "README.md").read_text()
        for name in ("vitok-dit-emoji", "vitok-tiny-f8x8"):  # that of the autoencoder goes along with the pipeline
            assert f"({name}/README.md)" in cards and (folder / "page" / "models" / name / "README.md").is_file()
        packed = folder / "page" / "onnxruntime" / f"{build_web_page.RUNTIME[-1]}.gz"
        assert gzip.decompress(packed.read_bytes()).decode() == build_web_page.RUNTIME[-1]
        assert "MIT" in (folder / "page" / "onnxruntime" / "LICENSE.txt").read_text()

    def test_pictures_are_in_colour(self):
        with pytest.raises(ValueError, match="mine/grey has 1 channels and 1 frames a latent"):
            build("--autoencoders", "mine/grey", "--onnxruntime_dir", "dist")
