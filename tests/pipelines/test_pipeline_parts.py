"""What `ViTokDiTPipeline` does with the outputs, files, hooks and caches of diffusers."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
)
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from tests.conftest import TINY as VAE
from tests.conftest import assert_close
from tests.dit import ID2LABEL, make_pipeline, sample, seeds
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline, denormalize_latents, loading


CPU = torch.device("cpu")
FRESH_PROCESS = """
import sys, torch, vitok_hf
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
print(type(pipe) is vitok_hf.ViTokDiTPipeline, pipe.labels, dict(pipe.config.id2label))
generator = torch.Generator().manual_seed(0)
output = pipe(["dog", 2], num_inference_steps=4, generator=generator, output_type="latent", return_dict=False)
torch.save(output[0], sys.argv[1] + "/output.pt")
"""


class TestOutputs:
    @pytest.mark.parametrize("size", [{}, {"height": 16, "width": 40}])
    def test_images(self, size):
        pipe, height, width = make_pipeline(), size.get("height", 32), size.get("width", 32)
        arguments = {"class_labels": ["cat", 2], "num_inference_steps": 1} | size
        images = pipe(**arguments, generator=seeds(0, 1)).images
        assert [image.size for image in images] == [(width, height)] * 2 and isinstance(images[0], Image.Image)
        array = pipe(**arguments, generator=seeds(0, 1), output_type="np").images
        tensor = pipe(**arguments, generator=seeds(0, 1), output_type="pt").images
        assert array.shape == (2, height, width, 3) and array.min() >= 0 and array.max() <= 1
        assert_close(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
        assert np.abs(np.asarray(images[0]) - array[0] * 255).max() < 0.6

    @pytest.mark.parametrize("size, frames", [({}, 4), ({"num_frames": 6}, 6)])
    def test_videos(self, size, frames):
        pipe = make_pipeline("video")
        arguments = {"class_labels": ["cat", 2], "num_inference_steps": 1} | size
        videos = pipe(**arguments, generator=seeds(0, 1)).frames
        assert [len(video) for video in videos] == [frames] * 2 and videos[0][0].size == (32, 32)
        array = pipe(**arguments, generator=seeds(0, 1), output_type="np").frames
        tensor = pipe(**arguments, generator=seeds(0, 1), output_type="pt").frames
        assert array.shape == (2, frames, 32, 32, 3)
        assert_close(tensor, torch.from_numpy(array).permute(0, 1, 4, 2, 3))

    def test_videos_of_a_causal_autoencoder(self):
        pipe = make_pipeline("video")
        pipe.vae = AutoencoderViTok(**VAE | {"temporal_patch_size": 4, "sample_frames": 5, "causal": True})
        assert pipe.get_latent_shape(1) == (1, 4, 2, 4, 4) and pipe.get_latent_shape(1, num_frames=13)[2] == 4
        for options, frames in (({}, 5), ({"num_frames": 9}, 9), ({"latents": torch.randn(1, 4, 1, 4, 4)}, 1)):
            assert len(pipe("cat", num_inference_steps=1, **options).frames[0]) == frames
        with pytest.raises(ValueError, match="`num_frames` must be 1 plus a multiple of 4, but is 8"):
            pipe("cat", num_frames=8)

    def test_statistics_are_undone_once(self, pipe):
        latents = sample(pipe)
        with torch.no_grad():
            expected = pipe.vae.decode(denormalize_latents(latents, pipe.vae)).sample * 0.5 + 0.5
        output = pipe(
            ["cat", "dog"], num_inference_steps=4, generator=seeds(0)[0], output_type="pt", return_dict=False
        )
        assert_close(output[0], (expected.transpose(1, 2) if pipe.is_video else expected).clamp(0, 1))

    def test_models_of_different_precision(self, pipe):
        arguments = {"class_labels": ["cat"], "num_inference_steps": 2, "output_type": "pt", "return_dict": False}
        expected = pipe(**arguments, generator=seeds(0))[0]
        pipe.transformer.to(torch.bfloat16)
        assert_close(pipe(**arguments, generator=seeds(0))[0], expected, atol=0.1)
        pipe.vae.to(torch.bfloat16)
        output = pipe(**arguments, generator=seeds(0))[0]
        assert output.dtype == torch.bfloat16
        assert_close(output.float(), expected, atol=0.1)

    @pytest.mark.parametrize(
        "transformer, vae, is_video",
        [({}, {}, False), ({"sample_frames": 2}, {}, True), ({}, {"temporal_patch_size": 2}, True)],
    )
    def test_frames_if_either_model_is_of_videos(self, transformer, vae, is_video):
        pipe = make_pipeline(**transformer)
        pipe.vae = AutoencoderViTok(**VAE | {"sample_frames": 2} | vae)
        output = pipe("cat", num_inference_steps=1)
        assert pipe.is_video == is_video and hasattr(output, "frames" if is_video else "images")


class TestSaving:
    def test_in_a_fresh_process(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        run = subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], capture_output=True, text=True)
        assert run.stdout.splitlines() == [f"True {pipe.labels} {ID2LABEL}"], run.stderr
        output = torch.load(tmp_path / "output.pt")
        torch.testing.assert_close(output, sample(pipe, ("dog", 2)), rtol=1e-4, atol=1e-3)  # latents of up to 50

    def test_from_a_folder(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["transformer"] == ["vitok_hf", "ViTokDiTModel"] and index["vae"][0] == "vitok_hf"
        self.reload(pipe, tmp_path, sample(pipe, ("dog", 2)))

    def reload(self, pipe, source, expected):
        for cls in (DiffusionPipeline, ViTokDiTPipeline):
            loaded = cls.from_pretrained(source)
            assert type(loaded) is ViTokDiTPipeline and type(loaded.scheduler) is type(pipe.scheduler)
            assert loaded.config.id2label == ID2LABEL and loaded.labels == pipe.labels
            torch.testing.assert_close(sample(loaded, ("dog", 2)), expected, rtol=1e-4, atol=1e-3)

    def test_bundled(self, pipe, hub, monkeypatch, tmp_path):
        monkeypatch.setattr(loading, "BUNDLED", tmp_path)
        pipe.save_pretrained(tmp_path / "vitok-dit-tiny")
        assert loading.list_bundled() == ["vitok-dit-tiny"]
        loaded = ViTokDiTPipeline.from_pretrained("vitok-dit-tiny", dtype=torch.bfloat16)
        assert loaded.transformer.dtype == torch.bfloat16 and loaded.labels == pipe.labels
        transformer = ViTokDiTModel.from_pretrained("vitok-dit-tiny", subfolder="transformer")
        assert torch.equal(transformer.proj_out.weight, pipe.transformer.proj_out.weight)
        assert hub.requests == []

    def test_from_pipe(self, pipe):
        other = ViTokDiTPipeline.from_pipe(pipe, scheduler=EulerDiscreteScheduler())
        assert other.transformer is pipe.transformer and other.labels == pipe.labels

    @pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
    def test_push_with_a_model_card(self, how, kind, pipe, hub, tmp_path):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        if how == "push_to_hub":
            pipe.push_to_hub("owner/name", token="token")
        else:
            pipe.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="owner/name", token="token")
        card = ModelCard.load(hub.root / "owner" / "name" / "README.md")
        assert card.data.library_name == "vitok_hf" and "automatically generated" not in card.text
        assert 'DiffusionPipeline.from_pretrained("owner/name")' in card.text and "class_labels=['cat']" in card.text
        assert ("export_to_video" in card.text) == (kind == "video")
        self.reload(pipe, "owner/name", sample(pipe, ("dog", 2)))

    def test_a_card_that_is_there_is_kept(self, hub):
        folder = hub.root / "owner" / "name"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
        for _ in range(2):
            make_pipeline().push_to_hub("owner/name", token="token")
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "mit" and "# Mine" in card.text
        assert card.text.count("## Usage") == 1


class TestMemory:
    @pytest.mark.parametrize("level", ["block_level", "leaf_level"])
    def test_group_offload(self, pipe, level):
        arguments = {"class_labels": ["cat"], "num_inference_steps": 2, "output_type": "np", "return_dict": False}
        expected = pipe(**arguments, generator=seeds(0))[0]
        pipe.enable_group_offload(CPU, offload_type=level, num_blocks_per_group=1)
        assert_close(pipe(**arguments, generator=seeds(0))[0], expected)

    def test_sequential_offload(self, pipe):
        arguments = {"class_labels": ["cat"], "num_inference_steps": 2, "output_type": "np", "return_dict": False}
        expected = pipe(**arguments, generator=seeds(0))[0]
        for model in (pipe.transformer, pipe.vae):
            cpu_offload(model, execution_device=CPU)
        assert pipe.transformer.device.type == "meta"
        assert_close(pipe(**arguments, generator=seeds(0))[0], expected)

    def test_order_of_offloading(self):
        pipe = make_pipeline()
        models = {name for name, component in pipe.components.items() if isinstance(component, nn.Module)}
        assert set(pipe.model_cpu_offload_seq.split("->")) == models


class TestCaches:
    def blocks(self, pipe):
        calls = []
        pipe.transformer.transformer_blocks[1].ff.register_forward_hook(lambda _, args, out: calls.append(len(out)))
        return calls

    def test_first_block_cache(self, pipe):
        calls, interval = self.blocks(pipe), {"guidance_interval": (0.0, 0.5), "num_inference_steps": 6}
        expected = sample(pipe, **interval)
        assert calls == [4, 4, 4, 2, 2, 2]
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
        assert_close(sample(pipe, **interval), expected)
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
        calls.clear()
        outputs = [sample(pipe, **interval) for _ in range(2)]
        assert calls == [4, 2, 4, 2]  # once with guidance, once without, in each call anew
        assert torch.equal(*outputs) and (outputs[0] - expected).abs().max() > 1e-3

    def test_pyramid_attention_broadcast(self, pipe):
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 600),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
        attended = []
        pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *args: attended.append(1))
        pipe.transformer.enable_cache(config)
        sample(pipe, num_inference_steps=10)  # 900, 800, 700, 600, then every second of six
        assert len(attended) == 4 + 3
        sample(pipe, num_inference_steps=10, guidance_interval=(0.0, 0.5))

    def test_faster_cache(self, kind, pipe):
        config = FasterCacheConfig(
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 1001),
            spatial_attention_timestep_skip_range=(-1, 0),
            tensor_format="BCFHW" if kind == "video" else "BCHW",
            current_timestep_callback=lambda: pipe.current_timestep,
        )
        expected, calls = sample(pipe), self.blocks(pipe)
        pipe.transformer.enable_cache(config)
        outputs = [sample(pipe) for _ in range(2)]
        assert calls == [4, 2, 4, 2] * 2
        assert torch.equal(*outputs) and outputs[0].isfinite().all() and not torch.equal(outputs[0], expected)
        for arguments in ({"guidance_scale": 1.0}, {"guidance_interval": (0.0, 0.5)}, {"labels": None}):
            with pytest.raises(ValueError, match="FasterCache needs guidance in every step"):
                sample(pipe, **arguments)
        other = "BCHW" if kind == "video" else "BCFHW"
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(dataclasses.replace(config, tensor_format=other))
        with pytest.raises(ValueError, match=f'tensor_format="{other}", but these latents are'):
            sample(pipe)

    def test_compiled_models(self, tmp_path):
        """Whole ones and parts, passed or set; saved, the pipeline is as it was."""

        def draw(pipe: ViTokDiTPipeline) -> np.ndarray:
            return pipe(["cat"], num_inference_steps=2, generator=seeds(0), output_type="np").images

        pipe = make_pipeline()
        expected = sample(pipe)
        pictures = draw(pipe)
        whole = [torch.compile(x, fullgraph=True, backend="eager") for x in (pipe.transformer, pipe.vae)]
        passed = ViTokDiTPipeline(*whole, pipe.scheduler, ID2LABEL)
        passed.set_progress_bar_config(disable=True)
        pipe.transformer.transformer_blocks[0] = torch.compile(pipe.transformer.transformer_blocks[0], backend="eager")
        pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend="eager")
        for number, compiled in enumerate((passed, pipe)):
            assert_close(sample(compiled), expected)
            compiled.save_pretrained(tmp_path / str(number))
            loaded = ViTokDiTPipeline.from_pretrained(tmp_path / str(number))
            loaded.set_progress_bar_config(disable=True)
            assert_close(sample(loaded), expected)
            for each in (compiled, loaded):
                np.testing.assert_allclose(draw(each), pictures, atol=1e-4)
