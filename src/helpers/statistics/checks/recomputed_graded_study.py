"""Recomputes the graded blocks of summary.json from the answers.

Shares no statistics with `graded_study`: only which comparisons are invalid comes from the
recomputed verdicts of right and wrong.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import statsmodels.api as sm

from helpers.core.records import WHOLE_VARIANT
from helpers.statistics.checks import recomputed_graded as again
from helpers.statistics.checks.recomputed_statistics import holm
from helpers.statistics.checks.recomputed_verdicts import declared_for, level_share
from helpers.statistics.verdicts import (
    VariantAnswers,
    VariantPredictions,
    decision_rules,
    invalid_reason,
)
from helpers.study.schema import Comparison, FineTunedModel, Study

KL_UNIT = "nats a token"
TWO_SIDES = 1.8  # of alpha: two one-sided tests for equivalence at nine tenths of it


class GradedBlocks:
    """The three blocks of a study.

    Args:
        rows: by comparison, its recomputed row of right and wrong: `verdict`, `reason`.
    """

    def __init__(
        self,
        study: Study,
        answers: Mapping[tuple[str, str], VariantAnswers],
        rows: Mapping[Comparison, dict],
    ):
        self.study, self.answers, self.rows = study, answers, rows
        self.confidence = study.statistics.confidence
        self.alpha = round(1 - self.confidence, 12)
        self.normalize = {
            name: getattr(evaluation_set.ask, "normalize", "none")
            for name, evaluation_set in study.evaluation.datasets.items()
        }
        self.complete = {
            (m, name, v): _has_scores(answers[m, v].predictions[name], self.normalize[name])
            for m, v in answers
            for name in study.evaluation.datasets
        }
        sides = {(c.model, c.dataset, c.baseline) for c in rows}
        self.able = {
            at: again.able(self._rows(*at), self.normalize[at[1]], self.confidence)
            for at in self.complete
            if self.complete[at] and at in sides
        }
        self.blind = {at: self._blind_reason(*at[:2], able=able) for at, able in self.able.items()}

    def blocks(self) -> dict:
        """All blocks on graded scores; empty without any."""
        comparisons = self._comparisons()
        if not comparisons:
            return {}
        abilities = [
            {"model": m, "dataset": name, "variant": v, "able": able}
            | {"mean": self._mean_score(m, name, v)}
            | {"uninformative_because": self.blind[m, name, v]}
            for (m, name, v), able in self.able.items()
        ]
        others = [v for v in self.study.variants if v != self.study.baseline]
        by_variant = {v: self._pooled(v) for v in others}
        pooled = [by_variant[v][m] for m in self.study.models for v in others if m in by_variant[v]]
        rotation = self._costs(others, "rotate", "rotated")
        return {
            "graded": {"abilities": abilities, "comparisons": comparisons},
            "pooled": pooled,
            "finetuning_cost": self._costs(others, "finetune", "finetuned"),
        } | ({"rotation_cost": rotation} if rotation else {})

    def _rows(self, model: str, name: str, variant: str) -> list[dict]:
        return self.answers[model, variant].predictions[name]

    def _pair(self, model: str, name: str, variant: str, baseline: str = "") -> again.Pair:
        baseline = baseline or self.study.baseline
        return self._rows(model, name, baseline), self._rows(model, name, variant)

    def _mean_score(self, model: str, name: str, variant: str) -> float:
        rows = self._rows(model, name, variant)
        return float(np.mean(list(again.item_scores(rows, self.normalize[name]).values())))

    def _blind_reason(self, model: str, name: str, *, able: bool) -> str:
        """No ability; or a variant that differs by its float type alone lies beyond the margin."""
        if not able:
            return "the float model shows no ability that could be lost"
        margin = self._margin("probability")
        for variant in self.study.variants:
            sides = [(model, name, v) for v in (self.study.baseline, variant)]
            if not self._only_rounds(variant) or not all(self.complete.get(at) for at in sides):
                continue
            moved = again.difference(self._pair(model, name, variant), self.normalize[name])
            low, high = moved.limits(1 - TWO_SIDES * self.alpha)
            if moved.p() <= self.alpha and not (low > -margin and high < margin):
                return "rounding alone moves the score by more than the margin"
        return ""

    def _only_rounds(self, variant: str) -> bool:
        """Whether a variant has another float type than the baseline."""
        other_type = self.study.variants[variant].dtype is not None
        return variant != self.study.baseline and other_type

    def _margin(self, unit: str) -> float:
        margins = self.study.statistics.graded_margins
        return margins.probability if unit == "probability" else margins.nats

    def _row(
        self, mean: again.Mean, unit: str, *, tests: int = 1, identical: bool = False,
        primary: bool = False,
    ) -> dict:  # fmt: skip
        """A row as published, its verdict still open."""
        low, high = mean.limits(self.confidence)
        inner = mean.limits(1 - TWO_SIDES * self.alpha)
        return {
            "verdict": "", "reason": "", "primary": primary, "margin": self._margin(unit),
            "holm_p": None, "unit": unit, "n": mean.n, "clusters": mean.clusters,
            "delta": mean.value, "low": low, "high": high,
            "equivalence_low": inner[0], "equivalence_high": inner[1], "p": mean.p(),
            "smallest_detectable_difference": mean.detectable(
                self.alpha / max(1, tests), self.study.statistics.power
            ),
            "identical_scores": identical,
        }  # fmt: skip

    def _invalid_row(self, reason: str, unit: str, *, primary: bool = False) -> dict:
        row = {"verdict": "invalid", "reason": reason, "primary": primary}
        return row | {"margin": self._margin(unit), "holm_p": None}

    def _judge(self, row: dict, *, blind: str, holm_p: float | None, lower: bool = True) -> None:
        """Fill in a row's verdict; `lower` says that a negative difference is a loss."""
        p = row["p"] if holm_p is None else holm_p
        margin = row["margin"]
        inside = row["equivalence_low"] > -margin and row["equivalence_high"] < margin
        row["holm_p"] = holm_p
        if blind:
            row["verdict"] = "uninformative"
            row["reason"] = blind
        elif p <= self.alpha and row["delta"]:
            row["verdict"] = "worse" if (row["delta"] < 0) is lower else "better"
            if inside:
                row["reason"] = "the difference is nevertheless inside the margin"
        else:
            row["verdict"] = "equivalent" if inside else "inconclusive"

    def _invalid(self, model: str, name: str, variant: str) -> str:
        """Why a variant counts for nothing on a set; empty if it counts."""
        baseline = self.study.baseline
        c = Comparison(model=model, dataset=name, baseline=baseline, variant=variant)
        if c in self.rows and self.rows[c]["verdict"] == "invalid":
            return self.rows[c]["reason"]
        complete = self.complete[model, name, variant]
        return "" if complete else "its graded scores are missing or not finite"

    def _comparisons(self) -> list[dict]:
        declared, share = declared_for(self.study, "graded"), level_share(self.study)
        sizes: dict[str, list[Comparison]] = {"": declared}
        for c in self.rows:
            if c not in declared:
                sizes.setdefault(c.variant, []).append(c)
        rows: dict[Comparison, dict] = {}
        for c in self.rows:
            if not self.complete[c.model, c.dataset, c.baseline]:
                continue
            primary = c in declared
            tests = len(declared) * share if primary else len(sizes[c.variant])
            rows[c] = self._compared(c, tests, primary)
        for name, family in sizes.items():
            usable = {c: rows[c]["p"] for c in family if c in rows and not rows[c]["verdict"]}
            adjusted = holm([usable.get(c, 1.0) for c in family])
            adjusted = adjusted if name else [min(1.0, share * p) for p in adjusted]
            for c, holm_p in zip(family, adjusted, strict=True):
                if c in usable:
                    blind = self.blind[c.model, c.dataset, c.baseline]
                    self._judge(rows[c], blind=blind, holm_p=holm_p)
        return [c.model_dump() | row for c, row in rows.items()]

    def _compared(self, c: Comparison, tests: int, primary: bool) -> dict:
        accuracy = self.rows[c]
        if not self.complete[c.model, c.dataset, c.variant]:
            wrong = accuracy["verdict"] == "invalid"
            reason = accuracy["reason"] if wrong else "its graded scores are missing or not finite"
            return self._invalid_row(reason, "probability", primary=primary)
        pair = self._pair(c.model, c.dataset, c.variant, c.baseline)
        normalize = self.normalize[c.dataset]
        row = self._row(
            again.difference(pair, normalize), "probability", tests=tests, primary=primary,
            identical=_same_scores(pair, normalize),
        )  # fmt: skip
        if accuracy["verdict"] == "invalid":
            row |= {"verdict": "invalid", "reason": accuracy["reason"], "p": None}
        return row

    def _able_sets(self, model: str) -> list[str]:
        baseline = self.study.baseline
        sets = self.study.evaluation.datasets
        return [n for n in sets if self.blind.get((model, n, baseline)) == ""]

    def _pooled(self, variant: str) -> dict[str, dict]:
        """By model, the pooled row of a variant."""
        models = {m: names for m in self.study.models if (names := self._able_sets(m))}
        rows = {}
        for model, names in models.items():
            head = {"model": model, "variant": variant, "sets": names}
            reasons = [r for n in names if (r := self._invalid(model, n, variant))]
            if reasons:
                rows[model] = head | self._invalid_row(reasons[0], "probability")
            else:
                pairs = {n: self._pair(model, n, variant) for n in names}
                same = all(_same_scores(pair, self.normalize[n]) for n, pair in pairs.items())
                mean = again.pooled(pairs, self.normalize)
                row = self._row(mean, "probability", tests=len(models), identical=same)
                rows[model] = head | row
        p_values = [row.get("p", 1.0) for row in rows.values()]
        for (model, row), holm_p in zip(rows.items(), holm(p_values), strict=True):
            row["recovery"] = None
            if row["verdict"] == "invalid":
                continue
            self._judge(row, blind="", holm_p=holm_p)
            pairs = {n: self._pair(model, n, variant) for n in models[model]}
            if recovered := again.recovered(pairs, self.normalize, self.confidence):
                row["recovery"] = dict(zip(("value", "low", "high"), recovered, strict=True))
        return rows

    def _costs(self, others: list[str], how: str, made: str) -> list[dict]:
        """Of every model whose settings `how` names, less those of its start."""
        rows = []
        for model, source in self.study.models.items():
            if (making := getattr(source, how, None)) is None:
                continue
            for variant in others:
                models = (making.start, model)
                places = [(m, v) for m in models for v in (self.study.baseline, variant)]
                if all(at in self.answers for at in places):
                    head = {"start": making.start, made: model, "variant": variant}
                    rows.append(head | self._cost(models, variant))
        return [row for row in rows if row["sets"] or row["kl"]]

    def _cost(self, models: tuple[str, str], variant: str) -> dict:
        baseline, sets, family = self.study.baseline, {}, []
        names = [
            n
            for n in self.study.evaluation.datasets
            if all(self.complete[m, n, v] for m in models for v in (baseline, variant))
            and _same_items(*(self._rows(m, n, baseline) for m in models))
        ]
        reasons = {
            n: next((r for m in models if (r := self._invalid(m, n, variant))), "") for n in names
        }
        blind = {
            n: next((r for m in models if (r := self.blind[m, n, baseline])), "") for n in names
        }
        for n in names:
            first, second = (self._pair(m, n, variant) for m in models)
            mean = again.cost_difference(first, second, self.normalize[n])
            same = mean.value == 0 and mean.error == 0
            sets[n] = self._row(mean, "probability", tests=len(names), identical=same)
            family.append(1.0 if reasons[n] else sets[n]["p"])
            if reasons[n]:
                sets[n] |= {"verdict": "invalid", "reason": reasons[n], "p": None}
        for n, holm_p in zip(names, holm(family), strict=True):
            if not reasons[n]:
                self._judge(sets[n], blind=blind[n], holm_p=holm_p)
        kept = [n for n in names if not blind[n]]
        return {
            "sets": sets,
            "pooled_sets": kept,
            "pooled": self._pooled_cost(models, variant, kept, reasons),
            "kl": self._kl_cost(models, variant),
        }

    def _pooled_cost(self, models: tuple, variant: str, kept: list, reasons: dict) -> dict | None:
        if not kept:
            return None
        if wrong := [reasons[n] for n in kept if reasons[n]]:
            return self._invalid_row(wrong[0], "probability")
        first, second = ({n: self._pair(m, n, variant) for n in kept} for m in models)
        mean = again.pooled_cost_difference(first, second, self.normalize)
        row = self._row(mean, "probability", identical=mean.value == 0 and mean.error == 0)
        self._judge(row, blind="", holm_p=None)
        return row

    def _kl_cost(self, models: tuple[str, str], variant: str) -> dict | None:
        sides = [self.answers[m, variant] for m in models]
        for side in sides:
            for gate in side.failed_gates:
                if gate.get("invalidates", WHOLE_VARIANT) in (WHOLE_VARIANT, "shared_text"):
                    reason = f"{gate['name']} ({gate['measured']}; limit: {gate['limit']})"
                    return self._invalid_row(reason, KL_UNIT)
        tokens = [{r["id"]: r["tokens"] for r in side.passages} for side in sides]
        unreadable = any(r["kl"] is None for side in sides for r in side.passages)
        if tokens[0] != tokens[1] or unreadable or len(tokens[0]) < 2:
            return None
        mean = again.kl_difference(sides[0].passages, sides[1].passages)
        row = self._row(mean, KL_UNIT, identical=mean.value == 0 and mean.error == 0)
        self._judge(row, blind="", holm_p=None, lower=False)
        return row


Owner = tuple[str, str]  # the start model whose changes are taken off, or none; and the model


class DrawsBlock:
    """The block `draws` of summary.json: every variant of which several checkpoints were made.

    Args:
        draws: by (model, variant), the answers of its further draws.
        graded: the study's graded scores, recomputed.
    """

    def __init__(
        self,
        graded: GradedBlocks,
        draws: Mapping[tuple[str, str], Sequence[VariantAnswers]],
    ):
        self.graded, self.study, self.draws = graded, graded.study, draws
        self.sets = [
            name
            for name, evaluation_set in self.study.evaluation.datasets.items()
            if evaluation_set.ask.protocol == "loglikelihood"
        ]

    def rows(self) -> list[dict]:
        """Of every model its own recipes; then of fine-tuned models, less those of their start."""
        figures: dict[tuple[str, str, str], list[dict]] = {}
        for variant in dict.fromkeys(variant for _, variant in self.draws):
            own = [("", m) for m in self.study.models if (m, variant) in self.draws]
            trained = [
                (source.finetune.start, m)
                for m, source in self.study.models.items()
                if isinstance(source, FineTunedModel)
                and all((x, variant) in self.draws for x in (m, source.finetune.start))
            ]
            for owners in (own, trained):
                figures |= self._rows_of_variant(variant, owners)
        places = [("", *at) for at in self.draws]
        places += sorted(
            (at for at in figures if at[0]), key=lambda at: places.index(("", *at[1:]))
        )
        return [
            {"model": m, "variant": v, "start": start, "draws": 1 + len(self.draws[m, v])}
            | {"figures": figures[start, m, v]}
            for start, m, v in places
        ]

    def _rows_of_variant(self, variant: str, owners: list[Owner]) -> dict:
        """Figures by (start, model, variant); the owners' graded scores are one family."""
        by_set = {(o, n): self._graded(o, variant, [n], n) for o in owners for n in self.sets}
        by_set = {at: row for at, row in by_set.items() if row}
        pooled = {
            (o, "pooled"): self._graded(o, variant, able, "pooled")
            for o in owners
            if (able := [n for n in self.sets if self._blind(o, n) == ""])
        }
        for family in (by_set, pooled):
            self._settle(family)
        figures = {}
        for owner in owners:
            rows: list[dict] = []
            for name in self.sets:
                rows += [row for at, row in by_set.items() if at == (owner, name)]
                rows.append(self._accuracy(owner, variant, name))
            rows += [row for at, row in pooled.items() if at[0] == owner]
            rows += [self._text(owner, variant, *m) for m in (("KL", "kl"), ("loss", "nll"))]
            figures[*owner, variant] = rows
        return figures

    def _sides(self, model: str, variant: str) -> tuple[VariantAnswers, list[VariantAnswers]]:
        answers = self.graded.answers
        return (
            answers[model, self.study.baseline],
            [answers[model, variant], *self.draws[model, variant]],
        )

    def _blind(self, owner: Owner, name: str) -> str | None:
        """Why a set says nothing about a model, or about it or its start; None without scores."""
        places = [(model, name, self.study.baseline) for model in owner if model]
        if any(at not in self.graded.blind for at in places):
            return None
        return next((reason for at in places if (reason := self.graded.blind[at])), "")

    def _invalid(self, owner: Owner, variant: str, name: str) -> str:
        reasons = (self._invalid_of(model, variant, name) for model in owner if model)
        return next(filter(None, reasons), "")

    def _invalid_of(self, model: str, variant: str, name: str) -> str:
        c = Comparison(model=model, dataset=name, baseline=self.study.baseline, variant=variant)
        if self.graded.rows[c]["verdict"] == "invalid":
            return self.graded.rows[c]["reason"]
        baseline, draws = self._sides(model, variant)
        rules, adapter = decision_rules(self.study), self.study.evaluation.datasets[name].adapter
        before = VariantPredictions(
            c.baseline, baseline.predictions[name], _failure(baseline, name)
        )
        for number, draw in enumerate(draws[1:], start=2):
            label = f"{variant}~{number}"
            after = VariantPredictions(label, draw.predictions[name], _failure(draw, name))
            if reason := invalid_reason(adapter, before, after, rules):
                return reason
        return ""

    def _changes(self, owner: Owner, variant: str, changes_of: Callable) -> list[dict]:
        """By draw, the changes of every item: of the model, less those of its start if it has one.

        Args:
            changes_of: from the baseline and one draw to what the draw changes of every item.
        """
        tables = []
        for model in filter(None, owner):
            baseline, draws = self._sides(model, variant)
            tables.append([changes_of(baseline, draw) for draw in draws])
        *start, own = tables
        if not start:
            return own
        return [{i: x[i] - y[i] for i in x} for x, y in zip(own, *start, strict=True)]

    def _graded(self, owner: Owner, variant: str, names: list[str], place: str) -> dict:
        """A row of graded scores, its verdict still open; empty if the set has no scores."""
        if any(self._blind(owner, name) is None for name in names):
            return {}
        row = {"dataset": place, "measure": "graded score", "unit": "probability"}
        tables = []
        for name in names:
            problem = self._invalid(owner, variant, name)
            if not problem and not self._all_scored(owner, variant, name):
                problem = "its graded scores are missing or not finite"
            if problem:
                return row | self.graded._invalid_row(problem, "probability")
            tables.append(self._score_table(owner, variant, name))
        blind = self._blind(owner, names[0]) if place in names else ""
        return row | self._numbers(tables) | {"tables": tables, "blind": blind}

    def _all_scored(self, owner: Owner, variant: str, name: str) -> bool:
        sides = [self._sides(model, variant) for model in filter(None, owner)]
        rows = [s.predictions[name] for baseline, draws in sides for s in (baseline, *draws)]
        return all(_has_scores(of_side, self.graded.normalize[name]) for of_side in rows)

    def _score_table(self, owner: Owner, variant: str, name: str) -> tuple:
        normalize, rows = self.graded.normalize[name], self._rows(owner, name)

        def changes_of(baseline: VariantAnswers, draw: VariantAnswers) -> again.Changes:
            pair = baseline.predictions[name], draw.predictions[name]
            return again.score_changes(pair, normalize)[0]

        clusters = again.score_changes((rows, rows), normalize)[1]
        return self._changes(owner, variant, changes_of), clusters, None

    def _rows(self, owner: Owner, name: str) -> list[dict]:
        """The baseline's rows of the model."""
        return self.graded.answers[owner[1], self.study.baseline].predictions[name]

    def _numbers(self, tables: list) -> dict:
        """What every figure of a recipe says."""
        mean = again.recipe_mean(tables)
        first = again.recipe_mean([(t[0][:1], *t[1:]) for t in tables]).items
        low, high = mean.limits(self.graded.confidence)
        first_low, first_high = first.limits(self.graded.confidence)
        return {
            "reason": "", "delta": mean.items.value, "low": low, "high": high,
            "n": mean.items.n, "clusters": mean.items.clusters,
            "draw_deltas": list(mean.deltas), "between_draws": mean.between,
            "draws_error": mean.draws_error, "items_error": mean.items_error,
            "first_low": first_low, "first_high": first_high,
        }  # fmt: skip

    def _settle(self, family: Mapping[tuple[Owner, str], dict]) -> None:
        """Tests and verdicts of one family of graded scores, in place."""
        alpha, power = self.graded.alpha, self.study.statistics.power
        means = {
            at: again.recipe_mean(row["tables"]) for at, row in family.items() if "tables" in row
        }
        p_values = [means[at].p() if at in means else 1.0 for at in family]
        for (at, row), p, holm_p in zip(family.items(), p_values, holm(p_values), strict=True):
            if at not in means:
                continue
            changes = [
                c for draws, *_ in row.pop("tables") for draw in draws for c in draw.values()
            ]
            low, high = means[at].limits(1 - TWO_SIDES * alpha)
            row |= {
                "primary": False, "margin": self.graded._margin("probability"), "p": p,
                "equivalence_low": low, "equivalence_high": high,
                "identical_scores": not any(changes),
                "smallest_detectable_difference": means[at].detectable(alpha / len(family), power),
            }  # fmt: skip
            self.graded._judge(row, blind=row.pop("blind"), holm_p=holm_p)

    def _accuracy(self, owner: Owner, variant: str, name: str) -> dict:
        row = {"dataset": name, "measure": "accuracy", "unit": "probability"}
        if problem := self._invalid(owner, variant, name):
            return row | {"reason": problem}

        def changes_of(baseline: VariantAnswers, draw: VariantAnswers) -> dict:
            before = {r["id"]: r["score"] for r in baseline.predictions[name]}
            return {r["id"]: r["score"] - before[r["id"]] for r in draw.predictions[name]}

        clusters = {r["id"]: r["cluster"] or r["id"] for r in self._rows(owner, name)}
        return row | self._numbers([(self._changes(owner, variant, changes_of), clusters, None)])

    def _text(self, owner: Owner, variant: str, measure: str, key: str) -> dict:
        """KL or loss a token; of the loss the baseline's is taken off."""
        row = {"dataset": "shared_text", "measure": measure, "unit": KL_UNIT}
        models = list(filter(None, owner))
        tokens = [
            {r["id"]: r["tokens"] for r in self._sides(model, variant)[0].passages}
            for model in models
        ]
        reasons = [self._text_problem(model, variant, key) for model in models]
        if tokens[0] != tokens[-1]:
            reasons.append(f"{owner[1]}: it read other tokens of the shared text")
        if problem := next(filter(None, reasons), ""):
            return row | {"reason": problem}

        def changes_of(baseline: VariantAnswers, draw: VariantAnswers) -> dict:
            start = {r["id"]: r["nll"] if key == "nll" else 0.0 for r in baseline.passages}
            return {r["id"]: (r[key] - start[r["id"]]) / r["tokens"] for r in draw.passages}

        changes = self._changes(owner, variant, changes_of)
        return row | self._numbers([(changes, {i: i for i in tokens[0]}, tokens[0])])

    def _text_problem(self, model: str, variant: str, key: str) -> str:
        baseline, draws = self._sides(model, variant)
        further = [f"{variant}~{number}" for number in range(2, len(draws) + 1)]
        labels = [self.study.baseline, variant, *further]
        tokens = {r["id"]: r["tokens"] for r in baseline.passages}
        for label, side in zip(labels, [baseline, *draws], strict=True):
            if failure := _failure(side, "shared_text"):
                return f"{label} failed a check: {failure}"
            if tokens != {r["id"]: r["tokens"] for r in side.passages}:
                return f"{label}: it read other tokens of the shared text"
            if None in [r[key] for r in side.passages]:
                return f"{label}: a passage has no finite sum"
        return "" if len(tokens) > 1 else "the shared text has one passage"


def calibrations_block(
    study: Study,
    answers: Mapping[tuple[str, str], VariantAnswers],
    draws: Mapping[tuple[str, str], Sequence[VariantAnswers]],
) -> list[dict]:
    """The block `calibrations` of summary.json: variants of named calibrations beside draws.

    Where one more draw lies is read from an ordinary least squares fit of a constant.
    """
    recipes = {
        name: recipe.model_dump(exclude={"calibration", "repeats"})
        for name, recipe in study.variants.items()
    }
    own = [name for name, recipe in study.variants.items() if recipe.calibration is None]
    rows = []
    for model in study.models:
        for variant in (name for name in study.variants if name not in own):
            alike = [name for name in own if recipes[name] == recipes[variant]]
            if not alike:
                continue
            checkpoints = [answers[model, alike[0]], *draws.get((model, alike[0]), [])]
            kls = [x for x in map(_text_kl, checkpoints) if x is not None]
            limits = [None, None]
            if 3 <= len(kls) == len(checkpoints):
                fit = sm.OLS(np.array(kls), np.ones(len(kls))).fit()
                alpha = 1 - study.statistics.confidence
                limits = fit.get_prediction([1.0]).conf_int(obs=True, alpha=alpha)[0].tolist()
            kl = _text_kl(answers[model, variant])
            row = {"model": model, "variant": variant, "reference": alike[0], "draws": len(kls)}
            row |= {"kl": kl, "low": limits[0], "high": limits[1]}
            rows.append(row | {"place": _place_among(kl, *limits)})
    return rows


def decompositions_block(
    graded: GradedBlocks, draws: Mapping[tuple[str, str], Sequence[VariantAnswers]]
) -> list[dict]:
    """The block `decompositions` of summary.json: weights and activations alone, and the rest.

    Every part is a sum over the three variants of item-wise changes, each times 1, −1 or 0.
    """
    study, rows = graded.study, []
    for model in study.models:
        for variant in study.variants:
            weights, activations = (_ruler(study, variant, p) for p in ("w8a16", "a8"))
            if weights and activations:
                names = [variant, weights, activations]
                sides = [[graded.answers[model, n], *draws.get((model, n), ())] for n in names]
                rows += _decomposition(graded, model, names, sides)
    return rows


def _ruler(study: Study, variant: str, preset: str) -> str | None:
    """The first ruler of a preset that keeps, smooths and calibrates as a W8A8 variant does."""
    ours = study.variants[variant]
    is_w8a8 = ours.preset == "w8a8" or (ours.weights, ours.activations) == (
        "channel",
        "token_dynamic",
    )
    if not is_w8a8 or ours.rounding != "nearest" or ours.recipe:
        return None
    for name, other in study.variants.items():
        same = all(
            getattr(ours, key) == getattr(other, key)
            for key in type(ours).model_fields
            if key not in ("preset", "weights", "activations", "repeats")
        )
        if other.preset == preset and same:
            return name
    return None


SIGNS = {"both": (1, 0, 0), "weights": (0, 1, 0), "activations": (0, 0, 1)}
SIGNS["not_additive"] = (1, -1, -1)


def _decomposition(graded: GradedBlocks, model: str, names: list[str], checkpoints: list) -> list:
    study, count = graded.study, min(map(len, checkpoints))
    checkpoints = [sides[:count] for sides in checkpoints]
    every = [side for sides in checkpoints for side in sides]
    baseline = graded.answers[model, study.baseline]
    sets = [
        n
        for n in study.evaluation.datasets
        if graded.blind.get((model, n, study.baseline)) == ""
        and all(n in side.predictions for side in every)
    ]
    tables: dict[str, list] = {"graded score": [], "KL": []}
    for name in sets:
        changes = [
            [
                again.score_changes(
                    (baseline.predictions[name], side.predictions[name]), graded.normalize[name]
                )[0]
                for side in sides
            ]
            for sides in checkpoints
            if all(_has_scores(side.predictions[name], graded.normalize[name]) for side in sides)
        ]
        own = baseline.predictions[name]
        clusters = again.score_changes((own, own), graded.normalize[name])[1]
        tables["graded score"].append((changes, clusters, None))
    tokens = {row["id"]: row["tokens"] for row in baseline.passages}
    kls = [
        [
            {r["id"]: r["kl"] / r["tokens"] for r in side.passages if r["kl"] is not None}
            for side in s
        ]
        for s in checkpoints
    ]
    tables["KL"].append((kls, {name: name for name in tokens}, tokens))
    rows = []
    for measure, of_measure in tables.items():
        guarded = sets if measure == "graded score" else ["shared_text"]
        reason = _part_failure(names, checkpoints, guarded)
        if not guarded:
            reason = "the float model shows no ability that could be lost"
        elif not reason and not all(_is_whole(*table) for table in of_measure):
            reason = "a value is not finite, or other tokens were read"
        parts = {} if reason else _parts(of_measure, graded.confidence)
        rows.append(
            {"model": model, "variant": names[0], "rulers": names[1:], "measure": measure}
            | {"unit": KL_UNIT if measure == "KL" else "probability"}
            | {"sets": sets if measure == "graded score" else [], "reason": reason, "parts": parts}
        )
    return rows


def _part_failure(names: list[str], checkpoints: list, guarded: list[str]) -> str:
    """The first failed check, draw by draw."""
    for of_draw in zip(*checkpoints, strict=True):
        for name, side in zip(names, of_draw, strict=True):
            for gate in side.failed_gates:
                if gate.get("invalidates", WHOLE_VARIANT) in (WHOLE_VARIANT, *guarded):
                    measured = f"({gate['measured']}; limit: {gate['limit']})"
                    return f"{name} failed a check: {gate['name']} {measured}"
    return ""


def _is_whole(changes: list, clusters: Mapping, weights: Mapping | None) -> bool:
    """Whether all three variants have a value of every item."""
    items = set(weights or (changes[0][0] if changes else ()))
    return len(changes) == 3 and all(set(draw) == items for sides in changes for draw in sides)


def _parts(tables: list, confidence: float) -> dict:
    """Every part: its mean by draw, and limits over the items of the first."""
    parts = {}
    for part, signs in SIGNS.items():
        combined = []
        for changes, clusters, weights in tables:
            by_draw = [
                {
                    item: sum(s * side[item] for s, side in zip(signs, sides, strict=True))
                    for item in sides[0]
                }
                for sides in zip(*changes, strict=True)
            ]
            combined.append((by_draw, clusters, weights))
        first = again.recipe_mean([(draws[:1], *rest) for draws, *rest in combined]).items
        low, high = first.limits(confidence)
        deltas = list(again.recipe_mean(combined).deltas)
        parts[part] = {"draws": deltas, "low": low, "high": high}
    return parts


def _place_among(kl: float | None, low: float | None, high: float | None) -> str:
    if kl is None or low is None or high is None:
        return "unknown"
    return "above" if kl > high else "below" if kl < low else "within"


def _text_kl(side: VariantAnswers) -> float | None:
    """KL a token of the shared text; None if a gate on it failed or a passage has none."""
    table = np.array([[row["kl"], row["tokens"]] for row in side.passages], dtype=float)
    if not len(table) or np.isnan(table).any() or _failure(side, "shared_text"):
        return None
    return float(table[:, 0].sum() / table[:, 1].sum())


def _failure(side: VariantAnswers, guarded: str) -> str | None:
    """The first failed gate on the variant or on what is named, in words."""
    for gate in side.failed_gates:
        if gate.get("invalidates", WHOLE_VARIANT) in (WHOLE_VARIANT, guarded):
            return f"{gate['name']} ({gate['measured']}; limit: {gate['limit']})"
    return None


def _same_scores(pair: again.Pair, normalize: str) -> bool:
    return again.item_scores(pair[0], normalize) == again.item_scores(pair[1], normalize)


def _same_items(first: list[dict], second: list[dict]) -> bool:
    return {row["id"] for row in first} == {row["id"] for row in second}


def _has_scores(rows: list[dict], normalize: str) -> bool:
    """Whether every row holds finite log-probabilities, and two clusters something to beat."""
    groups = set()
    for row in rows:
        if "logprobs" in row:
            numbers = [*row["logprobs"]]
            numbers += [None] if normalize == "bytes" and "option_bytes" not in row else []
            beaten = True
        else:
            numbers = [*(row.get("gold_loglikelihoods") or [None])]
            beaten = bool(row.get("foil_tokens"))
            numbers += [row["foil_loglikelihood"]] if beaten else []
        if not all(x is not None and np.isfinite(x) for x in numbers):
            return False
        groups |= {row["cluster"] or row["id"]} if beaten else set()
    return len(groups) > 1
