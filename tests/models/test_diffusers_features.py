"""What works with diffusers' own models works here: each feature, with four architectures."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, infer_auto_device_map
from diffusers import TorchAoConfig
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

from tests.conftest import assert_close, make_input, make_vae
from vitok_hf import AutoencoderViTok
from vitok_hf.models.layers import ViTokAttnProcessor


CPU = torch.device("cpu")
SIZES = [(6, 24, 56), (3, 32, 40), (2, 64, 48)]  # batch, height, width
LINEARS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]
INT8 = {"torch_dtype": torch.float32, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
MODES = {
    "encode": lambda vae, x: vae.encode(x).latent_dist.mode(),
    "decode": lambda vae, z: vae.decode(z).sample,
    "forward": lambda vae, x: vae(x).sample,
}


@pytest.fixture(params=["v1", "v2", "video", "causal"])
def architecture(request):
    return request.param


@pytest.fixture
def x(vae):
    return make_input(vae)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def run(vae, x, before=lambda: None):
    """Latents, what they are decoded to, and the reconstruction, each by a call of its own."""
    before()
    latents = MODES["encode"](vae, x)
    before()
    decoded = MODES["decode"](vae, latents)
    before()
    return latents, decoded, MODES["forward"](vae, x)


def inputs_of_sizes(vae, mode):
    inputs = [make_input(vae, *size) for size in SIZES]
    return [MODES["encode"](vae, x) for x in inputs] if mode == "decode" else inputs


def relative_error(actual, expected):
    return ((actual.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


def linear_calls(vae, x):
    """The linear layers that run, by their names within a block."""
    calls = []
    for name, module in vae.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name:
            module.register_forward_hook(lambda *_, name=name: calls.append(name.split(".", 3)[3]))
    vae(x)
    for module in vae.modules():
        module._forward_hooks.clear()
    return sorted(calls)


def add_lora(vae, seed=0, rank=2, name="default", targets=LINEARS):
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    vae.add_adapter(config, name)
    return vae


class TestAttention:
    def test_backends(self, vae, x, monkeypatch):
        expected, calls, backends = vae(x).sample, [], _AttentionBackendRegistry._backends
        for backend in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):

            def record(*args, name=backend.value, original=backends[backend], **kwargs):
                calls.append(name)
                return original(*args, **kwargs)

            monkeypatch.setitem(backends, backend, record)

        def assert_used(name):
            calls.clear()
            assert_close(vae(x).sample, expected)
            assert calls == [name] * (8 if vae.config.causal else 4)  # frame by frame

        with attention_backend("native"):  # `set_attention_backend` changes that of the process, too
            vae.set_attention_backend("_native_math")
            with attention_backend("native"):
                assert_used("_native_math")
                vae.reset_attention_backend()
                assert_used("native")
        with attention_backend("_native_math"):
            assert_used("_native_math")
        assert_used("native")

    def test_processors(self, vae, x):
        class Doubled(ViTokAttnProcessor):
            def __call__(self, *args):
                return 2 * super().__call__(*args)

        expected, originals = vae(x).sample, vae.attn_processors
        assert len(originals) == 4 and "decoder.transformer_blocks.1.attn.processor" in originals
        vae.set_attn_processor(Doubled())
        doubled = vae(x).sample
        vae.set_attn_processor(dict(originals))
        assert_close(vae(x).sample, expected)
        for name, weight in vae.named_parameters():
            weight.mul_(2 if "to_out" in name else 1)
        assert_close(vae(x).sample, doubled)


class TestFusedProjections:
    def test_one_product_instead_of_three(self, vae, x):
        expected = vae(x).sample
        assert linear_calls(vae, x) == sorted(LINEARS * 4)
        vae.fuse_qkv_projections()
        assert linear_calls(vae, x) == sorted(["attn.to_qkv", *LINEARS[3:]] * 4)
        assert_close(vae(x).sample, expected)
        vae.unfuse_qkv_projections()
        assert linear_calls(vae, x) == sorted(LINEARS * 4)
        assert_close(vae(x).sample, expected)

    @pytest.mark.parametrize("lora_first", [True, False])
    def test_lora_has_an_effect(self, vae, x, lora_first):
        expected = add_lora(copy.deepcopy(vae), targets=["to_v"])(x).sample
        if not lora_first:
            vae.fuse_qkv_projections()
        add_lora(vae, targets=["to_v"])
        vae.fuse_qkv_projections()
        assert_close(vae(x).sample, expected)
        vae.unload_lora()
        vae.fuse_qkv_projections()
        assert "attn.to_qkv" in linear_calls(vae, x)

    def test_weights_that_are_loaded(self, vae, x):
        other = copy.deepcopy(vae)
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        vae.fuse_qkv_projections()
        vae.load_state_dict(other.state_dict())
        assert_close(vae(x).sample, other(x).sample)

    def test_save_and_load(self, vae, x, tmp_path):
        vae.fuse_qkv_projections()
        vae.save_pretrained(tmp_path)
        assert_close(AutoencoderViTok.from_pretrained(tmp_path)(x).sample, vae(x).sample)


class TestLora:
    def test_both_towers(self, vae, x):
        base = run(vae, x)
        add_lora(vae)
        moved = MODES["encode"](vae, x), MODES["decode"](vae, base[0]), vae(x).sample
        assert all(relative_error(*pair) > 0.01 for pair in zip(moved, base))
        vae.disable_adapters()
        assert_close(run(vae, x), base)
        vae.enable_adapters()
        assert_close(vae(x).sample, moved[2])

    def test_several(self, vae, x):
        base = vae(x).sample
        first, second = (add_lora(vae, seed, name=name)(x).sample for seed, name in enumerate("ab"))
        vae.set_adapters("a")
        assert_close(vae(x).sample, first)
        vae.set_adapters(["a", "b"], [0.0, 1.0])
        assert_close(vae(x).sample, second)
        vae.delete_adapters("a")
        assert list(vae.peft_config) == ["b"]
        assert_close(vae(x).sample, second)
        vae.unload_lora()
        assert_close(vae(x).sample, base)

    def test_merging(self, vae, x):
        linear = vae.decoder.transformer_blocks[0].attn.to_q
        weight, sample = linear.weight.clone(), add_lora(vae)(x).sample
        vae.fuse_lora()
        assert relative_error(linear.weight, weight) > 0.01
        assert_close(vae(x).sample, sample)
        vae.unfuse_lora()
        assert_close((linear.weight, vae(x).sample), (weight, sample))

    def test_files_and_hotswap_without_recompilation(self, vae, x, architecture, tmp_path):
        samples, counter = [], CompileCounter()
        for rank in (2, 4):
            other = add_lora(make_vae(architecture), seed=rank, rank=rank)
            other.save_lora_adapter(tmp_path / str(rank))
            samples.append(other(x).sample)
        options = {"prefix": None, "use_safetensors": True, "adapter_name": "default"}
        vae.enable_lora_hotswap(target_rank=4)
        vae.load_lora_adapter(tmp_path / "2", **options)
        compiled = torch.compile(vae, backend=counter, fullgraph=True)
        assert_close(compiled(x).sample, samples[0])
        vae.load_lora_adapter(tmp_path / "4", hotswap=True, **options)
        assert_close(compiled(x).sample, samples[1])
        assert counter.frame_count == 1 and relative_error(*samples) > 0.01


class TestCompilation:
    @pytest.mark.parametrize("mode", MODES)
    def test_other_sizes_without_recompilation(self, vae, mode):
        counter = CompileCounter()
        compiled = torch.compile(MODES[mode], backend=counter, fullgraph=True, dynamic=True)
        for x in inputs_of_sizes(vae, mode):
            assert_close(compiled(vae, x), MODES[mode](vae, x))
        assert counter.frame_count == 1

    def test_one_compilation_for_the_blocks_of_a_tower(self, vae):
        inputs = [make_input(vae, 3, 24, 56), *inputs_of_sizes(vae, "forward")]  # first, as many rows as pictures
        counter, expected = CompileCounter(), [vae(x).sample for x in inputs]
        vae.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=True)
        for x, sample in zip(inputs, expected):
            assert_close(vae(x).sample, sample)
        assert counter.frame_count == 2

    @pytest.mark.parametrize("mode", ["encode", "decode"])
    def test_export_with_dynamic_sizes(self, vae, mode):
        class Half(nn.Module):
            def forward(self, x):
                return MODES[mode](self.vae, x)

        half = Half()
        half.vae = vae
        inputs, step = inputs_of_sizes(vae, mode), 8 if mode == "encode" else 1
        rank, height, width = inputs[0].ndim, Dim("h", min=2, max=64), Dim("w", min=2, max=64)
        shapes = {0: Dim("batch"), rank - 2: step * height, rank - 1: step * width}
        program = torch.export.export(half, (inputs[0],), dynamic_shapes=(shapes,)).module()
        for x in inputs:
            assert_close(program(x), MODES[mode](vae, x))


class TestOffloading:
    @pytest.mark.parametrize("level", ["block_level", "leaf_level"])
    def test_groups_return_from_the_disk(self, vae, x, level, tmp_path):
        expected = run(vae, x)
        path = str(tmp_path)
        vae.enable_group_offload(CPU, offload_type=level, num_blocks_per_group=1, offload_to_disk_path=path)

        def poison():
            for parameter in vae.parameters():
                parameter.data.fill_(torch.nan)

        assert_close(run(vae, x, before=poison), expected)

    @pytest.mark.parametrize("level", ["block_level", "leaf_level"])
    def test_groups_of_one_tower_at_a_time(self, vae, x, level, monkeypatch):
        loaded, onload = set(), ModuleGroup.onload_

        def record(group):
            loaded.update(id(p) for module in group.modules for p in module.parameters())
            loaded.update(map(id, group.parameters))
            onload(group)

        monkeypatch.setattr(ModuleGroup, "onload_", record)
        vae.enable_group_offload(CPU, offload_type=level, num_blocks_per_group=1)
        latents = MODES["encode"](vae, x)
        assert loaded == set(map(id, vae.encoder.parameters()))
        loaded.clear()
        vae.decode(latents)
        assert loaded == set(map(id, vae.decoder.parameters()))

    def test_accelerate_layer_by_layer(self, vae, x):
        expected = run(vae, x)
        cpu_offload(vae, execution_device=CPU)
        assert {parameter.device.type for parameter in vae.parameters()} == {"meta"}
        assert_close(run(vae, x), expected)

    def test_accelerate_whole_model(self, vae, x, monkeypatch):
        _, hook = cpu_offload_with_hook(vae, execution_device=CPU)
        calls = []
        monkeypatch.setattr(hook.hook, "pre_forward", lambda module, *args, **kwargs: calls.append(module))
        vae.decode(MODES["encode"](vae, x))
        assert calls == [vae, vae]

    @pytest.mark.parametrize("device_map", [{"encoder": "cpu", "decoder": "disk"}, "auto"])
    def test_device_map(self, vae, x, device_map, tmp_path):
        vae.save_pretrained(tmp_path)
        options = {"offload_folder": tmp_path / "offload", "max_memory": {"cpu": 250_000}}
        loaded = AutoencoderViTok.from_pretrained(tmp_path, device_map=device_map, **options)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
        assert_close(run(loaded, x), run(vae, x))

    def test_blocks_stay_together(self, vae):
        for memory in range(20_000, 400_000, 20_000):
            device_map = infer_auto_device_map(vae, {"cpu": memory, "disk": 10**9}, vae._no_split_modules)
            assert all(name.count(".") <= 2 for name in device_map)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layerwise_casting(self, vae, x, dtype):
        expected = run(vae, x)
        vae.to(dtype).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        for actual, wanted in zip(run(vae, x.to(dtype)), expected):
            assert actual.dtype == dtype and 0.001 < relative_error(actual, wanted) < 0.1
        for name, parameter in vae.named_parameters():
            in_float8 = "blocks" in name and parameter.ndim == 2
            assert parameter.dtype == (torch.float8_e4m3fn if in_float8 else dtype), name

    def test_int8_weights(self, vae, x, tmp_path):
        vae.save_pretrained(tmp_path / "float")
        quantized = AutoencoderViTok.from_pretrained(tmp_path / "float", **INT8)
        assert all(isinstance(m.weight, Int8Tensor) for m in quantized.modules() if isinstance(m, nn.Linear))
        sample = quantized(x).sample
        assert 0.001 < relative_error(sample, vae(x).sample) < 0.05
        quantized.save_pretrained(tmp_path / "int8")
        assert_close(AutoencoderViTok.from_pretrained(tmp_path / "int8", dtype=torch.float32)(x).sample, sample)


class TestTraining:
    @torch.enable_grad()
    @pytest.mark.parametrize("towers, forwards", [(["encoder", "decoder"], 8), (["encoder"], 6), ([], 4)])
    def test_gradient_checkpointing(self, vae, x, towers, forwards):
        vae.train()(x).sample.square().mean().backward()
        expected, calls = {name: parameter.grad for name, parameter in vae.named_parameters()}, []
        vae.zero_grad()
        vae.enable_gradient_checkpointing()
        for name, tower in vae.named_children():
            tower.gradient_checkpointing = name in towers
            for block in tower.transformer_blocks:
                block.register_forward_pre_hook(lambda *_: calls.append(1))
        vae(x).sample.square().mean().backward()
        assert len(calls) == forwards  # blocks run once more in the backward pass
        torch.testing.assert_close({name: parameter.grad for name, parameter in vae.named_parameters()}, expected)

    def test_moving_average(self, vae, x, tmp_path):
        average = EMAModel(vae.parameters(), decay=0.5, model_cls=AutoencoderViTok, model_config=vae.config)
        start = copy.deepcopy(vae)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(vae.parameters()) + 0.1, vae.parameters())
        average.step(vae.parameters())
        average.save_pretrained(tmp_path)
        EMAModel.from_pretrained(tmp_path, AutoencoderViTok).copy_to(vae.parameters())
        assert_close(AutoencoderViTok.from_pretrained(tmp_path)(x).sample, vae(x).sample)
        assert relative_error(vae(x).sample, start(x).sample) > 0.01

    @torch.enable_grad()
    def test_distributed_data_parallel(self, vae, x, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            output = nn.parallel.DistributedDataParallel(vae)(x)
            (output.sample.square().mean() + output.kl.mean()).backward()
        finally:
            torch.distributed.destroy_process_group()
        assert all(parameter.grad is not None for parameter in vae.parameters())


class TestObjects:
    def test_copies(self, vae, x):
        file, expected = io.BytesIO(), vae(x).sample
        torch.save(vae, file)
        file.seek(0)
        copies = copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)), torch.load(file, weights_only=False)
        vae.encoder.proj_in.weight.zero_()
        for other in copies:
            assert_close(other(x).sample, expected)
            assert other.config == vae.config

    def test_memory(self, vae):
        count = sum(parameter.numel() for parameter in vae.parameters())
        assert vae.num_parameters() == count and vae.get_memory_footprint() == 4 * count
        assert vae.half().get_memory_footprint() == 2 * count

    def test_layouts_of_the_input(self, vae, x):
        channels_last = x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        for other in (channels_last, x.mT.contiguous().mT, torch.stack([x, x], dim=-1)[..., 0]):
            assert not other.is_contiguous()
            assert_close(vae(other).sample, vae(x).sample)

    def test_inference_mode(self, vae, x):
        expected = run(vae, x)
        with torch.inference_mode():
            actual = run(vae, x)
        assert all(tensor.is_inference() for tensor in actual)
        assert_close(actual, expected)
