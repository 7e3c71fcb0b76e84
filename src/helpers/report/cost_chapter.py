"""The chapter on what each variant costs and gains: sentences, tables and one figure a model."""

from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.cost.results import QUIET, TOLERANCE, ConfigurationResult, Cost
from helpers.report import cost_figures, cost_tables
from helpers.report.markdown import code, count, escape, listed, markdown_table, percent
from helpers.report.results import Results

Shown = list[Markdown | Figure]
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
        Markdown(markdown_table(cost_tables.ratio_table(cost))),
        cost_figures.throughput_plot(cost, variants=variants, title=throughput_title(cost)),
        Markdown(markdown_table(cost_tables.amount_table(cost))),
        Markdown(f"{limit_note(cost)}\n\n{markdown_table(cost_tables.limit_table(cost))}"),
    ]


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
    clauses = [
        f"{verb} {cost_tables.whole_number(cost.measured(way, quantity).value)} tokens per second"
    ]
    for reference, name in ((cost.reference, "float32"), (cost.bfloat16, "bfloat16")):
        ratio = cost.ratio(way, quantity, reference)
        if ratio.high < 1:
            clauses.append(f"**slower than {name}** ({cost_tables.ratio_text(ratio.value)})")
        elif ratio.low > 1:
            clauses.append(f"faster than {name} ({cost_tables.ratio_text(ratio.value)})")
        else:
            clauses.append(f"within the spread of {name} ({cost_tables.ratio_text(ratio.value)})")
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
    low, high = (cost_tables.ratio_text(value) for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low.removesuffix('×')}–{high}"


def measurement_note(cost: Cost) -> str:
    """The measured work, the order of the rounds, and the machine."""
    account, work = cost.measurements, cost.measurements["work"]
    rounds = len(cost.reference.entry["load_s"])
    unquiet = listed([cost_tables.way_name(cost, way) for way in cost.noisy()])
    warned = f" **The machine was not quiet**: rounds of {unquiet} lie more than {QUIET}× apart."
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
        names = listed([cost_tables.way_name(cost, w) for w in beyond_limit])
        sentences.append(
            f"**{names} exceeded the measured limit**: the machine was slower while the limit was "
            "measured, so do not rely on these shares."
        )
    return " ".join(sentences)
