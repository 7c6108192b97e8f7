"""What the results in a folder were made from."""

import json
import os

import pytest

from vitok_hf.data import claims
from vitok_hf.data.claims import RECORD, claim_folder, claimed_contents, note_inputs


@pytest.fixture
def data(tmp_path):
    for name, content in (("a/x", "1"), ("a/y", "2"), ("b/x", "3")):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(content)
    return tmp_path / "data"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


class TestClaim:
    def test_settings(self, tmp_path):
        settings = {"seed": 1, "sizes": (2, 3), "names": {0: "cat"}, "path": tmp_path}
        claim_folder(tmp_path / "out", settings)
        claim_folder(tmp_path / "out", settings)
        with pytest.raises(
            ValueError, match=r"with seed 1, not 2; names {'0': 'cat'}, not {'0': 'dog'}; new None, not 3"
        ):
            claim_folder(tmp_path / "out", settings | {"seed": 2, "names": {0: "dog"}, "new": 3})
        with pytest.raises(ValueError, match="with path .*, not None: name another folder, or delete this one"):
            claim_folder(tmp_path / "out", {name: settings[name] for name in ("seed", "sizes", "names")})
        assert json.loads((tmp_path / "out" / RECORD).read_text())["settings"]["seed"] == 1

    def test_long_values_are_cut(self, tmp_path):
        claim_folder(tmp_path / "out", {"names": ["x"] * 1000})
        with pytest.raises(ValueError) as error:
            claim_folder(tmp_path / "out", {"names": ["y"] * 1000})
        assert len(str(error.value)) < 800 + len(str(tmp_path))

    def test_content_is_read_once(self, data, tmp_path, monkeypatch):
        read, checksum = [], claims.checksum
        monkeypatch.setattr(claims, "checksum", lambda path: (read.append(path), checksum(path))[1])
        claim_folder(tmp_path / "out", {}, files(data))
        assert len(read) == 3
        claim_folder(tmp_path / "out", {}, files(data))
        assert len(read) == 3
        os.utime(data / "a" / "x", ns=(0, 0))
        claim_folder(tmp_path / "out", {}, files(data))
        assert read[3:] == [str(data / "a" / "x")]
        claim_folder(tmp_path / "out", {}, files(data))
        assert len(read) == 4

    def test_edits_that_restore_the_time(self, data, tmp_path):
        """Of the same size: the system's time of the last change tells."""
        claim_folder(tmp_path / "out", {}, files(data))
        before = (data / "b" / "x").stat()
        (data / "b" / "x").write_text("4")
        os.utime(data / "b" / "x", ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ValueError, match=r"with other files, 1 changed \(b/x\)"):
            claim_folder(tmp_path / "out", {}, files(data))

    def test_files_that_come_and_go(self, data, tmp_path):
        claim_folder(tmp_path / "out", {}, files(data))
        with pytest.raises(ValueError, match="has results with the same files in another order: name another folder"):
            claim_folder(tmp_path / "out", {}, files(data)[::-1])
        (data / "b" / "x").rename(data / "b" / "z")
        with pytest.raises(ValueError, match=r"other files, 1 missing \(b/x\), 1 new \(b/z\): name"):
            claim_folder(tmp_path / "out", {}, files(data))

    def test_files_that_may_change(self, data, tmp_path):
        claim_folder(tmp_path / "out", {}, files(data))
        for name in ("a/y", "b/x"):
            (data / name).write_text("new")
        with pytest.raises(ValueError, match=r"1 changed \(b/x\): name"):
            claim_folder(tmp_path / "out", {}, files(data), may_change=[data / "a" / "y"])
        claim_folder(tmp_path / "out", {}, files(data), may_change=[data / "a" / "y", data / "b" / "x"])
        claim_folder(tmp_path / "out", {}, files(data))

    def test_a_file_that_could_not_be_read_once(self, data, tmp_path, monkeypatch):
        def fail(path):
            raise OSError(5, "io")

        with monkeypatch.context() as context:
            context.setattr("vitok_hf.data.claims.checksum", fail)
            claim_folder(tmp_path / "out", {}, files(data))
        claim_folder(tmp_path / "out", {}, files(data))
        assert all(len(content) == 64 for content in claimed_contents(tmp_path / "out"))

    def test_a_file_listed_twice(self, data, tmp_path):
        twice = [*files(data), data / "a" / "x"]
        claim_folder(tmp_path / "out", {}, twice)
        claim_folder(tmp_path / "out", {}, twice)
        with pytest.raises(ValueError, match=r"1 missing \(a/x'\)"):
            claim_folder(tmp_path / "out", {}, files(data))

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"x": 3}, "settings": {}}', '{"files": {}}'])
    def test_damaged_records(self, tmp_path, content):
        claim_folder(tmp_path / "out", {})
        (tmp_path / "out" / RECORD).write_text(content)
        with pytest.raises(ValueError, match=f'{RECORD}" is (no JSON file, or )?damaged'):
            claim_folder(tmp_path / "out", {})
        (reason,) = note_inputs(tmp_path / "run", {}, [], tmp_path / "out")
        assert "unknown inputs: " in reason

    def test_results_of_unknown_origin(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".hidden").touch()
        claim_folder(tmp_path / "out", {"seed": 1})
        (tmp_path / "out" / RECORD).rename(tmp_path / "out" / "settings.json")
        with pytest.raises(ValueError, match=f"has files, but no {RECORD}"):
            claim_folder(tmp_path / "out", {"seed": 1})


class TestNote:
    def test_size_and_time(self, data, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        assert note_inputs(first, {"rate": 1.0}, files(data), None) == []
        assert note_inputs(second, {"rate": 1.0}, files(data), first) == []
        (data / "a" / "x").unlink()
        (data / "b" / "x").write_text("longer")
        assert note_inputs(second, {"rate": 2.0}, files(data), second) == [
            "rate 1.0, not 2.0",
            "other files, 1 changed (b/x), 1 missing (a/x)",
        ]
        assert note_inputs(second, {"rate": 2.0}, files(data), second) == []  # said once
        assert note_inputs(second, {"other": 1}, files(data), second) == ["other None, not 1"]  # "rate" is gone

    def test_many_files(self, data, tmp_path, monkeypatch):
        """Which count by size and time of their content, all together."""
        monkeypatch.setattr("vitok_hf.data.claims.MAX_NAMED", 1)
        run, count = tmp_path / "run", len(files(data))
        assert note_inputs(run, {}, files(data), None) == []
        (data / "a" / "x").chmod(0o600)
        assert note_inputs(run, {}, files(data), run) == []
        (data / "a" / "x").write_text("longer")
        assert note_inputs(run, {}, files(data), run) == [f"other files, 1 changed ({count} files together)"]

    def test_unknown(self, tmp_path):
        (reason,) = note_inputs(tmp_path / "run", {}, [], tmp_path)
        assert reason == f"unknown inputs, for there is no {tmp_path / RECORD}"
