"""What works with diffusers' own transformers works with `ViTokDiTModel`."""

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
from peft import LoraConfig, inject_adapter_in_model
from torch._dynamo.testing import CompileCounter

from tests.conftest import assert_close
from tests.models import test_transformer_vitok_dit as base
from tests.models.test_transformer_vitok_dit import LABELS, TIMESTEP, make_latents, make_model, run
from vitok_hf import ViTokDiTModel
from vitok_hf.models.layers import ViTokAttnProcessor


CPU = torch.device("cpu")
kind, model, x, no_grad = base.kind, base.model, base.x, base.no_grad


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

    @pytest.mark.parametrize("loaded", [False, True])
    def test_fused_projections_after_merging_a_lora(self, model, kind, x, loaded, tmp_path):
        model.fuse_qkv_projections()
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        if loaded:
            other = make_model(kind)
            other.add_adapter(config)
            other.save_lora_adapter(tmp_path)
            model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        else:
            model.add_adapter(config)
        adapted = run(model, x)
        model.fuse_lora()
        model.unload_lora()
        assert_close(run(model, x), adapted)
        model.fuse_qkv_projections()
        assert model.transformer_blocks[0].attn.fused_projections
        assert_close(run(model, x), adapted)

    def test_fused_projections_stay_apart_where_peft_puts_a_lora(self, model, x):
        expected = run(model, x)
        model.fuse_qkv_projections()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), model)
        assert (run(model, x) - expected).abs().max() > 1e-3

    def test_fused_projections_are_fused_once(self, model, x):
        model.fuse_qkv_projections()
        expected = run(model, x)
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        model.fuse_qkv_projections()
        assert (run(model, x) - expected).abs().max() < 0.3 * expected.abs().max()

    def test_fused_projections_are_trained_apart(self, model, x, tmp_path):
        model.eval().fuse_qkv_projections()
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        with torch.enable_grad():
            run(model, x).square().mean().backward()
        assert model.transformer_blocks[0].attn.to_q.weight.grad.any()
        optimizer.step()
        model.eval().fuse_qkv_projections()
        model.save_pretrained(tmp_path)
        assert_close(run(ViTokDiTModel.from_pretrained(tmp_path), x), run(model, x))

    @pytest.mark.parametrize("compiled", [False, True])
    def test_fused_projections_get_gradients_in_evaluation(self, model, x, compiled):
        """Those of a model that was never fused, and what comes after a step is not of an old copy."""
        models = copy.deepcopy(model.eval()), model
        models[1].fuse_qkv_projections()
        for each in models:
            call = torch.compile(each, backend="eager", fullgraph=True) if compiled else each
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            with torch.enable_grad():
                run(call, x).square().mean().backward()
            optimizer.step()
        for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        assert models[1].transformer_blocks[0].attn.to_q.weight.grad.any()
        assert_close(run(models[1], x), run(models[0], x))

    def test_fused_projections_stay_where_they_get_no_gradients(self, model, x):
        """Of inputs there are some, as in guidance."""
        model.eval().requires_grad_(False)
        gradients = []
        for _ in range(2):
            with torch.enable_grad():
                pixels = x.clone().requires_grad_()
                gradients.append(torch.autograd.grad(run(model, pixels).square().mean(), pixels)[0])
            model.fuse_qkv_projections()
        assert_close(*gradients)
        assert model.transformer_blocks[0].attn.fused_projections and gradients[0].any()

    def test_compiled_blocks_are_saved_under_their_names(self, model, x, tmp_path):
        expected = run(model, x)
        model.transformer_blocks[1] = torch.compile(model.transformer_blocks[1], backend="eager")
        model.save_pretrained(tmp_path)
        assert_close(run(ViTokDiTModel.from_pretrained(tmp_path), x), expected)

    def test_lora(self, model, kind, x, tmp_path):
        expected = run(model, x)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        adapted = run(model, x)
        assert (adapted - expected).abs().max() > 1e-3
        assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * 4
        model.save_lora_adapter(tmp_path)
        model.disable_adapters()
        torch.testing.assert_close(run(model, x), expected)
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

    @pytest.mark.parametrize("kind", ["image", "video"])
    def test_compile(self, model, kind):
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for repeats, height, width in ((5, 6, 8), (3, 14, 10)):  # none equals another dimension
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
        torch.testing.assert_close(run(model, x), expected)
        assert loaded == set(map(id, model.parameters()))

    def test_copies(self, model, x):
        other, expected = copy.deepcopy(model), run(model, x)
        model.proj_out.weight.zero_()
        torch.testing.assert_close(run(other, x), expected)


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
