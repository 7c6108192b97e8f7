"""Sends pictures or videos through an autoencoder: reconstructions, comparisons side by side, PSNR and SSIM.

    python examples/reconstruct.py                                  # a bundled checkpoint on a shipped photograph
    python examples/reconstruct.py --input holiday.jpg film.mp4 folder/ --model MODEL --output_dir out

MODEL is whatever `AutoencoderViTok.from_pretrained` takes. Sizes that do not fit the patches are padded by repeating
the last rows and columns, and cropped back.
"""

import argparse
import time
from pathlib import Path

import av
import torch
from accelerate import PartialState
from PIL import Image

from vitok_hf import AutoencoderViTok
from vitok_hf.evaluation.metrics import psnr, ssim
from vitok_hf.evaluation.reconstruction import fold_frames, reconstruct, save_comparison, side_by_side
from vitok_hf.training.data import VIDEO_SUFFIXES, list_files, load_image


def timed_reconstruction(vae: AutoencoderViTok, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    reconstructions = reconstruct(vae, images)  # on the CPU, hence complete
    return reconstructions, time.perf_counter() - began


def report(
    name: str, size: tuple[int, int], scores: list[torch.Tensor], seconds: float, vae: AutoencoderViTok
) -> None:
    p = vae.spatial_compression_ratio
    padded = " (padded)" if size[0] % p or size[1] % p else ""
    means = [torch.cat(values).mean().item() for values in zip(*scores)]
    print(f"{name}: {size[1]}x{size[0]}{padded}  PSNR {means[0]:.2f} dB  SSIM {means[1]:.4f}  {seconds:.2f} s")


def reconstruct_image(vae: AutoencoderViTok, path: Path, output_dir: Path) -> None:
    image = torch.from_numpy(load_image(path).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
    reconstruction, seconds = timed_reconstruction(vae, image)
    Image.fromarray(reconstruction[0].permute(1, 2, 0).numpy()).save(output_dir / f"{path.stem}_reconstruction.png")
    save_comparison(output_dir / f"{path.stem}_comparison.png", image, reconstruction)
    report(path.name, image.shape[2:], [(psnr(reconstruction, image), ssim(reconstruction, image))], seconds, vae)


def reconstruct_video(vae: AutoencoderViTok, path: Path, output_dir: Path) -> None:
    """Clip by clip, so that the memory does not grow with the length of the video."""
    clip_frames = max(8 if vae.is_image_model else vae.config.sample_frames, vae.temporal_compression_ratio)
    scores, seconds, clip = [], 0.0, []
    target = output_dir / f"{path.stem}_comparison.mp4"
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        rate = source.streams.video[0].average_rate
        stream = None
        frames = source.decode(video=0)
        while True:
            clip = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for _, frame in zip(range(clip_frames), frames)]
            if not clip:
                break
            video = torch.stack(clip).permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)
            reconstruction, elapsed = timed_reconstruction(vae, video)
            seconds += elapsed
            pair = [fold_frames(x) for x in (video, reconstruction)]  # (T, 3, H, W)
            scores.append((psnr(pair[1], pair[0]), ssim(pair[1], pair[0])))
            if stream is None:
                stream = sink.add_stream("libx264", rate=rate, options={"crf": "14"})
                stream.height, stream.width = (side // 2 * 2 for side in (video.shape[3], 2 * video.shape[4]))
                stream.pix_fmt = "yuv420p"
            for picture in side_by_side(*pair)[:, : stream.height].numpy():
                sink.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if stream is None:
            raise ValueError(f'"{path}" holds no video frames.')
        sink.mux(stream.encode())
    report(f"{path.name}, {sum(len(score) for score, _ in scores)} frames", video.shape[3:], scores, seconds, vae)


def main():
    assets = Path(__file__).parent / "assets"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=[assets / "astronaut.png"], help="pictures, videos, folders")
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="folder, Hub id or bundled name")
    parser.add_argument("--subfolder", help="folder of the model inside --model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output_dir", type=Path, default=Path("reconstructions"))
    args = parser.parse_args()

    vae = AutoencoderViTok.from_pretrained(
        args.model, subfolder=args.subfolder, torch_dtype=getattr(torch, args.dtype)
    )
    vae = vae.to(PartialState().default_device)
    config = vae.config
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    parameters = sum(parameter.numel() for parameter in vae.parameters()) / 1e6
    print(
        f"{args.model}: {parameters:.1f} M parameters; {values} values -> {config.latent_channels} latents, "
        f"{values / config.latent_channels:g}:1"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.input:
        for file in list_files(path):
            is_video = file.suffix.lower() in VIDEO_SUFFIXES
            (reconstruct_video if is_video else reconstruct_image)(vae, file, args.output_dir)
    print(f"Reconstructions and comparisons (original left) are in {args.output_dir}/")


if __name__ == "__main__":
    main()
