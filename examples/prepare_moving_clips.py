r"""Writes clips of drawings that move: a small data set of videos, whose classes are kinds of motion.

    python examples/prepare_moving_clips.py --drawings data/train/emoji/face --output_dir clips/train
    python examples/prepare_moving_clips.py --drawings data/test/emoji/face --output_dir clips/test \
        --clips_per_class 20 --seed 1 --exclude emojione-v1 openmoji

A clip shows one drawing on white, which moves smoothly to the `right` or `left`, `up` or `down`, or, in its place,
grows (`grow`) or turns to either side (`turn`); the folder says which. Drawing, place and speed are random, a function
of --seed and the number of the clip. The mp4 files are lossless, in RGB, which not every player shows.
"""

from functools import partial
from pathlib import Path

import av
import numpy as np
from demo_data.download import save_as
from PIL import Image, ImageOps
from tqdm import tqdm

from vitok_hf.commands import make_parser, run_command
from vitok_hf.data.claims import claim_folder
from vitok_hf.data.files import IMAGE_SUFFIXES, list_files
from vitok_hf.data.media import load_image


DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}  # axis (x, y), and sign along it
MOTIONS = (*DIRECTIONS, "grow", "turn")
SIDE = (0.4, 0.55)  # of the drawing, a share of the frame's
TRAVEL = (0.55, 1.0)  # a share of the room there is
GROWN_FROM, GROWN_TO = (0.25, 0.35), (0.55, 0.7)
TURN = (60.0, 150.0)  # degrees
NUM_FRAMES, FPS, SIZE = 8, 8, 64  # of the clips; the side in pixels
SUPERSAMPLING = 4  # places are exact to a quarter of a pixel


def draw_path(motion: str, rng: np.random.Generator, num_frames: int, size: int) -> np.ndarray:
    """Where a drawing is: (T, 4), the centre x and y and the side in pixels, and the angle in degrees.

    Its square stays inside the frame, `size` pixels a side (but for its corners, when it turns).

    Raises:
        ValueError: If there is no such motion.
    """
    if motion not in MOTIONS:
        raise ValueError(f'`motion` must be one of {", ".join(MOTIONS)}, but is "{motion}".')
    time = np.linspace(0.0, 1.0, num_frames)
    sides = np.full(num_frames, size * rng.uniform(*SIDE))
    if motion == "grow":
        sides = size * (rng.uniform(*GROWN_FROM) * (1 - time) + rng.uniform(*GROWN_TO) * time)
    room = size - sides.max()
    centres = sides.max() / 2 + np.tile(rng.uniform(0.0, room, 2), (num_frames, 1))  # (T, 2)
    angles = np.zeros(num_frames)
    if motion in DIRECTIONS:
        axis, sign = DIRECTIONS[motion]
        travel = room * rng.uniform(*TRAVEL)
        path = sides[0] / 2 + rng.uniform(0.0, room - travel) + travel * time
        centres[:, axis] = path[::sign]
    elif motion == "turn":
        angles = rng.choice([-1, 1]) * rng.uniform(*TURN) * time
    return np.column_stack([centres, sides, angles])


def draw_clip(drawing: np.ndarray, path: np.ndarray, size: int) -> np.ndarray:
    """A drawing on white (h, w, 3) along the path (T, 4) of `draw_path`: (T, size, size, 3) uint8."""
    frames = []
    for x, y, side, angle in path:
        pixels = max(1, round(side * SUPERSAMPLING))
        sprite = ImageOps.pad(Image.fromarray(drawing), (pixels, pixels), Image.Resampling.LANCZOS, "white")
        sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
        frame = Image.new("RGB", (size * SUPERSAMPLING,) * 2, "white")
        frame.paste(sprite, tuple(round((centre - side / 2) * SUPERSAMPLING) for centre in (x, y)))
        frames.append(np.asarray(frame.reduce(SUPERSAMPLING)))
    return np.stack(frames)


def write_clip(frames: np.ndarray, path: Path) -> None:
    """(T, H, W, 3) uint8 to an mp4 file that reads back as it is."""
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=FPS, options={"crf": "0"})
        (stream.height, stream.width), stream.pix_fmt = frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main():
    parser = make_parser("prepare_moving_clips.py", __doc__)
    parser.add_argument("--drawings", type=Path, required=True, help="folder of pictures on white or transparent")
    parser.add_argument("--exclude", nargs="+", default=[], help="leave out files whose names begin so")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--clips_per_class", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.clips_per_class < 1:
        raise ValueError(f"`clips_per_class` must be at least 1, but is {args.clips_per_class}.")
    drawings = list_files(args.drawings, IMAGE_SUFFIXES)
    drawings = [file for file in drawings if not file.name.startswith(tuple(args.exclude))]
    if not drawings:
        raise ValueError(f'`exclude` {args.exclude} leaves no drawing of "{args.drawings}": name fewer.')

    claim_folder(args.output_dir, {"seed": args.seed, "num_frames": NUM_FRAMES, "size": SIZE}, drawings)
    for number, motion in enumerate(MOTIONS):
        for index in tqdm(range(args.clips_per_class), desc=motion):
            rng = np.random.default_rng((args.seed, number, index))
            drawing = load_image(drawings[rng.integers(len(drawings))])
            clip = draw_clip(drawing, draw_path(motion, rng, NUM_FRAMES, SIZE), SIZE)
            save_as(args.output_dir / motion / f"{index:04d}.mp4", partial(write_clip, clip))
    print(f"{len(MOTIONS)} x {args.clips_per_class} clips of {len(drawings)} drawings in {args.output_dir}")


if __name__ == "__main__":
    run_command(main)
