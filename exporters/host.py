"""What the processor of this machine can do, as far as it decides which model file is fast on it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# Channels per block of onnxruntime's NCHWc layout (mlas, `NchwcBlockSize`): 16 with AVX-512, 8 on any other x86-64.
# Elsewhere the layout is not used by default and the float32 lanes of one 128-bit register count.
_BLOCK = {"avx512": 16, "avx2": 8, "avx": 8, "sse": 8, "neon": 4}


def isa() -> str:
    """The widest vector extension of this CPU: "avx512", "avx2", "avx", "sse", "neon", or the machine's own name."""
    machine = platform.machine().lower()
    if machine in {"arm64", "aarch64"}:
        return "neon"
    if machine not in {"x86_64", "amd64"}:
        return machine
    flags = cpu_flags()
    if "avx512f" in flags:
        return "avx512"
    return next((name for name in ("avx2", "avx") if name in flags), "sse")


def vector_block() -> int:
    """The number of channels that onnxruntime computes together here; widths that are multiples of it are fastest."""
    return _BLOCK.get(isa(), 4)


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 without intermediate saturation (AVX-512 VNNI, AVX VNNI; NEON always)."""
    return isa() == "neon" or bool(cpu_flags() & {"avx512_vnni", "avx_vnni"})


def cpu_name() -> str:
    """The processor's name as the operating system tells it."""
    return _cpuinfo().get("model name", "") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags; empty where the operating system has no `/proc/cpuinfo`."""
    return frozenset(_cpuinfo().get("flags", "").split())


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor."""
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}
