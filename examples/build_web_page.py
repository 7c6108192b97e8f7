r"""Builds a page that encodes, decodes and draws in the browser: a folder for any host of static files.

    python examples/build_web_page.py --output_dir page
    python -m http.server --directory page --bind 127.0.0.1 8000

then open http://127.0.0.1:8000. The page of `docs/try` gets its models, by `vitok export-onnx --half`, and ONNX
Runtime Web, which `npm pack` fetches unless --onnxruntime_dir has it. Its README.md makes it a static Space.
"""

import gzip
import json
import shutil
import subprocess
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path

from PIL import Image

from vitok_hf.commands import make_parser, run_command, start
from vitok_hf.loading import resolve_bundled


ROOT = Path(__file__).parents[1]
PACKAGE = "onnxruntime-web@1.30.0"
BUILDS = ("", ".jspi")  # for every browser; for WebGPU
RUNTIME = ("ort.wasm.min.mjs", "ort.jspi.min.mjs")
RUNTIME += tuple(f"ort-wasm-simd-threaded{build}.{ending}" for build in BUILDS for ending in ("mjs", "wasm"))
SAMPLES = ("astronaut", "chelsea", "coffee")
SAMPLE_SIZE = 256  # their longer side

SPACE = """---
title: ViTok in the browser
sdk: static
app_file: index.html
license: apache-2.0
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---

An autoencoder and a generator that run in the browser: index.html, for any host of static files. The headers above let
WebAssembly use several threads. Models: [cards, data, licences and credits](models/README.md).
"""


def copy_cards(name: str, folder: Path) -> None:
    """What goes along with weights: the card of a model, and of the autoencoder that a bundled pipeline names."""
    source = Path(resolve_bundled(name))
    for place in (source, Path(resolve_bundled(source / "vae"))) if (source / "vae").is_dir() else (source,):
        if (place / "README.md").is_file():
            (folder / place.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(place / "README.md", folder / place.name)


def export(name: str, option: str, folder: Path) -> str:
    """Writes a model or pipeline as ONNX, with its cards; returns the folder, as the page names it."""
    target = folder / Path(name).name
    # Attention of single products is as quick in WebAssembly, and WebGPU has no kernel of the operator of opset 23.
    settings = ["--half", "--opset", "20", "--sizes", "128x128", "--batch_sizes", "1", "2", "--rounds", "1"]
    start("export-onnx", [option, name, *settings, "--output_dir", str(target)])
    model = json.loads((target / "model.json").read_text())
    if model["in_channels"] != 3 or model["temporal_patch_size"] != 1:
        size = f"{model['in_channels']} channels and {model['temporal_patch_size']} frames a latent"
        raise ValueError(f"{name} has {size}, but the page shows pictures in colour: take a model of these.")
    copy_cards(name, folder)
    return f"{folder.name}/{target.name}"


def add_runtime(source: Path | None, folder: Path) -> None:
    """The files of ONNX Runtime Web, of the package's folder `dist` or fetched, its WebAssembly compressed."""
    with tempfile.TemporaryDirectory() as temporary:
        if source is None:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=temporary, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(temporary).glob("*.tgz")
            with tarfile.open(archive) as package:
                for name in RUNTIME:
                    package.extract(f"package/dist/{name}", temporary, filter="data")
            source = Path(temporary, "package/dist")
        folder.mkdir(exist_ok=True)
        for name in RUNTIME:
            content = (source / name).read_bytes()
            if name.endswith(".wasm"):  # many hosts do not compress it
                name, content = f"{name}.gz", gzip.compress(content, compresslevel=6, mtime=0)
            (folder / name).write_bytes(content)
    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        shutil.copy(files("onnxruntime") / name, folder / Path(name).with_suffix(".txt"))


def add_samples(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in SAMPLES:
        with Image.open(ROOT / "examples" / "assets" / f"{name}.png") as picture:
            picture.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE))
            picture.save(folder / f"{name}.png", optimize=True)


def size(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)


def main():
    parser = make_parser("build_web_page.py", __doc__)
    parser.add_argument("--pipeline", default="vitok-dit-emoji", help="the generator: folder, Hub id or bundled name")
    parser.add_argument("--autoencoders", nargs="+", default=[], help="likewise; default: that of the generator")
    parser.add_argument("--onnxruntime_dir", type=Path, help=f"the folder dist of the npm package {PACKAGE}")
    parser.add_argument("--output_dir", type=Path, default=Path("page"))
    args = parser.parse_args()

    page = args.output_dir.resolve()
    shutil.copytree(ROOT / "docs" / "try", page, dirs_exist_ok=True)
    add_samples(page / "samples")
    add_runtime(args.onnxruntime_dir, page / "onnxruntime")
    generator = export(args.pipeline, "--pipeline", page / "models")
    autoencoders = {Path(name).name: export(name, "--model", page / "models") for name in args.autoencoders}
    autoencoders = autoencoders or {Path(args.pipeline).name: generator}
    runtime = size(page / "onnxruntime", RUNTIME[0], RUNTIME[2], f"{RUNTIME[3]}.gz")
    first = page / next(iter(autoencoders.values()))
    loaded = {
        "autoencoder": runtime + size(first, "encoder.onnx", "decoder.onnx"),
        "generator": runtime + size(page / generator, "transformer.onnx", "decoder.onnx"),
    }
    content = {"autoencoders": autoencoders, "generator": generator, "bytes": loaded}
    (page / "page.json").write_text(json.dumps(content, indent=2) + "\n")
    (page / "README.md").write_text(SPACE)
    cards = [
        f"- [{path.parent.name}]({path.parent.name}/README.md)" for path in sorted(page.glob("models/*/README.md"))
    ]
    (page / "models" / "README.md").write_text("\n".join(["Model cards:", "", *cards, ""]))
    total = sum(path.stat().st_size for path in page.rglob("*") if path.is_file())
    print(f"{page}: {total / 1e6:.1f} MB; a first picture loads {loaded['autoencoder'] / 1e6:.1f} MB,", end=" ")
    print(f"a first drawing {loaded['generator'] / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
