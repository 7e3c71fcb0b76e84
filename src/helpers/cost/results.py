"""What each way of running a model costs, computed from the rounds of `cost.json`.

A measured number is the median of its rounds, with the least and the largest. Ratios are
taken round by round, where both were measured within a minute of each other, and only
then summed up: what slows the machine for a while slows both.
"""

from dataclasses import dataclass
from statistics import median

from helpers.core.errors import StudyError
from helpers.core.records import read_json
from helpers.study.stages import timed_models
from helpers.study.study_run import Job

MADE_BY = "03_cost"
TOLERANCE = 1.02  # a peak is a measurement too
QUIET = 1.5  # slowest to fastest round; more comes of something else on the machine


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of the rounds."""

    value: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class Way:
    """One way of running a model; `told` is its entry in `cost.json`, lists by round."""

    told: dict

    @property
    def name(self) -> str:
        return self.told["name"]

    @property
    def variant(self) -> str:
        return self.told["variant"]

    @property
    def file_bytes(self) -> int:
        return sum(self.told["file_bytes"].values())

    @property
    def linear_bytes(self) -> int:
        return self.told["linear_bytes"][0]

    @property
    def multiplies_in(self) -> str:
        """What the Linears multiply in; a simulation is called one."""
        kind = self.told["arithmetic"]
        return f"int8 simulated in {kind}" if self.told["simulated"] else kind

    def rounds(self, quantity: str, prefill_tokens: int = 0) -> list[float]:
        """One value a round of `load`, `memory`, `prefill` or `decode` (tokens a second)."""
        told = self.told
        match quantity:
            case "load":
                return told["load_s"]
            case "memory":
                return told["peak_memory_bytes"]
            case "prefill":
                return [prefill_tokens / s for s in told["prefill_s"]]
            case "decode":
                pairs = zip(told["decode_tokens"], told["decode_s"], strict=True)
                return [tokens / s for tokens, s in pairs]
        raise ValueError(f"no quantity is called {quantity!r}")


@dataclass(frozen=True)
class Cost:
    """All that was measured of one model, and the record of the measurement."""

    account: dict
    record: dict

    @property
    def ways(self) -> list[Way]:
        return [Way(told) for told in self.account["ways"]]

    @property
    def reference(self) -> Way:
        """The baseline in float32, which all ratios are against."""
        return self._float("float32")

    @property
    def bfloat16(self) -> Way:
        return self._float("bfloat16")

    def _float(self, dtype: str) -> Way:
        baseline = self.account["baseline"]
        wanted = (baseline, dtype)
        return next(w for w in self.ways if (w.variant, w.told["dtype"]) == wanted)

    @property
    def others(self) -> list[Way]:
        """All ways but the baseline's."""
        return [w for w in self.ways if w.variant != self.account["baseline"]]

    def measured(self, way: Way, quantity: str) -> Spread:
        return spread(self._rounds(way, quantity))

    def ratio(self, way: Way, quantity: str, against: Way) -> Spread:
        """The quantity as a multiple of another way's, round by round."""
        pairs = zip(self._rounds(way, quantity), self._rounds(against, quantity), strict=True)
        return spread([own / other for own, other in pairs])

    def _rounds(self, way: Way, quantity: str) -> list[float]:
        return way.rounds(quantity, self.account["work"]["prefill_tokens"])

    def unquiet(self) -> list[Way]:
        """Ways whose reading or writing took far longer in one round than in another."""
        spreads = {w.name: [self.measured(w, q) for q in ("prefill", "decode")] for w in self.ways}
        return [w for w in self.ways if any(s.high > QUIET * s.low for s in spreads[w.name])]

    def peak(self, way: Way) -> Spread | None:
        """Operations a second of the bare product in this arithmetic; the best is the limit."""
        values = self.account["peaks"][way.told["arithmetic"]]
        return None if None in values else spread(values)

    def achieved(self, way: Way) -> Spread | None:
        """Operations a second inside the Linears while reading; None if it was not timed."""
        seconds = way.told["linears_s"]
        if None in seconds:
            return None
        pairs = zip(way.told["linear_operations"], seconds, strict=True)
        return spread([operations / s for operations, s in pairs])

    def of_peak(self, way: Way) -> float | None:
        """The median achieved, as a fraction of the limit."""
        achieved, peak = self.achieved(way), self.peak(way)
        return achieved.value / peak.high if achieved and peak else None

    def in_linears(self, way: Way) -> float | None:
        """The fraction of the reading time that Linears take."""
        pairs = zip(way.told["linears_s"], way.told["prefill_s"], strict=True)
        shares = [inside / whole for inside, whole in pairs if inside is not None]
        return median(shares) if shares else None

    def fastest_reading(self, way: Way) -> float | None:
        """Tokens a second if Linears ran at the limit and nothing else took any time."""
        if (peak := self.peak(way)) is None:
            return None
        tokens = self.account["work"]["prefill_tokens"]
        return peak.high * tokens / way.told["linear_operations"][0]


def read_costs(job: Job) -> dict[str, Cost | None]:
    """The cost of every model that has one of its own; None where it was not measured.

    Raises:
        StudyError: a measurement is torn.
    """
    return {model: _read(job, model) for model in timed_models(job.study)}


def _read(job: Job, model: str) -> Cost | None:
    folder = job.paths.cost(model)
    if not (folder / "record.json").is_file():
        return None
    account = read_json(folder / "cost.json", made_by=MADE_BY)
    return Cost(account, read_json(folder / "record.json", made_by=MADE_BY))


def refuse_other_files(
    costs: dict[str, Cost | None], evaluated: dict[tuple[str, str], str]
) -> None:
    """Make sure that what was measured is what was evaluated.

    Args:
        costs: by model.
        evaluated: (model, variant) to the hash of the files that were evaluated.

    Raises:
        StudyError: a variant was measured on other files.
    """
    for (model, variant), digest in evaluated.items():
        cost = costs.get(model)
        if cost and cost.record["inputs"].get(variant) != digest:
            raise StudyError(
                f"{model}: the cost of {variant} was measured on other files than were "
                f"evaluated; run {MADE_BY} again"
            )
