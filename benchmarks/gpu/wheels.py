"""`make gpu-wheels`: what the check needs besides torch and transformers, as wheels.

In the versions of this environment, for Python 3.12 on Linux x86-64, without what such a
machine has anyway. There, without a network:

    python3 -m pip install --no-index --no-deps --target site .gpu-wheels/*.whl
    PYTHONPATH=site:src python3 -m benchmarks.gpu_check
"""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER, MOST_BYTES = Path(".gpu-wheels"), 60 * 10**6
NAMES = (
    "annotated-types",
    "compressed-tensors",
    "datasets",
    "dill",
    "llmcompressor",
    "loguru",
    "multiprocess",
    "pydantic",
    "pydantic_core",
    "typing-extensions",  # newer than such a machine may have
    "typing-inspection",
)
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28)] + ["manylinux2014_x86_64"]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    wanted = [f"{name}=={version(name)}" for name in NAMES]
    subprocess.run([*command, "--dest", str(FOLDER), *wanted], check=True)
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(FOLDER.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 1e6:7.2f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total / 1e6:7.2f} MB  in {FOLDER}, of at most {MOST_BYTES / 1e6:.0f}")
    if total > MOST_BYTES:
        sys.exit(f"gpu-wheels: {FOLDER} is larger than {MOST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
