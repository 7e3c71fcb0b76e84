"""The table of processors: goals by kind, stand-ins named as such, kinds nobody has measured."""

from benchmarks import processors


def row(kind: str, kept_to: str = "", **measured) -> dict:
    values = {name: [1.0, 1.2, 1.1] for name in processors.QUANTITIES} | measured
    told = {"kind": kind, "kept_to": kept_to, "name": "a processor", "features": ["avx2"]}
    told |= {"threads": 2, "int8_products": "float32 in blocks", "int8_passes": "fused"}
    return told | {"torch": "2.13.0", "date": "2026-11-26", "measured": values}


def test_a_goal_is_that_of_the_kind_and_missed_by_the_middle_round():
    name = "int8 / float32, reading"
    assert processors._cell(row("AVX2"), name).endswith("≥ 0.9 ✓")
    assert processors._cell(row("AMX"), name).endswith("≥ 2.5 ✗ missed")
    memory = "Linears in memory, of float32"
    assert processors._cell(row("AMX", **{memory: [0.25] * 3}), memory).endswith("≤ 0.26 ✓")
    assert "✗" in processors._cell(row("AMX", **{memory: [0.5] * 3}), memory)


def test_a_stand_in_does_not_count_as_its_kind():
    text = processors.markdown([row("AVX2", "avx2"), row("AMX")])
    assert "AVX2 (kept to avx2)" in text
    unseen = next(line for line in text.splitlines() if line.startswith("Not measured"))
    assert "AVX2" in unseen
    assert "AMX" not in unseen
