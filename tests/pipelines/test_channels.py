"""Generators on the latents of models of grey, RGBA and more channels."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY
from tests.dit import ID2LABEL, make_pipeline
from tests.training.dit import make_dit_arguments, run
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline
from vitok_hf.clips import to_picture
from vitok_hf.commands import main
from vitok_hf.data.latent_cache import LatentCache


def make(channels: int, **config) -> ViTokDiTPipeline:
    pipe = make_pipeline(**config)
    torch.manual_seed(0)
    vae = AutoencoderViTok(**pipe.vae.config | {"in_channels": channels, "_class_name": None}).eval()
    return ViTokDiTPipeline(pipe.transformer, vae, pipe.scheduler, ID2LABEL)


def draw(pipe: ViTokDiTPipeline, output_type: str):
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "return_dict": False}
    return pipe(["cat", "dog"], output_type=output_type, **options)[0]


class TestOutputs:
    @pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
    def test_pictures(self, channels, mode):
        pipe = make(channels)
        pictures, pixels = draw(pipe, "pil"), draw(pipe, "np")
        assert [picture.mode for picture in pictures] == [mode] * 2 and pixels.shape == (2, 32, 32, channels)
        for picture, array in zip(pictures, (pixels * 255).round().astype(np.uint8)):
            assert np.array_equal(picture, to_picture(array))  # RGBA: not premultiplied

    def test_more_channels_than_pillow_has(self):
        pipe = make(5)
        assert draw(pipe, "pt").shape == (2, 5, 32, 32)
        with pytest.raises(ValueError, match='is "pil", but the autoencoder has in_channels 5.*take "np" or "pt"'):
            draw(pipe, "pil")

    def test_videos(self):
        assert draw(make(1, kind="video"), "pil")[0][0].mode == "L"
        pipe = make(4, kind="video")
        assert draw(pipe, "pt").shape == (2, 4, 4, 32, 32)
        with pytest.raises(ValueError, match="of which Pillow makes no frames"):
            draw(pipe, "pil")


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA"), (5, "RGB")])
def test_generate(tmp_path, monkeypatch, channels, mode, capsys):
    monkeypatch.chdir(tmp_path)
    make(channels).save_pretrained("pipe")
    options = ("--model", "pipe", "--num_images_per_label", "2", "--num_inference_steps", "2", "--class_labels", "cat")
    main("generate", *options)
    picture = Image.open("samples.png")
    assert picture.mode == mode and picture.size == (64, 32)
    with pytest.raises(SystemExit):
        main("generate", *options, "--save_npz", "x.npz")
    assert f"--save_npz holds RGB, but pipe makes pictures of {channels} channels" in capsys.readouterr().err


@pytest.mark.parametrize("channels, cached", [(1, False), (4, True), (5, False)])
def test_training(tmp_path, channels, cached):
    """On data of these channels, encoded on the fly or beforehand; samples are shown while it trains."""
    rng = np.random.default_rng(0)
    for split, name in (("data", "cat"), ("data", "dog"), ("held_out", "cat"), ("held_out", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 256, (channels, 24, 24), dtype=np.uint8)
            np.save(tmp_path / split / name / f"{index}.npy", pixels)
    args = make_dit_arguments(tmp_path, TINY | {"in_channels": channels})
    if cached:
        cache, vae = str(tmp_path / "cache"), str(tmp_path / "vae")
        source = ("--vae_name_or_path", vae, "--train_data_dir", *args.train_data_dir, "--resolution", "16")
        main("cache-latents", *source, "--output_dir", cache, "--num_workers", "0")
        assert len(LatentCache(cache)) == 6
        args = make_dit_arguments(tmp_path, vae, latents_dir=cache)
    run(args)
    (file,) = (tmp_path / "run" / "samples").glob("samples*_0000004.png")
    grid = np.asarray(Image.open(file))
    assert grid.shape == (2 * 16, 2 * 16, 3)
    pipe = ViTokDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert draw(pipe, "pt").shape == (2, channels, 16, 16)
