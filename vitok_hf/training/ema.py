from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP has sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WeightAverage(EMAModel):
    """`EMAModel` of the trained parameters of a model, sharded as these are; its state is that of the whole model."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(self.parameters, decay=decay)

    def update(self) -> None:
        self.step(self.parameters)

    @contextmanager
    def applied(self):
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
            if isinstance(ours, DTensor):
                placed.append(distribute_tensor(saved.to(ours.device), ours.device_mesh, ours.placements))
            else:
                placed.append(saved.to(ours.device))
        super().load_state_dict(state_dict | {"shadow_params": placed})
