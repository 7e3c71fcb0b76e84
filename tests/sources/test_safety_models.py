"""Loading a model runs nothing that lies in its folder: no pickle, no code, no template's trick."""

import json
import pickle
import shutil

import pytest

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.sources.chat import render
from helpers.sources.model_files import check_model_safety
from helpers.sources.models import (
    byte_tokenizer,
    load_model,
    load_tokenizer,
    model_folder,
    random_model,
)
from helpers.study.schema import FolderModel, Runtime

RUNTIME = Runtime(device="cpu", dtype="float32", threads=1, quantized="int8")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sound"
    random_model("llama", seed=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A sound model folder, the test's own to spoil."""
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def owned(tmp_path):
    """The file that exists once something has run."""
    yield tmp_path / "owned"
    assert not (tmp_path / "owned").exists(), "code of the folder was run"


class Owner:
    """What unpickling turns into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def load(folder):
    return load_tokenizer(folder, enable_thinking=None), load_model(folder, RUNTIME)


def refusal(folder) -> str:
    """The one line with which the model and its tokenizer cannot both be loaded."""
    with pytest.raises(StudyError) as caught:
        load(folder)
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith("model: ")
    return line


def edit(path, **changes) -> None:
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | changes))


def test_a_sound_folder_loads(folder):
    assert load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "w.ckpt"])
def test_weights_that_are_a_pickle_are_refused_by_name(folder, owned, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Owner(owned)))
    line = refusal(folder)
    assert f"holds only {name}, a pickle" in line
    assert "safetensors" in line


def test_pickles_beside_the_weights_are_let_lie(folder, owned):
    """A trainer leaves its optimizer's state; whole repositories hold both kinds of weights."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Owner(owned)))
    assert load(folder)


@pytest.mark.parametrize(
    "named", ["pytorch_model.bin", "../other/model.safetensors", "/x.safetensors"]
)
def test_an_index_that_names_anything_else_is_refused(folder, owned, named):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Owner(owned)))
    shards = {"model.embed_tokens.weight": WEIGHTS, "model.norm.weight": named}
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=shards)
    assert f"names {named!r}" in refusal(folder)


def test_a_pickle_called_safetensors_is_refused(folder, owned):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Owner(owned)))
    assert "no model can be loaded" in refusal(folder)


def test_a_tokenizer_that_is_a_pickle_is_refused_by_name(folder, owned):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Owner(owned)))
    assert "its tokenizer is tokenizer.pkl, a pickle" in refusal(folder)


def test_no_weights_at_all(folder):
    (folder / WEIGHTS).unlink()
    assert "holds no weights" in refusal(folder)


def custom_code(folder, owned, **config) -> None:
    """Everything a repository does to have its own classes loaded."""
    code = f"open({str(owned)!r}, 'w')\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    edit(folder / "config.json", auto_map=classes, **config)
    tokenizer = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit(folder / "tokenizer_config.json", auto_map=tokenizer)


def test_a_model_that_needs_its_own_code_is_refused(folder, owned, monkeypatch):
    """It is not asked for on the terminal either."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    custom_code(folder, owned, model_type="own", architectures=["OwnModel"])
    line = refusal(folder)
    assert "comes with code of its own, which is never run here" in line


def test_code_beside_a_model_that_transformers_knows_is_not_run(folder, owned):
    custom_code(folder, owned)
    assert type(load_model(folder, RUNTIME)).__name__ == "LlamaForCausalLM"
    assert load_tokenizer(folder, enable_thinking=None)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_code_to_be_fetched_is_refused(folder, key):
    edit(folder / "config.json", **{key: "someone/kernel"})
    assert "attention code to be fetched and run" in refusal(folder)


def test_an_adapter_is_no_model(folder):
    """It names a base model, which would be loaded in its place."""
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/else")
    assert "holds an adapter" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"],
)
@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 9000, b"\xff\xfe"])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    assert name in refusal(folder) or name == "tokenizer.json"


def test_a_folder_of_a_study_is_looked_at_before_anything_is_read(study, folder):
    named = study.model_copy(update={"models": {"base": FolderModel(folder=str(folder))}})
    assert model_folder(named, "base", StudyPaths("s")) == folder
    (folder / WEIGHTS).rename(folder / "model.bin")
    with pytest.raises(StudyError, match=r"model\.bin, a pickle"):
        model_folder(named, "base", StudyPaths("s"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{{ messages[0].nothing.at_all }}",
        "{% if %}",
        "{{ raise_exception('no system turn here') }}",
    ],
)
def test_a_chat_template_that_does_not_work_is_one_line(template):
    """It comes with the model too; it runs in a sandbox, and its failure is the model's."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(StudyError, match="chat template"):
        render(tokenizer, [{"role": "user", "content": "q"}])


def test_a_model_without_a_chat_template_is_one_line():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(StudyError, match="chat template"):
        render(tokenizer, [{"role": "user", "content": "q"}])


def test_a_checkpoint_of_our_own_is_safe(sound):
    check_model_safety(sound)
