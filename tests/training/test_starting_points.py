import contextlib
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, make_vae
from tests.training.conftest import read_log, run
from vitok_hf import AutoencoderViTok
from vitok_hf.training import autoencoder_trainer
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


class TestStartingPoints:
    def test_sources_of_the_model(self, arguments, tmp_path):
        make_vae("v1").half().save_pretrained(tmp_path / "model")
        loaded = autoencoder_trainer.load_model(arguments(pretrained_model_name_or_path=str(tmp_path / "model")))
        for ours, theirs in zip(loaded.parameters(), make_vae("v1").parameters()):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs.half().float())
        assert autoencoder_trainer.load_model(arguments(latent_channels=6)).config.latent_channels == 6
        variant = arguments(variant="w32_d1_h2-w32_d2_h2/1x8x4")
        assert autoencoder_trainer.load_model(variant).config.decoder_num_layers == 2
        with pytest.raises(ValueError, match='config.json" has entries that do not exist, .*patchsize'):
            autoencoder_trainer.load_model(arguments(TINY | {"patchsize": 4}))

    def test_causal_models(self, arguments, tmp_path):
        load, video = autoencoder_trainer.load_model, TINY | {"temporal_patch_size": 4}
        for args in (
            arguments(variant="w32_d1_h2/4x8x4", causal=True),
            arguments(video | {"sample_frames": 5}, causal=True),
        ):
            assert load(args).config.causal
        assert not load(arguments(video | {"sample_frames": 4})).config.causal
        with pytest.raises(ValueError, match="`sample_frames` must be 1 plus .* but is 16: make it 13 or 17"):
            load(arguments(video | {"sample_frames": 16}, causal=True))
        folder = tmp_path / "model"
        AutoencoderViTok(**video, sample_frames=4).save_pretrained(folder)
        with pytest.raises(ValueError, match='`causal` is True, but ".*model" is not causal'):
            load(arguments(pretrained_model_name_or_path=str(folder), causal=True))
        AutoencoderViTok.from_pretrained(folder, causal=True, sample_frames=17).save_pretrained(folder)  # as it says
        for causal in (False, True):
            config = load(arguments(pretrained_model_name_or_path=str(folder), causal=causal)).config
            assert config.causal and config.sample_frames == 17

    def test_causal_models_of_pictures(self, arguments, stage2):
        name = "w32_d1_h2/1x8x4"
        load, causal = autoencoder_trainer.load_model, TINY | {"causal": True}
        for args in (arguments(variant=name, causal=True), arguments(causal=True), stage2(causal, causal=True)):
            name = args.pretrained_model_name_or_path or args.model_config or args.variant
            with pytest.raises(ValueError, match=f'`causal` is True, but "{name}" is a model of pictures'):
                load(args)

    def test_author_layout(self, arguments, tmp_path):
        from tests.conftest import GOLDEN

        folder = tmp_path / "w64_d2_h4-w96_d3_h4" / "ViTok-v2"
        folder.mkdir(parents=True)
        for name in ("encoder", "decoder"):
            (folder / f"{name}.safetensors").write_bytes((GOLDEN / f"{name}.safetensors").read_bytes())
        with pytest.raises(ValueError, match="variant"):
            autoencoder_trainer.load_model(arguments(pretrained_model_name_or_path=str(folder)))
        args = arguments(pretrained_model_name_or_path=str(folder), variant="w64_d2_h4-w96_d3_h4/1x8x16")
        assert autoencoder_trainer.load_model(args).config.latent_norm

    def test_decoder_only(self, stage2):
        trainer = run(stage2(stage=1, freeze_encoder=True))
        before = autoencoder_trainer.load_model(trainer.args).state_dict()
        for name, value in trainer.vae.state_dict().items():
            assert torch.equal(value, before[name]) == name.startswith("encoder.")
        assert not read_log(trainer.args.output_dir, "kl")

    @pytest.mark.parametrize("stage", [1, 2])
    def test_lora(self, stage2, tmp_path, stage):
        args = stage2(stage=stage, lora_rank=2, lora_alpha=4.0, learning_rate=1e-2, use_ema=stage == 2)
        trainer = run(args)
        base = AutoencoderViTok.from_pretrained(tmp_path / "pretrained")
        trained = {name for name, x in trainer.vae.named_parameters() if x.requires_grad}
        assert trained and all("lora" in name for name in trained)
        assert any(name.startswith("encoder") for name in trained) == (stage == 1)
        x = torch.rand(1, 3, 16, 24) * 2 - 1
        before = base(x).sample
        base.load_lora_adapter(Path(args.output_dir) / "vae", prefix=None, use_safetensors=True)
        after = base(x).sample
        assert (after - before).abs().max() > 1e-4
        with trainer.average.applied() if stage == 2 else contextlib.nullcontext():
            torch.testing.assert_close(trainer.vae.eval()(x).sample, after)
        assert sum(f.stat().st_size for f in (Path(args.output_dir) / "vae").glob("*.safetensors")) < 60_000

    def test_statistics_of_the_latents(self, stage2, tmp_path):
        """They stay with the encoder that they were measured on."""
        config = TINY | {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
        for freeze in (True, False):
            folder = str(tmp_path / f"frozen-{freeze}")
            args = stage2(config, freeze_encoder=freeze, max_train_steps=1, output_dir=folder)
            run(args)
            vae = AutoencoderViTok.from_pretrained(Path(args.output_dir) / "vae")
            assert vae.config.latents_std == ([2.0] * 4 if freeze else None)

    def test_lora_resumes(self, stage2):
        run(stage2(lora_rank=2, max_train_steps=3))
        resumed = AutoencoderTrainer(stage2(lora_rank=2, resume_from_checkpoint="latest"))
        assert resumed.step == 3
        names = [name for name, x in resumed.vae.named_parameters() if "lora_B" in name and x.abs().sum() > 0]
        assert names
        resumed.train()


class TestArguments:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"stage": 2}, "`freeze_encoder` True needs `pretrained_model_name_or_path`"),
            ({"lora_rank": 4}, "`lora_rank` 4 needs `pretrained_model_name_or_path`"),
            ({"lora_alpha": 4.0}, "`lora_alpha` 4.0 scales adapters, but there are none: set `lora_rank`"),
            ({"pretrained_model_name_or_path": "x", "variant": "S-B/16"}, '"S-B/16" is an architecture with random'),
            ({"model_config": None}, "Name the model by `variant`"),
            ({"variant": "S-B/16", "model_config": "x"}, 'but variant is "S-B/16", model_config "x"'),
            ({"train_data_dir": []}, "Set exactly one of train_data_dir, dataset_name, train_shards"),
            ({"train_shards": ["x.tar"]}, "Set exactly one of train_data_dir, dataset_name, train_shards"),
            ({"gan_loss": "wgan"}, '`gan_loss` must be one of hinge, non_saturating, but is "wgan"'),
            ({"report_to": "paper"}, '`report_to` is "paper", but of the trackers'),
            ({"lr_scheduler": "sine"}, "`lr_scheduler` must be one of linear, cosine"),
            ({"pretrained_model_name_or_path": "x", "latent_channels": 4}, "cannot be changed in a pretrained model"),
        ],
    )
    def test_errors(self, arguments, overrides, message):
        with pytest.raises(ValueError, match=message):
            AutoencoderTrainer(arguments(**overrides))
