"""The demo: what its buttons compute, the page in a browser, and the folder that is a Space."""

import runpy

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import asked_hosts
from tests.browser import browser as browser
from tests.conftest import ASSETS, make_vae
from tests.dit import make_pipeline
from tests.evaluation.test_reconstruct_files import write_film
from vitok_hf import commands
from vitok_hf.commands import demo, main
from vitok_hf.data.media import load_image
from vitok_hf.data.video import iterate_timed_frames
from vitok_hf.demo import actions
from vitok_hf.demo.app import Models, in_words, launch_options, make_app
from vitok_hf.demo.space import write_space
from vitok_hf.evaluation.generation import generate_samples
from vitok_hf.evaluation.metrics import psnr
from vitok_hf.evaluation.reconstruction import reconstruct


WAIT = 60  # seconds at most


def nested_vae(**overrides):
    return make_vae("v1", channel_counts=[2, 4], **overrides)


def other_vae():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **blocks).eval()


@pytest.fixture(scope="module")
def cat(tmp_path_factory) -> str:
    """A small picture of a size that fits no patches."""
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    Image.fromarray(load_image(ASSETS / "chelsea.png")).resize((90, 60)).save(path)
    return str(path)


def clip_of(path: str) -> torch.Tensor:
    return torch.tensor(load_image(path)).permute(2, 0, 1)[None, :, None]


def python_psnr(vae, path: str, **lengths) -> str:
    """As it is written on the page."""
    clip = clip_of(path)
    return f"{psnr(reconstruct(vae, clip, lengths=lengths), clip).item():.2f} dB"


class TestPictures:
    @pytest.mark.parametrize("lengths", [{}, {"num_channels": 2}])
    def test_what_python_gives(self, cat, lengths):
        vae, clip = nested_vae(), clip_of(cat)
        picture = actions.send_picture(vae, cat, {"num_channels": actions.ALL} | lengths)
        expected = reconstruct(vae, clip, lengths=lengths)[0, :, 0].permute(1, 2, 0).numpy()
        assert np.array_equal(picture.reconstruction, expected) and picture.original.shape == (60, 90, 3)
        difference = np.abs(picture.original.astype(float) - expected).mean(axis=2) * 4
        assert np.abs(picture.errors[..., 0] - difference.clip(0, 255)).max() <= 0.5
        text = actions.describe("x.png", picture.file)
        numbers = 8 * 12 * lengths.get("num_channels", 4)
        assert f"{2 * numbers:,} bytes" in text and python_psnr(vae, cat, **lengths) in text
        assert f"one number for {3 * 60 * 90 / numbers:.1f} of" in text and "(90 x 60)" in text

    def test_other_autoencoders(self, cat):
        picture = actions.send_picture(other_vae(), cat, {})
        assert picture.reconstruction.shape == (60, 90, 3)
        assert f"{2 * 4 * 30 * 45:,} bytes" in actions.describe("x.png", picture.file)
        assert actions.code_lengths(other_vae()) == {}

    def test_lengths_that_can_be_chosen(self):
        assert actions.code_lengths(make_vae("v1")) == {}
        assert actions.code_lengths(nested_vae(token_counts=[1, 5])) == {
            "num_channels": [2, 0],
            "num_tokens": [1, 5, 0],
        }
        lengths = actions.code_lengths(make_vae("v1", token_counts=[1, 5], num_latent_tokens=5))
        assert lengths == {"num_tokens": [1, 0]}

    def test_what_is_no_picture(self, tmp_path):
        (tmp_path / "cat.png").write_text("no picture")
        with pytest.raises(ValueError, match="^cat.png: cannot be read as a picture"):
            actions.send_picture(nested_vae(), str(tmp_path / "cat.png"), {})
        (tmp_path / "cat.mp4").write_text("no video")
        with pytest.raises(ValueError, match="^cat.mp4: cannot be read as a video") as raised:
            actions.send_video(nested_vae(), str(tmp_path / "cat.mp4"), {})
        assert str(tmp_path) not in str(raised.value)  # of the server

    def test_videos(self, tmp_path, cat):
        write_film(tmp_path / "x.MP4", 12)
        assert actions.is_video(str(tmp_path / "x.MP4")) and not actions.is_video(cat)
        clip, frames, file = actions.send_video(make_vae("video"), str(tmp_path / "x.MP4"), {})
        shown = [frame for _, frame in iterate_timed_frames(clip)]
        assert len(shown) == 12 and shown[0].shape == (16, 48, 3)
        assert Image.open(frames).size == (8 * 24, 2 * 16)
        assert "(24 x 16, 12 frames): PSNR" in actions.describe("x", file) and file.num_latents == 4 * 6 * 2 * 3


class TestGeneration:
    def test_as_the_command_draws(self):
        pipe, steps = make_pipeline(), []
        options = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_rescale": 0.5}
        pictures = actions.draw(pipe, 4, 2, 7, options, steps.append)
        expected = generate_samples(pipe, [4, 4], seed=7, **options)
        assert np.array_equal(np.stack(pictures), expected.permute(0, 2, 3, 1)) and steps == [1, 2, 3]
        with pytest.raises(ValueError, match="guidance_rescale"):
            actions.draw(pipe, 4, 2, 7, options | {"guidance_rescale": 2.0})

    def test_defaults_are_those_of_the_pipeline(self):
        of_calls = {"num_inference_steps": 50, "guidance_scale": 4.0, "guidance_rescale": 0.0}
        assert actions.generation_defaults(make_pipeline()) == of_calls
        own = {"guidance_scale": 2.5, "guidance_rescale": 1.0}
        assert actions.generation_defaults(make_pipeline(guidance=own)) == of_calls | own

    def test_classes(self):
        assert actions.classes_of(make_pipeline(id2label={1: "dog"}))[:2] == [("0", 0), ("dog", 1)]
        label, index = actions.classes_of(make_pipeline())[-1]
        assert label == "no class" and len(actions.draw(make_pipeline(), index, 1, 0, {"num_inference_steps": 1})) == 1


def test_errors_are_words():
    def fail(error):
        raise error

    with pytest.raises(gr.Error, match='"a&lt;b" is no picture'):
        in_words(fail)(ValueError('"a<b" is no picture'))
    with pytest.raises(KeyError):
        in_words(fail)(KeyError("a fault"))


class TestCommand:
    def test_bundled_models(self):
        models = demo.load_models(demo.parse(["--compare", "vitok-tiny-f8x8"], "vitok demo"))
        assert models.name == models.other_name == "vitok-tiny-f8x8" and models.pipe.labels["face"] == 0
        models = demo.load_models(demo.parse(["--compare", "none", "--pipeline", "none"], "vitok demo"))
        assert models.other is None and models.pipe is None
        assert "--compare MODEL" in str(make_app(models).get_config_file())

    def test_local_folders(self, tmp_path):
        make_vae("v1").save_pretrained(tmp_path / "output" / "vae")
        make_pipeline("video").save_pretrained(tmp_path / "film")
        models = demo.load_models(demo.parse(["--model", str(tmp_path / "output" / "vae")], "vitok demo"))
        assert models.name == "output/vae" and models.other_name == "vitok-dial-f8x16"
        with pytest.raises(ValueError, match="film makes videos, but the demo draws pictures"):
            demo.load_models(demo.parse(["--pipeline", str(tmp_path / "film")], "vitok demo"))

    def test_without_gradio(self, monkeypatch, capsys):
        monkeypatch.setitem(__import__("sys").modules, "gradio", None)
        monkeypatch.delenv("VITOK_TRACEBACK", raising=False)
        with pytest.raises(SystemExit):
            main("demo")
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("vitok demo: ") and line.endswith('pip install "vitok-hf[demo]" brings it')


class TestSpace:
    @pytest.fixture
    def installed(self, tmp_path, monkeypatch):
        """As if from a wheel with these requirements."""
        info = tmp_path / "site" / "vitok_hf-9.dist-info"
        info.mkdir(parents=True)
        needs = ["torch>=2.13", 'gradio>=6; extra == "demo"', "pytest>=8; extra == 'test'"]
        lines = ["Metadata-Version: 2.1", "Name: vitok-hf", "Version: 9", *(f"Requires-Dist: {x}" for x in needs)]
        (info / "METADATA").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def test_it_starts_the_same_demo(self, installed, tmp_path, monkeypatch):
        make_vae("v1").save_pretrained(tmp_path / "output" / "vae")
        arguments = ["--model", str(tmp_path / "output" / "vae"), "--pipeline", "none", "--dtype", "float32"]
        commands.start("demo", [*arguments, "--space_dir", str(tmp_path / "space")])
        _, matter, text = (tmp_path / "space" / "README.md").read_text().split("---\n", 2)
        card = yaml.safe_load(matter)
        assert card["sdk"] == "gradio" and card["sdk_version"] == gr.__version__ and card["license"] == "apache-2.0"
        assert card["title"] == "ViTok vae" and "Apache-2.0" in text
        assert (tmp_path / "space" / "requirements.txt").read_text() == "torch>=2.13\ngradio>=6\n"
        assert (tmp_path / "space" / "vitok_hf" / "checkpoints" / "vitok-tiny-f8x8" / "config.json").is_file()
        given = []
        monkeypatch.setattr(commands, "main", lambda *argv: given.extend(argv))
        monkeypatch.chdir(tmp_path / "space")
        runpy.run_path(card["app_file"])
        args = demo.parse(given[1:], "vitok demo")
        assert given[0] == "demo" and (args.model, args.pipeline, args.dtype) == ("model", "none", "float32")
        loaded = demo.load_models(args).vae.state_dict()
        assert all(torch.equal(x, loaded[name]) for name, x in make_vae("v1").state_dict().items())

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "mine.txt").write_text("")
        with pytest.raises(ValueError, match="is not empty: name a new folder"):
            write_space(tmp_path, {})


@pytest.fixture(scope="module")
def address():
    models = Models("nested", nested_vae(), "other", other_vae(), make_pipeline())
    app = make_app(models)
    yield app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())[1]
    app.close()


class TestPage:
    @pytest.fixture(autouse=True)
    def page(self, browser, address):
        browser.get(address)
        self.browser = browser
        self.find("input[type=file]")

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def upload(self, path: str) -> None:
        """To the tab that is shown."""

        def place(browser):
            places = browser.find_elements(By.CSS_SELECTOR, "input[type=file]")
            return next((x for x in places if x.find_element(By.XPATH, "..").is_displayed()), None)

        WebDriverWait(self.browser, WAIT).until(place).send_keys(path)

    def press(self, text: str):
        buttons = self.browser.find_elements(By.XPATH, f"//button[normalize-space()='{text}']")
        next(button for button in buttons if button.is_displayed()).click()  # tabs have an invisible copy

    def wait_for(self, *texts: str) -> str:
        def visible(browser):
            text = browser.find_element(By.TAG_NAME, "body").text
            return text if all(part in text for part in texts) else None

        return WebDriverWait(self.browser, WAIT).until(visible, f"no {texts}")

    def shown(self, count: int) -> None:
        """Waits until so many pictures have been loaded."""
        script = "return [...document.images].filter(x => x.offsetParent && x.naturalWidth > 20).length"
        WebDriverWait(self.browser, WAIT).until(lambda browser: browser.execute_script(script) >= count)

    def test_a_picture_and_its_rates(self, cat):
        self.upload(cat)
        self.wait_for("cat.png (90 x 60)", python_psnr(nested_vae(), cat), f"{2 * 8 * 12 * 4:,} bytes")
        self.shown(2)
        self.find("input[type=radio][value='2']").click()
        self.wait_for(python_psnr(nested_vae(), cat, num_channels=2), f"{2 * 8 * 12 * 2:,} bytes")
        assert asked_hosts(self.browser) == {"127.0.0.1"}

    def test_what_cannot_be_read_on_a_phone(self, tmp_path):
        (tmp_path / "cat.png").write_text("no picture")
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            self.upload(str(tmp_path / "cat.png"))
            self.wait_for("cat.png: cannot be read as a picture (unknown format); remove or replace it.")
            assert self.browser.execute_script("return document.documentElement.scrollWidth") <= 390
        finally:
            self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_a_video(self, tmp_path):
        write_film(tmp_path / "film.mp4", 4)
        self.upload(str(tmp_path / "film.mp4"))
        self.wait_for("film.mp4 (24 x 16, 4 frames): PSNR")
        assert self.find("video").is_displayed()

    def test_two_models(self, cat):
        self.press("Compare")
        self.upload(cat)
        self.wait_for("A: nested (90", "B: other (90", *(python_psnr(x, cat) for x in (nested_vae(), other_vae())))
        self.shown(4)

    def test_drawing(self):
        self.press("Generate")
        self.press("Draw")
        self.shown(4)

    def test_the_sample(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # files of the working folder may be shown anyway
        self.press("Take a sample photograph")
        self.wait_for("astronaut.png (512 x 512): PSNR")
