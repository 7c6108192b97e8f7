"""Numbers of metrics.jsonl, and of the trackers."""

import json
import math
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import ASSETS, run_on_two_processes
from tests.training.conftest import read_log, run
from vitok_hf.disk import write_json
from vitok_hf.training.autoencoder_trainer import AutoencoderTrainer
from vitok_hf.training.tracking import Log, Window


class Clock:
    """Stands for the module `time` in the trainers: only what is slow takes time."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        for module in ("trainer", "tracking"):
            monkeypatch.setattr(f"vitok_hf.training.{module}.time", self)

    def monotonic(self) -> float:
        return self.now

    def taking(self, seconds: float, function):
        def slow(*args, **kwargs):
            self.now += seconds() if callable(seconds) else seconds
            return function(*args, **kwargs)

        return slow


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class TestThroughput:
    def test_is_that_of_training_alone(self, arguments, clock):
        """Batches of 8 in half a second are 16 items a second, whatever saving, evaluation and the first step take."""
        args = arguments(
            crop_sizes=["16"],
            max_train_steps=8,
            logging_steps=4,
            checkpointing_steps=3,
            validation_steps=2,
            validation_data_dir=[str(ASSETS)],
            validation_resolution=16,
            num_validation_images=1,
        )
        trainer = AutoencoderTrainer(args)
        step = clock.taking(lambda: 60.0 if trainer.step == 0 else 0.5, trainer.training_step)
        trainer.training_step, trainer.save = step, clock.taking(1000.0, trainer.save)
        trainer.evaluate = clock.taking(300.0, trainer.evaluate)
        trainer.train()
        assert read_log(args.output_dir, "items_per_second") == {4: pytest.approx(16.0), 8: pytest.approx(16.0)}
        megapixels = 16 * 16**2 / 1e6
        assert read_log(args.output_dir, "megapixels_per_second")[8] == pytest.approx(megapixels)

    def test_a_line_of_the_first_step_alone_has_none(self, arguments):
        args = arguments(max_train_steps=2)
        run(args)
        assert sorted(read_log(args.output_dir)) == [1, 2]
        assert sorted(read_log(args.output_dir, "items_per_second")) == [2]

    def test_waits_for_what_was_queued(self, clock, monkeypatch):
        """An accelerator that is still busy when the window ends: its time counts."""
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        busy = iter([0.0, 4.0])
        monkeypatch.setattr(torch.accelerator, "synchronize", clock.taking(lambda: next(busy), lambda: None))
        window = Window()
        window.add({}, 8, 80)
        assert window.means(Accelerator(cpu=True))["items_per_second"] == pytest.approx(2.0)

    def test_counts_what_each_process_had(self, tmp_path):
        run_on_two_processes(count_on_two, str(tmp_path / "rate"))
        for rank in (0, 1):
            assert float((tmp_path / f"rate{rank}").read_text()) == pytest.approx(5.0)


def count_on_two(path: str) -> None:
    """8 and 2 items in 2 seconds, as with a budget of tokens."""
    now = [0.0]
    time.monotonic, accelerator = lambda: now[0], Accelerator(cpu=True)
    window = Window()
    window.add({}, (8, 2)[accelerator.process_index], 1)
    now[0] = 2.0
    rate = window.means(accelerator)["items_per_second"]
    Path(f"{path}{accelerator.process_index}").write_text(str(rate))


def read_lines(args) -> list[dict]:
    return [json.loads(line) for line in (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()]


class TestResumedLog:
    DATA = {"validation_data_dir": [str(ASSETS)], "validation_resolution": 16, "num_validation_images": 1}

    def test_no_step_twice(self, arguments):
        """Broken off after step 5, in the middle of a line, and resumed from step 3."""
        args = arguments(validation_steps=2, **self.DATA)
        trainer, lines = AutoencoderTrainer(args), Path(args.output_dir) / "metrics.jsonl"
        training_step = trainer.training_step

        def broken(batches):
            if trainer.step == 5:
                raise RuntimeError("killed")
            return training_step(batches)

        trainer.training_step = broken
        with pytest.raises(RuntimeError):
            trainer.train()
        before = read_lines(args)
        assert [line["step"] for line in before] == [1, 2, 2, 3, 4, 4, 5]
        lines.write_text(lines.read_text() + '{"step": 6, "lo')
        run(arguments(validation_steps=2, resume_from_checkpoint="latest", **self.DATA))
        after = read_lines(args)
        assert [line["step"] for line in after] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
        assert after[:4] == before[:4] and "loss" in after[7] and "assets_psnr" in after[8]
        assert sorted(path.name for path in lines.parent.iterdir() if "metrics" in path.name) == ["metrics.jsonl"]

    def test_a_finished_run_that_is_resumed_is_evaluated_once(self, arguments):
        args = arguments(validation_steps=3, **self.DATA)
        run(args)
        before = read_lines(args)
        run(arguments(validation_steps=3, resume_from_checkpoint="latest", **self.DATA))
        assert [line.keys() for line in read_lines(args)] == [line.keys() for line in before]

    @pytest.mark.parametrize("killed", [True, False])
    def test_an_evaluation_that_was_killed_is_made_up_for(self, arguments, killed):
        """Of the step of the checkpoint: once, and before the training goes on."""
        args = arguments(validation_steps=3, max_train_steps=4, **self.DATA)
        trainer = AutoencoderTrainer(args)
        if killed:
            trainer.evaluate = Mock(side_effect=KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train()
            shutil.rmtree(trainer.output_dir / "checkpoint-4")
        whole = arguments(validation_steps=3, max_train_steps=4, output_dir=args.output_dir + "2", **self.DATA)
        run(whole)
        run(arguments(validation_steps=3, max_train_steps=4, resume_from_checkpoint="latest", **self.DATA))
        rates = ("items_per_second", "megapixels_per_second")
        lines = [[{k: v for k, v in line.items() if k not in rates} for line in read_lines(x)] for x in (args, whole)]
        assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [1, 2, 3, 3, 4, 4]

    def test_lines_of_other_kinds(self, tmp_path):
        """As after a damage: they are dropped, and stop nothing."""
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n3\n{"stdp": 2}\n{"step": "2"}\n')
        Log(Accelerator(cpu=True), tmp_path, "vitok", {}, step=2)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'

    def test_a_run_that_broke_off_before_its_first_checkpoint(self, arguments):
        args = arguments(max_train_steps=2)
        Path(args.output_dir).mkdir()
        (Path(args.output_dir) / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.0}\n')
        run(args)
        assert [line["step"] for line in read_lines(args)] == [1, 2] and read_log(args.output_dir)[1] != 9.0

    def test_tensorboard(self, arguments):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        args = arguments(report_to="tensorboard", checkpointing_steps=3, max_train_steps=5)
        trainer = AutoencoderTrainer(args)
        save, trainer.save = trainer.save, lambda: save() if trainer.step == 3 else None  # killed at its end
        trainer.train()
        run(arguments(report_to="tensorboard", max_train_steps=5, resume_from_checkpoint="latest"))
        events = EventAccumulator(str(Path(args.output_dir) / "logs" / "vitok")).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


class TestJson:
    def test_numbers_that_are_not_finite_are_null(self, tmp_path):
        log = Log(Accelerator(cpu=True), tmp_path, "vitok", {})
        log.write(3, {"grad_norm": math.inf, "ratio": math.nan, "loss": 0.5})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert json.loads(text, parse_constant=pytest.fail) == {
            "step": 3,
            "grad_norm": None,
            "ratio": None,
            "loss": 0.5,
        }

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_files_refuse_them(self, tmp_path, value):
        write_json(tmp_path / "x.json", {"psnr": 30.0})
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "x.json", {"psnr": value})
        assert json.loads((tmp_path / "x.json").read_text()) == {"psnr": 30.0}
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
