"""The author's ViTok-v2 weights: golden numbers, loading from folders and from the Hub, errors, conversion."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.benchmark_loading import measure_loading, write_random_weights
from tests.conftest import GOLDEN, make_vae
from tests.faults.checkpoints import GOLDEN_VARIANT as VARIANT
from vitok_hf import AutoencoderViTok
from vitok_hf.commands import start
from vitok_hf.loading.strict import read_header
from vitok_hf.loading.vitok_v2 import find_variant, guess_variant
from vitok_hf.presets import V2_REPOSITORIES, variant_to_config
from vitok_hf.training.arguments import AutoencoderArguments
from vitok_hf.training.autoencoder_trainer import load_model


FILES = ["encoder.safetensors", "decoder.safetensors"]


@pytest.fixture
def golden_vae():
    return AutoencoderViTok.from_pretrained(GOLDEN, variant=VARIANT)


@pytest.fixture
def author_folder(tmp_path):
    """A copy that may be changed, without anything that a repository of the author does not have."""
    folder = tmp_path / "author"
    folder.mkdir()
    for file in FILES:
        shutil.copy(GOLDEN / file, folder)
    return folder


def assert_golden(vae):
    golden = load_file(GOLDEN / "io.safetensors")
    for index in range(2):
        with torch.no_grad():
            latents = vae.encode(golden[f"image_{index}"]).latent_dist.mode()
            sample = vae.decode(latents).sample
        tokens = latents.flatten(2).transpose(1, 2)  # row-major
        torch.testing.assert_close(tokens, golden[f"latent_tokens_{index}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(sample, golden[f"reconstruction_{index}"], rtol=0, atol=1e-5)


def change(folder, file, edit):
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def convert(*arguments):
    start("convert", [str(argument) for argument in arguments])


class TestParity:
    def test_golden_tensors(self):
        vae, info = AutoencoderViTok.from_pretrained(GOLDEN, variant=VARIANT, output_loading_info=True)
        assert_golden(vae)
        assert set(map(len, info.values())) == {0}

    def test_a_list_of_pictures(self, golden_vae):
        golden = load_file(GOLDEN / "io.safetensors")
        with torch.no_grad():
            samples = golden_vae([golden["image_0"][0], golden["image_1"][0]]).sample
        for index, sample in enumerate(samples):
            torch.testing.assert_close(sample, golden[f"reconstruction_{index}"][0], rtol=0, atol=1e-5)


class TestVariant:
    def test_repositories(self):
        assert len(V2_REPOSITORIES) == 9
        for name, variant in V2_REPOSITORIES.items():
            assert find_variant(f"philippehansen/{name}", None, {}) == variant
            config = variant_to_config(variant)
            assert name.endswith(f"-f{config['patch_size']}x{config['latent_channels']}")

    def test_size(self):
        with torch.device("meta"):
            vae = AutoencoderViTok.from_variant(V2_REPOSITORIES["ViTok-v2-5B-f16x64"])
        assert vae.num_parameters() / 1e6 == pytest.approx(4963, rel=0.02)

    def test_by_folder(self, author_folder, tmp_path):
        named = tmp_path / "models--someone--ViTok-v2-350M-f16x32" / "snapshots"
        assert find_variant(named, None, {}) == "Ld4-Ld24/1x16x32"
        assert find_variant("someone/all", "ViTok-v2-5B-f32x256", {}) == "Td4-T/1x32x256"
        assert find_variant("a/ViTok-v2-350M-f16x32", "ViTok-v2-5B-f32x256", {}) == "Td4-T/1x32x256"
        with pytest.raises(ValueError, match=f'variant="{VARIANT}"'):
            AutoencoderViTok.from_pretrained(author_folder)

    def test_part_of_a_name_tells_nothing(self):
        """A model of 4 x 8 x 8 pixels has the shapes of one of 1 x 16 x 16."""
        for name in ("-f16x64-video", "-f16x320", "-f16x64/runs/1/a"):
            with pytest.raises(ValueError, match="cannot be told from its name"):
                find_variant(f"someone/ViTok-v2-350M{name}", None, {"encoder": {}})
        with pytest.raises(ValueError, match="cannot be told from its name"):
            find_variant("someone/my-ViTok-v2-350M-f16x64", None, {"encoder": {}})

    @pytest.mark.parametrize("towers", [["encoder", "decoder"], ["encoder"], ["decoder"]])
    def test_guess(self, towers):
        guess = guess_variant({tower: read_header(GOLDEN / f"{tower}.safetensors") for tower in towers})
        config, expected = variant_to_config(guess), variant_to_config(VARIANT)
        names = [name for name in expected if name.split("_")[0] not in {"encoder", "decoder"} - set(towers)]
        assert {name: config[name] for name in names} == {name: expected[name] for name in names}


class TestOneSize:
    """Towers alike, which the author's grammar names once."""

    VARIANT = "w64_d2_h2/1x8x16"

    def test_loads_and_converts(self, tmp_path, capsys):
        twins = tmp_path / "twins"
        write_random_weights(twins, "w64_d2_h2-w64_d2_h2/1x8x16", torch.float32)
        vae = AutoencoderViTok.from_pretrained(twins, variant=self.VARIANT)
        assert (vae.config.encoder_num_layers, vae.config.decoder_num_layers) == (2, 2)
        with pytest.raises(ValueError, match=f'variant="{self.VARIANT}", which the shapes suggest'):
            AutoencoderViTok.from_pretrained(twins)
        convert(twins, "--dry_run", "--variant", self.VARIANT)
        assert "tensors fit" in capsys.readouterr().out
        convert(twins, tmp_path / "ours", "--variant", self.VARIANT)
        assert AutoencoderViTok.from_pretrained(tmp_path / "ours").config.decoder_hidden_size == 64
        with pytest.raises(ValueError, match=f'has a config.json.* leave out variant="{self.VARIANT}"'):
            AutoencoderViTok.from_pretrained(tmp_path / "ours", variant=self.VARIANT)

    def test_trains(self, tmp_path):
        args = AutoencoderArguments(variant=self.VARIANT, output_dir=str(tmp_path), report_to="none")
        assert load_model(args).config.encoder_num_attention_heads == 2


class TestLoading:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype(self, golden_vae, dtype):
        vae = AutoencoderViTok.from_pretrained(GOLDEN, variant=VARIANT, dtype=dtype)
        for name, parameter in golden_vae.named_parameters():
            assert torch.equal(vae.get_parameter(name), parameter.to(dtype)), name
        assert not vae.training and vae.config._name_or_path == str(GOLDEN)

    @pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto", "sequential"])
    def test_device_map(self, device_map):
        assert_golden(AutoencoderViTok.from_pretrained(GOLDEN, variant=VARIANT, device_map=device_map))

    def test_disk_offload(self, tmp_path):
        device_map = {"encoder": "cpu", "decoder": "disk"}
        vae = AutoencoderViTok.from_pretrained(GOLDEN, variant=VARIANT, device_map=device_map, offload_folder=tmp_path)
        assert vae.decoder.proj_in.weight.device.type == "meta"
        assert_golden(vae)

    def test_incomplete_device_map(self):
        with pytest.raises(ValueError, match="no device for every module"):
            AutoencoderViTok.from_pretrained(GOLDEN, variant=VARIANT, device_map={"encoder": "cpu"})

    @pytest.mark.parametrize("component", ["encoder", "decoder"])
    def test_component(self, golden_vae, author_folder, component):
        other = ({"encoder", "decoder"} - {component}).pop()
        (author_folder / f"{other}.safetensors").unlink()
        half = AutoencoderViTok.from_pretrained(author_folder, variant=VARIANT, component=component)
        expected = {name: x for name, x in golden_vae.state_dict().items() if name.startswith(component)}
        assert expected.keys() == half.state_dict().keys()
        assert all(torch.equal(x, half.state_dict()[name]) for name, x in expected.items())
        with pytest.raises(OSError, match=f'no {other}.safetensors .* component="encoder" or "decoder"'):
            AutoencoderViTok.from_pretrained(author_folder, variant=VARIANT)

    def test_memory(self, tmp_path):
        """No second copy: the weights, and little more than one tensor besides."""
        variant = "w1024_d1_h16-w1024_d6_h16/1x16x64"
        write_random_weights(tmp_path / "random", variant, torch.float32)
        run = measure_loading(tmp_path / "random", variant, "float32")
        assert run["weights"] > 300e6
        assert run["peak"] - run["before"] < 1.15 * run["weights"]


class TestErrors:
    @pytest.mark.parametrize(
        "edit, message",
        [
            (lambda x: x.pop("to_pixels.bias"), r"decoder.safetensors, to_pixels.bias: missing, expected \(192,\)"),
            (lambda x: x.update(extra=torch.zeros(2)), r"decoder.safetensors, extra: unexpected, \(2,\)"),
            (lambda x: x.update({"to_pixels.bias": torch.zeros(3)}), r"bias: expected \(192,\), found \(3,\)"),
        ],
    )
    def test_tensors(self, author_folder, edit, message):
        change(author_folder, "decoder.safetensors", edit)
        with pytest.raises(ValueError, match=message):
            AutoencoderViTok.from_pretrained(author_folder, variant=VARIANT)

    @pytest.mark.parametrize("variant", ["w64_d2_h2-w96_d3_h4/1x8x16", "w64_d2_h4-w96_d3_h4/1x16x16"])
    def test_wrong_variant(self, variant):
        with pytest.raises(ValueError, match=f'The shapes suggest variant="{VARIANT}"'):
            AutoencoderViTok.from_pretrained(GOLDEN, variant=variant)

    @pytest.mark.parametrize("size", [5, -4])
    def test_truncated_file(self, author_folder, size):
        path = author_folder / "encoder.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="encoder.safetensors cannot be read .* force_download=True"):
            AutoencoderViTok.from_pretrained(author_folder, variant=VARIANT)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"variant": "fp16"}, '`variant` must be their architecture .* but is "fp16"'),
            ({"variant": "Q-Q/1x16x64"}, 'Unknown size "Q"'),
            ({"variant": VARIANT, "component": "middle"}, "but is 'middle'"),
            (
                {"variant": VARIANT, "quantization_config": 1},
                "quantization_config: not possible .* Load them without, write them by `save_pretrained`",
            ),
            ({"variant": VARIANT, "low_cpu_mem_usage": False}, "low_cpu_mem_usage"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            AutoencoderViTok.from_pretrained(GOLDEN, **kwargs)


class TestConversion:
    def test_there_and_back(self, author_folder, tmp_path, capsys):
        convert(author_folder, tmp_path / "ours", "--variant", VARIANT, "--max_shard_size", "1MB")
        assert (tmp_path / "ours" / "diffusion_pytorch_model.safetensors.index.json").exists()
        vae = AutoencoderViTok.from_pretrained(tmp_path / "ours")
        assert_golden(vae)
        vae.fuse_qkv_projections()
        vae.save_pretrained(tmp_path / "fused")
        vae.half().save_pretrained(tmp_path / "ours", variant="fp16")  # besides, and not taken for the others
        for name in ("ours", "fused"):
            convert("--to_vitok_v2", tmp_path / name, tmp_path / f"{name}-back")
            for file in FILES:
                assert (tmp_path / f"{name}-back" / file).read_bytes() == (GOLDEN / file).read_bytes()

    def test_dtypes_are_kept(self, author_folder, tmp_path):
        def mix(tensors):
            for key in tensors:
                if "weight" in key:
                    tensors[key] = tensors[key].to(torch.bfloat16 if "qkv" in key else torch.float32)

        for file in FILES:
            change(author_folder, file, mix)
        convert(author_folder, tmp_path / "ours", "--variant", VARIANT)
        convert("--to_vitok_v2", tmp_path / "ours", tmp_path / "back")
        for file in FILES:
            original, back = load_file(author_folder / file), load_file(tmp_path / "back" / file)
            assert original.keys() == back.keys()
            assert all(x.dtype == back[key].dtype and torch.equal(x, back[key]) for key, x in original.items())

    def test_dtype_and_model_card(self, author_folder, tmp_path, monkeypatch):
        convert(author_folder, tmp_path / "ours", "--variant", VARIANT, "--license", "mit", "--dtype", "bfloat16")
        weights = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        card = (tmp_path / "ours" / "README.md").read_text()
        assert "license: mit" in card and "{" not in card
        monkeypatch.chdir(tmp_path)
        scope = {}
        exec(card.split("```python")[1].split("```")[0], scope)
        assert [x.shape for x in scope["reconstructions"]] == [(3, 250, 333), (3, 96, 64)]

    def test_dry_run(self, capsys):
        convert(GOLDEN, "--variant", VARIANT, "--dry_run")
        plan = capsys.readouterr().out
        assert "encoder_blocks.0.attn.qkv_proj.weight (192, 64)  ->  encoder.transformer_blocks.0.attn.to_q" in plan
        assert "All 48 tensors fit; 0.5 M parameters." in plan

    def test_differences(self, author_folder, tmp_path):
        change(author_folder, "decoder.safetensors", lambda tensors: tensors.pop("to_pixels.bias"))
        for dry_run in (["--dry_run"], []):
            with pytest.raises(ValueError, match="to_pixels.bias: missing"):
                convert(author_folder, tmp_path / "ours", "--variant", VARIANT, *dry_run)
        assert not (tmp_path / "ours").exists()

    def test_refuses_what_it_cannot_do(self, tmp_path):
        make_vae("v1").save_pretrained(tmp_path / "v1")
        with pytest.raises(ValueError, match="no ViTok-v2 architecture: parallel_blocks"):
            convert("--to_vitok_v2", tmp_path / "v1", tmp_path / "back")
        for name, value in (("channel_counts", [2, 4]), ("token_counts", [2]), ("num_latent_tokens", 2)):
            make_vae("v2", **{name: value}).save_pretrained(tmp_path / name)
            with pytest.raises(ValueError, match=f"no ViTok-v2 architecture: {name} differ"):
                convert("--to_vitok_v2", tmp_path / name, tmp_path / "back")
        make_vae("v2", causal=True, temporal_patch_size=2, sample_frames=3).save_pretrained(tmp_path / "causal")
        with pytest.raises(ValueError, match="no ViTok-v2 architecture: causal differ"):
            convert("--to_vitok_v2", tmp_path / "causal", tmp_path / "back")
        with pytest.raises(ValueError, match="exists already"):
            convert(GOLDEN, tmp_path / "v1", "--variant", VARIANT)
        with pytest.raises(ValueError, match="Give the folder to write to"):
            convert(GOLDEN, "--variant", VARIANT)


class TestHub:
    REPOSITORY = "someone/tiny"

    @pytest.fixture
    def repository(self, hub):
        folder = hub.root / self.REPOSITORY
        folder.mkdir(parents=True)
        for file in FILES:
            shutil.copy(GOLDEN / file, folder)
        return folder

    def offline(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def test_download(self, hub, repository, monkeypatch):
        assert_golden(AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT))
        assert sorted(hub.downloads) == sorted(FILES)
        self.offline(monkeypatch)
        assert_golden(AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT))

    def test_local_files_only(self, hub, repository, tmp_path):
        kwargs = {"variant": VARIANT, "cache_dir": tmp_path / "cache"}
        with pytest.raises(OSError, match="is not in the cache, and the Hub could not be asked"):
            AutoencoderViTok.from_pretrained(self.REPOSITORY, local_files_only=True, **kwargs)
        AutoencoderViTok.from_pretrained(self.REPOSITORY, **kwargs)
        requests = len(hub.requests)
        assert_golden(AutoencoderViTok.from_pretrained(self.REPOSITORY, local_files_only=True, **kwargs))
        assert len(hub.requests) == requests

    def test_component_downloads_half(self, hub, repository):
        AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT, component="encoder")
        assert hub.downloads == ["encoder.safetensors"]

    def test_converted(self, hub, monkeypatch, tmp_path):
        convert(GOLDEN, hub.root / "someone" / "converted", "--variant", VARIANT, "--max_shard_size", "1MB")
        assert_golden(AutoencoderViTok.from_pretrained("someone/converted"))
        self.offline(monkeypatch)
        assert_golden(AutoencoderViTok.from_pretrained("someone/converted"))

    def test_subfolder_revision_and_token(self, hub, tmp_path):
        folder = hub.root / self.REPOSITORY / "weights"
        shutil.copytree(GOLDEN, folder)
        commit, _ = hub.snapshot(self.REPOSITORY)
        hub.private[self.REPOSITORY] = "secret"
        kwargs = {"variant": VARIANT, "subfolder": "weights"}
        with pytest.raises(OSError, match="token"):
            AutoencoderViTok.from_pretrained(self.REPOSITORY, **kwargs)
        with pytest.raises(OSError, match="nowhere"):
            AutoencoderViTok.from_pretrained(self.REPOSITORY, token="secret", revision="nowhere", **kwargs)
        assert_golden(AutoencoderViTok.from_pretrained(self.REPOSITORY, token="secret", revision=commit, **kwargs))

    def test_gated(self, hub, repository):
        hub.gated[self.REPOSITORY] = "secret"
        with pytest.raises(OSError, match="accept the conditions"):
            AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT)

    def test_truncated_on_the_server(self, repository):
        path = repository / "decoder.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-100])
        with pytest.raises(ValueError, match="decoder.safetensors cannot be read"):
            AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT)
        path.write_bytes(data)
        assert_golden(AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT, force_download=True))

    def test_cut_connection(self, hub, repository, monkeypatch):
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        hub.cut.add(f"{self.REPOSITORY}/decoder.safetensors")
        with pytest.raises(OSError, match="decoder.safetensors .* could not be downloaded .* Try again"):
            AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT)
        hub.cut.clear()
        assert_golden(AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT))

    def test_missing(self, hub, repository):
        with pytest.raises(OSError, match="nobody/nothing"):
            AutoencoderViTok.from_pretrained("nobody/nothing", variant=VARIANT)
        (repository / "decoder.safetensors").unlink()
        with pytest.raises(OSError, match="There is no decoder.safetensors"):
            AutoencoderViTok.from_pretrained(self.REPOSITORY, variant=VARIANT)

    def test_dry_run_reads_headers_only(self, hub, repository, capsys):
        with pytest.raises(ValueError, match="cannot be told from its name"):
            convert(self.REPOSITORY, "--dry_run")
        convert(self.REPOSITORY, "--dry_run", "--variant", VARIANT)
        assert "All 48 tensors fit" in capsys.readouterr().out
        assert not list(hub.home.rglob("*.safetensors"))

    def test_push(self, hub, repository, tmp_path):
        arguments = ["--variant", VARIANT, "--token", "secret", "--push_to_hub", "someone/converted"]
        convert(self.REPOSITORY, tmp_path / "ours", *arguments)
        assert "base_model: someone/tiny" in (hub.root / "someone" / "converted" / "README.md").read_text()
        assert_golden(AutoencoderViTok.from_pretrained("someone/converted"))
