"""A judge of the motion in clips of drawings on white, by rules."""

import numpy as np
import torch
from prepare_moving_clips import DIRECTIONS
from torch.nn import functional as F


WHITE = 224  # and above, in all channels
LEAST_TRAVEL = 0.1  # of the frame's side
LEAST_GROWTH = 1.5  # of the area
LEAST_TURN = 30  # degrees
TURNED_ERROR = 0.6  # of the difference between first and last frame, that is left when the first one is turned


def measure(clip: torch.Tensor) -> tuple[float, float, float]:
    """What is not white, over a clip (3, T, H, W) uint8, by lines fitted to its frames.

    Returns:
        How far its centre moves to the right and down, in shares of the frame's sides, and by what its area grows.
    """
    ink = (clip.amin(dim=0) < WHITE).double()  # (T, H, W)
    area = ink.sum(dim=(1, 2)).clamp(min=1)
    columns, rows = (torch.linspace(0, 1, side, dtype=torch.float64) for side in (ink.shape[2], ink.shape[1]))
    x, y = (ink.sum(dim=1) @ columns / area, ink.sum(dim=2) @ rows / area)  # (T,)
    time = torch.linspace(-0.5, 0.5, len(ink), dtype=torch.float64)
    right, down, growth = (time @ torch.stack([x, y, area.log()], dim=1) / time.square().sum()).tolist()
    return right, down, float(np.exp(growth))


def turned_error(clip: torch.Tensor) -> float:
    """How well the last frame of (3, T, H, W) uint8 is the first one, turned about its centre.

    Returns:
        Their squared difference at the best angle of at least `LEAST_TURN`, over that without turning.
    """
    first, last = 1.0 - clip[:, [0, -1]].float().transpose(0, 1) / 255  # (3, H, W), white is 0
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in first.shape[1:]), indexing="ij")
    centres = []
    for frame in (first, last):
        ink = (frame.amax(dim=0) > 1 - WHITE / 255).float()
        centres.append(torch.stack([(ink * axis).sum() for axis in (columns, rows)]) / ink.sum().clamp(min=1))
    angles = torch.deg2rad(torch.tensor([0.0, *range(LEAST_TURN, 361 - LEAST_TURN, LEAST_TURN // 3)]))
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)  # from places in the last frame to the first
    shifts = centres[0] - matrices @ centres[1]  # (angles, 2)
    grid = F.affine_grid(torch.cat([matrices, shifts[:, :, None]], dim=2), (len(angles), *first.shape), True)
    turned = F.grid_sample(first.expand(len(angles), -1, -1, -1), grid, align_corners=True)  # (angles, 3, H, W)
    errors = (turned - last).square().mean(dim=(1, 2, 3))
    return ((errors[1:].min() + 1e-6) / (errors[0] + 1e-6)).item()


def judge(clip: torch.Tensor) -> str:
    """The one motion that a clip (3, T, H, W) uint8 shows, of `MOTIONS`, or "none" if there is none or several."""
    right, down, growth = measure(clip)
    (aside, _), (travel, axis) = sorted([(abs(right), 0), (abs(down), 1)])
    moves, grows = travel > LEAST_TRAVEL, growth > LEAST_GROWTH
    if not moves and not grows:
        return "turn" if turned_error(clip) < TURNED_ERROR else "none"
    if moves and (grows or aside > travel / 2):
        return "none"
    sign = 1 if (right, down)[axis] > 0 else -1
    return "grow" if grows else next(name for name, way in DIRECTIONS.items() if way == (axis, sign))
