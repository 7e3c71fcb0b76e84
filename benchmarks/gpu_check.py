"""`make gpu-check`: what is claimed of CUDA, shown on a card in eight minutes at most.

    python -m benchmarks.gpu_check --out outputs/gpu            # on a machine with a card
    python -m benchmarks.gpu_check --out /tmp/dry --dry         # the same code, tiny, on the CPU

Parts run one after the other, each in a process of its own (a fork, where that is possible) and
with a time of its own, those most worth knowing first. A part's numbers are kept as they come, in
`gpu.json`; a part that is complete is not run again unless `--again` asks for it. `report.md` is
made from the numbers.
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

from benchmarks.gpu import processes
from benchmarks.gpu.page import write_page

# Name, seconds. Together they fit LIMIT_S.
PARTS = {
    "card": 20,
    "parity": 45,
    "linears": 95,
    "full_size": 85,
    "smoke": 60,
    "tokens": 75,
    "company": 45,
    "memory": 25,
    "two_cards": 25,
}
LIMIT_S, GRACE_S, LEAST_S = 480, 10, 8
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
    parser.add_argument("--only", default="", help="parts in this order, with commas between them")
    parser.add_argument("--commit", default="", help="of the code, where git is not at hand")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace) -> int:
    """Run every part that is not complete; returns how many are not complete afterwards."""
    began = time.monotonic()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(names) - set(PARTS):
        print(f"gpu-check: there is no part {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    account = load(options)
    complete = [name for name in names if _is_complete(account, name) and not options.again]
    for name in complete:
        print(f"{name}: complete already", flush=True)
    remaining = [name for name in names if name not in complete]
    forks = bool(remaining) and _loaded(remaining, options)
    if remaining and not (forks or options.dry or processes.has_cuda()):
        print(
            "gpu-check: torch sees no CUDA device here; --dry runs it on the CPU", file=sys.stderr
        )
        return 1
    print(f"loaded in {time.monotonic() - began:.1f} s; parts are forks: {forks}", flush=True)
    for name in remaining:
        seconds = min(PARTS[name], options.limit - GRACE_S - (time.monotonic() - began))
        if seconds < LEAST_S:
            print(f"{name}: no time left", flush=True)
            continue
        account["parts"][name] = started(name, seconds, options, forks)
        save(account, options.out)
        write_page(account, options.out / PAGE)
    write_page(account, options.out / PAGE)
    print(f"written: {options.out / PAGE}", flush=True)
    return sum(not _is_complete(account, name) for name in names)


def _is_complete(account: dict, name: str) -> bool:
    return account["parts"].get(name, {}).get("complete", False)


def _loaded(names: list[str], options: argparse.Namespace) -> bool:
    """Import the parts' modules; return whether the parts can be forks of this process."""
    for line in processes.load(names):
        print(f"cannot be imported: {line}", flush=True)
    return processes.forks_work("cpu" if options.dry else "cuda")


def load(options: argparse.Namespace) -> dict:
    """The results of an earlier run of the same commit and mode, or empty ones."""
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


def started(name: str, seconds: float, options: argparse.Namespace, forks: bool) -> dict:
    """Run a part in its own process; return its numbers even if it failed."""
    print(f"{name} ({seconds:.0f} s at most)", flush=True)
    running = options.out / RUNNING
    running.unlink(missing_ok=True)
    began = time.monotonic()
    if forks:
        part = argparse.Namespace(**vars(options) | {"part": name, "seconds": seconds})
        ended = processes.forked(lambda: run_part(part), seconds + GRACE_S)
    else:
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name]
        command += ["--out", str(options.out), "--seconds", str(seconds)]
        command += ["--dry"] if options.dry else []
        ended = processes.run(command, seconds + GRACE_S)
    outcome = json.loads(running.read_text("utf-8")) if running.is_file() else {}
    running.unlink(missing_ok=True)
    if ended:
        outcome["ended"] = ended
    outcome["seconds"] = round(time.monotonic() - began, 1)
    outcome["complete"] = not {"ended", "error", "stopped"} & set(outcome)
    print(f"{name}: {outcome['seconds']} s{', ' + ended if ended else ''}", flush=True)
    return outcome


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
