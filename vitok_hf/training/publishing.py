"""What of a run may be read by everybody, and the upload of its result."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder

from ..data.sources import parse_source
from .arguments import TrainerArguments


def last_folder(value: object) -> object:
    """ "/home/someone/photos:0.5" -> "photos:0.5", if it is absolute or there is such a folder or file."""
    if not isinstance(value, str):
        return value
    path, _ = parse_source(value)
    local = path and (Path(path).is_absolute() or Path(path).exists())
    return Path(path).name + value[len(path) :] if local else value


def changed_settings(args: TrainerArguments) -> dict[str, object]:
    """Those that differ from the defaults, without the names of local folders above the last."""
    hidden = {"output_dir", "hub_token", "hub_model_id", "push_to_hub", "report_to", "resume_from_checkpoint"}
    settings: dict[str, object] = {}
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, field.name)
        if field.name not in hidden and value != default:
            settings[field.name] = [last_folder(x) for x in value] if isinstance(value, list) else last_folder(value)
    return settings


def usage_of_lengths(config: Mapping[str, Any]) -> list[str]:
    """Lines of Python that cut the codes of a model, for its card; none, if they have one length."""
    counts = {"num_channels": config["channel_counts"], "num_tokens": config["token_counts"]}
    encode, names = "short = vae.encode(x, {}={}).latent_dist.mode()", [name for name, x in counts.items() if x]
    if not names:
        return []
    sizes = ", sizes=[tuple(x.shape[2:])] * len(x)" if config["token_counts"] else ""
    return [
        "",
        "# x has pixels in [-1, 1]; codes may be cut, and are decoded as they are",
        *(f"{encode.format(name, counts[name][0])}  # one of {counts[name]}" for name in names),
        f"sample = vae.decode(short{sizes}).sample",
        f"{encode.format('min_psnr', 30.0)}  # a list: of each item the shortest that reaches 30 dB",
    ]


def push(folder: Path, repo_id: str, token: str | None) -> str:
    """Uploads a folder to the Hub. Returns the full id of the repository."""
    repo_id = create_repo(repo_id, exist_ok=True, token=token).repo_id
    upload_folder(repo_id=repo_id, folder_path=folder, commit_message="End of training", token=token)
    return repo_id
