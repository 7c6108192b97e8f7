from pathlib import Path

from huggingface_hub import ModelCard


USAGE = """import vitok_hf  # pip install vitok-hf
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")
output = pipe(class_labels={labels}, guidance_scale=4.0, num_inference_steps=50)
{show}"""
SHOW_IMAGE = "output.images[0].show()"
SHOW_VIDEO = 'from diffusers.utils import export_to_video\n\nexport_to_video(output.frames[0], "video.mp4", fps=8)'


def usage(repo_id: str, labels: list[str] | None, is_video: bool) -> str:
    """Python that loads the pipeline and calls it."""
    return USAGE.format(repo_id=repo_id, labels=labels, show=SHOW_VIDEO if is_video else SHOW_IMAGE)


def add_usage(path: Path, repo_id: str, labels: list[str] | None, is_video: bool) -> None:
    """Adds to the model card at `path` how to load and call the pipeline, unless it says so already.

    Nothing else changes, but diffusers' form with nothing filled in, which is replaced.
    """
    card = ModelCard.load(path)
    if "DiffusionPipeline.from_pretrained" in card.text:
        return
    card.data.library_name = "vitok_hf"
    if "automatically generated" in card.text:
        card.text = f"# {repo_id.split('/')[-1]}\n\nA ViTok diffusion transformer (arXiv 2501.09755).\n"
    card.text = f"{card.text}\n## Usage\n\n```python\n{usage(repo_id, labels, is_video)}\n```\n"
    card.save(path)
