"""Several processes that share a call give what one gives."""

import pytest
import torch
import torch.distributed as dist

from tests.conftest import TINY, assert_close, make_vae, run_on_two_processes
from vitok_hf import AutoencoderViTok
from vitok_hf.models.layers import ViTokTower


def models() -> dict[str, AutoencoderViTok]:
    torch.manual_seed(0)
    codes = {"sequences": {"num_latent_tokens": 3}, "nested": {"channel_counts": [2, 4]}}
    made = {name: AutoencoderViTok(**TINY | fields).eval() for name, fields in codes.items()}
    return made | {name: make_vae(name) for name in ("v1", "v2", "video", "causal")}


def pixels(vae: AutoencoderViTok, *size: int) -> torch.Tensor:
    frames = () if vae.is_image_model else (vae.config.sample_frames + 4,)
    return torch.rand(size[0], 3, *frames, *size[1:], generator=torch.Generator().manual_seed(1)) * 2 - 1


def calls(vae: AutoencoderViTok) -> list[torch.Tensor]:
    """A batch, a list of several sizes, slices, tiles, and a stream."""
    x, found = pixels(vae, 3, 16, 24), []

    def call(x, **options):
        vae(x)  # an odd number of calls
        code = vae.encode(x, **options).latent_dist.mode()
        sizes = {"sizes": [tuple(item.shape[-2:]) for item in x]} if isinstance(x, list) or vae._has_codes else {}
        sample = vae.decode(code, **sizes).sample
        for part in (code, sample):
            found.extend(part if isinstance(part, list) else [part])

    call(x)
    call([x[0], x[1, ..., :9], x[2]])
    with torch.autocast("cpu", torch.bfloat16):  # whose results have another dtype
        call(x)
    if vae.config.channel_counts:
        call(x, num_channels=2)
        call(x, min_psnr=8.0)
    vae.enable_slicing()
    call(x)
    if not vae.config.num_latent_tokens:
        vae.enable_tiling(16, 4)
        call(pixels(vae, 2, 40, 48))
        vae.disable_slicing()
        call(pixels(vae, 2, 40, 48))
        if not vae.is_image_model:
            found += vae.encode_stream(iter(pixels(vae, 1, 40, 48).split(3, dim=2)))
    return found


@torch.no_grad()
def run_all(group: object = None, shared: bool = True) -> dict[str, tuple[list[torch.Tensor], int]]:
    """Of each model what `calls` finds, and for how many tokens the towers were called."""
    tokens, results = [], {}
    with pytest.MonkeyPatch.context() as patch:
        forward = ViTokTower.forward

        def count(self, sequences, *args):
            tokens.extend(sequence.shape[:2].numel() for sequence in sequences)
            return forward(self, sequences, *args)

        patch.setattr(ViTokTower, "forward", count)
        for name, vae in models().items():
            if shared:
                vae.enable_parallel(group)
            tokens.clear()
            results[name] = calls(vae), sum(tokens)
    return results


def share(folder) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1])]
    torch.save((run_all(), run_all(groups[rank])), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    run_on_two_processes(share, tmp_path)
    (first, alone), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (expected, tokens) in run_all(shared=False).items():
        work = [found[name][1] for found in (first, second)]
        for results, _ in (first[name], second[name], alone[name]):
            assert len(results) == len(expected)
            for ours, theirs in zip(results, expected):
                assert ours.dtype == theirs.dtype
                assert_close(ours, theirs, 1e-5 if ours.dtype == torch.float32 else 5e-2)
        assert alone[name][1] == tokens
        if name != "causal":  # whose streams are not shared
            assert sum(work) == tokens and min(work) > 0.3 * tokens


class TestErrors:
    def test_one_process(self):
        with pytest.raises(ValueError, match="There is one process alone: start several"):
            make_vae("v1").enable_parallel()

    def test_gradients_and_groups(self, tmp_path):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            vae = make_vae("v1")
            with pytest.raises(ValueError, match="`process_group` must be None or a process group"):
                vae.enable_parallel(2)
            vae.enable_parallel()
            with pytest.raises(ValueError, match=r"call under `torch.no_grad\(\)`"):
                vae(pixels(vae, 2, 16, 16))
            vae.disable_parallel()
            assert vae(pixels(vae, 2, 16, 16)).sample.requires_grad
        finally:
            dist.destroy_process_group()
