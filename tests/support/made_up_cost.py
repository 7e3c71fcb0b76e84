"""The cost of a model, made up: round numbers from which every ratio can be told."""

from helpers.core.records import write_json

WORK = {"prefill_tokens": 1000, "texts": 8, "prompts": 32, "prompt_tokens": 16, "steps": 16}
FLOAT_BYTES = {"Linears": 4_000_000, "embeddings and head": 1_000_000, "norms and others": 8000}
PEAKS = {"float32": [90e9, 100e9, 95e9], "bfloat16": [200e9] * 3, "int8": [400e9] * 3}


def way(variant: str, dtype: str, arithmetic: str, seconds: list[float], **changes) -> dict:
    """One way that reads 1,000 tokens in the given seconds, a round each."""
    int8 = arithmetic == "int8"
    made = {
        "name": f"{variant} {dtype}",
        "variant": variant,
        "dtype": dtype,
        "arithmetic": arithmetic,
        "simulated": False,
        "file_bytes": FLOAT_BYTES | ({"Linears": 1_000_000} if int8 else {}),
        "load_s": [0.5, 0.6, 0.4],
        "prefill_s": seconds,
        "linears_s": [0.8 * s for s in seconds],
        "linear_operations": [40_000_000_000] * 3,
        "decode_s": [2 * s for s in seconds],
        "decode_tokens": [512] * 3,
        "linear_bytes": [1_060_000 if int8 else 4_000_000] * 3,
        "peak_memory_bytes": [50_000_000, 51_000_000, 52_000_000],
    }
    return made | changes


def account(study, model: str) -> dict:
    """Every variant of a study: int8 reads twice as fast as float32, and as fast as bfloat16."""
    ways = [
        way(study.baseline, "float32", "float32", [1.0, 1.2, 1.1]),
        way(study.baseline, "bfloat16", "bfloat16", [0.5, 0.5, 0.6]),
    ]
    others = {n: recipe for n, recipe in study.variants.items() if n != study.baseline}
    quantized = [n for n, recipe in others.items() if recipe.quantized]
    ways += [way(name, "float32", "int8", [0.5, 0.6, 0.55]) for name in quantized]
    told = {"model": model, "baseline": study.baseline, "threads": 2, "device": "a | processor"}
    told |= {"memory": "the most a process held", "work": WORK, "peaks": PEAKS}
    floats = {n: "runs in float as the baseline does" for n in others if n not in quantized}
    return told | {"ways": ways, "left_out": floats}


def write_cost(job, model: str, record: dict, changed=lambda account: None) -> None:
    """What the stage leaves of one model."""
    told = account(job.study, model)
    changed(told)
    folder = job.paths.cost(model)
    write_json(folder / "cost.json", told)
    inputs = {
        name: f"checkpoint of {name}" if recipe.needs_checkpoint else f"files of {model}"
        for name, recipe in job.study.variants.items()
    }
    write_json(folder / "record.json", record | {"inputs": inputs})
