"""Autoencoders that learn the latents of others."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan

from tests.conftest import ARCHITECTURES, TINY, assert_close
from tests.training.conftest import next_batches, read_log, run
from vitok_hf import AutoencoderViTok
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.teacher import Teacher


STUDENT = TINY | {"patch_size": 4}
KL = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
DC = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
    "scaling_factor": 0.5,
}
WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.0, 1.0, 0.0, 0.5]}
WAN |= {"latents_std": [1.0, 2.0, 0.5, 1.5]}


def save(model: torch.nn.Module, folder) -> str:
    model.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


@pytest.fixture
def teacher(tmp_path) -> str:
    """Of 4 x 4 pixels and 4 channels."""
    torch.manual_seed(0)
    return save(AutoencoderKL(**KL), tmp_path)


def weights(vae: AutoencoderViTok) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}


@pytest.mark.parametrize("part", ["encoder", "decoder", "both"])
def test_each_part_alone_and_both(arguments, teacher, part):
    trainer = AutoencoderTrainer(arguments(STUDENT, teacher_model_name_or_path=teacher, distill=part))
    before = weights(trainer.vae)
    trainer.train()
    changed = {
        name.split(".")[0]
        for name, old in before.items()
        if not torch.equal(old, dict(trainer.vae.named_parameters())[name])
    }
    assert changed == ({"encoder", "decoder"} if part == "both" else {part})
    assert bool(read_log(trainer.output_dir, "latents")) == (part != "decoder")
    assert bool(read_log(trainer.output_dir, "mse")) == (part != "encoder")
    assert not read_log(trainer.output_dir, "kl")
    saved = AutoencoderViTok.from_pretrained(trainer.output_dir / "vae").config
    assert (saved.scaling_factor, saved.shift_factor, saved.latents_std) == (0.5, 0.25, None)


def test_the_latents_are_learnt(arguments, teacher):
    trainer = run(arguments(STUDENT, teacher_model_name_or_path=teacher, distill="encoder", max_train_steps=80))
    values = list(read_log(trainer.output_dir, "latents").values())
    assert values[-1] < 0.5 * values[0]


def test_loss_is_in_spreads_of_the_teacher(arguments, teacher):
    args = arguments(STUDENT, teacher_model_name_or_path=teacher, latent_weight=3.0)
    lesson_of = Teacher(args, AutoencoderViTok(**STUDENT))
    runs = [torch.rand(2, 3, 1, 16, 16) * 2 - 1, torch.rand(1, 3, 1, 8, 32) * 2 - 1]
    lesson = lesson_of.teach(runs)
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(teacher).encode(runs[0][:, :, 0]).latent_dist
    assert_close(lesson.means[0][:, :, 0], posterior.mean)
    assert_close(lesson.stds[0][:, :, 0], posterior.std)
    count = sum(mean.numel() for mean in lesson.means)
    for shift, expected in ((0.0, 0.0), (2.0, 3.0)):  # 2.0 is one spread, 1 / scaling_factor
        means = [mean + shift for mean in lesson.means]
        parameters = [torch.cat([mean, 2 * std.log()], dim=1) for mean, std in zip(means, lesson.stds)]
        loss, log = lesson_of.loss(parameters, lesson, count)
        assert loss.item() == pytest.approx(expected, abs=1e-5) and log["latent_stds"].item() < 1e-9
    parameters = [torch.cat([mean, 2 * (std + 2.0).log()], dim=1) for mean, std in zip(lesson.means, lesson.stds)]
    loss, log = lesson_of.loss(parameters, lesson, count)
    assert loss.item() == pytest.approx(3.0, rel=1e-4) and log["latents"].item() == 0.0


def test_decoder_sees_samples_of_the_teacher(arguments, teacher, monkeypatch):
    trainer = AutoencoderTrainer(arguments(STUDENT, teacher_model_name_or_path=teacher))
    (part,), _ = trainer._prepare(next_batches(trainer))
    lesson, output = part.lesson, trainer._reconstruct(part)
    noise = torch.randn(lesson.means[0][:1].shape, generator=torch.Generator().manual_seed(part.seeds[0]))
    latents = lesson.means[0][:1] + lesson.stds[0][:1] * noise
    assert_close(output.sample[0][:1], trainer.vae.decode(latents).sample)
    assert_close(output.parameters[0], trainer.vae(part.pixels, decode=False).parameters[0])
    gradients = torch.autograd.grad(output.sample[0].sum(), list(trainer.vae.encoder.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_gan_on_the_latents_of_the_teacher(arguments, teacher):
    args = arguments(STUDENT, teacher_model_name_or_path=teacher, stage=2, gan_weight=0.1, adaptive_gan_weight=10.0)
    assert args.distill == "decoder" and args.freeze_encoder
    trainer = run(args)
    assert read_log(trainer.output_dir, "discriminator_loss")


def test_batches_of_an_accumulation_are_taught_once(arguments, teacher, monkeypatch):
    options = {"stage": 2, "gan_weight": 0.1, "adaptive_gan_weight": 10.0, "gradient_accumulation_steps": 2}
    trainer = AutoencoderTrainer(arguments(STUDENT, teacher_model_name_or_path=teacher, max_train_steps=3, **options))
    taught, teach = [], trainer.teacher.teach
    monkeypatch.setattr(trainer.teacher, "teach", lambda runs: taught.append(runs) or teach(runs))
    trainer.train()
    assert len(taught) == 3 * 2


def test_pictures_that_are_padded(arguments, teacher):
    trainer = run(
        arguments(STUDENT, teacher_model_name_or_path=teacher, max_tokens=64, crop_sizes=[], max_train_steps=2)
    )
    assert read_log(trainer.output_dir, "latents")
    x = torch.rand(1, 3, 1, 13, 18) * 2 - 1
    padded = torch.nn.functional.pad(x, (0, 2, 0, 3))
    assert_close(trainer.teacher.teach([x]).means, trainer.teacher.teach([padded]).means)


def test_held_out_pictures_by_halves(arguments, teacher):
    held_out = {"validation_data_dir": ["examples/assets"], "validation_resolution": 16, "num_validation_images": 2}
    trainer = run(arguments(STUDENT, teacher_model_name_or_path=teacher, max_train_steps=3, **held_out))
    values = [trainer.metrics[f"assets_psnr{part}"] for part in ("", "_from_teacher", "_to_teacher")]
    assert len(set(values)) == 3


def test_teacher_without_variances(arguments, tmp_path):
    teacher = save(AutoencoderDC(**DC), tmp_path)
    trainer = run(arguments(STUDENT, teacher_model_name_or_path=teacher))
    assert set(read_log(trainer.output_dir, "latent_stds").values()) == {0.0}


def test_video_teacher(arguments, tmp_path):
    config = ARCHITECTURES["causal"]
    student = AutoencoderViTok(**config)
    args = arguments(config, teacher_model_name_or_path=save(AutoencoderKLWan(**WAN), tmp_path))
    teacher = Teacher(args, student)
    (mean,) = teacher.teach([torch.rand(1, 3, 5, 16, 16)]).means
    assert mean.shape == (1, 4, 2, 2, 2)
    assert teacher.statistics["latents_std"] == WAN["latents_std"]
    assert teacher.spread.flatten().tolist() == WAN["latents_std"]


@pytest.mark.parametrize(
    "change, found, wanted",
    [
        ({"patch_size": 8}, "4 x 1 x 8 x 8", "3 x 1 x 32 x 32 into 4 x 1 x 4 x 4"),
        ({"patch_size": 3}, "3 x 1 x 12 x 12 values into 4 x 1 x 3 x 3", "3 x 1 x 12 x 12 into 4 x 1 x 4 x 4"),
        ({"latent_channels": 5}, "4 x 1 x 4 x 4", "3 x 1 x 16 x 16 into 5 x 1 x 4 x 4"),
        (
            {"sample_frames": 2, "temporal_patch_size": 2},
            "3 x 2 x 16 x 16 values into 4 x 2 x 4 x 4",
            "3 x 2 x 16 x 16 into 4 x 1 x 4 x 4",
        ),
    ],
)
def test_other_factors_are_refused(arguments, teacher, change, found, wanted):
    with pytest.raises(ValueError, match=f"{found} latents, this model {wanted}"):
        Teacher(arguments(teacher_model_name_or_path=teacher), AutoencoderViTok(**STUDENT | change))


def test_frames_of_causal_teachers(arguments, tmp_path):
    args = arguments(teacher_model_name_or_path=save(AutoencoderKLWan(**WAN), tmp_path))
    message = "turns 3 x 5 x 32 x 32 values into 4 x 2 x 4 x 4 latents, this model 3 x 4 x 32 x 32 into 4 x 2 x 4 x 4"
    with pytest.raises(ValueError, match=message):
        Teacher(args, AutoencoderViTok(**ARCHITECTURES["video"]))


def test_teachers_of_other_pictures_are_refused(arguments, tmp_path):
    teacher = save(AutoencoderKL(**KL, in_channels=1, out_channels=1), tmp_path)
    with pytest.raises(ValueError, match="takes pictures of 1 channels, this model of 3: give it as many"):
        Teacher(arguments(teacher_model_name_or_path=teacher), AutoencoderViTok(**STUDENT))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latents_std": [1.0, 2.0, 3.0]}, "`latents_std` has 3 entries, but `latent_channels` is 4"),
        ({"latents_mean": [1.0]}, "`latents_mean` has 1 entries"),
        ({"latents_std": [1.0, 2.0, 3.0, 0.0]}, "must be positive"),
        ({"scaling_factor": -2.0}, "must be positive, but are -2.0"),
    ],
)
def test_wrong_statistics_are_refused(arguments, tmp_path, change, message):
    teacher = save(AutoencoderKL(**KL | change), tmp_path)
    with pytest.raises(ValueError, match=f"The config of the teacher .* has wrong statistics: .*{message}"):
        Teacher(arguments(teacher_model_name_or_path=teacher), AutoencoderViTok(**STUDENT))


def test_students_whose_codes_are_cut_are_refused(arguments, teacher):
    student = AutoencoderViTok(**STUDENT | {"channel_counts": [2, 4]})
    with pytest.raises(ValueError, match=r"`channel_counts` \[2, 4\], but the latents of a teacher are whole"):
        Teacher(arguments(teacher_model_name_or_path=teacher), student)


def test_teacher_without_statistics(arguments, tmp_path):
    teacher = save(AutoencoderKL(**KL | {"scaling_factor": 1.0}), tmp_path)
    with pytest.raises(ValueError, match="AutoencoderKL has no statistics of its latents: write"):
        AutoencoderTrainer(arguments(STUDENT, teacher_model_name_or_path=teacher))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"distill": "all"}, "`distill` must be one of encoder, decoder, both"),
        ({"stage": 2, "distill": "encoder"}, '`distill` "encoder" trains no decoder'),
        ({"freeze_encoder": True}, '`freeze_encoder` is True, but `distill` "both"'),
        ({"channel_counts": [2, 4]}, r"`channel_counts` \[2, 4\] cuts codes"),
        ({"teacher_model_name_or_path": None, "distill": "both"}, "There is no `teacher_model_name_or_path`"),
    ],
)
def test_settings_that_do_not_go_together(arguments, change, message):
    with pytest.raises(ValueError, match=message):
        arguments(**{"teacher_model_name_or_path": "teacher"} | change)
