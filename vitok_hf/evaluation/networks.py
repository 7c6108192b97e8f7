"""Networks whose features metrics compare; their weights come from a local path, or a library downloads them."""

import hashlib
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..clips import to_colours, to_float
from ..disk import checksum
from .metrics import check_size


DINO = "facebook/dinov2-large"
DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError)  # of files
LPIPS_MIN_SIZES = {"alex": 31, "vgg": 16, "squeeze": 17}  # pixels a side that leave something on the coarsest scale


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, and what tells it from others.

    Args:
        name: Architecture and preprocessing.
        module: Maps uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W) to features (B, D), or to a pair of features
            and logits of classes (B, K). LPIPS maps two batches of pictures to distances (B,).
        sha256: Of the weights: `weights_sha256`, or of the TorchScript file.
    """

    name: str
    module: nn.Module
    sha256: str


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of parameters and buffers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def freeze(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def load_inception(path: str | Path | None = None) -> FeatureNetwork:
    """Inception-v3 of the FID paper: pooled features (B, 2048) and logits without bias (B, 1008).

    Args:
        path: Its file, "weights-inception-2015-12-05-6726825d.pth" of torch-fidelity; by default that package
            downloads it. Pictures are resized to 299 x 299 as TensorFlow 1 did, without antialiasing.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = None if path is None else str(path)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], path)
    return FeatureNetwork("inception-v3-compat, TF1 bilinear to 299", network, weights_sha256(network))


class DINOFeatures(nn.Module):
    """uint8 pictures -> the class token of a DINOv2, (B, D), at 224 x 224 (bicubic, antialiased)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(images.float() / 255.0, size=(224, 224), mode="bicubic", antialias=True)
        pixels = (pixels.clamp(0.0, 1.0) - self.mean) / self.std
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]


def load_dino(path: str | Path | None = None) -> FeatureNetwork:
    """DINOv2, whose Frechet distance is FDD (Stein et al., arXiv 2306.04675): class token, (B, 1024) for ViT-L/14.

    Args:
        path: Folder or Hub id of a DINOv2 for transformers, by default "facebook/dinov2-large".
    """
    from transformers import AutoModel

    network = AutoModel.from_pretrained(path or DINO)
    name = f"{type(network).__name__} {network.config.hidden_size}, class token, bicubic to 224"
    return FeatureNetwork(name, freeze(DINOFeatures(network)), weights_sha256(network))


class I3DFeatures(nn.Module):
    """uint8 clips -> logits (B, 400) of the TorchScript file of StyleGAN-V, which resizes to 224 x 224 itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.network(clips.float(), rescale=True, resize=True, return_features=True)


def load_i3d(path: str | Path | None = None) -> FeatureNetwork:
    """I3D trained on Kinetics-400, for FVD as StyleGAN-V computes it (arXiv 2112.14683).

    Args:
        path: Its TorchScript file, "i3d_torchscript.pt"; no library downloads it.
    """
    if path is None:
        raise FileNotFoundError(
            "no library downloads I3D: give the path of i3d_torchscript.pt (of the StyleGAN-V repository)"
        )
    network = torch.jit.load(str(path), map_location="cpu")
    return FeatureNetwork("I3D, Kinetics-400, StyleGAN-V", freeze(I3DFeatures(network)), checksum(path))


class LPIPSDistance(nn.Module):
    """Two batches of uint8 pictures -> their distances, (B,); `ValueError` for sides below `min_size` pixels."""

    def __init__(self, network: nn.Module, min_size: int = 1):
        super().__init__()
        self.network, self.min_size = network, min_size

    def forward(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        check_size("LPIPS", self.min_size, images)
        return self.network(*(to_float(to_colours(x)) for x in (images, references))).flatten()


def load_lpips(path: str | Path | None = None, trunk: str = "alex") -> FeatureNetwork:
    """LPIPS 0.1 of the package `lpips` (Zhang et al., arXiv 1801.03924).

    Args:
        path: torchvision's file of the trunk, as "alexnet-owt-7be5be79.pth"; by default torchvision downloads it.
        trunk: "alex", which the authors recommend for measuring, "vgg", for training, or "squeeze".
    """
    import lpips

    network = lpips.LPIPS(net=trunk, pnet_rand=path is not None, verbose=False)
    if path is not None:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # "slice1.0.weight" is the trunk's "features.0.weight"
        names = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
        if missing := sorted(set(names.values()) - set(weights)):
            raise ValueError(
                f'"{path}" has no {missing[0]}: it holds no weights of {trunk} as torchvision names them.'
            )
        network.net.load_state_dict({name: weights[there] for name, there in names.items()})
    return FeatureNetwork(
        f"LPIPS 0.1, {trunk}", freeze(LPIPSDistance(network, LPIPS_MIN_SIZES[trunk])), weights_sha256(network)
    )


LOADERS = {"inception": load_inception, "dino": load_dino, "i3d": load_i3d, "lpips": load_lpips}


def load_networks(
    names: Iterable[str], paths: dict[str, str | Path | None], device: torch.device | str = "cpu"
) -> tuple[dict[str, FeatureNetwork], dict[str, str]]:
    """The networks that can be had, and for each of the others the reason why not.

    Args:
        names: Of "inception", "dino", "i3d" and "lpips".
        paths: Name -> local path of its weights; where there is none, the library downloads them.
        device: Where they go.

    Raises:
        ValueError: If a name is unknown, or the file of a path does not fit or does not exist.
    """
    networks, unavailable = {}, {}
    for name in names:
        if name not in LOADERS:
            raise ValueError(f'There is no feature network "{name}": choose from {", ".join(LOADERS)}.')
        path = paths.get(name)
        if path is not None and name != "dino" and not Path(path).is_file():
            raise ValueError(f'"{path}" for the network "{name}" is no file: correct it, or leave it out.')
        try:
            networks[name] = LOADERS[name](path)
        except ImportError as error:
            unavailable[name] = f'{error}: pip install "vitok-hf[eval]"'
        except OSError as error:  # an HTTP error is an OSError
            unavailable[name] = f"no weights: {str(error).splitlines()[0]}"
        except DAMAGED as error:
            if path is None:
                raise
            text = f'"{path}" for the network "{name}" is damaged, or another file'
            raise ValueError(f"{text} ({type(error).__name__}): correct it, or leave it out.") from error
        else:
            networks[name].module.to(device)
    return networks, unavailable
