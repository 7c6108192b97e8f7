"""The README.md of a model, with metadata that the Hub reads."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub import ModelCard as HubCard


USAGE = """import vitok_hf  # pip install vitok-hf
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")
output = pipe(class_labels={labels}, num_inference_steps=50)
{show}"""
SHOW_IMAGE = "output.images[0].show()"
SHOW_VIDEO = 'from diffusers.utils import export_to_video\n\nexport_to_video(output.frames[0], "video.mp4", fps=8)'


def usage(repo_id: str, labels: list[str] | None, is_video: bool) -> str:
    """Python that loads the pipeline and calls it."""
    return USAGE.format(repo_id=repo_id, labels=labels, show=SHOW_VIDEO if is_video else SHOW_IMAGE)


@dataclass
class ModelCard:
    """What the card of a trained model says.

    Args:
        name: Of the model, its title.
        kind: Tag of the model.
        description: What it is, in a sentence without its end.
        usage: Python that loads the model.
        pipeline_tag: The Hub's name of the task.
        base_model: What the training started from, if it was no random model; if a Hub id, also in the metadata.
        dataset: Hub id of the training data, for the metadata.
        held_out: Names of the held-out sets.
        metrics: Held-out metrics, "SET_METRIC"; the finite ones also in the metadata, as `model-index`.
        settings: Those of the run that differ from the defaults.

    The library of the metadata is vitok_hf, not diffusers: the Hub's snippet for that calls a pipeline with a prompt,
    and without `import vitok_hf`; the tag "diffusers" lists the model there all the same.
    """

    name: str
    kind: str
    description: str
    usage: str
    pipeline_tag: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    held_out: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes `folder`/README.md."""
        data = ModelCardData(library_name="vitok_hf", tags=["vitok", self.kind, "diffusers"])
        data.pipeline_tag = self.pipeline_tag
        if self.base_model is not None and is_hub_id(self.base_model):
            data.base_model = self.base_model
        if self.dataset is not None and is_hub_id(self.dataset):
            data.datasets = [self.dataset]
        if measured := self._results():
            data.model_name, data.eval_results = self.name, measured
        rows = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in self.metrics.items())
        results = f"## Held-out quality\n\n| metric | value |\n|---|---|\n{rows}\n\n" if rows else ""
        settings = "\n".join(f"- `{setting}`: {value}" for setting, value in self.settings.items())
        text = (
            f"# {self.name}\n\n{self.description}, trained with vitok_hf.\n\n"
            f"```python\n{self.usage}\n```\n\n{results}## Training\n\nSettings that differ from the defaults:\n\n"
            f"{settings}\n\nThe licence of the weights and credits for the data are to be added by whoever publishes "
            "them.\n"
        )
        HubCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")

    def _results(self) -> list[EvalResult]:
        return [
            EvalResult(
                task_type=self.pipeline_tag or "other",
                dataset_type=name,
                dataset_name=f"{name} (held out)",
                metric_type=metric.removeprefix(f"{name}_"),
                metric_value=value,
            )
            for metric, value in self.metrics.items()
            for name in self.held_out
            if metric.startswith(f"{name}_") and math.isfinite(value)
        ]


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists()


def add_usage(path: Path, repo_id: str, labels: list[str] | None, is_video: bool) -> None:
    """Adds to the model card at `path` how to load and call the pipeline, unless it says so already.

    Nothing else changes, but diffusers' form with nothing filled in, which is replaced.
    """
    card = HubCard.load(path)
    if "DiffusionPipeline.from_pretrained" in card.text:
        return
    card.data.library_name = "vitok_hf"
    if "automatically generated" in card.text:
        card.text = f"# {repo_id.split('/')[-1]}\n\nA ViTok diffusion transformer (arXiv 2501.09755).\n"
    card.text = f"{card.text}\n## Usage\n\n```python\n{usage(repo_id, labels, is_video)}\n```\n"
    card.save(path)
