"""The most memory that this program has held."""

import contextlib
from pathlib import Path


def peak_rss() -> int | None:
    """Bytes of main memory that this program held at most; None where the system does not say.
    (ru_maxrss counts the parent's before exec.)
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return None


def peak_device_bytes() -> int | None:
    """Bytes that this program held at most on the first device; None where the backend does not
    count them, as on the CPU.
    """
    import jax  # late: a command line that is refused needs no jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
