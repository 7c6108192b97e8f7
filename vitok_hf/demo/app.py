"""How the demo looks, in Gradio: a tab for each action."""

import functools
import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from ..models import AutoencoderViTok
from ..pipelines import ViTokDiTPipeline
from . import actions


PHOTOGRAPH = Path(__file__).parents[1] / "assets" / "astronaut.png"
LIMITS = {"concurrency_limit": 1, "concurrency_id": "models"}  # one at a time, in the order in which they came
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # those of the visitor
MAX_PICTURES, MAX_SEED = 16, 2**31 - 1
SHOWN = {"interactive": False, "buttons": ["download", "fullscreen"]}  # without one that shares on other servers
NAMES = {"num_channels": "Channels", "num_tokens": "Tokens"}


@dataclass(frozen=True)
class Models:
    """What the demo shows: an autoencoder by name, perhaps another of any class, and perhaps a generator."""

    name: str
    vae: AutoencoderViTok
    other_name: str = "none"
    other: ModelMixin | None = None
    pipe: ViTokDiTPipeline | None = None


def in_words(function: Callable) -> Callable:
    """The visitor reads what is raised for files and numbers that do not fit; faults of the program stay faults."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        import gradio as gr  # of an extra

        try:
            return function(*args)
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None

    return call


def add_upload(kinds: list[str], text: str) -> Any:
    """A place for a file, with a button that puts the shipped photograph there."""
    import gradio as gr

    file = gr.File(label=text, file_types=kinds, type="filepath", height=140)
    gr.Button("Take a sample photograph", size="sm").click(
        lambda: str(PHOTOGRAPH), outputs=file, show_progress="hidden", api_visibility="private"
    )
    return file


def add_lengths(vae: ModelMixin, owner: str = "") -> dict[str, Any]:
    """A choice for each way in which the codes of a model can be cut."""
    import gradio as gr

    choices = {}
    for name, counts in actions.code_lengths(vae).items():
        options = [("all" if count == actions.ALL else str(count), count) for count in counts]
        label = f"{NAMES[name]} of the code{owner}"
        choices[name] = gr.Radio(options, value=actions.ALL, label=label)
    return choices


def add_reconstruction(models: Models) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = add_upload(["image", "video"], "Picture or video")
            lengths = add_lengths(models.vae)
        with gr.Column(scale=2, min_width=280):
            text = gr.Markdown(visible=False)
            wipe = gr.ImageSlider(label="Original | reconstruction", format="png", **SHOWN)
            video = gr.Video(label="Original | reconstruction", visible=False, interactive=False, buttons=["download"])
            sheet = gr.Image(label="Frames, reconstructions below", visible=False, **SHOWN)

    @in_words
    def reconstruct(path: str | None, *counts: int) -> list[Any]:
        chosen = dict(zip(lengths, counts))
        if path is None:
            return [gr.update(value=None, visible=True), *(gr.update(value=None, visible=False) for _ in range(3))]
        if actions.is_video(path):
            clip, frames, measured = actions.send_video(models.vae, path, chosen)
            shown = [gr.update(value=None, visible=False), *(gr.update(value=x, visible=True) for x in (clip, frames))]
        else:
            picture = actions.send_picture(models.vae, path, chosen)
            measured, pair = picture.file, (picture.original, picture.reconstruction)
            shown = [gr.update(value=pair, visible=True), *(gr.update(value=None, visible=False) for _ in range(2))]
        return [*shown, gr.update(value=actions.describe(Path(path).name, measured), visible=True)]

    changes = [file.change, *(radio.input for radio in lengths.values())]
    outputs = [wipe, video, sheet, text]
    gr.on(changes, reconstruct, [file, *lengths.values()], outputs, api_name="reconstruct", **LIMITS)


def add_comparison(models: Models) -> None:
    import gradio as gr

    if models.other is None and not actions.code_lengths(models.vae):
        gr.Markdown("Start with `vitok demo --compare MODEL` to see the reconstructions of two models side by side.")
        return
    first = (models.name, models.vae)
    pair = [first, first if models.other is None else (models.other_name, models.other)]
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = add_upload(["image"], "Picture")
            sides = [add_lengths(vae, f" of {side}") for side, (name, vae) in zip(("A", "B"), pair)]
        with gr.Column(scale=2, min_width=280):
            text = gr.Markdown(visible=False)
            wipe = gr.ImageSlider(label="A | B", format="png", **SHOWN)
            with gr.Row():
                labels = [f"Errors of {side} x 4" for side in ("A", "B")]
                maps = [gr.Image(label=x, format="png", **SHOWN, min_width=140) for x in labels]

    @in_words
    def compare(path: str | None, *counts: int) -> list[Any]:
        if path is None:
            return [None, None, None, gr.update(value="", visible=False)]
        pictures, lines, rest = [], [], iter(counts)
        for side, (name, vae), lengths in zip(("A", "B"), pair, sides):
            chosen = {length: next(rest) for length in lengths}
            pictures.append(actions.send_picture(vae, path, chosen))
            lines.append(actions.describe(f"{side}: {name}", pictures[-1].file))
        reconstructions = tuple(picture.reconstruction for picture in pictures)
        errors = [picture.errors for picture in pictures]
        return [reconstructions, *errors, gr.update(value="\n\n".join(lines), visible=True)]

    radios = [radio for lengths in sides for radio in lengths.values()]
    changes = [file.change, *(radio.input for radio in radios)]
    gr.on(changes, compare, [file, *radios], [wipe, *maps, text], api_name="compare", **LIMITS)


def add_generation(pipe: ViTokDiTPipeline) -> None:
    import gradio as gr

    classes, defaults = actions.classes_of(pipe), actions.generation_defaults(pipe)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            label = gr.Dropdown(classes, value=classes[0][1], label="Class")
            count = gr.Slider(1, MAX_PICTURES, 4, step=1, label="Pictures")
            own_steps, own_scale = defaults["num_inference_steps"], defaults["guidance_scale"]
            steps = gr.Slider(1, max(250, own_steps), own_steps, step=1, label="Steps")
            scale = gr.Slider(min(1, own_scale), max(10, own_scale), own_scale, step=0.1, label="Guidance (1: none)")
            rescale = gr.Slider(0, 1, defaults["guidance_rescale"], step=0.05, label="Guidance rescale (0: none)")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED - MAX_PICTURES)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2, min_width=280):
            gallery = gr.Gallery(label="Pictures", columns=4, format="png", object_fit="contain", **SHOWN)

    progress = gr.Progress()

    @in_words
    def draw(
        class_id: int, number: int, steps: int, scale: float, rescale: float, seed: int, progress: Any = progress
    ) -> Any:
        options = {"num_inference_steps": int(steps), "guidance_scale": scale, "guidance_rescale": rescale}
        return actions.draw(
            *(pipe, class_id, int(number), seed or 0, options), lambda done: progress((done, int(steps)), unit="steps")
        )

    button.click(draw, [label, count, steps, scale, rescale, seed], gallery, api_name="generate", **LIMITS)


def make_app(models: Models) -> Any:
    """The demo, `gradio.Blocks`; its `launch` needs `launch_options`."""
    import gradio as gr

    with gr.Blocks(title="ViTok", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown("# ViTok\nPictures and videos through an autoencoder that is a plain vision transformer.")
        with gr.Tab("Reconstruct"):
            add_reconstruction(models)
        with gr.Tab("Compare"):
            add_comparison(models)
        if models.pipe is not None:
            with gr.Tab("Generate"):
                add_generation(models.pipe)
    return app


def launch_options() -> dict[str, Any]:
    """Nothing comes from other servers than the demo's own, and nothing is told them."""
    import gradio as gr

    options = {"theme": gr.themes.Default(**FONTS), "allowed_paths": [str(PHOTOGRAPH)], "ssr_mode": False}
    return options | {"enable_monitoring": False, "run_history": False, "footer_links": []}
