import argparse
import math
from dataclasses import Field, fields
from types import NoneType
from typing import get_args, get_type_hints

import pytest
from transformers import HfArgumentParser

from tests.conftest import ASSETS, make_vae
from vitok_hf import AutoencoderViTok
from vitok_hf.commands import train
from vitok_hf.commands.settings import add_settings
from vitok_hf.training.arguments import AutoencoderArguments, ClassifierArguments, DiTArguments
from vitok_hf.training.autoencoder_trainer import load_model
from vitok_hf.training.dit_trainer import make_transformer


CONFIGS = sorted(path for path in (ASSETS.parent / "configs").glob("*.yaml") if not path.stem.startswith("dit-"))


def parse(*argv: object) -> AutoencoderArguments:
    return AutoencoderArguments(**train.parse([*map(str, argv)], "vitok train"))


class TestCommandLine:
    REQUIRED = ("--variant", "S-B/16", "--train_data_dir", "a", "b:0.5")

    def test_types(self):
        args = parse(
            *(*self.REQUIRED, "--learning_rate", "4e-4", "--max_minutes", 3, "--gradient_checkpointing"),
            *("--no_random_flip", "--crop_sizes", "128:2", "64x32", "--freeze_encoder", "False"),
        )
        assert args.train_data_dir == ["a", "b:0.5"] and args.crop_sizes == ["128:2", "64x32"]
        assert (args.learning_rate, args.max_minutes) == (4e-4, 3.0)
        assert args.gradient_checkpointing and not args.random_flip and not args.freeze_encoder

    def test_typing_errors(self, capsys):
        with pytest.raises(SystemExit):
            parse(*self.REQUIRED, "--learning_rat", 1e-4, "--max_train_step", 3)
        assert "--max_train_step" in capsys.readouterr().err

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as end:
            parse("--help")
        assert end.value.code == 0 and "--pretrained_model_name_or_path" in capsys.readouterr().out
        assert all(field.metadata["help"].endswith((".", ".)")) for field in fields(AutoencoderArguments))

    def test_freezing_follows_the_stage(self):
        source = ("--pretrained_model_name_or_path", "vitok-tiny-f8x8", "--train_data_dir", "a")
        assert [parse(*source, "--stage", stage).freeze_encoder for stage in (1, 2)] == [False, True]

    @pytest.mark.parametrize("kind", [AutoencoderArguments, DiTArguments])
    def test_spellings_are_those_of_transformers(self, kind):
        """All that `HfArgumentParser` made of the fields, so that command lines of before go on working."""

        class Theirs(HfArgumentParser):
            def add_argument(self, *names, limits=None, **options):
                return super().add_argument(*names, **options)

        ours = argparse.ArgumentParser()
        add_settings(ours, kind)
        keys = ("option_strings", "dest", "nargs", "const", "default", "help")
        actions = [[[getattr(action, key) for key in keys] for action in p._actions] for p in (ours, Theirs(kind))]
        assert actions[0] == actions[1]

    @pytest.mark.parametrize("text, value", [("Yes", True), ("f", False), ("0", False), ("TRUE", True)])
    def test_words_for_flags(self, text, value, capsys):
        assert parse(*self.REQUIRED, "--use-ema", text).use_ema is value
        with pytest.raises(SystemExit):
            parse(*self.REQUIRED, "--use_ema", "maybe")
        assert '"maybe" must be one of yes, true' in capsys.readouterr().err


class TestConfig:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_shipped(self, path):
        args = parse("--config", path, "--train_data_dir", "photos")
        assert args.stage == 1 + ("stage2" in path.stem)
        if args.variant is not None:
            kwargs = {} if args.latent_channels is None else {"latent_channels": args.latent_channels}
            assert args.causal is ("causal" in path.stem)
            kwargs |= {"causal": True} if args.causal else {}
            AutoencoderViTok.from_variant(args.variant, **{"encoder_num_layers": 1, "decoder_num_layers": 1} | kwargs)

    def test_recipes_of_the_paper(self):
        """Section 3: batches of 8 processes, learning rate 1e-4 * batch * frames / 256, weights of the losses."""
        for name, items, frames in (
            ("s-b-16-stage1", 1024, 1),
            ("s-b-16-stage2", 256, 1),
            ("s-b-4x8-stage1", 256, 16),
            ("s-b-4x8-stage2", 128, 16),
            ("s-b-4x8-causal-stage1", 256, 17),
        ):
            args = parse("--config", ASSETS.parent / "configs" / f"{name}.yaml", "--train_data_dir", "x")
            assert 8 * args.train_batch_size == items and args.max_train_steps == 100_000
            assert args.learning_rate == pytest.approx(1e-4 * items * frames / 256)
            assert (args.mse_weight, args.lpips_weight, args.kl_weight) == (1.0, 1.0, 1e-3)
            assert (args.adam_beta1, args.adam_beta2, args.adam_weight_decay) == (0.9, 0.95, 1e-4)
            assert args.mixed_precision == "auto" and args.lr_scheduler == "cosine"
            if args.stage == 2:
                assert (args.gan_weight, args.discriminator_learning_rate) == (0.05, 2e-5)
                assert args.discriminator_warmup_steps == 25_000 and args.use_ema and args.ema_decay == 0.9999

    def test_the_command_line_takes_precedence(self, tmp_path):
        (tmp_path / "x.yaml").write_text(
            "learning_rate: 4e-4\nuse_ema: true\nvariant: S-B/16\ntrain_data_dir: [a, b]\n"
        )
        args = parse("--config", tmp_path / "x.yaml", "--learning_rate", "1e-3")
        assert (args.learning_rate, args.use_ema, args.train_data_dir) == (1e-3, True, ["a", "b"])
        assert parse("--config", tmp_path / "x.yaml").learning_rate == 4e-4

    def test_words_and_lists(self, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text(
            "mixed_precision: no\ntrain_data_dir: photos\nvariant: S-B/16\ncrop_sizes: [128, 64x256]\ntrain_shards:\n"
        )
        args = parse("--config", config)
        assert args.mixed_precision == "no" and args.train_data_dir == ["photos"]
        assert args.crop_sizes == ["128", "64x256"] and args.train_shards == []

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"max_grad_norm": 0.0}, "`max_grad_norm` must be a number or inf, more than 0, but is 0.0"),
            ({"max_tokens": 64, "compile": True}, "`compile` does not go with `max_tokens` 64"),
            ({"max_tokens": 64, "crop_sizes": ["16"]}, "`crop_sizes` does not go with `max_tokens` 64"),
        ],
    )
    def test_settings_that_do_not_fit(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            AutoencoderArguments(variant="S-B/16", **overrides)

    def test_unknown_settings(self, tmp_path):
        (tmp_path / "x.yaml").write_text("learning_rat: 4e-4\n")
        with pytest.raises(ValueError, match=r"x.yaml\" has settings that do not exist: \['learning_rat'\]"):
            parse("--config", tmp_path / "x.yaml")
        (tmp_path / "y.yaml").write_text("- 1\n")
        with pytest.raises(ValueError, match="has settings that do not exist"):
            parse("--config", tmp_path / "y.yaml")


SOURCES = {
    AutoencoderArguments: {"variant": "S-B/16", "report_to": "none"},
    DiTArguments: {"vae_name_or_path": "x", "variant": "S", "train_data_dir": ["x"], "report_to": "none"},
    ClassifierArguments: {"train_data_dir": ["x"], "report_to": "none"},
}


def bad_values(setting: Field, hint: object) -> list[object]:
    """What a setting must refuse."""
    limits, optional = setting.metadata.get("limits", {}), NoneType in get_args(hint)
    values = [] if optional else [None]
    if hint in (int, int | None, float, float | None):
        values += [math.nan, -math.inf, "x", True, [1]] + [math.inf] * (limits.get("maximum") != math.inf)
        values += [limits[name] - 1 for name in ("minimum", "above") if name in limits]
        values += [limits[name] + 1 for name in ("maximum", "below") if name in limits and limits[name] < math.inf]
        values += [limits[name] for name in ("above", "below") if name in limits]
        return values + [1.5] * (hint in (int, int | None))
    wrong = {bool: [1, "yes"], str: [3, True, ["x"]], list[str]: ["x", [1]], list[int]: [1, ["1"], [True], [1.5]]}
    return values + wrong[next(iter(get_args(hint | None)))]


class TestFields:
    @pytest.mark.parametrize(
        "kind, setting",
        [pytest.param(kind, x, id=f"{kind.__name__}-{x.name}") for kind in SOURCES for x in fields(kind)],
    )
    def test_each_refuses_other_types_and_ranges(self, kind, setting):
        for value in bad_values(setting, get_type_hints(kind)[setting.name]):
            with pytest.raises(ValueError, match=f"`{setting.name}` must be .*, but is "):
                kind(**SOURCES[kind] | {setting.name: value})

    def test_numbers_are_limited(self):
        """A new setting needs them."""
        for kind in SOURCES:
            for setting in fields(kind):
                if setting.type in (int, int | None, float, float | None):
                    assert setting.metadata["limits"], setting.name


class TestDamagedFiles:
    @pytest.mark.parametrize(
        "text, message",
        [
            ('{"patch_size": 16', 'config.json" is no JSON file, or damaged'),
            ('{"patch_sise": 16}', "config.json\" has entries that do not exist, .'patch_sise'."),
        ],
    )
    def test_model_config(self, tmp_path, text, message):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(AutoencoderArguments(model_config=str(tmp_path / "config.json")))
        args = DiTArguments(
            vae_name_or_path="x", model_config=str(tmp_path / "config.json"), train_data_dir=["x"], report_to="none"
        )
        with pytest.raises(ValueError, match=message):
            make_transformer(args, make_vae("v1"), 32, 2)

    def test_yaml(self, tmp_path):
        (tmp_path / "run.yaml").write_text("stage: [1")
        with pytest.raises(ValueError, match='run.yaml" is no YAML file, or damaged'):
            parse("--config", tmp_path / "run.yaml")


def test_what_yaml_and_python_have_for_texts(tmp_path):
    (tmp_path / "settings.yaml").write_text("output_dir: 2024\nmax_train_steps: 10.0\ntracker_project_name: 42\n")
    parsed = parse("--variant", "S-B/16", "--config", tmp_path / "settings.yaml")
    assert (parsed.output_dir, parsed.max_train_steps, parsed.tracker_project_name) == ("2024", 10, "42")
    parsed = AutoencoderArguments(variant="S-B/16", output_dir=tmp_path, train_data_dir=[tmp_path])
    assert (parsed.output_dir, parsed.train_data_dir) == (str(tmp_path), [str(tmp_path)])
