"""Which processor a figure was measured on."""

import platform
from pathlib import Path


def processor(*flags: str) -> str:
    """Its name, and which of some instructions it has, where any are asked for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    has = [flag for flag in flags if flag in fields.get("flags", "").split()]
    return f"{name} ({', '.join(has) or 'none of ' + ', '.join(flags)})" if flags else name
