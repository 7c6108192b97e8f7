import copy
import math

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from vitok_hf import ViTokDiTModel
from vitok_hf.models.layers import ViTokAttnProcessor


TINY = {"sample_size": 4, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
TINY |= {"num_classes": 5}
MODELS = {
    "image": TINY,
    "video": TINY | {"sample_frames": 2, "qk_norm": True},
    "patches": TINY | {"patch_size": 2, "out_channels": 8},
}
CPU = torch.device("cpu")
TIMESTEP = torch.tensor([3.0, 500.0])
LABELS = torch.tensor([1, 5])
PARAMETERS = {"S": 32.8, "B": 130.2, "L": 458.0, "XL": 674.5}  # millions; the DiT paper has 33, 130, 458, 675


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return make_model(kind)


@pytest.fixture
def x(kind):
    return make_latents(kind)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def make_model(kind, **overrides):
    """With random weights everywhere, because untrained models are zero."""
    torch.manual_seed(0)
    model = ViTokDiTModel(**MODELS[kind] | overrides).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def make_latents(kind, height=4, width=6):
    frames = (3,) if kind == "video" else ()
    return torch.randn(2, 4, *frames, height, width, generator=torch.Generator().manual_seed(1))


def run(model, x, timestep=TIMESTEP, class_labels=LABELS):
    return model(x, timestep, class_labels).sample


def arguments(model):
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class TestArchitecture:
    @pytest.mark.parametrize("variant", PARAMETERS)
    def test_sizes_of_the_paper(self, variant):
        with torch.device("meta"):
            model = ViTokDiTModel.from_variant(variant)
        assert model.num_parameters() / 1e6 == pytest.approx(PARAMETERS[variant], abs=0.1)

    def test_variants_take_options(self):
        with torch.device("meta"):
            model = ViTokDiTModel.from_variant("S", num_layers=1, in_channels=4)
        assert (model.config.hidden_size, model.config.num_layers, model.config.in_channels) == (384, 1, 4)

    def test_is_zero_before_training(self, kind, x):
        model = ViTokDiTModel(**MODELS[kind])
        assert not run(model, x).any()
        tokens, temb = torch.randn(2, 6, 32), torch.randn(2, 32)
        rotary_emb = torch.ones(6, 1, 16), torch.zeros(6, 1, 16)
        for block in model.transformer_blocks:
            assert torch.equal(block(tokens, temb, rotary_emb, [(2, (6,))]), tokens)

    def test_zero_in_the_gates_is_left_in_one_step_of_training(self, kind, x):
        model = ViTokDiTModel(**MODELS[kind])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.enable_grad():
            for _ in range(4):
                optimizer.zero_grad()
                (run(model, x) - 1).square().mean().backward()
                optimizer.step()
        missing = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
        assert missing == []

    def test_block_by_hand(self):
        """The formulas of adaLN-Zero, without a layer of this package but attention."""
        block = make_model("image").transformer_blocks[0]
        x, temb, rotary_emb = torch.randn(2, 6, 32), torch.randn(2, 32), (torch.ones(6, 1, 16), torch.zeros(6, 1, 16))
        modulation = nn.functional.linear(temb, block.modulation.weight, block.modulation.bias)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(32, dim=-1)
        h = nn.functional.rms_norm(x, (32,), eps=1e-6) * (1 + scale1) + shift1
        expected = x + gate1 * block.attn(h, rotary_emb, [(2, (6,))])
        h = nn.functional.rms_norm(expected, (32,), eps=1e-6) * (1 + scale2) + shift2
        value, gate = block.ff.net[0].proj(h).chunk(2, dim=-1)
        expected = expected + gate2 * block.ff.net[2](value * nn.functional.silu(gate))
        assert_close(block(x, temb, rotary_emb, [(2, (6,))]), expected)

    def test_timesteps_are_embedded_as_in_dit(self):
        model, angles = make_model("image"), 7.5 * 10000 ** (-torch.arange(128) / 128)
        expected = model.timestep_embedder(torch.cat([angles.cos(), angles.sin()])[None])
        assert_close(model._embed_timestep(7.5, torch.zeros(1, 4, 2, 2)), expected)

    def test_no_norm_has_weights_but_of_queries_and_keys(self, model, kind):
        names = {name.split(".")[-2] for name, _ in model.named_parameters() if "norm" in name}
        assert names == ({"norm_q", "norm_k"} if kind == "video" else set())


class TestInputs:
    @pytest.mark.parametrize("size", [(2, 2), (4, 4), (6, 10), (16, 2)])
    def test_any_grid(self, model, kind, size):
        x = make_latents(kind, *size)
        assert run(model, x).shape == (2, model.out_channels, *x.shape[2:])

    def test_a_sample_does_not_depend_on_its_batch(self, model, x):
        expected = torch.cat([run(model, x[i : i + 1], TIMESTEP[i], LABELS[i : i + 1]) for i in range(2)])
        assert_close(run(model, x), expected)

    def test_image_models_see_each_frame_alone(self):
        model, video = make_model("image"), torch.randn(2, 4, 3, 4, 6)
        frames = [run(model, frame) for frame in video.unbind(2)]
        assert_close(run(model, video), torch.stack(frames, dim=2))

    def test_video_models_see_all_frames(self):
        model, video = make_model("video"), make_latents("video")
        other = video.clone()
        other[:, :, 0] += 1
        assert (run(model, other) - run(model, video))[:, :, -1].abs().max() > 1e-3

    def test_a_picture_is_a_video_of_one_frame(self):
        model, x = make_model("video"), make_latents("image")
        assert torch.equal(run(model, x), run(model, x.unsqueeze(2)).squeeze(2))

    def test_positions_matter(self, model, x):
        """Without positions, turning the latents would turn the output."""
        error = (run(model, x.flip(-1).flip(-2)) - run(model, x).flip(-1).flip(-2)).abs().max()
        assert error > 1e-3

    @pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([7, 7])])
    def test_timesteps(self, model, x, timestep):
        assert_close(run(model, x, timestep), run(model, x, torch.tensor([7.0, 7.0])), atol=0)

    def test_conditions_reach_the_output(self, model, x):
        output = run(model, x)
        assert (run(model, x, TIMESTEP + 1) - output).abs().min(dim=1).values.max() > 1e-3
        changed = (run(model, x, class_labels=torch.tensor([2, 5])) - output).flatten(1).abs().amax(dim=1)
        assert changed[0] > 1e-3 and changed[1] == 0

    def test_no_label_is_the_null_class(self, model, x):
        assert torch.equal(model(x, 1).sample, run(model, x, 1, torch.tensor([5, 5])))

    def test_unconditional_model(self, x, kind):
        model = make_model(kind, num_classes=0)
        assert torch.equal(model(x, 1).sample, run(model, x, 1, torch.zeros(2, dtype=torch.int64)))
        with pytest.raises(ValueError, match="0 for no class, but are"):
            run(model, x, 1, torch.tensor([0, 1]))

    def test_tuple(self, model, x):
        (sample,) = model(x, TIMESTEP, LABELS, return_dict=False)
        assert torch.equal(sample, run(model, x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_precision(self, model, x, dtype):
        expected = run(model, x)
        output = run(model.to(dtype), x.to(dtype))
        assert output.dtype == dtype
        assert (output.float() - expected).norm() < 0.05 * expected.norm()

    def test_autocast(self, model, x):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(model, x)
        assert output.dtype == torch.bfloat16 and (output - run(model, x)).norm() < 0.05 * output.norm()


class TestErrors:
    @pytest.mark.parametrize(
        "config, message",
        [
            ({"num_attention_heads": 3}, "32 must be divisible by `num_attention_heads` 3"),
            ({"num_attention_heads": 16, "sample_frames": 2}, "head size of 2"),
            ({"num_layers": 0}, "`num_layers` must be positive, but is 0"),
            ({"num_classes": -1}, "`num_classes` must be 0 .* but is -1"),
            ({"num_classes": None}, "`num_classes` must be 0 .* but is None"),
            ({"sample_size": 5, "patch_size": 2}, "`sample_size` 5 must be a multiple of `patch_size` 2"),
        ],
    )
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            ViTokDiTModel(**TINY | config)

    @pytest.mark.parametrize(
        "shape, message",
        [
            ((2, 3, 4, 4), r"in_channels=4 channels in dimension 1, but has shape \(2, 3, 4, 4\)"),
            ((4, 4, 4), r"must be \(B, c, h, w\) or \(B, c, t, h, w\), but has shape \(4, 4, 4\)"),
            ((2, 4, 4, 5), "multiples of patch_size=2, but are 4 x 5"),
            ((2, 4, 0, 4), "is empty"),
        ],
    )
    def test_latents(self, shape, message):
        with pytest.raises(ValueError, match=message):
            run(make_model("patches"), torch.zeros(shape))

    @pytest.mark.parametrize(
        "labels", [torch.tensor([0]), torch.tensor([[0], [1]]), torch.tensor([0.0, 1.0]), torch.tensor([True, False])]
    )
    def test_labels_of_another_kind(self, labels):
        with pytest.raises(ValueError, match=r"`class_labels` must be \(2,\).* int64, but is"):
            run(make_model("image"), make_latents("image"), class_labels=labels)

    @pytest.mark.parametrize("label", [-1, 6])
    def test_labels_out_of_range(self, label):
        with pytest.raises(ValueError, match=rf"from 0 to 4, or 5 for no class, but are \[0, {label}\]"):
            run(make_model("image"), make_latents("image"), class_labels=torch.tensor([0, label]))

    @pytest.mark.parametrize("timestep", [torch.zeros(3), torch.zeros(2, 1)])
    def test_timesteps(self, timestep):
        with pytest.raises(ValueError, match=r"`timestep` must be a number or \(2,\)"):
            run(make_model("image"), make_latents("image"), timestep)

    def test_variant(self):
        with pytest.raises(ValueError, match='Unknown variant "XXL": the sizes are S, B, L, XL'):
            ViTokDiTModel.from_variant("XXL")


class TestSaving:
    def test_round_trip(self, model, x, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = ViTokDiTModel.from_pretrained(tmp_path)
        assert arguments(loaded) == arguments(model)
        assert torch.equal(run(loaded, x), run(model, x))

    @pytest.mark.parametrize("problem", ["missing", "unexpected"])
    def test_loading_is_strict(self, problem, tmp_path):
        make_model("image").save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["other.weight"] = tensors.pop("proj_out.bias") if problem == "missing" else torch.zeros(1)
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"1 tensors are {problem}"):
            ViTokDiTModel.from_pretrained(tmp_path)


class TestDiffusersFeatures:
    def test_attention_backend(self, model, x, monkeypatch):
        expected, calls, backends = run(model, x), [], _AttentionBackendRegistry._backends
        original = backends[AttentionBackendName._NATIVE_MATH]
        monkeypatch.setitem(
            backends, AttentionBackendName._NATIVE_MATH, lambda *a, **k: calls.append(1) or original(*a, **k)
        )
        model.set_attention_backend("_native_math")
        assert_close(run(model, x), expected)
        assert len(calls) == 2
        assert {type(processor) for processor in model.attn_processors.values()} == {ViTokAttnProcessor}

    def test_fused_projections(self, model, x):
        expected, calls = run(model, x), []
        model.fuse_qkv_projections()
        for block in model.transformer_blocks:
            block.attn.to_qkv.register_forward_hook(lambda *_: calls.append(1))
        assert_close(run(model, x), expected)
        assert len(calls) == 2

    def test_lora(self, model, kind, x, tmp_path):
        expected = run(model, x)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        adapted = run(model, x)
        assert (adapted - expected).abs().max() > 1e-3
        assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * 4
        model.save_lora_adapter(tmp_path)
        model.disable_adapters()
        assert torch.equal(run(model, x), expected)
        other = make_model(kind)
        other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert_close(run(other, x), adapted, atol=1e-6)

    def test_gradient_checkpointing(self, model, x):
        def gradients():
            model.zero_grad()
            with torch.enable_grad():
                run(model.train(), x).square().mean().backward()
            return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        calls, expected = [], gradients()
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        model.enable_gradient_checkpointing()
        torch.testing.assert_close(gradients(), expected)
        assert len(calls) == 4  # the blocks run once more in the backward pass

    def test_compile(self, model, kind):
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for repeats, height, width in ((5, 6, 8), (3, 14, 10), (2, 12, 18)):  # none equals another dimension
            latents, timestep, labels = (
                torch.cat([part] * repeats) for part in (make_latents(kind, height, width), TIMESTEP, LABELS)
            )
            assert_close(run(compiled, latents, timestep, labels), run(model, latents, timestep, labels))
        assert counter.frame_count == 1

    def test_compile_repeated_blocks(self, model, x):
        expected, counter = run(model, x), CompileCounter()
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert_close(run(model, x), expected)
        assert counter.frame_count == 1

    def test_layerwise_casting(self, model, x):
        expected = run(model, x)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        error = (run(model, x) - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.1
        for name, parameter in model.named_parameters():
            in_float8 = ".attn.to_" in name or ".ff." in name
            assert parameter.dtype == (torch.float8_e4m3fn if in_float8 else torch.float32), name

    @pytest.mark.parametrize("level", ["block_level", "leaf_level"])
    def test_group_offload(self, model, x, level, monkeypatch):
        expected, loaded, onload = run(model, x), set(), ModuleGroup.onload_

        def record(group):
            loaded.update(id(p) for module in group.modules for p in module.parameters())
            loaded.update(map(id, group.parameters))
            onload(group)

        monkeypatch.setattr(ModuleGroup, "onload_", record)
        model.enable_group_offload(CPU, offload_type=level, num_blocks_per_group=1)
        assert torch.equal(run(model, x), expected)
        assert loaded == set(map(id, model.parameters()))

    def test_copies(self, model, x):
        other, expected = copy.deepcopy(model), run(model, x)
        model.proj_out.weight.zero_()
        assert torch.equal(run(other, x), expected)


class TestCaches:
    """What of the model runs in three equal steps; with equal inputs, what a cache remembers is exact."""

    def count(self, model, x):
        expected, calls = run(model, x), []
        for name, module in model.named_modules():
            if name.endswith((".attn.to_out.0", ".ff")):
                module.register_forward_hook(lambda *_, name=name: calls.append(name.split(".", 2)[2]))
        yield
        for _ in range(3):
            with model.cache_context("guided"):
                output = run(model, x)
        assert_close(output, expected)
        yield calls.count("attn.to_out.0"), calls.count("ff")
        calls.clear()
        assert_close(run(model, x), expected)
        yield calls.count("attn.to_out.0"), calls.count("ff")

    @pytest.mark.parametrize(
        "config, counts",
        [
            (FirstBlockCacheConfig(threshold=0.1), (4, 4)),  # the first block always, the second once
            (FirstBlockCacheConfig(threshold=-1.0), (6, 6)),
            (MagCacheConfig(mag_ratios=[1.0] * 3, num_inference_steps=3, retention_ratio=0.4), (2, 2)),
            (TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=0), (4, 6)),
            (
                PyramidAttentionBroadcastConfig(
                    spatial_attention_block_skip_range=3, current_timestep_callback=lambda: 500
                ),
                (2, 6),
            ),
        ],
    )
    def test_blocks_are_skipped(self, model, x, config, counts):
        counting = self.count(model, x)
        next(counting)
        model.enable_cache(config)
        assert next(counting) == counts
        model.disable_cache()
        assert next(counting) == (2, 2)

    def test_faster_cache(self, model, kind, x):
        """The half of the batch without classes is guessed in the second of three steps, its labels cut off too."""
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 1001),
            spatial_attention_timestep_skip_range=(-1, 1001),
            tensor_format="BCFHW" if kind == "video" else "BCHW",
            current_timestep_callback=lambda: 500,
        )
        batches = []
        model.patch_embed.register_forward_hook(lambda _, args, output: batches.append(len(output)))
        model.enable_cache(config)
        arguments = {"hidden_states": x[[0, 0]], "timestep": TIMESTEP[[0, 0]], "class_labels": LABELS.flip(0)}
        outputs = [model(**arguments).sample for _ in range(3)]
        assert batches == [2, 1, 2]
        for output in outputs:
            assert_close(output[1], outputs[0][1], atol=1e-4)  # the half with classes is computed
        assert_close(outputs[2], outputs[0])
        assert math.isfinite(outputs[1].sum())
