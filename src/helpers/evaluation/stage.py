"""The stage that evaluates one variant of one model, from its opening to its record.

Everything that it computes is recorded and checked on the way: calls of Linears while the
model is asked, passes of its decoder, answers as they are made.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.core.records import Gate, sha256_file
from helpers.evaluation import engine
from helpers.evaluation.checks import call_gates, evaluation_data, recomputed_losses
from helpers.evaluation.checks.recorded_calls import PACKED, SHARED_TEXT
from helpers.evaluation.evaluation_operations import evaluation_stage_operations
from helpers.evaluation.predictions import Progress, write_predictions
from helpers.evaluation.prompts import TokenizedPrompt, record_prompts, study_prompts
from helpers.evaluation.scoring import all_metrics, shared_text_metrics
from helpers.inference import perplexity, vllm_client
from helpers.quantization import variants
from helpers.runtime.devices import modules_by_device, prepare
from helpers.sources.stage import Stage, begin_record
from helpers.study.loading import open_job
from helpers.verification.runtime_gates import loaded_gates


@dataclass(frozen=True, kw_only=True)
class EvaluationStage(Stage):
    """One variant of one model that is asked its evaluation sets.

    Attributes:
        network: the variant, loaded.
        prompts: of every item, by evaluation set, drawn and rendered once.
        loaded: gates on the variant as it was loaded.
        progress: answers kept as they are made.
        calls: of every Linear, while the model is asked.
    """

    network: Any
    prompts: dict[str, list[TokenizedPrompt]]
    loaded: tuple[Gate, ...]
    progress: Progress
    calls: call_gates.CallRecorder | call_gates.NoCalls

    def answer(self) -> dict[str, list[dict]]:
        """The predictions of every evaluation set, by its name; one an item, in the items' order.

        Raises:
            StudyError: a prompt does not fit the model's context, or half a batch the card.
        """
        arguments = self.network, self.tokenizer, self.study, self.progress, self.prompts
        return self.calls.record(PACKED, engine.ask_all, *arguments)

    def read_shared_text(self) -> tuple[list[dict], recomputed_losses.Recomputed]:
        """(one row a passage of the text every variant reads, the figures computed again).

        Raises:
            StudyError: the baseline has not been evaluated yet, or a file of it is damaged.
        """
        passes = recomputed_losses.Passes(self.network)
        given = self.job, self.network, self.tokenizer
        rows = self.calls.record(SHARED_TEXT, perplexity.read_shared_text, *given)
        recomputed = recomputed_losses.recompute(self.job, self.network, passes)
        self.record.add_input("float_states", sha256_file(perplexity.states_path(self.job)))
        return rows, recomputed

    def save(self, predictions: dict[str, list[dict]], rows: list[dict]) -> None:
        """Write the predictions, the rows of the shared text, and the metrics of both."""
        job = self.job
        write_predictions(self.folder, predictions, rows, model=job.model, variant=job.variant)
        metrics = all_metrics(self.study, predictions)
        shared = shared_text_metrics(rows)
        self.write_json("metrics.json", {"datasets": metrics, "shared_text": shared})

    def check(
        self,
        predictions: dict[str, list[dict]],
        rows: list[dict],
        recomputed: recomputed_losses.Recomputed,
    ) -> dict:
        """Hold what was saved to every check; the record of the gates, written to gates.json."""
        resumed = self.progress.resumed
        gates = call_gates.call_gates(self.job, self.calls, predictions, rows, resumed)
        checked = evaluation_data.check_evaluation(
            self.job,
            self.network,
            self.tokenizer,
            loaded=[*self.loaded, *gates],
            recomputed=recomputed,
        )
        self.write_json("gates.json", checked)
        return checked

    def finish(self, **results: Any) -> None:
        """Write the record with these results and how this machine computes."""
        machine = variants.arithmetic_record(self.job) | modules_by_device(self.network)
        self.record.add_machine(machine)
        super().finish(**results)
        self.progress.discard()


def open_evaluation(study: str | Path, *, model: str, variant: str) -> EvaluationStage:
    """Load the variant and open its stage; the baseline's stage records its prompts.

    Args:
        study: a study's name in params/, or the path of its YAML file.

    Raises:
        StudyError: the study file is wrong, the checkpoint is missing or damaged, or another
            process runs the stage.
    """
    job = prepare(open_job(study, model=model, variant=variant))
    record = begin_record("evaluation", job)
    record.add_input("variant", variants.variant_digest(job))
    network, tokenizer = variants.load_variant(job)
    record.add_packages(vllm_client.engine_packages(network))
    loaded = loaded_gates(job, network)
    prompts = study_prompts(job.study, tokenizer)
    record_prompts(job, prompts)
    record.add_operations(evaluation_stage_operations(job, tokenizer, prompts))
    return EvaluationStage(
        job=job,
        record=record,
        tokenizer=tokenizer,
        network=network,
        prompts=prompts,
        loaded=tuple(loaded),
        progress=Progress(job, files=record.inputs["variant"], packages=record.packages),
        calls=call_gates.call_recorder(job, network),
    )
