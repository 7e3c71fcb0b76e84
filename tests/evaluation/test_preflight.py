"""What would stop a job is said before the first one: one line, naming the key to mend."""

import shutil
import subprocess
import sys

import pytest

import brought_models
from brought_models import copied, edit_json, edit_tensors
from helpers.core.files import PROJECT, StudyPaths
from helpers.evaluation.preflight import main, problems
from helpers.sources.models import byte_tokenizer, random_model
from helpers.study.loading import load_study
from helpers.workflow import launcher

TEMPLATE = "chat_template.jinja"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brought") / "sound"
    random_model("llama", seed=3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def check(sound, study_settings, write_study, tmp_path):
    """check(change to the folder, change to the settings): the problems found."""

    def preflight_problems(change=None, settings=None) -> list[str]:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = copied(sound, tmp_path / "model", *filter(None, [change]))
        study_settings["models"]["base"] = {"folder": str(folder)}
        if settings:
            settings(study_settings)
        study = load_study(write_study(study_settings))
        return list(problems(study, StudyPaths("study"), dry=True))

    return preflight_problems


def no_template(folder):
    (folder / TEMPLATE).unlink(missing_ok=True)
    edit_json(folder / "tokenizer_config.json", drop=("chat_template",))


def added_tokens(folder):
    """Tokens of the template that the embeddings have no rows for."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|user|>")
    tokenizer.save_pretrained(folder)


def short_context(folder):
    edit_json(folder / "config.json", max_position_embeddings=60)


def unused_tokens(folder):
    """Beyond the embeddings too, but no text has them."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[PAD]"], special_tokens=True)
    tokenizer.save_pretrained(folder)


def bad_template(folder):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[7]['content'] }}"
    tokenizer.save_pretrained(folder)


def no_eos(folder):
    edit_json(folder / "tokenizer_config.json", drop=("eos_token",))


def lost_tensor(folder):
    edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def stray_tensor(folder):
    edit_tensors(folder, lambda t: t.update({"model.other.weight": t["model.norm.weight"] * 1}))


def other_shape(folder):
    edit_json(folder / "config.json", vocab_size=300)


def only_scored(settings):
    del settings["models"]["tuned"], settings["evaluation"]["datasets"]["squad_v2"]


def only_base(settings):
    del settings["models"]["tuned"]


def in_turns(settings):
    del settings["models"]["tuned"]
    settings["evaluation"]["datasets"]["squad_v2"]["ask"] |= {"stop": "turn", "shots": 0}


def test_a_sound_study_has_no_problem(check):
    assert check() == []


@pytest.mark.parametrize("case", [unused_tokens, brought_models.old_buffers])
def test_what_works_is_not_refused(check, case):
    assert check(case) == []


def test_a_base_model_can_be_scored_without_a_template(check):
    assert check(no_template, only_scored) == []


def test_a_base_model_answers_after_worked_examples(check):
    assert check(no_template, only_base) == []


PROBLEMS = [
    (
        no_template,
        in_turns,
        [
            "evaluation.datasets.squad_v2.ask.shots = 0 but models.base has no chat template",
            "evaluation.datasets.squad_v2.ask.stop = 'turn' but models.base has no chat template",
        ],
    ),
    (
        no_template,
        None,
        ["models.tuned.finetune.start = 'base' has no"],
    ),
    (
        added_tokens,
        None,
        ["models.base: its tokenizer gives '<|user|>' the id 259, beyond"],
    ),
    (
        short_context,
        only_base,
        [
            "evaluation.datasets.arc: item",
            "evaluation.datasets.squad_v2: item",
            "evaluation.shared_text: passage 1 needs 64 tokens but models.base reads 60; lower",
            "calibration: item",
        ],
    ),
    (bad_template, None, ["models.base: model: its chat template refuses"]),
    (no_eos, None, ["models.base: model: the tokenizer has no eos token"]),
    (lost_tensor, None, ["models.base: model: model.layers.1.mlp.up_proj.weight is not in its"]),
    (stray_tensor, None, ["models.base: model: model.other.weight is in its files"]),
    (other_shape, None, ["models.base: model: model.embed_tokens.weight is [259, 64] in its"]),
]


def test_a_rotation_without_a_matrix_or_of_another_family_is_refused(check, sound, tmp_path):
    def rotated(settings):
        settings["models"]["turned"] = {"rotate": {"start": "base", "rotations": ["r1", "r2"]}}

    assert check(None, rotated) == []
    for family, sizes, begun in [
        ("llama", {"hidden_size": 60}, []),
        ("llama", {"hidden_size": 260}, ["models.turned.rotate.rotations: r1 needs a Hadamard"]),
        ("llama", {"head_dim": 10}, ["models.turned.rotate.rotations: r2 needs a Hadamard"]),
        (
            "opt",
            {},
            ["models.turned.rotate.start = 'base' is of family opt, and only llama, mistral"],
        ),
    ]:

        def of_another_size(folder, family=family, sizes=sizes):
            random_model(family, seed=3, **sizes).save_pretrained(folder)

        lines = [line for line in check(of_another_size, rotated) if "turned" in line]
        assert [line[: len(b)] for line, b in zip(lines, begun, strict=True)] == begun


@pytest.mark.bank("brought", "a model that people bring: {case}", at="the model's folder")
@pytest.mark.parametrize(("case", "settings", "begun"), PROBLEMS)
def test_each_problem_is_a_line_with_its_key(check, case, settings, begun):
    lines = check(case, settings)
    assert len(lines) == len(begun)
    for line, start in zip(lines, begun, strict=True):
        assert line.startswith(start)
        assert "; " in line
        assert len(line.splitlines()) == 1


@pytest.mark.bank("brought", "a row that is none of its set's", at="rows of a data set")
def test_rows_are_read_and_items_drawn(check, write_rows):
    rows = write_rows([{"question": "q?", "answer": True, "passage": "p"}, {"question": "r"}])

    def own_rows(settings):
        source = {"adapter": "boolq", "source": {"file": rows}, "items": 2}
        settings["evaluation"]["datasets"]["arc"] |= source

    (line,) = check(None, own_rows)
    assert line.startswith("evaluation.datasets.arc: ")
    assert "row 2 is no boolq item" in line


def test_what_is_not_fetched_yet_is_passed_over(check):
    """A dry run looks at what is here; the run itself fetches first."""

    def from_a_hub(settings):
        hub = {"hub": "someone/rows", "config": None, "split": "test", "revision": "main"}
        settings["evaluation"]["datasets"]["arc"]["source"] = hub
        settings["models"]["other"] = {"hub": "someone/model", "revision": "main"}

    assert check(None, from_a_hub) == []
    (line,) = check(no_eos, from_a_hub)
    assert "no eos token" in line


def test_too_few_rows_are_told_once(check):
    def more(settings):
        settings["evaluation"]["datasets"]["arc"]["items"] = 10**6

    (line,) = check(None, more)
    assert line.startswith("evaluation.datasets.arc: 1000000 items asked for but")


def test_a_text_longer_than_the_study_allows_is_told(check):
    def shorter(settings):
        settings["calibration"]["max_tokens"] = 40

    (line,) = check(None, shorter)
    assert line.startswith("calibration: max_tokens = 40 but item")


def test_the_command_names_the_study_file(sound, study_settings, write_study, tmp_path, capsys):
    study_settings["models"]["base"] = {"folder": str(copied(sound, tmp_path / "m", no_template))}
    path = write_study(study_settings)
    assert main([str(path), "--dry"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_a_dry_run_says_so_before_it_plans(sound, study_settings, write_study, tmp_path):
    study_settings["models"]["base"] = {"folder": str(copied(sound, tmp_path / "m", no_template))}
    command = [
        sys.executable,
        "-m",
        "helpers.workflow.cli",
        "study",
        str(write_study(study_settings)),
    ]
    process = subprocess.run(
        [*command, "--cores", "1", "--", "-n"], cwd=PROJECT, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert "has no chat template" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_nothing_is_looked_at_twice_unless_it_changed(
    sound, study_settings, write_study, tmp_path, monkeypatch
):
    runs = []

    def run(command, **_options):
        runs.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launcher.subprocess, "run", run)
    folder = copied(sound, tmp_path / "m")
    study_settings["models"]["base"] = {"folder": str(folder)}

    def looked_at() -> bool:
        before, path = len(runs), write_study(study_settings)
        assert launcher.check_sources(str(path), load_study(path), dry=False) == 0
        return len(runs) > before

    assert [looked_at(), looked_at()] == [True, False]
    edit_json(folder / "config.json", max_position_embeddings=300)
    assert [looked_at(), looked_at()] == [True, False]
    study_settings["seed"] = 11
    assert looked_at()


def test_what_was_refused_is_looked_at_again(
    sound, study_settings, write_study, tmp_path, monkeypatch
):
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        launcher.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 2)
    )
    study_settings["models"]["base"] = {"folder": str(copied(sound, tmp_path / "m"))}
    path = write_study(study_settings)
    for _ in range(2):
        assert launcher.check_sources(str(path), load_study(path), dry=False) == 2


def test_what_ships_with_the_project_is_not_looked_at(study_path, monkeypatch):
    monkeypatch.setattr(launcher.subprocess, "run", lambda *_a, **_o: pytest.fail("looked at"))
    assert launcher.check_sources(str(study_path), load_study(study_path), dry=False) == 0


@pytest.mark.parametrize(
    ("share", "problem"), [(1e-4, "fits no Linear of base"), (0.9, "leaves every Linear float")]
)
def test_a_share_that_protects_no_linear_or_all_is_refused_before_the_first_job(
    check, share, problem
):
    def protect(settings):
        settings["variants"]["smoothquant_w8a8"]["protect"] = {"bytes": share}

    [line] = check(settings=protect)
    assert line.startswith(f"variants.smoothquant_w8a8.protect.bytes = {share:g} {problem}")


@pytest.mark.parametrize("key", ["targets", "optional"])
def test_smoothing_that_has_no_place_in_a_model_is_refused_before_the_first_job(check, key):
    def smooth_values(settings):
        settings["variants"]["smoothquant_w8a8"]["smooth"][key] = ["attention_output"]

    [line] = check(settings=smooth_values)
    assert line.startswith(f"variants.smoothquant_w8a8.smooth.{key}: 'attention_output' needs as")
    assert line.endswith("here are 2 and 4; leave it out, or the variant from a study of base")
