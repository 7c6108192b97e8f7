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


def test_stage_1(arguments, held_out):
    args = arguments(CONFIG, **held_out, max_train_steps=400, learning_rate=2e-3)
    trainer = AutoencoderTrainer(args)
    before, _ = trainer.evaluate()
    trainer.train()
    after, _ = trainer.evaluate()
    assert after["held_out_psnr"] > before["held_out_psnr"] + 8.0


@pytest.mark.slow
def test_two_minutes_of_stage_2(arguments, stage2, held_out, tmp_path):
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
        use_ema=True,
    )
    trainer = AutoencoderTrainer(second)
    trainer.train()
    after, _ = trainer.evaluate()
    for name in ("mse", "discriminator_loss"):
        losses = list(read_log(second.output_dir, name).values())
        assert losses[-1] < 0.95 * losses[0]
    assert after["held_out_ema_psnr"] > after["held_out_psnr"] - 0.1
