"""Whatever is wrong with a study file is said in one line: place, value, limit, remedy."""

import math

import pytest

from helpers.core import files
from helpers.core.errors import StudyError
from helpers.study import inputs, loading
from helpers.study.inputs import resolve_path
from helpers.study.loading import load_study

JARGON = (
    "traceback",
    "pydantic",
    "union_tag",
    "input should",
    "validation error",
    "tuple",
    "dictionary",
    "instance of",
    "basemodel",
    "type=",
    "function-",
    "unable to parse",
)


def put(settings, path: str, value):
    """Set the value at a slash-separated path."""
    inner, keys = settings, path.split("/")
    for key in keys[:-1]:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[int(keys[-1]) if isinstance(inner, list) else keys[-1]] = value
    return settings


def refusal(path) -> str:
    """The one line a study file is refused with, its place taken off."""
    with pytest.raises(StudyError) as caught:
        load_study(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    assert line.startswith(f"{path}: ")
    assert not any(word in line.lower() for word in JARGON), line
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return line.removeprefix(f"{path}: ")


UNKNOWN_KEYS = [
    ("sed", "seed"),
    ("runtime/dtipe", "dtype"),
    ("variants/smoothquant_w8a8/smooth/alhpa", "alpha"),
    ("variants/rtn_w8a8/presets", "preset"),
    ("models/tuned/finetune/epoch", "epochs"),
    ("calibration/item", "items"),
    ("evaluation/datasets/arc/ask/normalise", "normalize"),
    ("evaluation/shared_text/passage", "passages"),
    ("statistics/primary/0/datset", "dataset"),
]


@pytest.mark.parametrize(("path", "meant"), UNKNOWN_KEYS)
def test_an_unknown_key_is_named_with_the_one_meant(write_study, study_settings, path, meant):
    line = refusal(write_study(put(study_settings, path, 3)))
    assert line.startswith(f"{path.replace('/', '.')} = 3 is not a known key")
    assert f"did you mean '{meant}'?" in line


def test_an_unknown_key_like_no_other_is_refused_with_those_known(write_study, study_settings):
    line = refusal(write_study(put(study_settings, "runtime/zzz", 3)))
    assert "runtime.zzz = 3" in line
    assert "remove it" in line
    assert all(key in line for key in study_settings["runtime"] if key != "zzz")


@pytest.mark.parametrize(
    ("path", "source", "key", "meant"),
    [
        ("models/base", {"hub": "a/b", "revison": "main"}, "revison", "revision"),
        ("calibration/dataset", {"shipped": "openmath_train", "split": "x"}, "split", None),
        ("models/tuned/finetune/dataset", {"shipped": "openmath_train", "x": 1}, "x", None),
    ],
)
def test_an_unknown_key_beside_a_source_is_the_one_named(
    write_study, study_settings, path, source, key, meant
):
    """The kind of a source is a key too; the message must not blame it."""
    line = refusal(write_study(put(study_settings, path, source)))
    assert line.startswith(f"{path.replace('/', '.')}.{key} = {source[key]!r} is not a known key")
    assert meant is None or f"did you mean '{meant}'?" in line


OUT_OF_RANGE = [
    ("variants/smoothquant_w8a8/smooth/alpha", 1.7, "[0, 1]"),
    ("variants/smoothquant_w8a8/smooth/alpha", -0.1, "[0, 1]"),
    ("variants/smoothquant_w8a8/smooth/alpha", math.nan, "[0, 1]"),
    ("variants/smoothquant_w8a8/smooth/alpha", math.inf, "[0, 1]"),
    ("models/tuned/finetune/warmup_fraction", 2.0, "[0, 1]"),
    ("models/tuned/finetune/learning_rate", 0.0, "0"),
    ("models/tuned/finetune/learning_rate", math.nan, "0"),
    ("models/tuned/finetune/learning_rate", math.inf, "1"),
    ("models/tuned/finetune/epochs", 0, "at least 1"),
    ("statistics/confidence", 1.0, "1"),
    ("statistics/confidence", 95.0, "1"),
    ("statistics/margin", math.nan, "0"),
    ("statistics/margin", -math.inf, "0"),
    ("statistics/resamples", 99, "at least 100"),
    ("seed", -1, "at least 0"),
    ("seed", 2**32, str(2**32)),
    ("evaluation/datasets/squad_v2/ask/shots", 4, "at most 3"),
    ("evaluation/datasets/arc/items", 0, "at least 1"),
]


@pytest.mark.parametrize(("path", "value", "limit"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_named_with_its_limit(
    write_study, study_settings, path, value, limit
):
    line = refusal(write_study(put(study_settings, path, value)))
    assert line.startswith(f"{path.replace('/', '.')} = {value!r} is ")
    assert limit in line.split(" = ", 1)[1].removeprefix(repr(value))
    assert "; give " in line


WRONG_TYPES = [
    ("seed", "seven", "whole number"),
    ("seed", "7", "whole number"),
    ("seed", 7.5, "whole number"),
    ("seed", True, "whole number"),
    ("seed", math.nan, "whole number"),
    ("seed", None, "whole number"),
    ("runtime/threads", True, "whole number"),
    ("evaluation/datasets/squad_v2/ask/shots", False, "whole number"),
    ("statistics/margin", "small", "number"),
    ("statistics/margin", True, "number"),
    ("variants/smoothquant_w8a8/smooth/alpha", True, "number"),
    ("variants/smoothquant_w8a8/smooth/alpha", [0.5], "two values or more"),
    ("variants/smoothquant_w8a8/smooth/targets", "mlp_input", "list"),
    ("variants/smoothquant_w8a8/smooth/targets", [], "empty"),
    ("variants/rtn_w8a8", None, "mapping"),
    ("runtime", "cpu", "mapping"),
    ("evaluation/datasets", [], "mapping"),
    ("evaluation/datasets", {}, "empty"),
    ("evaluation/datasets/arc/ask", 3, "mapping"),
    ("models/base", "llama", "mapping"),
    ("models/base", None, "mapping"),
    ("models/base", [], "mapping"),
    ("models/base", {}, "mapping"),
    ("calibration/dataset", "arc", "mapping"),
    ("calibration/dataset", None, "mapping"),
    ("evaluation/datasets/arc/source", 3, "mapping"),
    ("statistics/primary", None, "list"),
    ("statistics/primary", {}, "list"),
    ("title", 5, "text"),
    ("title", "", "empty"),
]


@pytest.mark.parametrize(("path", "value", "limit"), WRONG_TYPES)
def test_a_value_of_the_wrong_kind_is_never_bent_to_fit(
    write_study, study_settings, path, value, limit
):
    line = refusal(write_study(put(study_settings, path, value)))
    assert line.startswith(f"{path.replace('/', '.')} = {value!r} ")
    assert limit in line
    assert ";" in line


@pytest.mark.parametrize(
    ("path", "source", "key"),
    [
        ("models/base", {"hub": "a/b", "revision": 5}, "revision"),
        ("models/base", {"hub": 5, "revision": "main"}, "hub"),
        (
            "calibration/dataset",
            {"hub": "a/b", "config": 5, "split": "train", "revision": "main"},
            "config",
        ),
    ],
)
def test_a_wrong_value_inside_a_source_is_the_one_named(
    write_study, study_settings, path, source, key
):
    line = refusal(write_study(put(study_settings, path, source)))
    assert line.startswith(f"{path.replace('/', '.')}.{key} = 5 is not text")


CHOICES = [
    ("calibration/dataset/shipped", "openmath", "openmath_train"),
    ("evaluation/datasets/arc/source/shipped", "ark", "boolq"),
    ("evaluation/datasets/arc/adapter", "ark", "squad_v2"),
    ("calibration/adapter", "gsm8k", "openmath"),
    ("variants/rtn_w8a8/preset", "w4a4", "w8a8"),
    ("variants/smoothquant_w8a8/smooth/targets/0", "attention", "attention_input"),
    ("models/base/random", "gpt2", "qwen3"),
    ("runtime/device", "tpu", "cuda"),
    ("runtime/dtype", "float16", "bfloat16"),
]


@pytest.mark.parametrize(("path", "value", "offered"), CHOICES)
def test_a_value_not_on_the_list_is_refused_with_the_list(
    write_study, study_settings, path, value, offered
):
    line = refusal(write_study(put(study_settings, path, value)))
    assert line.startswith(f"{path.replace('/', '.')} = {value!r} is not known; use one of ")
    assert f"'{offered}'" in line.split("use one of")[1]


@pytest.mark.parametrize(
    ("path", "offered"),
    [
        ("models/base", {"bundled", "hub", "folder", "random", "finetune", "rotate"}),
        ("calibration/dataset", {"shipped", "hub", "file"}),
    ],
)
def test_an_unknown_kind_of_source_is_refused_with_the_kinds(
    write_study, study_settings, path, offered
):
    line = refusal(write_study(put(study_settings, path, {"download": "x"})))
    assert line.startswith(f"{path.replace('/', '.')} = ")
    assert all(f"'{kind}'" in line for kind in offered)


def test_an_unknown_protocol_is_refused_with_the_protocols(write_study, study_settings):
    changed_settings = put(study_settings, "evaluation/datasets/arc/ask", {"protocol": "guess"})
    line = refusal(write_study(changed_settings))
    assert "evaluation.datasets.arc.ask" in line
    assert all(name in line for name in ("loglikelihood", "generate"))


@pytest.mark.parametrize(
    "path",
    ["seed", "runtime/dtype", "calibration/items", "models/tuned/finetune/epochs", "baseline"],
)
def test_a_missing_key_is_named(write_study, study_settings, path):
    inner, keys = study_settings, path.split("/")
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    line = refusal(write_study(study_settings))
    assert line.startswith(f"{path.replace('/', '.')} is missing; add it")


def test_a_missing_key_of_a_source_is_named_beside_it(write_study, study_settings):
    line = refusal(write_study(put(study_settings, "models/base", {"hub": "a/b"})))
    assert line.startswith("models.base.revision is missing")


REFERENCES = [
    ("baseline", "noqant", "noquant"),
    ("statistics/primary/0/variant", "smoothquant_w8a", "smoothquant_w8a8"),
    ("statistics/primary/0/baseline", "noquat", "noquant"),
    ("statistics/primary/0/dataset", "squad", "squad_v2"),
    ("statistics/primary/0/model", "bas", "base"),
    ("models/tuned/finetune/start", "bse", "base"),
]


@pytest.mark.parametrize(("path", "value", "meant"), REFERENCES)
def test_a_name_the_study_does_not_define_is_refused(
    write_study, study_settings, path, value, meant
):
    line = refusal(write_study(put(study_settings, path, value)))
    assert line.startswith(f"{path.replace('/', '.')} = {value!r} is not a ")
    assert f"did you mean '{meant}'?" in line


@pytest.mark.parametrize("baseline", ["rtn_w8a8", "smoothquant_w8a8", "other_type"])
def test_a_baseline_that_is_not_the_model_itself_is_refused(write_study, study_settings, baseline):
    study_settings["variants"]["other_type"] = {"dtype": "bfloat16"}
    line = refusal(write_study(put(study_settings, "baseline", baseline)))
    assert line.startswith(f"baseline = {baseline!r} is not the model as it was loaded")
    assert "changes nothing ({})" in line


def test_a_noise_floor_in_the_studys_own_float_type_is_refused(write_study, study_settings):
    """It would be the baseline once more, and its noise zero."""
    line = refusal(write_study(put(study_settings, "variants/again", {"dtype": "float32"})))
    assert line.startswith("variants.again.dtype = 'float32' is runtime.dtype already")


@pytest.mark.parametrize(
    "more", [{"preset": "w8a8"}, {"smooth": {"alpha": 0.5, "targets": ["mlp_input"]}}]
)
def test_a_float_type_goes_alone(write_study, study_settings, more):
    line = refusal(write_study(put(study_settings, "variants/half", {"dtype": "bfloat16"} | more)))
    assert line.startswith("variants.half")
    assert "changes no weights" in line


def test_a_variant_is_not_compared_with_itself(write_study, study_settings):
    line = refusal(write_study(put(study_settings, "statistics/primary/0/variant", "noquant")))
    assert line.startswith("statistics.primary.0.variant = 'noquant' is its own baseline")


def test_a_comparison_is_declared_once(write_study, study_settings):
    """Twice in the list would be twice in Holm's correction."""
    study_settings["statistics"]["primary"] *= 2
    assert "statistics.primary.1 repeats" in refusal(write_study(study_settings))
    first, second = study_settings["statistics"]["primary"]
    study_settings["statistics"]["primary"] = [first, second | {"score": "graded"}]
    assert "statistics.primary.1 repeats" in refusal(write_study(study_settings))
    scores = [first | {"score": "accuracy"}, second | {"score": "graded"}]
    study_settings["statistics"]["primary"] = scores
    statistics = load_study(write_study(study_settings)).statistics
    assert statistics.declared("accuracy") == statistics.declared("graded")
    assert (len(statistics.declared("graded")), statistics.scores) == (1, 2)


def test_more_worked_examples_than_there_are_is_refused(study_settings, write_study):
    ask = {"protocol": "loglikelihood", "normalize": "none", "shots": 6}
    made = {"adapter": "boolq", "source": {"shipped": "boolq_stated"}, "items": 4, "ask": ask}
    study_settings["evaluation"]["datasets"]["boolq"] = made
    load_study(write_study(study_settings))
    study_settings["evaluation"]["datasets"]["boolq"] = made | {"ask": ask | {"shots": 7}}
    assert "at most 6" in refusal(write_study(study_settings)).replace("<= 6", "at most 6")
    arc = {"adapter": "arc", "source": {"shipped": "arc"}, "ask": ask | {"shots": 1}}
    study_settings["evaluation"]["datasets"]["boolq"] = made | arc
    line = refusal(write_study(study_settings))
    assert "ask.shots = 1 but arc has 0 worked examples" in line


def test_a_fine_tuning_does_not_start_from_another(write_study, study_settings):
    line = refusal(write_study(put(study_settings, "models/tuned/finetune/start", "tuned")))
    assert line.startswith("models.tuned.finetune.start = 'tuned' is itself fine-tuned")


ROTATIONS = [
    ({"rotations": ["r1", "r4"]}, "rotations.1 = 'r4' is multiplied while a model runs, which no"),
    ({"rotations": ["r1", "r5"]}, "rotations.1 = 'r5' is not known; use one of 'r1'"),
    ({"rotations": []}, "rotations = [] is empty"),
    ({"rotations": ["r1", "r1"]}, "rotations = ['r1', 'r1'] is refused: repeats one"),
    ({"start": "tuned"}, "start = 'tuned' is itself fine-tuned by this study"),
    ({"start": "turned"}, "start = 'turned' is itself rotated by this study"),
    ({"start": "bas"}, "start = 'bas' is not a model of this study"),
    ({"start": "gemma"}, "start = 'gemma' is of family gemma3_text, and only llama, mistral"),
]


@pytest.mark.parametrize(("change", "begun"), ROTATIONS)
def test_a_rotation_that_cannot_be_is_refused(write_study, study_settings, change, begun):
    study_settings["models"]["gemma"] = {"random": "gemma3_text"}
    rotate = {"start": "base", "rotations": ["r1", "r2"]}
    study_settings["models"]["turned"] = {"rotate": rotate}
    load_study(write_study(study_settings))
    study_settings["models"]["turned"] = {"rotate": rotate | change}
    assert refusal(write_study(study_settings)).startswith(f"models.turned.rotate.{begun}")


def test_a_protocol_that_cannot_ask_the_items_is_refused(write_study, study_settings):
    ask = {"protocol": "loglikelihood", "normalize": "none"}
    line = refusal(write_study(put(study_settings, "evaluation/datasets/squad_v2/ask", ask)))
    assert "evaluation.datasets.squad_v2.ask.protocol = 'loglikelihood'" in line
    assert "use generate" in line


@pytest.mark.parametrize("half", [{"weights": "channel"}, {"activations": "token_dynamic"}])
def test_half_a_scheme_is_refused(write_study, study_settings, half):
    line = refusal(write_study(put(study_settings, "variants/rtn_w8a8", half)))
    assert line.startswith(f"variants.rtn_w8a8 = {half!r} is refused: ")
    assert "name both, or a preset" in line


def test_a_preset_beside_a_scheme_is_refused(write_study, study_settings):
    study_settings["variants"]["rtn_w8a8"] |= {
        "weights": "tensor",
        "activations": "tensor_static",
    }
    line = refusal(write_study(study_settings))
    assert line.startswith("variants.rtn_w8a8 = ")
    assert "preset = 'w8a8' already names weights and activations; keep one" in line


ROUNDINGS = [
    ({"smooth": {"alpha": 0.5, "targets": ["mlp_input"]}}, "a variant with a preset or weights"),
    ({"preset": "w8a8", "ignore": []}, "add lm_head to ignore"),
]


@pytest.mark.parametrize(("variant", "remedy"), ROUNDINGS)
def test_a_rounding_that_rounds_nothing_is_refused(write_study, study_settings, variant, remedy):
    settings = put(study_settings, "variants/rtn_w8a8", {"rounding": "gptq"} | variant)
    line = refusal(write_study(settings))
    assert line.startswith("variants.rtn_w8a8 = ")
    assert remedy in line


def test_an_unknown_rounding_is_refused(write_study, study_settings):
    line = refusal(write_study(put(study_settings, "variants/rtn_w8a8/rounding", "awq")))
    assert line.startswith("variants.rtn_w8a8.rounding = 'awq' is not known; use one of 'nearest'")


PROTECTIONS = [
    ("variants/rtn_w8a8", {"protect": {"bytes": 0.03}}, "has neither preset nor weights"),
    ("variants/rtn_w8a8", {"dtype": "bfloat16", "protect": {"bytes": 0.03}}, "leave it out"),
    ("variants/rtn_w8a8/protect", {"bytes": 0}, "protect.bytes = 0 "),
    ("variants/rtn_w8a8/protect", {"bytes": 1}, "protect.bytes = 1 "),
    ("variants/rtn_w8a8/protect", {"share": 0.1}, "did you mean"),
]


@pytest.mark.parametrize(("path", "value", "problem"), PROTECTIONS)
def test_a_protection_of_nothing_is_refused(write_study, study_settings, path, value, problem):
    line = refusal(write_study(put(study_settings, path, value)))
    assert line.startswith("variants.rtn_w8a8")
    assert problem in line or "known" in line


@pytest.mark.parametrize(
    ("path", "value", "remedy"),
    [("calibration/items", 1, "give at least 2"), ("runtime/quantized", "vllm", "or ignore")],
)
def test_a_protection_that_nothing_could_judge_or_serve_is_refused(
    write_study, study_settings, path, value, remedy
):
    settings = put(study_settings, "variants/rtn_w8a8/protect", {"bytes": 0.1})
    with pytest.raises(StudyError) as caught:
        load_study(write_study(put(settings, path, value)))
    [line] = [line for line in str(caught.value).splitlines() if "rtn_w8a8.protect " in line]
    assert line.endswith(remedy)


PATTERNS = [
    ("re:(", "is no regular expression"),
    ("re:", "has a pattern of 0 characters; give 1 to 200"),
    ("re:" + "a" * 201, "has a pattern of 201 characters"),
]


@pytest.mark.parametrize(("pattern", "problem"), PATTERNS)
def test_a_pattern_that_is_none_is_refused(write_study, study_settings, pattern, problem):
    settings = put(study_settings, "variants/rtn_w8a8/ignore", ["lm_head", pattern])
    line = refusal(write_study(settings))
    assert line.startswith("variants.rtn_w8a8.ignore.1 = ")
    assert problem in line


@pytest.mark.parametrize("name", ["a/b", "..", "../up", "a\\b", ".hidden", "Base", "a b", ""])
@pytest.mark.parametrize("kind", ["models", "variants"])
def test_a_name_that_is_no_folder_name_is_refused(write_study, study_settings, kind, name):
    """Names become folders below outputs/, so none may lead out of it."""
    study_settings[kind][name] = {"random": "llama"} if kind == "models" else {}
    line = refusal(write_study(study_settings))
    assert line.startswith(f"{kind}.{name} = ")
    assert "rename it" in line


@pytest.mark.parametrize(
    "path", ["models/notebooks", "models/report", "variants/calibration", "variants/model"]
)
def test_a_name_every_run_writes_to_is_refused(write_study, study_settings, path):
    kind, name = path.split("/")
    study_settings[kind][name] = {"random": "llama"} if kind == "models" else {}
    line = refusal(write_study(study_settings))
    assert line.startswith(f"{kind}.{name} ")
    assert "rename it" in line


def test_a_dataset_does_not_take_the_shared_texts_name(write_study, study_settings):
    datasets = study_settings["evaluation"]["datasets"]
    datasets["shared_text"] = datasets["arc"]
    line = refusal(write_study(study_settings))
    assert line.startswith("evaluation.datasets.shared_text names what every run writes itself")


def test_a_file_that_is_not_there_is_named_as_written(write_study, study_settings):
    gone = put(study_settings, "calibration/dataset", {"file": "nowhere/rows.jsonl"})
    line = refusal(write_study(gone))
    assert line.startswith("calibration.dataset.file = 'nowhere/rows.jsonl' does not exist")
    gone = put(study_settings, "calibration/dataset", {"shipped": "openmath_train"})
    gone = put(gone, "models/base", {"folder": "nowhere"})
    line = refusal(write_study(gone))
    assert line.startswith("models.base.folder = 'nowhere' is not a folder; correct the path")


def test_every_mistake_has_its_own_line(write_study, study_settings):
    put(study_settings, "baseline", "noqant")
    put(study_settings, "statistics/primary/0/dataset", "ark")
    with pytest.raises(StudyError) as caught:
        load_study(write_study(study_settings))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "baseline = 'noqant'" in lines[0]
    assert "statistics.primary.0.dataset = 'ark'" in lines[1]


BROKEN_FILES = {
    "empty": "",
    "comment": "# nothing yet\n",
    "list": "- a\n- b\n",
    "scalar": "hello\n",
    "syntax": "title: [unclosed\n",
    "tab": "runtime:\n\tdevice: cpu\n",
    "python": "title: !!python/object/apply:os.system ['touch owned']\n",
    "object": "title: !!python/name:os.system\n",
    "control": 'title: "a\x01b"\n',
    "twice": "title: a\ntitle: b\n",
    "number_key": "1: 2\n",
    "alias": "title: *missing\n",
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_file_that_is_no_study_is_refused_in_one_line(write_study, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refusal(write_study(BROKEN_FILES[kind]))
    assert not (tmp_path / "owned").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xff\xfe\x00title")
    refusal(path)


def test_a_key_may_override_what_it_merges(write_study, study_settings):
    """Repeated keys are refused; YAML's own merge is not a repetition."""
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n"
    assert "a = " in refusal(write_study(text))


def test_a_study_that_is_not_there_is_refused_with_those_that_are(monkeypatch, tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "demo.yaml").write_text("")
    for module in (files, loading):
        monkeypatch.setattr(module, "PROJECT", tmp_path)
    for name in ("demmo", "params/demmo.yaml"):
        with pytest.raises(StudyError, match=r"^params/demmo\.yaml: .*no such.*demo$"):
            load_study(name)


def test_a_study_of_the_project_is_named_from_its_root(
    monkeypatch, tmp_path, write_study, study_settings
):
    """The line of STYLE.md, letter for letter up to the remedy."""
    (tmp_path / "params").mkdir()
    put(study_settings, "variants/smoothquant_w8a8/smooth/alpha", 1.7)
    write_study(study_settings, "params/demo.yaml")
    for module in (files, loading):
        monkeypatch.setattr(module, "PROJECT", tmp_path)
    for name in ("demo", "params/demo.yaml", tmp_path / "params" / "demo.yaml"):
        with pytest.raises(StudyError) as caught:
            load_study(name)
        expected = (
            "params/demo.yaml: variants.smoothquant_w8a8.smooth.alpha = 1.7 is outside [0, 1]"
        )
        assert str(caught.value).startswith(expected)


def test_relative_paths_start_at_the_project(monkeypatch, tmp_path):
    monkeypatch.setattr(inputs, "PROJECT", tmp_path)
    assert resolve_path("data/x.jsonl") == tmp_path / "data" / "x.jsonl"
    assert resolve_path(str(tmp_path / "x")) == tmp_path / "x"


def test_a_rule_for_numbers_is_for_word_problems_only(write_study, study_settings):
    line = refusal(
        write_study(put(study_settings, "evaluation/datasets/arc/keep", "numeric_answers"))
    )
    assert line.startswith("evaluation.datasets.arc.keep = 'numeric_answers' is for openmath items")
    assert line.endswith("remove it")


@pytest.mark.parametrize("ask", [{"stop": "answer"}, {"answer": "text"}])
def test_a_model_that_thinks_is_read_to_the_end_of_its_turn(write_study, study_settings, ask):
    """A box in its thoughts is not its answer."""
    study_settings["evaluation"]["datasets"]["squad_v2"]["ask"] |= {"stop": "turn"} | ask
    load_study(write_study(put(study_settings, "enable_thinking", False)))
    line = refusal(write_study(put(study_settings, "enable_thinking", True)))
    assert line.startswith("evaluation.datasets.squad_v2.ask.answer = ")
    assert line.endswith("use answer: boxed, stop: turn")


@pytest.mark.parametrize("value", ["no", 0, 1, "false"])
def test_whether_a_model_thinks_is_true_or_false(write_study, study_settings, value):
    line = refusal(write_study(put(study_settings, "enable_thinking", value)))
    assert line.startswith(f"enable_thinking = {value!r} is neither true nor false")


def test_several_files_can_be_one_source(tmp_path, write_study, study_settings, write_rows):
    """By a pattern; in the order of their names, whatever the folder says."""
    from helpers.sources.items import load_rows

    rows = [{"n": n} for n in range(4)]
    write_rows(rows[2:], "part-2.jsonl")
    write_rows(rows[:2], "part-1.jsonl")
    pattern = {"file": str(tmp_path / "part-*.jsonl")}
    study = load_study(write_study(put(study_settings, "calibration/dataset", pattern)))
    assert load_rows(study.calibration.dataset) == rows
    gone = put(study_settings, "calibration/dataset", {"file": str(tmp_path / "none-*.jsonl")})
    assert "none-*.jsonl' does not exist; correct the path" in refusal(write_study(gone))
