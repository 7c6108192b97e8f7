"""Files that are whole or not there, also after a power cut; full disks by name; folders of one run at a time."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


if sys.platform == "win32":
    fcntl = None
else:
    import fcntl


logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HELD = (errno.EACCES, errno.EAGAIN)
LOCK = ".lock"
LEFTOVERS = r"\..+\.[0-9a-f]{8}\.(incomplete|removed)"

_locks: dict[str, "Lock"] = {}  # those that this process holds, by folder


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def inside(folder: str | Path, name: str) -> Path:
    """`folder`/`name`, for names that come with a model or a file; raises `ValueError` if it is not in the folder."""
    path = Path(folder, name)
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f'"{name}" is no name for files in "{folder}", for it leads out of it: rename it.')
    return path


def decide(function: Callable[[], Any]) -> Any:
    """What a function returns on the main process, for all, which must call this; an error of it is raised on all."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def temporary_name(path: Path, ending: str = "incomplete") -> Path:
    """Beside `path`, hidden; another one each time, for another process may write the same."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{ending}")


def remove_leftovers(folder: Path) -> None:
    """What killed runs left under temporary names; only for who has locked the folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(LEFTOVERS, path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: str | os.PathLike) -> None:
    if os.name == "nt":  # which opens no folders, and syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(temporary: Path, path: Path) -> None:
    """Renames a file or a folder when its content is on the disk: also after a power cut, `path` is whole."""
    for folder, _, names in os.walk(temporary):
        for file in (os.path.join(folder, name) for name in names):
            if not os.path.islink(file):  # which may lead nowhere, as in packages of Debian
                _sync(file)
        _sync(folder)
    if not temporary.is_dir():
        _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its name when the block ends without an error."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with naming_full_disks(path):
            yield temporary
            replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder, if there is one; it loses its name first, for half a folder must not be taken for whole."""
    if path.exists():
        removed = temporary_name(path, "removed")
        os.replace(path, removed)
        shutil.rmtree(removed)


@contextmanager
def naming_full_disks(path: str | Path) -> Iterator[None]:
    """Raises an `OSError` that says so where the disk of `path` is full: libraries have other words, or none."""
    try:
        yield
    except Exception as error:
        if _is_full(error, Path(path).parent):
            raise OSError(
                errno.ENOSPC,
                "No space left on the disk for a file of this size: make room, and go on from what is there, which is "
                "whole; not written was",
                str(path),
            ) from error
        raise


def _is_full(error: BaseException | None, folder: Path) -> bool:
    """By the error and what it came from, or else by trial."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(f"os error {number}" in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        return problem.errno in FULL
    return False


@dataclass
class Lock:
    """Of a folder; who takes it over, or a child of the process, has another one."""

    key: str
    file: Any

    def is_held(self) -> bool:
        return _locks.get(self.key) is self

    def release(self) -> None:
        if self.is_held():
            del _locks[self.key]
            self.file.close()


def _forget_locks() -> None:
    """In a child, which must neither hold them nor keep them when its parent ends."""
    for lock in _locks.values():
        lock.file.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def lock_folder(folder: str | Path, take_over: bool = False) -> Lock | None:
    """Makes the main process, which gets the lock, the only one that writes to a folder until it ends or releases it.

    The folder is made if there is none. `take_over`: from an earlier user in the same process, which may have failed.
    Raises `ValueError`, on all processes, if another run has it.
    """
    path = Path(folder).absolute()
    decide(lambda: _lock(path, take_over))
    return _locks[str(path.resolve())] if PartialState().is_main_process else None


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """The folder is locked in this block, also from other threads."""
    lock = lock_folder(folder)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(folder: Path, take_over: bool) -> None:
    key = str(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    if mine := _locks.get(key):
        if not take_over:
            raise ValueError(f'"{folder}" is in use by this process: wait for its end, or name another folder.')
        _locks[key] = Lock(key, mine.file)
        return
    file = open(folder / LOCK, "ab+", buffering=0)
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "no locks on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            file.close()
            raise ValueError(f'"{folder}" is in use by {holder}: wait for its end, or name another folder.') from error
        logger.warning('"%s" cannot be locked (%s): see to it that one run at a time writes to it.', folder, error)
    _locks[key] = Lock(key, file)
    with naming_full_disks(folder / LOCK):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


def write_json(path: Path, content: dict | list) -> None:
    """Writes a file that is never seen half written; raises `ValueError` for numbers that are not finite."""
    text = json.dumps(content, indent=1, allow_nan=False)  # other readers know no NaN or Infinity
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def _digest(content: dict) -> str:
    content = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(content: dict) -> dict:
    """With a checksum of the rest, for `is_sealed` to find what has changed."""
    return content | {"sha256": _digest(content)}


def is_sealed(content: dict) -> bool:
    return content.get("sha256") == _digest(content)
