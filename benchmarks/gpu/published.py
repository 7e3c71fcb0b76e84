"""What ran on which card: a table in docs/scaling.md, a line in README.md, from outputs/gpu/*.json.

python -m benchmarks.gpu.published
"""

import json

from tools.update_readme import split_at_markers

from benchmarks.gpu.cards import INT8
from helpers.core.files import PROJECT
from helpers.report.markdown import MISSING, markdown_table

FOLDER = PROJECT / "outputs" / "gpu"
PAGE, README = PROJECT / "docs" / "scaling.md", PROJECT / "README.md"
MARKERS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")
NOTHING = "No card has been at hand yet.\n"


def accounts() -> list[dict]:
    """The results of `make gpu-check` by card, the oldest first, without dry runs."""
    known = [(file.name, json.loads(file.read_text("utf-8"))) for file in FOLDER.glob("*.json")]
    known.sort(key=lambda each: (each[1]["date"], each[0]))
    return [account for _, account in known if not account["dry"]]


def newest() -> dict[tuple[str, str], tuple[dict, dict]]:
    """By card and part: the newest account that has it complete, or else the newest; the part."""
    by_card: dict = {}
    for account in accounts():
        for name, part in account["parts"].items():
            key = _card(account), name
            if part["complete"] or key not in by_card or not by_card[key][1]["complete"]:
                by_card[key] = account, part
    return by_card


def _card(account: dict) -> str:
    return account["parts"].get("card", {}).get("card", {}).get("name", MISSING)


def rows() -> list[dict]:
    """One row per part of every card."""
    table_rows = []
    for (card, name), (account, part) in newest().items():
        row = {"part": name.replace("_", " "), "card": card, "date": account["date"]}
        row |= {"commit": account["commit"][:10] or MISSING}
        row["complete"] = "yes" if part["complete"] else "no"
        table_rows.append(row | {"found": headline(name, part, card) or MISSING})
    return table_rows


def line() -> str:
    """How fast int8 Linears are on the cards there were, in a sentence each."""
    sentences = [
        f"On {card.removeprefix('NVIDIA ')} ({account['date']}), Linears of an 8 B model: "
        f"{_linears(part, card)}."
        for (card, name), (account, part) in newest().items()
        if name == "linears" and _linears(part, card)
    ]
    return "".join(f"{each}\n" for each in sentences) or NOTHING


def _linears(part: dict, card: str) -> str:
    """As the library chooses its products, at the most rows."""
    ratios = part.get("together at 4096 rows", {})
    share = ratios.get("as the library chooses, share of the int8 peak")
    times = ratios.get("as the library chooses, times as fast as bfloat16")
    if share is None or times is None:
        return ""
    peak = part["int8 peak, operations a second"]
    sentence = f"4,096 rows in int8 take 1/{times:.2f} of bfloat16's time"
    sentence += f", {share:.2f} of the rate of cuBLASLt's product"
    if sheet := INT8.get(card):
        sentence += f", {share * peak / sheet:.0%} of the data sheet's {sheet / 1e12:,.0f} T/s"
    return sentence


def headline(name: str, part: dict, card: str) -> str:
    """A part's main numbers in a few words."""
    match name:
        case "card":
            kinds = ("bfloat16", "int8")
            peaks = [(kind, part.get(f"{kind}, operations a second")) for kind in kinds]
            words = [f"{kind} {p / 1e12:.0f} T/s" for kind, p in peaks if isinstance(p, float)]
            copied = part.get("copy_bytes_a_second")
            words += [f"memory {copied / 1e12:.2f} TB/s"] if copied else []
            return ", ".join(words)
        case "parity":
            values = part.get("products", {})
            alike = "as on the CPU" if part.get("linears alike") else "not as on the CPU"
            return f"{values.get('exact')} of {values.get('made')} products exact, Linears {alike}"
        case "linears":
            return _linears(part, card)
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
            words = [
                f"{r['runs in']} ({r['whose']}) {r['read']:,.0f} / {r['written']:,.0f}"
                for r in rows
            ]
            return "tokens read / written a second: " + ", ".join(words) if words else ""
        case "memory":
            return str(part.get("room for half a batch", {}).get("outcome", ""))
        case "two_cards":
            return str(part.get("outcome", ""))
    return ""


def with_table(text: str) -> str:
    """docs/scaling.md with the table between its markers."""
    found = rows()
    before, after = split_at_markers(text, MARKERS, page=PAGE.name)
    return before + (markdown_table(found).strip() + "\n" if found else NOTHING) + after


def with_line(text: str) -> str:
    """README.md with the line between its markers."""
    before, after = split_at_markers(text, MARKERS, page=README.name)
    return before + line() + after


if __name__ == "__main__":
    for page, made in ((PAGE, with_table), (README, with_line)):
        page.write_text(made(page.read_text("utf-8")), "utf-8")
