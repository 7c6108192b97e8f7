r"""Judges samples of a class-conditional pipeline beside training and held-out pictures.

    python examples/evaluate_generation.py --classifier output-classifier/classifier/classifier.safetensors \
        --train_data_dir data/train/emoji/{face,hand,person,animal,food,transport,place,flag} \
        --test_data_dir data/test/emoji/{face,hand,person,animal,food,transport,place,flag} --output_dir evaluation

The class of a picture is the name of its folder; all sets have as many pictures of a class as the held-out one. Prints

- gFID, gIS, gFDD, precision and recall against the held-out pictures, or why there is none;
- with a classifier that train_classifier.py trained on the same folders: how often it agrees with the class, and
  Frechet distances of its features, which small sets of an uncommon domain need;
- distances to the nearest training picture, which tell of memorised ones.

Pictures may also come from .npz files, as the evaluation suite of ADM reads them (`arr_0`, (N, H, W, 3) uint8, and ids
of classes, `arr_1`): --samples in place of drawing them, --reference in place of --test_data_dir. Both need no model
and no training pictures; gFID and so on are then printed alone:

    python examples/evaluate_generation.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz

Saves the samples, those that are closest to training pictures beside these, and results.json with the protocol. An
interrupted run goes on with the samples that it has; `accelerate launch` shares the work among processes.
"""

import argparse
import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from studies.samples import Labelled, NearestNeighbours, resize_all, save_neighbours, save_samples, thumbnails

from vitok_hf import ViTokDiTPipeline
from vitok_hf.clips import sha256_each
from vitok_hf.commands import add_dtype, make_parser, run_command
from vitok_hf.data.claims import claim_folder
from vitok_hf.evaluation.distributions import DistributionMetrics, frechet_distance
from vitok_hf.evaluation.features import Classifier
from vitok_hf.evaluation.networks import load_networks
from vitok_hf.evaluation.processes import gather_rows, share_of
from vitok_hf.evaluation.reconstruction import reconstruct
from vitok_hf.evaluation.results import Result, save_results
from vitok_hf.models.saving import weights_checksum
from vitok_hf.precision import choose_dtype


NETWORKS = ("inception", "dino")


def say(text: str) -> None:
    PartialState().print(text, flush=True)


def parse_args() -> argparse.Namespace:
    parser = make_parser("evaluate_generation.py", __doc__)
    parser.add_argument("--model", default="vitok-dit-emoji", help="what `from_pretrained` takes")
    parser.add_argument("--samples", type=Path, help=".npz file of the samples, of `vitok generate` or others")
    parser.add_argument("--reference", type=Path, help=".npz file of held-out pictures")
    parser.add_argument("--train_data_dir", nargs="+", help="folders, with the classes of the pipeline")
    parser.add_argument("--test_data_dir", nargs="+")
    parser.add_argument("--max_train_files", type=int, default=2000, help="of a class, as for cache_latents.py")
    parser.add_argument("--max_test_files", type=int, default=250, help="of a class")
    parser.add_argument("--classifier", type=Path, help="output of train_classifier.py")
    parser.add_argument("--classifier_size", type=int, default=64, help="side of the pictures that it was trained on")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--inception_weights", help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity")
    parser.add_argument("--dino", help="folder or Hub id of a DINOv2; default: facebook/dinov2-large")
    parser.add_argument("--guidance_scale", type=float, default=2.5, help="1 is none")
    parser.add_argument("--guidance_rescale", type=float, default=1.0, help="0 is none")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    add_dtype(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype)
    if args.reference is not None and args.test_data_dir is not None:
        parser.error("give either --test_data_dir or --reference")
    if not (args.samples and args.reference) and not (args.train_data_dir and (args.test_data_dir or args.reference)):
        parser.error("give --train_data_dir and --test_data_dir, or --samples and --reference")
    return args


def check_sets(pipe: ViTokDiTPipeline, known: Labelled, held_out: Labelled, args: argparse.Namespace) -> None:
    """Raises `ValueError` for what would come up only after the samples are drawn."""
    for label, name in pipe.config.id2label.items():
        num_known, num_held_out = (int((pictures.labels == label).sum()) for pictures in (known, held_out))
        if not 0 < num_held_out <= num_known:
            raise ValueError(
                f'Class "{name}" has {num_known} training and {num_held_out} held-out pictures, but needs some, '
                "and as many for training as are held out: add pictures, or lower --max_test_files."
            )
    if args.classifier is not None:
        names = Classifier.load(args.classifier).class_names
        if unknown := set(pipe.config.id2label.values()) - set(names):
            raise ValueError(f"{args.classifier} has no class {sorted(unknown)}: train it on folders of these names.")


def generate(pipe: ViTokDiTPipeline, counts: np.ndarray, args: argparse.Namespace) -> Path:
    """The folder with `counts[label]` samples of each class; those of an interrupted run count."""
    options = {name: getattr(args, name) for name in ("guidance_scale", "guidance_rescale", "num_inference_steps")}
    settings = options | {"seed": args.seed, "dtype": args.dtype, "counts": counts.tolist()}
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    settings |= {"scheduler": {"name": type(pipe.scheduler).__name__} | scheduler, "id2label": pipe.config.id2label}
    settings |= {
        f"{name}_sha256": weights_checksum(pipe.components[name], pipe.components[name].config)
        for name in ("transformer", "vae")
    }
    folder = args.output_dir / "samples"
    claim_folder(folder, settings)
    class_ids = np.repeat(np.arange(len(counts)), counts).tolist()
    save_samples(pipe, class_ids, folder, args.batch_size, args.seed, **options)
    return folder


def print_distances(args: argparse.Namespace, samples: Labelled, held_out: Labelled) -> None:
    """gFID and so on; they are saved."""
    drawn = f"{args.model}, guidance {args.guidance_scale}, rescale {args.guidance_rescale}, "
    drawn += f"{args.num_inference_steps} steps"
    folders = [args.reference] if args.reference else args.test_data_dir
    paths = {"inception": args.inception_weights, "dino": args.dino}
    with PartialState().main_process_first():
        networks, unavailable = load_networks(args.networks, paths, PartialState().device)
    metrics, checksums = DistributionMetrics(networks, "g", precision_recall=True), []
    for images in held_out.batches(args.batch_size):
        metrics.update(images, real=True)
        checksums.append(sha256_each(images.cpu()))
    for images in samples.batches(args.batch_size):
        metrics.update(images, real=False)
    values, missing = metrics.compute()
    digests = {name: {"name": network.name, "sha256": network.sha256} for name, network in networks.items()}
    result = Result(
        name=args.samples.name if args.samples else drawn,
        data=", ".join(Path(folder).name for folder in folders),
        num_items=len(samples),
        data_sha256=hashlib.sha256(gather_rows(torch.cat(checksums)).numpy()).hexdigest(),
        metrics=values,
        unavailable=unavailable | missing,
        protocol=replace(held_out.data.protocol, networks=digests),
    )
    for name, value in result.metrics.items():
        say(f"{name}: {value:.3f}")
    for name, reason in result.unavailable.items():
        say(f"No {name}: {reason}.")
    if PartialState().is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        save_results(args.output_dir / "results.json", [result])


@torch.no_grad()
def print_classification(
    args: argparse.Namespace, sets: dict[str, Labelled], held_out: Labelled, classes: list[str]
) -> None:
    device = PartialState().device
    classifier = Classifier.load(args.classifier).to(device)
    to_classifier = np.array([classifier.class_names.index(name) for name in classes])

    def features(pictures: Labelled) -> torch.Tensor:
        batches = (resize_all(images, args.classifier_size) for images in pictures.batches(args.batch_size))
        return gather_rows(torch.cat([classifier.features(batch.to(device)) for batch in batches]))

    references = features(held_out)
    say("\n| set | pictures | as their class | classes | Frechet distance to held-out |\n|---|---|---|---|---|")
    for name, pictures in sets.items():
        found = features(pictures)
        right = classifier.network.fc(found.to(device)).argmax(dim=1).cpu().numpy() == to_classifier[pictures.labels]
        each = ", ".join(f"{text} {right[pictures.labels == label].mean():.0%}" for label, text in enumerate(classes))
        distance = f"{frechet_distance(found, references):.3f}" if len(found) > 1 else ""
        say(f"| {name} | {len(pictures)} | {right.mean():.1%} | {each} | {distance} |")


def print_neighbours(args: argparse.Namespace, sets: dict[str, Labelled], known: Labelled) -> None:
    say("\n| grey levels to the nearest training picture | 1 % | 10 % | median |\n|---|---|---|---|")
    searches = {}
    for name, pictures in sets.items():
        small = torch.cat([thumbnails(images) for images in pictures.batches(args.batch_size)])
        searches[name] = NearestNeighbours(gather_rows(small).to(PartialState().device))
    begin = share_of(len(known)).start
    for images in known.batches(args.batch_size):
        for search in searches.values():
            search.update(thumbnails(images), range(begin, begin + len(images)))
        begin += len(images)
    for name, pictures in sets.items():
        distances, indices = searches[name].compute()
        say(f"| {name} | {' | '.join(f'{distances.quantile(part):.1f}' for part in (0.01, 0.1, 0.5))} |")
        if PartialState().is_main_process:
            file = args.output_dir / f"neighbours_{name.split()[0]}.png"
            save_neighbours(file, pictures, known, distances.numpy(), indices.tolist())


def compare_files(args: argparse.Namespace) -> None:
    """Two files, without a model."""
    held_out = Labelled.open_file(args.reference)
    print_distances(args, Labelled.open_file(args.samples, side=held_out.data.protocol.resolution), held_out)


def main():
    args = parse_args()
    accelerator = Accelerator()
    if not args.train_data_dir:
        compare_files(args)
        return
    with accelerator.main_process_first():  # which downloads for all
        pipe = ViTokDiTPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    num_classes = pipe.transformer.config.num_classes
    if pipe.is_video or sorted(pipe.config.id2label) != list(range(num_classes)):
        raise ValueError(f"{args.model} must make pictures and have a name for each of its {num_classes} classes.")
    classes = [pipe.config.id2label[index] for index in range(num_classes)]
    side = pipe.transformer.config.sample_size * pipe.vae.spatial_compression_ratio
    kind = side, pipe.vae.config.in_channels
    known = Labelled.open(args.train_data_dir, classes, args.max_train_files, *kind)
    if args.reference:
        held_out = Labelled.open_file(args.reference, num_classes, side)
    else:
        held_out = Labelled.open(args.test_data_dir, classes, args.max_test_files, *kind)
    check_sets(pipe, known, held_out, args)
    counts = np.bincount(held_out.labels, minlength=num_classes)
    if args.samples:
        samples = Labelled.open_file(args.samples, num_classes, side)
    else:
        samples = Labelled.open([generate(pipe, counts, args)], classes, None, *kind)
    print_distances(args, samples, held_out)
    if args.classifier is not None:
        sets = {"samples": samples, "training pictures": known.choose(counts, args.seed)}
        sets["reconstructions of held-out ones"] = replace(held_out, change=partial(reconstruct, pipe.vae))
        print_classification(args, sets | {"held-out pictures": held_out}, held_out, classes)
    print_neighbours(args, {"samples": samples, "held-out pictures": held_out}, known)
    say(f"\nSaved results.json, samples, and pictures beside their neighbours, in {args.output_dir}.")


if __name__ == "__main__":
    run_command(main)
