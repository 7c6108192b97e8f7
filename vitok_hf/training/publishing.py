"""The model card of a training run, and the upload of its result."""

from dataclasses import MISSING, fields
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

from ..data.sources import parse_source
from .arguments import LoopArguments


def last_folder(value: object) -> object:
    """ "/home/someone/photos:0.5" -> "photos:0.5", if it is absolute or there is such a folder or file."""
    path = parse_source(value)[0] if isinstance(value, str) else ""
    local = path and (Path(path).is_absolute() or Path(path).exists())
    return Path(path).name + value[len(path) :] if local else value


def changed_settings(args: LoopArguments) -> dict[str, object]:
    """Those that differ from the defaults, without the names of local folders above the last."""
    hidden = {"output_dir", "hub_token", "hub_model_id", "push_to_hub", "report_to", "resume_from_checkpoint"}
    settings = {}
    for field in fields(args):
        default = field.default if field.default is not MISSING else field.default_factory()
        value = getattr(args, field.name)
        if field.name not in hidden and value != default:
            settings[field.name] = [last_folder(x) for x in value] if isinstance(value, list) else last_folder(value)
    return settings


def write_model_card(
    folder: Path,
    name: str,
    kind: str,
    description: str,
    base_model: str | None,
    usage: str,
    metrics: dict[str, float],
    settings: dict,
) -> None:
    """Writes `folder`/README.md.

    Args:
        kind: Tag of the model.
        description: What it is, in a sentence without its end.
        base_model: What the training started from, if it was no random model; if a Hub id, also in the metadata.
        usage: Python that loads the model.
        metrics: Held-out metrics by name.
        settings: Those of the run that differ from the defaults.
    """
    data = ModelCardData(library_name="vitok_hf", tags=["vitok", kind, "diffusers"])
    if base_model is not None and base_model.count("/") == 1 and not Path(base_model).exists():
        data.base_model = base_model
    rows = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in metrics.items())
    results = f"## Held-out quality\n\n| metric | value |\n|---|---|\n{rows}\n\n" if metrics else ""
    listed = "\n".join(f"- `{setting}`: {value}" for setting, value in settings.items())
    text = (
        f"# {name}\n\n{description} (arXiv 2501.09755), trained with vitok_hf.\n\n"
        f"```python\n{usage}\n```\n\n{results}## Training\n\nSettings that differ from the defaults:\n\n{listed}\n\n"
        "The licence of the weights and credits for the data are to be added by whoever publishes them.\n"
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def push(folder: Path, repo_id: str, token: str | None) -> str:
    """Uploads a folder to the Hub. Returns the full id of the repository."""
    repo_id = create_repo(repo_id, exist_ok=True, token=token).repo_id
    upload_folder(repo_id=repo_id, folder_path=folder, commit_message="End of training", token=token)
    return repo_id
