"""The training loop, and all that training runs share. What is trained, and how, is up to a subclass of `Trainer`."""

import logging
import math
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from tqdm.auto import tqdm

from ..data.batches import Batch, DrawnBatches, StreamBatches
from ..data.claims import note_inputs
from ..data.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, iterate_files, short_names
from ..data.items import Clip
from ..data.loader import BatchLoader
from ..data.sources import parse_source
from ..disk import lock_folder, remove_folder, remove_leftovers, write_json
from ..loading.strict import read_json
from ..models.saving import plain_name
from ..pipelines.model_card import ModelCard
from ..precision import choose_mixed_precision
from .arguments import TrainerArguments
from .checkpointing import atomic_folder, checkpoint_step, find_checkpoint, list_checkpoints, write_manifest
from .publishing import changed_settings, push
from .run_state import load_state, naming_misfits, read_tree, save_state, set_random_state
from .tracking import Log, Window
from .trained_model import M, TrainedModel, WeightAverage, gather


logger = logging.getLogger(__name__)

A = TypeVar("A", bound=TrainerArguments)


class Trainer(ABC, Generic[A, M]):
    """Trains on one or many processes, from the current step to `max_train_steps`.

    Every process draws its own batches. Checkpoints, `checkpoint-<step>/`, hold models for `from_pretrained` and the
    state of the run; they are written under a temporary name and renamed when complete, on a file system that all
    nodes share. One run at a time has `output_dir`. The constructor of a subclass calls `add_model` and then `start`.
    """

    result: str
    loader: BatchLoader
    trained: TrainedModel[M]  # the first of `models`, which the result is of
    average: WeightAverage | None = None

    def __init__(self, args: A):
        self.args, self.output_dir, self.step, self.num_skipped = args, Path(args.output_dir).absolute(), 0, 0
        self.models: dict[str, TrainedModel[Any]] = {}
        self.held_out: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.accelerator = Accelerator(
            mixed_precision=choose_mixed_precision(args.mixed_precision),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(self.output_dir / "logs")),
        )
        self._check_engine()
        self.lock = lock_folder(self.output_dir, take_over=True)
        if self.lock is not None:
            weakref.finalize(self, self.lock.release)
        if self.accelerator.is_main_process:
            for folder in (self.output_dir, self.output_dir / "samples"):
                remove_leftovers(folder)
        self.checkpoint = find_checkpoint(self.output_dir, args.resume_from_checkpoint)
        set_seed(args.seed)

    @abstractmethod
    def training_step(self, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
        """One optimiser step of every model. Returns what to log of each batch; all processes call it."""

    @abstractmethod
    def load_held_out(self, path: str) -> Any:
        """The held-out data in a folder, which are fixed: a file that cannot be read raises `ValueError`."""

    @abstractmethod
    def measure(self, held_out: Any) -> tuple[dict[str, float], np.ndarray | None]:
        """Metrics of held-out data by name, and a picture to look at, (H, W, 3) uint8; all processes call it."""

    @abstractmethod
    def write_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes what `from_pretrained` loads, with these weights; only the main process calls it."""

    @abstractmethod
    def model_card(self, name: str) -> ModelCard:
        """What the card of the result says besides metrics and settings."""

    def samples(self) -> dict[str, np.ndarray]:
        """Pictures to look at that need no data, by name; all processes call it."""
        return {}

    def count_pixels(self, batch: Batch) -> int:
        """Of all frames of the batch."""
        return sum(run[:, 0].numel() for run in batch.pixels)

    def set_training(self, training: bool) -> None:
        """Puts the model in training mode, or in that of evaluation."""
        self.trained.model.train(training)

    def _check_engine(self) -> None:
        if self.accelerator.distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2:
            raise ValueError("FSDP version 1 is not supported: set `fsdp_version: 2` in accelerate's configuration.")
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed is not supported: FSDP2 shards the same (`fsdp_version: 2` in accelerate's configuration)."
            )
        if self.accelerator.is_fsdp2 and self.accelerator.mixed_precision == "fp16":
            raise ValueError('`mixed_precision` "fp16" is not supported with FSDP: take "bf16".')
        if self.accelerator.is_fsdp2 and self.accelerator.mixed_precision != "no":
            # autocast does the casting, and leaves timesteps exact
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)

    def add_model(self, name: str, model: M) -> None:
        """Prepares the model that the result is of, and its average if there is to be one."""
        self.trained = self.models[name] = TrainedModel(model, self.accelerator, self.args)
        if self.args.use_ema:
            self.average = WeightAverage(self.trained.model, self.args.ema_decay)

    def start(self, dataset: DrawnBatches | StreamBatches) -> None:
        """Reads held-out data and begins with those of training, seeds the processes and loads a checkpoint."""
        args, processes = self.args, (self.accelerator.process_index, self.accelerator.num_processes)
        self.loader = BatchLoader(dataset, args.dataloader_num_workers, *processes)
        names = short_names(args.validation_data_dir)
        self.held_out = {name: self.load_held_out(path) for name, path in zip(names, args.validation_data_dir)}
        self.set_training(True)
        set_seed(args.seed, device_specific=True)  # the noise differs between processes
        if self.checkpoint is not None:
            with naming_misfits(self.checkpoint):
                self._resume(self.checkpoint)
        elif args.resume_from_checkpoint:  # a job that is queued again has the same command
            logger.warning('"%s" has no checkpoint to resume from: the run starts anew.', self.output_dir)
        elif found := list_checkpoints(self.output_dir):
            raise ValueError(
                f'"{self.output_dir}" has {found[-1].name} of another run: go on with it by '
                'resume_from_checkpoint="latest", or name another output_dir.'
            )
        if self.accelerator.is_main_process:
            changes = note_inputs(self.output_dir, *self.inputs(), self.checkpoint and self.checkpoint.parent)
            if changes:
                logger.warning(
                    'Going on from "%s", but its run was last started with %s.', self.checkpoint, "; ".join(changes)
                )

    def inputs(self) -> tuple[dict[str, object], list[str | Path]]:
        """Settings and local files that the weights depend on."""
        hidden = ("output_dir", "hub_token", "resume_from_checkpoint", "max_minutes")
        settings: dict[str, object] = {name: x for name, x in vars(self.args).items() if name not in hidden}
        settings["mixed_precision"] = self.accelerator.mixed_precision  # perhaps of accelerate's configuration
        settings["num_processes"] = self.accelerator.num_processes
        folders = [parse_source(source)[0] for source in self.args.train_data_dir]
        clip = getattr(self.loader.dataset.view, "clip", Clip())
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES | clip.suffixes
        files: list[str | Path] = [file for folder in folders for file in iterate_files(folder, suffixes)]
        shards = getattr(getattr(self.loader.dataset, "source", None), "urls", ())
        return settings, files + [shard for shard in shards if Path(shard).is_file()]

    def train(self) -> None:
        """Trains to `max_train_steps`, or for `max_minutes`; ends with a checkpoint and, after all steps, `finish`."""
        if self.lock is not None and not self.lock.is_held():  # a later trainer has it, or had it and is gone
            self.lock = lock_folder(self.output_dir)
        try:
            self._train()
        finally:
            if self.lock is not None:
                self.lock.release()

    def _train(self) -> None:
        args = self.args
        settings = vars(args) | {"mixed_precision": self.accelerator.mixed_precision}  # what "auto" stands for
        log = Log(self.accelerator, self.output_dir, args.tracker_project_name, settings, self.step)
        finished = stop = self.step >= args.max_train_steps
        if finished:  # a run that may have broken off after its last checkpoint
            logger.warning(
                "Nothing to train, the checkpoint is at step %d of %d: writing the result.",
                *(self.step, args.max_train_steps),
            )
            self._evaluate(log, replace=True)
        elif self.checkpoint and self.step % args.validation_steps == 0 and log.lacks_evaluation(self.step):
            self._evaluate(log)  # the run was killed before its end
        began, first, window, batches = time.monotonic(), self.step + 1, Window(), iter(self.loader)
        bar = tqdm(total=args.max_train_steps, initial=self.step, disable=not self.accelerator.is_local_main_process)
        while not stop:
            micro_batches = [self._next_batch(batches) for _ in range(args.gradient_accumulation_steps)]
            logs = self.training_step(micro_batches)
            self.step += 1
            if self.average is not None:
                self.average.update()
            for batch, log_of_batch in zip(micro_batches, logs):
                window.add(log_of_batch, batch.num_items, self.count_pixels(batch))
            bar.update()
            if self.step == first:  # in which workers started and kernels were compiled
                window.start_clock()
            finished = stop = self.step == args.max_train_steps
            if self.step % args.logging_steps == 0 or finished:
                stop = finished or self._out_of_time(began)
                values = self._check_finite(window.means(self.accelerator))
                bar.set_postfix({x: f"{values[x]:.4g}" for x in ("loss", "items_per_second") if x in values})
                log.write(self.step, values | self._learning_rates() | {"skipped": self._total_skipped()})
                window = Window()
            if self.step % args.checkpointing_steps == 0 or stop:
                if window.logs:  # since the last check
                    self._check_finite(window.means(self.accelerator))
                with window.paused():
                    self.save()
            if self.step % args.validation_steps == 0 or finished:
                with window.paused():
                    self._evaluate(log)
        bar.close()
        if finished:
            self.finish()
        self.accelerator.end_training()

    def _evaluate(self, log: Log, replace: bool = False) -> None:
        metrics, pictures = self.evaluate()
        log.write(self.step, metrics, replace)
        log.show(self.step, pictures)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        batch = next(batches)
        for reason in batch.skipped:
            self.num_skipped += 1
            logger.warning("Skipped what cannot be read, number %d of this process: %s", self.num_skipped, reason)
        return batch

    def _total_skipped(self) -> int:
        return int(self.accelerator.reduce(torch.tensor(self.num_skipped, device=self.accelerator.device), "sum"))

    def _learning_rates(self) -> dict[str, float]:
        """Of the last step; that of the first model has no prefix."""
        step = self.step - 1
        rates = {f"{name}_learning_rate": trained.learning_rate(step) for name, trained in self.models.items()}
        first = next(iter(rates))
        return {"learning_rate": rates.pop(first)} | rates

    def _check_finite(self, values: dict[str, float]) -> dict[str, float]:
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"The loss is {values['loss']} at step {self.step}: lower `learning_rate`, and resume from a "
                "checkpoint before."
            )
        return values

    def _out_of_time(self, began: float) -> bool:
        """The same answer on every process, for clocks differ."""
        if self.args.max_minutes is None:
            return False
        out_of_time = time.monotonic() - began > 60 * self.args.max_minutes
        return bool(self.accelerator.reduce(torch.tensor(out_of_time, device=self.accelerator.device).int()) > 0)

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics and pictures, (H, W, 3) uint8, by name: of held-out data, of the weights and of their average.

        What needs no data, is of the average alone, if there is one. All processes must call it.
        """
        metrics: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        self.set_training(False)
        for label, weights in self.averages().items():
            with weights:
                for name, held_out in self.held_out.items():
                    values, picture = self.measure(held_out)
                    metrics |= {f"{name}{label}_{metric}": value for metric, value in values.items()}
                    pictures |= {} if picture is None else {f"{name}{label}": picture}
                if (label == "") == (self.average is None):
                    pictures |= {f"{name}{label}": picture for name, picture in self.samples().items()}
        self.set_training(True)
        self.metrics = metrics
        return metrics, pictures

    def averages(self) -> dict[str, AbstractContextManager[None]]:
        """Suffix of names and a context in which the model has these weights: its own and their average."""
        own: dict[str, AbstractContextManager[None]] = {"": nullcontext()}
        return own if self.average is None else own | {"_ema": self.average.applied()}

    def gather_weights(self, average: bool) -> dict[str, torch.Tensor]:
        """The state dict of the whole model, or of its average, on the main process; all processes must call it."""
        state_dict = self.accelerator.get_state_dict(self.trained.model)
        state_dict = {plain_name(name): value for name, value in state_dict.items()}
        if average and self.average is not None:
            parameters = self.trained.unwrapped.named_parameters()
            names = [plain_name(name) for name, parameter in parameters if parameter.requires_grad]
            shadows = [gather(shadow) for shadow in self.average.shadow_params]
            state_dict |= dict(zip(names, shadows, strict=True))
        return state_dict

    def save_models(self, folder: Path) -> None:
        """Writes `folder`/<result> and, with an average, `folder`/<result>_ema; all processes must call it."""
        for label in self.averages():
            state_dict = self.gather_weights(average=label != "")
            if self.accelerator.is_main_process:
                self.write_model(folder / f"{self.result}{label}", state_dict)

    def finish(self) -> None:
        """Writes the final model, averaged if there is an average, and its card, and uploads them if asked to."""
        args, folder = self.args, self.output_dir / self.result
        name = args.hub_model_id or self.output_dir.resolve().name  # of the repository
        path = name if args.push_to_hub or args.hub_model_id else f"{name}/{self.result}"
        state_dict = self.gather_weights(average=True)
        with atomic_folder(folder, self.accelerator) as temporary:
            if self.accelerator.is_main_process:
                self.write_model(temporary, state_dict)
                metrics = {metric: x for metric, x in self.metrics.items() if "_ema_" in metric or not args.use_ema}
                card = replace(self.model_card(path), metrics=metrics, settings=changed_settings(args))
                replace(card, held_out=[*self.held_out]).write(temporary)
        if args.push_to_hub and self.accelerator.is_main_process:
            logger.warning("Uploaded to %s.", push(folder, name, args.hub_token))

    def save(self) -> None:
        """Writes `checkpoint-<step>/` and deletes the oldest ones over `checkpoints_total_limit`."""
        with atomic_folder(self.output_dir / f"checkpoint-{self.step}", self.accelerator) as folder:
            save_state(self.accelerator, folder / "state", self.objects())
            state = {
                "loader": self.loader.state_dict(),
                "num_skipped": self.num_skipped,
                "settings": self.fixed_settings(),
            }
            write_json(folder / "state" / f"data_{self.accelerator.process_index}.json", state)
            self.save_models(folder)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_manifest(folder)
        if self.accelerator.is_main_process and self.args.checkpoints_total_limit is not None:
            for path in list_checkpoints(self.output_dir)[: -self.args.checkpoints_total_limit]:
                remove_folder(path)

    def fixed_settings(self) -> dict[str, object]:
        """Those that decide what a checkpoint holds, and cannot change when it is resumed."""
        return {"use_ema": self.args.use_ema}

    def objects(self) -> dict[str, Any]:
        """What the state of the run holds beside models that accelerate prepared: by name, with a `state_dict`."""
        objects: dict[str, Any] = {} if self.average is None else {"average": self.average}
        for name, trained in self.models.items():
            if trained.replicated:
                objects |= {f"{name}_model": trained.unwrapped, f"{name}_optimizer": trained.optimizer}
        return objects

    def _check_settings(self, path: Path, saved: dict[str, object]) -> None:
        for name, value in self.fixed_settings().items():
            if saved.get(name, value) != value:
                raise ValueError(
                    f"`{name}` is {value}, but {path.name} was written with {saved[name]}: resume with that, or start "
                    "from its model in another output_dir."
                )

    def _resume(self, path: Path) -> None:
        args, self.step = self.args, checkpoint_step(path) or 0
        if later := [x.name for x in list_checkpoints(self.output_dir) if (checkpoint_step(x) or 0) > self.step]:
            raise ValueError(
                f'"{self.output_dir}" has {", ".join(later)}, later than {path.name}: delete them to go on from '
                'there, name another output_dir, or resume from "latest".'
            )
        mine, any_process = (path / "state" / f"data_{index}.json" for index in (self.accelerator.process_index, 0))
        state = read_json(mine if mine.exists() else any_process)
        self._check_settings(path, state["settings"])
        load_state(self.accelerator, path / "state", self.objects())
        if mine.exists():
            random = read_tree(path / "state" / f"random_{self.accelerator.process_index}.safetensors")
            set_random_state(random, self.accelerator.device)
        else:
            set_seed(args.seed + self.step, device_specific=True)  # there are more processes than before
        self.accelerator.step = 0  # batches of the current step, whose number may have changed
        for trained in self.models.values():
            trained.configure()  # settings may differ from those of the checkpoint
        if self.average is not None:
            self.average.decay = args.ema_decay
        self.loader.load_state_dict(state["loader"])
        self.num_skipped = state["num_skipped"] if mine.exists() else 0
