"""The README is the site's first page; what pages link to outside of docs/ has the place it has in the repository."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "examples/assets/*.md", "examples/results/*/*")
OUTSIDE += ("vitok_hf/assets/*.md", "vitok_hf/checkpoints/*/*.md", "vitok_hf/checkpoints/*/*.[jp][pn]g")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links work in the repository as they are."""
    if page.file.src_uri == "README.md":
        return markdown.replace("](docs/", "](")
    return markdown if "/" in page.file.src_uri else markdown.replace("](../", "](")
