"""Peak memory: of an accelerator as PyTorch counts it; of this process as Linux does, mapped files included."""

from pathlib import Path

import torch


def reset_peak_memory(device: torch.device | str = "cpu") -> int:
    """Makes `peak_memory` count from now on. Returns the bytes that are in use now.

    Raises:
        OSError: On a CPU, if the system is not Linux.
    """
    if torch.device(device).type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Largest number of bytes since the last reset: allocated on an accelerator, or the resident set."""
    if torch.device(device).type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
