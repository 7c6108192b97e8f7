"""What the results in a folder were made from: everything that goes on with earlier work asks here whether it may.

The file `made_from.json` beside the results holds the settings, and of each input file SHA-256, size and times. Files
are known by their paths relative to the innermost folder that holds all of them, and by their content, which is read
again only where size or times are others: data that were moved or copied as a whole are the same data. An edit that
restores size and times is not seen where the system keeps no time of the last change of a file's status.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm.auto import tqdm

from ..disk import checksum, decide, write_json
from ..loading.strict import read_json


RECORD = "made_from.json"
UNREADABLE = "unreadable:"  # in place of a file's content
MAX_SHOWN = 200  # characters of a value in a message
MAX_NAMED = 100_000  # files that a training run notes one by one


def _name_files(paths: Sequence[str | os.PathLike]) -> dict[str, str]:
    """Names relative to the common folder -> absolute paths, in their order."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath({os.path.dirname(path) for path in absolute}) if absolute else ""
    named: dict[str, str] = {}
    for path in absolute:
        name = os.path.relpath(path, root)
        while name in named:  # it is listed twice
            name += "'"
        named[name] = path
    return named


def _describe(path: str, known: str, read: bool) -> str:
    """ "<content> <size> <times>"; the content is its SHA-256 if `read`, else size and time stand for it."""
    try:
        stat = os.stat(path)
        times = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        if known.endswith(f" {times}"):
            return known
        return f"{checksum(path) if read else f'{stat.st_size}-{stat.st_mtime_ns}'} {times}"
    except OSError as error:
        return f"{UNREADABLE}{error.errno}"


def _make_record(settings: dict, files: Sequence[str | os.PathLike], known: dict, read: bool = True) -> dict:
    named = _name_files(files)
    with ThreadPool(16) as pool:  # most of the time goes by waiting for the disk
        described = pool.imap(lambda name: _describe(named[name], known.get(name, ""), read), named, 64)
        contents = dict(zip(named, tqdm(described, "input files", len(named), delay=5)))
    finite = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in settings.items()}
    return {"settings": json.loads(json.dumps(finite, default=str)), "files": contents}


def _read_record(path: Path) -> dict:
    record = read_json(path)
    try:
        _contents(record), record["settings"].keys()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f'"{path}" is damaged ({error!r}): restore it, or name another folder.') from error
    return record


def _contents(record: dict) -> dict[str, str]:
    """Names of files -> what stands for their content."""
    return {name: text.split()[0] for name, text in record["files"].items()}


def _shorten(value: object) -> str:
    return str(value) if len(str(value)) <= MAX_SHOWN else str(value)[:MAX_SHOWN] + "..."


def _differences(old: dict, new: dict, may_change: Collection[str] = ()) -> list[str]:
    """What differs between two records, in words."""
    then, now = old["settings"], new["settings"]
    reasons = [
        f"{name} {_shorten(then.get(name))}, not {_shorten(now.get(name))}"
        for name in then | now
        if then.get(name) != now.get(name)
    ]
    then, now = map(_contents, (old, new))
    groups = {
        "changed": [
            name
            for name in then.keys() & now.keys() - set(may_change)
            if then[name] != now[name] and not then[name].startswith(UNREADABLE)
        ],
        "missing": then.keys() - now.keys(),
        "new": now.keys() - then.keys(),
    }
    texts = [
        f"{len(names)} {group} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for group, names in groups.items()
        if names
    ]
    if texts:
        reasons.append(f"other files, {', '.join(texts)}")
    elif list(then) != list(now):
        reasons.append("the same files in another order")
    return reasons


def claim_folder(
    folder: Path,
    settings: dict,
    files: Sequence[str | os.PathLike] = (),
    may_change: Collection[str | os.PathLike] = (),
) -> None:
    """Stores in a folder what its content is made from; all processes must call it, the main one reads and writes.

    Args:
        folder: Folder of the results, which may not exist yet.
        settings: All else that the results depend on, JSON-able.
        files: The input files, in the order in which they count.
        may_change: Those of them of which there are no results yet, as they could not be read.

    Raises:
        ValueError: If it holds results of other settings or files, naming them, or files of unknown origin.
    """
    if problem := decide(lambda: _claim(folder, settings, files, may_change)):
        raise ValueError(f'"{folder}" has {problem}: name another folder, or delete this one.')


def _claim(folder: Path, settings: dict, files: Sequence, may_change: Collection) -> str | None:
    """Writes the record, or says why not."""
    path, old = folder / RECORD, None
    if path.is_file():
        old = _read_record(path)
    elif folder.is_dir() and any(not child.name.startswith(".") for child in folder.iterdir()):
        return f"files, but no {RECORD} that says what they were made from (an earlier version wrote none)"
    record = _make_record(settings, files, old["files"] if old else {})
    if old:
        paths = {os.path.abspath(path) for path in may_change}
        free = [name for name, path in _name_files(files).items() if path in paths]
        if reasons := _differences(old, record, free):
            return f"results with {'; '.join(reasons)}"
    if record != old:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    return None


def claimed_contents(folder: Path) -> list[str]:
    """The SHA-256 of each input file that `claim_folder` noted, in their order."""
    return list(_contents(read_json(folder / RECORD)).values())


def note_inputs(folder: Path, settings: dict, files: Sequence[str | os.PathLike], before: Path | None) -> list[str]:
    """Stores in a folder what a training run is made from, and returns what has changed since the run in `before`.

    A run may go on with other data and settings, and its data may be large: files are told by size and time alone, and
    more than `MAX_NAMED` by one digest for all.
    """
    record, reasons = _make_record(settings, files, {}, read=False), []
    if len(files) > MAX_NAMED:
        digest = hashlib.sha256(json.dumps(_contents(record)).encode()).hexdigest()
        record["files"] = {f"{len(files)} files together": digest}
    if before is not None:
        path = before / RECORD
        reasons = [f"unknown inputs, for there is no {path}"]
        if path.is_file():
            try:
                earlier = _read_record(path)
                known = {name: x for name, x in earlier["settings"].items() if name in record["settings"]}
                reasons = _differences(earlier | {"settings": known}, record)  # other versions have other settings
            except ValueError as error:  # it only says what has changed
                reasons = [f"unknown inputs: {error}"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, record)
    return reasons
