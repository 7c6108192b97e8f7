import itertools
import logging
import os
import re
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

from accelerate import Accelerator, PartialState

from ..disk import (
    checksum,
    decide,
    is_sealed,
    naming_full_disks,
    remove_folder,
    replace_durably,
    seal,
    temporary_name,
    write_json,
)
from ..loading.strict import read_json
from .run_state import find_program


logger = logging.getLogger(__name__)

MANIFEST = "state/manifest.json"  # name of each file in state/ -> size and SHA-256; models may be edited or moved


@contextmanager
def atomic_folder(path: Path, accelerator: Accelerator | PartialState):
    """Yields a temporary folder beside `path`, which takes the name `path` when the block ends without an error."""
    temporary = decide(lambda: temporary_name(path))
    with naming_full_disks(path):
        if accelerator.is_main_process:
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield temporary
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            remove_folder(path)
            replace_durably(temporary, path)
        accelerator.wait_for_everyone()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    numbered = [(checkpoint_step(path), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((step, path) for step, path in numbered if step is not None)]


def checkpoint_step(path: Path) -> int | None:
    """`None` for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def write_manifest(checkpoint: Path) -> None:
    """To be called when all files are written; `find_damage` compares them."""
    files = sorted(path for path in (checkpoint / "state").rglob("*") if path.is_file())
    with ThreadPool(8) as pool:
        digests = pool.map(checksum, files)
    entries = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, digest] for path, digest in zip(files, digests)
    }
    write_json(checkpoint / MANIFEST, seal({"files": entries}))


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, naming the file: what is not as written, or would run a program."""
    if not (checkpoint / MANIFEST).is_file():
        return f"{MANIFEST} is missing, without which it is damaged or of an earlier version"
    try:
        manifest = read_json(checkpoint / MANIFEST)
        entries = manifest["files"]
    except (ValueError, KeyError, TypeError):
        manifest = {}
    if not is_sealed(manifest):
        return f"{MANIFEST} is damaged"
    state = {path.relative_to(checkpoint).as_posix() for path in (checkpoint / "state").rglob("*") if path.is_file()}
    # Hidden files are of the system that shows or keeps the folder.
    state = {name for name in state if name in entries or not Path(name).name.startswith(".")}
    if strangers := sorted(state - entries.keys() - {MANIFEST}):
        return f"{strangers[0]} does not belong to it"

    def compare(name: str) -> str | None:
        path, (size, digest) = checkpoint / name, entries[name]
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            return None if checksum(path) == digest else f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read ({error})"

    with ThreadPool(8) as pool:
        reasons = [reason for reason in pool.map(compare, entries) if reason]
    return reasons[0] if reasons else find_program(checkpoint, sorted(state - {MANIFEST}))


def find_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """The folder of checkpoint `name`, or the newest sound one of `output_dir`, if it has any, for "latest".

    Newer ones that are damaged are then renamed to <name>.damaged. The main process decides; all must call it.

    Raises:
        ValueError: If `name` is no checkpoint or damaged, or all are.
    """
    if name is None:
        return None
    return decide(lambda: _find_latest(output_dir) if name == "latest" else _find_named(Path(name)))


def _find_named(path: Path) -> Path:
    if checkpoint_step(path) is None or not (path / "state").is_dir():
        found = [other.name for other in list_checkpoints(path.parent)]
        raise ValueError(
            f'`resume_from_checkpoint` "{path}" is no folder checkpoint-<step> with a state/ inside: name one'
            + (f", of {found}," if found else "")
            + ' or "latest".'
        )
    if reason := find_damage(path):
        raise ValueError(
            f'`resume_from_checkpoint` "{path}" is damaged: {reason}. Name an older one, or resume from "latest", '
            "which takes the newest that is sound."
        )
    return path


def _find_latest(output_dir: Path) -> Path | None:
    damaged, found = {}, list_checkpoints(output_dir)
    while found and (reason := find_damage(found[-1])):
        damaged[found.pop()] = reason
    if damaged and not found:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ValueError(
            f'All checkpoints of "{output_dir}" are damaged ({reasons}): start from a model in one of them '
            "(`pretrained_model_name_or_path`) in another output_dir, or anew."
        )
    for path, reason in damaged.items():
        names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
        aside = next(name for name in names if not name.exists())
        os.replace(path, aside)
        logger.warning('"%s" is damaged: %s. Going on from %s; it is now %s.', path, reason, found[-1], aside.name)
    return found[-1] if found else None
