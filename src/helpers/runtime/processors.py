"""What the processor multiplies with, and the setting that keeps a run to less than it has.

`PROCESSOR=avx2 make …` restricts torch, oneDNN and numba by their own variables (Makefile), and
this module by STUDY_PROCESSOR, so that any machine can stand in for one without AVX-512;
`PROCESSOR=vnni` for one with AVX-512 VNNI and bfloat16, and without AMX.
"""

import os
import platform
from functools import cache
from pathlib import Path

from helpers.core.errors import StudyError

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
FEATURES += ("asimddp", "i8mm", "bf16")  # ARM's
RESTRICTIONS = {
    "avx2": ("avx2",),
    "vnni": ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"),
}


def features() -> tuple[str, ...]:
    """The instruction sets for matrix products that this process may use."""
    allowed = RESTRICTIONS.get(restriction(), FEATURES)
    return tuple(name for name in _cpu_features() if name in allowed)


def restriction() -> str:
    """The restriction of this run, a key of RESTRICTIONS; empty if there is none.

    Raises:
        StudyError: STUDY_PROCESSOR is set to another value.
    """
    setting = os.environ.get("STUDY_PROCESSOR", "")
    if setting and setting not in RESTRICTIONS:
        raise StudyError(
            f"PROCESSOR = {setting!r} is not one of {', '.join(RESTRICTIONS)}; leave it out"
        )
    return setting


@cache
def _cpu_features() -> tuple[str, ...]:
    path = Path("/proc/cpuinfo")
    words = set(path.read_text("utf-8").split()) if path.is_file() else set()
    return tuple(name for name in FEATURES if name in words)


def has_int8_units() -> bool:
    """Whether torch multiplies int8 faster than float32 here, which takes AVX-512 VNNI."""
    return "avx512_vnni" in features()


def has_bfloat16_units() -> bool:
    """Whether the processor has bfloat16 instructions; emulation is slower than float32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(features()))


def processor_name() -> str:
    """The CPU's model name, or its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    own = names[0] if names else platform.processor() or platform.machine()
    return f"{own} (kept to {restriction()})" if restriction() else own


def processor_class() -> str:
    """The processor's class by its int8 instructions."""
    own = features()
    if "amx_int8" in own:
        return "AMX"
    if "avx512_vnni" in own:
        return "AVX-512 VNNI"
    if "avx512f" in own:
        return "AVX-512"
    return "AVX2" if "avx2" in own else platform.machine()
