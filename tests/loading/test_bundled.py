import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from evaluate_demo import patch_border_ratio, reconstruct_in_tiles

import vitok_hf
from tests.conftest import ASSETS, assert_close, make_vae
from tests.models.test_diffusers_features import INT8
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline, loading
from vitok_hf.clips import to_float
from vitok_hf.data.files import list_files
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.media import load_image
from vitok_hf.evaluation.autoencoders import load_autoencoder
from vitok_hf.evaluation.generation import generate_samples
from vitok_hf.evaluation.metrics import psnr
from vitok_hf.evaluation.reconstruction import reconstruct


def test_list():
    assert {"vitok-tiny-f8x8", "vitok-dial-f8x16", "vitok-dit-emoji"} <= set(vitok_hf.list_bundled())


def test_names(tmp_path, monkeypatch):
    """Other names are left to diffusers; folders go before bundled ones."""
    assert loading.resolve_bundled("owner/name") == "owner/name"
    assert loading.resolve_bundled(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert Path(loading.resolve_bundled(Path("vitok-tiny-f8x8"))).is_dir()
    Path("vitok-tiny-f8x8").mkdir()
    assert loading.resolve_bundled("vitok-tiny-f8x8") == "vitok-tiny-f8x8"


class TestStandIn:
    """A folder without weights that names a bundled model."""

    @pytest.fixture
    def copy(self, tmp_path):
        """A copy of the bundled pipeline, and a function that changes the config of its autoencoder."""
        shutil.copytree(loading.resolve_bundled("vitok-dit-emoji"), tmp_path / "copy")
        path = tmp_path / "copy" / "vae" / "config.json"

        def change(**values):
            config = json.loads(path.read_text()) | values
            path.write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))

        return tmp_path / "copy", change

    @pytest.mark.parametrize(
        "key, value, bundled",
        [("latents_std", [9.0] * 8, r"\[1.287\d*, .*\]"), ("mlp_ratio", "left out", "2.6")],
    )
    def test_a_config_that_differs(self, copy, key, value, bundled):
        folder, change = copy
        change(**{key: value})
        shown = None if value == "left out" else re.escape(str(value))
        message = f'takes those of the bundled "vitok-tiny-f8x8".* differ: {key} is {shown}, bundled {bundled}'
        for load in (ViTokDiTPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
            with pytest.raises(ValueError, match=message):
                load(folder)
        for place in ({"subfolder": "vae"}, {}):
            with pytest.raises(ValueError, match=message):
                AutoencoderViTok.from_pretrained(folder if place else folder / "vae", **place)

    def test_only_the_key_counts(self, copy):
        """Not the name that diffusers notes, nor that of the folder."""
        folder, change = copy
        change(_name_or_path="elsewhere", sample_frames=1)
        (folder / "vae").rename(folder / "autoencoder")
        assert AutoencoderViTok.from_pretrained(folder, subfolder="autoencoder").config.latents_std[0] > 1.28
        (folder / "autoencoder").rename(folder / "vae")
        change(_name_or_path="vitok-tiny-f8x8", _bundled="left out")
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            AutoencoderViTok.from_pretrained(folder, subfolder="vae")
        change(_bundled="vitok-tiny")
        with pytest.raises(ValueError, match=r'has "_bundled": "vitok-tiny" .* there is only \[.*"?vitok-tiny-f8x8'):
            AutoencoderViTok.from_pretrained(folder, subfolder="vae")

    def test_weights_go_first(self, copy):
        folder, change = copy
        make_vae("v1").save_pretrained(folder / "vae")
        change(_bundled="vitok-tiny-f8x8")
        assert AutoencoderViTok.from_pretrained(folder, subfolder="vae").config.latent_channels == 4


class TestPlaces:
    @pytest.fixture
    def folder(self, tmp_path):
        make_vae("v1").save_pretrained(tmp_path)
        make_vae("v1", latents_mean=[3.0] * 4).save_pretrained(tmp_path / "vae")
        return tmp_path

    @pytest.mark.parametrize("load", [AutoencoderViTok.from_pretrained, load_autoencoder])
    def test_a_subfolder_that_is_not_there(self, folder, load):
        assert load(folder, subfolder="vae").config.latents_mean == [3.0] * 4
        with pytest.raises(ValueError, match=r"""has no folder "vea": `subfolder` may be one of \['vae'\]"""):
            load(folder, subfolder="vea")

    @pytest.mark.parametrize("load", [AutoencoderViTok, ViTokDiTModel])
    def test_a_pipeline_is_no_model(self, load):
        with pytest.raises(ValueError, match=r"""is a pipeline: .* by `subfolder`, one of \['transformer', 'vae'\]"""):
            load.from_pretrained("vitok-dit-emoji")


# what the checkpoint reaches at 256 pixels, in dB
PSNR = {"astronaut": 26.67, "chelsea": 30.82, "coffee": 29.37, "rocket": 30.69}


@pytest.fixture(scope="module")
def vae():
    return AutoencoderViTok.from_pretrained("vitok-tiny-f8x8")


@pytest.fixture(scope="module")
def photographs():
    return load_evaluation_images(ASSETS, 256, 4)


@pytest.fixture(scope="module")
def reconstructions(vae, photographs):
    return reconstruct(vae, photographs)


class TestTiny:
    def test_needs_no_network(self, hub):
        AutoencoderViTok.from_pretrained("vitok-tiny-f8x8")
        ViTokDiTPipeline.from_pretrained("vitok-dit-emoji")
        assert hub.requests == []

    def test_reconstructs_photographs(self, photographs, reconstructions):
        assert [file.stem for file in list_files(ASSETS)] == list(PSNR)
        assert (psnr(reconstructions, photographs) > torch.tensor(list(PSNR.values())) - 0.1).all()

    def test_latents_have_the_recorded_statistics(self, vae, photographs):
        with torch.no_grad():
            latents = vae.encode(photographs.float() / 127.5 - 1.0).latent_dist.mode()
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        normalized = (latents - mean) / std
        assert normalized.mean().abs() < 0.3
        assert 0.6 < normalized.std() < 1.6

    def test_quality_does_not_depend_on_the_size(self, vae):
        image = torch.from_numpy(load_image(ASSETS / "astronaut.png").copy()).permute(2, 0, 1)[None, :, None]
        values = {}
        for height, width in ((64, 64), (128, 512)):
            tiles = reconstruct_in_tiles(vae, image, height, width)
            values[height, width] = psnr(tiles, image).item()
            assert patch_border_ratio(image, tiles, 8) < 1.15
        assert min(values.values()) > values[64, 64] - 0.2

    @pytest.mark.parametrize("precision, loss", [("float16", 0.01), ("bfloat16", 0.05), ("int8", 0.1), ("fp8", 0.1)])
    def test_decibels_that_a_precision_costs(self, precision, loss):
        image = torch.from_numpy(load_image(ASSETS / "astronaut.png")[128:384, 128:384].copy())
        image = image.permute(2, 0, 1)[None, :, None]
        arguments = {"int8": INT8, "fp8": {}}.get(precision) or {"torch_dtype": getattr(torch, precision, None)}
        reference = AutoencoderViTok.from_pretrained("vitok-tiny-f8x8")
        vae = AutoencoderViTok.from_pretrained("vitok-tiny-f8x8", **arguments)
        if precision == "fp8":
            vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
        assert psnr(reconstruct(vae, image), image) > psnr(reconstruct(reference, image), image) - loss


class TestDial:
    """The bundled `vitok-dial-f8x16`, whose codes can be cut to 2, 4 or 8 channels."""

    @pytest.fixture(scope="class")
    def vae(self):
        return AutoencoderViTok.from_pretrained("vitok-dial-f8x16")

    @pytest.fixture(scope="class")
    def images(self):
        return load_evaluation_images(ASSETS, 128, 7)

    @pytest.fixture(scope="class")
    def values(self, vae, images):
        """PSNR, (lengths, pictures)."""
        counts = vae.config.channel_counts
        return torch.stack([psnr(reconstruct(vae, images, lengths={"num_channels": n}), images) for n in counts])

    def test_every_picture_gains_with_every_length(self, vae, values):
        assert vae.config.channel_counts == [2, 4, 8, 16]
        assert (values.diff(dim=0) > 0.5).all()

    def test_the_shortest_code_that_reaches_a_quality(self, vae, images, values):
        """As trying all lengths finds it, and as few as none or all channels where that is so."""
        with torch.no_grad():
            codes = vae.encode(to_float(images[:, :, 0]), min_psnr=24.0).latent_dist.mode()
        reached = (values >= 24.0).int()
        places = torch.where(reached.any(dim=0), reached.argmax(dim=0), len(reached) - 1)
        assert [len(code) for code in codes] == [vae.config.channel_counts[place] for place in places]
        assert len(set(places.tolist())) > 1


class TestGenerator:
    """The bundled `vitok-dit-emoji`."""

    @pytest.fixture(scope="class")
    def pipe(self):
        pipe = ViTokDiTPipeline.from_pretrained("vitok-dit-emoji")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_files(self):
        folder = Path(loading.resolve_bundled("vitok-dit-emoji"))
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40 * 2**20
        config = json.loads((folder / "vae" / "config.json").read_text())
        assert config.pop("_bundled") == "vitok-tiny-f8x8"
        assert config == json.loads(Path(loading.resolve_bundled("vitok-tiny-f8x8"), "config.json").read_text())

    def test_shares_the_autoencoder(self, pipe, vae):
        assert set(pipe.labels) == {"face", "hand", "person", "animal", "food", "transport", "place", "flag"}
        alone = AutoencoderViTok.from_pretrained("vitok-dit-emoji", subfolder="vae")
        assert pipe.vae.config.latents_mean == alone.config.latents_mean == vae.config.latents_mean
        for ours, theirs, others in zip(pipe.vae.parameters(), vae.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs) and torch.equal(others, theirs)

    def test_by_folder(self, vae, tmp_path, monkeypatch):
        """Whichever path leads there, and a copy."""
        folder = Path(loading.resolve_bundled("vitok-dit-emoji"))
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(folder.parent)
        for path in ("vitok-dit-emoji", "../checkpoints/vitok-dit-emoji", tmp_path / "copy", tmp_path / "link"):
            loaded = ViTokDiTPipeline.from_pretrained(path).vae
            by_diffusers = DiffusionPipeline.from_pretrained(path).vae
            alone = AutoencoderViTok.from_pretrained(path, subfolder="vae")
            direct = AutoencoderViTok.from_pretrained(Path(path, "vae"))
            for weights in (loaded, by_diffusers, alone, direct):
                assert torch.equal(weights.decoder.proj_out.weight, vae.decoder.proj_out.weight)

    def test_saves_all_of_it(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        assert "_bundled" not in json.loads((tmp_path / "vae" / "config.json").read_text())
        again = DiffusionPipeline.from_pretrained(tmp_path)
        options = {"class_labels": "flag", "num_inference_steps": 2, "output_type": "np", "return_dict": False}
        images = [p(generator=torch.Generator().manual_seed(0), **options)[0] for p in (pipe, again)]
        assert_close(images[0], images[1], atol=1e-4)

    def test_knows_its_classes(self, pipe):
        """Flags fill the picture, or nearly, and are of few colours; hands are on white, and of the colour of skin."""
        images = generate_samples(pipe, ["flag"] * 4 + ["hand"] * 4, num_inference_steps=10).float()
        corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # (8, 3, 4)
        assert (corners[4:] > 240).float().mean() > 0.9
        centres = images[4:, :, 40:88, 40:88].mean(dim=(0, 2, 3))
        assert centres[0] > centres[2] + 20  # more red than blue
