import json
import os
import re
import sys

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN, make_vae
from tests.dit import make_pipeline
from tests.faults.checkpoints import GOLDEN_VARIANT as VARIANT
from tests.faults.checkpoints import read_parts, write_parts
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline
from vitok_hf.commands import start
from vitok_hf.loading import strict
from vitok_hf.loading.strict import read_header, to_dtype
from vitok_hf.loading.vitok_v2 import guess_variant


FILE = "diffusion_pytorch_model.safetensors"


def change_json(path, **values):
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "left out"}))


def change_header(path, change):
    header, data = read_parts(path)
    change(header)
    write_parts(path, header, data)


@pytest.fixture
def folder(tmp_path):
    make_vae("v1").save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


class TestShards:
    @pytest.fixture
    def shards(self, tmp_path):
        make_vae("v1").save_pretrained(tmp_path / "vae", max_shard_size="40KB")
        return sorted((tmp_path / "vae").glob("*.safetensors"))

    def check(self, shards, message):
        with pytest.raises(ValueError, match=message):
            AutoencoderViTok.from_pretrained(shards[0].parent)

    def test_a_renamed_tensor(self, shards):
        name = next(iter(read_header(shards[1])))
        change_header(shards[1], lambda header: header.update({name[:-1] + "s": header.pop(name)}))
        self.check(shards, f'The index in "{shards[0].parent}" lists {name}, which no file has: .* Fetch it again')

    def test_a_tensor_of_two_shards(self, shards):
        name = next(iter(read_header(shards[0])))
        save_file(load_file(shards[1]) | {name: load_file(shards[0])[name] + 1}, shards[1])
        self.check(shards, f'"{shards[1]}" holds "{name}", which is in "{shards[0].name}" by the index')

    @pytest.mark.parametrize("target", ["/dev/zero", "loop", None])
    def test_what_is_no_file(self, shards, target):
        shards[0].unlink()
        os.mkfifo(shards[0]) if target is None else shards[0].symlink_to(shards[0] if target == "loop" else target)
        self.check(shards, f'"{shards[0]}" is no regular file: put the file in its place')

    @pytest.mark.parametrize("weight_map", [{}, None, {"a": ["b"]}])
    def test_index(self, shards, weight_map):
        path = shards[0].with_name(FILE + ".index.json")
        change_json(path, weight_map=weight_map)
        self.check(shards, f'"{path}" must have "metadata" and "weight_map"')

    def test_out_of_the_folder(self, shards, tmp_path):
        """Neither loaded nor converted."""
        path = shards[0].with_name(FILE + ".index.json")
        shards[0].rename(tmp_path / "x")
        weight_map = json.loads(path.read_text())["weight_map"]
        change_json(
            path, weight_map={name: "../x" if file == shards[0].name else file for name, file in weight_map.items()}
        )
        self.check(shards, f'"{path}" has "[a-z_.]+" in "../x", which leaves the folder')
        make_vae("v2").save_pretrained(tmp_path / "v2", max_shard_size="40KB")
        path = tmp_path / "v2" / path.name
        change_json(path, weight_map={"encoder.proj_in.weight": "../x"})
        with pytest.raises(ValueError, match=f'"{path}" has "encoder.proj_in.weight" in "../x"'):
            start("convert", ["--to_vitok_v2", str(tmp_path / "v2"), str(tmp_path / "back")])


class TestTensors:
    @pytest.mark.parametrize(
        "dtype, message",
        [("I32", 'holds "decoder.proj_in.weight" as I32'), ("BF16", "holds tensors as F16 and as BF16, and one must")],
    )
    def test_dtype(self, folder, dtype, message):
        save_file(
            {name: x.float() if dtype == "I32" else x.half() for name, x in load_file(folder / FILE).items()},
            folder / FILE,
        )
        change_header(folder / FILE, lambda header: header["decoder.proj_in.weight"].update(dtype=dtype))
        with pytest.raises(ValueError, match=f'"{folder / FILE}" {message}'):
            AutoencoderViTok.from_pretrained(folder)

    @pytest.mark.parametrize("layout, value", [("file", torch.nan), ("shards", torch.inf), ("author", -torch.inf)])
    def test_not_finite(self, folder, tmp_path, value, layout):
        options, key, name = {}, "decoder.proj_out.weight", "decoder.proj_out.weight"
        if layout == "shards":
            make_vae("v1").save_pretrained(folder := tmp_path / "shards", max_shard_size="40KB")
        elif layout == "author":
            (folder := tmp_path / "author").mkdir()
            for path in GOLDEN.glob("*coder.safetensors"):
                (folder / path.name).write_bytes(path.read_bytes())
            options, key = {"variant": VARIANT}, "to_pixels.weight"
        path = next(path for path in sorted(folder.glob("*.safetensors")) if key in read_header(path))
        weights = load_file(path)
        weights[key][-1, -1] = value
        save_file(weights, path)
        place = folder if layout == "author" else path
        with pytest.raises(ValueError, match=f'weights of "{place}" are not finite in "{name}" as float32: fetch'):
            AutoencoderViTok.from_pretrained(folder, **options)
        loaded = AutoencoderViTok.from_pretrained(folder, check_finite=False, **options)
        torch.testing.assert_close(loaded.decoder.proj_out.weight[-1, -1].item(), value, equal_nan=True)

    def test_too_large_for_the_dtype(self, folder):
        weights = load_file(folder / FILE)
        weights["encoder.proj_out.bias"][0] = 7e4
        save_file(weights, folder / FILE)
        AutoencoderViTok.from_pretrained(folder, dtype="bfloat16")
        with pytest.raises(ValueError, match='not finite in "encoder.proj_out.bias" as float16: load them in another'):
            AutoencoderViTok.from_pretrained(folder, dtype="float16")

    def test_of_a_pipeline(self, tmp_path):
        pipe = make_pipeline()
        torch.nn.init.constant_(pipe.transformer.proj_out.bias, torch.nan)
        pipe.save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match='transformer/diffusion_pytorch_model.safetensors" are not finite in "proj_out.bias"'
        ):
            ViTokDiTPipeline.from_pretrained(tmp_path)
        assert ViTokDiTPipeline.from_pretrained(tmp_path, check_finite=False).transformer.proj_out.bias.isnan().all()


class TestDtype:
    @pytest.mark.parametrize("argument, dtype", [("dtype", "float16"), ("torch_dtype", "torch.bfloat16")])
    def test_by_name(self, folder, tmp_path, dtype, argument):
        expected = getattr(torch, str(dtype).removeprefix("torch."))
        assert AutoencoderViTok.from_pretrained(folder, **{argument: dtype}).dtype == expected
        author = AutoencoderViTok.from_pretrained(GOLDEN, variant=VARIANT, **{argument: dtype})
        assert author.dtype == expected
        make_pipeline().save_pretrained(tmp_path / "pipeline")
        pipe = ViTokDiTPipeline.from_pretrained(tmp_path / "pipeline", **{argument: {"vae": dtype}})
        assert (pipe.vae.dtype, pipe.transformer.dtype) == (expected, torch.float32)
        assert (
            ViTokDiTPipeline.from_pretrained(tmp_path / "pipeline", **{argument: dtype}).transformer.dtype == expected
        )

    @pytest.mark.parametrize("dtype", ["half", torch.int8, 16])
    def test_others(self, folder, dtype):
        message = f"`dtype` must be a dtype, as torch.bfloat16, .*{re.escape(repr(dtype))}"
        with pytest.raises(ValueError, match=message):
            AutoencoderViTok.from_pretrained(folder, dtype=dtype)
        with pytest.raises(ValueError, match="`dtype` must be a dtype"):
            to_dtype(dtype)


class TestConfigs:
    @pytest.mark.parametrize(
        "file, values, message",
        [
            ("vae", {"scaling_factor": 0}, "`scaling_factor` and `latents_std` must be positive, but are 0 and"),
            ("vae", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, r"must be positive, but are 0.7 and \[1.0, 0.0"),
            ("vae", {"latents_std": [1.0, 1.0, 1.0, float("nan")]}, "`latents_std` must be"),
            ("vae", {"latents_mean": "0123"}, "`latents_mean` must be .* is '0123'"),
            ("vae", {"patch_size": True}, "`patch_size` must be int .* is True"),
            ("vae", {"decoder_num_layers": 10**9}, "`decoder_num_layers` must be at most 1024, but is 1000000000"),
            ("vae", {"mlp_ratio": float("inf")}, "`mlp_ratio` must be float"),
            (
                "vae",
                {"latents_stb": [], "latents_std": "left out"},
                r"not exist, .*latents_stb.* \['latents_std'\]",
            ),
            ("vae", {"_class_name": 7}, "has `_class_name` 7"),
            ("vae", {"_class_name": "ViTokDiTModel"}, "is of class ViTokDiTModel, not AutoencoderViTok"),
            ("vae", {"patch_size": 16}, r'does not fit its config: .*" is \(.*192.*\), not \(.*768.*\)'),
            ("transformer", {"num_layers": 0}, "does not fit: `num_layers` must be positive"),
            ("transformer", {"hidden_size": "32"}, "does not fit: `hidden_size` must be int"),
            ("scheduler", {"beta_end": -7}, "is damaged, or does not fit: "),
            ("scheduler", {"num_train_timesteps": 10**9}, "is damaged, or does not fit: "),
            ("scheduler", {"prediction_type": "epsilom"}, "is damaged, or does not fit: "),
            ("scheduler", {"beta_schedule": ""}, "is damaged, or does not fit: "),
            ("scheduler", {"clip_sample": 3}, "is damaged, or does not fit: "),
            ("scheduler", {"steps_offset": None, "_class_name": []}, "is damaged, or does not fit: "),
            ("scheduler", {"_use_default_values": "yes"}, "has `_use_default_values` 'yes'"),
            ("scheduler", {"_class_name": "PNDMScheduler"}, "is of a PNDMScheduler, but model_index.json has a DDIM"),
            ("pipeline", {"vea": [None, None], "vae": "left out"}, "has entries that do not exist"),
            ("pipeline", {"id2label": {"0": 7}}, "is damaged, or does not fit: `id2label`"),
            ("pipeline", {"_class_name": "left out"}, "has `_class_name` None"),
            ("pipeline", {"vae": ["vitok_hf"]}, 'must have library and class of "vae"'),
            ("pipeline", {"scheduler": ["os", "system"]}, 'has .* for "scheduler"'),
            ("pipeline", {"scheduler": ["antigravity", "fly"]}, 'has .* for "scheduler"'),
            ("pipeline", {"transformer": ["vitok_hf", "AutoencoderViTok"]}, 'has .* for "transformer"'),
        ],
    )
    def test_damage(self, tmp_path, file, values, message):
        """Of a model, alone and in a pipeline, and of the pipeline."""
        make_pipeline().save_pretrained(tmp_path)
        names = {"scheduler": "scheduler/scheduler_config.json", "pipeline": "model_index.json"}
        path = tmp_path / names.get(file, f"{file}/config.json")
        change_json(path, **values)
        model = {"vae": AutoencoderViTok, "transformer": ViTokDiTModel}.get(file)
        with pytest.raises(ValueError, match=f'"{path.parent if model else path}.*{message}'):
            ViTokDiTPipeline.from_pretrained(tmp_path)
        if model:
            with pytest.raises(ValueError, match=f'"{path.parent}.*{message}'):
                model.from_pretrained(path.parent)
        assert "antigravity" not in sys.modules

    def test_entries_of_others(self, folder):
        """As those that `EMAModel.save_pretrained` adds."""
        change_json(folder / "config.json", decay=0.99, note="mine", quantization_config=None)
        assert AutoencoderViTok.from_pretrained(folder).config.patch_size == 8

    @pytest.mark.parametrize("text", ["[]", '{"patch_size": 8', "[" * 100_000])
    def test_json(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f'"{folder / "config.json"}"'):
            AutoencoderViTok.from_pretrained(folder)

    @pytest.mark.parametrize(
        "scheduler",
        [
            DDIMScheduler(num_train_timesteps=5, clip_sample=False),
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            LCMScheduler(original_inference_steps=4, clip_sample=False),
            PNDMScheduler(),
        ],
    )
    def test_of_schedulers_that_work(self, tmp_path, scheduler):
        """And no random number is drawn."""
        make_pipeline(scheduler=scheduler).save_pretrained(tmp_path)
        state = torch.get_rng_state()
        ViTokDiTPipeline.from_pretrained(tmp_path)
        assert torch.equal(torch.get_rng_state(), state)

    def test_whole_numbers_are_numbers(self):
        assert make_vae("everything", layer_scale_init=1, scaling_factor=2, mlp_ratio=2).config.mlp_ratio == 2


@pytest.mark.parametrize("name", [None, 7, "", b"vitok-tiny-f8x8"])
def test_what_is_no_name(name):
    for model in (AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline):
        with pytest.raises(ValueError, match="A checkpoint is a folder, a Hub id or one of "):
            model.from_pretrained(name)


class TestMistakes:
    @pytest.mark.parametrize(
        "name, message",
        [
            ("vitok-tiny-f8x9", 'did you mean the bundled "vitok-tiny-f8x8"'),
            ("/nowhere/at/all", 'There is no folder "/nowhere/at/all"'),
            ("S-B/16", "`from_variant` makes it"),
            (__file__, "is a file: pass the folder"),
        ],
    )
    def test_names(self, name, message):
        for model in (AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline):
            with pytest.raises((ValueError, OSError), match=message):
                model.from_pretrained(name)

    def test_arguments(self, folder):
        with pytest.raises(ValueError, match="no argument `dtpye`: did you mean `dtype`"):
            AutoencoderViTok.from_pretrained(folder, dtpye=torch.float16)
        with pytest.raises(ValueError, match="no argument `latent_std`: did you mean `latents_std`"):
            AutoencoderViTok.from_pretrained(folder, latent_std=[1.0] * 4)

    @pytest.mark.parametrize("name", ["config.json", FILE])
    def test_what_is_missing(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(OSError, match=f'"{folder}" has no {name}, but .*: '):
            AutoencoderViTok.from_pretrained(folder)

    def test_variant_that_is_missing(self, folder):
        with pytest.raises(OSError, match="has no diffusion_pytorch_model.fp16.safetensors, but .*name its `variant`"):
            AutoencoderViTok.from_pretrained(folder, variant="fp16")

    @pytest.mark.parametrize(
        "start, what", [("version https://git-lfs.github.com/spec/v1\n", "Git LFS"), ("<!DOCTYPE html>", "web page")]
    )
    def test_what_was_fetched_in_place_of_weights(self, folder, start, what):
        (folder / FILE).write_text(start + "x" * 100)
        with pytest.raises(ValueError, match=f"{folder / FILE} cannot be read as safetensors: it is a .*{what}"):
            AutoencoderViTok.from_pretrained(folder)

    def test_a_model_is_no_pipeline(self, folder):
        with pytest.raises(OSError, match="has no model_index.json, but .*: name a pipeline"):
            ViTokDiTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0)])
def test_variant_of_misshapen_weights(shape):
    header = read_header(GOLDEN / "encoder.safetensors")
    assert guess_variant({"encoder": header}) is not None
    for key in ("patch_embed.weight", "encoder_blocks.0.attn.norm_q.weight", "to_code.weight"):
        guess_variant({"encoder": header | {key: shape}})
    assert guess_variant({"encoder": {"patch_embed.weight": shape}}) is None


def test_headers_are_read_once(folder, monkeypatch):
    """In a call, in the next again, and outside each time."""
    reads, read = [], strict._read_safetensors
    monkeypatch.setattr(strict, "_read_safetensors", lambda path: reads.append(path.name) or read(path))
    for count in (1, 2):
        AutoencoderViTok.from_pretrained(folder)
        assert reads == [FILE] * count
    for count in (3, 4):
        strict.read_header(folder / FILE)
        assert reads == [FILE] * count
