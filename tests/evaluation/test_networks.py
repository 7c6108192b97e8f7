"""Loaders of feature networks, with small random weights in the real files' form."""

import hashlib
from urllib.error import URLError

import lpips
import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import Dinov2Config, Dinov2Model

from vitok_hf.evaluation.networks import load_dino, load_lpips, load_networks, weights_sha256


class FakeI3D(nn.Module):
    """Called as StyleGAN-V's I3D."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 1)

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        if rescale and resize and return_features:
            x = x / 127.5 - 1.0
        return self.conv(x).flatten(2).mean(dim=2)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", fail)


def test_what_cannot_be_had_is_named(no_network):
    networks, unavailable = load_networks(["inception", "dino", "i3d", "lpips"], {})
    assert networks == {} and set(unavailable) == {"inception", "dino", "i3d", "lpips"}
    assert unavailable["inception"] == "no weights: <urlopen error no network>"
    assert "i3d_torchscript.pt" in unavailable["i3d"] and "huggingface.co" in unavailable["dino"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    assert 'pip install "vitok-hf[eval]"' in load_networks(["lpips"], {})[1]["lpips"]


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match='no feature network "vgg": choose from inception, dino'):
        load_networks(["vgg"], {})
    with pytest.raises(ValueError, match='i3d" is no file'):
        load_networks(["i3d"], {"i3d": tmp_path / "x.pt"})
    (tmp_path / "x.txt").write_text("hello")
    torch.save([1], tmp_path / "list.pth")
    for name, file in (("inception", "x.txt"), ("inception", "list.pth"), ("i3d", "x.txt"), ("lpips", "x.txt")):
        with pytest.raises(ValueError, match=f'{file}" for the network "{name}" is damaged, or another file'):
            load_networks([name], {name: tmp_path / file})
    torch.save({"classifier.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no weights of squeeze"):
        load_lpips(tmp_path / "x.pth", "squeeze")


def test_sha256_tells_weights_and_names_apart():
    modules = [nn.Linear(2, 3) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    first = weights_sha256(modules[0])
    assert weights_sha256(modules[1]) == first and len(first) == 64
    modules[1].bias.data[0] += 1e-7
    assert weights_sha256(modules[1]) != first
    renamed = nn.ModuleDict({"x": modules[0]})
    assert weights_sha256(renamed) != first


@torch.no_grad()
def test_dino(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    network = load_dino(tmp_path)
    grey = torch.full((1, 3, 40, 60), 128, dtype=torch.uint8)
    colour = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    expected = model(pixel_values=colour.view(1, 3, 1, 1).expand(1, 3, 224, 224)).last_hidden_state[:, 0]
    torch.testing.assert_close(network.module(grey), expected, rtol=0, atol=1e-4)
    assert network.sha256 == weights_sha256(model) and "Dinov2Model 32" in network.name


@torch.no_grad()
def test_i3d(tmp_path):
    torch.manual_seed(0)
    model = FakeI3D()
    torch.jit.script(model).save(tmp_path / "i3d.pt")
    networks, unavailable = load_networks(["i3d"], {"i3d": tmp_path / "i3d.pt"})
    clips = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    expected = model.conv(clips.float() / 127.5 - 1.0).flatten(2).mean(dim=2)
    torch.testing.assert_close(networks["i3d"].module(clips), expected)
    assert networks["i3d"].sha256 == hashlib.sha256((tmp_path / "i3d.pt").read_bytes()).hexdigest() and not unavailable


@torch.no_grad()
def test_lpips(tmp_path):
    torch.manual_seed(0)
    expected = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    trunk = expected.net.state_dict()
    torch.save({f"features.{name.split('.', 1)[1]}": x for name, x in trunk.items()}, tmp_path / "squeezenet.pth")
    images = torch.randint(0, 256, (2, 2, 3, 48, 48), dtype=torch.uint8)
    distances = load_lpips(tmp_path / "squeezenet.pth", "squeeze").module(*images)
    assert distances.shape == (2,) and distances.min() > 0
    torch.testing.assert_close(distances, expected(*(images.float() / 127.5 - 1.0)).flatten())


@torch.no_grad()
def test_inception(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # the constructor reads a file: a random network needs none
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.init, "trunc_normal_", nn.init.normal_)
        random = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(random.state_dict(), tmp_path / "inception.pth")
    networks, _ = load_networks(["inception"], {"inception": tmp_path / "inception.pth"})
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    features, logits = networks["inception"].module(images)
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    torch.testing.assert_close(features, random(images)[0])
    torch.testing.assert_close(logits, features @ random.fc.weight.T)
    assert networks["inception"].sha256 == weights_sha256(random)
