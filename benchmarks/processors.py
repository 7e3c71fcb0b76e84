"""What int8 gains on this kind of processor: one row of `outputs/bench/processors.md`.

Reading and writing by the demo's model in float32, bfloat16 and int8, in turns, each in a
process of its own; and the bare matrix products. The row of the processor's kind is replaced,
the rows of other kinds stay, so that the table grows with the machines that `make bench` saw.
`PROCESSOR=avx2 make bench ARGS='--only processors'` adds a row of a machine kept to less.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from statistics import median

import torch

from benchmarks.material import Material
from benchmarks.turns import Comparison
from helpers.core.files import outputs_root, write_atomically
from helpers.core.processes import interleaved_rounds
from helpers.core.records import write_json
from helpers.cost.measurement import gemm_peaks, measure, workload
from helpers.quantization import int8_matmul
from helpers.quantization.variants import load_int8
from helpers.runtime import devices
from helpers.sources.models import load_model

ROUNDS = 3
KINDS = ("AVX2", "AVX-512", "AVX-512 VNNI", "AMX", "ARM (i8mm)")
QUANTITIES = {
    "int8 / float32, reading": {"AVX2": 0.9, "AVX-512 VNNI": 2.0, "AMX": 2.5},
    "int8 / float32, writing": {},
    "int8 / bfloat16, reading": {"AVX2": 1.0, "AVX-512 VNNI": 1.3, "AMX": 1.0},
    "int8 / bfloat16, writing": {"AVX2": 1.0, "AVX-512 VNNI": 1.1, "AMX": 1.0},
    "int8 Linears, of the bare product": {"AVX-512 VNNI": 0.65},
    "Linears in memory, of float32": {"AVX2": 0.26, "AVX-512 VNNI": 0.26, "AMX": 0.26},
}
LESS_IS_BETTER = {"Linears in memory, of float32"}


def compare(material: Material) -> list[Comparison]:
    """Measure this processor and write its row; the table is of its own, so no comparison."""
    rounds = _rounds(material)
    row = _described(material.threads) | {"measured": _measured(rounds)}
    path = outputs_root() / "bench" / "processors.json"
    rows = json.loads(path.read_text("utf-8")) if path.is_file() else []
    key = (row["kind"], row["kept_to"])
    rows = [other for other in rows if (other["kind"], other["kept_to"]) != key] + [row]
    rows.sort(key=lambda each: (each["kind"] not in KINDS, _place(each["kind"]), each["kept_to"]))
    write_json(path, rows)
    text = markdown(rows)
    write_atomically(path.with_suffix(".md"), lambda p: p.write_text(text, encoding="utf-8"))
    print(f"written: {path.parent.name}/processors.md", flush=True)
    return []


def _place(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else 0


def _rounds(material: Material) -> dict[str, list[dict]]:
    """Measurements of each configuration and of the bare products, round by round."""
    runtime = material.study.runtime
    loads: dict[str, Callable] = {
        dtype: partial(load_model, material.folder, runtime.model_copy(update={"dtype": dtype}))
        for dtype in ("float32", "bfloat16")
    }
    loads["int8"] = partial(load_int8, material.checkpoint, dtype=torch.float32, device="cpu")
    work = workload(material.study, material.tokenizer)
    settings = {"work": work, "threads": material.threads}
    tasks = {
        name: partial(measure, partial(_pair, load), **settings) for name, load in loads.items()
    }
    shapes = sorted(material.linear_shapes)
    limit = {"rows": work.row_tokens, "threads": material.threads, "device": "cpu"}
    tasks["peaks"] = partial(gemm_peaks, shapes, **limit)
    return interleaved_rounds(tasks, rounds=ROUNDS)


def _pair(load: Callable) -> tuple:
    return load(), None


def _described(threads: int) -> dict:
    return {
        "kind": devices.processor_class(),
        "kept_to": devices.restriction(),
        "name": devices.processor_name(),
        "features": list(devices.features()),
        "threads": threads,
        "int8_products": int8_matmul.cpu_product().name,
        "int8_passes": "fused" if int8_matmul.are_available() else "torch's",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _measured(rounds: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Each quantity, round by round."""

    def speeds(name: str, what: str) -> list[float]:
        tokens = {"prefill_s": lambda _r: 1.0, "decode_s": lambda r: r["decode_tokens"]}[what]
        return [tokens(r) / r[what] for r in rounds[name]]

    def ratio(of: str, what: str) -> list[float]:
        pairs = zip(speeds("int8", what), speeds(of, what), strict=True)
        return [round(own / other, 4) for own, other in pairs]

    peak = max(r["int8"] for r in rounds["peaks"])
    inside = [r["linear_operations"] / r["linears_s"] for r in rounds["int8"]]
    held = zip(rounds["int8"], rounds["float32"], strict=True)
    return {
        "int8 / float32, reading": ratio("float32", "prefill_s"),
        "int8 / float32, writing": ratio("float32", "decode_s"),
        "int8 / bfloat16, reading": ratio("bfloat16", "prefill_s"),
        "int8 / bfloat16, writing": ratio("bfloat16", "decode_s"),
        "int8 Linears, of the bare product": [round(each / peak, 4) for each in inside],
        "Linears in memory, of float32": [
            round(a["linear_bytes"] / b["linear_bytes"], 4) for a, b in held
        ],
    }


def markdown(rows: list[dict]) -> str:
    """The table: a row a processor, ratios of the same run, the goal of its kind beside each."""
    lines = [
        "# What int8 gains, by kind of processor",
        "",
        "Made by `make bench`. SmolLM2-135M, a row of 1,024 tokens and 32 answers side by side, "
        f"the middle of {ROUNDS} rounds taken in turns (the least–the largest). A goal stands "
        "behind the number it is for. A machine kept to less (`PROCESSOR=…`) stands in for one "
        "that has no more; its caches, clock and memory are its own.",
        "",
        f"| processor | {' | '.join(QUANTITIES)} |",
        f"| :--- | {' | '.join('---:' for _ in QUANTITIES)} |",
        *map(_line, rows),
    ]
    seen = {row["kind"] for row in rows if not row["kept_to"]}
    unseen = [kind for kind in KINDS if kind not in seen]
    if unseen:
        lines += ["", f"Not measured on a processor of its own kind yet: {', '.join(unseen)}."]
    lines += ["", *(_about(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    cells = [_cell(row, name) for name in QUANTITIES]
    return f"| {_title(row)} | {' | '.join(cells)} |"


def _title(row: dict) -> str:
    kept = f" (kept to {row['kept_to']})" if row["kept_to"] else ""
    return f"{row['kind']}{kept}"


def _cell(row: dict, name: str) -> str:
    values, goal = row["measured"][name], QUANTITIES[name].get(row["kind"])
    middle = median(values)
    shown = f"{middle:.2f} ({min(values):.2f}–{max(values):.2f})"
    if goal is None:
        return shown
    reached = middle <= goal if name in LESS_IS_BETTER else middle >= goal
    sign = "≤" if name in LESS_IS_BETTER else "≥"
    return f"{shown}, {sign} {goal:g} {'✓' if reached else '✗ missed'}"


def _about(row: dict) -> str:
    return (
        f"- {_title(row)}: {row['name']}, {', '.join(row['features'])}; {row['threads']} threads; "
        f"int8 products {row['int8_products']}, passes {row['int8_passes']}; torch {row['torch']}, "
        f"{row['date']}."
    )
