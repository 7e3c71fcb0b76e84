"""Names of studies, models, variants and data sets: each becomes a folder or a file.

Such a name stays inside the folder it is put in, on every system: one lower-case part of
a path, so that no two differ in case alone, and none that Windows keeps for a device.
"""

PATTERN = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
RULE = "small letters, digits, _, - and dots, at most 64, the first a letter or a digit"
# Names that the project writes beside them.
RESERVED_NAMES = {
    "models": {"notebooks", "partial", "report", "report_files", "report.md", "report.html"}
    | {"summary.json", "summary.csv", "answers", "lm-eval", "sources.json", "items.html"},
    "variants": {"model", "calibration", "cost"},
    "evaluation.datasets": {"shared_text"},
}
# Folders of outputs/ that belong to no study.
RESERVED_STUDIES = {"bank", "bench", "coverage", "gpu", "scale", "serve-check"}
DEVICES = {"con", "prn", "aux", "nul"}
DEVICES |= {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


def name_problem(name: str) -> str | None:
    """Why a name that fits the pattern is no portable folder name; None if it is one."""
    if name.endswith("."):
        return "ends in a dot, which Windows leaves out; rename it"
    if name.partition(".")[0] in DEVICES:
        return "is the name of a device on Windows; rename it"
    return None
