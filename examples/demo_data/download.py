"""Fetching packages by name, and writing files that are complete once they have their final name."""

import csv
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from vitok_hf.disk import atomic_file, replace_durably


TABLES = Path(__file__).parent
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--no-deps"]
JPEG_OPTIONS = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}


def cannot_build(set_name: str, reason: str) -> ValueError:
    return ValueError(f"set '{set_name}' cannot be built: {reason}; leave '{set_name}' out of --sets to do without it")


def read_table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((TABLES / name).read_text("utf-8").splitlines()))


def save_as(path: Path, content) -> None:
    """Write bytes, a picture, or what `content(path)` writes, and rename: a file with its final name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        elif isinstance(content, Image.Image):
            content.save(temporary, **(JPEG_OPTIONS if path.suffix == ".jpg" else {"format": "PNG"}))
        else:
            content(temporary)


def run(set_name: str, command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise cannot_build(set_name, f"the program '{command[0]}' was not found")
    result = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        hint = " (is `apt-get update` needed?)" if command[0] == "apt-get" else ""
        raise cannot_build(set_name, f"`{' '.join(command)}` failed{hint}: {result.stderr[-1000:].strip()}")


def fetch(set_name: str, cache: Path, pattern: str, command: list[str]) -> Path:
    """Return the cached file that matches `pattern`; if there is none, download it with `command`."""
    if not any(cache.glob(pattern)):
        tqdm.write(f"downloading {command[-1]}")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            run(set_name, command, Path(folder))
            files = list(Path(folder).glob(pattern))
            if len(files) != 1:
                raise cannot_build(set_name, f"`{' '.join(command)}` gave {len(files)} files '{pattern}', not 1")
            replace_durably(files[0], cache / files[0].name)
    return max(cache.glob(pattern))


def debian_tree(set_name: str, cache: Path, package: str) -> Path:
    tree = cache / package
    if not tree.exists():
        deb = fetch(set_name, cache, f"{package}_*.deb", ["apt-get", "download", package])
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            run(set_name, ["dpkg-deb", "-x", str(deb), "tree"], Path(folder))
            replace_durably(Path(folder) / "tree", tree)
    return tree


def npm_files(cache: Path, package: str) -> dict[str, bytes]:
    """The icon tables, or else the pictures, of an npm package: path -> content."""
    name = package.lstrip("@").replace("/", "-").replace("@", "-")
    wanted = re.compile(r"package/(?:(?:icons|chars|emoji)\.json|assets/.+|color/svg/.+)")
    with tarfile.open(fetch("emoji", cache, f"{name}.tgz", ["npm", "pack", "--silent", package])) as tar:
        return {file.name.split("/")[-1]: tar.extractfile(file).read() for file in tar if wanted.fullmatch(file.name)}
