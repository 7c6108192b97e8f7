"""How something was measured; stored with what was measured."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Protocol:
    """Everything that a value depends on besides the model and the data.

    The fields after `fps` say in words what the code of this package does, so that results of a version that does
    otherwise are told apart.

    Args:
        resolution: Side in pixels of the square that a picture is brought to; `None`: every picture as it is.
        num_frames: Frames of a clip, the first of each video; 1: pictures.
        fps: Frames a second of clips; `None`: all frames of the video.
        crop: Which part of the picture is kept.
        resize_filter: Filter that brings it to `resolution`.
        value_range: In which, and in what precision, pixels are compared.
        rounding: What happens to a model's output before anything is measured.
        averaging: PSNR, SSIM, MS-SSIM and LPIPS are means of values of single pictures, for clips of the means over
            their frames. No PSNR is above 58.92 dB, see `vitok_hf.evaluation.metrics.psnr`.
        statistics: How features become values.
        networks: "inception", "dino", "i3d", "lpips" -> {"name": architecture and preprocessing, "sha256": of the
            weights}, those that were used.
    """

    resolution: int | None = 256
    num_frames: int = 1
    fps: float | None = None
    crop: str = "central square"
    resize_filter: str = "bicubic, antialiased (Pillow, reducing_gap 3)"
    value_range: str = "0 to 255, RGB, float64"
    rounding: str = "clipped and rounded to uint8"
    averaging: str = "mean over frames, then over items; PSNR at most 58.92 dB"
    statistics: str = "float64; unbiased covariances; IS of 10 splits, shuffled; precision and recall of 3 neighbours"
    networks: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("resolution", "num_frames", "fps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` is {value}, but must be positive.")
        if self.resolution is None:
            object.__setattr__(self, "crop", "none")
            object.__setattr__(self, "resize_filter", "none")

    @classmethod
    def from_dict(cls, values: dict) -> "Protocol":
        """Inverse of `dataclasses.asdict`; raises `ValueError` for a protocol with other fields."""
        if other := sorted(set(values) ^ {f.name for f in fields(cls)}):
            raise ValueError(
                f"The stored protocol and this version's differ in the fields {', '.join(other)}: measure again."
            )
        return cls(**values)

    def differences(self, other: "Protocol") -> list[str]:
        """Names of the fields that differ. A network counts that both used: without it, its metrics are missing."""
        names = [f.name for f in fields(self) if f.name != "networks"]
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        shared = sorted(set(self.networks) & set(other.networks))
        return differing + [f"networks.{name}" for name in shared if self.networks[name] != other.networks[name]]
