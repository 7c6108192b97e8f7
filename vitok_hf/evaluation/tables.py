"""A table of codecs on one data set: autoencoders, and the baselines that have as many numbers or bytes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from ..data.held_out import Codec, EvaluationData, Protocol
from ..data.sources import FolderFiles
from .autoencoders import load_autoencoder, spatial_ratio
from .codecs import ImageCodec, autoencoder_codec
from .evaluator import ReconstructionEvaluator
from .pca import PatchPCA
from .results import Result, check_comparable, markdown_table, save_results, write_csv
from .visuals import save_examples


@dataclass
class TableSettings:
    """The rows of a table; names are those of the arguments of `vitok evaluate`, which says what they are."""

    models: list[str]
    subfolder: str | None
    variant: str | None
    dtype: str
    latent_bits: int | None
    baselines: list[str]
    pca_data_dir: str | None
    pca_limit: int
    batch_size: int
    num_examples: int


def fit_pca(settings: TableSettings, patch_size: int, num_components: int, protocol: Protocol) -> PatchPCA:
    data = EvaluationData(FolderFiles(settings.pca_data_dir), protocol, settings.pca_limit)
    return PatchPCA(patch_size, num_components, data.batches(range(len(data)), settings.batch_size))


def rows(
    settings: TableSettings, data: EvaluationData, shapes: Mapping[tuple[int, ...], int], device: torch.device | str
) -> Iterator[tuple[str, Codec, dict[str, float]]]:
    """Name, codec and known costs: of the models, then of the baselines that have as many numbers or bytes."""
    codes, resolution = {}, data.protocol.resolution  # latents -> patch size
    for name in settings.models:
        title = name if settings.dtype == "float32" else f"{name}, {settings.dtype}"
        options = {"subfolder": settings.subfolder, "dtype": getattr(torch, settings.dtype)}
        vae = load_autoencoder(name, **options | ({"variant": settings.variant} if settings.variant else {}))
        for bits in (None, settings.latent_bits) if settings.latent_bits else (None,):
            codec, costs = autoencoder_codec(vae.to(device), shapes, bits)
            yield title if bits is None else f"{title}, {bits}-bit latents", codec, costs
        patch_size = codes.setdefault(int(costs["E"]), spatial_ratio(vae))
        if "pca" in settings.baselines and resolution % patch_size:
            raise ValueError(f"PCA needs a --resolution that is a multiple of {patch_size}, not {resolution}.")
    for num_latents, patch_size in codes.items():
        if "pca" in settings.baselines:
            components = num_latents * patch_size**2 // resolution**2
            if components < 1:
                raise ValueError(
                    f"{num_latents} numbers are less than one for each {patch_size} x {patch_size} pixels."
                )
            pca = fit_pca(settings, patch_size, components, data.protocol)
            costs = {"E": num_latents, "compression": 3 * patch_size**2 / components, "bytes": 2 * num_latents}
            yield f"PCA, {components} of {patch_size} x {patch_size} pixels", pca.reconstruct, costs
        for file_format in ("jpeg", "webp"):
            for bits in (16, 8):
                if file_format in settings.baselines:
                    codec = ImageCodec(file_format.upper(), num_latents * bits // 8)
                    yield f"{file_format.upper()}, {num_latents} x {bits} bits", codec, {}


def file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title)


def write_table(
    settings: TableSettings, evaluator: ReconstructionEvaluator, output_dir: Path, earlier: list[Result]
) -> str:
    """Measures every codec; writes results, pictures and the table, with the rows `earlier` too, and returns it.

    Raises:
        ValueError: If results `earlier` are of other pictures or another protocol.
    """
    is_main, folder = PartialState().is_main_process, output_dir / file_name(evaluator.data_name)
    results: list[Result] = []
    for name, codec, costs in rows(settings, evaluator.data, evaluator.shapes, evaluator.device):
        result, values = evaluator.evaluate(name, codec, costs)
        if isinstance(codec, ImageCodec):
            result.costs |= codec.costs()
        results.append(result)
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_results(folder / "results.json", results)
            examples = folder / file_name(name).strip("_")
            save_examples(examples, evaluator.data, codec, values["psnr"], settings.num_examples)
        check_comparable([result, *earlier])
    table = markdown_table(results + earlier)
    if is_main:
        (folder / "table.md").write_text(table)
        write_csv(folder / "table.csv", results + earlier)
    return table
