"""Latents on disk: means and standard deviations of the posteriors of pictures and their mirror images.

`index.json` names the autoencoder, the classes and the shards with their checksums and those of the files that they
hold, and has one itself. A shard is a safetensors file with `mean` and `std`, (N, 2, c, [t,] h, w), of the picture and
its mirror image, and `labels`, (N,); of few bits, also `mean_grid` and `std_grid` (see `quantization`); in its header
is what lies beside the files, a caption in `picture.txt` or an object in `picture.json`. It is written under a
temporary name, and listed when it is complete, so that an interrupted run goes on after the last one, if files and
settings are the same (see `claims`). What could not be read is tried again.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..checks import check_int
from ..clips import add_row, to_float
from ..disk import atomic_file, checksum, inside, is_sealed, locked, remove_leftovers, seal, write_json
from ..latents import NO_STATISTICS
from ..loading.strict import read_json, read_object, read_text
from ..models import AutoencoderViTok
from ..models.saving import weights_checksum
from .claims import claim_folder, claimed_contents
from .classes import LabelledFiles
from .items import Clip
from .media import evenly_spaced
from .quantization import coarse_channels, dequantize, quantize
from .views import SquareView, to_pixels


logger = logging.getLogger(__name__)

FORMAT = 3  # to be raised when the index is another, or the same files and settings give other latents
INDEX = "index.json"


def fingerprint(vae: AutoencoderViTok) -> str:
    """Checksum of the config and the encoder's weights in half precision: another one gives other latents.

    Statistics, and what the codes may be cut to, do not count: they do not change what `encode` gives.
    """
    if vae.encoder is None:
        raise ValueError("The autoencoder has no encoder: load it whole.")
    neutral = {*NO_STATISTICS, "channel_counts", "token_counts"}
    neutral |= {"num_latent_tokens"} if vae.config.num_latent_tokens is None else set()
    config = {name: value for name, value in vae.config.items() if name not in neutral}
    return weights_checksum(vae.encoder, config)


def read_index(folder: Path) -> dict:
    """Raises `ValueError` if it is not as it was written, or of another version."""
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise ValueError(
            f'"{folder}" is a cache of another version, of format {found}, not {FORMAT}: write it anew, to another '
            "folder."
        )
    if not is_sealed(index):
        raise ValueError(
            f'"{folder / INDEX}" has changed since it was written: restore it, or delete it and run `vitok '
            "cache-latents` again, which then writes all shards anew."
        )
    return index


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The object in the file of this name that ends in .json, or {"caption": text} of one in .txt, or nothing."""
    data, caption = (Path(path).with_suffix(suffix) for suffix in (".json", ".txt"))
    if data.is_file():
        return read_object(data)
    return {"caption": read_text(caption).strip()} if caption.is_file() else {}


def check_shard(folder: Path, shard: dict) -> None:
    """Raises `ValueError` if a shard is not as it was written."""
    path = inside(folder, shard["file"])
    if not path.is_file() or checksum(path) != shard["sha256"]:
        state = "has changed since it was written" if path.is_file() else "is missing"
        raise ValueError(f'"{path}" {state}: delete it and run `vitok cache-latents` again, which restores it.')


def read_squares(
    files: LabelledFiles, view: SquareView, indices: Sequence[int]
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """What `view` shows of these files, by index, and why others cannot be read."""
    squares, skipped = {}, {}
    for index in indices:
        try:
            squares[index] = view.load(files[index], np.random.default_rng((0, index)))
        except ValueError as error:
            skipped[index] = str(error)
    return squares, skipped


@torch.no_grad()
def encode_shard(
    vae: AutoencoderViTok,
    files: LabelledFiles,
    view: SquareView,
    indices: Sequence[int],
    dtype: torch.dtype,
    num_workers: int,
) -> tuple[dict[str, torch.Tensor] | None, dict[int, str]]:
    """The tensors of a shard, or `None` if nothing can be read; and of what cannot be read, index -> reason."""
    moments: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
    read: list[int] = []
    skipped: dict[int, str] = {}
    dataset: Any = indices  # what has a length and an index will do
    read_batch = partial(read_squares, files, view)
    for squares, reasons in DataLoader(dataset, view.batch_size, num_workers=num_workers, collate_fn=read_batch):
        skipped |= reasons
        if not squares:
            continue
        pixels = to_float(to_pixels([*squares.values()]).to(vae.device))
        both = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)  # (2 B, C, T, H, W)
        both = both.squeeze(2) if both.shape[2] == 1 else both  # latents of pictures have no t in the files
        posterior = vae.encode(both, return_dict=False)[0]
        for name, batches in moments.items():
            batches.append(getattr(posterior, name).unflatten(0, (-1, 2)).to("cpu", dtype))  # (B, 2, c, [t,] h, w)
            for index, moment in zip(squares, batches[-1]):
                if not moment.isfinite().all():
                    raise ValueError(
                        f"The latents of {files[index].name} are not finite in {dtype}: leave it out, or take another "
                        "`dtype`, or `bits`."
                    )
        read += squares
    if not read:
        return None, skipped
    tensors = {name: torch.cat(batches) for name, batches in moments.items()}
    return tensors | {"labels": torch.from_numpy(files.labels[read])}, skipped


def round_to_bits(tensors: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a shard with its moments in so many bits; warns of channels for which these are too few."""
    rounded = {"labels": tensors["labels"]}
    for name in ("mean", "std"):
        rounded[name], rounded[f"{name}_grid"] = quantize(tensors[name], bits)
    if channels := coarse_channels(rounded["mean_grid"], tensors["std"]):
        logger.warning(
            "Rounding to %d bits moves the latents of channels %s by more than the standard deviation of their "
            "posteriors: take more bits.",
            *(bits, channels),
        )
    return rounded


def write_latents(
    vae: AutoencoderViTok,
    name: str,
    files: LabelledFiles,
    folder: str | Path,
    resolution: int,
    *,
    fps: float | None = None,
    batch_size: int = 16,
    shard_size: int = 4096,
    dtype: torch.dtype = torch.float16,
    bits: int | None = None,
    num_workers: int = 0,
) -> dict:
    """Writes the latents of all files, or those that an interrupted run left; returns the index.

    Args:
        vae: The autoencoder, in float32.
        name: Its name, for the index.
        files: Pictures; or videos for a video model, of each one clip, from a random second that depends on its number
            alone: with few long videos, train without a cache, where every draw takes another clip.
        folder: Folder of the cache.
        resolution: Side of the central squares in pixels.
        fps: Frames a second of clips; `None`: every frame.
        batch_size: Files that are encoded at once, both flips.
        shard_size: Files of a shard.
        dtype: Type in which the latents are stored.
        bits: 8 or 4: stored as whole numbers of so many bits, with a least value and a step for each channel of a
            shard; `dtype` does not count then.
        num_workers: Processes that read files.

    Raises:
        ValueError: If a number is out of its range, the folder has a cache of other files or settings, or a finished
            shard has changed, or another process writes to it.
    """
    clip = Clip(vae.config.sample_frames, fps, channels=vae.config.in_channels)
    folder, view = Path(folder), SquareView(resolution, batch_size, clip)
    if bits not in (None, 8, 4):
        raise ValueError(f"`bits` must be 8, 4 or None, but is {bits!r}.")
    for argument, count in {"batch_size": batch_size, "shard_size": shard_size}.items():
        check_int(argument, count)
    check_int("num_workers", num_workers, 0)
    if check_int("resolution", resolution) % vae.config.patch_size:
        raise ValueError(f"`resolution` {resolution} must be a multiple of the patch size, {vae.config.patch_size}.")
    with locked(folder):
        remove_leftovers(folder)
        settings = {"format": FORMAT, "vae_sha256": fingerprint(vae), "classes": files.classes}
        settings |= {"resolution": resolution, "num_frames": view.clip.num_frames, "fps": fps}
        stored = {"dtype": str(dtype).removeprefix("torch.")} if bits is None else {"bits": bits}
        settings |= stored | {"shard_size": shard_size}
        index: dict[str, Any] = {"vae": name} | settings | {"num_shards": -(-len(files) // shard_size), "shards": {}}
        path, paths = folder / INDEX, list(files.files)
        if path.is_file():
            index = read_index(folder)
        unread = {number for shard in index["shards"].values() for number in shard["skipped"]}
        claim_folder(folder, settings, paths, [file for number, file in enumerate(paths) if number in unread])
        contents = claimed_contents(folder)
        for number in tqdm(range(index["num_shards"]), desc="shards"):
            part = range(number * shard_size, min(len(files), (number + 1) * shard_size))
            beside = {i: read_metadata(files.files[i]) for i in part}
            lines = [f"{files.labels[i]} {contents[i]}\n" for i in part]
            lines += [json.dumps({i: x}, sort_keys=True) for i, x in beside.items() if x]
            digest = hashlib.sha256("".join(lines).encode()).hexdigest()
            shard = index["shards"].get(str(number))
            if shard is not None and shard["files_sha256"] == digest and _is_kept(folder, shard):
                if not read_squares(files, view, shard["skipped"])[0]:  # what could not be read, still cannot
                    continue
            tensors, skipped = encode_shard(
                vae, files, view, part, dtype if bits is None else torch.float32, num_workers
            )
            if bits is not None and tensors is not None:
                tensors = round_to_bits(tensors, bits)
            for reason in skipped.values():
                logger.warning("Skipped what cannot be read: %s", reason)
            items = [beside[i] for i in part if i not in skipped]
            written = _write_shard(folder / f"latents-{number:05d}.safetensors", tensors, items)
            index["shards"][str(number)] = written | {"skipped": [*skipped], "files_sha256": digest}
            index = seal(index)
            write_json(path, index)
    return index


def _write_shard(file: Path, tensors: dict[str, torch.Tensor] | None, items: list[dict]) -> dict:
    if tensors is None:
        return {"file": None, "num_items": 0, "sha256": None}
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, {"items": json.dumps(items)} if any(items) else None)
        digest = checksum(temporary)
    return {"file": file.name, "num_items": len(tensors["labels"]), "sha256": digest}


def _is_kept(folder: Path, shard: dict) -> bool:
    """Whether a shard is there, or has nothing to hold; raises `ValueError` if it has changed."""
    if shard["file"] is None or not (folder / shard["file"]).exists():
        return shard["file"] is None
    check_shard(folder, shard)
    return True


class LatentCache:
    """What `write_latents` wrote, read from memory-mapped files.

    Raises:
        ValueError: If the cache is not complete or of another version, or a shard has changed.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f'"{folder}" has no index.json: write it with `vitok cache-latents`.')
        self.index = read_index(self.folder)
        shards, expected = self.index["shards"], self.index["num_shards"]
        if len(shards) < expected:
            raise ValueError(
                f'"{folder}" has {len(shards)} of {expected} shards: run `vitok cache-latents` again, which goes on.'
            )
        self.shards = [x for x in map(shards.get, map(str, range(expected))) if x["file"] is not None]
        if not self.shards:
            raise ValueError(f'"{folder}" holds no latents: none of the files could be read.')
        for shard in self.shards if verify else ():
            check_shard(self.folder, shard)
        self.ends = np.cumsum([shard["num_items"] for shard in self.shards])
        self.handles: dict[int, Any] = {}
        self.items: dict[int, list[dict]] = {}  # of the shards that were asked for
        self.labels = np.concatenate([self._read_labels(number) for number in range(len(self.shards))])

    def _read_labels(self, number: int) -> np.ndarray:
        """Checks besides that the shard has what the index says."""
        try:
            file, count = self._open(number), self.shards[number]["num_items"]
            labels = file.get_tensor("labels").numpy()
            shapes = {tuple(file.get_slice(name).get_shape()) for name in ("mean", "std")}
            for name in ("mean", "std") if self.bits else ():
                file.get_slice(f"{name}_grid")
        except SafetensorError:
            shapes, labels = set(), np.zeros(0)
        fits = labels.shape == (count,) and set(labels.tolist()) <= set(range(len(self.classes)))
        if not fits or len(shapes) != 1 or shapes.pop()[:2] != (count, 1 if self.bits == 4 else 2):
            raise ValueError(
                f'"{self.folder / self.shards[number]["file"]}" does not hold {count} latents of {len(self.classes)} '
                "classes, as the index says: delete both and run `vitok cache-latents` again."
            )
        return labels

    def __getstate__(self) -> dict:
        return self.__dict__ | {"handles": {}}  # workers open the files themselves

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def bits(self) -> int | None:
        return self.index.get("bits")

    @property
    def classes(self) -> list[str]:
        return self.index["classes"]

    def _open(self, number: int):
        if number not in self.handles:
            self.handles[number] = safe_open(inside(self.folder, self.shards[number]["file"]), framework="pt")
        return self.handles[number]

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and row."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - int(self.ends[number] - self.shards[number]["num_items"])

    def metadata(self, index: int) -> dict[str, Any]:
        """What lay beside the file: {"caption": ...} or any object, or {}."""
        number, row = self._place(index)
        if number not in self.items:
            header = self._open(number).metadata() or {}
            self.items[number] = json.loads(header.get("items", "[]"))
        return self.items[number][row] if self.items[number] else {}

    def __getitem__(self, index: int) -> torch.Tensor:
        """(2, 2, c, t, h, w) float32: of the picture and its mirror image, mean and standard deviation.

        Of 1-D codes, (2, 2, c, l).
        """
        number, row = self._place(index)
        shard = self._open(number)
        moments = torch.cat([self._read_moment(shard, name, row) for name in ("mean", "std")])
        moments = moments.transpose(0, 1)  # (2, 2, c, [t,] h, w)
        return moments.unsqueeze(3) if moments.ndim == 5 else moments

    def _read_moment(self, shard: Any, name: str, row: int) -> torch.Tensor:
        """(1, 2, c, ...) float32."""
        moment = shard.get_slice(name)[row : row + 1]
        return moment.float() if self.bits is None else dequantize(moment, shard.get_tensor(f"{name}_grid"), self.bits)

    def iterate_moments(self, num_items: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Mean and standard deviation of evenly spaced items, (1, c, t, h, w) each, for measurements."""
        for index in evenly_spaced(len(self), num_items):
            mean, std = self[index][0].split(1)
            yield add_row(mean), add_row(std)
