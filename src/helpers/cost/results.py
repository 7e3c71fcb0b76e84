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
TOLERANCE = 1.02  # a peak has its own measurement error
QUIET = 1.5  # ratio of slowest to fastest round; above it other work disturbed the machine


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of the rounds."""

    value: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class ConfigurationResult:
    """One measured configuration; `entry` is its object in `cost.json`, with lists by round."""

    entry: dict

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def variant(self) -> str:
        return self.entry["variant"]

    @property
    def file_bytes(self) -> int:
        return sum(self.entry["file_bytes"].values())

    @property
    def linear_bytes(self) -> int:
        return self.entry["linear_bytes"][0]

    @property
    def multiplies_in(self) -> str:
        """The type the Linears multiply in; a simulation is named as one."""
        kind = self.entry["arithmetic"]
        return f"int8 simulated in {kind}" if self.entry["simulated"] else kind

    def rounds(self, quantity: str, prefill_tokens: int = 0) -> list[float]:
        """One value a round of `load`, `memory`, `prefill` or `decode` (tokens a second)."""
        entry = self.entry
        match quantity:
            case "load":
                return entry["load_s"]
            case "memory":
                return entry["peak_memory_bytes"]
            case "prefill":
                return [prefill_tokens / s for s in entry["prefill_s"]]
            case "decode":
                pairs = zip(entry["decode_tokens"], entry["decode_s"], strict=True)
                return [tokens / s for tokens, s in pairs]
        raise ValueError(f"no quantity is called {quantity!r}")


@dataclass(frozen=True)
class Cost:
    """The measurements of one model (the content of `cost.json`), and their record."""

    measurements: dict
    record: dict

    @property
    def configurations(self) -> list[ConfigurationResult]:
        return [ConfigurationResult(entry) for entry in self.measurements["ways"]]

    @property
    def reference(self) -> ConfigurationResult:
        """The baseline in float32, the denominator of all ratios."""
        return self._float("float32")

    @property
    def bfloat16(self) -> ConfigurationResult:
        return self._float("bfloat16")

    def _float(self, dtype: str) -> ConfigurationResult:
        baseline = self.measurements["baseline"]
        key = (baseline, dtype)
        return next(w for w in self.configurations if (w.variant, w.entry["dtype"]) == key)

    @property
    def others(self) -> list[ConfigurationResult]:
        """All configurations but the baseline's."""
        return [w for w in self.configurations if w.variant != self.measurements["baseline"]]

    def measured(self, configuration: ConfigurationResult, quantity: str) -> Spread:
        return spread(self._rounds(configuration, quantity))

    def ratio(
        self, configuration: ConfigurationResult, quantity: str, against: ConfigurationResult
    ) -> Spread:
        """The quantity as a multiple of another configuration's, round by round."""
        pairs = zip(
            self._rounds(configuration, quantity), self._rounds(against, quantity), strict=True
        )
        return spread([own / other for own, other in pairs])

    def _rounds(self, configuration: ConfigurationResult, quantity: str) -> list[float]:
        return configuration.rounds(quantity, self.measurements["work"]["prefill_tokens"])

    def noisy(self) -> list[ConfigurationResult]:
        """Configurations whose prefill or decode speed differs widely between rounds."""
        spreads = {
            w.name: [self.measured(w, q) for q in ("prefill", "decode")]
            for w in self.configurations
        }
        return [
            w for w in self.configurations if any(s.high > QUIET * s.low for s in spreads[w.name])
        ]

    def peak(self, configuration: ConfigurationResult) -> Spread | None:
        """Operations a second of the bare matrix product in this arithmetic."""
        values = self.measurements["peaks"][configuration.entry["arithmetic"]]
        return None if None in values else spread(values)

    def achieved(self, configuration: ConfigurationResult) -> Spread | None:
        """Operations a second inside the Linears during prefill; None if they were not timed."""
        seconds = configuration.entry["linears_s"]
        if None in seconds:
            return None
        pairs = zip(configuration.entry["linear_operations"], seconds, strict=True)
        return spread([operations / s for operations, s in pairs])

    def peak_fraction(self, configuration: ConfigurationResult) -> float | None:
        """The median achieved, as a fraction of the highest peak."""
        achieved, peak = self.achieved(configuration), self.peak(configuration)
        return achieved.value / peak.high if achieved and peak else None

    def linear_time_fraction(self, configuration: ConfigurationResult) -> float | None:
        """The fraction of the prefill time that Linears take."""
        pairs = zip(configuration.entry["linears_s"], configuration.entry["prefill_s"], strict=True)
        shares = [inside / whole for inside, whole in pairs if inside is not None]
        return median(shares) if shares else None

    def prefill_limit(self, configuration: ConfigurationResult) -> float | None:
        """Prefill tokens a second if Linears ran at the peak and nothing else took time."""
        if (peak := self.peak(configuration)) is None:
            return None
        tokens = self.measurements["work"]["prefill_tokens"]
        return peak.high * tokens / configuration.entry["linear_operations"][0]


def read_costs(job: Job) -> dict[str, Cost | None]:
    """The cost of every model that the study times; None where it was not measured.

    Raises:
        StudyError: a measurement file is damaged.
    """
    return {model: _read(job, model) for model in timed_models(job.study)}


def _read(job: Job, model: str) -> Cost | None:
    folder = job.paths.cost(model)
    if not (folder / "record.json").is_file():
        return None
    account = read_json(folder / "cost.json", made_by=MADE_BY)
    return Cost(account, read_json(folder / "record.json", made_by=MADE_BY))


def check_measured_files(
    costs: dict[str, Cost | None], evaluated_digests: dict[tuple[str, str], str]
) -> None:
    """Check that costs were measured on the files that were evaluated.

    Args:
        costs: by model.
        evaluated_digests: (model, variant) to the hash of the evaluated files.

    Raises:
        StudyError: a variant was measured on other files.
    """
    for (model, variant), digest in evaluated_digests.items():
        cost = costs.get(model)
        if cost and cost.record["inputs"].get(variant) != digest:
            raise StudyError(
                f"{model}: the cost of {variant} was measured on other files than were "
                f"evaluated; run {MADE_BY} again"
            )
