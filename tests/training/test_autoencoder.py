import json
import math
from pathlib import Path

import pytest
import torch

from tests.conftest import ASSETS, TINY, make_vae
from vitok_hf import AutoencoderViTok
from vitok_hf.training import autoencoder
from vitok_hf.training.autoencoder import AutoencoderTrainer, TrainingArguments, learning_rate_at


@pytest.fixture
def arguments(tmp_path):
    """Keyword arguments of a tiny run; `TrainingArguments(**arguments(max_steps=3))`."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))

    def make(**overrides):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "train_data": [str(ASSETS)],
            "model_config": str(config),
            "sizes": ["16", "8x32"],
            "pixels_per_batch": 2048,
            "num_workers": 0,
            "lpips_weight": 0.0,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "max_steps": 6,
            "log_every": 1,
            "checkpoint_every": 3,
            "mixed_precision": "no",
        }
        return TrainingArguments(**defaults | overrides)

    return make


def run(args: TrainingArguments) -> AutoencoderTrainer:
    trainer = AutoencoderTrainer(args)
    trainer.train()
    return trainer


def read_log(args: TrainingArguments, key: str = "loss") -> dict[int, float]:
    lines = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line[key] for line in map(json.loads, lines) if key in line}


class TestResume:
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_continues_with_the_same_losses(self, arguments, tmp_path, precision):
        overrides = {"ema_decay": 0.9, "mixed_precision": precision}
        whole = arguments(output_dir=str(tmp_path / "whole"), **overrides)
        reference = run(whole)
        first = arguments(output_dir=str(tmp_path / "parts"), **overrides)
        trainer = AutoencoderTrainer(first)
        for index in range(3):
            trainer.training_step(trainer.dataset[index].pixels)
        trainer.save()
        resumed = run(arguments(output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest", **overrides))
        expected, losses = read_log(whole), read_log(first)
        assert sorted(losses) == [4, 5, 6] and sorted(expected) == [1, 2, 3, 4, 5, 6]
        assert all(losses[step] == pytest.approx(expected[step], rel=1e-6) for step in losses)
        for ours, theirs in zip(resumed.vae.parameters(), reference.vae.parameters()):
            torch.testing.assert_close(ours, theirs)
        for ours, theirs in zip(resumed.ema.shadow_params, reference.ema.shadow_params):
            torch.testing.assert_close(ours, theirs)

    def test_checkpoints_are_models(self, arguments):
        args = arguments(ema_decay=0.5)
        trainer = run(args)
        folder = Path(args.output_dir) / "checkpoint-6"
        for name, expected in (("vae", trainer.vae.parameters()), ("vae_ema", trainer.ema.shadow_params)):
            loaded = AutoencoderViTok.from_pretrained(folder / name)
            for ours, theirs in zip(loaded.parameters(), expected):
                assert torch.equal(ours, theirs)
        assert {path.name for path in Path(args.output_dir).glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}

    def test_an_interrupted_save_leaves_the_last_checkpoint(self, arguments, monkeypatch):
        args = arguments()
        trainer = AutoencoderTrainer(args)
        trainer.save()

        def full_disk(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr(AutoencoderViTok, "save_pretrained", full_disk)
        trainer.step = 1
        with pytest.raises(OSError):
            trainer.save()
        monkeypatch.undo()
        assert AutoencoderTrainer(arguments(resume_from_checkpoint="latest")).step == 0

    def test_errors(self, arguments, tmp_path):
        with pytest.raises(ValueError, match="There is no checkpoint"):
            AutoencoderTrainer(arguments(resume_from_checkpoint="latest"))
        with pytest.raises(ValueError, match="is no folder checkpoint"):
            AutoencoderTrainer(arguments(resume_from_checkpoint=str(tmp_path)))

    def test_stops_in_time_and_can_be_resumed(self, arguments):
        args = arguments(max_steps=1000, max_minutes=0.0, checkpoint_every=1000)
        assert run(args).step == 1
        assert AutoencoderTrainer(arguments(max_steps=1000, resume_from_checkpoint="latest")).step == 1


class TestStep:
    def test_gradients_are_clipped(self, arguments, monkeypatch):
        trainer = AutoencoderTrainer(arguments(max_grad_norm=1e-3))
        norms = []

        def record(closure=None):
            gradients = [parameter.grad for parameter in trainer.model.parameters()]
            norms.append(torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])))

        monkeypatch.setattr(trainer.optimizer, "step", record)
        logs = trainer.training_step(trainer.dataset[0].pixels)
        assert logs["grad_norm"] > 1e-3  # before clipping
        assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)

    def test_accumulation_equals_a_larger_batch(self, arguments):
        gradients = []
        for parts in (1, 2):
            trainer = AutoencoderTrainer(arguments(gradient_accumulation_steps=parts, max_grad_norm=1e9))
            forward = trainer.vae.forward  # the noise of the posterior differs between halves: decode the mode
            trainer.model.forward = lambda x, sample_posterior, forward=forward: forward(x)
            trainer.optimizer.step = lambda: None
            trainer.optimizer.zero_grad = lambda: None
            for part in trainer.dataset[0].pixels.chunk(parts):
                assert trainer.step == 0
                trainer.training_step(part)
            assert trainer.step == 1
            gradients.append([parameter.grad for parameter in trainer.vae.parameters()])
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)

    def test_learning_rate(self, arguments):
        args = arguments(learning_rate=1.0, warmup_steps=4, max_steps=12)
        rates = [learning_rate_at(step, args) for step in range(13)]
        assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0.0)
        assert rates[6] == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
        trainer = AutoencoderTrainer(args)
        trainer.training_step(trainer.dataset[0].pixels)
        assert trainer.optimizer.param_groups[0]["lr"] == 0.25

    def test_options(self, arguments):
        trainer = AutoencoderTrainer(arguments(gradient_checkpointing=True))
        assert trainer.vae.is_gradient_checkpointing
        compiled = AutoencoderTrainer(arguments(compile=True, sizes=["16"]))
        plain = AutoencoderTrainer(arguments(sizes=["16"]))
        losses = [x.training_step(x.dataset[0].pixels)["mse"].item() for x in (compiled, plain)]
        assert compiled.vae.encoder.transformer_blocks[0]._compiled_call_impl is not None
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)

    def test_video_models(self, arguments, tmp_path):
        from tests.training.conftest import write_video

        write_video(tmp_path / "videos" / "a.mp4")
        config = TINY | {"temporal_patch_size": 2, "sample_frames": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        data = [str(tmp_path / "videos")]
        args = arguments(train_data=data, eval_data=data, eval_size=16, max_steps=2, eval_every=2, fps=12.5)
        run(args)
        assert read_log(args, "videos_psnr")[2] > 3.0


class TestEvaluation:
    def test_held_out_pictures(self, arguments):
        args = arguments(eval_data=[str(ASSETS)], eval_size=32, eval_limit=2, eval_every=3, ema_decay=0.5)
        trainer = run(args)
        for key in ("assets_psnr", "assets_ssim", "assets_ema_psnr"):
            assert sorted(read_log(args, key)) == [3, 6]
        assert read_log(args, "assets_psnr") != read_log(args, "assets_ema_psnr")
        assert (Path(args.output_dir) / "samples" / "assets_0000006.png").exists()
        assert trainer.vae.training

    def test_thirty_seconds_lower_the_held_out_error(self, arguments, tmp_path):
        """Trains on three photographs and measures a fourth."""
        (tmp_path / "held_out").mkdir()
        (tmp_path / "held_out" / "astronaut.png").write_bytes((ASSETS / "astronaut.png").read_bytes())
        overrides = {"encoder_hidden_size": 128, "decoder_hidden_size": 128, "qk_norm": True}
        (tmp_path / "config.json").write_text(json.dumps(TINY | overrides))
        args = arguments(
            train_data=[str(ASSETS / name) for name in ("chelsea.png", "coffee.png", "rocket.jpg")],
            eval_data=[str(tmp_path / "held_out")],
            sizes=["32"],
            pixels_per_batch=2**15,
            max_minutes=0.5,
            max_steps=400,
            warmup_steps=20,
            log_every=50,
            checkpoint_every=10**6,
            learning_rate=2e-3,
            kl_weight=1e-4,
            eval_size=64,
        )
        trainer = AutoencoderTrainer(args)
        before = trainer.evaluate()["held_out_psnr"]
        trainer.train()
        assert trainer.evaluate()["held_out_psnr"] > before + 8.0


class TestArguments:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"stage": 3}, "`stage` must be 1, but is 3"),
            ({"variant": "S-B/16"}, "Set exactly one of"),
            ({"model_config": None}, "Set exactly one of"),
            ({"train_data": []}, "`train_data` is empty"),
            ({"max_steps": 0}, "`max_steps` must be at least 1, but is 0"),
        ],
    )
    def test_errors(self, arguments, overrides, message):
        with pytest.raises(ValueError, match=message):
            arguments(**overrides)

    def test_sources_of_the_model(self, arguments, tmp_path):
        make_vae("v1").save_pretrained(tmp_path / "model")
        args = arguments(model_config=None, pretrained_model_name_or_path=str(tmp_path / "model"))
        loaded = autoencoder.load_model(args)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), make_vae("v1").parameters()))
        assert autoencoder.load_model(arguments(latent_channels=6)).config.latent_channels == 6
        (tmp_path / "config.json").write_text(json.dumps(TINY | {"patchsize": 4}))
        with pytest.raises(TypeError, match="patchsize"):
            autoencoder.load_model(arguments())
        with pytest.raises(ValueError, match="cannot be changed in a pretrained model"):
            arguments(model_config=None, pretrained_model_name_or_path="x", latent_channels=4)
