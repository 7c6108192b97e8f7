import ast
import configparser
import sys
from pathlib import Path

import vitok_hf


ROOT = Path(vitok_hf.__file__).parent
# Imports run down this list only; a file of the package itself is a floor of its own.
FLOORS = "commands demo public training evaluation data pipelines models latents loading presets clips disk checks"
FLOORS = [*FLOORS.split(), "precision"]
DISTRIBUTIONS = {"PIL": "Pillow", "yaml": "PyYAML"}  # where the name of what is imported is another


def imports(path: Path) -> list[str]:
    """Dotted names of the modules that a file imports, those of the package without its name first."""
    package, found = [*path.relative_to(ROOT.parent).parent.parts], []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append(".".join([*base, *(node.module or "").split(".")]).rstrip("."))
    return found


def own(names: list[str]) -> list[Path]:
    """The files of the package among them."""
    parts = [name.split(".")[1:] for name in names if name.split(".")[0] == ROOT.name]
    candidates = [ROOT.joinpath(*names) for names in parts]
    return [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in candidates]


FILES = {path: imports(path) for path in sorted(ROOT.rglob("*.py"))}


def test_imports_run_down():
    def floor(path: Path) -> int:
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        return -1 if name == "__init__" else FLOORS.index(name)

    up = [
        f"{path} imports {other}"
        for path, names in FILES.items()
        for other in own(names)
        if floor(other) < floor(path)
    ]
    assert not up


def test_no_circles():
    finished, begun = set(), []

    def visit(path: Path) -> None:
        assert path not in begun, f"{[str(x) for x in begun[begun.index(path) :]]} import each other"
        begun.append(path)
        for other in own(FILES[path]):
            if other not in finished:
                visit(other)
        finished.add(begun.pop())

    for path in FILES:
        if path not in finished:
            visit(path)
    assert finished == set(FILES)


def test_dependencies_are_declared():
    config = configparser.ConfigParser()
    config.read(ROOT.parent / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    declared = {line.split(">")[0].split("=")[0].lower() for text in lists for line in text.split()}
    for path, names in FILES.items():
        for name in {name.split(".")[0] for name in names} - {ROOT.name, *sys.stdlib_module_names}:
            assert DISTRIBUTIONS.get(name, name).lower().replace("_", "-") in declared, f"{path} imports {name}"
