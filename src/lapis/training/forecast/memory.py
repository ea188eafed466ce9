"""The most memory that this process has held, of a GPU or of the machine. On Linux it is watched for a while; elsewhere
a CPU's is the peak since the process began."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


class MemoryWatch:
    """The peak from its making on.

    Attributes:
        held: Bytes that were in use when the watch began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device)
            return
        _give_back()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        except OSError:
            pass
        self.held = _status("VmRSS") or peak(device)

    @property
    def peak(self) -> int:
        """Bytes."""
        return peak(self.device)


def peak(device: torch.device) -> int:
    """The most bytes that this process has held of a GPU, or of the machine's memory, since it began, or since a
    `MemoryWatch` did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _status("VmHWM") or since_start


def _give_back() -> None:
    """Has the allocator return what is free, so that it does not count."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another allocator than glibc's
        return


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
