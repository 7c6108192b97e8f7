"""What the models refuse, and what must go on working: precisions, placements, warnings."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.conftest import assert_close, make_input, make_vae
from tests.dit import TRANSFORMER, make_transformer
from vitok_hf import checks


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(checks.logger, "warning", messages.append)
    checks.warn_once.cache_clear()
    yield messages
    checks.warn_once.cache_clear()


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_of_inputs(self, dtype):
        vae, dit = make_vae("v1"), make_transformer(**TRANSFORMER)
        x = make_input(vae)
        latents = vae.encode(x).latent_dist.mode()
        wanted = f"must be torch.float32, as the weights are, but is {dtype}: pass `{{0}}.to\\(torch.float32\\)`"
        for name, call, good in (
            ("x", vae.encode, x),
            ("z", vae.decode, latents),
            ("sample", vae, x),
            ("hidden_states", lambda z: dit(z, 1), latents),
        ):
            with pytest.raises(ValueError, match=f"`{name}` {wanted.format(name)}"):
                call(good.to(dtype))
        assert vae.to(dtype)(x.to(dtype)).sample.dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_of_inputs_in_autocast(self, dtype, compiled):
        vae, dit = make_vae("v1"), make_transformer(**TRANSFORMER)
        x = make_input(vae)
        calls = vae, lambda z: dit(z, torch.tensor(1))
        if compiled:
            calls = [torch.compile(call, backend="eager", fullgraph=True) for call in calls]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(calls[0](x.to(dtype)).sample.float(), vae(x).sample.float(), atol=0.1)
            assert calls[1](torch.ones(2, 4, 4, 4, dtype=dtype)).sample.isfinite().all()
            with pytest.raises((ValueError, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported)):
                calls[0](x.double())

    def test_of_inputs_that_a_hook_casts(self):
        vae = make_vae("v1")
        x = make_input(vae)
        vae.encoder.proj_in.register_forward_pre_hook(lambda _, args: args[0].float())
        assert_close(vae.encode(x.half()).latent_dist.mode(), vae.encode(x.half().float()).latent_dist.mode())

    def test_a_list_that_is_compiled(self):
        vae = make_vae("v1")
        items = [make_input(vae, 1, *size)[0] for size in ((16, 24), (20, 9))]
        compiled = torch.compile(lambda items: vae(items).sample, backend="eager", fullgraph=True)
        for ours, theirs in zip(compiled(items), vae(items).sample):
            assert_close(ours, theirs)

    def test_bytes(self):
        with pytest.raises(ValueError, match="`x` must be a tensor of floats, .*uint8: for pixels .* `x / 127.5 - 1`"):
            make_vae("v1").encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))

    def test_the_wrong_device(self):
        vae, x = make_vae("v1"), torch.zeros(1, 3, 16, 16, device="meta")
        with pytest.raises(
            ValueError, match='`x` must be on cpu, as the weights are, but is on meta: pass `x.to."cpu"'
        ):
            vae.encode(x)
        assert vae.to("meta").encode(x).latent_dist.mode().shape == (1, 4, 2, 2)


class TestRemedies:
    @pytest.mark.parametrize(
        "value, remedy",
        [
            (lambda vae, x: vae.encode(x), r"pass its `.latent_dist.mode\(\)` as `z`"),
            (lambda vae, x: vae.encode(x).latent_dist, r"pass its `.mode\(\)` as `z`"),
            (lambda vae, x: vae.encode(list(x)).latent_dist, r"pass its `.mode\(\)` as `z`"),
            (lambda vae, x: np.zeros((1, 4, 2, 2)), r"pass `torch.from_numpy\(z\)`"),
        ],
    )
    def test_of_what_is_no_latents(self, value, remedy):
        vae = make_vae("v1")
        with pytest.raises(ValueError, match=f"`z` must be a tensor of floats, .*{remedy}"):
            vae.decode(value(vae, make_input(vae)))

    def test_a_tuple_is_a_list(self):
        vae = make_vae("v1")
        items = [make_input(vae, 1)[0], make_input(vae, 1, 32, 32)[0]]
        for ours, theirs in zip(vae(tuple(items)).sample, vae(items).sample, strict=True):
            assert torch.equal(ours, theirs)


class TestPixelsUpTo255:
    def test_are_warned_of_once(self, warnings):
        vae = make_vae("v1")
        x = (make_input(vae) + 1) * 127.5
        for pixels in (x / 255, x / 127.5 - 1, x - 1, x * 0, x[:, :0].new_full((1, 3, 8, 8), 2.0)):
            vae.encode(pixels)
        assert not warnings
        vae.encode([x[0], x[1]])
        vae(x)
        assert len(warnings) == 1 and "pass `x / 127.5 - 1`" in warnings[0]


class TestIntegers:
    @pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2)])
    def test_of_other_libraries(self, value):
        vae = make_vae("video")
        vae.enable_sliding_window(value)
        vae.enable_tiling(8 * value, value)
        assert vae.window_radius == 2 and vae.tiling.sizes == (1, 2, 2)
        assert checks.check_number("x", value if not isinstance(value, torch.Tensor) else 2, 0, 2) == 2.0


class TestTransforms:
    """A look at values has no place in these."""

    def test_vmap(self):
        vae, z = make_vae("v1"), torch.randn(2, 4, 2, 3)
        with torch.no_grad():
            mapped = torch.func.vmap(lambda item: vae.decode(item[None]).sample[0])(z)
            assert_close(mapped, vae.decode(z).sample)

    def test_fake_tensors(self):
        vae = make_vae("v1")
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert vae(mode.from_tensor(make_input(vae))).sample.shape == (2, 3, 16, 24)

    def test_numbers_without_dimensions(self):
        dit = make_transformer(**TRANSFORMER)
        latents = torch.zeros(1, 4, 4, 4)
        expected = dit(latents, 5).sample
        for timestep in (torch.tensor(5.0), np.array(5), np.float64(5)):
            assert_close(dit(latents, timestep).sample, expected)
