"""vLLM in its own environment, asked over a pipe. It may not be there; then a row says so."""

import json
import os
import subprocess
from pathlib import Path

from helpers.core.files import PROJECT, vllm_python
from helpers.core.processes import die_with_parent

SERVER = Path(__file__).with_name("vllm_server.py")


def why_not() -> str | None:
    """The reason why vLLM is not available here; None if it is."""
    if not vllm_python().is_file():
        return "vLLM is not installed here (make .venv-vllm/.study-ready)"
    tried = subprocess.run(
        [vllm_python(), "-c", "import vllm"], env=_environment(1), capture_output=True, text=True
    )
    if tried.returncode:
        last = (tried.stderr.strip() or "it left no message").splitlines()[-1]
        return f"vLLM cannot be imported ({last[:120]})"
    return None


def _environment(threads: int) -> dict[str, str]:
    """This process's environment without the variables that select its Python packages."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return inherited | {
        "PYTHONPATH": str(PROJECT / "src"),  # for the parser of boxes, which needs no package
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }


class Vllm:
    """One checkpoint in float32, or INT8 with float32 around it, served by vLLM."""

    def __init__(self, folder: Path, *, threads: int, rows: int):
        self._process = subprocess.Popen(
            [vllm_python(), str(SERVER), str(folder), "--rows", str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_environment(threads),
            preexec_fn=die_with_parent,
        )
        self.version = self._answer()["version"]

    def answers(
        self, prompts: list[list[int]], max_new_tokens: int, stops: set[int]
    ) -> list[list[int]]:
        """Greedy answers as token ids, each ended at its first complete box."""
        request = {"prompts": prompts, "max_new_tokens": max_new_tokens, "stops": sorted(stops)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()["answers"]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with code {self._process.wait()}; run {SERVER.name}")
        return json.loads(line)
