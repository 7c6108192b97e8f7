import numpy as np
import pytest

from vitok_hf.data.classes import ClassSampler, LabelledFiles, read_classes


class TestLabelledFiles:
    def test_classes_are_folders(self, files, folder):
        assert files.classes == ["cat", "dog", "flag"]
        assert np.bincount(files.labels).tolist() == [3, 6, 2]
        assert all(files.classes[label] in item.name for item, label in zip(files, files.labels))
        several = LabelledFiles([str(folder / "dog"), str(folder / "cat")])
        assert several.classes == ["cat", "dog"] and len(several) == 9

    def test_links_are_of_the_class_they_are_in(self, folder, tmp_path):
        """As in the cache of the Hub, where they lead to files without a class."""
        source = next((folder / "cat").iterdir())
        for name in ("dog", "flag"):
            (tmp_path / "links" / name).mkdir(parents=True)
            (tmp_path / "links" / name / "x.png").symlink_to(source)
        assert LabelledFiles([tmp_path / "links"]).classes == ["dog", "flag"]

    def test_given_classes(self, folder, tmp_path):
        (tmp_path / "classes.txt").write_text("flag\ncat\nbird\n\ndog\n")
        classes = read_classes(tmp_path / "classes.txt")
        files = LabelledFiles([str(folder)], classes)
        assert np.bincount(files.labels).tolist() == [2, 3, 0, 6]
        with pytest.raises(ValueError, match='is in folder "flag", which is no class'):
            LabelledFiles([str(folder)], ["cat", "dog"])
        (tmp_path / "classes.txt").write_bytes(b"\xff\xd8")
        with pytest.raises(ValueError, match='classes.txt" is no text in UTF-8 .*: correct it, or name another'):
            read_classes(tmp_path / "classes.txt")
        (tmp_path / "classes.txt").write_text("cat\ncat\n")
        with pytest.raises(ValueError, match="one class a line and each once"):
            read_classes(tmp_path / "classes.txt")

    def test_large_classes_are_limited(self, files, folder):
        limited = LabelledFiles([str(folder)], max_files_per_class=3)
        assert np.bincount(limited.labels).tolist() == [3, 3, 2]
        names = [item.name for item in limited]
        assert names == [item.name for item in files if item.name in names]  # in the same order
        again = LabelledFiles([str(folder / "dog"), str(folder / "cat")], max_files_per_class=3)
        assert {item.name for item in again} == {name for name in names if "flag" not in name}
        with pytest.raises(ValueError, match="`max_files_per_class` must be positive, but is 0"):
            LabelledFiles([str(folder)], max_files_per_class=0)


class TestSampler:
    def draw(self, files, **options):
        sampler, rng = ClassSampler(files.labels, files.classes, **options), np.random.default_rng(0)
        return [sampler(rng) for _ in range(4000)]

    def test_uniform(self, files):
        counts = np.bincount([choice.place for choice in self.draw(files)])
        assert counts.min() > 270 and counts.max() < 460 and len(counts) == 11

    def test_balanced(self, files):
        counts = np.bincount([choice.label for choice in self.draw(files, class_balanced=True)])
        assert counts.min() > 1250 and counts.max() < 1420

    def test_flips(self, files):
        for label, share in ((0, 0.5), (2, 0.0)):
            drawn = self.draw(files, no_flip_classes=["flag"])
            assert all(files.labels[choice.place] == choice.label for choice in drawn)
            assert np.mean([choice.mirrored for choice in drawn if choice.label == label]) == pytest.approx(
                share, abs=0.05
            )
        assert not any(choice.mirrored for choice in self.draw(files, flip=False))
        with pytest.raises(ValueError, match=r"`no_flip_classes` has \['flags'\], but the classes are cat, dog, flag"):
            self.draw(files, no_flip_classes=["flags"])
