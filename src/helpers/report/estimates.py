"""Every figure the report quotes, with its interval: scores, losses, and what running costs.

Items that share a passage, and the tokens of the shared text, are resampled by passage; each
figure says how many items it is over. A cost is the median of its rounds, with the least and the
largest. Ratios are taken round by round, where both were measured within a minute of each other,
and only then summed up: what slows the machine for a while slows both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np

from helpers.core.errors import StudyError
from helpers.core.records import WHOLE_VARIANT, failed_check, read_json
from helpers.statistics.graded import TokenKl, token_kl
from helpers.statistics.intervals import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    wilson_interval,
)
from helpers.statistics.verdicts import DecisionRules, score_interval
from helpers.study.loading import Job
from helpers.study.schema import Variant, speed_key
from helpers.study.stages import timed_models

QUANTIZATION_STAGE = "02_quantization"  # of checkpoints and their verification
KL_TAIL = 5  # tokens of each variant that are named: those with the largest KL


@dataclass(frozen=True)
class CalibrationResults:
    """Activations of one model: abs-max by Linear, and |x| by token of the worst Linear."""

    absmax: dict[str, np.ndarray]  # (in_features,)
    surface: np.ndarray  # (tokens, in_features)
    surface_of: str
    record: dict


@dataclass(frozen=True)
class VariantResults:
    """One variant of one model: its answers, and the records of its checkpoint.

    Attributes:
        passages: rows of the shared text.
        verification, quantization: None for a variant without a checkpoint of its own.
        evaluation_gates: the record of the gates on the evaluation itself.
    """

    model: str
    variant: str
    predictions: dict[str, list[dict]]
    passages: list[dict]
    metrics: dict[str, dict]
    shared_text: dict
    record: dict
    verification: dict | None
    quantization: dict | None
    evaluation_gates: dict

    @property
    def key(self) -> tuple[str, str]:
        """(model, variant), the key of the mappings in `Results`."""
        return self.model, self.variant

    @property
    def gates(self) -> list[dict]:
        """All gates: on the checkpoint, if there is one, then on the evaluation."""
        return [gate for record in self.records for gate in _recorded_gates(record)]

    @property
    def passage_losses(self) -> list[float | None]:
        """The loss on every passage of the shared text, which differs between models."""
        return [row["nll"] for row in self.passages]

    @cached_property
    def kl_by_token(self) -> TokenKl | None:
        """Quantiles and tail of the KL; None for the baseline, or if no KL by token was kept."""
        if not all("token_kl" in row for row in self.passages):
            return None
        return token_kl({row["id"]: row["token_kl"] for row in self.passages}, shown=KL_TAIL)

    @property
    def records(self) -> list[dict]:
        """The existing records of checks."""
        return [record for record in (self.verification, self.evaluation_gates) if record]

    @property
    def failed_gates(self) -> list[dict]:
        return [gate for gate in self.gates if not gate["passed"]]

    @property
    def passed(self) -> bool:
        return not self.failed_gates

    @property
    def failed_check(self) -> str | None:
        """The first failed check that invalidates the whole variant; None if none does."""
        return failed_check(self.gates, [WHOLE_VARIANT])

    def failed_check_on(self, dataset: str) -> str | None:
        """The first failed check on the variant or on this evaluation set; None if none failed."""
        return failed_check(self.gates, [WHOLE_VARIANT, dataset])


def _recorded_gates(record: dict) -> list[dict]:
    """A record's gates, and a failed one if the record failed although all its gates passed."""
    if record["passed"] or not all(gate["passed"] for gate in record["gates"]):
        return record["gates"]
    failed_gate = {
        "name": "record of checks",
        "passed": False,
        "measured": "it says it did not pass",
    }
    return [*record["gates"], failed_gate | {"limit": "a gate that fails says why"}]


MAIN_METRICS = {"squad_v2": "exact_match"}  # adapters whose 0/1 score is not called accuracy


@dataclass(frozen=True)
class Estimate:
    """A value over n items or tokens, with its interval if it has one."""

    value: float | None
    interval: Interval | None
    n: int


def main_metric(adapter: str) -> str:
    """The name of an adapter's 0/1 score."""
    return MAIN_METRICS.get(adapter, "accuracy")


def dataset_estimates(
    adapter: str, predictions: list[dict], metrics: dict, rules: DecisionRules
) -> dict[str, Estimate]:
    """The metrics of one evaluation set by name, the main one first."""
    n = len(predictions)
    estimates = {main_metric(adapter): _score_estimate(predictions, rules)}
    if adapter == "squad_v2":
        estimates["f1"] = _f1_estimate(predictions, rules)
        parts = (("has_answer", True), ("no_answer", False))
        for name, answerable in parts:
            part = [p for p in predictions if bool(p["golds"]) == answerable]
            if part:
                estimates[f"{name}_exact_match"] = _score_estimate(part, rules)
                estimates[f"{name}_f1"] = _f1_estimate(part, rules)
    elif adapter == "openmath":
        coverage = metrics["median_absolute_difference_coverage"]
        median = metrics["median_absolute_difference"]
        estimates["median_absolute_difference"] = Estimate(median, None, round(coverage * n))
        estimates["median_absolute_difference_coverage"] = _share_estimate(
            round(coverage * n), n, rules
        )
    elif adapter != "task":
        estimates["macro_f1"] = Estimate(metrics["macro_f1"], None, n)
    readable = n - metrics["unparsed"]
    return estimates | {"format_success": _share_estimate(readable, n, rules)}


def _score_estimate(predictions: list[dict], rules: DecisionRules) -> Estimate:
    return Estimate(
        sum(p["score"] for p in predictions) / len(predictions),
        score_interval(predictions, rules) if _count_clusters(predictions) > 1 else None,
        len(predictions),
    )


def _count_clusters(predictions: list[dict]) -> int:
    return len({p["cluster"] or p["id"] for p in predictions})


def _f1_estimate(predictions: list[dict], rules: DecisionRules) -> Estimate:
    values = [p["f1"] for p in predictions]
    mean, interval = sum(values) / len(values), None
    if _count_clusters(predictions) > 1:
        clusters = [p["cluster"] or p["id"] for p in predictions]
        bootstrap = bootstrap_mean(values, clusters, confidence=rules.confidence, **rules.random)
        mean, interval = bootstrap.mean, None if bootstrap.degenerate else bootstrap.interval
    return Estimate(mean, interval, len(values))


def _share_estimate(successes: int, n: int, rules: DecisionRules) -> Estimate:
    return Estimate(successes / n, wilson_interval(successes, n, confidence=rules.confidence), n)


def token_estimates(evaluated: VariantResults, rules: DecisionRules) -> dict[str, Estimate]:
    """Perplexity, KL and top-1 agreement over the tokens of the shared text.

    The quantiles of KL have no interval. They are there if the KL of each token is.
    """
    rows = evaluated.passages
    tokens = evaluated.shared_text["tokens"]
    loss = _token_mean([row["nll"] for row in rows], rows, rules)
    interval = loss.interval if evaluated.shared_text["perplexity"] is not None else None
    if interval is not None:
        limits = math.exp(interval.low), math.exp(interval.high)
        interval = Interval(*limits, interval.confidence)
    return {
        "perplexity": Estimate(evaluated.shared_text["perplexity"], interval, tokens),
        "kl": _token_mean([row["kl"] for row in rows], rows, rules),
        **_kl_quantiles(evaluated.kl_by_token),
        "top1_agreement": _token_mean([row["top1_agreements"] for row in rows], rows, rules),
    }


KL_QUANTILES = ("median", "percentile_99", "percentile_99_9", "largest", "tail_share")


def _kl_quantiles(kl: TokenKl | None) -> dict[str, Estimate]:
    if kl is None:
        return {}
    return {f"kl_{name}": Estimate(getattr(kl, name), None, kl.tokens) for name in KL_QUANTILES}


def _token_mean(sums: list[float | None], rows: list[dict], rules: DecisionRules) -> Estimate:
    """A mean per token with a bootstrap over passages; no interval from a single passage.

    The value is None if the sum of a passage is not finite.
    """
    tokens = [row["tokens"] for row in rows]
    if None in sums:
        return Estimate(None, None, sum(tokens))
    if len(rows) < 2:
        return Estimate(sum(sums) / sum(tokens), None, sum(tokens))
    bootstrap = bootstrap_mean(
        [s / t for s, t in zip(sums, tokens, strict=True)],
        [row["id"] for row in rows],
        weights=tokens,
        confidence=rules.confidence,
        **rules.random,
    )
    return Estimate(
        bootstrap.mean, None if bootstrap.degenerate else bootstrap.interval, sum(tokens)
    )


@dataclass(frozen=True)
class TokenDifference:
    """Mean difference per token of two variants on the same passages, with its test.

    `value` is None if a passage of either has no finite sum, or if their passages differ.
    """

    value: float | None
    interval: Interval | None
    p: float | None
    passages: int


def token_difference(
    baseline: VariantResults, variant: VariantResults, key: str, rules: DecisionRules
) -> TokenDifference:
    """Difference of `nll` or `kl` per token, variant minus baseline, paired by passage."""
    before = {row["id"]: row for row in baseline.passages}
    after = {row["id"]: row for row in variant.passages}
    if {k: r["tokens"] for k, r in before.items()} != {k: r["tokens"] for k, r in after.items()}:
        return TokenDifference(None, None, None, 0)  # a gate says so
    shared = sorted(before)
    tokens = [before[k]["tokens"] for k in shared]
    if any(side[k][key] is None for side in (before, after) for k in shared):
        return TokenDifference(None, None, None, len(shared))
    change = [after[k][key] - before[k][key] for k in shared]
    if len(shared) < 2:
        return TokenDifference(sum(change) / sum(tokens), None, None, len(shared))
    bootstrap = bootstrap_difference(
        [c / t for c, t in zip(change, tokens, strict=True)],
        shared,
        weights=tokens,
        confidence=rules.confidence,
        **rules.random,
    )
    interval = None if bootstrap.degenerate else bootstrap.interval
    return TokenDifference(bootstrap.mean, interval, bootstrap.p, bootstrap.clusters)


MADE_BY = "03_cost"
TOLERANCE = 1.02  # a peak has its own measurement error
QUIET_SPREAD = 1.5  # ratio of slowest to fastest round; above it other work disturbed the machine


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

    def multiplying_as(
        self, variant: str, recipes: Mapping[str, Variant]
    ) -> ConfigurationResult | None:
        """The measured configuration of an int8 variant, or of one that multiplies as it does.

        None of a simulated variant, and if no such configuration was measured. A partial report may
        lack recipes of what was measured; those are passed over.
        """
        own = recipes[variant]
        if own.kv or not own.quantized:
            return None
        known = [w for w in self.others if w.variant in recipes]
        alike = [w for w in known if speed_key(recipes[w.variant]) == speed_key(own)]
        return next((w for w in alike if w.variant == variant), next(iter(alike), None))

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
            w
            for w in self.configurations
            if any(s.high > QUIET_SPREAD * s.low for s in spreads[w.name])
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
