"""Fetching from a Hub, and each way it fails: one line with the remedy, or a retry that succeeds.

The clients are the ordinary ones, in processes of their own, against a stand-in on loopback.
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import safetensors.torch
from benchmarks.lm_eval_tasks import rows_of

import hub_repositories
from helpers.core.files import PROJECT
from helpers.sources.sampling import evaluation_items
from helpers.sources.tasks import task_request
from helpers.study import stages
from helpers.study.loading import load_study
from hub_repositories import MODEL
from hub_standin import STRANGER, TOKEN, Hub

ARC = "allenai/ai2_arc"
OPENMATH = "nvidia/OpenMathInstruct-2"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub() as standin:
        mark = tmp_path_factory.mktemp("mark") / "ran"
        hub_repositories.fill(standin, mark)
        standin.mark = mark
        yield standin


@pytest.fixture(autouse=True)
def calm(hub):
    hub.calm()
    yield
    hub.calm()


@pytest.fixture
def place(tmp_path, hub) -> dict[str, str]:
    """Environment of a machine that has fetched nothing yet."""
    gone = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT")
    environment = {k: v for k, v in os.environ.items() if k not in gone}
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "STUDY_OUTPUTS": str(tmp_path / "outputs"),
        "STUDY_CACHE": str(tmp_path / "cache"),
    }
    return environment | own


@pytest.fixture
def fetch(place):
    """fetch(study file, *options, **environment): the command, run to its end."""

    def run(study, *options, **more):
        command = [sys.executable, "-m", "helpers.sources.fetching", str(study), *options]
        return subprocess.run(
            command, env=place | more, capture_output=True, text=True, timeout=100, check=False
        )

    return run


@pytest.fixture
def of_model(write_study, study_settings):
    """of_model(source): a study file of a model on the Hub; all else is shipped."""

    def write(name=MODEL, revision="main"):
        study_settings["models"]["base"] = {"hub": name, "revision": revision}
        study_settings["enable_thinking"] = False
        return write_study(study_settings)

    return write


@pytest.fixture
def of_dataset(write_study, study_settings):
    """The same for the science questions, the model a random one."""

    def write(name=ARC, revision="main", config="ARC-Challenge", split="test", **more):
        source = {"hub": name, "config": config, "split": split, "revision": revision, **more}
        study_settings["evaluation"]["datasets"]["arc"]["source"] = source
        return write_study(study_settings)

    return write


def line(done) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [row for row in done.stderr.splitlines() if row.strip()]
    refusals = [row for row in lines if "study.yaml: " in row]
    assert len(refusals) == 1, done.stderr
    assert lines[-1] == refusals[0]
    return refusals[0].partition("study.yaml: ")[2]


def pins(place) -> dict:
    file = f"{place['STUDY_OUTPUTS']}/study/sources.json"
    return json.loads(open(file, encoding="utf-8").read())


def test_what_is_fetched_is_pinned_and_nothing_else_is_taken(fetch, of_model, place, hub, tmp_path):
    done = fetch(of_model())
    assert done.returncode == 0, done.stderr
    commit = hub.repositories["model", MODEL].refs["main"]
    assert pins(place)["models"] == [{"hub": MODEL, "revision": "main", "commit": commit}]
    (snapshot,) = (tmp_path / "hf" / "hub").glob("models--*/snapshots/*")
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert not hub.mark.exists(), "code of the repository was run"


@pytest.mark.long
def test_what_is_here_is_not_asked_for_again(fetch, of_model, of_dataset, hub):
    of_model()
    study = of_dataset()
    assert fetch(study).returncode == 0
    hub.calm()
    assert fetch(study).returncode == 0
    assert hub.requests == []


NOT_THERE = [("of_model", {}, 401), ("of_dataset", {}, 401), ("of_model", {"HF_TOKEN": TOKEN}, 404)]


@pytest.mark.parametrize(("kind", "environment", "status"), NOT_THERE)
def test_not_found(request, fetch, kind, environment, status):
    error = line(fetch(request.getfixturevalue(kind)("org/nothing"), **environment))
    assert "'org/nothing' at 'main': is not on the Hub, or is private; check the name" in error


@pytest.fixture
def gate(hub):
    """gate(kind, name): let only some in, until the test ends."""
    closed = []

    def close(kind, name):
        closed.append(hub.repositories[kind, name])
        closed[-1].gated = True

    yield close
    for repository in closed:
        repository.gated = False


def test_gated(fetch, of_model, of_dataset, gate):
    """Nobody, somebody else, and one who was let in."""
    gate("model", MODEL)
    for environment in ({}, {"HF_TOKEN": STRANGER}):
        error = line(fetch(of_model(), **environment))
        assert "is gated; ask for access on its page, log in (hf auth login" in error
    assert fetch(of_model(), HF_TOKEN=TOKEN).returncode == 0
    gate("dataset", ARC)
    error = line(fetch(of_dataset(), HF_TOKEN=STRANGER))
    assert "evaluation.datasets.arc.source = 'allenai/ai2_arc' at 'main': is gated" in error


@pytest.mark.parametrize("kind", ["of_model", "of_dataset"])
@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_wrong_revision(request, fetch, kind, revision):
    error = line(fetch(request.getfixturevalue(kind)(revision=revision)))
    assert f"at {revision!r}: has no such revision; name a branch, tag or commit it has" in error


PASSING = [
    ("of_model", "GET /api/models"),
    ("of_model", "HEAD .*safetensors"),
    ("of_dataset", "GET .*parquet"),
]


@pytest.mark.parametrize(("kind", "to"), PASSING)
def test_a_server_that_recovers_is_waited_for(request, fetch, hub, kind, to):
    hub.answer(503, times=2, to=to)
    done = fetch(request.getfixturevalue(kind)())
    assert done.returncode == 0, done.stderr
    assert sum(fault.times for fault in hub.faults) == 0


@pytest.mark.long
def test_a_server_that_does_not_recover_is_named(fetch, of_model, hub):
    hub.answer(503, times=99)
    assert "the Hub has trouble (503); run again later" in line(fetch(of_model()))


@pytest.mark.parametrize("kind", ["of_model", pytest.param("of_dataset", marks=pytest.mark.long)])
def test_a_connection_broken_off_is_taken_up_again(request, fetch, hub, kind):
    hub.break_off("GET /large/", times=2)
    done = fetch(request.getfixturevalue(kind)())
    assert done.returncode == 0, done.stderr
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (lambda data: data[: len(data) // 2], "could not be fetched (Consistency check failed"),
        (lambda data: data[:-4] + b"spoi", "model.safetensors arrived damaged and was removed"),
    ],
    ids=["truncated", "corrupted"],
)
def test_weights_that_are_not_what_the_hub_names_are_not_kept(
    fetch, of_model, hub, spoiled, message
):
    hub.spoil("GET /large/", spoiled, times=1)
    error = line(fetch(of_model()))
    assert message in error
    assert "run again" in error
    assert fetch(of_model()).returncode == 0


SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def in_shards(hub):
    """in_shards(name): a repository whose weights lie in three files; returns its files."""

    def add(name: str) -> dict[str, bytes]:
        files = hub_repositories.model_files()
        tensors = safetensors.torch.load(files.pop("model.safetensors"))
        places = {tensor: SHARDS[i % 3] for i, tensor in enumerate(sorted(tensors))}
        for shard in SHARDS:
            shard_tensors = {
                tensor: tensors[tensor] for tensor, place in places.items() if place == shard
            }
            files[shard] = safetensors.torch.save(shard_tensors, {"format": "pt"})
        files[INDEX] = json.dumps({"metadata": {}, "weight_map": places}).encode()
        hub.add("model", name, files)
        return files

    return add


@pytest.mark.parametrize(
    "present", [SHARDS[:1], SHARDS[1:], []], ids=["first", "but first", "none"]
)
def test_shards_that_are_not_here_are_fetched_and_no_others(
    fetch, of_model, in_shards, hub, tmp_path, present
):
    """As a fetch leaves it that was cut off: some of the shards, or the index alone."""
    files, study = in_shards("org/sharded"), of_model("org/sharded")
    assert fetch(study).returncode == 0
    (snapshot,) = (tmp_path / "hf" / "hub").glob("models--*/snapshots/*")
    for shard in set(SHARDS) - set(present):
        (snapshot / shard).resolve().unlink()
        (snapshot / shard).unlink()
    hub.calm()
    done = fetch(study)
    assert done.returncode == 0, done.stderr
    assert all((snapshot / shard).read_bytes() == files[shard] for shard in SHARDS)
    assert sum(request.startswith("GET /large/") for request in hub.requests) == 3 - len(present)


def test_a_shard_that_was_cut_short_in_the_cache_is_fetched_again(
    fetch, of_model, in_shards, hub, tmp_path
):
    files, study = in_shards("org/sharded"), of_model("org/sharded")
    assert fetch(study).returncode == 0
    (snapshot,) = (tmp_path / "hf" / "hub").glob("models--*/snapshots/*")
    (snapshot / SHARDS[1]).resolve().write_bytes(files[SHARDS[1]][:-3])
    assert f"{SHARDS[1]} arrived damaged and was removed; run again" in line(fetch(study))
    assert fetch(study).returncode == 0
    assert (snapshot / SHARDS[1]).read_bytes() == files[SHARDS[1]]


def test_a_repository_that_lacks_what_its_index_names_is_refused(fetch, of_model, in_shards, hub):
    """Shards that are not numbered are known by the index alone."""
    files = in_shards("org/lacking")
    index = files[INDEX].replace(SHARDS[2].encode(), b"part-3.safetensors")
    hub.add("model", "org/lacking", files | {INDEX: index})
    error = line(fetch(of_model("org/lacking")))
    assert "lacks part-3.safetensors (1 of the 3 files that" in error
    assert error.endswith("name another revision")


@pytest.mark.long
def test_rows_that_are_truncated_are_not_kept(fetch, of_dataset, hub, tmp_path):
    hub.spoil("GET /large/", lambda data: data[: len(data) // 2], times=99)
    assert "could not be fetched (" in line(fetch(of_dataset()))
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_study_without_a_network_stops_in_seconds_before_any_job(place):
    """`make study STUDY=qwen3-0.6b`, as the Makefile runs it."""
    command = [sys.executable, "-m", "helpers.workflow.cli", "study", "qwen3-0.6b", "--cores", "2"]
    nowhere = place | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    started = time.monotonic()
    done = subprocess.run(command, env=nowhere, cwd=PROJECT, capture_output=True, text=True)
    assert time.monotonic() - started < 20
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(
        "params/qwen3-0.6b.yaml: models.base = 'Qwen/Qwen3-0.6B' at 'main': "
    )
    assert "the Hub cannot be reached (" in lines[0]
    assert lines[0].endswith("set HF_ENDPOINT to a mirror, or name local files in the study")


@pytest.mark.parametrize("how", ["offline", pytest.param("dead", marks=pytest.mark.long)])
def test_a_warm_cache_needs_no_hub(fetch, of_model, of_dataset, place, tmp_path, how):
    """Not for this study, and not for another one that names the same for the first time."""
    nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    without = {"offline": {"HF_HUB_OFFLINE": "1"}, "dead": nowhere}[how]
    of_model()
    study = of_dataset()
    assert "HF_HUB_OFFLINE is set" in line(fetch(study, HF_HUB_OFFLINE="1"))
    assert fetch(study).returncode == 0
    known = pins(place)
    assert fetch(study, **without).returncode == 0
    done = fetch(study, STUDY_OUTPUTS=str(tmp_path / "others"), **without)
    assert done.returncode == 0, done.stderr
    place["STUDY_OUTPUTS"] = str(tmp_path / "others")
    assert pins(place) == known


REFUSED = [
    ({"pytorch_model.bin": b""}, "holds only pytorch_model.bin, a pickle, which may run anything"),
    ({}, "holds no weights"),
    ({"config.json": None, "adapter_config.json": b"{}"}, "holds an adapter"),
    ({"config.json": b"{}", "model.safetensors": b""}, "without model_type"),
]


@pytest.mark.parametrize(("files", "message"), REFUSED)
def test_a_repository_that_is_no_model_to_study_is_refused_before_it_is_fetched(
    fetch, of_model, hub, files, message
):
    given = {"config.json": b"{}", "tokenizer.json": b"{}"} | files
    repository_files = {path: data for path, data in given.items() if data is not None}
    hub.add("model", "org/other", repository_files)
    assert message in line(fetch(of_model("org/other")))
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched <= {"config.json"}


@pytest.mark.long
def test_an_unknown_configuration_or_split_is_named_with_those_there_are(fetch, of_dataset):
    error = line(fetch(of_dataset(config="ARC-Hard")))
    assert "config = 'ARC-Hard'" in error
    assert "ARC-Challenge" in error
    error = line(fetch(of_dataset(split="tests")))
    assert "split = 'tests' is none of train, validation, test; correct it" in error


def test_every_source_that_is_wrong_is_named_at_once(fetch, of_model, of_dataset):
    of_model("org/nothing")
    done = fetch(of_dataset(revision="v9"))
    errors = [row.partition("study.yaml: ")[2] for row in done.stderr.splitlines()]
    assert [row.split(" = ")[0] for row in errors if row] == [
        "models.base",
        "evaluation.datasets.arc.source",
    ]


@pytest.mark.long
def test_a_branch_that_moves_is_followed_only_on_demand(fetch, of_dataset, place, hub, monkeypatch):
    """And the study then depends on another commit, so that what used the old one is repeated."""
    monkeypatch.setenv("STUDY_OUTPUTS", place["STUDY_OUTPUTS"])
    study, run = of_dataset(), stages.Run("evaluation", "base", "noquant")
    unpinned = stages.settings_text(load_study(study), run)
    assert fetch(study).returncode == 0
    before = pins(place)["datasets"][0]["commit"]
    first = stages.settings_text(load_study(study), run)
    assert before in first != unpinned

    repository = hub.repositories["dataset", ARC]
    files = repository.commits[before]
    rows = hub_repositories.shipped("arc")[:40]
    moved = files | {"ARC-Challenge/test-00000-of-00001.parquet": hub_repositories.table(rows)}
    after = repository.commit(moved)
    try:
        assert fetch(study).returncode == 0
        assert stages.settings_text(load_study(study), run) == first
        done = fetch(study, "--renew")
        assert f"pinned   {ARC}  main is {after[:12]} (was {before[:12]})" in done.stderr
        assert pins(place)["datasets"][0]["commit"] == after
        assert pins(place)["datasets"][0]["rows"] == len(rows)
        assert after in stages.settings_text(load_study(study), run)
    finally:
        repository.commit(files)


@pytest.mark.long
def test_other_rows_than_those_on_record_are_not_accepted(fetch, of_dataset, place, tmp_path):
    """A damaged cache is fetched again; the same commit with other rows is refused."""
    study = of_dataset()
    assert fetch(study).returncode == 0
    known = pins(place)
    (rows_path,) = (tmp_path / "cache" / "datasets").glob("*.jsonl")
    whole = rows_path.read_bytes()
    rows_path.write_bytes(whole[:1000])
    assert fetch(study).returncode == 0
    assert rows_path.read_bytes() == whole
    assert pins(place) == known
    known["datasets"][0]["sha256"] = "0" * 64
    file = tmp_path / "outputs" / "study" / "sources.json"
    file.write_text(json.dumps(known), encoding="utf-8")
    assert "are not the 130 that sources.json has on record" in line(fetch(study))


def test_a_stream_reads_a_part_of_every_file_and_says_how_much(fetch, of_dataset, place, hub):
    """Twelve pieces of a split of 75; of each file some, of none all."""
    stream = {"rows": 60, "pieces": 12, "seed": 3}
    study = of_dataset(OPENMATH, config=None, split="train", stream=stream)
    done = fetch(study)
    assert done.returncode == 0, done.stderr
    pin = pins(place)["datasets"][0]
    assert (pin["rows"], pin["of_rows"], pin["pieces"]) == (60, 1450, [12, 75])
    files = {request.rpartition("/")[2] for request in hub.requests if ".parquet" in request}
    assert files == {f"train-0000{i}-of-00003.parquet" for i in range(3)}


REGISTERED = {
    "Rowan/hellaswag": ("hellaswag", "default", "validation"),
    "openai/gsm8k": ("gsm8k", "main", "test"),
}


@pytest.fixture
def of_tasks(write_study, study_settings, hub):
    """A study of registered tasks of lm-evaluation-harness, whose rows are on the Hub."""
    for name, (kind, config, split) in REGISTERED.items():
        rows = rows_of(kind, 8, seed=1)
        files = {
            f"data/{part}-0.parquet": hub_repositories.table(rows) for part in (split, "train")
        }
        card = hub_repositories.card({config: {p: f"data/{p}-*" for p in (split, "train")}})
        if ("dataset", name) not in hub.repositories:
            hub.add("dataset", name, files | {"README.md": card})
    study_settings["evaluation"]["datasets"] = {
        "arc": {"task": "arc_challenge", "items": 4, "shots": 2},
        "hellaswag": {"task": "hellaswag", "items": 4, "shots": 0, "metric": "acc_norm"},
        "gsm8k": {"task": "gsm8k", "items": 4, "shots": 3},
    }
    study_settings["statistics"]["primary"] = []
    return write_study(study_settings)


@pytest.mark.long
def test_rows_of_registered_tasks_are_pinned_and_then_read_without_a_network(
    fetch, of_tasks, place, hub, monkeypatch
):
    done = fetch(of_tasks)
    assert done.returncode == 0, done.stderr
    fetched = {(p["hub"], p["split"]): p["commit"] for p in pins(place)["datasets"]}
    expected = {(ARC, "train"), (ARC, "test"), ("Rowan/hellaswag", "validation")}
    assert fetched.keys() == expected | {("openai/gsm8k", "train"), ("openai/gsm8k", "test")}
    for (name, _), commit in fetched.items():
        assert commit == hub.repositories["dataset", name].refs["main"]
    for name in ("STUDY_OUTPUTS", "STUDY_CACHE"):
        monkeypatch.setenv(name, place[name])
    hub.calm()
    study = load_study(of_tasks)
    for name, task_set in study.evaluation.datasets.items():
        requests = [task_request(task_set, item) for item in evaluation_items(study, name)]
        assert len({request.text for request in requests}) == 4
        examples = requests[0].text.count("Question:") - 1
        assert name == "hellaswag" or examples == task_set.shots
    assert hub.requests == []
