import pytest
import torch

from vitok_hf import AutoencoderViTok
from vitok_hf.evaluation.costs import count_macs
from vitok_hf.presets import variant_to_config


def on_meta(variant: str, **kwargs) -> AutoencoderViTok:
    with torch.device("meta"):
        return AutoencoderViTok.from_variant(variant, **kwargs)


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


class TestPaper:
    """Table 1 and section 2 of arXiv 2501.09755."""

    @pytest.mark.parametrize("size, parameters, gmacs", [("S", 43.3, 11.6), ("B", 85.8, 23.1), ("L", 383.7, 101.8)])
    def test_towers(self, size, parameters, gmacs):
        vae = on_meta(f"{size}-B/16")
        assert millions(vae.encoder) == pytest.approx(parameters, rel=0.015)
        assert count_macs(vae, (1, 3, 256, 256), "encoder") / 1e9 == pytest.approx(gmacs, rel=0.015)

    @pytest.mark.parametrize(
        "variant, shape, parameters, gmacs, tolerance",
        [
            ("S-B/16", (256, 256), 129.0, 34.8, 0.015),
            ("S-B/16", (512, 512), 129.0, 160.8, 0.015),
            ("S-L/16", (256, 256), 426.8, 113.4, 0.015),
            ("S-B/4x8", (16, 128, 128), 129.0, 160.8, 0.015),
            ("S-B/8x8", (16, 128, 128), 129.0, 73.2, 0.015),
            ("S-B/4x16", (16, 128, 128), 129.0, 34.8, 0.03),
        ],
    )
    def test_models(self, variant, shape, parameters, gmacs, tolerance):
        vae = on_meta(variant)
        assert millions(vae) == pytest.approx(parameters, rel=max(tolerance, 0.025 if "x" in variant else 0.0))
        assert count_macs(vae, (1, 3, *shape)) / 1e9 == pytest.approx(gmacs, rel=tolerance)

    def test_config(self):
        vae = on_meta("S-B/4x8", latent_channels=4)
        config = vae.config
        assert (config.temporal_patch_size, config.patch_size, config.latent_channels) == (4, 8, 4)
        assert (config.sample_frames, config.sample_size) == (16, 128)
        assert not vae.is_image_model and on_meta("S-B/16").is_image_model


class TestV2:
    @pytest.mark.parametrize(
        "variant, encoder, decoder",
        [("Ld4-Ld24/1x16x64", 51, 303), ("Td4-T/1x16x64", 463, 4500), ("Td4-T/1x32x256", 463, 4500)],
    )
    def test_parameters(self, variant, encoder, decoder):
        vae = on_meta(variant)
        assert millions(vae.encoder) == pytest.approx(encoder, rel=0.03)
        assert millions(vae.decoder) == pytest.approx(decoder, rel=0.03)

    @pytest.mark.parametrize(
        "size, width, depth, heads",
        [("B", 768, 12, 12), ("L", 1024, 24, 16), ("G", 1728, 32, 24), ("T", 3072, 40, 24), ("E", 4096, 48, 32)],
    )
    def test_sizes(self, size, width, depth, heads):
        config = variant_to_config(f"{size}d4-{size}/1x16x32")
        assert (config["encoder_hidden_size"], config["encoder_num_layers"]) == (width, 4)
        assert (config["decoder_hidden_size"], config["decoder_num_layers"]) == (width, depth)
        assert config["encoder_num_attention_heads"] == config["decoder_num_attention_heads"] == heads
        assert (config["patch_size"], config["latent_channels"]) == (16, 32)

    def test_overrides(self):
        config = variant_to_config("Lw512h8m4-w64_d2_h4_m4/1x8x16")
        assert (config["encoder_hidden_size"], config["encoder_num_layers"]) == (512, 24)
        assert config["encoder_num_attention_heads"] == 8 and config["mlp_ratio"] == 4.0
        assert (config["decoder_hidden_size"], config["decoder_num_layers"]) == (64, 2)

    @pytest.mark.parametrize("size, width, layers, heads", [("B", 768, 12, 12), ("w192_d2_h2", 192, 2, 2)])
    def test_one_size_for_both_towers(self, size, width, layers, heads):
        config = variant_to_config(f"{size}/1x32x128")
        for tower in ("encoder", "decoder"):
            names = ("hidden_size", "num_layers", "num_attention_heads")
            assert [config[f"{tower}_{name}"] for name in names] == [width, layers, heads]
        assert (config["temporal_patch_size"], config["patch_size"], config["latent_channels"]) == (1, 32, 128)
        assert config == variant_to_config(f"{size}-{size}/1x32x128")
        assert config["latent_norm"] and not config["variational"]

    def test_one_size_with_a_ratio(self):
        assert variant_to_config("Bd2m4/2x8x16") == variant_to_config("Bd2m4-Bd2m4/2x8x16")
        assert variant_to_config("Bd2m4/2x8x16")["mlp_ratio"] == 4.0

    @pytest.mark.parametrize("width, inner", [(64, 176), (1024, 2736), (3072, 8208)])
    def test_inner_width(self, width, inner):
        vae = on_meta(f"w{width}_d1_h4-w64_d1_h4/1x8x16")
        assert vae.encoder.transformer_blocks[0].ff.net[2].in_features == inner

    def test_architecture(self):
        vae = on_meta("Ld4-Ld24/1x16x64")
        block = vae.encoder.transformer_blocks[0]
        assert block.parallel and not hasattr(block, "norm2") and block.attn.norm_q.weight.shape == (64,)
        assert not vae.config.variational and vae.config.latent_norm
        assert "encoder.norm_out.weight" not in dict(vae.named_parameters())


@pytest.mark.parametrize(
    "variant",
    [
        "",
        "S-B",
        "X-B/16",
        "Z/1x16x64",
        "B-/1x16x64",
        "-B/1x16x64",
        "w64_d2/1x8x16",
        "S-B/16x",
        "S-B/1x2x3x4",
        "Z-L/1x16x64",
        "w64_d2-w64_d2_h4/1x8x16",
        "Ld-L/1x16x64",
        "Bd4d5/1x16x64",
        "B/1x16x\u0666\u0664",
    ],
)
def test_unknown_variants(variant):
    with pytest.raises(ValueError, match="known names|cannot be read"):
        AutoencoderViTok.from_variant(variant)


@pytest.mark.parametrize("variant", ["S/16", "B/4x8"])
def test_names_of_the_paper_have_two_sizes(variant):
    with pytest.raises(ValueError, match='"ENC-DEC/p".* where one size, as "B/1x16x64", is that of both towers'):
        AutoencoderViTok.from_variant(variant)


def test_towers_with_different_mlp_ratios():
    with pytest.raises(ValueError, match="share one `mlp_ratio`"):
        AutoencoderViTok.from_variant("Lm4-L/1x16x64")


@pytest.mark.parametrize(
    "variant, message",
    [
        ("Ld999999999-L/1x16x64", "has d 999999999, which must be from 1 to 1024"),
        ("Ld0-L/1x16x64", "has d 0, which"),
        ("S-B/0", "has patch size 0, which must be from 1 to 1024"),
        ("B/1x16x" + "9" * 10000, "has channels 9+, which must be from 1 to 16384"),
        (None, '`variant` must be a name, such as "S-B/16", but is None'),
    ],
)
def test_numbers_that_no_model_has(variant, message):
    with pytest.raises(ValueError, match=message):
        variant_to_config(variant)


def test_misspelt_arguments():
    with pytest.raises(TypeError, match="latent_chanels"):
        AutoencoderViTok.from_variant("S-B/16", latent_chanels=4)
