"""How long a study takes, said beforehand: what is counted, how jobs are laid side by side."""

import argparse
import json
import random
import re

import pytest
from torch import nn

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.core.records import write_json
from helpers.cost import operations as quantization
from helpers.cost.operations import Size, count_finetuning, without_weight_passes
from helpers.evaluation import stage as evaluation
from helpers.evaluation.engine import ask_all
from helpers.evaluation.prompts import study_prompts
from helpers.inference.perplexity import passage_tokens, read_passages
from helpers.quantization.calibration import run_calibration
from helpers.sources import models
from helpers.sources.chat import calibration_tokens, training_tokens
from helpers.sources.models import byte_tokenizer, random_model
from helpers.sources.sampling import calibration_items, shared_passages, training_items
from helpers.study import stages
from helpers.study import stages as study_stages
from helpers.study.loading import load_study
from helpers.workflow import display, launcher
from helpers.workflow.display import ANALYSIS, Capacity, Estimate, Machine, job_seconds, makespan_s

SIZE = Size(linears=1000, head=100, weights=2000)
MACHINE = Machine({f"float32 {how}": 1e6 for how in ("reading", "writing")}, start_s=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class Multiplied:
    """Counts the operations of every Linear of a model but the head, as they happen."""

    def __init__(self, model):
        self.operations = 0
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.register_forward_hook(self._count)

    def _count(self, module, args, _made):
        self.operations += 2 * module.weight.numel() * args[0].numel() // args[0].shape[-1]


@pytest.fixture
def model():
    return random_model("llama", seed=3)


@pytest.fixture
def size(model):
    """As a model's own modules have it, and not its configuration."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    weights = sum(p.numel() for p in model.parameters())
    return Size(sum(m.weight.numel() for m in linears), head.weight.numel(), weights)


@pytest.fixture
def only(study_settings, write_study):
    """A study with some of its evaluation sets, and so many items of each."""

    def make(*names, items=None, **ask):
        sets = study_settings["evaluation"]["datasets"]
        study_settings["evaluation"]["datasets"] = {name: sets[name] for name in names}
        study_settings["statistics"]["primary"] = []
        for name in names:
            sets[name]["items"] = items or sets[name]["items"]
            sets[name]["ask"] |= ask
        return load_study(write_study(study_settings))

    return make


def tokens_of(study, name: str, tokenizer):
    prompts = study_prompts(study, tokenizer)[name]
    return evaluation.count_set_tokens(prompts, study.evaluation.datasets[name], tokenizer)


def test_scored_options_are_counted_to_the_token(only, model, size, tokenizer):
    study = only("arc")
    multiplied = Multiplied(model)
    ask_all(model, tokenizer, study)
    counted = tokens_of(study, "arc", tokenizer)
    assert multiplied.operations == 2 * size.linears * (counted.together + counted.options)


def test_answers_are_counted_at_their_longest(only, model, size, tokenizer):
    study = only("squad_v2", max_new_tokens=5)
    multiplied = Multiplied(model)
    ask_all(model, tokenizer, study)
    counted = tokens_of(study, "squad_v2", tokenizer)
    read = counted.together + counted.options
    longest = 2 * size.linears * (read + counted.items * (counted.cap - 1))
    # Blank rows beside few answers are multiplied too; see helpers.inference.protocols.
    blank = 2 * size.linears * 16 * counted.cap
    assert 2 * size.linears * read < multiplied.operations <= longest + blank


def test_shared_text_and_calibration_are_counted_to_the_token(study, model, size, tokenizer):
    multiplied = Multiplied(model)
    limit = study.evaluation.shared_text.max_tokens
    tokens = passage_tokens(tokenizer, shared_passages(study), max_tokens=limit)
    read_passages(model, tokens, batch_tokens=128)
    expected = sum(evaluation.shared_text_lengths(study, tokenizer))
    assert multiplied.operations == 2 * size.linears * expected
    multiplied.operations = 0
    items = calibration_items(study)
    texts = [calibration_tokens(tokenizer, i, study.calibration.adapter) for i in items]
    run_calibration(model, texts, batch_tokens=study.calibration.batch_tokens)
    picture = 2 * size.linears * max(map(len, texts))
    counted = quantization.count_calibration(study, size, tokenizer)["float32 reading"]
    assert multiplied.operations == counted - picture


def test_fine_tuning_is_counted_to_the_token(model, size, tokenizer):
    """Backward is two products more for each; the head runs where an answer is predicted."""
    study = load_study("smoke")
    settings = models.fine_tuning_settings(study, "finetuned")
    examples, heldout = (
        [training_tokens(tokenizer, item) for item in part]
        for part in training_items(study, "finetuned")
    )
    multiplied = Multiplied(model)
    models.fine_tune_(model, examples, settings, seed=study.seed)
    head = sum(len(answer) for _, answer in examples)
    trained = 3 * (multiplied.operations + 2 * size.head * head * settings.epochs)
    counted = without_weight_passes(count_finetuning(study, "finetuned", size, tokenizer))
    tokens = sum(len(p) + len(a) for p, a in heldout)
    apart = sum(counted.values()) - trained
    assert 2 * 2 * size.linears * tokens * 0.9 < apart < 4 * (size.linears + size.head) * tokens * 2


def test_twice_the_items_take_about_twice_as_long(only, tokenizer):
    seconds = []
    for items in (10, 20):
        study = only("arc", items=items)
        sets = {"arc": tokens_of(study, "arc", tokenizer)}
        counted = evaluation.count_evaluation(study, "noquant", SIZE, sets, [])
        alone = evaluation._count_asked_alone(
            study, "noquant", sets["arc"], SIZE
        )  # of eight items, always
        counted.subtract(alone)
        run = study_stages.Run("evaluation", "base", "noquant")
        seconds.append(job_seconds(study, run, counted, MACHINE, Capacity(2, 9)))
    assert 1.6 < seconds[1] / seconds[0] < 2.4


def test_every_further_draw_is_counted_and_answers_option_sets_only(size, tokenizer):
    study = load_study("smoke")
    recipe = study.variants["smoothquant_w8a8"].model_copy(update={"repeats": 3})
    study = study.model_copy(update={"variants": study.variants | {"smoothquant_w8a8": recipe}})
    evaluated = evaluation.count_model(study, "base", size, tokenizer)
    for run in study_stages.runs(study):
        if run.model == "base" and run.stage == "evaluation":
            assert evaluated[run.name].total() > 0, run.name
        elif run.model == "base" and run.stage in ("calibration", "quantization"):
            assert quantization.count_run(study, run, size, tokenizer).total() > 0, run.name
    first, second, third = (
        evaluated[f"03_evaluation.base.smoothquant_w8a8{end}"] for end in ("", "~2", "~3")
    )
    assert second == third
    assert not any(kind.endswith("writing") for kind in second)
    assert 0 < second["int8 reading"] < first["int8 reading"]


def test_what_a_machine_lacks_takes_its_float32(study):
    run, room = study_stages.Run("evaluation", "base", "noquant"), Capacity(1, 1)
    plain = job_seconds(study, run, {"float32 reading": 10**6}, MACHINE, room)
    assert job_seconds(study, run, {"int8 reading": 10**6}, MACHINE, room) == plain > 1


def finish(study, paths, run):
    """Leave what a run leaves that ended well."""
    with stages.record_fingerprint(study, paths, run):
        write_json(run.record(paths), {"run": run.name})
        write_json(run.executed(paths), {})


def test_only_jobs_that_are_not_current_are_estimated(study, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    paths, every = StudyPaths("study"), study_stages.runs(study)
    assert display.runs_to_execute(study, paths) == [*every, ANALYSIS]
    for run in every:  # in the order of the stages, the baseline's evaluation first
        if run.stage != "evaluation":
            finish(study, paths, run)
    for run in sorted(every, key=lambda r: r.variant != study.baseline):
        if run.stage == "evaluation":
            finish(study, paths, run)
    assert display.runs_to_execute(study, paths) == [ANALYSIS]
    finish(study, paths, ANALYSIS)
    assert display.runs_to_execute(study, paths) == []
    assert display.estimate("study", study, paths, Capacity(2, 9), say=pytest.fail) is None
    [quantization_run] = [r for r in every if r.stage == "quantization" and r.model == "base"][:1]
    quantization_run.record(paths).unlink()
    again = display.runs_to_execute(study, paths)
    assert {
        quantization_run,
        ANALYSIS,
        study_stages.Run("evaluation", "base", quantization_run.variant),
    } <= set(again)
    assert study_stages.Run("calibration", "base") not in again
    assert study_stages.Run("evaluation", "base", study.baseline) not in again


def critical_path(study, seconds) -> float:
    def until(run) -> float:
        return seconds[run] + max(
            (until(b) for b in study_stages.upstream_runs(study, run)), default=0.0
        )

    return max(map(until, seconds))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["smoke", "demo"])
def test_jobs_side_by_side_keep_the_order_and_the_cores(name, seed):
    study, rng = load_study(name), random.Random(seed)
    seconds = {run: rng.expovariate(0.1) for run in [*study_stages.runs(study), ANALYSIS]}
    work = sum(seconds.values())
    assert makespan_s(study, seconds, Capacity(1, 9)) == pytest.approx(work)
    assert makespan_s(study, seconds, Capacity(8, 1)) == pytest.approx(work)  # memory for one only
    alone = seconds[ANALYSIS] + sum(s for run, s in seconds.items() if run.stage == "cost")
    for cores in (2, 4, 100):
        makespan = makespan_s(study, seconds, Capacity(cores, 100))
        assert critical_path(study, seconds) <= makespan * (1 + 1e-9)
        assert alone + (work - alone) / cores <= makespan * (1 + 1e-9)
        assert makespan <= work * (1 + 1e-9)


def test_a_job_that_wants_more_threads_than_there_are_runs_alone(study_settings, write_study):
    study_settings["runtime"]["threads"] = 8
    study = load_study(write_study(study_settings))
    seconds = {run: 1.0 for run in study_stages.runs(study)}
    assert makespan_s(study, seconds, Capacity(2, 9)) == pytest.approx(len(seconds))


def test_a_long_study_is_told_what_would_shorten_it(study):
    run = study_stages.Run("evaluation", "base", "noquant")
    long = Estimate(study, Capacity(2, 9), {run: 2 * display.LONG_S})
    [advice] = [line for line in display.estimate_lines(long) if line.startswith("to shorten it")]
    assert "evaluation is 100 % of the work" in advice
    assert "max_new_tokens" in advice
    short = Estimate(study, Capacity(2, 9), {run: 60.0}, ("x: \ufffd",))
    assert display.estimate_lines(short)[-1] == "not counted: x: \ufffd"


def given(path):
    return argparse.Namespace(
        study=str(path), cores=2, job_mb=1000, executor="local", only_report=False, options=[]
    )


@pytest.mark.parametrize("error", [StudyError("no \x1b[31mreason"), KeyError("speeds"), OSError()])
def test_an_estimate_that_cannot_be_made_is_one_line(study_path, monkeypatch, capsys, error):
    def fails(*_given):
        raise error

    monkeypatch.setenv("STUDY_ESTIMATE", "yes")
    monkeypatch.setattr(display, "_json_outputs", fails)
    assert launcher._estimate(given(study_path), StudyPaths("study")) is None
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("estimate none")
    assert last.isprintable()


def test_a_counter_that_breaks_says_why(monkeypatch):
    with pytest.raises(StudyError, match="No module named"):
        display._json_outputs([["helpers.nothing"]])


@pytest.mark.long
def test_counts_and_speeds_become_seconds_of_every_job(study_path, tmp_path, monkeypatch, capsys):
    """The whole way through, with the processes that count and measure."""
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("STUDY_ESTIMATE", "yes")
    estimate = launcher._estimate(given(study_path), StudyPaths("study"))
    printed = capsys.readouterr().err
    assert estimate is not None, printed
    assert set(estimate.seconds) == {*study_stages.runs(estimate.study), ANALYSIS}
    assert all(seconds > 0 for seconds in estimate.seconds.values())
    stages = {run.stage for run in estimate.seconds}
    assert {line.split()[1] for line in printed.splitlines() if " job" in line} >= stages
    assert "in all on 2 cores" in printed


def printed_seconds(text: str) -> int:
    minutes, seconds = re.search(r"(?:(\d+) min\b ?)?(?:(\d+) s\b)?", text).groups()
    return 60 * int(minutes or 0) + int(seconds or 0)


@pytest.mark.long
@pytest.mark.parametrize("way", ["undisturbed", "without_forks"])
def test_the_smoke_study_takes_as_long_as_estimated(request, way):
    """Within a factor of two, in the sum of its jobs and from end to end: ratios in one run.

    Jobs are forks of one process, or processes of their own. If other work uses the cores, an
    estimate made before is not about that run.
    """
    study = request.getfixturevalue(way)
    if study.others_percent > 75:
        pytest.skip("other work ran here, and the study waited for it")
    output, whole = study.said, study.took_s
    stages = re.findall(r"^estimate \w+ +\d+ jobs? +about ([^,\n]+)", output, re.M)
    estimated = sum(map(printed_seconds, stages))
    estimated_whole = printed_seconds(re.search(r"^estimate about (.+) in all", output, re.M)[1])
    jobs = re.findall(r"^\[ *\d+/\d+\] +(\w+) .*?((?:\d+ min )?\d+ s)$", output, re.M)
    took = sum(printed_seconds(text) for stage, text in jobs if stage != "report")
    print(json.dumps({"jobs": [estimated, took], "all": [estimated_whole, whole]}))
    assert len(stages) == 6
    assert 0.5 < estimated / took < 2
    assert 0.5 < estimated_whole / whole < 2


def test_the_report_adds_up_what_records_say_and_leaves_out_what_they_do_not(monkeypatch):
    from helpers.report import chapters

    records = [
        {"stage": "evaluation", "operations": {"float32": 2 * 10**12}},
        {"stage": "evaluation", "operations": {"float32": 10**12, "int8": 5 * 10**11}},
        {"stage": "cost"},  # of an older study
    ]
    monkeypatch.setattr(chapters, "all_records", lambda _results: records)
    [row] = chapters.operation_table(None)
    assert row == {
        "stage": "evaluation",
        "jobs": "2",
        "TFLOP": "3.50",
        "float32": "3.00",
        "int8": "0.500",
    }
    del records[:2]
    assert chapters.operation_table(None) is None


def test_a_count_is_the_same_again_and_of_no_machine(only, tokenizer):
    """What records hold: whole numbers by arithmetic, and no weights touched, which take time."""
    study = only("arc", "squad_v2")
    counts = [
        without_weight_passes(job)
        for _ in range(2)
        for job in evaluation.count_model(study, "base", SIZE, tokenizer).values()
    ]
    half = len(counts) // 2
    assert counts[:half] == counts[half:]
    for counted in counts:
        assert set(counted) <= {"float32", "bfloat16", "int8"}
        assert all(isinstance(number, int) and number > 0 for number in counted.values())
