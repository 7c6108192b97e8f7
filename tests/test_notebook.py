"""The notebook of the examples runs from top to bottom, and is kept with what it shows."""

import re

import nbformat
from nbclient import NotebookClient

from tests.conftest import EXAMPLES


NOTEBOOK = EXAMPLES / "vitok.ipynb"


def shown(notebook) -> list[str]:
    """The kinds of all that its cells show: "stdout", "image/jpeg" (which have "text/plain" besides), ..."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.name if output.output_type == "stream" else min(output.data) for output in outputs]


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_it_runs(monkeypatch):
    """With a few steps of training and drawing, in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("NOTEBOOK_TRAIN_STEPS", "10")
    monkeypatch.setenv("NOTEBOOK_DRAW_STEPS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = printed(notebook)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}})
    client.execute()
    text = printed(notebook)
    assert "latents (1, 8, 24, 24) -> 4608 numbers" in text and "trained" in text
    reconstruction = [float(re.search(r"PSNR ([0-9.]+) dB", printed)[1]) for printed in (text, kept)]
    assert abs(reconstruction[0] - reconstruction[1]) < 0.11  # a digit of rounding
    assert sum(kind.startswith("image/") for kind in shown(notebook)) == 9


def test_it_is_kept_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    kinds = shown(notebook)
    assert "stderr" not in kinds and sum(kind.startswith("image/") for kind in kinds) == 9
    assert NOTEBOOK.stat().st_size < 300_000
