"""The diffusion transformer on two processes, which draw their own pictures and noise; see `test_scale_out`."""

import pytest
import torch

from tests.training.conftest import read_log
from tests.training.dit import make_dit_arguments
from tests.training.test_scale_out import launch
from vitok_hf import ViTokDiTPipeline


pytestmark = pytest.mark.slow  # six processes

KEYS = ["loss", "grad_norm", "held_out_loss", "held_out_ema_loss", "held_out_ema_loss_0-500", "skipped"]


def metrics(output_dir):
    return {(key, step): value for key in KEYS for step, value in read_log(output_dir, key).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With runs by both engines, from the same seeds, `ddp` and `fsdp2`; and `resumed`, the end of `fsdp2`."""
    folder = tmp_path_factory.mktemp("dit")
    for name, engine in (("ddp", "ddp"), ("fsdp2", "fsdp2"), ("resumed", "fsdp2")):
        checkpoint = str(folder / "fsdp2" / "checkpoint-2") if name == "resumed" else None
        settings = make_dit_arguments(
            folder,
            output_dir=str(folder / name),
            gradient_accumulation_steps=2,
            resume_from_checkpoint=checkpoint,
        )
        process = launch(settings, engine, transformer=True)
        assert process.returncode == 0, process.stderr[-3000:]
        assert ("FSDPViTokDiTModel" if engine == "fsdp2" else "DistributedDataParallel") in process.stdout
    return folder


def test_engines_agree(folder):
    expected = metrics(folder / "ddp")
    assert len(expected) == 3 * 4 + 3
    assert metrics(folder / "fsdp2") == pytest.approx(expected, rel=2e-4)
    for name in ("pipeline", "checkpoint-4/pipeline", "checkpoint-4/pipeline_ema"):
        models = [ViTokDiTPipeline.from_pretrained(folder / run / name).transformer for run in ("ddp", "fsdp2")]
        for ours, theirs in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_resumes(folder):
    expected = {key: value for key, value in metrics(folder / "fsdp2").items() if key[1] > 2}
    assert metrics(folder / "resumed") == pytest.approx(expected, rel=1e-6)


def test_timesteps_stay_exact(folder):
    """Flow matching in bfloat16: FSDP would round those above 256 to even numbers, and more coarsely further up."""
    settings = make_dit_arguments(
        folder, output_dir=str(folder / "flow"), mixed_precision="bf16", prediction_type="flow_prediction"
    )
    process = launch(settings, "fsdp2", transformer=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "timesteps {torch.float32}" in process.stdout
