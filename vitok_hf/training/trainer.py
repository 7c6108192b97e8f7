"""The training loop: optimisers, checkpoints, logs. What is trained is up to a subclass of `Trainer`."""

import logging
import math
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..data.batches import Batch
from ..data.claims import note_inputs
from ..data.files import iterate_files
from ..data.loader import BatchLoader
from ..data.sources import parse_source
from ..disk import lock_folder, remove_folder, remove_leftovers, write_json
from ..loading.strict import read_json
from ..models.saving import plain_name
from ..precision import choose_mixed_precision
from .arguments import LoopArguments
from .checkpointing import atomic_folder, checkpoint_step, find_checkpoint, list_checkpoints, write_manifest
from .ema import WeightAverage, gather
from .run_state import load_state, naming_misfits, read_tree, save_state, set_random_state
from .tracking import Log, Window


logger = logging.getLogger(__name__)


def compile_blocks(model: ModelMixin) -> None:
    """Compiles the transformer blocks, which share their code: it is compiled anew for each kind of call.

    Towers, training and evaluation, batches of one, and LoRA are more kinds together than PyTorch allows by itself.
    """
    torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)
    model.compile_repeated_blocks(fullgraph=True, dynamic=True)


class TrainedModel:
    """A model with its optimiser and learning-rate schedule, prepared by accelerate.

    The learning rate is a function of the step alone: right for any number of processes, and after resumption. With
    `replicated`, every process keeps the whole model even if FSDP shards the others: FSDP supports neither parameters
    that are frozen for a while nor second derivatives.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        args: LoopArguments,
        learning_rate: float,
        warmup_steps: int,
        replicated: bool = False,
    ):
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=learning_rate,
            fused=True,
        )
        schedule = get_scheduler(args.lr_scheduler, optimizer, None, warmup_steps, args.max_train_steps)
        self.schedule = schedule.lr_lambdas[0]
        self.peak_learning_rate, self.max_grad_norm = learning_rate, args.max_grad_norm
        self.accelerator = accelerator
        self.replicated = replicated and accelerator.is_fsdp2
        if self.replicated:
            self.model, self.optimizer = DistributedDataParallel(model.to(accelerator.device)), optimizer
        else:
            if accelerator.is_fsdp2:  # for other engines, accelerate does it
                model.forward = accelerator.autocast()(model.forward)
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.configure(args)

    def configure(self, args: LoopArguments) -> None:
        """Sets those settings of the optimiser that do not depend on the step."""
        for group in self.optimizer.param_groups:
            group["betas"] = (args.adam_beta1, args.adam_beta2)
            group |= {"eps": args.adam_epsilon, "weight_decay": args.adam_weight_decay}

    @property
    def unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def learning_rate(self, step: int) -> float:
        return self.peak_learning_rate * self.schedule(step)

    @contextmanager
    def accumulate(self):
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
        norm = clip(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": gather(norm)}


class Trainer:
    """Trains on one or many processes, from the current step to `max_train_steps`.

    Every process draws its own batches. Checkpoints, `checkpoint-<step>/`, hold models for `from_pretrained` and the
    state of the run; they are written under a temporary name and renamed when complete, on a file system that all
    nodes share. One run at a time has `output_dir`. A subclass has

    - `models`, the trained models by name, and `average`, their `WeightAverage` or `None`,
    - `training_step(batches)`, which takes the batches of one optimiser step and returns tensors to log for each,
    - `evaluate()`, which returns metrics, and pictures, (H, W, 3) uint8, by name,
    - `save_models(folder)`, which writes what `from_pretrained` loads; all processes call these,
    - `finish()`, for after the last step, which writes the folder `result` in `output_dir`.
    """

    models: dict[str, TrainedModel]
    average: WeightAverage | None = None
    result: str
    loader: BatchLoader

    def __init__(self, args: LoopArguments):
        self.args, self.output_dir, self.step, self.num_skipped = args, Path(args.output_dir).absolute(), 0, 0
        self.accelerator = Accelerator(
            mixed_precision=choose_mixed_precision(args.mixed_precision),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(self.output_dir / args.logging_dir)),
        )
        self._check_engine()
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        self.lock = lock_folder(self.output_dir, take_over=True)
        if self.lock is not None:
            weakref.finalize(self, self.lock.release)
        if self.accelerator.is_main_process:
            for folder in (self.output_dir, self.output_dir / "samples"):
                remove_leftovers(folder)
        self.checkpoint = find_checkpoint(self.output_dir, args.resume_from_checkpoint)
        set_seed(args.seed)

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

    def start(self) -> None:
        """To be called when the models and the loader are there: seeds the processes and loads a checkpoint."""
        set_seed(self.args.seed, device_specific=True)  # the noise differs between processes
        if self.checkpoint is not None:
            with naming_misfits(self.checkpoint):
                self._resume(self.checkpoint)
        elif self.args.resume_from_checkpoint:  # a job that is queued again has the same command
            logger.warning('"%s" has no checkpoint to resume from: the run starts anew.', self.output_dir)
        elif found := list_checkpoints(self.output_dir):
            raise ValueError(
                f'"{self.output_dir}" has {found[-1].name} of another run: go on with it by '
                'resume_from_checkpoint="latest", or name another output_dir.'
            )
        if self.accelerator.is_main_process:
            self._note_inputs()

    def inputs(self) -> tuple[dict[str, object], list[str | Path]]:
        """Settings and local files that the weights depend on."""
        hidden = ("output_dir", "hub_token", "resume_from_checkpoint", "max_minutes")
        settings = {name: value for name, value in vars(self.args).items() if name not in hidden}
        settings["mixed_precision"] = self.accelerator.mixed_precision  # perhaps of accelerate's configuration
        settings["num_processes"] = self.accelerator.num_processes
        folders = [parse_source(source)[0] for source in self.args.train_data_dir]
        files = [file for folder in folders for file in iterate_files(folder)]
        shards = getattr(getattr(self.loader.dataset, "source", None), "urls", ())
        return settings, files + [shard for shard in shards if Path(shard).is_file()]

    def _note_inputs(self) -> None:
        changes = note_inputs(self.output_dir, *self.inputs(), self.checkpoint and self.checkpoint.parent)
        if changes:
            logger.warning(
                'Going on from "%s", but its run was last started with %s.', self.checkpoint, "; ".join(changes)
            )

    def train(self) -> None:
        """Trains to `max_train_steps`, or for `max_minutes`; ends with a checkpoint and, after all steps, `finish`."""
        if self.lock is None:
            return self._train()
        if not self.lock.is_held():  # a later trainer has it, or had it and is gone
            self.lock = lock_folder(self.output_dir)
        try:
            self._train()
        finally:
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
            for batch, values in zip(micro_batches, logs):
                window.add(values, len(batch.pixels), self.count_pixels(batch))
            bar.update()
            if self.step == first:  # in which workers started and kernels were compiled
                window.start_clock()
            finished = stop = self.step == args.max_train_steps
            if self.step % args.logging_steps == 0 or finished:
                stop = finished or self._out_of_time(began)
                values = self._check_finite(window.means(self.accelerator))
                shown = {name: f"{values[name]:.4g}" for name in ("loss", "items_per_second") if name in values}
                bar.set_postfix(shown)
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

    def _next_batch(self, batches) -> Batch:
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

    def count_pixels(self, batch: Batch) -> int:
        """Of all its pictures or clips."""
        return sum(item[0].numel() for item in batch.pixels)

    def averages(self) -> dict[str, object]:
        """Suffix of names and a context in which the model has these weights: its own and their average."""
        own = {"": nullcontext()}
        return own if self.average is None else own | {"_ema": self.average.applied()}

    def gather_weights(self, name: str, average: bool) -> dict[str, torch.Tensor]:
        """The state dict of a whole model, or of its average, on the main process; all processes must call it."""
        trained = self.models[name]
        state_dict = self.accelerator.get_state_dict(trained.model)
        state_dict = {plain_name(name): value for name, value in state_dict.items()}
        if average:
            parameters = trained.unwrapped.named_parameters()
            names = [plain_name(name) for name, parameter in parameters if parameter.requires_grad]
            shadows = [gather(shadow) for shadow in self.average.shadow_params]
            state_dict = state_dict | dict(zip(names, shadows, strict=True))
        return state_dict

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

    def objects(self) -> dict[str, object]:
        """What the state of the run holds beside models that accelerate prepared: by name, with a `state_dict`."""
        objects = {} if self.average is None else {"average": self.average}
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
        args = self.args
        self.step = checkpoint_step(path)
        if later := [other.name for other in list_checkpoints(self.output_dir) if checkpoint_step(other) > self.step]:
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
            trained.configure(args)  # settings may differ from those of the checkpoint
        if self.average is not None:
            self.average.decay = args.ema_decay
        self.loader.load_state_dict(state["loader"])
        self.num_skipped = state["num_skipped"] if mine.exists() else 0
