from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import next_batches, read_log, split_batch
from vitok_hf.data.views import SquareView
from vitok_hf.evaluation.features import Classifier
from vitok_hf.training.arguments import ClassifierArguments
from vitok_hf.training.classifier_trainer import ClassifierTrainer


def write_colours(folder, count):
    """Noise that is red or blue."""
    rng = np.random.default_rng(count)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir(parents=True)
        for index in range(count + channel):
            picture = rng.integers(0, 100, (40, 32, 3), dtype=np.uint8)
            picture[..., channel] += 60
            Image.fromarray(picture).save(folder / name / f"{index}.png")


@pytest.fixture
def arguments(tmp_path):
    write_colours(tmp_path / "train", 3)
    write_colours(tmp_path / "test", 4)
    defaults = {
        "train_data_dir": [str(tmp_path / "train")],
        "validation_data_dir": [str(tmp_path / "test")],
        "output_dir": str(tmp_path / "run"),
        "resolution": 32,
        "train_batch_size": 8,
        "max_train_steps": 8,
        "checkpointing_steps": 4,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "mixed_precision": "no",
        "report_to": "none",
    }
    return lambda **overrides: ClassifierArguments(**defaults | overrides)


def run(args):
    trainer = ClassifierTrainer(args)
    trainer.train()
    return trainer


def test_learns(arguments, monkeypatch):
    """And its result, by the code of its card, knows the classes as it does."""
    trainer = run(arguments(max_train_steps=80, learning_rate=5e-4))  # enough for the means of batch normalisation
    assert (
        trainer.metrics
        == {"test_accuracy": 1.0}
        == {"test_accuracy": read_log(trainer.output_dir, "test_accuracy")[80]}
    )
    monkeypatch.chdir(trainer.output_dir / "classifier")
    card = (trainer.output_dir / "classifier" / "README.md").read_text()
    assert "- classifier\n" in card and "blue, red" in card and "| test_accuracy | 1 |" in card and "arXiv" not in card
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    loaded, pictures = scope["classifier"], trainer.held_out["test"][0].squeeze(2)
    assert isinstance(loaded, Classifier) and loaded.class_names == ["blue", "red"]
    torch.testing.assert_close(loaded(pictures), trainer.trained.unwrapped.eval()(pictures))


def test_continues_with_the_same_losses(arguments, tmp_path):
    arguments = partial(arguments, use_ema=True, lr_scheduler="constant")
    run(arguments(max_train_steps=4))
    first, whole = run(arguments(resume_from_checkpoint="latest")), run(arguments(output_dir=str(tmp_path / "whole")))
    for key in ("loss", "grad_norm"):
        assert read_log(first.output_dir, key) == pytest.approx(read_log(whole.output_dir, key), rel=1e-5)
    names = ("checkpoint-8/classifier", "checkpoint-8/classifier_ema")
    own, average = (Classifier.load(first.output_dir / name / "classifier.safetensors") for name in names)
    assert all(map(torch.equal, own.parameters(), first.trained.unwrapped.parameters()))
    assert all(map(torch.equal, average.parameters(), first.average.shadow_params))


def test_data(arguments):
    """Random squares, each class as often, mirrored if asked to, of a limited number of pictures."""
    trainer = ClassifierTrainer(arguments(max_files_per_class=2, random_flip=True, num_validation_images=3, seed=5))
    dataset = trainer.loader.dataset
    assert dataset.view == SquareView(32, 8, min_share=0.5) and dataset.seed == 5
    assert [len(members) for members in dataset.sampler.members] == [2, 2] and dataset.sampler.flips.all()
    pictures, labels = trainer.held_out["test"]
    assert pictures.shape == (3, 3, 1, 32, 32) and labels.tolist() == [0, 0, 1]
    assert not ClassifierTrainer(
        arguments(output_dir=trainer.args.output_dir + "2")
    ).loader.dataset.sampler.flips.any()


def test_labels_are_smoothed(arguments):
    trainer = ClassifierTrainer(arguments(gradient_accumulation_steps=2))
    (batch,) = next_batches(trainer)
    labels, pictures = batch.labels, batch.pixels[0].squeeze(2)
    logs = trainer.training_step(split_batch(batch, [4, 4]))
    fresh = ClassifierTrainer(arguments(output_dir=trainer.args.output_dir + "2")).trained.unwrapped
    with torch.no_grad():
        losses = [-fresh(x).log_softmax(dim=1) for x in pictures.split(4)]
    for log, loss, right in zip(logs, losses, labels.split(4)):
        expected = 0.9 * loss.gather(1, right[:, None]).mean() + 0.1 * loss.mean()
        assert log["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert [("grad_norm" in log) for log in logs] == [False, True]
