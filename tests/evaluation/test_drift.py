import copy

import pytest
import torch

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
