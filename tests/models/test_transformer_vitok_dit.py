import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import assert_close
from tests.dit import TRANSFORMER, make_transformer
from vitok_hf import ViTokDiTModel
from vitok_hf.models.layers import Packing


MODELS = {
    "image": TRANSFORMER,
    "video": TRANSFORMER | {"sample_frames": 2, "qk_norm": True},
    "patches": TRANSFORMER | {"patch_size": 2, "out_channels": 8},
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
    return make_transformer(**MODELS[kind] | overrides)


def make_latents(kind, height=4, width=6):
    frames = (3,) if kind == "video" else ()
    return torch.randn(2, 4, *frames, height, width, generator=torch.Generator().manual_seed(1))


def run(model, x, timestep=TIMESTEP, class_labels=LABELS):
    return model(x, timestep, class_labels).sample


def arguments(model):
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


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
            assert torch.equal(block(tokens, temb, rotary_emb, Packing([2], [(6,)])), tokens)

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
        expected = x + gate1 * block.attn(h, rotary_emb, Packing([2], [(6,)]))
        h = nn.functional.rms_norm(expected, (32,), eps=1e-6) * (1 + scale2) + shift2
        value, gate = block.ff.net[0].proj(h).chunk(2, dim=-1)
        expected = expected + gate2 * block.ff.net[2](value * nn.functional.silu(gate))
        assert_close(block(x, temb, rotary_emb, Packing([2], [(6,)])), expected)

    def test_timesteps_are_embedded_as_in_dit(self):
        model, angles = make_model("image"), 7.5 * 10000 ** (-torch.arange(128) / 128)
        expected = model.timestep_embedder(torch.cat([angles.cos(), angles.sin()])[None])
        assert_close(model._embed_timestep(7.5, torch.zeros(1, 4, 2, 2)), expected)

    def test_image_models_have_positions_on_two_axes(self):
        narrow = make_model("image", num_attention_heads=8)  # 2 rotary pairs a head
        assert run(narrow, make_latents("image")).shape == (2, 4, 4, 6)

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
        torch.testing.assert_close(run(model, x), run(model, x.unsqueeze(2)).squeeze(2))

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
        torch.testing.assert_close(model(x, 1).sample, run(model, x, 1, torch.tensor([5, 5])))

    def test_unconditional_model(self, x, kind):
        model = make_model(kind, num_classes=0)
        torch.testing.assert_close(model(x, 1).sample, run(model, x, 1, torch.zeros(2, dtype=torch.int64)))
        with pytest.raises(ValueError, match="0 for no class, but are"):
            run(model, x, 1, torch.tensor([0, 1]))

    def test_tuple(self, model, x):
        (sample,) = model(x, TIMESTEP, LABELS, return_dict=False)
        torch.testing.assert_close(sample, run(model, x))

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
            ({"num_classes": None}, "`num_classes` must be int .* but is None"),
            ({"sample_size": 5, "patch_size": 2}, "`sample_size` 5 must be a multiple of `patch_size` 2"),
        ],
    )
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            ViTokDiTModel(**TRANSFORMER | config)

    @pytest.mark.parametrize(
        "shape, message",
        [
            ((2, 3, 4, 4), r"in_channels=4 channels in dimension 1, but has shape \(2, 3, 4, 4\)"),
            ((4, 4, 4), r"must be \(B, c, h, w\) or \(B, c, t, h, w\), but has shape \(4, 4, 4\)"),
            ((2, 4, 4, 5), "multiples of patch_size=2, but are 4 x 5: choose another size, or a model"),
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
        torch.testing.assert_close(run(loaded, x), run(model, x))

    @pytest.mark.parametrize("problem", ["missing", "unexpected"])
    def test_loading_is_strict(self, problem, tmp_path):
        make_model("image").save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["other.weight"] = tensors.pop("proj_out.bias") if problem == "missing" else torch.zeros(1)
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"1 tensors are {problem}"):
            ViTokDiTModel.from_pretrained(tmp_path)
