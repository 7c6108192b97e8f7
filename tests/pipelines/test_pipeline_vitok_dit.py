import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.callbacks import PipelineCallback
from diffusers.utils.torch_utils import randn_tensor

from tests.conftest import assert_close
from tests.dit import NULL, make_pipeline, record_batches, sample, seeds
from vitok_hf import ViTokDiTPipeline


CPU = torch.device("cpu")


class TestLabels:
    def test_names(self):
        names = {"cat": 0, "golden retriever": 1, "retriever": 1, "crane": 2, "lifting device": 3, "dog": 4}
        assert make_pipeline().labels == names
        assert list(make_pipeline().labels) == sorted(names)

    @pytest.mark.parametrize(
        "labels, ids",
        [
            ("golden retriever", [1]),
            ("retriever", [1]),
            ("golden retriever, retriever", [1]),
            ([[1], ["cat"]], [1, 0]),
            (torch.tensor([[2], [3]]), [2, 3]),
            (np.array(3), [3]),
            (("cat", 3, "dog", NULL), [0, 3, 4, NULL]),
        ],
    )
    def test_ids(self, labels, ids):
        pipe = make_pipeline()
        batches = record_batches(pipe)
        assert pipe.get_label_ids(labels) == ids
        sample(pipe, labels, guidance_scale=1.0, num_inference_steps=1)
        assert batches == [ids]

    @pytest.mark.parametrize(
        "label, message",
        [
            ("Golden retreiver", 'no class "Golden retreiver": did you mean golden retriever'),
            ("xyz", 'no class "xyz": `labels` has them all'),
            ("crane", 'Classes 2, 3 are all called "crane"'),
            (6, "`class_labels` must be a name, or an id from 0 to 4 .5 means no class.*, but is 6"),
            (["cat", None], "no class.*, but is None"),
            ([], "`class_labels` is empty"),
        ],
    )
    def test_errors(self, label, message):
        with pytest.raises(ValueError, match=message):
            sample(make_pipeline(), label)

    def test_without_names(self):
        pipe = make_pipeline(id2label=None)
        assert pipe.labels == {} and pipe.get_label_ids(3) == [3]
        with pytest.raises(ValueError, match='no names for its classes, so "cat" is unknown'):
            pipe.get_label_ids("cat")


class TestGuidance:
    def test_one_batch_of_two_halves(self, pipe):
        batches = record_batches(pipe)
        sample(pipe, guidance_scale=2.0)
        assert batches == [[NULL, NULL, 0, 4]] * 4

    @pytest.mark.parametrize(
        "arguments", [{"guidance_scale": 1.0}, {"guidance_scale": 0.0}, {"labels": None}, {"labels": NULL}]
    )
    def test_none(self, pipe, arguments):
        batches = record_batches(pipe)
        sample(pipe, **arguments)
        assert batches == [[0, 4] if "labels" not in arguments else [NULL]] * 4

    @pytest.mark.parametrize(
        "interval, guided", [((0.0, 1.0), "1111"), ((0.25, 0.75), "0110"), ((0.0, 0.5), "1100"), ((0.5, 0.5), "0000")]
    )
    def test_interval(self, interval, guided):
        pipe = make_pipeline()
        batches = record_batches(pipe)
        sample(pipe, guidance_interval=interval)
        assert [len(batch) for batch in batches] == [2 + 2 * int(on) for on in guided]

    def test_interval_of_schedulers_with_more_evaluations_than_steps(self):
        pipe = make_pipeline(scheduler=HeunDiscreteScheduler())
        batches = record_batches(pipe)
        sample(pipe, num_inference_steps=6, guidance_interval=(0.0, 0.5))
        assert pipe.num_timesteps == 11 and [len(batch) for batch in batches] == [4] * 6 + [2] * 5

    @pytest.mark.parametrize("scale, rescale", [(1.0, 0.7), (3.0, 0.0), (3.0, 0.7), (3.0, 1.0)])
    def test_by_hand(self, pipe, scale, rescale):
        """DDIM and guidance by their formulas, in two forwards for each step."""
        shape = pipe.get_latent_shape(2)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        alphas = torch.cat([pipe.scheduler.alphas_cumprod, torch.ones(1)])  # the last is that of the clean latents
        labels, null = torch.tensor([0, 4]), torch.tensor([NULL, NULL])
        with torch.no_grad():
            for t in (750, 500, 250, 0):
                conditional, without = (pipe.transformer(x, t, ids).sample for ids in (labels, null))
                noise = without + scale * (conditional - without)
                for i in range(2) if scale > 1 else ():
                    rescaled = noise[i] * conditional[i].std() / noise[i].std()
                    noise[i] = rescale * rescaled + (1 - rescale) * noise[i]
                alpha, previous = alphas[t], alphas[t - 250 if t else -1]
                clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
                x = previous.sqrt() * clean + (1 - previous).sqrt() * noise
        assert_close(sample(pipe, guidance_scale=scale, guidance_rescale=rescale), x, atol=2e-3)

    def test_defaults_are_saved_along(self, tmp_path):
        pipe = make_pipeline(guidance={"guidance_scale": 2.0, "guidance_rescale": 0.5})
        pipe.save_pretrained(tmp_path)
        expected = sample(make_pipeline(), guidance_scale=2.0, guidance_rescale=0.5)
        for cls in (ViTokDiTPipeline, DiffusionPipeline):
            loaded = cls.from_pretrained(tmp_path)
            assert (loaded.config.guidance_scale, loaded.config.guidance_rescale) == (2.0, 0.5)
            assert torch.equal(sample(loaded), expected)
        other = sample(pipe, guidance_scale=3.0, guidance_rescale=0.0)
        assert torch.equal(other, sample(make_pipeline(), guidance_scale=3.0, guidance_rescale=0.0))
        assert torch.equal(sample(make_pipeline()), sample(pipe, guidance_scale=4.0, guidance_rescale=0.0))
        assert torch.equal(sample(make_pipeline(guidance={"guidance_scale": 0.0})), sample(pipe, guidance_scale=1.0))

    def test_faulty_defaults(self, tmp_path):
        with pytest.raises(ValueError, match="`guidance_rescale` must be .*, but is 2"):
            make_pipeline(guidance={"guidance_rescale": 2})
        make_pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"guidance_scale": "much"}))
        with pytest.raises(ValueError, match='model_index.json" is damaged, .*: `guidance_scale` must be'):
            ViTokDiTPipeline.from_pretrained(tmp_path)

    def test_learned_variances_are_left_out_or_handed_to_ddpm(self):
        batch = {"labels": ("cat", "dog"), "guidance_scale": 3.0}
        pipe = make_pipeline(out_channels=8)
        expected = sample(pipe, **batch)
        with torch.no_grad():
            pipe.transformer.proj_out.weight[4:] += 1.0  # of the variances
        torch.testing.assert_close(sample(pipe, **batch), expected, rtol=1e-4, atol=1e-3)
        steps, outputs = [], []
        pipe.scheduler = DDPMScheduler(clip_sample=False, variance_type="learned_range")
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda output, *args, **kwargs: steps.append(output) or step(output, *args, **kwargs)
        pipe.transformer.register_forward_hook(lambda *args: outputs.append(args[-1][0]))
        sample(pipe, **batch)
        assert torch.equal(steps[0][:, 4:], outputs[0][2:, 4:])  # of the half with classes
        without, conditional = outputs[0][:, :4].chunk(2)
        assert_close(steps[0][:, :4], without + 3 * (conditional - without))

        class Own(DDPMScheduler):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)

        samples = []
        for scheduler_class in (DDPMScheduler, Own):
            pipe.scheduler = scheduler_class(clip_sample=False, variance_type="learned_range")
            samples.append(sample(pipe, **batch))
        assert torch.equal(*samples)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # has no use for the entry
        sample(pipe, **batch)

    @pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DPMSolverMultistepScheduler])
    def test_learned_variances_that_a_scheduler_or_a_model_does_not_have(self, scheduler_class):
        scheduler = scheduler_class(variance_type="learned_range")
        pipe = make_pipeline(scheduler=scheduler, out_channels=4 if scheduler_class is DDPMScheduler else 8)
        with pytest.raises(ValueError, match='has variance_type="learned_range", but'):
            sample(pipe)


class TestRandomness:
    @pytest.mark.parametrize(
        "scheduler",
        [DDIMScheduler(clip_sample=False), DDPMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()],
    )
    def test_a_seed_gives_the_same_sample_in_any_batch(self, kind, scheduler):
        pipe = make_pipeline(kind, scheduler)
        arguments = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
        together = sample(pipe, ("cat", "dog", "crane, lifting device"), generator=seeds(1, 2, 3), **arguments)
        alone = sample(pipe, "dog", generator=seeds(2), **arguments)
        assert_close(together[1:2], alone, atol=2e-3)
        assert_close(sample(pipe, "dog", generator=seeds(2)[0], **arguments), alone)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_noise_does_not_depend_on_the_precision(self):
        noise = [
            make_pipeline().to(dtype=dtype).prepare_latents(2, None, None, None, seeds(1, 2), CPU)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        assert torch.equal(*noise)

    def test_eta_reaches_the_scheduler(self):
        pipe = make_pipeline()
        assert (sample(pipe, eta=1.0) - sample(pipe)).abs().max() > 0.1
        pipe.scheduler = EulerDiscreteScheduler()
        with pytest.raises(ValueError, match="`eta` is 1.0, but EulerDiscreteScheduler takes none"):
            sample(pipe, eta=1.0)

    def test_samples_of_a_label_are_neighbours(self, pipe):
        batches = record_batches(pipe)
        output = sample(pipe, num_images_per_label=2, generator=seeds(1, 2, 3, 4), guidance_scale=1.0)
        assert batches[0] == [0, 0, 4, 4]
        assert_close(output[3:], sample(pipe, "dog", generator=seeds(4), guidance_scale=1.0), atol=2e-3)

    def test_unconditional_model(self, kind):
        pipe = make_pipeline(kind, num_classes=0, id2label=None)
        assert sample(pipe, None).shape == pipe.get_latent_shape(1)
        assert len(sample(pipe, None, num_images_per_label=3)) == 3

    def test_latents(self, pipe):
        latents = randn_tensor(pipe.get_latent_shape(2), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(sample(pipe, latents=latents, generator=None), sample(pipe), rtol=1e-4, atol=1e-3)
        pipe.scheduler, inputs = EulerDiscreteScheduler(), []
        torch.testing.assert_close(sample(pipe, latents=latents, generator=None), sample(pipe), rtol=1e-4, atol=1e-3)
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
        sample(pipe, latents=latents, guidance_scale=1.0)
        assert_close(inputs[0], latents, atol=0.02)  # scaled up for the scheduler, and down again for the model

    def test_latents_bring_their_size(self, kind, pipe):
        size = {"height": 48, "width": 16} | ({"num_frames": 6} if kind == "video" else {})
        shape = pipe.get_latent_shape(2, **size)
        assert shape == (2, 4, *((3,) if kind == "video" else ()), 6, 2)
        assert sample(pipe, latents=torch.zeros(shape)).shape == shape
        assert sample(pipe, latents=torch.zeros(shape), **size).shape == shape
        with pytest.raises(ValueError, match="`latents` must have shape"):
            sample(pipe, latents=torch.zeros(shape), **size | {"height": 40})


class TestCallbacks:
    def test_what_a_callback_sees_and_changes(self):
        pipe, seen = make_pipeline(), []

        def callback(self, step, timestep, tensors):
            seen.append((self is pipe, step, int(timestep), int(pipe.current_timestep)))
            return {"latents": torch.zeros_like(tensors["latents"])}

        output = sample(pipe, callback_on_step_end=callback)
        assert seen == [(True, i, t, t) for i, t in enumerate((750, 500, 250, 0))]
        assert not output.any() and pipe.current_timestep is None
        for names in ([], None):
            sample(pipe, callback_on_step_end=lambda *args: args[-1], callback_on_step_end_tensor_inputs=names)

    def test_interruption(self):
        pipe, seen = make_pipeline(), []
        batches = record_batches(pipe)

        def callback(self, step, timestep, tensors):
            seen.append(tensors["latents"])
            pipe._interrupt = step == 1
            return tensors

        assert torch.equal(sample(pipe, callback_on_step_end=callback), seen[-1])
        assert len(batches) == 2
        sample(pipe)
        assert len(batches) == 6  # the next call is not interrupted

    def test_guidance_can_be_switched_off(self):
        class Cutoff(PipelineCallback):
            tensor_inputs = []

            def callback_fn(self, pipeline, step_index, timestep, tensors):
                assert tensors == {}
                pipeline._guidance_scale = 1.0
                return tensors

        pipe = make_pipeline()
        batches = record_batches(pipe)
        sample(pipe, callback_on_step_end=Cutoff())
        assert [len(batch) for batch in batches] == [4, 2, 2, 2]

    def test_progress_bar(self, capsys):
        pipe = make_pipeline(scheduler=HeunDiscreteScheduler())
        pipe.set_progress_bar_config(disable=False)
        sample(pipe, num_inference_steps=3)
        assert "5/5" in capsys.readouterr().err


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num_inference_steps": 4.0}, "`num_inference_steps` must be an integer from 1 to 10000, but is 4.0"),
            ({"guidance_interval": (0.5, 0.2)}, r"0 <= start <= stop <= 1, but is \(0.5, 0.2\)"),
            ({"height": 30}, "`height` must be a positive multiple of 8, but is 30"),
            ({"num_frames": 4}, "`num_frames` is 4, but this model makes images"),
            ({"generator": seeds(1)}, "`generator` has 1 entries for 2 samples"),
            ({"latents": torch.zeros(2, 4, 2, 4, 4)}, r"must have shape .*, but have \(2, 4, 2, 4, 4\)"),
            ({"num_images_per_label": 10**9}, "`num_images_per_label` 2000000000 make .* tokens, more than 4194304"),
        ],
    )
    def test_arguments(self, arguments, message):
        """All others are in tests/faults/arguments.py."""
        with pytest.raises(ValueError, match=message):
            make_pipeline()(["cat", "dog"], **arguments)

    def test_sizes_of_videos_and_patches(self):
        with pytest.raises(ValueError, match="`num_frames` must be a positive multiple of 2, but is 3"):
            make_pipeline("video")("cat", num_frames=3)
        with pytest.raises(ValueError, match="`height` must be a positive multiple of 16, but is 24"):
            make_pipeline(patch_size=2)("cat", height=24)

    def test_an_autoencoder_without_a_decoder(self):
        pipe = make_pipeline()
        pipe.vae.register_to_config(component="encoder")
        with pytest.raises(ValueError, match="but the autoencoder has no decoder"):
            pipe("cat")
        assert sample(pipe).shape[1] == 4

    @pytest.mark.parametrize("missing", ["transformer", "vae", "scheduler"])
    def test_parts_can_be_left_out(self, tmp_path, missing):
        make_pipeline().save_pretrained(tmp_path)
        pipe = ViTokDiTPipeline.from_pretrained(tmp_path, **{missing: None})
        assert pipe.components[missing] is None and pipe.labels["dog"] == 4
        with pytest.raises(ValueError, match=f"was loaded without {missing}: load it whole"):
            pipe("cat")

    @pytest.mark.parametrize("config", [{"in_channels": 8}, {"out_channels": 6}])
    def test_models_that_do_not_fit(self, config):
        with pytest.raises(ValueError, match="has latent_channels=4, but the transformer in_channels="):
            make_pipeline(**config)
