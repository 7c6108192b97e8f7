import logging
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS, TINY
from tests.data.conftest import write_video
from tests.training.conftest import keep_gradients, next_batches, read_log, split_batch
from tests.training.dit import CLASSES, make_dit_arguments, run, write_cache
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline, denormalize_latents
from vitok_hf.clips import to_float
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.media import load_image, resize_and_crop
from vitok_hf.training import dit_trainer
from vitok_hf.training.dit_trainer import DiTTrainer


KINDS = ["epsilon", "v_prediction", "flow_prediction"]


@pytest.fixture
def arguments(tmp_path):
    return partial(make_dit_arguments, tmp_path)


class TestRun:
    @pytest.mark.parametrize("kind", KINDS)
    def test_prediction_types(self, arguments, kind):
        """Losses of a zero model, pipelines with the right scheduler, that give pictures, and the final one."""
        args = arguments(TINY | {"variational": False}, prediction_type=kind)
        trainer = run(args)
        losses = read_log(args.output_dir)
        expected = 2.0 if kind == "flow_prediction" else 1.0  # the variance of normalised latents is 1, as the noise's
        assert sorted(losses) == [1, 2, 3, 4] and losses[1] == pytest.approx(expected, rel=0.3)
        own, averages = list(trainer.transformer.parameters()), trainer.average.shadow_params
        names = {"checkpoint-4/pipeline": own, "checkpoint-4/pipeline_ema": averages, "pipeline": averages}
        for name, weights in names.items():
            pipe = ViTokDiTPipeline.from_pretrained(trainer.output_dir / name)
            assert all(map(torch.equal, pipe.transformer.parameters(), weights))
            assert pipe.config.id2label == dict(enumerate(CLASSES))
            assert pipe.scheduler.config.get("prediction_type", "flow_prediction") == kind
            assert not pipe.scheduler.config.get("clip_sample")
            assert pipe.transformer.config.num_classes == 3 and pipe.transformer.config.sample_size == 2
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe("dog", num_inference_steps=2).images
        assert image.size == (16, 16) and np.asarray(image).std() > 0

    def test_grid_and_held_out_losses(self, arguments):
        args = arguments(num_timestep_buckets=4)
        run(args)
        grids = {path.name: path for path in (Path(args.output_dir) / "samples").iterdir()}
        assert list(grids) == ["samples_ema_0000004.png"]
        assert Image.open(grids["samples_ema_0000004.png"]).size == (2 * 16, 3 * 16)
        for label in ("", "_ema"):
            parts = [f"held_out{label}_loss_{low}-{low + 250}" for low in range(0, 1000, 250)]
            values = [read_log(args.output_dir, part)[4] for part in parts]
            assert len(set(values)) == 4
            assert read_log(args.output_dir, f"held_out{label}_loss")[4] == pytest.approx(sum(values) / 4)

    def test_held_out_losses_are_of_the_weights_and_repeat(self, arguments):
        trainer = DiTTrainer(arguments(train_batch_size=3))
        first, pictures = trainer.evaluate()
        state = torch.get_rng_state()
        again, same = trainer.evaluate()
        assert first == again and np.array_equal(pictures["samples_ema"], same["samples_ema"])
        assert torch.equal(state, torch.get_rng_state()) and trainer.transformer.training
        with torch.no_grad():
            trainer.transformer.proj_out.bias.fill_(1.0)
        changed, pictures = trainer.evaluate()
        assert changed["held_out_ema_loss"] == first["held_out_loss"]
        assert changed["held_out_loss"] == pytest.approx(first["held_out_loss"] + 1.0, rel=0.2)
        assert np.array_equal(pictures["samples_ema"], same["samples_ema"])

    def test_without_average(self, arguments):
        args = arguments(use_ema=False, max_train_steps=2, validation_steps=2)
        trainer = run(args)
        assert not (Path(args.output_dir) / "checkpoint-2" / "pipeline_ema").exists()
        assert (Path(args.output_dir) / "samples" / "samples_0000002.png").exists()
        final = ViTokDiTPipeline.from_pretrained(trainer.output_dir / "pipeline").transformer
        assert all(map(torch.equal, final.parameters(), trainer.transformer.parameters()))

    @pytest.mark.parametrize(
        "vae", [{"temporal_patch_size": 2}, {"temporal_patch_size": 3, "causal": True}], ids=["video", "causal"]
    )
    def test_videos(self, arguments, tmp_path, vae):
        for split in ("clips", "held_out_clips"):
            (tmp_path / split).mkdir()
            write_video(tmp_path / split / "ramp" / "a.mp4")
        args = arguments(
            TINY | {"sample_frames": 4} | vae,
            train_data_dir=[str(tmp_path / "clips")],
            validation_data_dir=[str(tmp_path / "held_out_clips")],
            fps=12.5,
            max_train_steps=2,
            train_batch_size=2,
        )
        trainer = run(args)
        assert trainer.transformer.config.sample_frames == 2
        assert trainer.latents_of(*next_batches(trainer)).shape == (2, 4, 2, 2, 2)
        (grid,) = (Path(args.output_dir) / "samples").iterdir()
        assert Image.open(grid).size == (4 * 16, 2 * 16)
        pipe = ViTokDiTPipeline.from_pretrained(Path(args.output_dir) / "pipeline")
        assert pipe("ramp", num_inference_steps=1, output_type="np").frames.shape == (1, 4, 16, 16, 3)


class TestResume:
    @pytest.mark.parametrize("cached", [False, True])
    def test_continues_with_the_same_losses(self, arguments, tmp_path, cached):
        if cached:
            arguments = partial(arguments, latents_dir=write_cache(arguments()))
        whole = run(arguments(output_dir=str(tmp_path / "whole")))
        parts = DiTTrainer(arguments(output_dir=str(tmp_path / "parts")))
        for batch in next_batches(parts, 2):
            parts.training_step([batch])
            parts.step += 1
            parts.average.update()
        parts.save()
        resumed = run(arguments(output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest"))
        for key in ("loss", "grad_norm", "held_out_ema_loss"):
            expected, values = read_log(tmp_path / "whole", key), read_log(tmp_path / "parts", key)
            assert sorted(values) == [step for step in sorted(expected) if step > 2]
            assert all(values[step] == pytest.approx(expected[step], rel=1e-6) for step in values)
        for ours, theirs in zip(resumed.average.shadow_params, whole.average.shadow_params):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("cached", [False, True])
    def test_says_what_has_changed(self, arguments, tmp_path, cached, caplog):
        """Of the pictures, or of the cache and the autoencoder that it is of."""
        args = arguments()
        vae = AutoencoderViTok.from_pretrained(args.vae_name_or_path)
        if cached:
            arguments = partial(arguments, latents_dir=write_cache(args))
        run(arguments(max_train_steps=2))
        with torch.no_grad():
            vae.encoder.proj_out.weight.mul_(2.0)
        vae.save_pretrained(tmp_path / "vae")
        if cached:
            shutil.rmtree(tmp_path / "cache")
            write_cache(args)
        else:
            (tmp_path / "data" / "cat" / "001.png").unlink()
        with caplog.at_level(logging.WARNING):
            DiTTrainer(arguments(max_train_steps=2, resume_from_checkpoint="latest"))
        files = r"1 changed \(index.json\)" if cached else r"1 missing \(cat/001.png\)"
        changed = rf"autoencoder_sha256 \w{{64}}, not \w{{64}}; other files, {files}\."
        message = f'checkpoint-2", but its run was last started with {changed}'
        assert re.search(message, caplog.text)

    def test_statistics_are_those_of_the_checkpoint(self, arguments):
        first = run(arguments(max_train_steps=2))
        assert len(first.vae.config.latents_mean) == 4
        resumed = DiTTrainer(arguments(resume_from_checkpoint="latest", num_statistics_images=1))
        assert resumed.vae.config.latents_mean == first.vae.config.latents_mean


class TestLatents:
    def test_normalised(self, arguments):
        trainer = DiTTrainer(arguments(num_statistics_images=64, train_batch_size=64))
        latents = trainer.latents_of(*next_batches(trainer))
        assert latents.shape == (64, 4, 1, 2, 2)
        posterior = trainer.vae.encode(to_float(trainer.loader.dataset[0].pixels[0])).latent_dist
        config = trainer.vae.config
        means, stds = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        modes = (posterior.mode() - means) / stds
        torch.testing.assert_close(modes.mean(dim=(0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=1e-3)
        variance = modes.var(dim=(0, 2, 3, 4)) + (posterior.std / stds).square().mean(dim=(0, 2, 3, 4))
        torch.testing.assert_close(variance, torch.ones(4), rtol=0, atol=1e-2)
        errors = (latents - modes) * stds / posterior.std
        assert errors.std().item() == pytest.approx(1.0, rel=0.1)

    def test_own_statistics_are_kept(self, arguments):
        for own in ({"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}, {"scaling_factor": 0.5}):
            config = DiTTrainer(arguments(TINY | own)).vae.config
            assert {name: config[name] for name in own} == own
            assert (config.latents_mean is None) == ("latents_mean" not in own)

    @pytest.mark.parametrize("unset", [{"shift_factor": None}, {"shift_factor": None, "scaling_factor": None}, {}])
    def test_what_is_unset_is_no_statistics(self, arguments, unset):
        trainer = DiTTrainer(arguments(TINY | unset))
        assert len(trainer.vae.config.latents_std) == 4
        latents = trainer.latents_of(*next_batches(trainer))
        assert latents.std().item() == pytest.approx(1.0, abs=0.1)

    def test_cache_equals_fresh(self, arguments, tmp_path):
        """Losses of whole runs, with the same statistics."""
        own = {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4}
        fresh = run(arguments(TINY | own, output_dir=str(tmp_path / "fresh"), no_flip_classes=["flag"]))
        latents_dir = write_cache(fresh.args, dtype=torch.float32)
        overrides = {"latents_dir": latents_dir, "resolution": None, "no_flip_classes": ["flag"]}
        cached = run(arguments(output_dir=str(tmp_path / "cached"), **overrides))
        for key in ("loss", "held_out_loss"):
            expected = read_log(tmp_path / "fresh", key)
            assert read_log(tmp_path / "cached", key) == pytest.approx(expected, rel=1e-4)
        assert cached.resolution == 16 and cached.count_pixels(*next_batches(cached)) == 8 * 16 * 16

    def test_cache_has_statistics(self, arguments, tmp_path):
        fresh = DiTTrainer(arguments(num_statistics_images=512, random_flip=False))
        cached = DiTTrainer(arguments(latents_dir=write_cache(fresh.args)))
        assert cached.vae.config.latents_std == pytest.approx(fresh.vae.config.latents_std, rel=0.1)

    def test_rate_of_cached_clips(self, arguments, tmp_path, monkeypatch):
        monkeypatch.setattr(DiTTrainer, "start", lambda self, dataset: None)
        trainer = DiTTrainer(arguments(latents_dir=write_cache(arguments(), fps=5.0), fps=8.0))
        assert trainer.fps == 8.0  # of pictures it means nothing
        trainer.vae.register_to_config(sample_frames=4)
        with pytest.raises(ValueError, match="`fps` is 8.0, but the cached latents have 5.0"):
            trainer._choose("fps")
        trainer.args.fps = None
        assert trainer._choose("fps") == 5.0

    def test_caches_that_do_not_fit(self, arguments, tmp_path):
        arguments = partial(arguments, latents_dir=write_cache(arguments()))
        with pytest.raises(ValueError, match="`resolution` is 32, but the cached latents have 16"):
            DiTTrainer(arguments(resolution=32))
        (tmp_path / "classes.txt").write_text("dog\ncat\nflag\n")
        with pytest.raises(ValueError, match="leave out `class_file`"):
            DiTTrainer(arguments(class_file=str(tmp_path / "classes.txt")))
        with pytest.raises(ValueError, match='are of "vae", which is not the autoencoder "vitok-tiny-f8x8"'):
            DiTTrainer(arguments("vitok-tiny-f8x8"))


class TestStep:
    def test_labels_are_dropped(self, arguments, monkeypatch):
        seen = []
        monkeypatch.setattr(
            dit_trainer, "drop_labels", lambda labels, *args: seen.append((labels, *args)) or labels * 0 + 3
        )
        trainer = DiTTrainer(arguments(class_dropout=0.25))
        embedding = trainer.transformer.class_embedder.weight
        with torch.no_grad():
            for parameter in trainer.transformer.parameters():
                parameter.normal_(std=0.1)
        keep_gradients(trainer)
        (batch,) = next_batches(trainer)
        trainer.training_step([batch])
        ((labels, *rest),) = seen
        assert torch.equal(labels, batch.labels) and rest == [3, 0.25]
        assert (embedding.grad.abs().sum(dim=1) > 0).tolist() == [False, False, False, True]

    def test_min_snr_and_timesteps_are_passed_on(self, arguments, monkeypatch):
        calls = {}
        loss, draw = dit_trainer.diffusion_losses, dit_trainer.sample_timesteps
        monkeypatch.setattr(dit_trainer, "diffusion_losses", lambda *x: calls.update(loss=x[-1]) or loss(*x))
        monkeypatch.setattr(dit_trainer, "sample_timesteps", lambda *x, **y: calls.update(draw=x[2:]) or draw(*x, **y))
        trainer = DiTTrainer(arguments(snr_gamma=5.0, weighting_scheme="none"))
        trainer.training_step(next_batches(trainer))
        assert calls == {"loss": 5.0, "draw": ("none",)}

    @pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
    @pytest.mark.parametrize("cached", [False, True])
    def test_accumulation_equals_a_larger_batch(self, arguments, tmp_path, kind, cached):
        """With samples of the posteriors, noise, timesteps and dropped classes, over three steps."""
        if cached:
            arguments = partial(arguments, latents_dir=write_cache(arguments()))
        results = []
        for parts in ([8], [4, 4], [5, 2, 1]):
            options = {"prediction_type": kind, "class_dropout": 0.5, "max_grad_norm": 1e9}
            trainer = DiTTrainer(arguments(gradient_accumulation_steps=len(parts), **options))
            losses = []
            for batch in next_batches(trainer, 3):
                logs = trainer.training_step(split_batch(batch, parts))
                assert [("grad_norm" in log) for log in logs] == [False] * (len(parts) - 1) + [True]
                losses += [sum(log["loss"] for log in logs) / len(parts), logs[-1]["grad_norm"]]
                trainer.step += 1
            results.append([torch.stack(losses), *trainer.transformer.parameters()])
        for one, *others in zip(*results):
            for other in others:
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)

    def test_frozen_autoencoder(self, arguments):
        trainer = run(arguments(max_train_steps=1))
        assert not any(parameter.requires_grad for parameter in trainer.vae.parameters())
        pretrained = AutoencoderViTok.from_pretrained(trainer.args.vae_name_or_path)
        assert all(map(torch.equal, trainer.vae.parameters(), pretrained.parameters()))


class TestPublishing:
    def test_model_card(self, arguments, tmp_path):
        args = arguments(class_dropout=0.2, max_train_steps=1)
        run(args)
        folder = Path(args.output_dir) / "pipeline"
        card = (folder / "README.md").read_text()
        assert "- diffusion\n" in card and "# run" in card and "- `class_dropout`: 0.2" in card
        assert "| held_out_ema_loss |" in card and "| held_out_loss |" not in card
        assert (
            not any(str(tmp_path) in path.read_text() for path in folder.rglob("*.json")) and str(tmp_path) not in card
        )
        code = card.split("```python\n")[1].split("```")[0].replace('"run/pipeline"', repr(str(folder)))
        scope = {}
        exec(code.replace("num_inference_steps=50", "num_inference_steps=1").replace(".show()", ""), scope)
        assert isinstance(scope["pipe"], ViTokDiTPipeline) and scope["output"].images[0].size == (16, 16)


@pytest.mark.slow
def test_overfits_eight_pictures(arguments, tmp_path):
    """Crops of photographs, each a class of its own: samples are the pictures, as far as the autoencoder has them."""
    source = load_image(ASSETS / "astronaut.png")
    pictures = [source[row : row + 128, column : column + 128] for row in (0, 192) for column in (0, 128, 256, 384)]
    for index, picture in enumerate(pictures):
        folder = tmp_path / "crops" / str(index)
        folder.mkdir(parents=True)
        Image.fromarray(resize_and_crop(picture, 32)).save(folder / "picture.png")
    args = arguments(
        "vitok-tiny-f8x8",
        {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4},
        train_data_dir=[str(tmp_path / "crops")],
        validation_data_dir=[],
        resolution=32,
        random_flip=False,
        prediction_type="flow_prediction",
        train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        ema_decay=0.99,
        max_train_steps=700,
        logging_steps=100,
        checkpointing_steps=10**6,
        validation_steps=10**6,
    )
    trainer = run(args)
    pipe = ViTokDiTPipeline.from_pretrained(tmp_path / "run" / f"checkpoint-{trainer.step}" / "pipeline_ema")
    pipe.set_progress_bar_config(disable=True)
    labels = [str(index) for index in range(8)]
    generator = torch.Generator().manual_seed(0)
    latents = pipe(
        labels, guidance_scale=1.0, num_inference_steps=50, generator=generator, output_type="latent"
    ).images
    files = LabelledFiles(args.train_data_dir)
    pixels = to_float(torch.stack([torch.from_numpy(load_image(item.source).copy()) for item in files.items]))
    expected = trainer.vae.encode(pixels.permute(0, 3, 1, 2)).latent_dist.mode()
    errors = (denormalize_latents(latents, trainer.vae) - expected).square().mean(dim=(1, 2, 3))
    shares = errors / expected.var()
    print("share of the variance that is wrong, per picture:", [f"{share:.4f}" for share in shares.tolist()])
    assert shares.max() < 0.02
