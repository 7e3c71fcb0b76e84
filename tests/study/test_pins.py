"""The commits a study's names meant: one for each name, read back, and put in their place."""

import json

import pytest

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.study import inputs as p
from helpers.study.loading import load_study, read_study, study_file
from helpers.study.schema import HubDataset, HubModel

COMMITS = [letter * 40 for letter in "abc"]
ROWS = {"rows": 5, "of_rows": 9, "pieces": None, "sha256": "0" * 64}
SQUAD = {"hub": "org/squad", "config": None, "split": "validation", "revision": "main"}
MODEL = {"hub": "org/model", "revision": "main"}


@pytest.fixture
def of_hub(write_study, study_settings, monkeypatch, tmp_path):
    """A study file whose model and passages are on a Hub, in folders of its own."""
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    study_settings["models"]["base"] = dict(MODEL)
    study_settings["evaluation"]["datasets"]["squad_v2"]["source"] = dict(SQUAD)
    study_settings["evaluation"]["shared_text"]["dataset"] = dict(SQUAD)
    return write_study(study_settings)


def paths(study) -> StudyPaths:
    return StudyPaths(study_file(study).stem)


def known(*, model=COMMITS[0], dataset=COMMITS[1]) -> p.Pins:
    return p.Pins(
        models=(p.PinnedModel(**MODEL, commit=model),),
        datasets=(p.PinnedDataset(**SQUAD, stream=None, commit=dataset, **ROWS),),
    )


def test_every_source_is_found_once_by_its_first_place(of_hub):
    sources = p.hub_sources(read_study(of_hub))
    assert [key for key, _ in sources] == ["models.base", "evaluation.datasets.squad_v2.source"]
    assert [source.hub for _, source in sources] == ["org/model", "org/squad"]


def test_a_study_without_a_hub_has_none(study):
    assert p.hub_sources(study) == []
    assert p.with_pinned_commits(study, p.Pins()) == study


def test_what_is_written_is_read_back(of_hub):
    p.write_pins(paths(of_hub), known())
    assert p.read_pins(paths(of_hub)) == known()


def test_a_loaded_study_holds_commits_wherever_its_file_names_a_revision(of_hub):
    assert load_study(of_hub) == read_study(of_hub)
    p.write_pins(paths(of_hub), known())
    loaded = load_study(of_hub)
    assert loaded.models["base"] == HubModel(hub="org/model", revision=COMMITS[0])
    pinned = HubDataset(**SQUAD | {"revision": COMMITS[1]})
    assert loaded.evaluation.datasets["squad_v2"].source == pinned
    assert loaded.evaluation.shared_text.dataset == pinned
    same = loaded.model_copy(update={"models": {}, "evaluation": None})
    assert same == read_study(of_hub).model_copy(update={"models": {}, "evaluation": None})


def test_another_revision_is_another_name(of_hub):
    """The pin of `main` says nothing about `v2`; a commit needs none."""
    pins = known()
    assert pins.commit(HubModel(hub="org/model", revision="v2")) is None
    assert pins.commit(HubModel(hub="org/model", revision=COMMITS[2])) == COMMITS[2]
    assert pins.commit(HubModel(hub="org/squad", revision="main")) is None


DAMAGED = [
    ({"models": [{**MODEL, "commit": "main"}]}, "models.0.commit is damaged"),
    ({"models": [MODEL]}, "models.0.commit is damaged"),
    ([], "the file is damaged"),
    ({"model": []}, "the file is damaged"),
    (
        {"models": [{**MODEL, "commit": c} for c in COMMITS[:2]]},
        "org/model at main has two commits",
    ),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_a_damaged_record_is_refused_with_the_remedy(of_hub, content, message):
    file = p.pins_file(paths(of_hub))
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load_study(of_hub)
    error = str(caught.value)
    assert error.startswith(f"outputs/study/sources.json: {message}")
    assert error.endswith("or delete it and run make fetch STUDY=study to pin again")
    assert len(error.splitlines()) == 1


def test_what_is_not_fetched_is_refused_where_it_is_read(of_hub):
    """A notebook opened by itself says what to run, and asks no Hub."""
    from helpers.sources.models import model_folder
    from helpers.sources.sampling import evaluation_items

    for revision, message in (("main", "is not pinned"), (COMMITS[0], "not on this machine")):
        if revision != "main":
            p.write_pins(paths(of_hub), known())
        study = load_study(of_hub)
        for read in (
            lambda study=study: evaluation_items(study, "squad_v2"),
            lambda study=study: model_folder(study, "base", paths(of_hub)),
        ):
            with pytest.raises(StudyError, match=f"{message}.*; run make fetch STUDY="):
                read()
