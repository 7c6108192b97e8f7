"""Threads that share a pipeline or an autoencoder: each must get what it gets alone."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.conftest import assert_close, make_input, make_vae
from tests.dit import make_pipeline, sample
from tests.faults import Case, judge
from tests.threads import at_first_call, together
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline


SCHEDULERS = [
    partial(DDIMScheduler, clip_sample=False),
    DPMSolverMultistepScheduler,
    partial(DPMSolverMultistepScheduler, solver_order=3),
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]
# Each is a state of an autoencoder; a pair of one group, before and after a switch.
STATES = {
    "tiling": [
        lambda vae: vae.disable_tiling(),
        lambda vae: vae.enable_tiling(16, 2, 0.0),
        lambda vae: vae.enable_tiling(24, 4, 0.5),
    ],
    "window": [
        lambda vae: vae.disable_sliding_window(),
        lambda vae: vae.enable_sliding_window(1),
        lambda vae: vae.enable_sliding_window(2),
    ],
}
CALLS = {
    "forward": lambda vae, x: vae(x).sample,
    "forward of a list": lambda vae, x: torch.stack(vae(list(x)).sample),
    "slices": lambda vae, x: vae(x).sample,
    "encode": lambda vae, x: vae.encode(x).latent_dist.mode(),
    "streams": lambda vae, x: torch.cat(list(vae.decode_stream(vae.encode_stream(x.split(2, dim=2)))), dim=2),
}


def draw(pipe: ViTokDiTPipeline, job: dict[str, Any], meet: Callable[[], None] = lambda: None) -> torch.Tensor:
    """A job's sample; `meet` is called in each step, before what the job does there."""

    def callback(pipe: ViTokDiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        meet()
        if step == job["at"] and job["does"] == "interrupt":
            pipe._interrupt = True
        if step == job["at"] and job["does"] == "cut off":  # as diffusers' SDCFGCutoffCallback
            pipe._guidance_scale = 0.0
        if step == job["at"] and job["does"] == "nest":
            inner = sample(pipe, "dog", guidance_scale=2.5)
            return {"latents": tensors["latents"] + 0.1 * inner}
        meet()
        return {}

    generator = torch.Generator().manual_seed(job["seed"])
    return sample(pipe, ("cat", "dog"), callback_on_step_end=callback, generator=generator, **job["arguments"])


def draw_job(rng: random.Random) -> dict[str, Any]:
    arguments = {
        "guidance_scale": rng.choice([1.0, 1.5, 4.0, 8.0]),
        "guidance_rescale": rng.choice([0.0, 0.0, 0.7]),
        "num_inference_steps": rng.randint(4, 7),
        "guidance_interval": rng.choice([(0.0, 1.0), (0.25, 0.75)]),
    }
    does = rng.choice([None, None, "interrupt", "cut off", "nest"])
    return {"arguments": arguments, "does": does, "at": rng.randint(0, 3), "seed": rng.randint(0, 9)}


def compare_pipelines(scheduler: Callable, jobs: list[dict]) -> str:
    pipe = make_pipeline(scheduler=scheduler())
    try:
        alone = [draw(pipe, job) for job in jobs]
        results = together([partial(draw, pipe, job) for job in jobs])
    except Exception as error:  # of a scheduler that is in the middle of another call
        return judge(error)
    same = [torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in zip(results, alone)]
    return "harmless" if all(same) else "silent"


def switch(vae: AutoencoderViTok, call: str, group: str, before: int, after: int) -> tuple[torch.Tensor, ...]:
    """The result of a call during which another thread switches the state, and that of one without a switch."""
    x = make_input(vae, 2, 32, 40)
    x = x.unsqueeze(2).repeat(1, 1, 4, 1, 1) if call == "streams" and vae.is_image_model else x
    vae.use_slicing = call == "slices"
    STATES[group][before](vae)
    with torch.no_grad():
        expected = CALLS[call](vae, x)
        with at_first_call(vae.encoder.transformer_blocks[0], lambda: STATES[group][after](vae)):
            return CALLS[call](vae, x), expected


def compare_autoencoders(architecture: str, *arguments: Any) -> str:
    try:
        assert_close(*switch(make_vae(architecture), *arguments))
    except AssertionError:
        return "silent"
    return "harmless"


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    """Two of three share a pipeline, the others an autoencoder."""
    rng = random.Random(seed)
    for index in range(count):
        if index % 3 < 2:
            scheduler, jobs = SCHEDULERS[index % len(SCHEDULERS)], [draw_job(rng) for _ in range(rng.randint(2, 3))]
            yield f"pipeline, {scheduler}, {jobs}", partial(compare_pipelines, scheduler, jobs)
        else:
            group, call = rng.choice(list(STATES)), rng.choice(list(CALLS))
            states = rng.sample(range(3), 2)
            architecture = rng.choice(["v1", "v2", "video"])
            run = partial(compare_autoencoders, architecture, call, group, *states)
            yield f"autoencoder, {architecture}, {call}, {group}, {states}", run
