import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, assert_close, make_input, make_vae
from vitok_hf import AutoencoderViTok


class TestShapes:
    def test_encode_and_decode(self, vae, architecture):
        x = make_input(vae)
        latents = vae.encode(x).latent_dist.mode()
        assert latents.shape == ((2, 4, 2, 3) if vae.is_image_model else (2, 4, 2, 2, 3))
        assert vae.decode(latents).sample.shape == x.shape
        assert torch.equal(vae(x).sample, vae.decode(latents, return_dict=False)[0])

    def test_tuples(self, vae):
        x = make_input(vae)
        (posterior,) = vae.encode(x, return_dict=False)
        assert torch.equal(posterior.mode(), vae.encode(x).latent_dist.mode())
        assert torch.equal(vae(x, return_dict=False)[0], vae(x).sample)
        latents = posterior.mode()
        for arguments in ((False,), (None, False)):  # LTX's pipelines pass a timestep of None first
            assert torch.equal(vae.decode(latents, *arguments)[0], vae.decode(latents).sample)

    def test_an_image_model_treats_frames_alone(self):
        vae = make_vae("v1")
        video = torch.randn(2, 3, 3, 16, 24)
        latents = vae.encode(video).latent_dist.mode()
        assert latents.shape == (2, 4, 3, 2, 3)
        sample = vae(video).sample
        for frame in range(3):
            torch.testing.assert_close(latents[:, :, frame], vae.encode(video[:, :, frame]).latent_dist.mode())
            torch.testing.assert_close(sample[:, :, frame], vae(video[:, :, frame]).sample)

    def test_a_video_model_attends_over_frames(self):
        vae = make_vae("video")
        x = make_input(vae)
        changed = x.clone()
        changed[:, :, -1] = 0
        first, second = (vae.encode(video).latent_dist.mode() for video in (x, changed))
        assert not torch.allclose(first[:, :, 0], second[:, :, 0])

    def test_a_video_model_without_temporal_patches_takes_images(self):
        vae = make_vae("v1", sample_frames=4)
        x = torch.randn(1, 3, 16, 16)
        torch.testing.assert_close(vae(x).sample, vae(x.unsqueeze(2)).sample.squeeze(2))

    def test_any_size_after_any_other(self, vae):
        x = make_input(vae, height=8, width=40)
        before = vae(x).sample
        vae(make_input(vae, height=64, width=16))
        assert torch.equal(vae(x).sample, before)

    def test_tokens_know_their_place(self, vae):
        x = make_input(vae)
        moved = x.roll(8, dims=-1)  # by one patch
        latents, moved_latents = (vae.encode(pixels).latent_dist.mode() for pixels in (x, moved))
        assert not torch.allclose(moved_latents, latents.roll(1, dims=-1), atol=1e-4)

    def test_slicing(self, vae):
        x = make_input(vae, batch_size=3)
        expected = vae(x).sample
        calls = []
        vae.encoder.proj_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))
        vae.enable_slicing()
        torch.testing.assert_close(vae(x).sample, expected)
        assert calls == [1, 1, 1]
        vae.disable_slicing()
        vae(x)
        assert calls[-1] == 3


class TestForward:
    def test_samples_with_a_generator(self):
        vae = make_vae("v1")
        x = make_input(vae)
        samples = [vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(s)).sample for s in (0, 0, 1)]
        assert torch.equal(samples[0], samples[1])
        assert not torch.allclose(samples[0], samples[2])

    def test_kl_of_the_posterior(self, vae):
        x = make_input(vae)
        torch.testing.assert_close(vae(x).kl, vae.encode(x).latent_dist.kl())

    def test_latent_norm(self):
        latents = make_vae("v2").encode(torch.randn(1, 3, 32, 32)).latent_dist.mode()
        torch.testing.assert_close(latents.mean(dim=1), torch.zeros(1, 4, 4), rtol=0, atol=1e-5)
        torch.testing.assert_close(latents.std(dim=1, correction=0), torch.ones(1, 4, 4), rtol=0, atol=1e-3)


class TestErrors:
    @pytest.mark.parametrize(
        "architecture, shape, message",
        [
            ("v1", (1, 3, 20, 16), "multiples of patch_size=8, but are 20 x 16"),
            ("v1", (1, 3, 16, 20), "multiples of patch_size=8, but are 16 x 20"),
            ("v1", (1, 4, 16, 16), "must have 3 channels"),
            ("v1", (3, 16, 16), r"has shape \(3, 16, 16\)"),
            ("v1", (0, 3, 16, 16), "is empty"),
            ("video", (1, 3, 16, 16), "pass a video"),
            ("video", (1, 3, 3, 16, 16), "multiple of temporal_patch_size=2, but is 3"),
        ],
    )
    def test_encode(self, architecture, shape, message):
        with pytest.raises(ValueError, match=message):
            make_vae(architecture).encode(torch.zeros(shape))

    @pytest.mark.parametrize(
        "architecture, shape, message",
        [
            ("v1", (1, 3, 2, 2), "must have 4 channels"),
            ("v1", (4, 2, 2), r"has shape \(4, 2, 2\)"),
            ("video", (1, 4, 2, 2), "pass a video"),
        ],
    )
    def test_decode(self, architecture, shape, message):
        with pytest.raises(ValueError, match=message):
            make_vae(architecture).decode(torch.zeros(shape))

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"encoder_num_attention_heads": 5}, "`encoder_hidden_size` 32 must be divisible"),
            ({"decoder_num_attention_heads": 5}, "`decoder_hidden_size` 48 must be divisible"),
            ({"decoder_num_attention_heads": 24}, "head size of 2"),
            ({"patch_size": 0}, "`patch_size` must be positive, but is 0"),
            ({"latents_mean": [0.0]}, "`latents_mean` has 1 entries"),
            ({"latents_std": [1.0] * 5}, "`latents_std` has 5 entries"),
            ({"latent_norm": True}, "set `variational=False`"),
        ],
    )
    def test_constructor(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            make_vae("v1", **overrides)


class TestDtypes:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
    def test_half_precision(self, vae, dtype, tolerance):
        x = make_input(vae, height=64, width=64)
        expected = vae(x).sample
        sample = vae.to(dtype)(x.to(dtype)).sample
        assert sample.dtype == dtype
        error = (sample.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < tolerance

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_constant_pictures_and_outliers_give_no_nan(self, vae, dtype):
        vae.to(dtype)
        x = make_input(vae).to(dtype)
        for scale in (0.0, 1.0, 100.0):
            assert vae(x * scale).sample.isfinite().all()

    def test_autocast(self, vae):
        x = make_input(vae)
        with torch.autocast("cpu", torch.bfloat16):
            sample = vae(x).sample
        torch.testing.assert_close(sample.float(), vae(x).sample, rtol=0.1, atol=0.1)


class TestTraining:
    def test_every_parameter_gets_a_gradient(self, vae):
        output = vae.train()(make_input(vae), sample_posterior=True)
        (output.sample.square().mean() + output.kl.mean()).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in vae.parameters())

    def test_initial_outputs_have_the_scale_of_pictures(self):
        vae = AutoencoderViTok.from_variant("S-B/16", encoder_num_layers=2, decoder_num_layers=24)
        with torch.no_grad():
            assert 0.1 < vae(torch.rand(1, 3, 64, 64) * 2 - 1).sample.std() < 3.0


class TestLoading:
    def test_save_and_load(self, vae, tmp_path):
        vae.save_pretrained(tmp_path)
        x = make_input(vae)
        for arguments in ({}, {"low_cpu_mem_usage": False}):
            loaded = AutoencoderViTok.from_pretrained(tmp_path, **arguments)
            configs = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (vae, loaded)]
            assert configs[0] == configs[1] and loaded.config._name_or_path == tmp_path
            assert_close(loaded(x).sample, vae(x).sample)
            assert not loaded.training

    @pytest.mark.parametrize("parallel", [True, False])
    def test_shards(self, vae, parallel, tmp_path, monkeypatch):
        monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", parallel)
        vae.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        x = make_input(vae)
        assert_close(AutoencoderViTok.from_pretrained(tmp_path)(x).sample, vae(x).sample)

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_dtype_and_variant(self, vae, name, tmp_path):
        vae.half().save_pretrained(tmp_path, variant="fp16")
        loaded = AutoencoderViTok.from_pretrained(tmp_path, variant="fp16", **{name: torch.float16})
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
        x = make_input(vae).half()
        assert_close(loaded(x).sample, vae(x).sample, atol=1e-2)
        assert AutoencoderViTok.from_pretrained(tmp_path, variant="fp16").dtype == torch.float32

    def test_hub(self, hub, vae):
        vae.push_to_hub("someone/vae", token="secret")
        x = make_input(vae)
        assert_close(AutoencoderViTok.from_pretrained("someone/vae")(x).sample, vae(x).sample)

    def test_empty_model(self, vae):
        with torch.device("meta"):
            empty = AutoencoderViTok.from_config(vae.config)
        x = make_input(vae)
        assert empty(x.to("meta")).sample.shape == x.shape
        empty.to_empty(device="cpu").load_state_dict(vae.state_dict())
        assert_close(empty(x).sample, vae(x).sample)

    @pytest.mark.parametrize(
        "change, message", [("drop", "1 tensors are missing"), ("add", "1 tensors are unexpected")]
    )
    def test_missing_and_unexpected_weights_are_refused(self, change, message, tmp_path):
        make_vae("v1").save_pretrained(tmp_path)
        weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        if change == "drop":
            del weights["decoder.proj_out.bias"]
        else:
            weights["decoder.proj_out.scale"] = torch.ones(1)
        save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            AutoencoderViTok.from_pretrained(tmp_path)

    def test_loading_info(self, tmp_path):
        make_vae("v1").save_pretrained(tmp_path)
        _, info = AutoencoderViTok.from_pretrained(tmp_path, output_loading_info=True)
        assert set(map(len, info.values())) == {0}

    def test_misshapen_weights_are_refused(self, tmp_path):
        make_vae("v1").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"latent_channels": 5}))
        with pytest.raises(ValueError, match="shape"):
            AutoencoderViTok.from_pretrained(tmp_path)

    @pytest.mark.parametrize("part", ["encoder", "decoder.transformer_blocks.0", "encoder.transformer_blocks.1.attn"])
    def test_compiled_parts(self, vae, part, tmp_path):
        """Their weights are saved under the names that they had."""
        x, weights = make_input(vae), copy.deepcopy(vae.state_dict())
        expected = vae(x).sample
        parent, _, name = part.rpartition(".")
        wrapper = torch.compile(vae.get_submodule(part), backend="eager")
        setattr(vae.get_submodule(parent), name, wrapper)
        vae.save_pretrained(tmp_path)
        loaded = AutoencoderViTok.from_pretrained(tmp_path)
        assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
        assert vae.get_submodule(part) is wrapper
        torch.testing.assert_close(vae(x).sample, expected)

    def test_lora_of_compiled_parts(self, vae, tmp_path):
        x, config = make_input(vae), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        before, others = vae(x).sample, [copy.deepcopy(vae) for _ in range(2)]
        vae.add_adapter(config)
        for model in (vae, others[0]):
            model.encoder = torch.compile(model.encoder, backend="eager")
        vae.save_lora_adapter(tmp_path)
        assert (vae(x).sample - before).abs().max() > 1e-3
        for other in others:
            other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
            torch.testing.assert_close(other.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode())
            torch.testing.assert_close(other(x).sample, vae(x).sample)

    def test_config_can_be_written(self):
        """Some pipelines of diffusers do so."""
        vae = make_vae("v1")
        vae.config.shift_factor = 7.0
        vae.config["note"] = "kept"
        assert vae.config.shift_factor == 7.0 and vae.config["note"] == "kept"
        vae.register_to_config(scaling_factor=0.5)
        assert vae.config.scaling_factor == 0.5 and not vae.config.force_upcast and not hasattr(vae, "nothing")
        with pytest.warns(FutureWarning, match="force_upcast"):
            assert vae.force_upcast is False

    def test_derived_entries_of_a_config_are_left_out(self, tmp_path):
        vae = make_vae("v1")
        vae.register_to_config(z_dim=7)
        assert vae.config.z_dim == 4 and "z_dim" not in dict(vae.config)
        vae.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"z_dim": 7}))
        assert AutoencoderViTok.from_pretrained(tmp_path).config.z_dim == 4

    def test_config_of_another_class(self, tmp_path):
        AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f'"{tmp_path}/config.json" is of class AutoencoderKL, not'):
            AutoencoderViTok.from_pretrained(tmp_path)

    def test_auto_model(self, tmp_path):
        vae = make_vae("v1")
        vae.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(str(tmp_path))
        assert isinstance(loaded, AutoencoderViTok) and loaded.config.patch_size == vae.config.patch_size

    def test_config(self):
        vae = make_vae("v1")
        assert 2 ** (len(vae.config.block_out_channels) - 1) == vae.spatial_compression_ratio == 8
        assert vae.temporal_compression_ratio == 1 and not vae.config.force_upcast
        assert vae.config.scaling_factor == 1.0 and vae.config.latent_channels == 4
        json.dumps(dict(vae.config))
        clone = AutoencoderViTok.from_config(vae.config)
        assert {k: v for k, v in clone.config.items() if k in TINY} == TINY
