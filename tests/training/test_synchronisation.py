"""A step of training asks for no value of a tensor, for which a GPU would have to be waited for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.conftest import next_batches
from tests.training.dit import make_dit_arguments
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.dit_trainer import DiTTrainer


WAITING = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.equal.default",
    "aten.masked_select.default",
}


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["stage 1", "stage 2", "generator"])
def test_a_step_waits_for_nothing(arguments, stage2, tmp_path, kind):
    options = {"use_ema": True, "gradient_accumulation_steps": 2}
    if kind == "generator":
        trainer = DiTTrainer(make_dit_arguments(tmp_path, **options))
    elif kind == "stage 1":
        trainer = AutoencoderTrainer(arguments(channel_counts=[2, 4], **options))
    else:
        options |= {"adaptive_gan_weight": 10.0, "r1_weight": 1.0, "r1_every": 1, "lecam_weight": 0.1}
        trainer = AutoencoderTrainer(stage2(**options))
    first, second = next_batches(trainer, 2), next_batches(trainer, 2)
    trainer.training_step(first)
    with Calls() as calls:
        trainer.training_step(second)
    assert len(calls.names) > 1000 and not WAITING & {*calls.names}
    with Calls() as calls:
        torch.ones(()).item()
    assert WAITING & {*calls.names}
