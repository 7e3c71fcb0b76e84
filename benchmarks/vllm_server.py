"""vLLM writing answers for another process: prompts in, token ids out, a JSON line each.

Runs in vLLM's own environment and takes nothing of this project but the parser of boxes,
which needs no package. vLLM's own output goes to stderr.
"""

import argparse
import json
import os
import sys
from itertools import count

from helpers.evaluation.scoring import last_boxed

LONGEST = 2048  # tokens of a prompt with its answer

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that its steps can be followed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Writer:
    """The engine; it may share what prompts begin with, within one question as ours does."""

    def __init__(self, folder: str, *, rows: int):
        from vllm import LLM

        self.llm = LLM(
            model=folder,
            dtype="float32",
            max_model_len=LONGEST,
            max_num_seqs=rows,
            enable_prefix_caching=True,
            trust_remote_code=False,
            seed=0,
        )
        self.tokenizer = self.llm.get_tokenizer()
        pieces = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        self.closing = {i for i, piece in enumerate(pieces) if piece and "}" in piece}
        self.names = count()

    def answers(self, prompts: list, max_new_tokens: int, stops: list) -> list[list[int]]:
        """Greedy answers; an answer with a complete box leaves the batch immediately."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        self.llm.reset_prefix_cache()  # a round starts with nothing read
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=stops, detokenize=False
        )
        names = [str(next(self.names)) for _ in prompts]
        for name, tokens in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
        completed: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            for step in engine.step():
                tokens = list(step.outputs[0].token_ids)
                if step.finished:
                    completed.setdefault(step.request_id, tokens)
                elif step.request_id not in completed and self.complete(tokens):
                    completed[step.request_id] = tokens
                    engine.abort_request([step.request_id])
        return [completed[name] for name in names]

    def complete(self, tokens: list[int]) -> bool:
        """Whether the newest token completes a box."""
        if not tokens or tokens[-1] not in self.closing:
            return False
        return last_boxed(self.tokenizer.decode(tokens, skip_special_tokens=True)) is not None


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    writer = Writer(options.folder, rows=options.rows)
    import vllm

    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"answers": writer.answers(**json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
