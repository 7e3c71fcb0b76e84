"""The table of what ran on which card, in docs/scaling.md, from outputs/gpu/*.json.

python -m benchmarks.gpu.published
"""

import json

from helpers.report.formats import MISSING, markdown_table
from helpers.study.errors import StudyError
from helpers.study.paths import PROJECT

PAGE = PROJECT / "docs" / "scaling.md"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NOTHING = "No card has been at hand yet.\n"


def rows() -> list[dict]:
    """One row a part of every account of a card; dry runs are left out."""
    found = []
    for file in sorted((PROJECT / "outputs" / "gpu").glob("*.json")):
        account = json.loads(file.read_text("utf-8"))
        if account["dry"]:
            continue
        card = account["parts"].get("card", {}).get("card", {}).get("name", MISSING)
        for name, part in account["parts"].items():
            row = {"part": name.replace("_", " "), "card": card, "date": account["date"]}
            row |= {"commit": account["commit"][:10] or MISSING}
            row["complete"] = "yes" if part["complete"] else "no"
            found.append(row | {"found": headline(name, part) or MISSING})
    return found


def headline(name: str, part: dict) -> str:
    """A part's most telling numbers in a few words."""
    match name:
        case "card":
            kinds = ("bfloat16", "int8")
            peaks = [(kind, part.get(f"{kind}, operations a second")) for kind in kinds]
            told = [f"{kind} {p / 1e12:.0f} T/s" for kind, p in peaks if isinstance(p, float)]
            copied = part.get("copy_bytes_a_second")
            told += [f"memory {copied / 1e12:.2f} TB/s"] if copied else []
            return ", ".join(told)
        case "parity":
            made = part.get("products", {})
            alike = "as on the CPU" if part.get("linears alike") else "not as on the CPU"
            return f"{made.get('exact')} of {made.get('made')} products exact, Linears {alike}"
        case "linears":
            told = part.get("together at 4096 rows", {})
            share = told.get("best int8, share of the int8 peak")
            times = told.get("best int8, times as fast as bfloat16")
            if share is None or times is None:
                return ""
            return f"4,096 rows: int8 {times:.2f}× bfloat16, {share:.0%} of the int8 peak"
        case "company":
            rows = part.get("among others and alone", [])
            return ", ".join(f"{r['runs in']} off by {r['by at most']:.2g}" for r in rows)
        case "smoke":
            same = part.get("what must not differ does not")
            return "what must not differ does not" if same else "something differs"
        case "full_size":
            stages = [s for s in part.get("stages", []) if "evaluating 1000" in s["stage"]]
            return ", ".join(f"{s['stage']}: {s['seconds']} s" for s in stages)
        case "tokens":
            rows = part.get("tokens a second", [])
            told = [f"{r['runs in']} ({r['whose']}) {r['read']:,.0f}" for r in rows]
            return "tokens read a second: " + ", ".join(told) if told else ""
        case "memory":
            return str(part.get("room for half a batch", {}).get("outcome", ""))
    return ""


def with_table(text: str) -> str:
    """The page with the table between its markers.

    Raises:
        StudyError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StudyError(f"{PAGE.name} lacks {BEGIN} or {END}; put them back")
    found = rows()
    table = markdown_table(found).strip() + "\n" if found else NOTHING
    return f"{before}{begin}\n{table}{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
