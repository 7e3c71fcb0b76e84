"""A model that can only be asked is evaluated as one of torch is, and its failures are one line."""

import json
import os
import sys

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT
from helpers.core.records import Record
from helpers.evaluation.engine import evaluate
from helpers.inference import vllm_client
from helpers.inference.perplexity import passage_rows, passage_tokens, read_passages
from helpers.inference.vllm_client import VllmModel, is_served
from helpers.sources.models import byte_tokenizer, random_model
from helpers.sources.sampling import evaluation_items, shared_passages
from helpers.study.loading import load_study
from helpers.study.schema import Batch, Runtime

RUNTIME = Runtime(device="cpu", dtype="float32", threads=1, quantized="vllm")


class Asked:
    """What a served model does, done here in the plainest way: every text whole and alone."""

    def __init__(self, model):
        self._model = model
        self.config, self.generation_config = model.config, model.generation_config
        self.device = model.device

    @torch.inference_mode()
    def states(self, tokens):
        ids = torch.tensor([tokens])
        return self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]

    @torch.inference_mode()
    def head(self, hidden):
        return self._model.get_output_embeddings()(hidden).float()

    def score(self, rows):
        sums = []
        for context, option in rows:
            logprobs = self.head(self.states(context + option)).log_softmax(-1)
            places = range(len(context) - 1, len(context) + len(option) - 1)
            sums.append(sum(logprobs[p, t].item() for p, t in zip(places, option, strict=True)))
        return sums

    def generate(self, prompts, *, max_new_tokens, stop_tokens):
        return [self._answer(list(p), max_new_tokens, stop_tokens) for p in prompts]

    def _answer(self, tokens, cap, stop):
        begin = len(tokens)
        while len(tokens) - begin < cap:
            token = self.head(self.states(tokens))[-1].argmax().item()
            if token in stop:
                return tokens[begin:], "stop"
            tokens.append(token)
        return tokens[begin:], "length"


@pytest.fixture(scope="module")
def sides():
    torch.set_num_threads(1)
    model = random_model("llama", seed=3).double()
    return model, Asked(model)


def test_only_what_has_no_modules_is_served(sides):
    assert [is_served(side) for side in sides] == [False, True]


@pytest.mark.parametrize("tokens", [64, 4096])
def test_the_engine_asks_it_the_same_and_gets_the_same(study_path, sides, tokens):
    """Choices and texts, word for word; cut at the answer where the study wants that."""
    study, tokenizer = load_study(study_path), byte_tokenizer()
    for name, evaluation_set in study.evaluation.datasets.items():
        items = evaluation_items(study, name)[:3]
        limits = Batch(tokens=tokens, rows=2)
        plain, served = (
            sorted(
                evaluate(m, tokenizer, items, evaluation_set, limits=limits), key=lambda p: p["id"]
            )
            for m in sides
        )
        for one, other in zip(plain, served, strict=True):
            close = pytest.approx(one.pop("logprobs", []), abs=1e-5)
            assert other.pop("logprobs", []) == close
            assert one == other


def test_an_answer_that_is_complete_is_cut_where_torch_stops(sides):
    from helpers.inference import protocols

    ends = {"max_new_tokens": 9, "stop_tokens": set(), "batch_tokens": 999}
    prompts = [[5, 6, 7], [9], [8, 200, 31, 4]]
    for last in range(1, 10):
        ends["complete"] = lambda tokens, last=last: len(tokens) == last
        plain = dict(protocols.generate_greedy(sides[0], prompts, batch_rows=4, **ends))
        assert dict(vllm_client.generate_greedy(sides[1], prompts, **ends)) == plain


def test_its_text_is_read_alike(study_path, sides):
    study, tokenizer = load_study(study_path), byte_tokenizer()
    texts = shared_passages(study)
    tokens = passage_tokens(tokenizer, texts, max_tokens=48)
    plain, served = (read_passages(side, tokens, batch_tokens=999) for side in sides)
    torch.testing.assert_close(served.hidden, plain.hidden)
    rows = passage_rows(texts, tokens, served, plain)
    assert all(row["kl"] == pytest.approx(0, abs=1e-6) for row in rows)
    assert all(row["top1_agreements"] == row["tokens"] for row in rows)


@pytest.fixture
def folder(tmp_path):
    random_model("llama", seed=3).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_without_its_environment_it_says_how_to_make_it(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("STUDY_VLLM", str(tmp_path))
    with pytest.raises(StudyError, match=r"run make \.venv-vllm/\.study-ready"):
        VllmModel(folder, RUNTIME, seed=0)


def test_a_study_that_wants_it_is_refused_before_anything_runs(
    write_study, study_settings, monkeypatch, tmp_path
):
    monkeypatch.setenv("STUDY_VLLM", str(tmp_path))
    study_settings["runtime"]["quantized"] = "vllm"
    with pytest.raises(StudyError, match=r"runtime\.quantized = 'vllm' but vLLM is not set up"):
        load_study(write_study(study_settings))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An environment whose vLLM is what the test says; it runs on this very interpreter."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    launcher = tmp_path / "env" / "bin" / "python"
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("STUDY_VLLM", str(tmp_path / "env"))
    return lambda code: (tmp_path / "vllm.py").write_text(code)


def test_a_vllm_that_fails_ends_in_its_own_last_word(folder, stand_in):
    stand_in("raise RuntimeError('no kernel for this machine')")
    with pytest.raises(StudyError, match="code 1: RuntimeError: no kernel for this machine"):
        VllmModel(folder, RUNTIME, seed=0)


TALKATIVE = """
print("vLLM says hello on stdout")
class Model:
    def named_modules(self):
        return []
class LLM:
    def __init__(self, **settings):
        print(settings)
    def apply_model(self, look):
        return [look(Model())]
__version__ = "0"
"""


def test_what_vllm_prints_is_taken_for_no_answer(folder, stand_in):
    stand_in(TALKATIVE)
    served = VllmModel(folder, RUNTIME, seed=0)
    assert served.versions()["vllm"] == "0"
    assert served.kernels() == {}
    served.close()


@pytest.mark.parametrize("place", ["before it is asked", "while it is asked"])
def test_a_vllm_that_dies_later_ends_in_a_line_too(folder, stand_in, place):
    """A pipe that nobody reads any more is no message."""
    stand_in(TALKATIVE)
    served = VllmModel(folder, RUNTIME, seed=0)
    served._process.kill()
    if place == "before it is asked":
        served._process.wait()
    rows = [([1] * 60_000, [2])]  # more than a pipe holds
    for _ in range(2):
        with pytest.raises(StudyError, match="vLLM ended with code -9: it left no message"):
            served.score(rows)
    served.close()


def test_its_versions_are_in_the_record_beside_ours(folder, stand_in, sides, tmp_path):
    """It has a torch of its own, so that names are told apart; a model of torch adds none."""
    stand_in(TALKATIVE)
    model = VllmModel(folder, RUNTIME, seed=0)
    record = Record(tmp_path / "evaluation", stage="evaluation", parameters={})
    ours = dict(record.packages)
    record.add_packages(vllm_client.engine_packages(sides[0]))
    assert record.packages == ours
    record.add_packages(vllm_client.engine_packages(model))
    model.close()
    written = json.loads(record.write({}).read_text())["packages"]
    assert written["vllm (serving)"] == "0"
    assert written["torch (serving)"] == torch.__version__
    assert {name: written[name] for name in ours} == ours


def test_a_vllm_that_dies_in_between_is_told(folder, stand_in):
    dies = "class SamplingParams:\n    def __init__(self, **_):\n        import os; os._exit(3)\n"
    stand_in(TALKATIVE + dies)
    served = VllmModel(folder, RUNTIME, seed=0)
    with pytest.raises(StudyError, match="vLLM ended with code 3"):
        served.score([([1], [2])])


def test_it_hears_of_no_other_environment(folder, stand_in, monkeypatch, tmp_path):
    """Neither this environment's packages nor its user's; and nobody is told of it."""
    heard = tmp_path / "heard"
    code = f"import os, json; open({str(heard)!r}, 'w').write(json.dumps(dict(os.environ)))\n"
    stand_in(code + TALKATIVE)
    monkeypatch.setenv("PYTHONSTARTUP", "/x")
    VllmModel(folder, RUNTIME, seed=0).close()
    heard_text = heard.read_text()
    assert '"VLLM_NO_USAGE_STATS": "1"' in heard_text
    assert '"HF_HUB_OFFLINE": "1"' in heard_text
    assert "PYTHONSTARTUP" not in heard_text


VLLM = PROJECT / ".venv-vllm" / "bin" / "python"
HEADS = {"head_dim": 64}  # its attention on a CPU has no kernel for the tiny 16


@pytest.mark.long
@pytest.mark.skipif(not VLLM.is_file(), reason="vLLM is not set up (make .venv-vllm/.study-ready)")
def test_vllm_itself_serves_a_float_model_and_an_int8_one(sound_runs):
    """The same figures as torch in float32; int8 kernels for an int8 checkpoint."""
    assert "STUDY_VLLM" not in os.environ
    run = sound_runs("llama", "rtn_w8a8", **HEADS)
    with run.outputs():
        folder = run.job.paths.checkpoint(run.job.model, run.job.variant)
    served = VllmModel(folder, RUNTIME, seed=0)
    kinds = {k for n, k in served.kernels().items() if n.endswith("_proj")}
    assert all("Int8" in kind for kind in kinds), kinds
    assert len(served.generate([[5, 6]], max_new_tokens=3, stop_tokens=set())[0][0]) == 3
    served.close()
    plain = random_model("llama", seed=3, **HEADS)
    saved = folder.parent / "float"
    plain.save_pretrained(saved)
    byte_tokenizer().save_pretrained(saved)
    served, client = VllmModel(saved, RUNTIME, seed=0), Asked(plain)
    tokens = list(range(3, 40))
    torch.testing.assert_close(served.states(tokens), client.states(tokens), atol=1e-4, rtol=1e-4)
    rows = [(tokens[:9], tokens[9:14]), (tokens[:2], [7])]
    assert served.score(rows) == pytest.approx(client.score(rows), abs=1e-3)
    ends = {"max_new_tokens": 12, "stop_tokens": {0}}
    assert served.generate([tokens, [5]], **ends) == client.generate([tokens, [5]], **ends)
    served.close()
