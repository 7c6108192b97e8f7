"""Training of a small classifier, whose features serve to compare sets of pictures."""

from pathlib import Path

import torch
from torch.nn import functional as F

from ..clips import fold_frames
from ..data.batches import Batch, DrawnBatches
from ..data.classes import ClassSampler, LabelledFiles
from ..data.held_out import EvaluationData, Protocol
from ..data.sources import DecodedPictures
from ..data.views import SquareView
from ..evaluation.features import Classifier
from ..pipelines.model_card import ModelCard
from .arguments import ClassifierArguments
from .trainer import Trainer


LABEL_SMOOTHING = 0.1


class ClassifierTrainer(Trainer[ClassifierArguments, Classifier]):
    """A `Classifier` of pictures by the folder that they are in, each class as often.

    Checkpoints hold `classifier/` and, with EMA, `classifier_ema/`, with a file for `Classifier.load`; the result,
    averaged if there is an average, is in `output_dir`/classifier.
    """

    result = "classifier"
    file = "classifier.safetensors"

    def __init__(self, args: ClassifierArguments):
        super().__init__(args)
        files = LabelledFiles(args.train_data_dir, max_files_per_class=args.max_files_per_class)
        self.classes = files.classes
        sampler = ClassSampler(files.labels, files.classes, args.random_flip, class_balanced=True)
        self.add_model("classifier", Classifier(files.classes))
        view = SquareView(args.resolution, args.train_batch_size, min_share=0.5)
        self.start(DrawnBatches(DecodedPictures(files), sampler, view, args.seed))

    def training_step(self, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
        logs = []
        for batch in batches:
            assert batch.labels is not None
            pictures, labels = self._to_device(batch.pixels[0], batch.labels)
            with self.trained.accumulate():
                logits = self.trained.model(pictures).float()
                loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
                self.accelerator.backward(loss)
                logs.append({"loss": loss.detach()} | self.trained.update(self.step))
        return logs

    def _to_device(self, run: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, H, W), and their labels."""
        return fold_frames(run).to(self.accelerator.device), labels.to(self.accelerator.device)

    def load_held_out(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Central squares, (N, 3, 1, H, W), and their classes."""
        files = LabelledFiles([path], self.classes)
        data = EvaluationData(files, Protocol(self.args.resolution), self.args.num_validation_images)
        squares = torch.stack([data[index] for index in range(len(data))])
        return squares, torch.from_numpy(files.labels[data.indices])

    def measure(self, held_out: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, float], None]:
        """The share of pictures whose class is found."""
        right = []
        for part in zip(*(tensor.split(self.args.train_batch_size) for tensor in held_out)):
            pictures, labels = self._to_device(*part)
            right.append(self.trained.unwrapped(pictures).argmax(dim=1) == labels)
        return {"accuracy": torch.cat(right).float().mean().item()}, None

    def write_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        with torch.device("meta"):
            twin = Classifier(self.classes)
        twin.load_state_dict(state_dict, assign=True)
        folder.mkdir(parents=True, exist_ok=True)
        twin.save(folder / self.file)

    def model_card(self, name: str) -> ModelCard:
        lines = (
            "from vitok_hf.evaluation.features import Classifier",
            "",
            f'classifier = Classifier.load("{self.file}")',
        )
        description = f"A classifier of pictures (ResNet-18): {', '.join(self.classes)}"
        return ModelCard(name, "classifier", description, "\n".join(lines), "image-classification")
