"""One process of a training run in the tests: `worker.py settings.json`, with or without `accelerate launch`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from vitok_hf import AutoencoderViTok
from vitok_hf.training.arguments import AutoencoderArguments, DiTArguments
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.dit_trainer import DiTTrainer


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    killed_rank, killed_step = settings.pop("kill", (None, None))
    killed_saving = settings.pop("kill_saving", None)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate takes FSDP for accelerators only, although PyTorch's runs on a CPU as well
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if settings.pop("transformer", False):
        trainer = DiTTrainer(DiTArguments(**settings))
        seen = set()

        def note_timesteps(_, inputs):
            if inputs:  # not of a pipeline
                seen.add(inputs[1].dtype)

        trainer.transformer.register_forward_pre_hook(note_timesteps)
    else:
        trainer = AutoencoderTrainer(AutoencoderArguments(**settings))
    rank, training_step = trainer.accelerator.process_index, trainer.training_step

    def step(batches):
        if (rank, trainer.step) == (killed_rank, killed_step):
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(batches)

    def save(*args, **kwargs):
        Path(args[1]).mkdir()
        (Path(args[1]) / "config.json").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)

    trainer.training_step = step
    if killed_saving is not None:
        save_models = trainer.save_models

        def save_until_killed(folder):
            if trainer.step == killed_saving:
                AutoencoderViTok.save_pretrained = save
            save_models(folder)

        trainer.save_models = save_until_killed
    trainer.train()
    if "discriminator" in trainer.models:
        torch.save(trainer.models["discriminator"].unwrapped.state_dict(), f"{settings['output_dir']}/rank{rank}.pt")
    if "transformer" in trainer.models:
        print(f"timesteps {seen}")
    model = next(iter(trainer.models.values())).model
    print(f"engine {trainer.accelerator.distributed_type.value}, {type(model).__name__}")


if __name__ == "__main__":
    main()
