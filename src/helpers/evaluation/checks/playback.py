"""transformers' own forward pass of one text, around Linears whose outputs are played back.

Two correct int8 implementations part after a few layers, since a last bit tips a value over a
rounding edge. Played back, a Linear answers as it did in the evaluation, so that nothing of a
difference is carried on: what transformers gives to every Linear, and makes of every layer, is
held to what the engine gave and made, within the rounding of one step. The Linears themselves
are held to the tensors on disk apart from this (`call_gates`).
"""

from collections.abc import Callable, Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from helpers.core.architectures import HEAD, architecture, linear_names
from helpers.evaluation.checks.float64_linears import LinearFiles
from helpers.evaluation.checks.traces import FINAL, INPUT, OUTPUT, Layers

HEAD_CHUNK = 16384  # rows of the vocabulary at a time
States = Mapping[tuple[str, str], Tensor]


class Playback:
    """A transformers model with a folder's norms, embeddings and head, and no Linear weights.

    Args:
        files: the variant's folder.
        dtype: the computing type: float64, or the declared type to measure its rounding.
    """

    def __init__(self, files: LinearFiles, dtype: torch.dtype):
        self.files, self.dtype = files, dtype
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        self.layers = Layers.from_config(config)
        with init_empty_weights(include_buffers=False), no_init_weights():
            self.model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=dtype
            ).eval()
        self._table = f"{architecture(config).embeddings[0]}"
        played = set(linear_names(config)) | {n for names in self.layers.played for n in names}
        for name, _ in list(self.model.named_parameters()):
            owner = name.rpartition(".")[0]
            if owner not in played | {HEAD, self._table} and not owner.endswith(".experts"):
                self._set(name, self._tensor(name))
        self._blocks = [self.model.get_submodule(name) for name in self.layers.blocks]

    def _tensor(self, name: str) -> Tensor:
        """A float tensor of the folder, rounded to the declared type."""
        return self.files.tensors[name].to(self.files.dtype).to(self.dtype)

    def _set(self, name: str, tensor: Tensor) -> None:
        owner, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))

    @torch.inference_mode()
    def states(self, ids: list[int], played: States, chosen: list[int]) -> dict:
        """Inputs of every Linear of the chosen layers and outputs of these layers.

        Args:
            ids: the token ids of the text.
            played: recorded (rows, features) of the same tokens by (module, INPUT or OUTPUT).
            chosen: the layers to compute; the others are skipped.
        """
        outputs: dict[tuple[str, str], Tensor] = {}
        unique = sorted(set(ids))
        table = self.files.tensors[f"{self._table}.weight"][unique]
        self._set(f"{self._table}.weight", table.to(self.files.dtype).to(self.dtype))
        last = len(self._blocks) - 1
        for index, block in enumerate(self._blocks):
            name = self.layers.blocks[index]
            if index in chosen:
                block.forward = self._computed(block, name, played, outputs)
                for linear in self.layers.played[index]:
                    module = self.model.get_submodule(linear)
                    module.forward = self._played(linear, played, outputs)
            else:
                block.forward = self._skipped(played[name, OUTPUT] if index == last else None)
        tokens = torch.tensor([[unique.index(i) for i in ids]])
        output = self.model.base_model(input_ids=tokens, use_cache=False)
        outputs[FINAL, OUTPUT] = output.last_hidden_state[0]
        return outputs

    def _computed(self, block, name: str, played: States, outputs: dict) -> Callable:
        """A layer's own forward on the engine's input of that layer."""
        own_forward = type(block).forward

        def forward(hidden_states, *args, **kwargs):
            if name == self.layers.blocks[0]:
                outputs[name, INPUT] = hidden_states[0]
            layer_input = played[name, INPUT].to(self.dtype)[None]
            output = own_forward(block, layer_input, *args, **kwargs)
            outputs[name, OUTPUT] = (output[0] if isinstance(output, tuple) else output)[0]
            return output

        return forward

    def _played(self, name: str, played: States, outputs: dict) -> Callable:
        """A forward that stores a Linear's input and returns the engine's output."""

        def forward(x, *_args):
            outputs[name, INPUT] = x.reshape(-1, x.shape[-1])
            output = played[name, OUTPUT].to(self.dtype)
            return output.reshape(*x.shape[:-1], output.shape[-1])

        return forward

    def _skipped(self, output: Tensor | None) -> Callable:
        """A forward that returns its input, or the engine's output if there is one."""

        def forward(hidden_states, *_args, **_kwargs):
            return hidden_states if output is None else output.to(self.dtype)[None]

        return forward

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary) float64 of the head on disk, a part of the vocabulary at a time."""
        tensors = self.files.tensors
        weight = tensors[tensors.weight_name(HEAD)]
        parts = [
            hidden.to(self.dtype) @ part.to(self.files.dtype).to(self.dtype).T
            for part in weight.split(HEAD_CHUNK)
        ]
        return torch.cat(parts, dim=1).double()
