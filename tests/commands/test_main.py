"""The program `vitok`."""

import os
import subprocess
import sys

import pytest
from PIL import Image

import vitok_hf
from tests.conftest import EXAMPLES
from vitok_hf.commands import COMMANDS, main, make_parser, start


def run(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_list(capsys):
    main("--help")
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    files = {path.stem.replace("_", "-") for path in (EXAMPLES.parent / "vitok_hf" / "commands").glob("[a-z]*.py")}
    assert files - {"settings"} == set(COMMANDS)


def test_version(capsys):
    main("--version")
    assert capsys.readouterr().out == f"vitok {vitok_hf.__version__}\n"


def test_help_has_the_defaults():
    parser = make_parser("x", None)
    for name, default in {"steps": 0, "model": "tiny", "limit": None, "paths": [], "sizes": ["8x8"]}.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--rate", default=2.0, help="of frames")
    parser.add_argument("--size", default=8, help="default: that of the model")
    parser.add_argument("--share", action="store_true", help="a public address")
    for _ in range(2):  # help may be asked for twice
        lines = [line.split(maxsplit=2)[1:] for line in parser.format_help().split("options:")[1].splitlines() if line]
    texts = {line[0]: line[1] if len(line) > 1 else "" for line in lines if line}
    assert texts["STEPS"] == "default: 0" and texts["MODEL"] == "default: tiny" and texts["LIMIT"] == ""
    assert (
        texts["PATHS"] == "" and texts["SIZES"] == "default: ['8x8']" and texts["RATE"] == "of frames (default: 2.0)"
    )
    assert texts["SIZE"] == "default: that of the model" and "a public address" in parser.format_help()
    assert "address (default" not in parser.format_help()


@pytest.mark.parametrize("folder", ["examples", "vitok_hf/commands"])
def test_all_parsers_have_them(folder):
    for path in (EXAMPLES.parent / folder).glob("*.py"):
        made = path.read_text().count("argparse.ArgumentParser(")
        assert made == (path.name == "__init__.py"), path


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main("tran")
    assert exit.value.code == 2
    assert 'there is no command "tran": choose from reconstruct, generate, train,' in capsys.readouterr().err


def test_help_needs_no_torch():
    """Of the program and of each command, in one process that looks as the installed script makes it look."""
    process = run(
        "import sys\n"
        "sys.argv = ['/usr/bin/vitok']\n"
        "from vitok_hf.commands import COMMANDS, main\n"
        "main('--help')\n"
        "for name in COMMANDS:\n"
        "    try:\n"
        "        main(name, '--help')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    assert process.returncode == 0, process.stderr
    assert all(f"usage: vitok {name} " in process.stdout for name in COMMANDS)
    assert "(default: 4096)" in process.stdout and "(default: None)" not in process.stdout


def test_names_are_there_when_the_program_needs_them():
    process = run(
        "import sys\n"
        "sys.argv = ['vitok']\n"
        "import vitok_hf\n"
        "assert 'torch' not in sys.modules and not hasattr(vitok_hf, 'nothing')\n"
        "assert vitok_hf.ModelMixin and all(hasattr(vitok_hf, name) for name in vitok_hf.__all__)\n"
        "import diffusers\n"
        "assert diffusers.ViTokDiTPipeline is vitok_hf.ViTokDiTPipeline\n"
    )
    assert process.returncode == 0, process.stderr


def test_importing_the_package_registers_its_classes():
    process = run("import vitok_hf, diffusers; diffusers.AutoencoderViTok, diffusers.ViTokDiTPipeline")
    assert process.returncode == 0, process.stderr


def test_as_a_module_under_a_launcher():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vitok_hf.commands", "train", "--help"],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
    )
    assert process.returncode == 0 and "--config" in process.stdout
    modules = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert "vitok_hf.commands.settings" in modules and "torch" not in modules


def test_packages_name_the_extra_of_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delenv("VITOK_TRACEBACK", raising=False)
    with pytest.raises(SystemExit):
        main("export-onnx", "--output_dir", str(tmp_path / "onnx"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vitok export-onnx: ") and line.endswith('pip install "vitok-hf[onnx]" brings it')
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("name, value, least", [("batch_size", 0, 1), ("limit", 0, 1), ("num_examples", -1, 0)])
def test_numbers_out_of_their_range(name, value, least):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer from {least} to .*, but is {value}"):
        start("evaluate", ["--models", "none", "--data_dir", "none", f"--{name}", str(value)])


def test_opsets_that_are_not_made(capsys):
    with pytest.raises(SystemExit):
        start("export-onnx", ["--opset", "17"])
    assert "--opset: invalid choice: 17 (choose from 18" in capsys.readouterr().err


def test_classes_and_seeds_of_other_digits():
    arguments = ["--num_inference_steps", "1", "--class_labels"]
    with pytest.raises(ValueError, match='no class "²"'):
        start("generate", [*arguments, "²"])
    with pytest.raises(ValueError, match="`seed` must be an integer from -9223372036854775808 to .*, but is 1000000"):
        start("generate", [*arguments, "face", "--seed", str(10**20)])


def test_default_of_reconstruct(monkeypatch, tmp_path, capsys):
    """A photograph of the package, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    start("reconstruct", [])
    out = capsys.readouterr().out
    assert "24:1" in out and "astronaut.png: 512x512  PSNR" in out
    assert float(out.split("PSNR ")[1].split(" dB")[0]) > 25.0
    assert Image.open("reconstructions/astronaut_comparison.png").size == (1024, 512)
