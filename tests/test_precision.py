import logging

import pytest
import torch

from tests.training.conftest import arguments as arguments
from vitok_hf import precision
from vitok_hf.precision import choose_dtype, choose_mixed_precision, multiplies_bfloat16
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer


CPU = torch.device("cpu")
IN_HARDWARE = pytest.mark.parametrize("in_hardware", [True, False])


@pytest.fixture
def machine(monkeypatch, in_hardware):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: in_hardware)


@IN_HARDWARE
class TestChoice:
    def test_auto(self, machine, in_hardware):
        assert choose_dtype() == choose_dtype("auto", CPU) == ("bfloat16" if in_hardware else "float32")
        assert choose_mixed_precision() == ("bf16" if in_hardware else "no")

    def test_accelerate_goes_before_the_hardware(self, machine, in_hardware, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        assert choose_mixed_precision("auto", CPU) == "fp16"
        assert choose_mixed_precision("no", CPU) == "no"

    @pytest.mark.parametrize(
        "choose, name, other", [(choose_dtype, "bfloat16", "float16"), (choose_mixed_precision, "bf16", "no")]
    )
    def test_emulation_is_warned_of(self, machine, in_hardware, choose, name, other, caplog):
        with caplog.at_level(logging.WARNING):
            assert choose(other, CPU) == other and not caplog.records
            assert choose(name, CPU) == name
        assert ("Products in bfloat16 take" in caplog.text) != in_hardware

    def test_training(self, machine, in_hardware, arguments):
        trainer = AutoencoderTrainer(arguments(mixed_precision="auto"))
        assert trainer.accelerator.mixed_precision == ("bf16" if in_hardware else "no")


def test_unknown_names():
    with pytest.raises(ValueError, match="`dtype` must be one of auto, float32, bfloat16, float16, but is 'half'"):
        choose_dtype("half")
    with pytest.raises(ValueError, match="`mixed_precision` must be one of auto, no, bf16, fp16, but is 'bfloat16'"):
        choose_mixed_precision("bfloat16")


@pytest.mark.parametrize("slowness", [0.2, 2.0])
@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16", "avx2"])
def test_processors(name, slowness, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, name: True})
    monkeypatch.setattr(precision, "_seconds", lambda dtype: slowness if dtype == torch.bfloat16 else 1.0)
    precision.bfloat16_slowness.cache_clear()
    assert multiplies_bfloat16(CPU) == (name != "avx2" and slowness < 1)
    precision.bfloat16_slowness.cache_clear()
