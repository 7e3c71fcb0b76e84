"""Client of vLLM, which serves a checkpoint from a process with its own environment.

It does what the evaluation needs of a model and nothing else: score continuations, answer
greedily, give a text's last states. These are the operations of `protocols` and `perplexity`, for
a model that can only be asked: token ids go in, log-probabilities come out. vLLM batches as it
likes, within what one question hands it; what is handed over at once is bounded. The other process
(`vllm_server`) imports nothing of this project; questions and answers are plain data.
"""

import contextlib
import json
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from helpers.core.errors import StudyError
from helpers.core.files import vllm_python
from helpers.core.processes import die_with_parent
from helpers.inference.protocols import GeneratedAnswer, OptionTokens
from helpers.runtime.devices import product, token_budget_batches
from helpers.sources.model_files import load_config
from helpers.sources.models import load_head
from helpers.study.schema import Runtime

SERVER = Path(__file__).with_name("vllm_server.py")
LONGEST = 4096  # tokens of prompt and answer; a longer context would only reserve memory
CACHE_GIB = 2  # of keys and values
LINES_KEPT = 40  # of vLLM's log, searched for the reason if it exits
NOT_THERE = "vLLM is not set up; run make .venv-vllm/.study-ready"


class VllmModel:
    """One checkpoint on a vLLM process, which ends with this process or on `close`.

    Args:
        folder: a checkpoint, or a float model.
        runtime: its dtype, and its threads.
        seed: vLLM requires one; greedy answers do not depend on it.

    Raises:
        StudyError: vLLM is not set up, or does not take this checkpoint.

    Attributes:
        config: the checkpoint's, its context length limited to what vLLM serves.
        generation_config: the checkpoint's, with its list of tokens that end an answer.
    """

    device = torch.device("cpu")  # device of the returned tensors

    def __init__(self, folder: Path, runtime: Runtime, *, seed: int):
        if not vllm_python().is_file():
            raise StudyError(NOT_THERE)
        self.config = load_config(folder)
        self.config.max_position_embeddings = min(LONGEST, self.config.max_position_embeddings)
        self.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        self._head = load_head(folder, dtype=torch.float32, device="cpu")
        self._files = tempfile.TemporaryDirectory(prefix="vllm-")
        self._log = open(Path(self._files.name) / "log", "w+", encoding="utf-8")  # noqa: SIM115
        command = [str(vllm_python()), str(SERVER), str(folder), "--dtype", runtime.dtype]
        command += ["--max-tokens", str(self.config.max_position_embeddings)]
        self._process = subprocess.Popen(
            [*command, "--seed", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(runtime.threads),
            preexec_fn=die_with_parent,
        )
        self._response()

    def versions(self) -> dict[str, str]:
        """Versions of vLLM and of its torch."""
        return self._request("versions")

    def kernels(self) -> dict[str, str]:
        """The kernel of each Linear, by vLLM's name of the Linear."""
        return self._request("kernels")["kernels"]

    def score(self, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        """Summed log-probability of each continuation; NaN where one is not finite.

        Args:
            rows: (context, continuation) as token ids.
        """
        sums = self._request("score", rows=rows)["sums"]
        return [float("nan") if value is None else value for value in sums]

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, stop_tokens: set[int]
    ) -> list[tuple[list[int], str]]:
        """(tokens, finish reason) of every prompt's greedy answer."""
        limits = {"max_new_tokens": max_new_tokens, "stop_tokens": sorted(stop_tokens)}
        answers = self._request("generate", prompts=prompts, **limits)["answers"]
        return [(answer["tokens"], answer["finish_reason"]) for answer in answers]

    def states(self, tokens: list[int]) -> Tensor:
        """(tokens, hidden) float32 last hidden states of a text, as the head reads them."""
        self._request("states", tokens=tokens, to=self._file("states"))
        return self._array("states")

    def head(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary) float32 logits of hidden states, by the checkpoint's own head."""
        return product(hidden, *self._head)

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        """(rows, out_features) output of one of vLLM's Linears for (rows, in_features) inputs."""
        np.save(self._file("inputs"), inputs.numpy(), allow_pickle=False)
        self._request("linear", name=name, inputs=self._file("inputs"), to=self._file("outputs"))
        return self._array("outputs")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._files.cleanup()

    def _file(self, name: str) -> str:
        return str(Path(self._files.name) / f"{name}.npy")

    def _array(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self._file(name), allow_pickle=False))

    def _request(self, operation: str, **arguments) -> Any:
        with contextlib.suppress(BrokenPipeError):  # the process ended; `_response` reports why
            self._process.stdin.write(json.dumps({"ask": operation, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._response()

    def _response(self) -> Any:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        errors = [text.strip() for text in deque(self._log, LINES_KEPT) if "Error" in text]
        reason = errors[-1] if errors else "it left no message"
        raise StudyError(f"vLLM ended with code {code}: {reason}; make serve-check says more")


def _environment(threads: int) -> dict[str, str]:
    """This process's environment without the variables that select its Python packages."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    limits = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB)}
    return inherited | limits


def is_served(model) -> bool:
    """Whether another engine runs the model, so that it has no torch modules here."""
    return not isinstance(model, torch.nn.Module)


def engine_packages(model) -> dict[str, str]:
    """Package versions of the engine of a served model, for records; empty for a torch model."""
    if not is_served(model):
        return {}
    return {f"{name} (serving)": version for name, version in model.versions().items()}


def option_loglikelihoods(
    model, items: list[OptionTokens], *, batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Yield (item index, summed log-probability of each option)."""
    lengths = [sum(len(i.context) + len(option) for option in i.options) for i in items]
    for batch in token_budget_batches(lengths, batch_tokens=batch_tokens):
        rows = [pair for i in batch for pair in items[i].scored_pairs()]
        sums = iter(model.score(rows))
        for i in batch:
            yield i, [next(sums) for _ in items[i].options]


def generate_greedy(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_tokens: set[int],
    batch_tokens: int,
    complete: Callable[[list[int]], bool] | None = None,
    options: Sequence[Sequence[list[int]]] = (),
    forms: Sequence[int] = (),
    **_batch_options,
) -> Iterator[tuple[int, GeneratedAnswer]]:
    """Yield (prompt index, answer); an answer is cut where it was first complete.

    After the answers of a batch, `prompt_logprobs` gives the log-likelihoods of its options.
    """
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in token_budget_batches(lengths, batch_tokens=batch_tokens):
        batch_prompts = [prompts[i] for i in batch]
        answers = model.generate(
            batch_prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens
        )
        batch_pairs = [
            OptionTokens(prompts[i], list(options[i]), form=forms[i] if forms else 0).scored_pairs()
            if options and options[i]
            else []
            for i in batch
        ]
        pairs = [pair for own in batch_pairs for pair in own]
        sums = iter(model.score(pairs) if pairs else ())
        for i, own, (tokens, reason) in zip(batch, batch_pairs, answers, strict=True):
            answer = _cut_at_complete(tokens, reason, complete)
            yield i, replace(answer, loglikelihoods=tuple(next(sums) for _ in own))


def _cut_at_complete(tokens: list[int], reason: str, complete) -> GeneratedAnswer:
    for end in range(1, len(tokens) + 1) if complete else ():
        if complete(tokens[:end]):
            return GeneratedAnswer(tokens[:end], "answer")
    return GeneratedAnswer(tokens, reason)


def passage_states(model, passages: list[list[int]]) -> torch.Tensor:
    """(tokens, hidden) last states, passage after passage, without each passage's last token."""
    return torch.cat([model.states(tokens[:-1]) for tokens in passages])
