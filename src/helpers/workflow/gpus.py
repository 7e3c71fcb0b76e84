"""Whether a job may take a GPU: for the engine, which has to know before any job runs."""

import platform
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and either under WSL


def may_take_gpu(device: str) -> bool:
    """Whether jobs with this `runtime.device` may take a GPU of this machine.

    Looks for a driver instead of importing a library, which takes seconds. If torch cannot use
    the driver, jobs run one by one although they could run side by side.
    """
    if device != "auto":
        return device != "cpu"
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return apple or any(Path(driver).exists() for driver in DRIVERS)
