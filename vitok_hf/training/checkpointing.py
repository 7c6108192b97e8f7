import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator, PartialState
from torch import nn

from ..models.layers import plain_name


@contextmanager
def atomic_folder(path: Path, accelerator: Accelerator | PartialState):
    """Yields a temporary folder beside `path`, which takes the name `path` when the block ends without an error."""
    temporary = path.with_name(path.name + ".incomplete")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield temporary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove_folder(path)
        os.replace(temporary, path)
    accelerator.wait_for_everyone()


def remove_folder(path: Path) -> None:
    """Removes a folder, if there is one; it loses its name first, for half a folder must not be taken for whole."""
    removed = path.with_name(path.name + ".removed")
    shutil.rmtree(removed, ignore_errors=True)
    if path.exists():
        os.replace(path, removed)
        shutil.rmtree(removed)


def write_json(path: Path, content: dict | list) -> None:
    """Writes a file that is never seen half written; raises `ValueError` for numbers that are not finite."""
    text = json.dumps(content, indent=1, allow_nan=False)  # other readers know no NaN or Infinity
    temporary = path.with_name(f".{path.name}.{os.getpid()}.incomplete")  # another process may write the same
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(path: str | Path) -> dict | list:
    """What a JSON file holds; raises `ValueError`, naming the file, if it is damaged or something else."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f'"{path}" is no JSON file, or damaged ({error}): correct it, or name another.') from error


def weights_checksum(module: nn.Module, config: dict | None = None) -> str:
    """SHA-256 of a config, without what diffusers notes besides, and of weights in half precision."""
    config = {name: value for name, value in (config or {}).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted((plain_name(name), weight) for name, weight in module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    paths = [path for path in output_dir.glob("checkpoint-*") if checkpoint_step(path) is not None]
    return sorted(paths, key=checkpoint_step)


def checkpoint_step(path: Path) -> int | None:
    """`None` for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def find_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """The folder of checkpoint `name`, or the newest complete one of `output_dir`, if it has any, for "latest"."""
    if name not in (None, "latest"):
        if checkpoint_step(Path(name)) is None or not (Path(name) / "state").is_dir():
            raise ValueError(f'`resume_from_checkpoint` "{name}" is no folder checkpoint-<step> with a state/ inside.')
        return Path(name)
    found = list_checkpoints(output_dir) if name == "latest" else []
    return found[-1] if found else None
