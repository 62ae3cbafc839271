"""What the cost model knows of each GPU architecture: the figures of one typical card, from its data sheet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parofx.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """One GPU architecture.

    Args:
        name: as compilers call it.
        card: whose figures these are.
        processors: streaming multiprocessors, or compute units.
        clock_ghz: boost clock.
        bandwidth_gbs: of device memory, GB/s.
        tensor_tflops: dense fp16 products accumulated in fp32.
        shared_bytes: shared memory a block may have.
        issue: thread instructions a processor issues per clock.
    """

    name: str
    card: str
    processors: int
    clock_ghz: float
    bandwidth_gbs: float
    tensor_tflops: float
    shared_bytes: int
    issue: int = 128

    @property
    def issue_rate(self) -> float:
        """Thread instructions of the whole card per microsecond."""
        return self.processors * self.issue * self.clock_ghz * 1e3


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("sm_80", "A100 SXM 80 GB", 108, 1.41, 2039, 312, 163 * 1024),
        Architecture("sm_89", "RTX 4090", 128, 2.52, 1008, 165, 99 * 1024),
        Architecture("sm_90", "H100 SXM", 132, 1.755, 3350, 989, 227 * 1024),
        Architecture("sm_100", "B200", 148, 1.85, 8000, 2250, 227 * 1024),
        Architecture("sm_120", "RTX 5090", 170, 2.41, 1792, 209, 99 * 1024),
        Architecture("gfx942", "MI300X", 304, 2.1, 5300, 1307, 64 * 1024, issue=64),
    )
}

#: The first architecture with tensor cores for bfloat16 and asynchronous copies.
OLDEST = (8, 0)


def architecture(name: str) -> Architecture:
    """Return what is known of an architecture.

    Raises:
        ConfigError: with the known names, if there is no such.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"architecture must be one of {sorted(ARCHITECTURES)}, got {name!r}")
    return ARCHITECTURES[name]


def nearest(major: int, minor: int) -> str:
    """Return the name of the architecture whose tables serve an NVIDIA card of a compute capability.

    | capability | tables | because |
    |-|-|-|
    | 8.0 | sm_80 | |
    | 8.6, 8.7, 8.9 | sm_89 | 99 KiB of shared memory |
    | 9.x | sm_90 | |
    | 10.x, 11.x | sm_100 | |
    | 12.x and later | sm_120 | the least shared memory of the newest |

    Raises:
        ConfigError: for cards before 8.0.
    """
    if (major, minor) < OLDEST:
        raise ConfigError(f"the Triton kernels need compute capability 8.0 or later, got {major}.{minor}")
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def architecture_of(device: torch.device) -> str:
    """Return the name of the architecture whose tables serve a device; a CPU stands for the interpreter.

    Raises:
        ConfigError: for cards before compute capability 8.0.
    """
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    return nearest(*torch.cuda.get_device_capability(device))
