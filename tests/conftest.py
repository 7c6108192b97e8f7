import gc
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from tests.hub_server import hub as hub
from vitok_hf import AutoencoderViTok, precision


GOLDEN = Path(__file__).parent / "golden" / "vitok_v2_tiny"
EXAMPLES = Path(__file__).parents[1] / "examples"
ASSETS = EXAMPLES / "assets"

TINY = {
    "latent_channels": 4,
    "patch_size": 8,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 48,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 2,
    "sample_size": 32,
}
V2 = {
    "parallel_blocks": True,
    "qk_norm": True,
    "layer_scale_init": 0.5,
    "final_norm": False,
    "latent_norm": True,
    "variational": False,
}
ARCHITECTURES = {
    "v1": TINY,
    "v2": TINY | V2,
    "video": TINY | {"temporal_patch_size": 2, "sample_frames": 4},
    "causal": TINY | {"temporal_patch_size": 4, "sample_frames": 5, "causal": True},
    "everything": TINY | {"qk_norm": True, "layer_scale_init": 0.5, "use_bias": True},
}


def pytest_collection_finish() -> None:
    gc.freeze()  # trainers collect garbage, which takes a second with all that is imported


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch):
    """The same for every test on any machine: the precision, and what accelerate and diffusers keep for a process."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(backend)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_close(actual, expected, atol: float = 1e-5) -> None:
    """Equal up to the rounding of float32 products, which depends on where weights lie in memory."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def _enter(rank: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    function(*args)


def run_on_two_processes(function: Callable, *args) -> None:
    """Calls a function of a module in two fresh processes: forks of one that has computed may hang in OpenMP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (port, function, args), nprocs=2)


def launcher(engine: str) -> list[str]:
    """The command for two processes with one of the shipped configurations."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += ["--config_file", str(EXAMPLES / "accelerate_configs" / f"{engine}.yaml")]
    return [*command, "--mixed_precision", "no", "--main_process_port", "0"]


def run_launched(command: list[str], **options) -> subprocess.CompletedProcess:
    """Runs a command on the CPU, with one thread a process."""
    environment = os.environ | {
        "PYTHONPATH": str(EXAMPLES.parent),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def launch_example(name: str, *arguments: str, folder: Path) -> str:
    """Runs a script of examples/ in two processes on the CPU; returns what it prints."""
    process = run_launched([*launcher("ddp"), str(EXAMPLES / name), *arguments], cwd=folder)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.fixture
def run_example(monkeypatch, capsys, tmp_path):
    """Runs a script of examples/ in `tmp_path` as a user would; returns what it prints."""

    def run(name: str, *arguments) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setenv("VITOK_TRACEBACK", "1")  # errors as they are raised
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def vae(architecture):
    return make_vae(architecture)


def make_vae(architecture: str, **overrides) -> AutoencoderViTok:
    torch.manual_seed(0)
    return AutoencoderViTok(**ARCHITECTURES[architecture] | overrides).eval()


def make_input(vae: AutoencoderViTok, batch_size: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch_size, 3, *frames_of(vae), height, width, generator=generator) * 2 - 1


def frames_of(vae: AutoencoderViTok) -> tuple[int, ...]:
    """Of a clip with two latent frames, the dimension T; of a picture, none."""
    return () if vae.is_image_model else (vae.config.sample_frames,)
