"""Clips of moving drawings, the judge of motion, and the whole way from drawings to generated clips."""

import json

import av
import numpy as np
import pytest
import torch
from demo_data.motion import judge
from PIL import Image
from prepare_moving_clips import draw_clip, draw_path, write_clip

from tests.conftest import EXAMPLES, TINY
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.items import Clip
from vitok_hf.data.video import load_clip


MOTIONS = ["down", "grow", "left", "right", "turn", "up"]


def make_drawing() -> np.ndarray:
    """(48, 48, 3) uint8 on white; looks like itself from one side only."""
    drawing = np.full((48, 48, 3), 255, dtype=np.uint8)
    drawing[8:40, 8:40] = (250, 200, 40)
    drawing[12:20, 12:18], drawing[28:36, 14:38] = (40, 40, 160), (160, 30, 30)
    return drawing


@pytest.fixture
def drawings(tmp_path):
    folder = tmp_path / "drawings"
    folder.mkdir()
    Image.fromarray(make_drawing()).save(folder / "a_face.png")
    Image.fromarray(make_drawing()[:, ::-1]).save(folder / "b_face.png")
    return folder


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2)  # (3, T, H, W)


class TestClips:
    def test_files_and_classes(self, run_example, drawings, tmp_path):
        command = ("prepare_moving_clips.py", "--drawings", drawings, "--clips_per_class", 2, "--output_dir")
        for folder, seed in (("one", 3), ("same", 3), ("other", 4)):
            assert "6 x 2 clips of 2 drawings" in run_example(*command, folder, "--seed", seed)
        files = LabelledFiles([str(tmp_path / "one")], clip=Clip(8))
        assert files.classes == MOTIONS and np.bincount(files.labels).tolist() == [2] * 6
        assert len(list((tmp_path / "one").rglob("*.mp4"))) == 12
        with pytest.raises(ValueError, match="has results with seed 3, not 5"):
            run_example(*command, "one", "--seed", 5)
        Image.fromarray(make_drawing()[:, ::-1]).save(drawings / "a_face.png")
        with pytest.raises(ValueError, match=r"has results with other files, 1 changed \(a_face.png\)"):
            run_example(*command, "one", "--seed", 3)
        one, same, other = (load_evaluation_images(tmp_path / name, 64, 12, 8) for name in ("one", "same", "other"))
        assert one.shape == (12, 3, 8, 64, 64)
        assert torch.equal(one, same) and not torch.equal(one, other)
        drawn = (one.amin(dim=1) < 128).sum(dim=(2, 3))  # (12, T)
        assert drawn.min() > 20

    def test_read_back_as_written(self, tmp_path):
        frames = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        write_clip(frames, tmp_path / "noise.mp4")
        assert np.array_equal(load_clip(tmp_path / "noise.mp4", 0.0, 8), frames)

    @pytest.mark.parametrize("motion", MOTIONS)
    def test_drawings_stay_inside(self, motion):
        rng = np.random.default_rng(0)
        for _ in range(50):
            x, y, side, angle = draw_path(motion, rng, 8, 64).T
            for centre in (x, y):
                assert (centre - side / 2).min() > -1e-9 and (centre + side / 2).max() < 64 + 1e-9
            changes = [np.ptp(values) for values in (x, y, side, angle)]
            expected = {"right": 0, "left": 0, "up": 1, "down": 1, "grow": 2, "turn": 3}[motion]
            assert [change > 1e-9 for change in changes] == [index == expected for index in range(4)]

    @pytest.mark.parametrize(
        "options, message",
        [
            (("--clips_per_class", 0), "`clips_per_class` must be at least 1, but is 0"),
            (("--exclude", "a_", "b_"), "`exclude` .* leaves no drawing"),
        ],
    )
    def test_errors(self, run_example, drawings, options, message):
        with pytest.raises(ValueError, match=message):
            run_example("prepare_moving_clips.py", "--drawings", drawings, "--output_dir", "clips", *options)

    def test_unknown_motion(self):
        with pytest.raises(ValueError, match='`motion` must be one of right, .*, but is "jump"'):
            draw_path("jump", np.random.default_rng(0), 8, 64)


class TestJudge:
    @pytest.mark.parametrize("motion", MOTIONS)
    def test_motions(self, motion):
        for seed in range(5):
            path = draw_path(motion, np.random.default_rng(seed), 8, 64)
            frames = draw_clip(make_drawing(), path, 64)
            assert judge(to_tensor(frames)) == motion
            noise = np.random.default_rng(seed).normal(0, 8, frames.shape)
            assert judge(to_tensor(np.clip(frames + noise, 0, 255).astype(np.uint8))) == motion

    def test_none(self):
        still = draw_clip(make_drawing(), np.tile([32.0, 32.0, 30.0, 0.0], (8, 1)), 64)
        mirrored = np.concatenate([still[:4], still[4:, :, ::-1]])  # changed, but neither moved nor turned
        paths = {  # centre x and y, side and angle, from the first frame to the last
            "diagonal": ([20, 20, 30, 0], [40, 40, 30, 0]),
            "moves and grows": ([14, 32, 20, 0], [44, 32, 36, 0]),
            "shrinks": ([32, 32, 40, 0], [32, 32, 20, 0]),
        }
        lines = [np.linspace(*ends, 8) for ends in paths.values()]
        shown = [still, mirrored, np.full_like(still, 255)]
        shown += [draw_clip(make_drawing(), line, 64) for line in lines]
        assert [judge(to_tensor(frames.copy())) for frames in shown] == ["none"] * 6


def test_from_drawings_to_samples(run_example, drawings, tmp_path):
    """The commands of docs/train_generator.md with tiny models and two steps."""
    run_example("prepare_moving_clips.py", "--drawings", drawings, "--output_dir", "clips", "--clips_per_class", 2)
    video = TINY | {"temporal_patch_size": 4, "sample_size": 64, "sample_frames": 8, "qk_norm": True}
    (tmp_path / "vae.json").write_text(json.dumps(video))
    (tmp_path / "dit.json").write_text(json.dumps({"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}))
    short = ("--train_batch_size", 2, "--max_train_steps", 2, "--compile", "False", "--mixed_precision", "no")
    short += ("--dataloader_num_workers", 0, "--logging_steps", 1, "--validation_data_dir", "clips")
    configs = EXAMPLES / "configs"
    run_example(
        *("train_vitok.py", "--config", configs / "video-tiny-4x8-stage1.yaml", "--model_config", "vae.json"),
        *("--train_data_dir", "clips", "--num_validation_images", 2, *short, "--output_dir", "output"),
    )
    out = run_example(
        *("cache_latents.py", "--vae_name_or_path", "output/vae", "--train_data_dir", "clips"),
        *("--num_workers", 0, "--output_dir", "latents"),
    )
    assert "12 latents of 6 classes" in out
    run_example(
        *("train_dit.py", "--config", configs / "dit-video-tiny-4x8.yaml", "--model_config", "dit.json"),
        *("--vae_name_or_path", "output/vae", "--latents_dir", "latents", "--num_validation_images", 2, *short),
        *("--num_inference_steps", 2, "--output_dir", "output-dit"),
    )
    out = run_example(
        *("evaluate_motion.py", "--pipeline", "output-dit/pipeline", "--data_dir", "clips"),
        *("--num_samples", 2, "--num_inference_steps", 2),
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["asked for", *MOTIONS, "mean"]
    assert {row[1] for row in rows[1:]} == {"1.00"}
    assert Image.open(tmp_path / "motion" / "frames.png").size == (2 * 8 * 66 + 8, 6 * 66)
    with av.open(str(tmp_path / "motion" / "samples.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (6 * 64, 2 * 64, 3)
    out = run_example(
        *("plot_metrics.py", "--metrics", "vae=output/metrics.jsonl", "output-dit/metrics.jsonl"),
        *("--keys", "loss", "clips_ema_loss", "--logarithmic", "--output", "plots/loss.png"),
    )
    plot = np.asarray(Image.open(tmp_path / "plots" / "loss.png").convert("RGB"))
    assert plot.shape == (400, 800, 3)
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # one of each curve
        assert np.any(np.abs(plot.astype(int) - colour).max(axis=2) < 20)


def test_plot_names_the_keys(run_example, tmp_path):
    for folder in ("lr=1", "."):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    run_example("plot_metrics.py", "--metrics", "lr=1/metrics.jsonl", "a=lr=1/metrics.jsonl")
    with pytest.raises(ValueError, match=r"`keys` \['x'\] are not in .*, which has loss"):
        run_example("plot_metrics.py", "--metrics", "metrics.jsonl", "--keys", "x")
