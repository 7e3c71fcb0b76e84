"""Tasks of lm-evaluation-harness: read as plain data, built as the harness itself builds them."""

import copy
import importlib.util

import pytest
import yaml
from benchmarks.lm_eval_tasks import ROWS, SHOTS, task_settings, write_tasks

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.sources.sampling import evaluation_items
from helpers.sources.tasks import FOIL_WORDS, reversed_words, task_items, task_request
from helpers.study.inputs import hub_sources
from helpers.study.loading import load_study
from helpers.study.schema import HubDataset
from helpers.study.stages import Run, dependency_text
from helpers.study.tasks import definitions_file, record_definitions

ITEMS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), items=ITEMS)


@pytest.fixture
def study_with(study_settings, write_study):
    """Load a study whose only evaluation set is a task."""

    def load(**settings):
        own = copy.deepcopy(study_settings)
        own["evaluation"]["datasets"] = {"mine": {"items": ITEMS, "shots": 0} | settings}
        own["statistics"]["primary"] = []
        return load_study(write_study(own))

    return load


@pytest.fixture
def own_task(tmp_path, files):
    """Write a task file with these settings over those of the made-up ARC."""

    def write(**changes):
        settings = yaml.safe_load(files["arc"].read_text("utf-8")) | changes
        path = tmp_path / "own.yaml"
        kept = {key: value for key, value in settings.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False), "utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("kind", ROWS)
def test_requests_are_those_of_the_harness_on_its_own_data(
    kind, files, study_with, tmp_path, monkeypatch
):
    import datasets.config
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings = task_settings(kind, files[kind], items=ITEMS)
    task_set = study_with(**settings).evaluation.datasets["mine"]
    [theirs] = TaskManager(include_defaults=False).load([str(files[kind])])["tasks"].values()
    theirs.config.num_fewshot = SHOTS.get(kind, 0)
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests()
    items, rows = task_items(task_set)
    assert rows == len(items) == ITEMS
    for number, item in enumerate(items):
        arguments = [i.args for i in theirs.instances if i.doc_id == number]
        request = task_request(task_set, item)
        if kind == "wikitext":
            assert arguments == [request.continuations]
        elif request.continuations:
            assert arguments == [(request.text, c) for c in request.continuations]
        else:
            [(text, limits)] = arguments
            assert (text, tuple(limits["until"])) == (request.text, request.until)
            assert limits["max_gen_toks"] == task_set.ask.max_new_tokens


def test_a_registered_name_is_a_source_on_the_hub(study_with):
    study = study_with(task="hellaswag", metric="acc_norm")
    task_set = study.evaluation.datasets["mine"]
    source = HubDataset(hub="Rowan/hellaswag", config=None, split="validation", revision="main")
    assert task_set.source == source
    assert source in [found for _, found in hub_sources(study)]
    assert task_set.ask.normalize == "bytes"


def test_worked_examples_of_a_registered_task_are_a_source_too(study_with):
    study = study_with(task="gsm8k", shots=5, metric="exact_match,flexible-extract")
    splits = {source.split for _, source in hub_sources(study) if source.hub == "openai/gsm8k"}
    assert splits == {"train", "test"}
    assert study.evaluation.datasets["mine"].read.metric == "exact_match,flexible-extract"


BAD_NAMES = {
    "nothing_of_that_name": "is no task of lm-eval",
    "mmlu": "a group is none",
    "squadv2": "is written as a Python class",
    "nowhere.yaml": "does not exist",
}


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES.items())
def test_a_task_that_cannot_be_asked_is_one_line(name, reason, study_with):
    with pytest.raises(StudyError) as raised:
        study_with(task=name)
    assert reason in str(raised.value)
    assert "evaluation.datasets.mine.task" in str(raised.value)
    assert "\n" not in str(raised.value)


BAD_SETTINGS = [
    ({"output_type": "guess"}, "output_type = 'guess'"),
    ({"generation_kwargs": {"do_sample": True}}, "greedy"),
    ({"generation_kwargs": {"num_beams": 4}}, "num_beams"),
    ({"repeats": 8}, "repeats"),
    ({"test_split": None}, "neither test_split nor validation_split"),
    ({"dataset_kwargs": {"data_files": {"other": "x.jsonl"}}}, "names no file for split 'test'"),
    ({"dataset_kwargs": {"data_dir": "x"}}, "data_dir"),
    ({"metric_list": [{"metric": "bleu"}]}, "right or wrong"),
    ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate"),
    ({"include": "gone.yaml"}, "gone.yaml"),
    ({"include": "own.yaml"}, "inside itself"),
    ({"doc_to_image": "picture"}, "pictures"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_SETTINGS, ids=lambda x: str(x)[:40])
def test_a_task_file_that_cannot_be_asked_is_one_line(changes, reason, own_task, study_with):
    with pytest.raises(StudyError) as raised:
        study_with(task=own_task(**changes))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_metric_is_named_beside_the_known_ones(files, study_with):
    with pytest.raises(StudyError, match="has no metric 'f1'; use one of acc,none, acc_norm,none"):
        study_with(task=str(files["arc"]), metric="f1")


def test_python_code_of_a_file_runs_only_if_the_study_trusts_it(files, study_with):
    with pytest.raises(StudyError, match=r"scenes\.py.*trust_task_code: true"):
        study_with(task=str(files["hellaswag"]))


def test_a_template_of_a_file_cannot_reach_python(own_task, study_with):
    """Jinja's own attributes lead to every module; the sandbox refuses them."""
    text = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    task_set = study_with(task=own_task(doc_to_text=text)).evaluation.datasets["mine"]
    with pytest.raises(StudyError, match="unsafe"):
        task_items(task_set)


def test_without_the_harness_a_study_says_how_to_install_it(monkeypatch, files, study_with):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"needs lm-evaluation-harness .*run pip install"):
        study_with(task=str(files["arc"]))


def test_rows_without_a_right_answer_are_named(own_task, study_with):
    task_set = study_with(task=own_task(doc_to_target="-1")).evaluation.datasets["mine"]
    with pytest.raises(StudyError, match=r"row 1 is no item .it has no right answer"):
        task_items(task_set)


def test_a_changed_task_or_its_code_changes_the_fingerprint(tmp_path, study_with):
    files = write_tasks(tmp_path / "own", items=ITEMS)
    settings = task_settings("hellaswag", files["hellaswag"], items=ITEMS)
    run = Run("evaluation", "base", "noquant")
    texts = [dependency_text(study_with(**settings), run)]
    for path, old, new in (
        (files["hellaswag"], "{{query}}", "{{query}} "),
        (files["hellaswag"].with_name("scenes.py"), "capitalize", "upper"),
        (files["hellaswag"].with_suffix(".jsonl"), "Scene 0", "Scene 00"),
    ):
        path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
        texts.append(dependency_text(study_with(**settings), run))
    assert len(set(texts)) == len(texts)


def test_results_are_read_without_the_task_file(tmp_path, study_with, study_settings):
    """As in an archive, or where the harness is not installed."""
    files = write_tasks(tmp_path / "own", items=ITEMS)
    study = study_with(**task_settings("boolq", files["boolq"], items=ITEMS))
    paths = StudyPaths("study")
    record_definitions(study, paths)
    files["boolq"].unlink()
    with pytest.raises(StudyError, match="does not exist"):
        load_study(tmp_path / "study.yaml")
    reloaded = load_study(tmp_path / "study.yaml", with_sources=False)
    assert reloaded.model_dump() == study.model_dump()
    definitions_file(paths).write_text('{"mine": 3}', "utf-8")
    with pytest.raises(StudyError, match=r"tasks\.json: is damaged"):
        load_study(tmp_path / "study.yaml", with_sources=False)
    definitions_file(paths).unlink()


def test_foils_are_other_targets_and_reversed_texts(files, study_with):
    study = study_with(task=str(files["lambada"]))
    items = evaluation_items(study, "mine")
    targets = {item.golds[0] for item in items}
    assert all(i.options[1] in targets - {i.golds[0]} for i in items)
    study = study_with(task=str(files["wikitext"]))
    for item in evaluation_items(study, "mine"):
        assert item.options[1] != item.options[0]
        assert reversed_words(item.options[1]).split() == item.options[0].split()[-FOIL_WORDS:]
