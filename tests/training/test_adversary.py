import copy

import pytest
import torch

from tests.conftest import ARCHITECTURES, TINY
from tests.training.conftest import keep_gradients, next_batches, read_log, run, split_batch
from vitok_hf.clips import to_float, to_runs
from vitok_hf.data.batches import Batch
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


def step(trainer: AutoencoderTrainer, count: int = 1) -> list[dict[str, torch.Tensor]]:
    """Optimiser steps on one batch."""
    batch = next(iter(trainer.loader))
    logs = []
    for _ in range(count):
        logs += trainer.training_step([batch])
        trainer.step += 1
    return logs


def decoder_gradient(trainer: AutoencoderTrainer) -> torch.Tensor:
    keep_gradients(trainer)
    step(trainer)
    return torch.cat([parameter.grad.flatten() for parameter in trainer.vae.decoder.parameters()])


class TestStage2:
    def test_encoder_is_frozen(self, stage2):
        trainer = AutoencoderTrainer(stage2(use_ema=True))
        before = {name: value.clone() for name, value in trainer.vae.state_dict().items()}
        step(trainer, 3)
        for name, value in trainer.vae.state_dict().items():
            assert torch.equal(value, before[name]) == name.startswith("encoder.")
        optimized = {id(x) for group in trainer.models["vae"].optimizer.param_groups for x in group["params"]}
        assert optimized == {id(x) for x in trainer.vae.decoder.parameters()}
        assert len(trainer.average.shadow_params) == len(optimized)
        assert not trainer.vae.encoder.training and trainer.vae.decoder.training
        posterior = trainer.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist
        assert not posterior.mode().requires_grad

    def test_full_fine_tuning(self, stage2):
        trainer = AutoencoderTrainer(stage2(freeze_encoder=False))
        before = trainer.vae.encoder.proj_out.weight.clone()
        (logs,) = step(trainer)
        step(trainer)
        assert not torch.equal(trainer.vae.encoder.proj_out.weight, before) and "kl" in logs

    def test_both_learn(self, stage2):
        """The discriminator lowers its loss on a fixed batch, and its loss reaches the decoder, not the other way."""
        trainer = AutoencoderTrainer(stage2(gan_weight=0.0, learning_rate=0.0))
        losses = [log["discriminator_loss"].item() for log in step(trainer, 15)]
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
    def test_gan_loss_reaches_the_decoder(self, stage2, kind):
        plain, adversarial, stronger = (
            decoder_gradient(AutoencoderTrainer(stage2(gan_loss=kind, gan_weight=weight, lr_warmup_steps=0)))
            for weight in (0.0, 0.1, 0.2)
        )
        assert (adversarial - plain).abs().max() > 1e-6
        torch.testing.assert_close(stronger - plain, 2 * (adversarial - plain), rtol=1e-2, atol=1e-6)

    def test_decoder_leaves_no_gradients_in_the_discriminator(self, stage2):
        trainer = AutoencoderTrainer(stage2())
        step(trainer)
        discriminator = trainer.models["discriminator"].model
        assert all(x.grad is None or x.grad.abs().sum() == 0 for x in discriminator.parameters())
        assert all(x.requires_grad for x in discriminator.parameters())

    def test_both_learn_from_the_same_reconstructions(self, stage2):
        """The decoder's loss is that of the discriminator before its step, and the discriminator's of the same."""
        trainer = AutoencoderTrainer(stage2(discriminator_warmup_steps=0, discriminator_learning_rate=1e-2))
        discriminator, fakes = trainer.models["discriminator"].model, []
        before = copy.deepcopy(discriminator)
        handle = discriminator.register_forward_hook(lambda _, arguments, output: fakes.append(arguments[0][0]))
        (logs,) = step(trainer)
        handle.remove()
        (expected,) = before([fakes[0]])
        assert logs["gan"].item() == pytest.approx(-expected.mean().item(), rel=1e-5)
        assert logs["logits_fake"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
        assert (discriminator([fakes[0]])[0] - expected).abs().max() > 1e-3
        assert len(fakes) == 2 and torch.equal(*fakes) and not fakes[1].requires_grad

    def test_learning_rates(self, stage2):
        rates = {"discriminator_learning_rate": 0.1, "discriminator_warmup_steps": 4}
        trainer = AutoencoderTrainer(stage2(learning_rate=1.0, lr_warmup_steps=0, **rates))
        rates = [trainer.models["discriminator"].learning_rate(step) for step in range(5)]
        assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
        assert trainer.models["vae"].learning_rate(0) == 1.0

    def test_architecture_of_the_discriminator(self, stage2):
        args = stage2(discriminator_channels=6, discriminator_minibatch_stddev=False, resolution=64, crop_sizes=["64"])
        discriminator = AutoencoderTrainer(args).models["discriminator"].model
        assert discriminator.conv_in.out_channels == 6 and len(discriminator.blocks) == 4
        assert not discriminator.minibatch_stddev

    def test_native_aspect_ratio(self, stage2):
        args = stage2(TINY, max_tokens=200, resolution=32, crop_sizes=[], max_train_steps=2)
        shapes = [run.shape for run in next_batches(run(args))[0].pixels]
        assert len(shapes) > 1 and all(height * width <= 32**2 for *_, height, width in shapes)
        assert sorted(read_log(args.output_dir, "gan")) == [1, 2]


def take_steps(args, steps: list[list[Batch]]) -> tuple[list[torch.Tensor], list[dict[str, float]], list[int]]:
    """Weights of all models after optimiser steps on these batches, logs, and the pictures of each forward call."""
    trainer, logs, calls = AutoencoderTrainer(args), [], []
    trainer.vae.register_forward_hook(lambda _, arguments, output: calls.append(len(output.kl)))
    for batches in steps:
        parts = trainer.training_step(batches)
        names = {name for part in parts for name in part}
        values = {name: [float(part[name]) for part in parts if name in part] for name in names}
        logs.append({name: sum(value) / len(value) for name, value in values.items()})
        trainer.step += 1
    weights = [value for model in trainer.models.values() for value in model.unwrapped.state_dict().values()]
    return weights, logs, calls


class TestAccumulation:
    """Several batches in a step equal a single one: weights and logs after three steps, with noise and GAN."""

    REGULARISED = {"r1_weight": 1.0, "r1_every": 2, "lecam_weight": 0.1, "adaptive_gan_weight": 1e4}
    NATIVE, OPEN = {"max_tokens": 200, "resolution": 32, "crop_sizes": []}, {"freeze_encoder": False}

    def pictures(self, shapes: list[tuple[int, ...]], steps: int = 3) -> list[Batch]:
        generator = torch.Generator().manual_seed(3)
        drawn = [[torch.randint(256, x, generator=generator, dtype=torch.uint8) for x in shapes] for _ in range(steps)]
        return [Batch(to_runs(items)[0]) for items in drawn]

    @pytest.mark.parametrize(
        "sides, parts, overrides",
        [
            ([(1, 16, 16)] * 8, [4, 4], {}),
            ([(1, 16, 16)] * 8, [4, 4], {"freeze_encoder": False} | REGULARISED),
            ([(1, 8, 32)] * 12, [4, 4, 4], REGULARISED),
            ([(1, 16, 16)] * 8, [2] * 4, {"discriminator_minibatch_stddev": False} | REGULARISED),
            ([(1, 16, 24)] * 4 + [(1, 13, 21), (1, 32, 24), (1, 8, 9), (1, 32, 32)], [4, 4], OPEN | NATIVE),
            ([(1, 16, 24)] * 5 + [(1, 13, 21), (1, 8, 9), (1, 32, 32)], [5, 2, 1], NATIVE | REGULARISED),
            ([(4, 16, 16)] * 4, [2, 2], REGULARISED),
        ],
    )
    def test_equals_a_larger_batch(self, stage2, video, sides, parts, overrides):
        config = TINY
        if sides[0][0] == 4:
            config, overrides = ARCHITECTURES["video"], overrides | {"train_data_dir": [str(video)]}
        options = {"lr_warmup_steps": 0, "discriminator_warmup_steps": 0, "discriminator_learning_rate": 1e-3}
        options |= {"discriminator_minibatch_stddev": 5 not in parts, "max_grad_norm": 1e9, "learning_rate": 1e-4}
        whole, results = self.pictures([(3, *side) for side in sides]), []
        for counts in ([len(sides)], parts):
            args = stage2(config, gradient_accumulation_steps=len(counts), **options | overrides)
            results.append(take_steps(args, [split_batch(batch, counts) for batch in whole]))
        (weights, logs, calls), (ours, our_logs, our_calls) = results
        for one, other in zip(ours, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        for one, other in zip(our_logs, logs, strict=True):
            assert one == pytest.approx(other, rel=2e-4, abs=1e-6)
        assert {"gan", "discriminator_loss", "grad_norm", "discriminator_grad_norm"} <= set(logs[0])
        assert sum(calls) == 3 * len(sides)
        passes = 2 if "adaptive_gan_weight" in overrides else 1  # a weight of the whole step has to be known before
        assert sum(our_calls) == 3 * len(sides) * passes

    def test_pictures_have_noise_of_their_own(self, stage2):
        """Two equal pictures of a step get different samples, and another step's get others."""
        trainer, samples = AutoencoderTrainer(stage2(gradient_accumulation_steps=2)), []
        trainer.vae.register_forward_hook(lambda _, arguments, output: samples.extend(output.sample[0].detach()))
        picture = self.pictures([(3, 1, 16, 16)])[0].pixels[0].repeat(2, 1, 1, 1, 1)
        for _ in range(2):
            trainer.training_step([Batch([picture])] * 2)
        for index, sample in enumerate(samples):
            assert all((sample - other).abs().max() > 1e-3 for other in samples[:index])
        assert len(samples) == 8


class TestWeight:
    def test_before_the_start_it_is_where_the_losses_are(self, stage2):
        adversary = AutoencoderTrainer(stage2(gan_start_step=3)).adversary
        _, logs = adversary.generator_loss([], torch.zeros((), device="meta"), step=0)
        assert logs["gan_weight"].device.type == "meta"

    def test_start_and_ramp(self, stage2):
        trainer = AutoencoderTrainer(stage2(gan_start_step=2, gan_ramp_steps=3, gan_weight=0.4))
        weights = [trainer.adversary.weight(step) for step in range(8)]
        assert weights == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
        first = step(trainer, 3)
        assert "discriminator_loss" in first[0] and "gan" not in first[0]
        assert first[0]["gan_weight"] == 0.0 and first[2]["gan_weight"].item() == pytest.approx(0.1)

    @pytest.mark.parametrize("bound", [1e-3, 1e6])
    def test_adaptive(self, stage2, bound):
        """Within its bound, it gives both losses gradients of one norm at the pixels, times gan_weight."""
        trainer = AutoencoderTrainer(stage2(gan_weight=0.5, adaptive_gan_weight=bound))
        target = torch.rand(2, 3, 1, 16, 16) * 2 - 1
        fakes = [(target + 0.1 * torch.randn_like(target)).requires_grad_()]
        reconstruction = (fakes[0] - target).square().mean()
        loss, logs = trainer.adversary.generator_loss(fakes, reconstruction, step=0)
        norms = [torch.autograd.grad(x, fakes, retain_graph=True)[0].norm() for x in (reconstruction, loss)]
        if bound > 1:
            assert (norms[1] / norms[0]).item() == pytest.approx(0.5, rel=1e-3)
        else:
            assert logs["gan_weight"].item() == pytest.approx(0.5e-3)
        assert not logs["gan_weight"].requires_grad and logs["gan_weight"].dtype == torch.float32


class TestRegularisation:
    def test_r1(self, stage2):
        trainer = AutoencoderTrainer(stage2(r1_weight=10.0, r1_every=3))
        logs = step(trainer, 5)
        assert [("r1" in log) for log in logs] == [True, False, False, True, False]

    def test_r1_flattens_the_discriminator(self, stage2):
        """Over some steps, the slope at real pictures falls below that without it."""
        slopes = []
        for weight in (0.0, 100.0):
            options = {"learning_rate": 0.0, "discriminator_warmup_steps": 0, "discriminator_learning_rate": 3e-3}
            trainer = AutoencoderTrainer(stage2(r1_weight=weight, r1_every=1, **options))
            step(trainer, 12)
            batch = to_float(next_batches(trainer)[0].pixels[0]).requires_grad_()
            (logits,) = trainer.models["discriminator"].model([batch])
            slopes.append(torch.autograd.grad(logits.sum(), batch)[0].norm())
        assert slopes[1] < 0.5 * slopes[0]

    def test_lecam(self, stage2):
        trainer = AutoencoderTrainer(stage2(lecam_weight=1.0))
        logs = step(trainer, 2)
        expected = torch.tensor(0.0).lerp(logs[0]["logits_real"], 0.01).lerp(logs[1]["logits_real"], 0.01)
        torch.testing.assert_close(trainer.adversary.lecam.mean_real, expected)
        assert logs[0]["lecam"] > 0
        plain = step(AutoencoderTrainer(stage2()))[0]
        assert logs[0]["discriminator_grad_norm"] != plain["discriminator_grad_norm"]
