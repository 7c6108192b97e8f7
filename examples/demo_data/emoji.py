"""Emoji drawings of npm packages, matched to concepts by code point or name and rendered on white."""

import io
import json
import multiprocessing
import re
import unicodedata
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from .download import cannot_build, npm_files, save_as


try:
    import resvg_py
except ImportError:  # needed for emoji only
    resvg_py = None

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
EMOJI_SIZE = 256  # side of the pictures in pixels
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
HOMONYMS = {"bow", "wave", "up"}  # short names that FxEmoji gives to a ribbon, to water and to an arrow
SVG_ROOT = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">'


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


def prepare_emoji(
    output_dir: Path, cache: Path, include_share_alike: bool, concept_rows: list[dict[str, str]]
) -> list[str]:
    if resvg_py is None:
        raise cannot_build("emoji", "it needs `pip install resvg-py==0.5.0`")
    concepts = {row["base_hex"]: row for row in concept_rows}
    jobs = {}
    for style, code, source in emoji_drawings(cache, concepts):
        concept = concepts.get(normal_code(code, dropped=SKIN_TONES))
        if concept and (concept["split"] == "test" or include_share_alike or not EMOJI_STYLES[style][3]):
            target = output_dir / concept["split"] / "emoji" / concept["class"] / f"{style}_{code}.png"
            jobs.setdefault(target, (source, target, EMOJI_SIZE))
    jobs = [job for target, job in jobs.items() if not target.exists()]
    with multiprocessing.Pool() as pool:
        results = tqdm(pool.imap_unordered(render_emoji, jobs, 16), total=len(jobs), desc="emoji", unit="drawing")
        return [problem for problem in results if problem]
