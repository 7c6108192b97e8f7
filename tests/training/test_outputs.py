from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.conftest import ASSETS, TINY
from tests.training.conftest import read_log, run
from vitok_hf import AutoencoderViTok
from vitok_hf.evaluation.metrics import psnr
from vitok_hf.evaluation.reconstruction import reconstruct
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.discriminator import Discriminator
from vitok_hf.training.publishing import last_folder


class TestEvaluation:
    def test_held_out_pictures(self, arguments):
        held_out = {"validation_data_dir": [str(ASSETS)], "validation_resolution": 32, "num_validation_images": 3}
        args = arguments(**held_out, validation_steps=3, use_ema=True, ema_decay=0.5)
        trainer = run(args)
        assert trainer.held_out["assets"].shape[-2:] == (32, 32) and len(trainer.held_out["assets"]) == 3
        for key in ("assets_psnr", "assets_ssim", "assets_ema_psnr"):
            assert sorted(read_log(args.output_dir, key)) == [3, 6]
        assert read_log(args.output_dir, "assets_psnr") != read_log(args.output_dir, "assets_ema_psnr")
        for name in ("assets", "assets_ema"):
            assert (Path(args.output_dir) / "samples" / f"{name}_0000006.png").exists()
        assert trainer.vae.training

    def test_pictures_for_causal_models(self, arguments, video):
        """Of folders of pictures, clips of one frame; of those with videos, clips."""
        config = TINY | {"temporal_patch_size": 4, "sample_frames": 5, "causal": True}
        folders = [str(ASSETS), str(video.parent)]
        args = arguments(config, validation_data_dir=folders, validation_resolution=16, max_train_steps=1, fps=5.0)
        trainer = run(args)
        shapes = [held_out.shape for held_out in trainer.held_out.values()]
        assert shapes == [(4, 3, 1, 16, 16), (1, 3, 5, 16, 16)]
        pictures = trainer.held_out["assets"]
        expected = psnr(reconstruct(trainer.vae, pictures), pictures).mean().item()
        assert trainer.metrics["assets_psnr"] == pytest.approx(expected, abs=1e-4)

    def test_the_average_is_better_than_the_weights_at_its_own_picture(self, arguments):
        """The metrics with the suffix are those of the averaged weights."""
        args = arguments(validation_data_dir=[str(ASSETS)], validation_resolution=32, use_ema=True)
        trainer = AutoencoderTrainer(args)
        plain, _ = trainer.evaluate()
        assert plain["assets_psnr"] == plain["assets_ema_psnr"]
        with torch.no_grad():
            trainer.vae.decoder.proj_out.bias.fill_(5.0)
        ruined, _ = trainer.evaluate()
        assert ruined["assets_ema_psnr"] == plain["assets_psnr"] > ruined["assets_psnr"]

    def test_no_empty_lines_without_pictures(self, arguments):
        args = arguments(validation_steps=1)
        run(args)
        lines = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 6 and all("loss" in line for line in lines)


class TestPublishing:
    def test_model_card(self, stage2, tmp_path):
        args = stage2(
            validation_data_dir=[str(ASSETS)], validation_resolution=16, validation_steps=6, num_validation_images=2
        )
        trainer = run(args)
        folder = Path(args.output_dir) / "vae"
        card = (folder / "README.md").read_text()
        data = ModelCard.load(folder / "README.md").data
        assert (data.library_name, data.pipeline_tag) == ("vitok_hf", "image-to-image")
        values = {result.metric_type: result.metric_value for result in data.eval_results}
        assert values["psnr"] == pytest.approx(trainer.metrics["assets_psnr"]) and "ssim" in values
        assert {result.dataset_type for result in data.eval_results} == {"assets"}
        assert "| assets_psnr |" in card and "- `gan_weight`: 0.1" in card and "# run" in card
        assert "- `train_data_dir`: ['assets']" in card and "- `pretrained_model_name_or_path`: pretrained" in card
        assert str(tmp_path) not in card and str(ASSETS.parent) not in card
        assert str(tmp_path) not in (folder / "config.json").read_text()
        usage = card.split("```python\n")[1].split("```")[0].replace('"run/vae"', repr(str(folder)))
        scope = {}
        exec(usage, scope)
        assert isinstance(scope["vae"], AutoencoderViTok)

    def test_models_whose_codes_can_be_cut(self, stage2):
        """What their cards say runs, and cuts codes."""
        args = stage2(channel_counts=[1, 4], token_counts=[2, 4], max_train_steps=1, crop_sizes=["16"])
        run(args)
        text = (Path(args.output_dir) / "vae" / "README.md").read_text()
        code = text.split("```python\n")[1].split("```")[0]
        assert "num_channels=1" in code and "# one of [2, 4]" in code
        scope = {"x": torch.rand(2, 3, 16, 16) * 2 - 1}
        exec(code.replace(code.split('from_pretrained("')[1].split('"')[0], f"{args.output_dir}/vae"), scope)
        assert scope["sample"].shape == (2, 3, 16, 16) and len(scope["short"]) == 2

    def test_push_to_hub(self, arguments, hub):
        run(arguments(push_to_hub=True, hub_model_id="someone/mine", hub_token="hf_x", max_train_steps=1))
        _, files = hub.snapshot("someone/mine")
        assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors"} <= set(files)


class TestDiscriminator:
    def test_another_run_goes_on_with_it(self, stage2, tmp_path):
        trainer = run(stage2())
        folder, weights = trainer.output_dir / "discriminator", trainer.adversary.trained.unwrapped.state_dict()
        again = AutoencoderTrainer(
            stage2(discriminator_name_or_path=str(folder), discriminator_channels=8, output_dir=str(tmp_path / "next"))
        )
        found = again.adversary.trained.unwrapped.state_dict()
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
        assert all(parameter.requires_grad for parameter in again.adversary.trained.unwrapped.parameters())
        again.train()
        assert not torch.equal(again.adversary.trained.unwrapped.logit.weight, weights["logit.weight"])

    def test_of_other_channels(self, stage2, tmp_path):
        Discriminator(16, channels=4, in_channels=1).save_pretrained(tmp_path / "grey")
        with pytest.raises(ValueError, match='grey" sees 1 channels, but the pictures have 3: name another'):
            AutoencoderTrainer(stage2(discriminator_name_or_path=str(tmp_path / "grey")))


class TestTrackers:
    def test_tensorboard(self, stage2):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        args = stage2(
            report_to="tensorboard",
            tracker_project_name="mine",
            adaptive_gan_weight=10.0,
            validation_data_dir=[str(ASSETS)],
            validation_resolution=16,
            validation_steps=6,
            hub_token="hf_secret",
        )
        run(args)
        folder = Path(args.output_dir) / "logs" / "mine"
        events = EventAccumulator(str(folder)).Reload()
        expected = ("loss", "logits_real", "logits_fake", "gan_weight", "grad_norm", "discriminator_grad_norm")
        for name in (*expected, "items_per_second", "assets_psnr", "learning_rate", "discriminator_learning_rate"):
            assert events.Scalars(name)[-1].step == 6
        (image,) = events.Images("assets")
        assert (image.width, image.height) == (32, 4 * 16)
        assert not any(b"hf_secret" in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_folders_above_the_last_are_not_published(tmp_path):
    (tmp_path / "film").mkdir()
    for value, published in (
        (f"{tmp_path}/film", "film"),
        (f"{tmp_path}/film/", "film"),
        (f"{tmp_path}/film/:0.5", "film:0.5"),
        ("/private/shards/{000..127}.tar", "{000..127}.tar"),
        ("owner/name", "owner/name"),
        (3, 3),
    ):
        assert last_folder(value) == published
