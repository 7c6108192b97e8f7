import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, make_vae
from tests.dit import make_pipeline
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline


class TestAdapters:
    @pytest.fixture
    def file(self, tmp_path):
        vae = make_vae("v1")
        vae.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        vae.save_lora_adapter(tmp_path)
        return tmp_path / "pytorch_lora_weights.safetensors"

    def load(self, file, source=None) -> AutoencoderViTok:
        vae = make_vae("v1")
        try:
            vae.load_lora_adapter(source or file.parent, prefix=None, use_safetensors=True)
        finally:
            self.adapters = [*getattr(vae, "peft_config", ())]
        return vae

    def test_as_saved(self, file):
        for source in (None, load_file(file)):
            loaded = {name for name, _ in self.load(file, source).named_parameters() if "lora_" in name}
            assert len(loaded) == len(load_file(file))

    @pytest.mark.parametrize("damage", ["renamed", "missing", "unexpected"])
    def test_other_names(self, file, damage):
        tensors = load_file(file)
        name = sorted(tensors)[-1]
        value = tensors[name] if damage == "unexpected" else tensors.pop(name)
        if damage != "missing":
            tensors[name.replace("blocks.1", "blocks.9")] = value.clone()
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f'"{file.parent}" does not fit .* tensors are missing or unexpected'):
            self.load(file)
        assert self.adapters == []

    def test_values(self, file):
        tensors = load_file(file)
        tensors[sorted(tensors)[0]][0, 0] = torch.nan
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f'weights of "{file.parent}" are not finite in ".*lora_A'):
            self.load(file)
        assert self.adapters == []

    def test_files(self, file):
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{file} cannot be read as safetensors"):
            self.load(file)


def test_arguments_reach_the_models(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
    assert len(list((tmp_path / "vae").glob("*.fp16-*.safetensors"))) > 1
    loaded = ViTokDiTPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(loaded.transformer.proj_out.weight, pipe.transformer.proj_out.weight)


class TestPickles:
    """Weights in files of `torch.save`."""

    @pytest.fixture(params=["10GB", "40KB"])
    def folder(self, request, tmp_path):
        make_vae("v1").save_pretrained(tmp_path, safe_serialization=False, max_shard_size=request.param)
        return tmp_path

    def change(self, folder, function) -> None:
        path = sorted(folder.glob("*.bin"))[0]
        tensors = torch.load(path)
        function(tensors, sorted(tensors)[0])
        torch.save(tensors, path)

    def load(self, folder):
        return AutoencoderViTok.from_pretrained(folder, use_safetensors=False)

    def test_as_saved(self, folder):
        assert torch.equal(self.load(folder).encoder.proj_in.weight, make_vae("v1").encoder.proj_in.weight)

    def test_dtype(self, folder):
        self.change(folder, lambda tensors, name: tensors.update({name: tensors[name].int()}))
        with pytest.raises(ValueError, match='bin" holds "[a-z0-9_.]+" as Tensor of shape .*int32'):
            self.load(folder)

    def test_missing(self, folder):
        self.change(folder, lambda tensors, name: tensors.pop(name))
        with pytest.raises(ValueError, match="which no file has|do not fit its config: 1 tensors are missing"):
            self.load(folder)

    def test_values(self, folder):
        self.change(folder, lambda tensors, name: tensors[name].fill_(torch.inf))
        with pytest.raises(ValueError, match='bin" are not finite in'):
            self.load(folder)


class TestNumbersOfNumpy:
    """In configs, they become Python's: JSON has no others."""

    def test_autoencoders(self, tmp_path):
        numbers = {"latent_channels": np.int64(4), "mlp_ratio": np.float32(2.5), "variational": np.bool_(False)}
        numbers |= {"latents_mean": [np.float64(0.5)] * 4, "channel_counts": (np.int32(2), np.int64(4))}
        vae = AutoencoderViTok(**TINY | numbers)
        vae.save_pretrained(tmp_path)
        config = AutoencoderViTok.from_pretrained(tmp_path).config
        assert config.latent_channels == 4 and config.mlp_ratio == 2.5 and config.variational is False
        assert config.latents_mean == [0.5] * 4 and config.channel_counts == [2, 4]
        assert {type(x) for x in vae.config.channel_counts} == {int} and type(vae.config.mlp_ratio) is float

    def test_pipelines(self, tmp_path):
        guidance = {"guidance_scale": np.float64(2.5), "guidance_rescale": np.float32(0.5)}
        make_pipeline(guidance=guidance, num_layers=np.int64(1)).save_pretrained(tmp_path)
        pipe = ViTokDiTPipeline.from_pretrained(tmp_path)
        assert pipe.config.guidance_scale == 2.5 and pipe.config.guidance_rescale == 0.5
        assert len(pipe.transformer.transformer_blocks) == 1
