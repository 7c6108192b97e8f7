import torch

from tests.dit import make_pipeline
from vitok_hf.evaluation.generation import generate_samples


def test_samples_do_not_depend_on_the_batch():
    pipe = make_pipeline()
    options = {"num_inference_steps": 3, "seed": 5}
    whole = generate_samples(pipe, [0, 4, 4], **options)
    parts = generate_samples(pipe, [0, 4, 4], batch_size=2, **options)
    assert whole.dtype == torch.uint8 and whole.shape == (3, 3, 32, 32)
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert not torch.equal(whole[1], whole[2])  # another seed
    generator = torch.Generator().manual_seed(6)
    again = pipe([4], generator=generator, num_inference_steps=3, output_type="np").images[0]
    assert (torch.from_numpy(again * 255).round().int() - whole[1].permute(1, 2, 0).int()).abs().max() <= 1
