"""The example of a teacher, and a student of it, as a user would run them."""

import json

from diffusers import AutoencoderKL

from tests.conftest import ASSETS, TINY
from vitok_hf import AutoencoderViTok
from vitok_hf.commands import main


def test_convolutional_teacher(run_example, tmp_path):
    tiny = ("--resolution", 16, "--train_batch_size", 2, "--max_train_steps", 2, "--dataloader_num_workers", 0)
    tiny = (*tiny, "--train_data_dir", ASSETS, "--report_to", "none", "--lr_warmup_steps", 1)
    held_out = ("--validation_data_dir", ASSETS, "--num_validation_images", 2)
    run_example("train_convolutional.py", *tiny, *held_out, "--width", 8, "--output_dir", "teacher")
    teacher = AutoencoderKL.from_pretrained(tmp_path / "teacher" / "vae")
    assert teacher.config.block_out_channels == [8, 16, 32, 32] and teacher.config.scaling_factor != 0.18215
    assert "model-index" in (tmp_path / "teacher" / "vae" / "README.md").read_text()
    (tmp_path / "student.json").write_text(json.dumps(TINY))
    options = (*tiny, "--model_config", "student.json", "--lpips_weight", 0, "--output_dir", "student")
    main("train", *map(str, options), "--teacher_model_name_or_path", "teacher/vae")
    student = AutoencoderViTok.from_pretrained(tmp_path / "student" / "vae")
    assert student.config.scaling_factor == teacher.config.scaling_factor
