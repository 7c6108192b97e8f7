import logging
from functools import partialmethod
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from tests.conftest import ARCHITECTURES, ASSETS, TINY, V2
from tests.data.conftest import write_noise, write_video
from tests.training.conftest import keep_gradients, next_batches, read_log, run, split_batch
from vitok_hf.clips import to_float
from vitok_hf.data.items import Clip
from vitok_hf.data.loader import SourceSettings
from vitok_hf.data.views import CropView, NativeView
from vitok_hf.training import autoencoder_trainer
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


class TestStep:
    def test_gradients_are_clipped(self, arguments, monkeypatch):
        trainer = AutoencoderTrainer(arguments(max_grad_norm=1e-3))
        norms = []

        def record(closure=None):
            gradients = [parameter.grad for parameter in trainer.vae.parameters()]
            norms.append(torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])))

        monkeypatch.setattr(trainer.models["vae"].optimizer, "step", record)
        (logs,) = trainer.training_step(next_batches(trainer))
        assert logs["grad_norm"] > 1e-3  # before clipping
        assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_accumulation_equals_a_larger_batch(self, arguments, stage2, stage, monkeypatch):
        gradients = []
        for parts in (1, 2):
            make = arguments if stage == 1 else stage2
            options = {"discriminator_learning_rate": 1e-2}
            args = make(TINY, gradient_accumulation_steps=parts, max_grad_norm=1e9, lr_warmup_steps=0, **options)
            trainer = AutoencoderTrainer(args)
            (batch,) = next_batches(trainer)
            keep_gradients(trainer)
            logs = trainer.training_step(split_batch(batch, [8 // parts] * parts))
            assert len(logs) == parts and [("grad_norm" in log) for log in logs] == [False] * (parts - 1) + [True]
            models = [trained.model for trained in trainer.models.values()]
            gradients.append([x.grad for x in models[0].parameters() if x.requires_grad])
            gradients[-1] += [x.data for model in models[1:] for x in model.parameters()]
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)

    def test_learning_rate(self, arguments):
        args = arguments(learning_rate=1.0, lr_warmup_steps=4, max_train_steps=12, gradient_accumulation_steps=2)
        trainer = AutoencoderTrainer(args)
        rates = [trainer.models["vae"].learning_rate(step) for step in range(13)]
        assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0.0)
        trainer.step = 3
        trainer.training_step(next_batches(trainer, 2))
        assert trainer.models["vae"].optimizer.param_groups[0]["lr"] == 0.75

    def test_schedules_of_diffusers(self, arguments):
        trainer = AutoencoderTrainer(arguments(lr_scheduler="linear", lr_warmup_steps=3, max_train_steps=9))
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=9)
        for step in range(9):
            assert trainer.models["vae"].learning_rate(step) == pytest.approx(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()

    def test_optimizer(self, arguments):
        options = {"adam_beta1": 0.8, "adam_beta2": 0.7, "adam_weight_decay": 0.3}
        group = AutoencoderTrainer(arguments(**options)).models["vae"].optimizer.param_groups[0]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.7), 1e-8, 0.3)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_gradient_checkpointing_gives_the_same_gradients(self, arguments, stage2, stage, monkeypatch):
        gradients = []
        for checkpointing in (False, True):
            trainer = AutoencoderTrainer((arguments, stage2)[stage - 1](gradient_checkpointing=checkpointing))
            assert trainer.vae.is_gradient_checkpointing == checkpointing
            keep_gradients(trainer)
            trainer.training_step(next_batches(trainer))
            gradients.append([x.grad for x in trainer.vae.parameters() if x.requires_grad])
        for one, other in zip(*gradients):
            assert one.abs().sum() > 0
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)

    def test_compilation(self, arguments):
        widths = {"encoder_hidden_size": 32, "decoder_hidden_size": 32}  # compiled once for both towers
        compiled = AutoencoderTrainer(arguments(config=TINY | widths, compile=True, crop_sizes=["16"]))
        plain = AutoencoderTrainer(arguments(config=TINY | widths, crop_sizes=["16"]))
        losses = [x.training_step(next_batches(x))[0]["mse"].item() for x in (compiled, plain)]
        assert compiled.vae.encoder.transformer_blocks[0]._compiled_call_impl is not None
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)

    def test_compilation_of_many_kinds_of_calls(self, stage2, monkeypatch):
        """Both towers, with and without gradients, in training and evaluation, and batches of one."""
        # what is counted are graphs, whatever they are compiled to
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
        data = {"crop_sizes": ["16", "32"], "train_batch_size": 4, "gradient_accumulation_steps": 2}
        held_out = {"validation_data_dir": [str(ASSETS)], "validation_resolution": 32, "num_validation_images": 5}
        assert run(stage2(compile=True, use_ema=True, validation_steps=2, **data, **held_out)).step == 6

    @pytest.mark.parametrize("logging_steps, step", [(1, 1), (50, 3)])
    def test_a_loss_that_is_no_number_ends_the_run(self, arguments, logging_steps, step):
        """Before a checkpoint has it."""
        trainer = AutoencoderTrainer(arguments(logging_steps=logging_steps))
        with torch.no_grad():
            trainer.vae.decoder.proj_out.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match=f"The loss is nan at step {step}: lower `learning_rate`"):
            trainer.train()
        assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))

    def test_average(self, arguments):
        """Decay min(ema_decay, (1 + step) / (10 + step)), in float32, of what is trained."""
        trainer = AutoencoderTrainer(arguments(use_ema=True, ema_decay=0.3))
        parameter, average = trainer.vae.decoder.proj_out.weight, trainer.average
        index = [id(x) for x in average.parameters].index(id(parameter))
        expected = parameter.detach().clone()
        for decay in (0.0, 2 / 11, 3 / 12, 0.3):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
            average.update()
            expected = decay * expected + (1 - decay) * parameter.detach()
            torch.testing.assert_close(average.shadow_params[index], expected)
        own = parameter.detach().clone()
        with pytest.raises(RuntimeError), average.applied():
            torch.testing.assert_close(parameter.detach(), expected)
            raise RuntimeError
        assert torch.equal(parameter.detach(), own)


class TestLosses:
    def test_weights_reach_the_losses(self, arguments):
        weights = {"mse": 0.5, "l1": 0.25, "charbonnier": 2.0, "ssim": 0.1, "kl": 0.01}
        settings = {f"{name}_weight": weight for name, weight in weights.items()}
        trainer = AutoencoderTrainer(arguments(**settings, crop_sizes=["16"]))  # SSIM has windows of 11 pixels
        (logs,) = trainer.training_step(next_batches(trainer))
        expected = sum(weight * logs[name] for name, weight in weights.items())
        torch.testing.assert_close(logs["loss"], expected)
        assert trainer.loss.weights["lpips"] == trainer.loss.weights["dino"] == 0.0


class TestData:
    def test_settings_reach_the_data(self, arguments, monkeypatch):
        made = Mock(side_effect=InterruptedError)
        monkeypatch.setattr(autoencoder_trainer, "make_dataset", made)
        sources = {"dataset_name": "name", "train_data_dir": [], "shuffle_buffer": 7, "cache_gib": 2.0}
        for view, overrides in (
            (CropView([(24, 24, 1.0)], 8 * 24**2 * 4, Clip(4, 5.0), False), {"crop_sizes": []}),
            (NativeView(64, 24**2, (2, 8), Clip(4, 5.0), False), {"crop_sizes": [], "max_tokens": 64}),
        ):
            with pytest.raises(InterruptedError):
                options = {"resolution": 24, "fps": 5.0, "random_flip": False, "seed": 3}
                AutoencoderTrainer(arguments(ARCHITECTURES["video"], **sources, **options, **overrides))
            made.assert_called_with(view, SourceSettings(**sources), 3)

    def test_dataset_of_the_hub(self, arguments, tmp_path):
        write_noise(tmp_path / "pictures", 3)
        for streaming in (False, True):
            options = {"dataset_name": str(tmp_path / "pictures"), "streaming": streaming, "train_data_dir": []}
            args = arguments(**options, max_train_steps=2, output_dir=str(tmp_path / f"run{streaming}"))
            run(args)
            assert sorted(read_log(args.output_dir)) == [1, 2]

    def test_native_losses_leave_padding_out(self, arguments):
        trainer = AutoencoderTrainer(arguments(TINY | V2, max_tokens=200, resolution=32, crop_sizes=[]))
        (batch,) = next_batches(trainer)
        (logs,) = trainer.training_step([batch])
        pixels = [to_float(picture[:, 0]) for run in batch.pixels for picture in run]
        fresh = AutoencoderTrainer(arguments(TINY | V2, max_tokens=200, resolution=32, crop_sizes=[])).vae
        errors = [(x - y).square().sum() for x, y in zip(fresh(pixels).sample, pixels)]
        assert logs["mse"].item() == pytest.approx((sum(errors) / sum(x.numel() for x in pixels)).item(), rel=1e-4)

    def test_broken_files_are_counted(self, arguments, tmp_path, caplog):
        write_noise(tmp_path / "data", 20)
        (tmp_path / "data" / "broken.png").write_bytes((ASSETS / "coffee.png").read_bytes()[:5000])
        with caplog.at_level(logging.WARNING):
            args = arguments(train_data_dir=[str(tmp_path / "data")], max_train_steps=8)
            trainer = run(args)
        assert trainer.num_skipped > 0 and caplog.text.count("broken.png") == trainer.num_skipped
        assert read_log(args.output_dir, "skipped")[8] == trainer.num_skipped
        assert AutoencoderTrainer(arguments(resume_from_checkpoint="latest")).num_skipped == trainer.num_skipped

    @pytest.mark.parametrize("stage, architecture", [(1, "video"), (2, "video"), (1, "causal"), (2, "causal")])
    def test_videos(self, arguments, stage2, tmp_path, stage, architecture):
        write_video(tmp_path / "videos" / "a.mp4")
        data = {name: [str(tmp_path / "videos")] for name in ("train_data_dir", "validation_data_dir")}
        options = {"validation_resolution": 16, "max_train_steps": 2, "validation_steps": 2, "fps": 12.5}
        config = ARCHITECTURES[architecture]
        trainer = run((arguments, stage2)[stage - 1](config, **data, **options))
        assert read_log(trainer.output_dir, "videos_psnr")[2] > 3.0
        (batch,) = next_batches(trainer)
        frames = config["sample_frames"]
        assert batch.pixels[0].shape[1:3] == (3, frames) and trainer.count_pixels(batch) == 8 * frames * 16 * 16
        assert trainer._count(batch.pixels, batch.pixels)[0] == 8 * 4 * 2 * 2 * 2  # of two latent frames each

    @pytest.mark.parametrize("stage", [1, 2])
    def test_pictures_and_clips_mixed(self, arguments, stage2, tmp_path, stage):
        write_video(tmp_path / "videos" / "a.mp4")
        data = {"train_data_dir": [f"{tmp_path / 'videos'}:1", f"{ASSETS}:1"]}
        trainer = run((arguments, stage2)[stage - 1](ARCHITECTURES["causal"], **data, max_train_steps=2))
        (batch,) = next_batches(trainer)
        assert {run.shape[2] for run in batch.pixels} == {1, 5} and batch.num_items == 8
        pictures = sum(len(run) for run in batch.pixels if run.shape[2] == 1)
        tokens = batch.pixels[0][0, 0, 0].numel() // 8**2
        latents, values, frames = trainer._count(batch.pixels, batch.pixels)
        assert latents == 4 * tokens * (pictures + 2 * (8 - pictures))
        assert frames == pictures + 5 * (8 - pictures) and values == 3 * 64 * tokens * frames
        assert set(read_log(trainer.output_dir)) == {1, 2}

    def test_causal_models_of_other_numbers_of_frames(self, arguments):
        for frames in (4, 6):
            with pytest.raises(ValueError, match=f"`sample_frames` must be 1 plus .*, but is {frames}: make it"):
                AutoencoderTrainer(arguments(ARCHITECTURES["causal"] | {"sample_frames": frames}))

    def test_resolution(self, arguments):
        for resolution, side in ((None, 32), (24, 24)):
            trainer = AutoencoderTrainer(arguments(resolution=resolution, crop_sizes=[], train_batch_size=3))
            assert next_batches(trainer)[0].pixels[0].shape == (3, 3, 1, side, side)

    def test_seed(self, arguments):
        first, second, other = (AutoencoderTrainer(arguments(seed=seed)) for seed in (0, 0, 1))
        batches = [next_batches(trainer)[0].pixels[0] for trainer in (first, second, other)]
        weights = [trainer.vae.decoder.proj_out.weight for trainer in (first, second, other)]
        assert torch.equal(batches[0], batches[1]) and torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2]) and not torch.equal(batches[0], batches[2])
