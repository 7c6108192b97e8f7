"""Options that make latents easier to learn for a diffusion model."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from tests.conftest import ARCHITECTURES, TINY, assert_close, make_vae
from tests.training.conftest import next_batches, read_log, run
from vitok_hf import AutoencoderViTok
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.diffusability import Change, add_noise, alignment_terms, draw_change


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


def generators_of(part) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in part.seeds]


@pytest.fixture
def vision(tmp_path) -> str:
    """A vision transformer with a class token, whose positions are for 4 x 4 patches of 4 pixels."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES), add_pooling_layer=False).save_pretrained(
        tmp_path / "vit"
    )
    ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


class TestChange:
    def test_sizes_and_flips(self):
        pixels, latents = torch.rand(2, 3, 1, 32, 64), torch.rand(2, 4, 1, 4, 8)
        change = Change(0.5, (-1,))
        (small,), (code,) = change.pixels([pixels], 8), change.bind([])([latents])
        assert small.shape == (2, 3, 1, 16, 32) and code.shape == (2, 4, 1, 2, 4)
        expected = F.interpolate(pixels[:, :, 0], size=(16, 32), mode="bilinear", antialias=True).flip(-1)
        assert_close(small[:, :, 0], expected)
        assert_close(Change(1.0, (-2,)).bind([])([latents])[0], latents.flip(-2))
        assert Change(0.25).bind([])([torch.rand(1, 4, 3, 2, 1)])[0].shape == (1, 4, 3, 1, 1)

    def test_drawn_as_often_as_asked(self, arguments):
        torch.manual_seed(0)
        changes = [draw_change(arguments(equivariance=0.25, latent_noise=0.5)) for _ in range(2000)]
        factors = torch.tensor([change.factor for change in changes if change.factor is not None])
        assert len(factors) / 2000 == pytest.approx(0.25, abs=0.03)
        assert 0.25 <= factors.min() < 0.27 and 0.98 < factors.max() <= 1.0
        assert {change.flips for change in changes} == {(), (-1,), (-2,), (-2, -1)}
        assert {change.noise for change in changes} == {0.5}

    def test_without_options_no_random_number_is_taken(self, arguments):
        state = torch.get_rng_state()
        assert draw_change(arguments()).bind([]) is None and torch.equal(torch.get_rng_state(), state)

    def test_noise_is_in_standard_deviations_of_the_channel(self):
        latents = torch.randn(4, 3, 1, 64, 64) * torch.tensor([0.1, 1.0, 10.0]).view(1, 3, 1, 1, 1)
        noisy = add_noise(latents, 0.8, generators(4))
        levels = torch.stack([torch.randn((), generator=generator) for generator in generators(4)]).abs() * 0.8
        spread = latents.std(dim=(0, 2, 3, 4))
        assert_close((noisy - latents).std(dim=(2, 3, 4)) / spread, levels[:, None].expand(4, 3), atol=0.02)
        assert_close(
            add_noise(latents[2:], 0.8, generators(4)[2:]).sub(latents[2:]).std(), (noisy - latents)[2:].std(), 0.1
        )


class TestTraining:
    @pytest.mark.parametrize("architecture", ["v1", "v2", "causal"])
    def test_equivariance(self, arguments, architecture):
        trainer = AutoencoderTrainer(arguments(ARCHITECTURES[architecture], equivariance=1.0, max_train_steps=2))
        (part,), totals = trainer._prepare(next_batches(trainer))
        output = trainer._reconstruct(part)
        assert part.wanted[0].shape != part.pixels[0].shape or part.change.factor > 0.75
        codes = trainer.vae._posterior(output.parameters).sample(generators_of(part))
        codes = Change(part.change.factor, part.change.flips).bind([])(codes)
        for sample, code, wanted in zip(output.sample, codes, part.wanted):
            assert sample.shape == wanted.shape
            assert_close(sample, trainer.vae.decode(code).sample, 1e-4)
        assert totals[1] == sum(x.numel() for x in part.wanted)
        trainer.train()
        assert set(read_log(trainer.output_dir)) == {1, 2}

    @pytest.mark.parametrize("options", [{"equivariance": 1.0}, {"latent_noise": 0.8}])
    def test_pictures_of_their_own_sizes(self, arguments, options):
        trainer = AutoencoderTrainer(arguments(crop_sizes=[], max_tokens=60, max_train_steps=3, **options))
        for part in trainer._prepare(next_batches(trainer, 4))[0]:
            assert any(side % 8 for run in part.pixels for side in run.shape[-2:])
            output = trainer._reconstruct(part)
            assert [x.shape for x in output.sample] == [x.shape for x in part.wanted]
        trainer.train()
        assert set(read_log(trainer.output_dir)) == {1, 2, 3}

    @pytest.mark.parametrize("stage", [1, 2])
    def test_noise_reaches_the_decoder_alone(self, arguments, stage2, stage):
        trainer = AutoencoderTrainer((arguments, stage2)[stage - 1](latent_noise=0.8, max_train_steps=2))
        (part,), _ = trainer._prepare(next_batches(trainer))
        output = trainer._reconstruct(part)
        used = generators_of(part)
        codes = trainer.vae._posterior(output.parameters).sample(used)
        noisy = add_noise(codes[0], 0.8, used[: len(codes[0])])
        assert_close(output.sample[0], trainer.vae.decode(noisy).sample)
        trainer.train()
        assert set(read_log(trainer.output_dir)) == {1, 2}

    def test_noise_of_prefixes_leaves_what_is_missing(self, arguments):
        trainer = AutoencoderTrainer(arguments(TINY | {"channel_counts": [1, 4]}, latent_noise=0.8))
        (part,), _ = trainer._prepare(next_batches(trainer))
        part.lengths["num_channels"] = [1] * len(part.seeds)
        output = trainer._reconstruct(part)
        used = generators_of(part)
        codes = trainer.vae._posterior(output.parameters).sample(used)
        noisy = add_noise(codes[0], 0.8, used[: len(codes[0])])
        assert_close(output.sample[0], trainer.vae.decode(noisy[:, :1]).sample)

    def test_alignment_of_pictures_of_their_own_sizes(self, arguments, vision):
        options = {"alignment_model_name_or_path": vision, "crop_sizes": [], "max_tokens": 60}
        trainer = AutoencoderTrainer(arguments(**options))
        for part in trainer._prepare(next_batches(trainer, 3))[0]:
            for code, pixels in zip(trainer._reconstruct(part).parameters, part.pixels):
                padded = F.pad(pixels, (0, -pixels.shape[-1] % 8, 0, -pixels.shape[-2] % 8))
                means = code[:, :4, 0].flatten(2)
                terms = alignment_terms(means.mT, trainer.alignment.features(padded[:, :, 0]))
                loss, _ = trainer.alignment.loss([code], [pixels], means.numel())
                assert loss.item() == pytest.approx(0.01 * terms.sum().item(), rel=1e-4)

    def test_noise_on_the_latents_of_a_teacher(self, arguments, tmp_path):
        make_vae("v1", scaling_factor=0.5).save_pretrained(tmp_path / "teacher")
        trainer = AutoencoderTrainer(arguments(latent_noise=0.8, teacher_model_name_or_path=str(tmp_path / "teacher")))
        (part,), _ = trainer._prepare(next_batches(trainer))
        used = generators_of(part)
        noisy = add_noise(part.lesson.sample(used)[0], 0.8, used[: len(part.pixels[0])])
        assert_close(trainer._reconstruct(part).sample[0], trainer.vae.decode(noisy).sample)

    def test_alignment(self, arguments, vision):
        logs = run(arguments(alignment_model_name_or_path=vision, alignment_weight=2.0, max_train_steps=2)).output_dir
        loss, terms = read_log(logs, "loss"), [read_log(logs, f"alignment_{x}") for x in ("cosine", "distance")]
        rest = [read_log(logs, "mse")[1], 1e-3 * read_log(logs, "kl")[1]]
        assert loss[1] == pytest.approx(2 * sum(term[1] for term in terms) + sum(rest), rel=1e-3)


class TestAlignment:
    def make(self, arguments, vision, **config):
        trainer = AutoencoderTrainer(
            arguments(TINY | config, alignment_model_name_or_path=vision, alignment_weight=2.0)
        )
        return trainer.alignment, trainer

    def test_features_have_the_places_of_the_latents(self, arguments, vision):
        alignment, _ = self.make(arguments, vision)
        images = torch.rand(2, 3, 24, 32) * 2 - 1
        with torch.no_grad():
            resized = F.interpolate(images, size=(12, 16), mode="bicubic", antialias=True).clamp(-1, 1)
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
            network = ViTModel.from_pretrained(vision, add_pooling_layer=False)
            tokens = network(((resized + 1) / 2 - mean) / std, interpolate_pos_encoding=True).last_hidden_state
        assert alignment.features(images).shape == (2, 3 * 4, 16)
        assert_close(alignment.features(images), tokens[:, 1:])

    def test_terms(self):
        torch.manual_seed(0)
        features = torch.randn(2, 9, 6)
        assert_close(alignment_terms(features * 3, features), torch.zeros(2))
        latents = torch.randn(2, 9, 3)
        flat, wanted = latents.flatten(0, 1), features.flatten(0, 1)
        predicted = flat @ torch.linalg.lstsq(flat, wanted).solution
        cosine = (0.5 - F.cosine_similarity(predicted, wanted, dim=-1)).clamp(min=0).mean()
        similarity = [F.cosine_similarity(x[:, :, None], x[:, None], dim=-1) for x in (latents, features)]
        distance = ((similarity[0] - similarity[1]).abs() - 0.25).clamp(min=0).mean()
        assert_close(alignment_terms(latents, features), torch.stack([cosine, distance]), atol=1e-3)

    def test_latents_follow(self):
        torch.manual_seed(0)
        features, latents = torch.randn(2, 16, 6), torch.randn(2, 16, 4, requires_grad=True)
        optimizer, losses = torch.optim.Adam([latents], 0.05), []
        for _ in range(100):
            losses.append(alignment_terms(latents, features).sum())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[0] > 0.3 and losses[-1] < 0.3 * losses[0]

    def test_loss_counts_every_latent_alike(self, arguments, vision):
        alignment, trainer = self.make(arguments, vision)
        runs = [torch.rand(2, 3, 1, 16, 16) * 2 - 1, torch.rand(1, 3, 1, 16, 48) * 2 - 1]
        parameters = trainer.vae(runs, decode=False).parameters
        terms = [
            alignment_terms(x[:, :4, 0].flatten(2).mT, alignment.features(run[:, :, 0]))
            for x, run in zip(parameters, runs)
        ]
        expected = (terms[0] * 8 + terms[1] * 12) / 20
        loss, logs = alignment.loss(parameters, runs, 4 * 20)
        assert_close(torch.stack([*logs.values()]), expected) and loss.requires_grad
        assert loss.item() == pytest.approx(2 * expected.sum().item(), rel=1e-5)

    def test_networks_without_a_processor_and_grey(self, arguments, tmp_path):
        Dinov2Model(Dinov2Config(image_size=16, patch_size=4, **SIZES)).save_pretrained(tmp_path / "dino")
        alignment, _ = self.make(arguments, str(tmp_path / "dino"), in_channels=1)
        assert_close(alignment.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
        assert alignment.features(torch.rand(1, 1, 16, 8)).shape == (1, 2, 16)

    def test_networks_that_do_not_fit(self, arguments, tmp_path):
        CLIPModel(CLIPConfig()).save_pretrained(tmp_path / "clip")
        with pytest.raises(ValueError, match="CLIPModel without a `patch_size`: name a ViT"):
            self.make(arguments, str(tmp_path / "clip"))


@pytest.mark.parametrize(
    "options, config, message",
    [
        ({"stage": 2, "equivariance": 0.5}, {}, "`equivariance` is 0.5, but the encoder learns nothing"),
        ({"equivariance": 0.5}, {"token_counts": [2, 4]}, r"a model with \['token_counts'\] are on no grid"),
        ({"equivariance": 0.5}, {"num_latent_tokens": 2}, r"a model with \['num_latent_tokens'\] are on no grid"),
        ({"stage": 2, "alignment_model_name_or_path": "x"}, {}, "`alignment_model_name_or_path` is 'x', but the enc"),
        ({"alignment_model_name_or_path": "x"}, {"in_channels": 5}, "no colours, or no pictures on a grid"),
        (
            {"alignment_model_name_or_path": "x"},
            {"temporal_patch_size": 2, "sample_frames": 2},
            "no pictures on a grid",
        ),
        ({"alignment_model_name_or_path": "x"}, {"num_latent_tokens": 4}, "no pictures on a grid"),
    ],
)
def test_what_has_no_effect_is_refused(arguments, tmp_path, options, config, message):
    AutoencoderViTok(**TINY | config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        AutoencoderTrainer(arguments(pretrained_model_name_or_path=str(tmp_path / "model"), **options))


def test_noise_without_a_decoder_to_train_is_refused(arguments, tmp_path):
    make_vae("v1", scaling_factor=0.5).save_pretrained(tmp_path / "teacher")
    teacher = {"teacher_model_name_or_path": str(tmp_path / "teacher"), "distill": "encoder"}
    with pytest.raises(ValueError, match="`latent_noise` is 0.8, but no decoder is trained"):
        AutoencoderTrainer(arguments(latent_noise=0.8, **teacher))
