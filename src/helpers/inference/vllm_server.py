"""Server for one checkpoint in vLLM: token ids in, log-probabilities out.

Runs in vLLM's own environment (`requirements-vllm.txt`), which does not have this
project, so that it imports nothing of it. One JSON object a line on stdin, one in answer
on stdout; arrays go through .npy files. vLLM's own output goes to stderr.
"""

import argparse
import json
import math
import os
import sys

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model stays in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # parallel jobs that bind threads would share one core
    "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes longer than most evaluations
}


def leave_out_16_bit_kernel() -> None:
    """Have vLLM multiply int8 by oneDNN where it would choose a kernel that refuses float32.

    On a processor with AMX vLLM 0.32 chooses by the weights' type alone, and that kernel takes
    activations of 16 bits only.
    """
    try:
        from vllm.model_executor.kernels.linear.scaled_mm import cpu
    except ImportError:  # a version without it, or one for GPUs
        return
    cpu.check_cpu_sgl_kernel = lambda *shape_and_type: False


class Server:
    """The engine and the operations it offers."""

    def __init__(self, folder: str, *, dtype: str, max_tokens: int, seed: int):
        from vllm import LLM

        if dtype == "float32":
            leave_out_16_bit_kernel()
        self.llm = LLM(
            model=folder,
            dtype=dtype,
            max_model_len=max_tokens,
            seed=seed,
            enforce_eager=True,
            enable_prefix_caching=False,
            trust_remote_code=False,
        )
        self.model = self.llm.apply_model(lambda model: model)[0]

    def versions(self) -> dict:
        """Versions of vLLM and torch."""
        import torch
        import vllm

        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def kernels(self) -> dict:
        """The kernel of each Linear, or its quantization method if it has no kernel."""
        kernels = {}
        for name, module in self.model.named_modules():
            if method := getattr(module, "quant_method", None):
                kernel = getattr(getattr(module, "scheme", None), "kernel", None)
                kernels[name] = type(kernel or method).__name__
        return {"kernels": kernels}

    def score(self, rows: list) -> dict:
        """Summed log-probability of each continuation after its context.

        Args:
            rows: (context, continuation) as token ids.
        """
        texts = [context + option for context, option in rows]
        outputs = self._generate(texts, max_tokens=1, prompt_logprobs=0)
        sums = []
        for (context, option), answer in zip(rows, outputs, strict=True):
            predicted = answer.prompt_logprobs[len(context) :]
            values = [place[t].logprob for t, place in zip(option, predicted, strict=True)]
            sums.append(math.fsum(values) if all(map(math.isfinite, values)) else None)
        return {"sums": sums}

    def generate(self, prompts: list, max_new_tokens: int, stop_tokens: list) -> dict:
        """Greedy answers with their finish reasons, without the token that ended them."""
        stops = {"stop_token_ids": stop_tokens, "max_tokens": max_new_tokens, "logprobs": 0}
        answers = []
        for output in self._generate(prompts, **stops):
            completion, tokens = output.outputs[0], list(output.outputs[0].token_ids)
            values = [
                place[t].logprob for t, place in zip(tokens, completion.logprobs, strict=True)
            ]
            reason = "stop" if completion.finish_reason == "stop" else "length"
            if tokens and tokens[-1] in stop_tokens:
                tokens, reason = tokens[:-1], "stop"
            if not all(map(math.isfinite, values)):
                reason = "nonfinite"
            answers.append({"tokens": tokens, "finish_reason": reason})
        return {"answers": answers}

    def states(self, tokens: list, to: str) -> dict:
        """Write (tokens, hidden) last states, as the head reads them, to a file."""
        import numpy

        captured, compute = [], self.model.compute_logits

        def capture(hidden, *rest, **keywords):
            captured.append(hidden.float().numpy())
            return compute(hidden, *rest, **keywords)

        self.model.compute_logits = capture
        try:  # prompt_logprobs makes vLLM compute the logits of all prompt tokens
            self._generate([[*tokens, 0]], max_tokens=1, prompt_logprobs=0)
        finally:
            del self.model.compute_logits  # restores the class's method
        matching = [states for states in captured if len(states) == len(tokens)]
        numpy.save(to, matching[-1], allow_pickle=False)
        return {"rows": len(matching[-1])}

    def linear(self, name: str, inputs: str, to: str) -> dict:
        """Write the output of one Linear: (rows, in_features) to (rows, out_features)."""
        import numpy
        import torch

        module = self.model.get_submodule(name)
        with torch.inference_mode():
            output = module(torch.from_numpy(numpy.load(inputs, allow_pickle=False)))
        output = output[0] if isinstance(output, tuple) else output
        numpy.save(to, output.float().numpy(), allow_pickle=False)
        return {"columns": output.shape[-1]}

    def _generate(self, prompts: list, **options):
        from vllm import SamplingParams

        token_prompts = [{"prompt_token_ids": tokens} for tokens in prompts]
        sampling = SamplingParams(temperature=0.0, detokenize=False, **options)
        return self.llm.generate(token_prompts, sampling, use_tqdm=False)


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM's own output must not mix with the answers
    server = Server(
        options.folder, dtype=options.dtype, max_tokens=options.max_tokens, seed=options.seed
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(server, request.pop("ask"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
