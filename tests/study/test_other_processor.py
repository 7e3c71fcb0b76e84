"""A whole study on a machine that is kept to AVX2: the stand-in for a processor without more."""

import json
import os
import subprocess

import pytest

from helpers.core.files import PROJECT
from smoke_study import Smoke

pytestmark = pytest.mark.long
# Those that multiply in different ways; without smoothing int8 is multiplied in the same way.
VARIANTS = ("noquant", "noquant_bf16", "smoothquant_w8a8", "smoothquant_o3")


@pytest.fixture(scope="module")
def kept_to_avx2(tmp_path_factory):
    study = Smoke(tmp_path_factory.mktemp("avx2") / "study").keep_variants(*VARIANTS)
    study.said = study.done("study", "PROCESSOR=avx2")
    return study


def gates(study: Smoke) -> dict[str, list[dict]]:
    all_gates = [
        *study.outputs.rglob("evaluation/gates.json"),
        *study.outputs.rglob("verification.json"),
    ]
    return {str(path): json.loads(path.read_text("utf-8"))["gates"] for path in all_gates}


def test_every_gate_holds(kept_to_avx2):
    checked = gates(kept_to_avx2)
    assert len(checked) == 12  # two models: four evaluations and two checkpoints each
    assert not [g for each in checked.values() for g in each if not g["passed"]]


def test_an_answer_is_the_same_in_any_company():
    """MKL's products of a few rows are other ones with AVX2."""
    pytest_arguments = "ARGS=-n0 -q tests/inference/test_batch_invariance.py"
    done = subprocess.run(
        ["make", "test", "PROCESSOR=avx2", pytest_arguments],
        cwd=PROJECT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


def test_the_records_and_the_report_say_what_the_processor_lacks(kept_to_avx2):
    records = [*kept_to_avx2.outputs.rglob("evaluation/record.json")]
    machines = [json.loads(path.read_text("utf-8"))["machine"] for path in records]
    assert {m["int8_products"] for m in machines} == {"float32 in blocks"}
    assert {m["processor"] for m in machines} == {"AVX2"}
    report = (kept_to_avx2.outputs / "report.md").read_text("utf-8")
    assert "This processor has no int8 units: int8 saves memory here, not time" in report
    assert "bfloat16 is multiplied in float32, rounded to bfloat16 once" in report


def test_whole_numbers_are_the_same_on_both(kept_to_avx2, undisturbed):
    """What no product touches: items and prompts, and what they are hashed to."""
    for name in ("arc", "squad_v2", "openmath", "boolq"):
        place = f"base/noquant/evaluation/predictions/{name}.jsonl"
        rows = [
            [json.loads(line) for line in (study.outputs / place).read_text("utf-8").splitlines()]
            for study in (kept_to_avx2, undisturbed)
        ]
        executed = [
            [(row["id"], row["prompt_hash"], row["prompt_tokens"]) for row in each] for each in rows
        ]
        assert executed[0] == executed[1]
