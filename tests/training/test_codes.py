"""Training of codes that can be cut."""

import shutil
from collections import Counter

import pytest
import torch

from tests.conftest import TINY
from tests.training.conftest import next_batches, read_log, run, split_batch
from tests.training.dit import make_dit_arguments, write_cache
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline
from vitok_hf.commands.settings import parse_settings
from vitok_hf.training.arguments import AutoencoderArguments
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.dit_trainer import DiTTrainer


@pytest.mark.parametrize("stage", [1, 2])
def test_every_length_is_measured(arguments, stage2, stage, tmp_path):
    make = arguments if stage == 1 else stage2
    data = {"validation_data_dir": ["examples/assets"], "validation_resolution": 16, "num_validation_images": 2}
    trainer = run(make(channel_counts=[1, 4], token_counts=[2, 4], crop_sizes=["16"], **data))
    values = {name: [*read_log(trainer.output_dir, name).values()][-1] for name in trainer.metrics}
    assert values["assets_psnr_num_channels_4"] == pytest.approx(values["assets_psnr"], abs=1e-4)
    assert values["assets_psnr_num_tokens_4"] == pytest.approx(values["assets_psnr"], abs=1e-4)
    assert values["assets_psnr_num_channels_1"] != values["assets_psnr"] != values["assets_psnr_num_tokens_2"]
    saved = AutoencoderViTok.from_pretrained(trainer.output_dir / "vae")
    assert (saved.config.channel_counts, saved.config.token_counts) == ([1, 4], [2, 4])
    assert saved.decoder.mask_token.any() and saved.decoder.mask_token.shape == (4,)


def test_one_length_for_each_picture(arguments, monkeypatch):
    trainer = AutoencoderTrainer(arguments(channel_counts=[1, 2, 4], token_counts=[1, 2, 9], crop_sizes=["16"]))
    (batch,) = next_batches(trainer)
    calls, reconstruct = [], trainer._reconstruct
    monkeypatch.setattr(trainer, "_reconstruct", lambda *args: calls.append(args[0].lengths) or reconstruct(*args))
    counts = {"num_tokens": Counter(), "num_channels": Counter()}
    for parts in ([8], [3, 5]):
        torch.manual_seed(0)
        calls.clear()
        trainer.training_step(split_batch(batch, parts))
        assert [len(call["num_tokens"]) for call in calls] == parts
        counts = {name: sum((call[name] for call in calls), []) for name in counts}
        if parts == [8]:
            whole = counts
    assert counts == whole  # however the pictures are divided into batches
    for _ in range(30):
        trainer.training_step([batch])
    drawn = Counter(count for call in calls for count in call["num_channels"])
    assert set(drawn) == {1, 2, 4} and min(drawn.values()) > 40
    assert drawn[4] == pytest.approx(sum(drawn.values()) / 2, rel=0.2)  # half of the pictures keep all
    assert {count for call in calls for count in call["num_tokens"]} == {1, 2, 4}  # pictures of 4 tokens keep all


def test_models_without_lengths_draw_none(arguments):
    trainer = AutoencoderTrainer(arguments())
    (batch,) = next_batches(trainer)
    state = torch.get_rng_state()
    assert trainer._draw_lengths([batch.pixels]) == [{}]
    assert torch.equal(torch.get_rng_state(), state)


def test_sequences_of_pictures_of_their_own_sizes(arguments):
    args = arguments(TINY | {"num_latent_tokens": 3}, crop_sizes=[], max_tokens=60, token_counts=[1, 3])
    trainer = run(args)
    assert trainer.vae.config.num_latent_tokens == 3 and trainer.step == args.max_train_steps


def test_resumption(arguments):
    counts = {"channel_counts": [1, 4], "token_counts": [2, 4], "crop_sizes": ["16"]}
    first = run(arguments(**counts))
    losses = read_log(first.output_dir)
    shutil.rmtree(first.output_dir / "checkpoint-6")
    trainer = run(arguments(**counts, resume_from_checkpoint="latest"))
    assert trainer.checkpoint.name == "checkpoint-3" and read_log(trainer.output_dir) == pytest.approx(losses)


class TestArguments:
    def parse(self, *argv):
        return parse_settings(AutoencoderArguments, ["--variant", "S-B/16", *argv], "vitok train", None)

    def test_numbers_from_the_command_line_and_yaml(self, tmp_path):
        assert self.parse("--channel_counts", "2", "4", "16")["channel_counts"] == [2, 4, 16]
        (tmp_path / "x.yaml").write_text("token_counts: [1, 8]\nchannel_counts: 16\n")
        settings = self.parse("--config", str(tmp_path / "x.yaml"))
        assert settings["token_counts"] == [1, 8] and settings["channel_counts"] == [16]

    @pytest.mark.parametrize("value", [["2", "4"], [2.5], [True], 4])
    def test_others_are_refused(self, arguments, value):
        with pytest.raises(ValueError, match="`channel_counts` must be a list of whole numbers"):
            arguments(channel_counts=value)

    def test_counts_that_do_not_fit(self, arguments):
        with pytest.raises(ValueError, match="`channel_counts` must end with `latent_channels`, 4"):
            AutoencoderTrainer(arguments(channel_counts=[1, 2]))

    def test_pretrained_models_get_counts_but_no_sequences(self, stage2):
        with pytest.raises(ValueError, match="`lora_rank` 2 saves an adapter alone, without channel_counts"):
            AutoencoderTrainer(stage2(channel_counts=[2, 4], lora_rank=2))
        trainer = AutoencoderTrainer(stage2(channel_counts=[2, 4]))
        assert trainer.vae.config.channel_counts == [2, 4]
        with pytest.raises(ValueError, match="`num_latent_tokens` 8 cannot be changed"):
            stage2(num_latent_tokens=8)


class TestDiffusion:
    @pytest.mark.parametrize("is_cached", [False, True])
    @pytest.mark.parametrize(
        "config, settings, shape",
        [
            ({"channel_counts": [2, 4]}, {"num_channels": 2}, (2, 1, 2, 2)),
            ({"num_latent_tokens": 3}, {}, (4, 3)),
            ({"num_latent_tokens": 3, "channel_counts": [2, 4]}, {"num_channels": 2}, (2, 3)),
        ],
    )
    def test_prefixes_and_sequences(self, tmp_path, config, settings, shape, is_cached):
        args = make_dit_arguments(tmp_path, TINY | config, **settings)
        if is_cached:
            args = make_dit_arguments(tmp_path, **settings, train_data_dir=[], latents_dir=write_cache(args))
        trainer = DiTTrainer(args)
        (batch,) = next_batches(trainer)
        latents = trainer.latents_of(batch)
        assert latents.shape == (8, *shape) and trainer.transformer.config.in_channels == shape[0]
        assert latents.mean().abs() < 0.5 and 0.5 < latents.std() < 1.5
        trainer.train()
        pipe = ViTokDiTPipeline.from_pretrained(trainer.output_dir / "pipeline")
        assert pipe([0], num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)

    def test_channels_that_are_no_code(self, tmp_path):
        with pytest.raises(ValueError, match=r"`num_channels` 3 is none of .* `channel_counts`, \[2, 4\]"):
            DiTTrainer(make_dit_arguments(tmp_path, TINY | {"channel_counts": [2, 4]}, num_channels=3))
