"""Checkpoints, and going on from them."""

import logging
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.conftest import TINY
from tests.data.conftest import write_noise
from tests.training.conftest import next_batches, read_log, run
from vitok_hf import AutoencoderViTok
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


class TestResume:
    @pytest.mark.parametrize("stage, precision", [(1, "no"), (1, "bf16"), (2, "no")])
    def test_continues_with_the_same_losses(self, arguments, stage2, tmp_path, stage, precision):
        make = arguments if stage == 1 else stage2
        overrides = {"use_ema": True, "mixed_precision": precision, "lecam_weight": 0.1, "r1_weight": 1.0}
        reference = run(make(output_dir=str(tmp_path / "whole"), **overrides))
        first = AutoencoderTrainer(make(output_dir=str(tmp_path / "parts"), **overrides))
        for batch in next_batches(first, 3):
            first.training_step([batch])
            first.step += 1
            first.average.update()
        first.save()
        resumed = run(make(output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest", **overrides))
        keys = ["loss", "grad_norm", "learning_rate"]
        for key in keys if stage == 1 else [*keys, "discriminator_loss", "logits_real", "lecam"]:
            expected, values = read_log(tmp_path / "whole", key), read_log(tmp_path / "parts", key)
            assert sorted(values) == [4, 5, 6] and sorted(expected) == [1, 2, 3, 4, 5, 6]
            assert all(values[step] == pytest.approx(expected[step], rel=1e-6) for step in values)
        for name, trained in resumed.models.items():
            for ours, theirs in zip(trained.model.parameters(), reference.models[name].model.parameters()):
                torch.testing.assert_close(ours, theirs)
        for ours, theirs in zip(resumed.average.shadow_params, reference.average.shadow_params):
            torch.testing.assert_close(ours, theirs)
        assert resumed.average.optimization_step == 6

    def test_noise_goes_on_where_it_was(self, arguments):
        """Of the posterior: a resumed run must not repeat the first samples."""
        trainer = AutoencoderTrainer(arguments())
        (batch,) = next_batches(trainer)
        trainer.training_step([batch])
        state = torch.get_rng_state()
        trainer.step = 1
        trainer.save()
        AutoencoderTrainer(arguments(resume_from_checkpoint="latest"))
        assert torch.equal(torch.get_rng_state(), state)

    def test_checkpoints_are_models(self, arguments):
        args = arguments(use_ema=True, ema_decay=0.5)
        trainer = run(args)
        own, averages = list(trainer.vae.parameters()), trainer.average.shadow_params
        for name, expected in (("checkpoint-6/vae", own), ("checkpoint-6/vae_ema", averages), ("vae", averages)):
            loaded = AutoencoderViTok.from_pretrained(trainer.output_dir / name)
            assert all(map(torch.equal, loaded.parameters(), expected))

    def test_number_of_checkpoints(self, arguments):
        args = arguments(checkpointing_steps=1, checkpoints_total_limit=2)
        run(args)
        found = sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))
        assert found == ["checkpoint-5", "checkpoint-6"]

    def test_an_interrupted_save_leaves_the_last_checkpoint(self, arguments, monkeypatch):
        trainer = AutoencoderTrainer(arguments())
        trainer.save()

        def full_disk(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr(AutoencoderViTok, "save_pretrained", full_disk)
        trainer.step = 1
        with pytest.raises(OSError):
            trainer.save()
        monkeypatch.undo()
        assert AutoencoderTrainer(arguments(resume_from_checkpoint="latest")).step == 0

    def test_latest_of_nothing_starts_anew(self, arguments, caplog):
        """A job that is queued again has the command that it began with."""
        with caplog.at_level(logging.WARNING):
            losses = read_log(run(arguments(resume_from_checkpoint="latest", max_train_steps=3)).args.output_dir)
        assert 'run" has no checkpoint to resume from: the run starts anew' in caplog.text
        assert sorted(losses) == [1, 2, 3]
        assert AutoencoderTrainer(arguments(resume_from_checkpoint="latest")).step == 3

    def test_settings_that_cannot_change(self, stage2):
        before = {"use_ema": True, "stage": 2, "freeze_encoder": True, "lora_rank": 2, "lecam_weight": 0.1}
        AutoencoderTrainer(stage2(**before)).save()
        for change in (
            {"use_ema": False},
            {"stage": 1},
            {"freeze_encoder": False},
            {"lora_rank": 4},
            {"lecam_weight": 0.0},
        ):
            message = f"`{next(iter(change))}` is .*, but checkpoint-0 was written with .*: resume with that"
            with pytest.raises(ValueError, match=message):
                AutoencoderTrainer(stage2(**before | change, resume_from_checkpoint="latest"))

    def test_causal_and_other_models_are_told_apart(self, arguments, video):
        """The weights of one fit the other."""
        arguments = partial(arguments, TINY | {"sample_frames": 3}, train_data_dir=[str(video)])
        AutoencoderTrainer(arguments(causal=True)).save()
        with pytest.raises(ValueError, match="`causal` is False, but checkpoint-0 was written with True"):
            AutoencoderTrainer(arguments(resume_from_checkpoint="latest"))

    def test_lengths_of_codes_are_not_forgotten(self, arguments):
        AutoencoderTrainer(arguments(channel_counts=[1, 4])).save()
        AutoencoderTrainer(arguments(channel_counts=[1, 4], resume_from_checkpoint="latest"))
        with pytest.raises(ValueError, match=r"`channel_counts` is None, but checkpoint-0 was written with \[1, 4\]"):
            AutoencoderTrainer(arguments(resume_from_checkpoint="latest"))

    @pytest.mark.parametrize("regional", [False, True])
    def test_models_that_accelerate_compiles(self, stage2, monkeypatch, regional):
        """Checkpoints have the names of models that are not compiled, and are resumed with and without."""
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regional))
        options = {"use_ema": True, "crop_sizes": ["16"], "max_train_steps": 1, "lr_warmup_steps": 0}
        options["discriminator_warmup_steps"] = 0
        trainer = run(stage2(**options))
        names = [name for name, _ in trainer.models["vae"].model.named_parameters()]
        assert all("_orig_mod." in name for name in names if "proj_in" in name)
        expected = [
            [x.detach().clone() for x in trained.unwrapped.parameters()] for trained in trainer.models.values()
        ]
        checkpoint = trainer.output_dir / "checkpoint-1"
        loaded, average = (AutoencoderViTok.from_pretrained(checkpoint / name) for name in ("vae", "vae_ema"))
        assert all(map(torch.equal, loaded.parameters(), expected[0]))
        assert all(map(torch.equal, average.decoder.parameters(), trainer.average.shadow_params))
        for backend in ("EAGER", "NO"):
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
            AcceleratorState._reset_state(reset_partial_state=True)
            resumed = AutoencoderTrainer(stage2(**options, resume_from_checkpoint="latest"))
            for trained, weights in zip(resumed.models.values(), expected, strict=True):
                assert all(map(torch.equal, trained.model.parameters(), weights))

    def test_stops_in_time_and_can_be_resumed(self, arguments):
        args = arguments(max_train_steps=1000, max_minutes=0.0, checkpointing_steps=1000)
        assert run(args).step == 1
        assert not (Path(args.output_dir) / "vae").exists()
        assert AutoencoderTrainer(arguments(max_train_steps=1000, resume_from_checkpoint="latest")).step == 1

    def test_settings_that_change(self, arguments, stage2):
        args = stage2(use_ema=True)
        AutoencoderTrainer(args).save()
        changed = {"adam_beta1": 0.5, "adam_weight_decay": 0.3, "ema_decay": 0.7}
        trainer = AutoencoderTrainer(stage2(use_ema=True, resume_from_checkpoint="latest", **changed))
        for trained in trainer.models.values():
            (group,) = trained.optimizer.param_groups
            assert group["betas"] == (0.5, 0.95) and group["weight_decay"] == 0.3
        assert trainer.average.decay == 0.7

    def test_says_what_has_changed(self, arguments, tmp_path, caplog):
        """Other data and settings are allowed, but not in silence."""
        write_noise(tmp_path / "data", 3)
        data = {"train_data_dir": [str(tmp_path / "data")]}
        run(arguments(max_train_steps=3, **data))
        resumed = data | {"resume_from_checkpoint": "latest"}
        with caplog.at_level(logging.WARNING):
            AutoencoderTrainer(arguments(max_train_steps=3, **resumed))
        assert "last started with" not in caplog.text
        (tmp_path / "data" / "001.png").write_bytes((tmp_path / "data" / "000.png").read_bytes() + b" ")
        write_noise(tmp_path / "data" / "more", 1)
        with caplog.at_level(logging.WARNING):
            AutoencoderTrainer(arguments(max_train_steps=4, learning_rate=0.5, **resumed))
        assert (
            'checkpoint-3", but its run was last started with max_train_steps 3, not 4; learning_rate 0.001, not 0.5; '
            "other files, 1 changed (001.png), 1 new (more/000.png)." in caplog.text
        )
        caplog.clear()
        other = resumed | {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-3")}
        with caplog.at_level(logging.WARNING):
            AutoencoderTrainer(arguments(max_train_steps=4, output_dir=str(tmp_path / "other"), seed=7, **other))
        assert "its run was last started with seed 0, not 7; learning_rate 0.5, not 0.001." in caplog.text

    def test_records_no_token(self, arguments, tmp_path):
        AutoencoderTrainer(arguments(hub_token="hf_secret"))
        assert "hf_secret" not in (tmp_path / "run" / "made_from.json").read_text()

    def test_more_accumulation_than_before(self, arguments):
        trainer = run(arguments(max_train_steps=3))
        overrides = {"gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest", "max_train_steps": 4}
        trainer = AutoencoderTrainer(arguments(**overrides))
        before, batches = trainer.vae.decoder.proj_out.weight.clone(), next_batches(trainer, 2)
        logs = trainer.training_step(batches)
        assert [("grad_norm" in log) for log in logs] == [False, True]
        assert not torch.equal(trainer.vae.decoder.proj_out.weight, before)

    def test_later_checkpoints_are_not_mixed_with_new_ones(self, arguments):
        args = run(arguments()).args
        with pytest.raises(ValueError, match="has checkpoint-6, later than checkpoint-3: delete them"):
            AutoencoderTrainer(arguments(resume_from_checkpoint=f"{args.output_dir}/checkpoint-3"))
        other = arguments(resume_from_checkpoint=f"{args.output_dir}/checkpoint-3", output_dir=args.output_dir + "2")
        assert AutoencoderTrainer(other).step == 3

    def test_other_names_are_no_checkpoints(self, arguments):
        args = run(arguments()).args
        best = Path(args.output_dir) / "checkpoint-best"
        shutil.copytree(Path(args.output_dir) / "checkpoint-3", best)
        assert AutoencoderTrainer(arguments(resume_from_checkpoint="latest")).step == 6
        with pytest.raises(ValueError, match="is no folder checkpoint-<step>"):
            AutoencoderTrainer(arguments(resume_from_checkpoint=str(best)))

    def test_another_run_is_not_overwritten(self, arguments):
        run(arguments(max_train_steps=2))
        with pytest.raises(ValueError, match="has checkpoint-2 of another run: go on"):
            AutoencoderTrainer(arguments())

    def test_a_run_that_broke_off_at_its_end_is_finished(self, arguments, monkeypatch, caplog):
        with monkeypatch.context() as patch:
            patch.setattr(AutoencoderTrainer, "evaluate", Mock(side_effect=OSError("disk full")))
            with pytest.raises(OSError):
                run(arguments(validation_steps=100))
        shutil.copytree(f"{arguments().output_dir}/checkpoint-3/vae", f"{arguments().output_dir}/vae")
        with caplog.at_level(logging.WARNING):
            trainer = run(arguments(resume_from_checkpoint="latest"))
        saved = AutoencoderViTok.from_pretrained(trainer.output_dir / "vae").state_dict()
        assert trainer.step == 6 and "the checkpoint is at step 6 of 6" in caplog.text
        assert all(torch.equal(saved[name], value) for name, value in trainer.vae.state_dict().items())
