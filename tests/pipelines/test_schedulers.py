"""Every scheduler that diffusers exports, next to a loop that is written by hand, or refused with a reason."""

import inspect

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from tests.conftest import assert_close
from tests.dit import make_pipeline, sample
from vitok_hf.pipelines.schedulers import why_unsupported


STEPS = 4
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
REFUSED = {
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "CogVideoXDPMScheduler": "needs model_output, old_pred_original_sample, timestep, timestep_back, sample",
    "DDPMWuerstchenScheduler": "a timestep for each sample",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "HeliosDMDScheduler": "stages",
    "HeliosScheduler": "stages",
    "KarrasVeScheduler": "needs model_output, sigma_hat, sigma_prev, sample_hat",
    "PiflowScheduler": "a policy",
    "RFD4ProteinaScheduler": "proteins",
    "RePaintScheduler": "needs model_output, timestep, sample, original_image, mask",
    "SCMScheduler": "TrigFlow",
    "ScoreSdeVeScheduler": "no `step`",
    "VQDiffusionScheduler": "discrete tokens",
}


def exported_schedulers() -> list[type[SchedulerMixin]]:
    """But those that stand for a package that is not installed."""
    classes = (getattr(diffusers, name, None) for name in dir(diffusers) if name.endswith("Scheduler"))
    return [cls for cls in classes if inspect.isclass(cls) and issubclass(cls, SchedulerMixin)]


def variants(cls: type[SchedulerMixin]) -> list[dict]:
    """Every spacing of timesteps, and every kind of sigmas, that the class knows."""
    known = inspect.signature(cls.__init__).parameters
    found = [{}]
    if "timestep_spacing" in known:
        found += [{"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")]
    found += [{name: True} for name in ("karras", "exponential", "beta", "flow") if f"use_{name}_sigmas" in known]
    return [
        {name if name == "timestep_spacing" else f"use_{name}_sigmas": value for name, value in options.items()}
        for options in found
    ]


def make(cls: type[SchedulerMixin], options: dict | None = None) -> SchedulerMixin:
    options = NEEDED.get(cls.__name__, {}) | (options or {})
    if options.get("use_flow_sigmas"):
        options["prediction_type"] = "flow_prediction"
    if "clip_sample" in inspect.signature(cls.__init__).parameters:
        options["clip_sample"] = False
    return cls(**options)


@torch.no_grad()
def by_hand(pipe, scheduler: SchedulerMixin) -> torch.Tensor:
    """What four steps without guidance and without a class give."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 4, 4, generator=generator)
    scheduler.set_timesteps(STEPS)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        inputs = latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, timestep)
        prediction = pipe.transformer(inputs.float(), timestep).sample
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
    return latents


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.mark.parametrize("cls", exported_schedulers(), ids=lambda cls: cls.__name__)
class TestAll:
    def test_equal_to_a_loop_by_hand_or_refused(self, pipe, cls):
        """On the first call and on the next."""
        if cls.__name__ in REFUSED:
            pipe.scheduler = make(cls)
            with pytest.raises(ValueError, match=f"{cls.__name__} is not supported: .*{REFUSED[cls.__name__]}"):
                sample(pipe)
            return
        for options in variants(cls):
            pipe.scheduler = make(cls, options)
            try:
                make(cls, options).set_timesteps(STEPS)
            except ValueError:  # a spacing that its message says it does not know
                with pytest.raises(ValueError, match=f"{cls.__name__} cannot make 4 steps .*not supported"):
                    sample(pipe)
                continue
            expected = by_hand(pipe, make(cls, options))
            assert expected.isfinite().all(), options
            for _ in range(2):
                actual = sample(pipe, None, num_inference_steps=STEPS)
                tolerance = 1e-5 * max(1.0, expected.abs().max().item())
                assert_close(actual, expected.to(actual.dtype), atol=tolerance)


def test_all_are_there():
    names = {cls.__name__ for cls in exported_schedulers()}
    assert len(names) > 40 and names >= set(REFUSED)


class TestSettings:
    def test_dynamic_shift_follows_the_number_of_tokens(self):
        pipe = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), patch_size=2)
        shifts, set_timesteps = [], pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda *args, mu, **kwargs: (
            shifts.append(mu) or set_timesteps(*args, mu=mu, **kwargs)
        )
        sample(pipe, height=256, width=256, num_inference_steps=1)  # 32 x 32 latents, 16 x 16 tokens
        sample(pipe, height=1024, width=1024, num_inference_steps=1, guidance_scale=1.0, labels="cat")
        assert shifts == pytest.approx([0.5, 1.15])

    def test_clipping_is_warned_of(self, monkeypatch):
        messages = []
        monkeypatch.setattr("vitok_hf.pipelines.schedulers.logger.warning", messages.append)
        make_pipeline(scheduler=DDIMScheduler())
        assert len(messages) == 1 and "clip_sample=False" in messages[0]
        pipe = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
        sample(pipe)
        assert len(messages) == 1
        pipe.scheduler = DDIMScheduler.from_config(DDPMScheduler().config)
        sample(pipe)
        assert len(messages) == 2


class TestLimits:
    def test_a_config_with_entries_of_another(self, pipe):
        """As `from_config` keeps them: DDIM has no shift."""
        flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe.scheduler = DDIMScheduler.from_config(flow.config, clip_sample=False)
        assert_close(sample(pipe, None), by_hand(pipe, DDIMScheduler(clip_sample=False)))

    def test_subclasses(self):
        mine = type("Mine", (diffusers.SCMScheduler,), {})()
        assert "TrigFlow" in why_unsupported(mine) and why_unsupported(FlowMatchEulerDiscreteScheduler()) is None

    def test_too_few_steps(self, pipe):
        pipe.scheduler = PNDMScheduler()
        with pytest.raises(ValueError, match="PNDMScheduler cannot make 2 steps .*: change `num_inference_steps`"):
            sample(pipe, num_inference_steps=2)

    @pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler"])
    def test_noise_cannot_be_predicted_from_noise_alone(self, pipe, name):
        options = {"rescale_betas_zero_snr": True, "clip_sample": False}
        cls = getattr(diffusers, name)
        pipe.scheduler = cls(timestep_spacing="trailing", **options)
        with pytest.raises(ValueError, match=f"{name} starts where there is only noise"):
            sample(pipe)
        pipe.scheduler = cls(timestep_spacing="trailing", prediction_type="v_prediction", **options)
        assert sample(pipe).isfinite().all()

    @pytest.mark.parametrize("value", [0.0, 0.5])
    def test_rescaled_guidance_of_a_constant(self, monkeypatch, value):
        """As untrained models give it."""
        pipe = make_pipeline()
        monkeypatch.setattr(
            pipe.transformer, "forward", lambda hidden_states, **_: (torch.full_like(hidden_states, value),)
        )
        plain, rescaled = (sample(pipe, guidance_rescale=rescale) for rescale in (0.0, 1.0))
        assert plain.isfinite().all()
        assert_close(rescaled, plain)
