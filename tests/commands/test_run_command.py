"""How commands end, and what the messages of the installed package name."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

import vitok_hf
from tests.conftest import EXAMPLES, launcher, run_launched
from vitok_hf.commands import EXTRAS, run_command


ROOT = EXAMPLES.parent


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("VITOK_TRACEBACK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/somewhere/draw.py"])


def fail(error: BaseException):
    def main():
        raise error

    return main


class TestRunCommand:
    @pytest.mark.parametrize(
        "error, line",
        [
            (ValueError("`size` is 0."), "draw.py: `size` is 0.\n"),
            (ValueError("Two:\n  a\n  b"), "draw.py: Two:\n  a\n  b\n"),
            (FileNotFoundError(2, "No such file", "x.png"), "draw.py: [Errno 2] No such file: 'x.png'\n"),
            (OSError(28, "No space left on device"), "draw.py: [Errno 28] No space left on device\n"),
            (OSError("404 Client Error.\n\nNot found:\n  x"), "draw.py: 404 Client Error. Not found: x\n"),
            (ImportError('pip install "vitok-hf[train]"'), 'draw.py: pip install "vitok-hf[train]"\n'),
            (HTTPError("no network"), "draw.py: no network\n"),
            (SafetensorError("header too large"), "draw.py: header too large\n"),
            (ValueError(), "draw.py: ValueError\n"),
            (ModuleNotFoundError("No module named 'x'"), f"draw.py: No module named 'x': {EXTRAS}\n"),
        ],
    )
    def test_what_can_be_mended_is_a_line(self, capsys, error, line):
        with pytest.raises(SystemExit) as exit:
            run_command(fail(error))
        assert exit.value.code == 2
        assert capsys.readouterr() == ("", line)

    def test_faults_keep_their_traceback(self):
        for error in (KeyError("x"), RuntimeError("x"), TypeError("x"), AssertionError("x")):
            with pytest.raises(type(error)):
                run_command(fail(error))

    def test_traceback_on_request(self, monkeypatch):
        monkeypatch.setenv("VITOK_TRACEBACK", "1")
        with pytest.raises(ValueError, match="size"):
            run_command(fail(ValueError("size")))

    @pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (SystemExit(1), 1)])
    def test_codes_of_what_is_no_error(self, capsys, error, code):
        with pytest.raises(SystemExit) as exit:
            run_command(fail(error))
        assert exit.value.code == code and capsys.readouterr().err == ""

    @pytest.mark.parametrize("code, said", [(2, True), (-9, False)])
    def test_a_command_that_it_started_has_said_why(self, capsys, code, said):
        with pytest.raises(SystemExit) as exit:
            run_command(fail(subprocess.CalledProcessError(code, ["train"])))
        assert exit.value.code == 2 and (capsys.readouterr().err == "") == said

    def test_what_a_worker_raises_is_a_line(self, capsys):
        """A `DataLoader` gives it with the traceback of the worker."""

        class Broken(torch.utils.data.Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                raise ValueError("x.mp4 has 7 frames")

        with pytest.raises(SystemExit):
            run_command(lambda: next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1))))
        assert capsys.readouterr().err == "draw.py: x.mp4 has 7 frames\n"

    def test_processes_are_told_apart(self, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SystemExit):
            run_command(fail(ValueError("size")))
        assert capsys.readouterr().err == "draw.py (process 1): size\n"

    def test_returns_where_nothing_went_wrong(self):
        assert run_command(lambda: None) is None


class TestScripts:
    """Commands in processes of their own."""

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)

    def check(self, process: subprocess.CompletedProcess, line: str) -> None:
        """That it ended with this line and no traceback; libraries may have warned before."""
        assert process.returncode == 2 and process.stdout == "" and "Traceback" not in process.stderr
        assert process.stderr.splitlines()[-1] == line

    def test_a_missing_file(self, tmp_path):
        process = self.run(str(EXAMPLES / "plot_metrics.py"), "--metrics", str(tmp_path / "none.jsonl"))
        self.check(process, f"plot_metrics.py: [Errno 2] No such file or directory: '{tmp_path}/none.jsonl'")

    def test_the_converter(self):
        process = self.run("-m", "conversion.convert_vitok_v2", "x/ViTok-v2-350M-f16x64")
        self.check(process, "vitok convert: Give the folder to write to, or --dry_run.")

    def test_packages_of_extras_that_are_not_installed(self, tmp_path):
        """All modules and scripts can be imported without them; what needs one names the extras."""
        blocked = ("datasets", "lpips", "matplotlib", "gradio", "onnxruntime", "peft", "scipy", "skimage")
        blocked += ("tensorboard", "torch_fidelity", "torchmetrics", "torchvision", "webdataset", "resvg_py")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        code = (
            f"import sys; sys.modules |= dict.fromkeys({blocked}); sys.path.insert(0, {str(EXAMPLES)!r})\n"
            "import importlib, pathlib, pkgutil, vitok_hf\n"
            "for module in pkgutil.walk_packages(vitok_hf.__path__, 'vitok_hf.'):\n"
            "    importlib.import_module(module.name)\n"
            f"for path in pathlib.Path({str(EXAMPLES)!r}).glob('*.py'):\n"
            "    importlib.import_module(path.stem)\n"
            f"sys.argv = ['plot_metrics.py', '--metrics', {str(tmp_path / 'metrics.jsonl')!r}]\n"
            "vitok_hf.commands.run_command(sys.modules['plot_metrics'].main)\n"
        )
        process = self.run("-c", code)
        line = process.stderr.splitlines()[-1]
        assert process.returncode == 2, process.stderr
        assert line.startswith("plot_metrics.py: ") and 'pip install "vitok-hf[' in line

    def test_two_processes_stop(self):
        process = run_launched([*launcher("ddp"), str(EXAMPLES / "train_vitok.py"), "--variant", "S-B/16"])
        assert process.returncode != 0
        ours = [line for line in process.stderr.splitlines() if line.startswith("vitok train (process ")]
        assert ours and all("Set exactly one of train_data_dir" in line for line in ours)
        assert "vitok_hf/training" not in process.stderr  # no traceback of ours

    @pytest.mark.parametrize(
        "path", [*EXAMPLES.glob("*.py"), *(ROOT / "conversion").glob("*.py")], ids=lambda x: x.stem
    )
    def test_all_are_run_so(self, path):
        if 'if __name__ == "__main__":' in path.read_text():
            end = path.read_text().split('if __name__ == "__main__":\n')[1]
            assert end == "    run_command(main)\n" or re.fullmatch(r'    main\("[a-z-]+", \*sys.argv\[1:\]\)\n', end)
        else:
            assert path.stem == "__init__"


def test_messages_name_what_a_wheel_has():
    found = []
    for path in Path(vitok_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.replace("app.py", "")  # a Space has one
                if any(word in text for word in (".py", "examples/", "conversion.", "checkout")):
                    found.append(f"{path.name}:{node.lineno}: {node.value}")
    assert not found
