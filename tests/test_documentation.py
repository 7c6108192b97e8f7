"""What the README and the pages of docs/ tell to type, link to and quote: Python runs as written, page by page."""

import ast
import configparser
import re
import runpy
import shlex
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import vitok_hf
from tests.conftest import EXAMPLES
from vitok_hf.commands import COMMANDS
from vitok_hf.training.arguments import AutoencoderArguments, DiTArguments


ROOT = EXAMPLES.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md"))]
}
# Blocks with this title do not run here; what they have and no others, is the reason.
NOT_RUN = {"Needs the Hub": re.compile(r'from_pretrained\("[\w.-]+/[\w.-]+"')}
LAUNCHER = {"config_file", "num_processes", "machine_rank", "main_process_ip"}  # of accelerate
OTHERS = ("python3 -m venv", ". .venv/bin/activate", "python -m pytest", "python -m http.server", "mkdocs serve")


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """Titles and texts."""
    found = re.findall(rf'^```{language}(?: title="(.*)")?\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == len(re.findall(rf"^```{language}\b", text, flags=re.MULTILINE))
    return found


def commands(text: str) -> list[list[str]]:
    """Of a shell block: one a line or between two &&, without settings of the environment."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]
    return [command[sum("=" in word for word in command[:1]) :] for command in found if command]


class Parsed(BaseException):
    """Instead of the work that comes after the arguments."""


@pytest.fixture
def check_command(monkeypatch):
    """Has a command and its arguments parsed, by the program or script itself."""
    parse_args = import_module("argparse").ArgumentParser.parse_args

    def check_vitok(name: str, *arguments: str) -> None:
        args = import_module(f"vitok_hf.commands.{name.replace('-', '_')}").parse([*arguments], f"vitok {name}")
        if name in ("train", "train-dit"):
            {"train": AutoencoderArguments, "train-dit": DiTArguments}[name](**args)

    def check_script(script: str, *arguments: str) -> None:
        def stop(parser, *args, **kwargs):
            raise Parsed(parse_args(parser, *args, **kwargs))

        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr("argparse.ArgumentParser.parse_args", stop)
            patch.setattr(sys, "argv", [script, *arguments])
            patch.syspath_prepend(str(EXAMPLES))
            runpy.run_path(str(ROOT / script), run_name="__main__")

    def check(words: list[str]) -> None:
        program, *rest = words
        if program == "vitok" and rest:
            check_vitok(*rest)
        elif program == "accelerate":
            assert (ROOT / rest[rest.index("--config_file") + 1]).is_file()
            check_vitok(*rest[rest.index("vitok_hf.commands") + 1 :])
        elif program == "python" and rest[0].endswith(".py"):
            check_script(*rest)
        elif program == "pip":
            config = configparser.ConfigParser()
            config.read(ROOT / "setup.cfg")
            assert rest[:2] == ["install", "-e"]
            assert {*re.findall(r"\w+", rest[2])} <= {*config["options.extras_require"]}
        else:
            assert " ".join(words).startswith(OTHERS), words

    monkeypatch.chdir(ROOT)
    return check


def with_blocks(language: str) -> list[str]:
    return [page for page, text in PAGES.items() if blocks(text, language)]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python(page, monkeypatch, tmp_path):
    """In one namespace, in a folder that has examples/; the shapes in comments are those of what is assigned."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for title, block in blocks(PAGES[page], "python"):
        assert not title or title in NOT_RUN
        assert [name for name, reason in NOT_RUN.items() if reason.search(block)] == ([title] if title else [])
        if not title:
            exec(compile(block, page, "exec"), scope)
            shapes = dict(re.findall(r"^ *(\w+) = .*  # \(((?:\d+, )+\d+)\)", block, flags=re.MULTILINE))
            for name, shape in shapes.items():
                assert tuple(scope[name].shape) == ast.literal_eval(shape), name


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands(page, check_command):
    for _, block in blocks(PAGES[page], "bash"):
        for command in commands(block):
            check_command(command)


def test_commands_in_sentences(check_command):
    sentences = [re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE) for text in PAGES.values()]
    found = {code for text in sentences for code in re.findall(r"`([^`]*python examples/[^`]+)`", text)}
    assert len(found) > 5
    for code in sorted(found):
        for command in commands(code):
            check_command(command)


def test_options_in_sentences():
    sources = [path.read_text() for folder in (EXAMPLES, ROOT / "vitok_hf") for path in folder.rglob("*.py")]
    known = LAUNCHER.union(*(re.findall(r'"--(\w+)"', source) for source in sources), {"config", "help"})
    known |= {field.name for kind in (AutoencoderArguments, DiTArguments) for field in fields(kind)}
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`\n]*)`", text):
            assert {*re.findall(r"(?<!\S)--(\w+)", code)} <= known, (page, code)


@pytest.mark.parametrize("page", [*PAGES, "conversion/README.md"])
def test_links_lead_to_files(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_readme_is_short():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 150
    assert all(f"docs/{path.name}" in text for path in ROOT.glob("docs/*.md"))


def test_messages():
    """Those that docs/trouble.md quotes, with an ellipsis for what varies, are in the code."""
    trees = [ast.parse(path.read_text()) for path in Path(ROOT, "vitok_hf").rglob("*.py")]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    code = "\n".join(re.sub(r"%[sd]", "…", text) for text in texts if isinstance(text, str))
    messages = [line for _, block in blocks(PAGES["docs/trouble.md"], "text") for line in block.splitlines()]
    assert len(messages) > 10
    for message in messages:
        for part in re.split(r"[….]", message):
            assert part.strip() in code, part


def test_all_that_is_public_is_named():
    assert all(f"vitok {name}" in "".join(PAGES.values()) for name in COMMANDS)
    assert {*re.findall(r"^::: vitok_hf\.(\w+)$", PAGES["docs/api.md"], flags=re.MULTILINE)} == {*vitok_hf.__all__}
