"""What a part of the check is given: a device, a size, an end, and a place for its numbers."""

import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

SHOWN = 300  # characters of a number on the screen; all of it is in the file


@dataclass
class Part:
    """One running part.

    Attributes:
        device: cuda, or cpu in the dry mode.
        dry: tiny sizes.
        until: of `time.monotonic`, when to stop.
        file: where the numbers go as soon as they are there.
        found: the numbers.
    """

    device: str
    dry: bool
    until: float
    file: Path
    found: dict = field(default_factory=dict)

    def note(self, name: str, value) -> None:
        """Store a number and print it."""
        self.found[name] = value
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(self.found, indent=1), "utf-8")
        os.replace(temporary, self.file)
        newest = value[-1] if isinstance(value, list) and value else value
        print(f"  {name}: {json.dumps(newest)[:SHOWN]}", flush=True)

    def of(self, part: str, name: str):
        """A number from an earlier part; None if there is none."""
        file = self.file.with_name("gpu.json")
        known = json.loads(file.read_text("utf-8")) if file.is_file() else {"parts": {}}
        return known["parts"].get(part, {}).get(name)

    @contextmanager
    def stage(self, rows: list[dict], name: str, **more):
        """Append the time and peak memory of the enclosed code to a table."""
        self.forget_peak()
        began = time.perf_counter()
        yield
        self.settle()
        row = {"stage": name, "seconds": round(time.perf_counter() - began, 2)}
        rows.append(row | {"peak [GiB]": self.peak_gib()} | more)
        self.note("stages", rows)

    def left(self) -> float:
        """Seconds until this part has to end."""
        return self.until - time.monotonic()

    def over(self, *, need: float = 0.0) -> bool:
        """Whether too few seconds are left; if so, the part notes what it skips."""
        if self.left() >= need:
            return False
        self.note(
            "stopped", f"{-self.left():.0f} s over its time" if self.left() < 0 else "no time"
        )
        return True

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def settle(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Begin a new peak of memory."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Peak device memory since `forget_peak`; None on a CPU."""
        if self.device != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
