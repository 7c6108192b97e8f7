"""Whole files, full disks, and folders of one run at a time."""

import errno
import logging
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.faults.state import file_size_limit, held_lock
from vitok_hf import disk
from vitok_hf.disk import atomic_file, inside, lock_folder, locked, naming_full_disks, remove_leftovers


class TestWholeFiles:
    def test_content_is_on_the_disk_before_the_name(self, tmp_path, monkeypatch):
        """Of a file and of all files of a folder; then the folder that has the name."""
        events, fsync, replace = [], os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
        with atomic_file(tmp_path / "x") as temporary:
            temporary.write_text("1")
        assert events == [str(temporary), "replace", str(tmp_path)]
        events.clear()
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "c").write_text("2")
        (tmp_path / "a" / "nowhere").symlink_to("missing")
        disk.replace_durably(tmp_path / "a", tmp_path / "d")
        assert sorted(events[:3]) == [str(tmp_path / name) for name in ("a", "a/b", "a/b/c")]
        assert events[3:] == ["replace", str(tmp_path)] and (tmp_path / "d" / "b" / "c").read_text() == "2"

    def test_errors_leave_nothing(self, tmp_path):
        (tmp_path / "x").write_text("old")
        with pytest.raises(RuntimeError), atomic_file(tmp_path / "x") as temporary:
            temporary.write_text("ne")
            raise RuntimeError
        assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"

    def test_two_writers_have_names_of_their_own(self, tmp_path):
        with atomic_file(tmp_path / "x") as first, atomic_file(tmp_path / "x") as second:
            first.write_text("1")
            second.write_text("2")
        assert first != second and (tmp_path / "x").read_text() == "1"

    def test_leftovers(self, tmp_path):
        for name in (".vae.0a1b2c3d.incomplete", ".x.0a1b2c3d.removed"):
            (tmp_path / name).mkdir()
        (tmp_path / ".metrics.jsonl.0a1b2c3d.incomplete").write_text("x")
        kept = [".lock", "checkpoint-3", "checkpoint-4.damaged", "my.incomplete", ".x.incomplete"]
        for name in kept:
            (tmp_path / name).touch()
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


class TestFullDisks:
    @pytest.mark.parametrize(
        "error",
        [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), RuntimeError("I/O error: x (os error 28)")],
    )
    def test_by_the_error(self, tmp_path, error):
        with pytest.raises(OSError, match=f"No space left on the disk .*: make room.*{tmp_path}/x") as caught:
            with naming_full_disks(tmp_path / "x"):
                raise RuntimeError("unexpected pos 64 vs 0") from error
        assert caught.value.errno == errno.ENOSPC

    def test_by_trial(self, tmp_path):
        """The message of `torch.save` says nothing of the disk."""
        with file_size_limit(1000), pytest.raises(OSError, match="No space left on the disk"):
            with naming_full_disks(tmp_path / "x"):
                raise RuntimeError("unexpected pos 64 vs 0")

    def test_other_errors_stay(self, tmp_path):
        with pytest.raises(RuntimeError, match="unexpected"), naming_full_disks(tmp_path / "x"):
            raise RuntimeError("unexpected")


class TestLock:
    def test_another_process(self, tmp_path):
        with (
            held_lock(tmp_path) as child,
            pytest.raises(ValueError, match=f'"{tmp_path}" is in use by process {child} on .*: wait for its end'),
        ):
            lock_folder(tmp_path)
        lock_folder(tmp_path).release()
        with held_lock(tmp_path):
            pass

    def test_full_disks(self, tmp_path):
        with file_size_limit(0), pytest.raises(OSError, match=f"No space left on the disk.*{tmp_path}/.lock"):
            lock_folder(tmp_path)
        lock_folder(tmp_path, take_over=True).release()

    def test_the_same_process_again(self, tmp_path):
        first = lock_folder(tmp_path)
        with pytest.raises(ValueError, match="is in use by this process"), locked(tmp_path / "x" / ".."):
            pass
        second = lock_folder(tmp_path, take_over=True)
        first.release()
        assert second.is_held() and not first.is_held()
        (tmp_path / ".lock").read_text()  # which opens and closes the file
        with pytest.raises(ValueError, match="is in use by process"):
            ask_another_process(tmp_path)
        second.release()
        ask_another_process(tmp_path)

    def test_errors_release_it(self, tmp_path):
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError
        ask_another_process(tmp_path)

    @pytest.mark.parametrize("missing", [False, True])
    def test_systems_without_locks(self, tmp_path, monkeypatch, caplog, missing):
        if missing:
            monkeypatch.setattr(disk, "fcntl", None)
        else:
            monkeypatch.setattr(disk.fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
        with caplog.at_level(logging.WARNING):
            lock_folder(tmp_path)
            lock_folder(tmp_path, take_over=True).release()
        assert caplog.text.count("cannot be locked") == 1

    def test_other_processes_of_a_run(self, tmp_path, monkeypatch):
        """The main one asks for the lock; if it does not get it, all end."""
        monkeypatch.setattr(disk, "PartialState", lambda: Mock(is_main_process=False))
        monkeypatch.setattr(disk, "broadcast_object_list", lambda outcome: None)
        assert lock_folder(tmp_path) is None and not any(tmp_path.iterdir())
        error = ValueError("is in use by process 1")
        monkeypatch.setattr(disk, "broadcast_object_list", lambda outcome: outcome.__setitem__(1, error))
        with pytest.raises(ValueError, match="is in use by process 1"):
            lock_folder(tmp_path)


def ask_another_process(folder: Path) -> None:
    """Raises what a process gets that asks for the lock of a folder."""
    begin, end = os.pipe()
    if not (child := os.fork()):  # without any computation, which might hang in a fork
        try:
            disk._lock(folder, take_over=False)
        except ValueError as error:
            os.write(end, str(error).encode())
        os._exit(0)
    os.close(end)
    os.waitpid(child, 0)
    if message := os.read(begin, 1000).decode():
        raise ValueError(message)


def test_names_inside(tmp_path):
    assert inside(tmp_path, "a/../b") == Path(tmp_path, "a/../b")
    for name in ("..", "../x", "a/../../x", str(tmp_path.parent)):
        with pytest.raises(ValueError, match=f'"{name}" is no name for files in "{tmp_path}", for it leads out of it'):
            inside(tmp_path, name)
