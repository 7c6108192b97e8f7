"""Arguments from the fields of a dataclass, as transformers' `HfArgumentParser` spells them, but quickly."""

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from . import make_parser


def to_bool(text: str) -> bool:
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f'"{text}" must be one of {", ".join(words)}')
    return words[text.lower()]


def add_settings(parser: argparse.ArgumentParser, settings_class: type) -> None:
    """--name and --na-me for each field; a list takes several values, a boolean is a flag that may have a value.

    Booleans that are true by default have --no_name and --no-na-me besides; those that may be `None` need a value.
    """
    hints = get_type_hints(settings_class)
    for field in fields(settings_class):
        name, hint, help = field.name, hints[field.name], field.metadata["help"]
        (kind, *_) = [x for x in get_args(hint) or [hint] if x is not NoneType]  # of a list, that of its items
        default = field.default if field.default_factory is MISSING else field.default_factory()
        options: dict[str, Any] = {"type": to_bool if kind is bool else kind, "default": default, "help": help}
        if hint is bool:
            options |= {"nargs": "?", "const": True}
        elif field.default_factory is not MISSING:
            options["nargs"] = "+"
        names = dict.fromkeys([name, name.replace("_", "-")])
        parser.add_argument(*(f"--{x}" for x in names), **options)
        if default is True:
            opposites = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
            parser.add_argument(*opposites, action="store_false", dest=name, default=False, help=help)


def read_config(path: str, known: set[str]) -> dict[str, Any]:
    """The settings in a YAML file, `name: value`."""
    import yaml  # of an extra

    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'"{path}" is no YAML file, or damaged: {error}') from error
    if not isinstance(settings, dict) or not known.issuperset(settings):
        unknown = sorted(set(settings) - known) if isinstance(settings, dict) else settings
        raise ValueError(f'"{path}" has settings that do not exist: {unknown}. Known are {", ".join(sorted(known))}.')
    return settings


def fit_types(settings: dict[str, Any], arguments_class: type) -> dict[str, Any]:
    """A single value for a list becomes a list of one; what YAML reads as numbers, and `no` as false, words again."""
    fitted = {}
    for setting in fields(arguments_class):
        if setting.name in settings:
            value = settings[setting.name]
            kinds = get_args(setting.type) or (setting.type,)
            if setting.default_factory is not MISSING:
                items = value if isinstance(value, list) else [] if value is None else [value]
                value = [kinds[0](item) for item in items]
            elif str in kinds and value is not None and not isinstance(value, (bool, list, dict)):
                value = str(value)
            elif int in kinds and isinstance(value, float) and value.is_integer():
                value = int(value)
            fitted[setting.name] = "no" if setting.name == "mixed_precision" and value is False else value
    return fitted


def parse_settings(settings_class: type, argv: list[str], program: str, description: str | None) -> dict[str, Any]:
    """The values for `settings_class` from the command line and, where that is silent, from `--config settings.yaml`.

    Raises:
        ValueError: If the file has an unknown setting.
    """
    parser = make_parser(program, description, allow_abbrev=False)
    add_settings(parser, settings_class)
    parser.add_argument("--config", help="YAML file with settings; the command line takes precedence.")
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        settings = read_config(known.config, {field.name for field in fields(settings_class)})
        parser.set_defaults(**fit_types(settings, settings_class))
    namespace = vars(parser.parse_args(argv))
    del namespace["config"]
    return namespace
