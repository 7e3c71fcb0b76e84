"""`make gpu-check`: what is claimed of CUDA, shown on a card in eight minutes at most.

    python -m benchmarks.gpu_check --out outputs/gpu            # on a machine with a card
    python -m benchmarks.gpu_check --out /tmp/dry --dry         # the same code, tiny, on the CPU

Parts run one after the other, each in a process of its own and with a time of its own, those
most worth knowing first. A part's numbers are kept as they come, in `gpu.json`; a part that is
complete is not run again unless `--again` asks for it. `report.md` is made from the numbers.
Needs Python, torch and transformers, and the wheels of `make gpu-wheels`; no network.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

# Name, seconds. Together they fit LIMIT_S.
PARTS = {
    "card": 40,
    "parity": 50,
    "linears": 110,
    "company": 40,
    "smoke": 70,
    "full_size": 100,
    "tokens": 50,
    "memory": 20,
}
LIMIT_S, GRACE_S, LEAST_S = 480, 12, 10
FILE, PAGE, RUNNING = "gpu.json", "report.md", "running.json"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        run_part(options)
        return 0
    return run_all(options)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="where results go")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--again", action="store_true", help="run complete parts again, too")
    parser.add_argument("--only", default="", help="parts, with commas between them")
    parser.add_argument("--commit", default="", help="of the code, where git is not at hand")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace) -> int:
    """Run every part that is not complete; returns how many are not complete afterwards."""
    import torch

    if not options.dry and not torch.cuda.is_available():
        print(
            "gpu-check: torch sees no CUDA device here; --dry runs it on the CPU", file=sys.stderr
        )
        return 1
    from benchmarks.gpu.page import write_page

    names = [name for name in PARTS if not options.only or name in options.only.split(",")]
    account, began = load(options), time.monotonic()
    for name in names:
        if account["parts"].get(name, {}).get("complete") and not options.again:
            print(f"{name}: complete already", flush=True)
            continue
        seconds = min(PARTS[name], options.limit - (time.monotonic() - began))
        if seconds < LEAST_S:
            print(f"{name}: no time left", flush=True)
            continue
        account["parts"][name] = started(name, seconds, options)
        save(account, options.out)
        write_page(account, options.out / PAGE)
    write_page(account, options.out / PAGE)
    print(f"written: {options.out / PAGE}", flush=True)
    return sum(not account["parts"].get(name, {}).get("complete") for name in names)


def load(options: argparse.Namespace) -> dict:
    """What an earlier run of the same commit and mode left, or a new account."""
    commit, file = options.commit or _commit(), options.out / FILE
    fresh = {"commit": commit, "dry": options.dry, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    old = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if {key: old.get(key) for key in ("commit", "dry")} == {"commit": commit, "dry": options.dry}:
        return old
    return fresh | {"parts": {}}


def save(account: dict, folder: Path) -> None:
    temporary = folder / (FILE + ".new")
    temporary.write_text(json.dumps(account, indent=1) + "\n", "utf-8")
    os.replace(temporary, folder / FILE)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def started(name: str, seconds: float, options: argparse.Namespace) -> dict:
    """Run a part in a process of its own and return its numbers, however it ended."""
    print(f"{name} ({seconds:.0f} s at most)", flush=True)
    running = options.out / RUNNING
    running.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name]
    command += ["--out", str(options.out), "--seconds", str(seconds)]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--dry"] if options.dry else [])], timeout=seconds + GRACE_S
        )
        ended = f"exit status {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds + GRACE_S:.0f} s"
    found = json.loads(running.read_text("utf-8")) if running.is_file() else {}
    running.unlink(missing_ok=True)
    if ended:
        found["ended"] = ended
    found["seconds"] = round(time.monotonic() - began, 1)
    found["complete"] = not {"ended", "error", "stopped"} & set(found)
    print(f"{name}: {found['seconds']} s{', ' + ended if ended else ''}", flush=True)
    return found


def run_part(options: argparse.Namespace) -> None:
    """Run one part here; an error is one of its results."""
    began = time.monotonic()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    from benchmarks.gpu.part import Part

    device = "cpu" if options.dry else "cuda"
    part = Part(device, options.dry, began + options.seconds, options.out / RUNNING)
    try:
        import_module(f"benchmarks.gpu.{options.part}").run(part)
    except Exception as error:
        traceback.print_exc()
        lines = traceback.format_exc().strip().splitlines()
        part.note("error", f"{type(error).__name__}: {str(error)[:600]}")
        part.note("error at", [line.strip() for line in lines if line.startswith("  File")][-6:])


if __name__ == "__main__":
    sys.exit(main())
