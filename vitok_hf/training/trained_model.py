"""A model with its optimiser, and the average of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .arguments import TrainerArguments, TransformerArguments


M = TypeVar("M", bound=nn.Module)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP has sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prepare_blocks(model: ModelMixin, args: TransformerArguments) -> None:
    """Gradient checkpointing, and compilation of the blocks, which share their code, anew for each kind of call.

    Towers, training and evaluation, batches of one, and LoRA are more kinds together than PyTorch allows by itself.
    """
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        config = torch._dynamo.config  # `recompile_limit` under the name that it has in every version
        config.cache_size_limit = max(64, config.cache_size_limit)
        model.compile_repeated_blocks(fullgraph=True, dynamic=True)


class TrainedModel(Generic[M]):
    """A model with its optimiser and learning-rate schedule, prepared by accelerate.

    The learning rate is a function of the step alone: right for any number of processes, and after resumption. With
    `replicated`, every process keeps the whole model even if FSDP shards the others: FSDP supports neither parameters
    that are frozen for a while nor second derivatives.
    """

    def __init__(self, model: M, accelerator: Accelerator, args: TrainerArguments, replicated: bool = False):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, fused=True)
        schedule = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, args.max_train_steps)
        self.schedule = schedule.lr_lambdas[0]
        self.args, self.accelerator = args, accelerator
        self.replicated = replicated and accelerator.is_fsdp2
        if self.replicated:
            self.model, self.optimizer = DistributedDataParallel(model.to(accelerator.device)), optimizer
        else:
            if accelerator.is_fsdp2:  # for other engines, accelerate does it
                model.forward = accelerator.autocast()(model.forward)
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.configure()

    def configure(self) -> None:
        """Sets those settings of the optimiser that do not depend on the step, also of one that was loaded."""
        args = self.args
        for group in self.optimizer.param_groups:
            group |= {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.adam_weight_decay}

    @property
    def unwrapped(self) -> M:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def learning_rate(self, step: int) -> float:
        return self.args.learning_rate * self.schedule(step)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gradients are exchanged between processes at the last batch of a step only."""
        with self.accelerator.accumulate(*([] if self.replicated else [self.model])):
            keep = self.replicated and not self.accelerator.sync_gradients
            with self.model.no_sync() if keep else nullcontext():
                yield

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """The optimiser's step, if gradients are complete. Returns their norm before clipping, to log."""
        if not self.accelerator.sync_gradients:
            return {}
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        clip = nn.utils.clip_grad_norm_ if self.replicated else self.accelerator.clip_grad_norm_
        norm = clip(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": gather(norm)}


class WeightAverage(EMAModel):
    """`EMAModel` of the trained parameters of a model, sharded as these are; its state is that of the whole model."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(self.parameters, decay=decay)

    def update(self) -> None:
        self.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside this context."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self._assign(self.shadow_params)
        try:
            yield
        finally:
            self._assign(weights)

    def _assign(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.data.copy_(weight)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass without a backward pass, it still has the old weights gathered

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"shadow_params": [gather(parameter).cpu() for parameter in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        placed = []
        for saved, ours in zip(state_dict["shadow_params"], self.shadow_params, strict=True):
            saved = saved.to(ours.device)
            is_sharded = isinstance(ours, DTensor)
            placed.append(distribute_tensor(saved, ours.device_mesh, ours.placements) if is_sharded else saved)
        super().load_state_dict(state_dict | {"shadow_params": placed})
