"""Short runs on shipped pictures that must lower a held-out error."""

import pytest

from tests.conftest import ASSETS, TINY
from tests.training.conftest import read_log, run
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


CONFIG = TINY | {"encoder_hidden_size": 128, "decoder_hidden_size": 128, "qk_norm": True}


@pytest.fixture
def held_out(tmp_path):
    """Settings of a run on three photographs that measures a fourth."""
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "astronaut.png").write_bytes((ASSETS / "astronaut.png").read_bytes())
    return {
        "train_data_dir": [str(ASSETS / name) for name in ("chelsea.png", "coffee.png", "rocket.jpg")],
        "validation_data_dir": [str(tmp_path / "held_out")],
        "validation_resolution": 64,
        "resolution": 32,
        "crop_sizes": ["32"],
        "train_batch_size": 32,
        "lr_warmup_steps": 20,
        "logging_steps": 50,
        "validation_steps": 10**6,
        "checkpointing_steps": 10**6,
        "kl_weight": 1e-4,
    }


def test_half_a_minute_of_stage_1(arguments, held_out):
    args = arguments(CONFIG, **held_out, max_minutes=0.5, max_train_steps=400, learning_rate=2e-3)
    trainer = AutoencoderTrainer(args)
    before, _ = trainer.evaluate()
    trainer.train()
    after, _ = trainer.evaluate()
    assert after["held_out_psnr"] > before["held_out_psnr"] + 8.0


@pytest.mark.slow
class TestTwoMinutes:
    @pytest.mark.parametrize("use_ema", [False, True])
    def test_stage_1(self, arguments, held_out, use_ema):
        options = {"max_minutes": 2.0, "max_train_steps": 1500, "learning_rate": 2e-3, "use_ema": use_ema}
        trainer = AutoencoderTrainer(arguments(CONFIG, **held_out, **options))
        before, _ = trainer.evaluate()
        trainer.train()
        after, _ = trainer.evaluate()
        losses = list(read_log(trainer.args.output_dir).values())
        assert losses[-1] < 0.1 * losses[0]
        for label in ("", "_ema") if use_ema else ("",):
            assert after[f"held_out{label}_psnr"] > before[f"held_out{label}_psnr"] + 6.0

    @pytest.mark.parametrize("use_ema", [False, True])
    def test_stage_2(self, arguments, stage2, held_out, tmp_path, use_ema):
        """After a short stage 1, the reconstruction error falls on, and so does the discriminator's loss."""
        run(arguments(CONFIG, **held_out, max_train_steps=300, learning_rate=2e-3))
        second = stage2(
            **held_out,
            pretrained_model_name_or_path=str(tmp_path / "run" / "vae"),
            output_dir=str(tmp_path / "second"),
            max_minutes=2.0,
            max_train_steps=900,
            learning_rate=1e-3,
            gan_weight=2e-3,
            gan_start_step=100,
            discriminator_channels=16,
            use_ema=use_ema,
        )
        trainer = AutoencoderTrainer(second)
        trainer.train()
        after, _ = trainer.evaluate()
        for name in ("mse", "discriminator_loss"):
            losses = list(read_log(second.output_dir, name).values())
            assert losses[-1] < 0.95 * losses[0]
        if use_ema:
            assert after["held_out_ema_psnr"] > after["held_out_psnr"] - 0.1
