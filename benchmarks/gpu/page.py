"""The check's numbers as a page."""

from pathlib import Path


def write_page(account: dict, file: Path) -> None:
    """Write report.md from gpu.json's content."""
    file.write_text(as_markdown(account) + "\n", "utf-8")


def as_markdown(account: dict) -> str:
    """One section per part, with its numbers on lines or in tables."""
    card = account["parts"].get("card", {}).get("card", {})
    dry = (
        " This was a dry run on a CPU: its numbers say nothing of a card." if account["dry"] else ""
    )
    lines = [
        "# Checked on a card",
        "",
        f"{card.get('name', 'no card')}, {account['date']}, commit "
        f"{account['commit'] or 'unknown'}. Made by `make gpu-check`.{dry}",
    ]
    for name, found in account["parts"].items():
        state = "complete" if found["complete"] else "not complete"
        lines += ["", f"## {name.replace('_', ' ')}", "", f"{state}, {found['seconds']} s", ""]
        for key, value in found.items():
            if key not in ("complete", "seconds"):
                lines += _entry(key, value)
    return "\n".join(lines)


def _entry(key: str, value) -> list[str]:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return ["", f"{key}:", "", *_table(value), ""]
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        return ["", f"{key}:", "", *_table([{"": k} | v for k, v in value.items()]), ""]
    if isinstance(value, dict):
        return [f"- {key}: " + "; ".join(f"{k} {_number(v)}" for k, v in value.items())]
    return [f"- {key}: {_number(value)}"]


def _table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_number(row.get(column)) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _number(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")
