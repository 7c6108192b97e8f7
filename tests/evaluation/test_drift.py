import copy

import pytest
import torch
from diffusers import AutoencoderKL

from tests.conftest import TINY
from tests.dit import make_pipeline
from vitok_hf import AutoencoderViTok
from vitok_hf.evaluation.drift import Relay, drift_rows, pipeline_drift
from vitok_hf.evaluation.reconstruction import reconstruct


STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [2.0, 0.5, 1.0, 1.5]}
IMAGES = torch.randint(0, 256, (3, 3, 1, 13, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher() -> AutoencoderViTok:
    torch.manual_seed(0)
    return AutoencoderViTok(**TINY, **STATISTICS).eval()


@pytest.fixture
def student(teacher) -> AutoencoderViTok:
    """Whose latents are 3 spreads too large."""
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.encoder.proj_out.bias[:4] += 3.0 * torch.tensor(STATISTICS["latents_std"])
    return student


def test_error_of_latents_is_in_spreads_of_the_teacher(teacher, student):
    for encoder, error in ((teacher, 0.0), (copy.deepcopy(teacher), 0.0), (student, 3.0)):
        relay = Relay(encoder, teacher, teacher)
        for images in IMAGES.split(2):
            relay(images)
        costs = relay.costs()
        assert costs["latent_error"] == pytest.approx(error, abs=1e-5)
        assert costs["encode_seconds"] > 0.0 and costs["decode_seconds"] > 0.0


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("change", [{}, {"sample_frames": 3}])
def test_teachers_of_single_pictures(teacher, count, change):
    """Of diffusers, whose latents have no dimension T; of as many pictures as channels, too."""
    options = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "scaling_factor": 0.5}
    options |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    other, student = AutoencoderKL(**options).eval(), AutoencoderViTok(**TINY | change).eval()
    images = torch.randint(0, 256, (count, 3, change.get("sample_frames", 1), 16, 24), dtype=torch.uint8)
    relay = Relay(student, other, other)
    relay(images)
    x = images.float() / 127.5 - 1
    right = [other.encode(frames).latent_dist.mode() for frames in x.unbind(2)]
    error = (student.encode(x).latent_dist.mode() - torch.stack(right, dim=2)) * 0.5
    assert relay.costs()["latent_error"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)


def test_other_factors_are_refused(teacher):
    student = AutoencoderViTok(**TINY | {"patch_size": 4})
    with pytest.raises(ValueError, match=r"latents of shape \(3, 4, 2, 3\), not \(3, 4, 4, 6\): both models must"):
        Relay(student, student, teacher)(IMAGES)


@pytest.mark.parametrize("change", [{"latents_std": [1.0, 2.0]}, {"latents_std": [0.0] * 4}, {"scaling_factor": -2.0}])
def test_wrong_statistics_are_refused(teacher, change):
    other = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, **change)
    with pytest.raises(ValueError, match="AutoencoderKL has `latents_std` .* for 4 channels: they must be positive"):
        Relay(teacher, other, other)


def test_one_encodes_and_the_other_decodes(teacher, student):
    expected = reconstruct(
        teacher, IMAGES, lambda z: z + 3.0 * torch.tensor(STATISTICS["latents_std"]).view(-1, 1, 1, 1)
    )
    assert (Relay(student, teacher, teacher)(IMAGES).int() - expected.int()).abs().max() <= 1  # rounding
    assert torch.equal(Relay(teacher, student, teacher)(IMAGES), reconstruct(teacher, IMAGES))


def test_sequences_are_not_decoded_by_another(teacher):
    student = AutoencoderViTok(**TINY | {"num_latent_tokens": 3})
    with pytest.raises(ValueError, match="Another `decoder` takes whole codes on a grid"):
        Relay(student, teacher, teacher)(IMAGES)


def test_rows(teacher, student):
    rows = list(drift_rows("T", teacher, iter([("S", student)]), "cpu"))
    assert [row.name for row in rows] == ["T", "S", "T to S", "S to T"]
    assert [(row.codec.encoder is student, row.codec.decoder is student) for row in rows] == [
        (False, False),
        (True, True),
        (False, True),
        (True, False),
    ]


def test_pictures_of_a_pipeline():
    pipe = make_pipeline()
    vae = pipe.vae
    assert pipeline_drift(pipe, copy.deepcopy(vae), 3, num_inference_steps=2) == pytest.approx(58.92, abs=0.01)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.decoder.proj_out.bias += 0.1
    assert pipeline_drift(pipe, other, 3, num_inference_steps=2) == pytest.approx(26.0, abs=0.5)  # 0.05 of [0, 1]
    assert pipe.vae is vae
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline_drift(pipe, other, 3, num_inference_steps=-1)
    other.decode = None
    with pytest.raises(TypeError):
        pipeline_drift(pipe, other, 3, num_inference_steps=2)
    assert pipe.vae is vae


@pytest.mark.parametrize("settings", [{}, {"id2label": None}, {"kind": "video"}, {"num_classes": 0, "id2label": None}])
def test_any_pipeline(settings):
    """With more names than classes, without names, of videos, without classes."""
    pipe = make_pipeline(**settings)
    found = pipeline_drift(pipe, copy.deepcopy(pipe.vae), 8, num_inference_steps=2)
    assert found == pytest.approx(58.92, abs=0.01)


def test_students_that_no_pipeline_takes():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="must be a model with `temporal_compression_ratio`"):
        pipeline_drift(pipe, AutoencoderKL(block_out_channels=(4,), norm_num_groups=4))
    student = AutoencoderViTok(**TINY | {"patch_size": 4})
    with pytest.raises(ValueError, match="student have shape .* must have the same patch size"):
        pipeline_drift(pipe, student, 2, num_inference_steps=2)
