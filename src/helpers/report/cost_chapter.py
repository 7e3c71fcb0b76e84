"""The chapter on cost: what each variant costs and gains, as sentences, tables and figures.

Tables show ratios, amounts, and how near the limit each configuration is; the figure shows how
fast each reads and writes, with spread and limit.
"""

from collections.abc import Callable

from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.report.estimates import QUIET_SPREAD, TOLERANCE, ConfigurationResult, Cost, Spread
from helpers.report.figures import INK, QUIET, Picture, in_house_style, new_figure, variant_looks
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    escape,
    folded,
    listed,
    markdown_table,
    megabytes,
    number,
    percent,
)
from helpers.report.results import Results


def way_name(cost: Cost, way: ConfigurationResult) -> Markup:
    """The variant's name; for the baseline, which runs in two dtypes, also the dtype."""
    dtype = f" {way.entry['dtype']}" if way.variant == cost.measurements["baseline"] else ""
    return Markup(f"{code(way.variant)}{dtype}")


def ratio_text(value: float) -> str:
    return f"{value:.2f}×"


def median_with_rounds(spread: Spread, show: Callable[[float], str]) -> Markup:
    """The median with the smallest and the largest round."""
    low, high = show(spread.low).removesuffix("×"), show(spread.high).removesuffix("×")
    return Markup(f"{show(spread.value)} ({low}–{high})")


def ratio_table(cost: Cost) -> Rows:
    """Every configuration relative to the baseline in float32: bytes, load time, memory, speed."""
    reference = cost.reference

    def ratio(way: ConfigurationResult, quantity: str) -> Markup:
        if way.name == reference.name:
            return Markup(ratio_text(1))
        return median_with_rounds(cost.ratio(way, quantity, reference), ratio_text)

    return [
        {
            "against float32": way_name(cost, way),
            "Linears multiply in": way.multiplies_in,
            "reading": ratio(way, "prefill"),
            "writing": ratio(way, "decode"),
            "file": ratio_text(way.file_bytes / reference.file_bytes),
            "Linears in memory": ratio_text(way.linear_bytes / reference.linear_bytes),
            "peak memory": ratio(way, "memory"),
            "load time": ratio(way, "load"),
        }
        for way in cost.configurations
    ]


def amount_table(cost: Cost) -> Rows:
    """The same in tokens per second, megabytes and seconds; the file part by part."""
    rows = []
    for way in cost.configurations:
        row = {"variant": way_name(cost, way)}
        row["reading [tokens/s]"] = median_with_rounds(cost.measured(way, "prefill"), whole_number)
        row["writing [tokens/s]"] = median_with_rounds(cost.measured(way, "decode"), whole_number)
        parts = way.entry["file_bytes"].items()
        row |= {f"{part}, file": megabytes(size) for part, size in parts}
        row["Linears in memory"] = megabytes(way.linear_bytes)
        row["peak memory [MB]"] = median_with_rounds(cost.measured(way, "memory"), millions)
        row["load time [s]"] = median_with_rounds(cost.measured(way, "load"), lambda s: f"{s:.2f}")
        rows.append(row)
    return rows


def whole_number(value: float) -> str:
    return f"{value:,.0f}"


def millions(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f}"


def billions(operations: float) -> str:
    return number(operations / 1e9)


def limit_table(cost: Cost) -> Rows:
    """The Linears' speed while reading, as a share of the machine's matrix product."""
    rows = []
    for way in cost.configurations:
        peak, achieved = cost.peak(way), cost.achieved(way)
        fastest = cost.prefill_limit(way)
        row = {"variant": way_name(cost, way), "Linears multiply in": way.multiplies_in}
        row["bare product [GOP/s]"] = median_with_rounds(peak, billions) if peak else MISSING
        row["Linears [GOP/s]"] = median_with_rounds(achieved, billions) if achieved else MISSING
        row["Linears / bare product"] = percent(cost.peak_fraction(way))
        row["time in Linears"] = percent(cost.linear_time_fraction(way))
        row["reading at the limit [tokens/s]"] = MISSING if fastest is None else number(fastest)
        rows.append(row)
    return rows


PANELS = {"prefill": "reading [tokens / s]", "decode": "writing [tokens / s]"}


@in_house_style
def throughput_plot(cost: Cost, *, variants: list[str], title: str) -> Figure:
    """Tokens per second of every configuration: median, rounds, and the limit of its Linears.

    The bar beside a point is the reading speed if the Linears ran at the speed of the bare
    matrix product and all else took no time.
    """
    ways = cost.configurations
    figure, panels = new_figure(8.4, 1.5 + 0.36 * len(ways), ncols=2, sharey=True)
    looks = _configuration_looks(cost, variants)
    for axes, (quantity, label) in zip(panels, PANELS.items(), strict=True):
        for place, way in enumerate(ways):
            spread, (color, marker) = cost.measured(way, quantity), looks[way.name]
            axes.hlines(place, spread.low, spread.high, color=color, linewidth=3, alpha=0.5)
            axes.plot(spread.value, place, marker, color=color, markersize=6)
        axes.set_xlabel(label)
        axes.axvline(cost.measured(cost.reference, quantity).value, color=QUIET, linewidth=0.8)
    for place, way in enumerate(ways):
        if limit := cost.prefill_limit(way):
            color = looks[way.name][0]
            panels[0].vlines(limit, place - 0.32, place + 0.32, color=color, linewidth=2)
    for axes in panels:
        axes.set_xlim(left=0)
        axes.margins(x=0.06)
    panels[0].set_yticks(range(len(ways)), [_configuration_label(cost, way) for way in ways])
    panels[0].set_ylim(len(ways) - 0.4, -0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _configuration_label(cost: Cost, way: ConfigurationResult) -> str:
    return way.name if way.variant == cost.measurements["baseline"] else way.variant


def _configuration_looks(cost: Cost, variants: list[str]) -> dict[str, tuple[str, str]]:
    """Variants as in every figure of the study; the baseline in ink, its bfloat16 paler.

    A partial report may compare fewer variants than were measured: the others come last.
    """
    measured = [way.variant for way in cost.others]
    looks = variant_looks(list(dict.fromkeys([*variants, *measured])))
    looks_by_name = {way.name: looks[way.variant] for way in cost.others}
    return looks_by_name | {cost.reference.name: (INK, "o"), cost.bfloat16.name: ("#5b7a9d", "o")}


Shown = list[Markdown | Picture]
NOT_MEASURED = "This study measures neither speed nor memory (`runtime: {cost: no}`)."


def cost_chapter(results: Results) -> Shown:
    """The cost section of every model, or a sentence that its cost was not measured."""
    if not results.study.runtime.cost:
        return [Markdown(f"{NOT_MEASURED}\n")]
    parts: Shown = []
    for model, cost in results.costs.items():
        if cost is None:
            sentence = f"The cost of {code(model)} was not measured; `make study` measures it."
            parts.append(Markdown(f"### Model {code(model)}\n\n{sentence}\n"))
        else:
            parts += model_section(cost, results.compared)
    twins = [code(m) for m in results.models if m not in results.costs]
    if twins:
        verb = "have" if len(twins) > 1 else "has"
        sentence = "the same shapes as the model it was trained from, and so the same costs"
        parts.append(Markdown(f"{listed(twins)} {verb} {sentence}.\n"))
    return parts


def model_section(cost: Cost, variants: list[str]) -> Shown:
    """One model: sentences, ratios, amounts, and the share of the machine's limit.

    Args:
        variants: all that the study compares with its baseline.
    """
    model = code(cost.measurements["model"])
    return [
        Markdown(
            f"### Model {model}\n\n{arithmetic_note(cost)}{gain_bullets(cost)}\n\n"
            f"{measurement_note(cost)}\n"
        ),
        Markdown(markdown_table(ratio_table(cost))),
        _throughput_picture(cost, variants),
        Markdown(
            folded("Tokens per second, bytes and seconds", markdown_table(amount_table(cost)))
            + "\n\n"
            + folded(
                "Share of the machine's limit", limit_note(cost), markdown_table(limit_table(cost))
            )
            + "\n"
        ),
    ]


def _throughput_picture(cost: Cost, variants: list[str]) -> Picture:
    title = throughput_title(cost)
    speeds = [
        f"{way.name} " + " and ".join(whole_number(cost.measured(way, q).value) for q in PANELS)
        for way in cost.configurations
    ]
    alt = f"Tokens per second, reading and writing. {title}. Medians: {', '.join(speeds)}."
    return Picture(throughput_plot(cost, variants=variants, title=title), alt)


def arithmetic_note(cost: Cost) -> str:
    """The arithmetic of int8 and bfloat16 products here; empty if the record lacks it."""
    record = cost.measurements.get("arithmetic")
    if not record:
        return ""
    int8 = f"int8 products are computed as {record['int8_products']}, exactly"
    if "compute_capability" in record:
        return f"This card has compute capability {record['compute_capability']}; {int8}.\n\n"
    if record["int8_units"] == "no":
        sentence = (
            f"**This processor has no int8 units: int8 saves memory here, not time**; {int8}."
        )
    else:
        sentence = f"This processor has int8 units ({escape(record['processor'])}); {int8}."
    if record["bfloat16_products"] != "bfloat16":
        sentence += (
            f" It has no bfloat16 units: bfloat16 is multiplied in {record['bfloat16_products']}."
        )
    return f"{sentence}\n\n"


def gain_bullets(cost: Cost) -> str:
    """One line per variant: bytes and tokens per second against both float baselines."""
    lines = [_gain_sentence(cost, way) for way in cost.others]
    lines += [
        f"{code(v)} {reason}; it was not measured."
        for v, reason in cost.measurements["left_out"].items()
    ]
    return "\n".join(f"- {line}" for line in lines) or "This study has no variant but the baseline."


def _gain_sentence(cost: Cost, way: ConfigurationResult) -> str:
    reference, baseline = cost.reference, code(cost.measurements["baseline"])
    kind = way.multiplies_in
    size = f"{percent(way.file_bytes / reference.file_bytes)} of {baseline}'s bytes on disk"
    memory = (
        f"its Linears take {percent(way.linear_bytes / reference.linear_bytes)} of float32's memory"
    )
    reads = _speed_clause(cost, way, "prefill", "reads")
    writes = _speed_clause(cost, way, "decode", "writes")
    return f"{code(way.variant)} ({kind}) takes {size} and {memory}; it {reads}, and {writes}."


def _speed_clause(cost: Cost, way: ConfigurationResult, quantity: str, verb: str) -> str:
    """`reads 645 tokens per second, 1.62 times as many as float32 and 1.05 times … bfloat16`."""
    clauses = [f"{verb} {whole_number(cost.measured(way, quantity).value)} tokens per second"]
    for reference, name in ((cost.reference, "float32"), (cost.bfloat16, "bfloat16")):
        ratio = cost.ratio(way, quantity, reference)
        if ratio.high < 1:
            clauses.append(f"**slower than {name}** ({ratio_text(ratio.value)})")
        elif ratio.low > 1:
            clauses.append(f"faster than {name} ({ratio_text(ratio.value)})")
        else:
            clauses.append(f"within the spread of {name} ({ratio_text(ratio.value)})")
    return f"{clauses[0]}, {clauses[1]} and {clauses[2]}"


def throughput_title(cost: Cost) -> str:
    """The figure's title: the speed of the slowest and fastest int8 variant against float32."""
    model = cost.measurements["model"]
    int8 = [way for way in cost.others if "int8" in way.multiplies_in]
    if not int8:
        return f"{model}: tokens per second; no variant multiplies in int8"
    reads, writes = (
        sorted(cost.ratio(way, quantity, cost.reference).value for way in int8)
        for quantity in ("prefill", "decode")
    )
    speeds = f"reads at {_ratio_range(reads)} and writes at {_ratio_range(writes)}"
    return f"{model}: int8 {speeds} the speed of float32"


def _ratio_range(ordered: list[float]) -> str:
    low, high = (ratio_text(value) for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low.removesuffix('×')}–{high}"


def measurement_note(cost: Cost) -> str:
    """The measured work, the order of the rounds, and the machine."""
    account, work = cost.measurements, cost.measurements["work"]
    rounds = len(cost.reference.entry["load_s"])
    unquiet = listed([way_name(cost, way) for way in cost.noisy()])
    warned = (
        f" **The machine was not quiet**: rounds of {unquiet} lie more than {QUIET_SPREAD}× apart."
    )
    return (
        f"Reading (prefill) computes one row of {work['prefill_tokens']:,} tokens in "
        f"{count(work['texts'], 'text')}; writing (decode) computes {count(work['steps'], 'step')} "
        f"of {count(work['prompts'], 'answer')} in parallel, head included. Each number is the "
        f"median of {count(rounds, 'round')} (smallest–largest). The rounds of all rows alternate "
        f"on {escape(account['device'])} with {count(account['threads'], 'thread')}, while no "
        "other job of the study runs; ratios are computed round by round. Peak memory is "
        f"{account['memory']}, mapped files included. A load ends after the first short text; "
        "the files were in the system's cache." + (warned if unquiet else "")
    )


def limit_note(cost: Cost) -> str:
    """How to read the last table, with a warning about shares beyond the limit."""
    sentences = [
        "The bare product is the fastest matrix product of this machine in the same arithmetic, "
        "over the shapes of this model and a square one, by the faster of torch's libraries. An "
        "int8 Linear also quantizes its input and scales its output. The bars in the figure give "
        "the reading speed if the Linears ran at that limit and all else took no time."
    ]
    missing_products = [k for k, values in cost.measurements["peaks"].items() if None in values]
    if missing_products:
        sentences.append(f"This device has no product in {listed(missing_products)}.")
    beyond_limit = [w for w in cost.configurations if (cost.peak_fraction(w) or 0) > TOLERANCE]
    if beyond_limit:
        names = listed([way_name(cost, w) for w in beyond_limit])
        sentences.append(
            f"**{names} exceeded the measured limit**: the machine was slower while the limit was "
            "measured, so do not rely on these shares."
        )
    return " ".join(sentences)
