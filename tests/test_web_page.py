"""The page of docs/try, built with tiny models and driven in Chromium, computes what PyTorch does."""

import functools
import json
import re
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import build_web_page
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.browser import need_programs, start_browser
from tests.conftest import ASSETS, EXAMPLES, TINY, assert_close
from tests.dit import ID2LABEL, STATISTICS, TRANSFORMER, make_transformer
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline
from vitok_hf.evaluation.generation import generate_samples


pytestmark = pytest.mark.xdist_group("page")  # which is built once

SECONDS = 120  # to wait at most, on a machine that does much besides
ONE_LAYER = {"encoder_num_layers": 1, "decoder_num_layers": 1}
READ = "const c = arguments[0]; return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"


@pytest.fixture(scope="module")
def pipe():
    vae = AutoencoderViTok(**TINY | STATISTICS | ONE_LAYER | {"channel_counts": [1, 2, 4]}).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    transformer = make_transformer(**TRANSFORMER | {"num_layers": 1})
    guidance = {"guidance_scale": 3.0, "guidance_rescale": 0.5}
    pipe = ViTokDiTPipeline(transformer, vae, scheduler, ID2LABEL, **guidance)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float16).to(torch.float32)  # the weights that the page has


@pytest.fixture(scope="module")
def vae(pipe):
    return pipe.vae


def build(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build_web_page.py", *map(str, arguments)])
        build_web_page.main()


@pytest.fixture(scope="module")
def page(pipe, tmp_path_factory):
    need_programs("npm")
    folder = tmp_path_factory.mktemp("built")
    pipe.save_pretrained(folder / "emoji")
    build("--pipeline", folder / "emoji", "--output_dir", folder / "page")
    return folder / "page"


@pytest.fixture(scope="module")
def serve():
    servers = []

    def start(folder):
        handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    driver = start_browser()
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser, serve, page):
    browser.get(serve(page))
    WebDriverWait(browser, SECONDS).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "body.ready"))
    return browser


class Section:
    """One half of the page."""

    def __init__(self, browser, name: str):
        self.browser, (self.element,) = browser, browser.find_elements(By.ID, name)

    def find(self, selector: str):
        return self.element.find_element(By.CSS_SELECTOR, selector)

    def wait(self, text: str, place: str = ".status") -> str:
        """The line of this place when it has the text; fails with an alert that does not."""

        def read(_):
            line, alert = self.find(place).text, self.find(".alert").text
            assert place == ".alert" or not alert, alert
            return line if re.search(text, line) else None

        return WebDriverWait(self.browser, SECONDS, 0.1).until(read)

    def send(self, path) -> None:
        self.find("input[type=file]").send_keys(str(path))

    def pixels(self, index: int) -> torch.Tensor:
        """(H, W, 3), uint8."""
        canvas = self.element.find_elements(By.TAG_NAME, "canvas")[index]
        data = np.array(self.browser.execute_script(READ, canvas), dtype=np.uint8)
        width, height = (int(canvas.get_attribute(name)) for name in ("width", "height"))
        return torch.from_numpy(data.reshape(height, width, 4)[..., :3])

    def psnr(self) -> float:
        return float(self.find("[data-fact=psnr]").text.removesuffix(" dB"))


@pytest.fixture
def reconstruct(opened):
    return Section(opened, "reconstruct")


@pytest.fixture
def draw(opened):
    return Section(opened, "draw")


def assert_same_pixels(actual, expected) -> None:
    """But for how halves are rounded, and float32 products."""
    assert actual.shape == expected.shape and (actual.int() - expected.int()).abs().max() <= 1


@torch.no_grad()
def expected_reconstruction(vae, picture, **lengths):
    """uint8 pixels and PSNR by PyTorch."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    (latents,) = vae.encode([x], **lengths).latent_dist.mode()
    (sample,) = vae.decode([latents], sizes=[x.shape[1:]]).sample
    error = (sample.clamp(-1, 1) - x).square().mean()
    return (127.5 * (sample.clamp(-1, 1) + 1)).round().byte().permute(1, 2, 0), 10 * torch.log10(4 / error).item()


class TestReconstruct:
    def test_pictures_of_any_size_at_every_rate(self, reconstruct, vae, tmp_path):
        with Image.open(ASSETS / "coffee.png") as picture:
            picture = picture.convert("RGB").resize((250, 101))
        picture.save(tmp_path / "coffee.png")
        reconstruct.send(tmp_path / "coffee.png")
        reconstruct.wait(r"^coffee.png: 250 x 101$")
        rate, codes = reconstruct.find("#rate"), []
        for key in (None, Keys.ARROW_LEFT, Keys.HOME):
            if key:
                rate.send_keys(key)
            count = {None: 4, Keys.ARROW_LEFT: 2, Keys.HOME: 1}[key]
            WebDriverWait(reconstruct.browser, SECONDS, 0.1).until(
                lambda _, count=count: reconstruct.find("[data-fact=grid]").text.startswith(
                    f"{count} x 13 x 32 numbers"
                )
            )
            codes.append(reconstruct.find("[data-fact=bytes]").text)
            expected, psnr = expected_reconstruction(vae, picture, num_channels=[count])
            assert_same_pixels(reconstruct.pixels(1), expected)
            assert reconstruct.psnr() == pytest.approx(psnr, abs=0.1)
            assert rate.get_attribute("aria-valuetext") == f"{count} of 4 channels"
        assert codes == ["3,328 bytes", "1,664 bytes", "832 bytes"]
        assert_same_pixels(reconstruct.pixels(0), torch.from_numpy(np.array(picture)))
        difference = (torch.from_numpy(np.array(picture)).int() - expected.int()).abs() * 4
        assert (reconstruct.pixels(2).int() - difference.clamp(max=255)).abs().max() <= 3

    def test_large_pictures_are_scaled_down(self, reconstruct, tmp_path):
        Image.new("RGB", (1600, 800), "red").save(tmp_path / "large.jpg")
        reconstruct.send(tmp_path / "large.jpg")
        reconstruct.wait(r"^large.jpg: 256 x 128, scaled down from 1600 x 800$")
        assert reconstruct.pixels(1).shape == (128, 256, 3)

    def test_the_wipe_and_samples(self, reconstruct):
        reconstruct.find("[data-sample]").click()
        reconstruct.wait("The cat Chelsea: 256 x 170")
        reconstruct.find("#wipe").send_keys(Keys.END)
        style = reconstruct.browser.execute_script(
            "return getComputedStyle(arguments[0]).clipPath", reconstruct.find(".wipe canvas + canvas")
        )
        assert style == "inset(0px 0px 0px 100%)"

    @pytest.mark.parametrize(
        "name, words",
        [
            ("broken.png", "broken.png is damaged, too large, or no picture that this browser can read"),
            ("letter.txt", r"letter.txt is no picture \(its type is text/plain\): choose a PNG"),
        ],
    )
    def test_files_that_are_no_pictures(self, reconstruct, tmp_path, name, words):
        content = (ASSETS / "coffee.png").read_bytes()
        (tmp_path / name).write_bytes(content[:33] + b"nothing" + content[40:200])
        reconstruct.send(tmp_path / name)
        reconstruct.wait(words, ".alert")
        reconstruct.find("[data-sample]").click()
        reconstruct.wait("The cat Chelsea")  # goes on


class TestDraw:
    def test_what_the_pipeline_draws(self, draw, pipe):
        assert draw.find("#scale").get_attribute("value") == "3"
        assert draw.find("#rescale").get_attribute("value") == "0.5"
        draw.find("#label").send_keys("dog")
        for name, value in (("count", 2), ("steps", 3), ("seed", 7)):
            draw.find(f"#{name}").clear()
            draw.find(f"#{name}").send_keys(value)
        draw.find("#start").send_keys(Keys.ENTER)
        draw.wait("^2 pictures of 3 steps in")
        expected = generate_samples(pipe, ["dog", "dog"], seed=7, num_inference_steps=3)
        assert (expected[0].int() - expected[1].int()).abs().float().mean() > 5
        for index, picture in enumerate(expected):
            assert_same_pixels(draw.pixels(index), picture.permute(1, 2, 0))
        captions = [caption.text for caption in draw.element.find_elements(By.TAG_NAME, "figcaption")]
        assert captions == ["dog, seed 7", "dog, seed 8"]

    def test_cancelled_while_a_picture_goes_through(self, draw, reconstruct):
        for name, value in (("count", 16), ("steps", 100)):
            draw.find(f"#{name}").clear()
            draw.find(f"#{name}").send_keys(value)
        draw.find("#start").click()
        draw.wait("step [1-9]")
        assert draw.find("progress").is_displayed() and not draw.find("#start").is_enabled()
        reconstruct.element.find_elements(By.CSS_SELECTOR, "[data-sample]")[1].click()
        Select(reconstruct.find("#longest")).select_by_value("128")
        reconstruct.wait("A cup of coffee: 128 x 86, scaled down from 256 x 171")
        draw.find("#cancel").click()
        draw.wait("^Cancelled$")
        assert draw.find("#start").is_enabled() and not draw.find("#cancel").is_displayed()

    def test_other_schedulers_are_refused(self, opened):
        script = """
            const [config, done] = arguments;
            import("./sampler.js").then(({ noiseLevels }) => noiseLevels(config, 4)).catch((e) => done(e.message));
        """
        message = opened.execute_async_script(script, {"_class_name": "DDIMScheduler"})
        assert message.endswith("evenly spaced steps, but the model has DDIMScheduler .")


class TestPage:
    def test_names_for_screen_readers(self, opened):
        elements = opened.find_elements(By.CSS_SELECTOR, "input, select, button, canvas, progress, section, img")
        assert len(elements) > 20
        shown = [element for element in elements if element.is_displayed()]
        assert [element.get_attribute("outerHTML") for element in shown if not element.accessible_name] == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_on_a_phone(self, opened, scheme):
        opened.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        sizes = "return [document.scrollingElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
        width, colour = opened.execute_script(sizes)
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert width == 360 and (sum(map(int, re.findall(r"\d+", colour))) > 384) == (scheme == "light")

    def test_no_models(self, browser, serve):
        browser.get(serve(EXAMPLES.parent / "docs" / "try"))
        Section(browser, "reconstruct").wait("no models yet: examples/build_web_page.py", ".alert")


class TestFaults:
    """Copies of the page with files that are other ones, or none."""

    @pytest.fixture
    def copied(self, page, tmp_path):
        return shutil.copytree(page, tmp_path / "page")

    @pytest.fixture
    def opened(self, copied, browser, serve):
        def start(**files):
            for name, text in files.items():
                (copied / name).write_text(text)
            browser.get(serve(copied))
            return Section(browser, "reconstruct"), Section(browser, "draw")

        return start

    def test_models_of_other_rates(self, copied, opened):
        few = shutil.copytree(copied / "models" / "emoji", copied / "models" / "few") / "model.json"
        few.write_text(json.dumps(json.loads(few.read_text()) | {"channel_counts": [4]}))
        content = json.loads((copied / "page.json").read_text())
        content["autoencoders"] = {"few": "models/few", "many": "models/emoji"}
        reconstruct, _ = opened(**{"page.json": json.dumps(content)})
        reconstruct.wait("^4 of 4 channels$", "#rate-text")
        Select(reconstruct.find("#model")).select_by_visible_text("many")
        WebDriverWait(reconstruct.browser, SECONDS).until(
            lambda _: reconstruct.find("#rate").get_attribute("max") == "2"
        )
        assert reconstruct.find("#rate").get_attribute("value") == "2"
        assert reconstruct.find("#rate-text").text == "4 of 4 channels"

    @pytest.mark.parametrize(
        "name, words",
        [
            ("page.json", r"^page.json is damaged \(.*\): build this page anew"),
            ("onnxruntime/ort-wasm-simd-threaded.wasm.gz", r"threaded.wasm.gz cannot be used \(.*\): its maker"),
            ("models/emoji/model.json", r"^models/emoji/model.json cannot be used \(.*\): its maker"),
            ("models/emoji/encoder.onnx", r"^models/emoji/encoder.onnx cannot be used \(.*\): its maker"),
        ],
    )
    def test_damaged_files_are_named(self, opened, name, words):
        reconstruct, draw = opened(**{name: "nothing"})
        if name.endswith((".gz", ".onnx")):  # what the first picture loads
            WebDriverWait(reconstruct.browser, SECONDS).until(
                lambda browser: browser.find_elements(By.CSS_SELECTOR, "body.ready")
            )
            reconstruct.find("[data-sample]").click()
        reconstruct.wait(words, ".alert")
        if name.endswith("model.json"):
            draw.wait(words, ".alert")

    def test_one_half_without_its_model(self, copied, opened):
        content = json.loads((copied / "page.json").read_text())
        reconstruct, draw = opened(**{"page.json": json.dumps(content | {"generator": "models/none"})})
        draw.wait(r"^models/none/model.json is missing \(404\)", ".alert")
        draw.find("#seed").send_keys(Keys.ENTER)  # would load the page again
        reconstruct.find("[data-sample]").click()
        reconstruct.wait("The cat Chelsea")
        assert draw.find(".alert").text and not draw.find("#start").is_enabled()

    def test_no_worker(self, copied, opened):
        (copied / "worker.js").unlink()
        opened()[0].wait("^The worker ended: it could not start. Load the page again.$", ".alert")

    def test_a_picture_that_is_chosen_too_early(self, copied, opened):
        later = "await new Promise((resolve) => { window.go = resolve; });\n"
        reconstruct, _ = opened(**{"app.js": later + (copied / "app.js").read_text()})
        reconstruct.send(ASSETS / "coffee.png")
        reconstruct.browser.execute_script("go()")
        reconstruct.wait("^coffee.png: 256 x 171")

    def test_cancelled_before_a_call(self, opened):
        script = """
            const done = arguments[0], signal = AbortSignal.abort();
            import("./client.js").then(({ call }) => call("describe", { folder: "models/emoji" }, { signal }))
              .then(() => done("answered"), (error) => done(error.message));
        """
        assert opened()[0].browser.execute_async_script(script) == "cancelled"


class TestFiles:
    @torch.no_grad()
    def test_the_denoiser(self, pipe, page):
        path = page / "models" / "emoji" / "transformer.onnx"
        session = onnxruntime.InferenceSession(path)
        assert [entry.type for entry in session.get_inputs()] == ["tensor(float)", "tensor(float)", "tensor(int64)"]
        x, timestep, labels = torch.randn(3, 4, 5, 7), torch.tensor([0.5, 400.0, 999.0]), torch.tensor([0, 4, 5])
        feed = {"hidden_states": x.numpy(), "timestep": timestep.numpy(), "class_labels": labels.numpy()}
        (output,) = session.run(None, feed)
        assert_close(torch.from_numpy(output), pipe.transformer(x, timestep, labels).sample, atol=1e-4)

    def test_weights_in_half_precision(self, vae, page):
        for name, half in (("encoder", vae.encoder), ("decoder", vae.decoder)):
            stored = onnx.load(page / "models" / "emoji" / f"{name}.onnx").graph.initializer
            halves = [tensor for tensor in stored if tensor.data_type == onnx.TensorProto.FLOAT16]
            large = [parameter.numel() for parameter in half.parameters() if parameter.numel() >= 1024]
            assert sorted(np.prod(tensor.dims) for tensor in halves) == sorted(large)

    def test_what_the_page_reads(self, page):
        model = json.loads((page / "models" / "emoji" / "model.json").read_text())
        assert model["channel_counts"] == [1, 2, 4] and model["fill"] == 1.0
        assert model["latents_std"] == [2.0, 0.5, 1.0, 1.5]
        generator = model["generator"]
        assert generator["id2label"]["0"] == "cat" and generator["num_classes"] == 5
        assert generator["scheduler"]["_class_name"] == "FlowMatchEulerDiscreteScheduler"
