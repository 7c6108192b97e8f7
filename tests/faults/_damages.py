"""Ways to damage a file, whatever is in it."""

import os
import random
from pathlib import Path


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random, end: int | None = None) -> None:
    """A bit, of the first `end` bytes."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(end or len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def replace_by_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


DAMAGES = (truncate, flip, empty, remove, replace_by_folder, append)


def put_zeros(path: Path, rng: random.Random) -> None:
    content, start = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


def replace_by_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to_zeros(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def replace_by_another(path: Path, rng: random.Random) -> None:
    """As a shard over another."""
    others = sorted(other for other in path.parent.iterdir() if other != path and other.suffix == path.suffix)
    path.write_bytes(rng.choice(others).read_bytes() if others else b"")


ALL_DAMAGES = (*DAMAGES, put_zeros, replace_by_pipe, link_to_zeros, link_to_itself, replace_by_another)
