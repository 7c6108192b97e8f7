"""Threads that share a pipeline, and callbacks that call it again: what belongs to a call stays in it.

That each gets what it gets alone is what the campaign looks at (tests/faults/side_by_side.py).
"""

import copy
import pickle
from functools import partial

import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from tests.conftest import assert_close
from tests.dit import make_pipeline, sample
from tests.threads import together
from vitok_hf import ViTokDiTPipeline


class TestThreads:
    @pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, PNDMScheduler])
    def test_pipelines_that_share_a_scheduler(self, scheduler):
        first = make_pipeline(scheduler=scheduler())
        second = ViTokDiTPipeline(**first.components, id2label=first.config.id2label)
        second.set_progress_bar_config(disable=True)
        steps = (4, 7)
        expected = [sample(first, num_inference_steps=count) for count in steps]

        def run(pipe, count, meet):
            def callback(pipe, step, timestep, tensors):
                meet()

            return sample(pipe, callback_on_step_end=callback, num_inference_steps=count)

        outputs = together([partial(run, pipe, count) for pipe, count in zip((first, second), steps)])
        for output, alone in zip(outputs, expected):
            assert_close(output, alone)

    def test_what_a_thread_reads(self):
        pipe, seen = make_pipeline(), {}

        def read():
            return pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps, pipe.interrupt

        def run(steps, scale, meet):
            def callback(pipe, step, timestep, tensors):
                meet()
                seen.setdefault(steps, []).append((*read(), int(pipe.current_timestep), int(timestep)))
                meet()

            sample(pipe, callback_on_step_end=callback, num_inference_steps=steps, guidance_scale=scale)
            return read(), pipe.current_timestep

        after = together([partial(run, 2, 1.0), partial(run, 4, 3.0)])
        assert after == [((1.0, False, 2, False), None), ((3.0, True, 4, False), None)]
        for steps, scale in ((2, 1.0), (4, 3.0)):
            assert len(seen[steps]) == steps
            assert all(x[:4] == (scale, scale > 1, steps, False) and x[4] == x[5] for x in seen[steps])

    def test_an_interruption_from_outside_is_of_all_calls(self):
        pipe, steps = make_pipeline(), []

        def run(meet):
            def callback(pipe, step, timestep, tensors):
                steps.append(step)
                meet()
                meet()

            sample(pipe, callback_on_step_end=callback)

        def interrupt(meet):
            meet()
            pipe._interrupt = True
            meet()

        together([run, run, interrupt])
        assert steps == [0, 0]


class TestNested:
    def test_the_outer_call_goes_on_as_before(self):
        pipe, inner = make_pipeline(scheduler=DPMSolverMultistepScheduler()), []
        expected, expected_inner = sample(pipe), sample(pipe, "dog", guidance_scale=1.0, num_inference_steps=6)

        def callback(pipe, step, timestep, tensors):
            inner.append(sample(pipe, "dog", guidance_scale=1.0, num_inference_steps=6))
            assert pipe.guidance_scale == 4.0 and pipe.num_timesteps == 4 and pipe.current_timestep == timestep

        with pytest.raises(AttributeError, match="`guidance_scale` is that of a call: pass it"):
            pipe.guidance_scale = 7.0
        assert_close(sample(pipe, callback_on_step_end=callback), expected, atol=1e-3)
        for output in inner:
            assert_close(output, expected_inner, atol=1e-3)

    def test_copies_in_a_call_run_none(self):
        pipe, copies = make_pipeline(), []

        def callback(pipe, *_):
            copies.extend([copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))])

        sample(pipe, callback_on_step_end=callback)
        for other in copies[:2]:
            assert_close(sample(other, num_inference_steps=5), sample(pipe, num_inference_steps=5), atol=1e-3)
            assert len(other.scheduler.timesteps) == 5 and len(other._calls) == 1

    def test_a_call_that_fails_is_over(self):
        pipe = make_pipeline()
        expected = sample(pipe)
        with pytest.raises(ZeroDivisionError):
            sample(pipe, callback_on_step_end=lambda *_: 1 / 0)
        assert_close(sample(pipe), expected)
        assert len(pipe.scheduler.timesteps) == 4 and len(pipe._calls) == 1 and not pipe._calls[0].is_running


def test_a_copy_of_the_scheduler_is_as_it_was_set():
    """Some settings are not in its config."""
    pipe = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_shift(5.0)
    expected, inner = sample(pipe), []
    sample(pipe, callback_on_step_end=lambda *_: inner.append(sample(pipe)))
    assert_close(inner[0], expected, atol=1e-3)
