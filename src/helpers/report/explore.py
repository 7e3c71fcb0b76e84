"""Widgets of notebooks/explore.ipynb: lost and gained items, smoothing at any α, a text's tokens.

Each is a box of controls above what they show. It shows its first state when it is made, so that a
notebook without a browser executes it too and fails if it fails. Later an error is shown in place
of the result, since JupyterLab hides the traceback of a control.

Texts of models, data sets and users are escaped: an HTML widget's value becomes part of the page
as it is. Colours are translucent, so that they fit JupyterLab's light and dark themes. Models come
in as arguments (`helpers.quantization.exploration`): this module imports no torch.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from helpers.core.errors import printable
from helpers.report.figures import ALARM, INK, QUIET, in_house_style
from helpers.report.markdown import count, number
from helpers.report.pages import (
    DIFFERENCES,
    differing_item_html,
    differing_items,
    inert,
    item_label,
    page_data,
)
from helpers.report.results import Results

TINY = 1e-12  # the least divisor
EVERY_SET = "all sets"
ALPHA_STEP = 0.05
FIRST_ALPHA = 0.5  # the paper's, where the variant has none for the Linear
WIDTH, DPI = 990, 110  # of the figure, in pixels
MARGINS = {"left": 0.07, "right": 0.99, "top": 0.98, "bottom": 0.1, "hspace": 0.35, "wspace": 0.2}
CURVE = tuple(step / 10 for step in range(11))  # α of the SQNR curve
KL_DECADES = (-3, 0)  # log10 of the KL in nats without colour, and in full colour
DEEPEST = 0.65  # opacity of the full colour, on which text stays legible in both themes
STYLE = Path(__file__).with_name("explore.css")


def flip_table(results: Results) -> pd.DataFrame:
    """`lost / gained` of every variant against the baseline, by model and evaluation set."""
    answers = results.frame()
    scores = answers.set_index(["model", "dataset", "id", "variant"])["score"].unstack("variant")
    changes = scores[results.compared].sub(scores[results.study.baseline], axis=0)
    lost, gained = (
        flipped.groupby(level=["model", "dataset"], sort=False).sum().astype(str)
        for flipped in (changes < 0, changes > 0)
    )
    return lost + " / " + gained


class Panel(widgets.VBox):
    """Controls above outputs; `show` fills the outputs, `clear` empties them."""

    def __init__(self, controls: Sequence[widgets.Widget], outputs: Sequence[widgets.Widget]):
        self.problem = widgets.HTML()
        row = widgets.HBox(controls, layout=widgets.Layout(flex_flow="row wrap"))
        super().__init__(
            [
                widgets.HTML(f"<style>{STYLE.read_text(encoding='utf-8')}</style>"),
                row,
                self.problem,
                *outputs,
            ]
        )

    def show(self) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def changed(self, _change: object = None) -> None:
        """Show again; an error is shown in place of the outputs."""
        try:
            self.show()
            self.problem.value = ""
        except Exception as error:  # a control's traceback is shown nowhere
            self.clear()
            reason = str(error).strip() or type(error).__name__
            self.problem.value = (
                f'<div class="explore"><p class="problem">{inert(reason)}</p></div>'
            )


def choice(label: str, options: Sequence, value: object = None) -> widgets.Dropdown:
    """A drop-down list; without a value its first option is chosen."""
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    first = value if value in values else values[0]
    return widgets.Dropdown(
        options=options,
        value=first,
        description=label,
        style={"description_width": "initial"},
        layout={"width": "max-content", "margin": "2px 12px 2px 2px"},
    )


class ItemBrowser(Panel):
    """The items that a variant answers otherwise than the baseline, one of them in full."""

    def __init__(self, results: Results, *, model: str, variant: str):
        self.pages, self.rows = page_data(results), []
        sets = [(page["label"], page["name"]) for page in self.pages["sets"]]
        self.model_choice = choice("model", results.models, model)
        self.variant_choice = choice("variant", results.compared, variant)
        self.set_choice = choice("set", [(EVERY_SET, EVERY_SET), *sets])
        kinds = [(text, (kind,)) for kind, text in DIFFERENCES.items()]
        self.kind_choice = choice("items", [("lost and gained", ("lost", "gained")), *kinds])
        self.items = widgets.Select(rows=8, layout=widgets.Layout(width="100%"))
        self.counts, self.item = widgets.HTML(), widgets.HTML()
        filters = (self.model_choice, self.variant_choice, self.set_choice, self.kind_choice)
        super().__init__(filters, [self.counts, self.items, self.item])
        self.list_items()
        self.show()
        for control in filters:
            control.observe(self.list_items, "value")
        self.items.observe(self.changed, "value")

    def list_items(self, _change: object = None) -> None:
        """List the items of the chosen model, variant, set and kind."""
        model, variant = self.model_choice.value, self.variant_choice.value
        rows = differing_items(self.pages, model, variant)
        if self.set_choice.value != EVERY_SET:
            rows = [row for row in rows if row["page"]["name"] == self.set_choice.value]
        lost, gained, changed = (sum(row["kind"] == kind for row in rows) for kind in DIFFERENCES)
        text = (
            f"{variant} lost {count(lost, 'item')} and gained {gained} against {self.baseline}; of "
            f"{changed} more only the answer changed."
        )
        self.counts.value = f'<div class="explore">{inert(text)}</div>'
        self.rows = [row for row in rows if row["kind"] in self.kind_choice.value]
        self.items.options = [(item_label(row), place) for place, row in enumerate(self.rows)]
        self.items.value = 0 if self.rows else None
        self.changed()

    @property
    def baseline(self) -> str:
        return self.pages["baseline"]

    def show(self) -> None:
        if self.items.value is None:
            self.clear()
            return
        row, variant = self.rows[self.items.value], self.variant_choice.value
        self.item.value = differing_item_html(row, baseline=self.baseline, variant=variant)

    def clear(self) -> None:
        self.item.value = ""


class SmoothingPanel(Panel):
    """Any Linear at any α: s, the channels' maxima before and after, and the SQNR.

    Args:
        results: of the study, for what its stages chose and measured.
        linears: a `helpers.quantization.exploration.StudyLinears`.
    """

    def __init__(self, results: Results, linears: Any, *, model: str, variant: str):
        self.results, self.linears = results, linears
        self.curve: tuple = ()
        self.model_choice = choice("model", results.models, model)
        self.variant_choice = choice("granularities of", results.compared, variant)
        names = linears.of(self.model_choice.value).names
        self.linear_choice = choice("Linear", names)
        self.linear_choice.value = self.loudest()
        alpha = self.study_alpha(self.linear_choice.value)
        self.alpha = widgets.FloatSlider(
            value=FIRST_ALPHA if alpha is None else alpha,
            min=0.0,
            max=1.0,
            step=ALPHA_STEP,
            description="α",
            layout=widgets.Layout(width="32em"),
        )
        self.figure = widgets.Image(format="png", layout={"max_width": f"{WIDTH}px"})
        self.table = widgets.HTML()
        controls = (self.model_choice, self.variant_choice, self.linear_choice, self.alpha)
        super().__init__(controls, [self.table, self.figure])
        self.show()
        for control in controls:
            control.observe(self.changed, "value")

    def show(self) -> None:
        linears = self.linears.of(self.model_choice.value)
        if list(self.linear_choice.options) != linears.names:
            self.linear_choice.options = linears.names
        name, variant = self.linear_choice.value, self.variant_choice.value
        recipe, alpha = self.results.study.variants[variant], self.alpha.value
        key = (self.model_choice.value, variant, name)
        if not self.curve or self.curve[0] != key:
            sqnr = {a: linears.sqnr(name, alpha=a, variant=recipe) for a in (None, *CURVE)}
            limits = [linears.smoothing(name, alpha=a) for a in (None, 0.0, 1.0)]
            self.curve = key, sqnr, limits
        _, curve, limits = self.curve
        now = linears.smoothing(name, alpha=alpha), linears.sqnr(name, alpha=alpha, variant=recipe)
        self.figure.value = png(smoothing_figure(*now, curve=curve, limits=limits))
        self.table.value = self.table_html(linears, (limits[0], curve[None]), now)

    def clear(self) -> None:
        self.figure.value, self.table.value = b"", ""

    def loudest(self) -> str:
        """The Linear that the variant smooths whose largest input channel exceeds the median most.

        Of all Linears, if the variant smooths none.
        """
        absmax = self.results.calibrations[self.model_choice.value].absmax
        names = [name for name in absmax if self.study_alpha(name) is not None] or list(absmax)
        return max(names, key=lambda n: absmax[n].max() / max(np.median(absmax[n]), TINY))

    def study_alpha(self, name: str) -> float | None:
        """α that the chosen variant's quantization used for a Linear's input."""
        if self.results.study.variants[self.variant_choice.value].recipe:
            return None  # a recipe of its own does not smooth
        first = self.linears.of(self.model_choice.value).siblings(name)[0]
        chosen = self.quantization().get("losses", {}).get("alpha", {})
        return chosen.get("alphas", {}).get(first)

    def quantization(self) -> dict:
        """Results in the record of the chosen variant's quantization; empty if it has none."""
        evaluation = self.results.evaluations[self.model_choice.value, self.variant_choice.value]
        return evaluation.quantization["results"] if evaluation.quantization else {}

    def table_html(self, linears: Any, before: tuple, now: tuple) -> str:
        """What α changes, in numbers, beside what the study's own stages measured."""
        name, alpha = self.linear_choice.value, self.alpha.value
        chosen = self.study_alpha(name)
        measured = self.quantization().get("sqnr_db", {})
        plain = measured.get("without smoothing", {}).get(name)
        is_chosen = chosen is not None and math.isclose(alpha, chosen, abs_tol=1e-9)
        smoothed = measured.get("with smoothing", {}).get(name) if is_chosen else None
        columns = ("", "largest input", "÷ median", "largest weight", "s of the loudest channel")
        columns += ("SQNR, drawn tokens", "SQNR, measured")
        head = "".join(f"<th>{column}</th>" for column in columns)
        rows = table_row("as it is", *before, plain) + table_row(f"α = {alpha:.2f}", *now, smoothed)
        variant, used = self.variant_choice.value, f"{chosen}"
        note = (
            f"{variant} smooths this input with α = {used}."
            if chosen is not None
            else f"{variant} does not smooth this input."
        )
        reason = linears.unfoldable_reason(name)
        note += (
            f" s can be folded into {linears.producer(name)}."
            if reason is None
            else f" No s can be folded before this Linear: that needs {reason}."
        )
        return (
            f'<div class="explore"><table><tr>{head}</tr>{rows}</table>'
            f'<p class="note">{inert(note)}</p></div>'
        )


def table_row(label: str, smoothing: Any, sqnr: float, measured: float | None) -> str:
    """One line of the table: maxima of input and weights, and both SQNRs."""
    act, weight = smoothing.act_after, smoothing.weight_after
    median = float(np.median(act))
    cells = (
        number(float(act.max())),
        f"{act.max() / median:.1f}" if median else "–",
        number(float(weight.max())),
        number(float(smoothing.scales[smoothing.channel])),
        f"{sqnr:.1f} dB",
        "–" if measured is None else f"{measured:.1f} dB",
    )
    return f"<tr><th>{label}</th>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>"


@in_house_style
def smoothing_figure(
    smoothing: Any, sqnr: float, *, curve: dict[float | None, float], limits: Sequence[Any]
) -> Figure:
    """Channel maxima before and after, s, and SQNR by α.

    Args:
        smoothing: a `ChannelSmoothing`.
        sqnr: in dB, at its α.
        curve: SQNR by α; None for no smoothing.
        limits: the smoothings whose maxima and scales span the axes, so that they stay while α
            moves.
    """
    figure = Figure(figsize=(WIDTH / DPI, 4.6), dpi=DPI)
    panels = figure.subplots(2, 2, gridspec_kw=MARGINS)  # a fixed layout draws twice as fast
    order = np.argsort(-smoothing.act_absmax, kind="stable")
    maxima = {
        "max |X|": ("act_absmax", "act_after"),
        "max |W|": ("weight_absmax", "weight_after"),
        "s": (None, "scales"),
    }
    for axes, (label, (before, after)) in zip(panels.flat, maxima.items(), strict=False):
        if before:
            axes.plot(getattr(smoothing, before)[order], color=QUIET, linewidth=1, label="as it is")
        axes.plot(
            getattr(smoothing, after)[order],
            color=INK,
            linewidth=1,
            label=f"α = {smoothing.alpha:.2f}",
        )
        span = np.concatenate([getattr(each, after) for each in limits])
        span = span[span > 0]
        axes.set(yscale="log", xlabel="input channel, loudest first", ylabel=label)
        axes.set_xlim(0, len(order) - 1)
        axes.yaxis.set_minor_locator(NullLocator())  # drawing ticks takes most of the time
        axes.set_ylim(span.min() / 1.5, span.max() * 1.5)
        axes.legend(fontsize=8, loc="upper right")
    axes = panels[1, 1]
    axes.axhline(curve[None], color=QUIET, linewidth=1.2, label="as it is")
    axes.plot(CURVE, [curve[alpha] for alpha in CURVE], color=INK, linewidth=1)
    axes.plot(smoothing.alpha, sqnr, "o", color=ALARM, label=f"α = {smoothing.alpha:.2f}")
    axes.set(xlabel="α", ylabel="SQNR, drawn tokens [dB]")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG on white."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()


class TextPanel(Panel):
    """A text of one's own, each token coloured by its KL between float model and variant.

    Args:
        results: of the study.
        reader: a `helpers.quantization.exploration.TextReader`.
        text: the text that is read first.
    """

    def __init__(self, results: Results, reader: Any, *, model: str, variant: str, text: str):
        self.reader, self.rows = reader, []
        self.text = widgets.Textarea(text, rows=4, layout=widgets.Layout(width="100%"))
        self.model_choice = choice("model", results.models, model)
        self.variant_choice = choice("variant", results.compared, variant)
        self.button = widgets.Button(description="Read the text", button_style="primary")
        self.token = choice("both top fives at", [("", -1)])
        self.token.layout.width = "32em"
        self.summary, self.tokens, self.tops = (widgets.HTML() for _ in range(3))
        controls = (self.model_choice, self.variant_choice, self.button)
        super().__init__(controls, [self.text, self.summary, self.tokens, self.token, self.tops])
        self.show()
        self.button.on_click(self.changed)
        self.token.observe(self.show_tops, "value")
        for control in (self.model_choice, self.variant_choice):
            control.observe(self.changed, "value")

    def show(self) -> None:
        self.clear()
        self.summary.value = '<div class="explore">reading …</div>'
        model, variant = self.model_choice.value, self.variant_choice.value
        self.rows = self.reader.read(self.text.value, model=model, variant=variant)
        self.summary.value = f'<div class="explore">{inert(text_summary(self.rows))}</div>'
        self.tokens.value = f'<div class="explore">{legend()}{token_spans(self.rows)}</div>'
        self.token.options = token_options(self.rows)
        self.show_tops()

    def show_tops(self, _change: object = None) -> None:
        """The table of both top fives of the chosen token."""
        place = self.token.value
        names = "float", self.variant_choice.value
        self.tops.value = "" if place is None or place < 0 else tops_html(self.rows[place], names)

    def clear(self) -> None:
        self.rows, self.token.options = [], [("", -1)]
        self.summary.value = self.tokens.value = self.tops.value = ""


def text_summary(rows: Sequence[Any]) -> str:
    """Mean and largest KL of a text, and where the likeliest token changed."""
    predicted = [row for row in rows if row.kl is not None]
    largest = max(predicted, key=kl_order)
    mean = sum(row.kl for row in predicted) / len(predicted)
    changed = sum(row.float_top[0][0] != row.variant_top[0][0] for row in predicted)
    return (
        f"Mean KL {nats(mean)} over {count(len(predicted), 'predicted token')}; the largest "
        f"is {nats(largest.kl)} at {visible(largest.text)}. The likeliest token differs at "
        f"{changed} of them."
    )


def nats(kl: float) -> str:
    """A KL with its unit."""
    return f"{number(kl)} nats" if math.isfinite(kl) else "not finite"


def kl_order(row: Any) -> float:
    """The KL, with a KL that is not a number as the largest."""
    return row.kl if math.isfinite(row.kl) else math.inf


def token_options(rows: Sequence[Any]) -> list[tuple[str, int]]:
    """Predicted tokens and their places in the text, the largest KL first."""
    places = [place for place, row in enumerate(rows) if row.kl is not None]
    places.sort(key=lambda place: -kl_order(rows[place]))
    return [(f"{nats(rows[p].kl)}: token {p + 1} {visible(rows[p].text)}", p) for p in places]


def visible(text: str) -> str:
    """A token in quotes on one line, line ends and tabs as symbols."""
    return printable(f"“{text}”".replace("\n", "↵").replace("\t", "⇥"))


def opacity(kl: float) -> float:
    """Opacity of a token's colour, linear in log KL; a KL that is not a number has the deepest."""
    if not math.isfinite(kl):
        return DEEPEST
    low, high = KL_DECADES
    return DEEPEST * min(1.0, max(0.0, (math.log10(max(kl, 1e-12)) - low) / (high - low)))


def coloured(kl: float | None) -> str:
    """The style attribute of a token with this KL."""
    return "" if kl is None else f' style="background: rgba(216, 92, 40, {opacity(kl):.3f})"'


def legend() -> str:
    """The colours of some KL values."""
    low, high = KL_DECADES
    swatches = "".join(
        f"<span{coloured(10.0**power)}> {10.0**power:g} </span>" for power in range(low, high + 1)
    )
    return f'<p class="note">KL in nats: {swatches}. Point at a token to see both top fives.</p>'


def token_spans(rows: Sequence[Any]) -> str:
    """The text as coloured tokens; pointing at one shows both top fives."""
    spans = "".join(
        f'<span{coloured(row.kl)} title="{inert(token_title(row))}">{token_html(row.text)}</span>'
        for row in rows
    )
    return f'<div class="tokens">{spans}</div>'


def token_html(text: str) -> str:
    """A token's part of the text; a line end is seen and ends the line."""
    return inert(text).replace("\n", "↵\n")


def token_title(row: Any) -> str:
    """The words of a token's tooltip."""
    if row.kl is None:
        return "not predicted: nothing stands before it"
    lines = [f"KL {nats(row.kl)}", "float | variant"]
    for pair in zip(row.float_top, row.variant_top, strict=True):
        lines.append(" | ".join(f"{100 * p:.1f} % {visible(token)}" for token, p in pair))
    return "\n".join(lines)


def tops_html(row: Any, names: tuple[str, str]) -> str:
    """Both models' likeliest tokens in place of one token, in a table."""
    head = "".join(f"<th colspan=2>{inert(name)}</th>" for name in names)
    lines = [
        "".join(
            f'<td>{inert(visible(token))}</td><td class="number">{100 * share:.1f} %</td>'
            for token, share in pair
        )
        for pair in zip(row.float_top, row.variant_top, strict=True)
    ]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="explore"><table><tr>{head}</tr>{table}</table></div>'
