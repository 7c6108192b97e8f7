"""What belongs to one call of a pipeline, so that several threads can share the pipeline."""

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .schedulers import check_timesteps


_lock = threading.Lock()  # of all pipelines: one of their own could not be pickled or copied
_running: list["Call"] = []  # of all pipelines, which may share a scheduler


@dataclass(eq=False)
class Call:
    """Of a thread, or of a callback inside another call."""

    scheduler: SchedulerMixin
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    is_running: bool = False
    interrupt: bool = False
    num_timesteps: int | None = None
    current_timestep: torch.Tensor | None = None
    timesteps: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    guided_steps: range = range(0)
    step_options: dict[str, Any] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)

    def set_timesteps(self, num_inference_steps: int, num_tokens: int, device: torch.device) -> None:
        config, options = self.scheduler.config, {}
        takes_shift = "mu" in inspect.signature(self.scheduler.set_timesteps).parameters
        if takes_shift and config.get("use_dynamic_shifting"):  # more noise for more tokens, as in FLUX
            shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            options["mu"] = low + (high - low) * (num_tokens - shortest) / (longest - shortest)
        try:
            self.scheduler.set_timesteps(num_inference_steps, device=device, **options)
        except Exception as error:  # of diffusers or numpy, of any type
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot make {num_inference_steps} steps ({error}): change "
                "`num_inference_steps`, or the config of the scheduler."
            ) from error
        check_timesteps(self.scheduler)
        self.timesteps = self.scheduler.timesteps

    def set_guided_steps(self, interval: tuple[float, float]) -> None:
        first, last = (round(fraction * len(self.timesteps)) for fraction in interval)
        self.guided_steps = range(first, last)

    def set_step_options(self, **options: Any) -> None:
        """Those that are not `None` and that the scheduler's `step` takes."""
        parameters = inspect.signature(self.scheduler.step).parameters
        self.step_options = {name: x for name, x in options.items() if x is not None and name in parameters}


class CallField:
    """`pipe._guidance_scale` and others, as diffusers' callbacks set them.

    Reads the call of this thread that is running, or was the last; in a thread without, the newest of all. Sets that
    of this thread, if it is running; else all that are.
    """

    def __set_name__(self, owner: type, name: str):
        self.name, self.is_public = name.removeprefix("_"), not name.startswith("_")

    def __get__(self, pipe: "CallsMixin | None", owner: type) -> Any:
        if pipe is None:
            return self
        calls = list(pipe._calls)
        mine = [call for call in calls if call.thread == threading.get_ident()]
        return getattr((mine or calls or [Call(None)])[-1], self.name)

    def __set__(self, pipe: "CallsMixin", value: Any):
        if self.is_public:
            raise AttributeError(
                f"`{self.name}` is that of a call: pass it to the call, or set `_{self.name}` in one."
            )
        running = [call for call in list(pipe._calls) if call.is_running]
        mine = [call for call in running if call.thread == threading.get_ident()]
        for call in mine[-1:] or running:
            setattr(call, self.name, value)


class CallsMixin:
    """Of a pipeline with a `scheduler`: what diffusers' callbacks and caches read and set of a call."""

    scheduler: Any  # of diffusers
    _calls: list[Call]

    guidance_scale, _guidance_scale, _guidance_rescale = CallField(), CallField(), CallField()
    interrupt, _interrupt = CallField(), CallField()  # `True` ends the call with the latents of its step
    num_timesteps, _num_timesteps = CallField(), CallField()
    current_timestep, _current_timestep = CallField(), CallField()  # of the step that is being computed

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Read at every step, so that a callback may set `_guidance_scale`."""
        return self._guidance_scale > 1

    def __init__(self):
        super().__init__()
        self._calls = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies run no calls."""
        return self.__dict__ | {"_calls": []}

    @contextmanager
    def _begin_call(self, **settings: Any) -> Iterator[Call]:
        """The scheduler of the call is the pipeline's, or a copy where another call is using that.

        Of a thread, the calls that run, which are nested, are in the list, or the last one that did.
        """
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        with _lock:
            self._calls[:] = [other for other in self._calls if other.is_running or other.thread in others]
            is_used = any(other.scheduler is self.scheduler for other in _running)
            # Shallow first: the other call must not change a dict that is being gone through.
            scheduler = copy.deepcopy(copy.copy(self.scheduler)) if is_used else self.scheduler
            call = Call(scheduler, is_running=True, **settings)
            self._calls.append(call)
            _running.append(call)
        try:
            yield call
        finally:
            with _lock:
                _running.remove(call)
                call.is_running, call.current_timestep = False, None
                if any(other.is_running and other.thread == call.thread for other in self._calls):
                    self._calls.remove(call)
