import json
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from tests.conftest import ASSETS, GOLDEN
from tests.data.conftest import write_noise
from tests.training.dit import MODEL, make_dit_arguments, run, write_cache
from vitok_hf import AutoencoderViTok, ViTokDiTModel, ViTokDiTPipeline
from vitok_hf.commands import train_dit
from vitok_hf.loading import resolve_bundled
from vitok_hf.training import dit_trainer
from vitok_hf.training.arguments import DiTArguments
from vitok_hf.training.dit_trainer import DiTTrainer


@pytest.fixture
def arguments(tmp_path):
    return partial(make_dit_arguments, tmp_path)


class TestFlags:
    @pytest.mark.parametrize("cached", [False, True])
    def test_data(self, arguments, tmp_path, cached):
        args = arguments(random_flip=False, class_balanced=True, seed=3, dataloader_num_workers=2)
        if cached:
            args.train_data_dir, args.latents_dir = [], write_cache(args)
        trainer = DiTTrainer(args)
        dataset = trainer.loader.dataset
        assert not dataset.sampler.flips.any() and [len(x) for x in dataset.sampler.members] == [5, 6, 7]
        assert dataset.seed == 3 and dataset.view.batch_size == 8 and trainer.loader.num_workers == 2
        args.random_flip, args.class_balanced, args.no_flip_classes = True, False, ["dog"]
        sampler = DiTTrainer(args).loader.dataset.sampler
        assert sampler.flips.tolist() == [True, False, True] and sampler.members is None

    def test_classes_in_order(self, arguments, tmp_path):
        (tmp_path / "classes.txt").write_text("dog\nbird\ncat\nflag\n")
        trainer = DiTTrainer(arguments(class_file=str(tmp_path / "classes.txt")))
        assert trainer.transformer.config.num_classes == 4 and trainer.loader.dataset.items.labels[0] == 2

    def test_samples(self, arguments, monkeypatch):
        calls, call = [], ViTokDiTPipeline.__call__

        def record(pipe, classes, **options):
            calls.append((classes, options))
            return call(pipe, classes, **options)

        monkeypatch.setattr(ViTokDiTPipeline, "__call__", record)
        args = arguments(num_sample_classes=2, num_samples_per_class=3, guidance_scale=2.0, num_inference_steps=3)
        _, pictures = DiTTrainer(args).evaluate()
        ((classes, options),) = calls
        assert classes == [0, 2] and options["guidance_scale"] == 2.0 and options["num_inference_steps"] == 3
        assert [generator.initial_seed() for generator in options["generator"]] == list(range(6))
        assert pictures["samples_ema"].shape == (2 * 16, 3 * 16, 3) and pictures["samples_ema"].dtype == np.uint8

    def test_held_out_pictures(self, arguments):
        latents, labels = DiTTrainer(arguments(num_validation_images=3)).held_out["held_out"]
        assert latents.shape == (3, 4, 1, 2, 2) and labels.tolist() == [0, 1, 2]

    def test_author_layout(self, arguments, tmp_path):
        folder = tmp_path / "author"
        folder.mkdir()
        for name in ("encoder", "decoder"):
            (folder / f"{name}.safetensors").write_bytes((GOLDEN / f"{name}.safetensors").read_bytes())
        trainer = run(arguments(str(folder), vae_variant="w64_d2_h4-w96_d3_h4/1x8x16", max_train_steps=1))
        assert trainer.transformer.config.in_channels == 16
        saved = AutoencoderViTok.from_pretrained(tmp_path / "run" / "pipeline" / "vae")
        assert saved.config.latent_norm and saved.config.latents_std == trainer.vae.config.latents_std

    def test_compile(self, arguments, monkeypatch):
        compiled = Mock()
        monkeypatch.setattr(ViTokDiTModel, "compile_repeated_blocks", compiled)
        assert not DiTTrainer(arguments()).transformer.gradient_checkpointing and not compiled.called
        assert DiTTrainer(arguments(compile=True, gradient_checkpointing=True)).transformer.gradient_checkpointing
        compiled.assert_called_once_with(fullgraph=True, dynamic=True)


class TestModel:
    def test_variant(self, arguments):
        args = arguments(variant="S")
        vae = dit_trainer.load_autoencoder(args)
        config = dit_trainer.make_transformer(args, vae, 32, 7).config
        assert (config.hidden_size, config.num_layers, config.num_attention_heads) == (384, 12, 6)
        assert (config.sample_size, config.in_channels, config.num_classes) == (4, 4, 7)

    def test_config(self, arguments):
        model = MODEL | {"qk_norm": True, "num_classes": 3, "_class_name": "ViTokDiTModel"}
        assert DiTTrainer(arguments(model=model)).transformer.config.qk_norm
        for field, value in (("num_classes", 4), ("in_channels", 8), ("out_channels", 8), ("sample_size", 4)):
            with pytest.raises(ValueError, match=f"`model_config` has {field} {value}, but"):
                DiTTrainer(arguments(model=MODEL | {field: value}))


class TestArguments:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"vae_name_or_path": None}, "Name the autoencoder by `vae_name_or_path`"),
            ({"variant": "S", "model_config": "x"}, "exactly one of variant and model_config"),
            ({"train_data_dir": []}, "exactly one of train_data_dir and latents_dir"),
            ({"prediction_type": "sample"}, '`prediction_type` must be one of epsilon, v_prediction, .* is "sample"'),
            ({"weighting_scheme": "mode"}, '`weighting_scheme` must be one of logit_normal, none, but is "mode"'),
            ({"prediction_type": "flow_prediction", "snr_gamma": 5.0}, "flow matching has none"),
            ({"resolution": 20}, "`resolution` 20 must be a multiple of the autoencoder's patch_size 8"),
            ({"no_flip_classes": ["x"]}, "`no_flip_classes` has"),
            ({"variant": "M"}, 'Unknown variant "M"'),
        ],
    )
    def test_errors(self, arguments, overrides, message):
        with pytest.raises(ValueError, match=message):
            DiTTrainer(arguments(**overrides))

    def test_held_out_classes(self, arguments, tmp_path):
        write_noise(tmp_path / "others" / "bird", 1)
        with pytest.raises(ValueError, match='is in folder "bird", which is no class'):
            DiTTrainer(arguments(validation_data_dir=[str(tmp_path / "others")]))

    @pytest.mark.parametrize("name", ["dit-l-s-b-16", "dit-xl-s-b-16", "dit-ucf101-4x8"])
    def test_shipped_configs(self, name):
        path = ASSETS.parent / "configs" / f"{name}.yaml"
        argv = ["--config", str(path), "--vae_name_or_path", "x", "--train_data_dir", "y"]
        args = DiTArguments(**train_dit.parse(argv, "vitok train-dit"))
        assert args.variant == ("XL" if "xl" in name else "L") and args.train_batch_size * 8 == 256
        assert args.lr_scheduler == "constant" and args.learning_rate == 1e-4 and args.class_dropout == 0.1

    def test_config_of_the_bundled_generator(self):
        path = ASSETS.parent / "configs" / "dit-emoji.yaml"
        argv = ["--config", str(path), "--vae_name_or_path", "x", "--latents_dir", "y"]
        args = DiTArguments(**train_dit.parse(argv, "vitok train-dit"))
        config = json.loads((ASSETS.parent / "configs" / Path(args.model_config).name).read_text())
        bundled = ViTokDiTModel.load_config(resolve_bundled("vitok-dit-emoji"), subfolder="transformer")
        assert config.items() <= bundled.items()
