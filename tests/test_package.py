"""What `python -m build` makes: an archive of the sources, and from it the wheel."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vitok_hf import __version__


ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def tracked(*paths: str) -> set[str]:
    """Files of the repository, also those that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *paths]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listing if (ROOT / name).is_file()}


def build(kind: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    process = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return folder / process.stdout.split()[-1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return build("build_sdist", folder, tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def sources(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"vitok_hf-{__version__}"


def test_sources_have_the_package_and_no_tests(archive, sources):
    files = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    made = {name for name in files if ".egg-info/" in name} | {"PKG-INFO"}
    top = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg"}
    assert files - made == tracked("vitok_hf") | top
    assert archive.stat().st_size < 95e6


def test_wheel_has_the_whole_package_alone(sources, tmp_path):
    wheel = build("build_wheel", sources, tmp_path)
    assert wheel.stat().st_size < 95e6
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.startswith(f"vitok_hf-{__version__}.dist-info/")}
        entry_points = file.read(f"vitok_hf-{__version__}.dist-info/entry_points.txt").decode()
    assert names == tracked("vitok_hf")
    assert "vitok = vitok_hf.commands:main" in entry_points
