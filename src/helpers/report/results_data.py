"""What a study has on disk of one model's calibration and of one variant's evaluation."""

from dataclasses import dataclass

import numpy as np

from helpers.core.gates import WHOLE_VARIANT, failed_check

QUANTIZATION_STAGE = "02_quantization"  # of checkpoints and their verification


@dataclass(frozen=True)
class CalibrationResults:
    """Activations of one model: abs-max by Linear, and |x| by token of the worst Linear."""

    absmax: dict[str, np.ndarray]  # (in_features,)
    surface: np.ndarray  # (tokens, in_features)
    surface_of: str
    record: dict


@dataclass(frozen=True)
class VariantResults:
    """One variant of one model: its answers, and the records of its checkpoint.

    Attributes:
        passages: rows of the shared text.
        verification, quantization: None for a variant without a checkpoint of its own.
        evaluation_gates: the record of the gates on the evaluation itself.
    """

    model: str
    variant: str
    predictions: dict[str, list[dict]]
    passages: list[dict]
    metrics: dict[str, dict]
    shared_text: dict
    record: dict
    verification: dict | None
    quantization: dict | None
    evaluation_gates: dict

    @property
    def key(self) -> tuple[str, str]:
        """(model, variant), the key of the mappings in `Results`."""
        return self.model, self.variant

    @property
    def gates(self) -> list[dict]:
        """All gates: on the checkpoint, if there is one, then on the evaluation."""
        return [gate for record in self.records for gate in _recorded_gates(record)]

    @property
    def passage_losses(self) -> list[float | None]:
        """The loss on every passage of the shared text, which differs between models."""
        return [row["nll"] for row in self.passages]

    @property
    def records(self) -> list[dict]:
        """The existing records of checks."""
        return [record for record in (self.verification, self.evaluation_gates) if record]

    @property
    def failed_gates(self) -> list[dict]:
        return [gate for gate in self.gates if not gate["passed"]]

    @property
    def passed(self) -> bool:
        return not self.failed_gates

    @property
    def failed_check(self) -> str | None:
        """The first failed check that invalidates the whole variant; None if none does."""
        return failed_check(self.gates, [WHOLE_VARIANT])

    def failed_check_on(self, dataset: str) -> str | None:
        """The first failed check on the variant or on this evaluation set; None if none failed."""
        return failed_check(self.gates, [WHOLE_VARIANT, dataset])


def _recorded_gates(record: dict) -> list[dict]:
    """A record's gates, and a failed one if the record failed although all its gates passed."""
    if record["passed"] or not all(gate["passed"] for gate in record["gates"]):
        return record["gates"]
    failed_gate = {
        "name": "record of checks",
        "passed": False,
        "measured": "it says it did not pass",
    }
    return [*record["gates"], failed_gate | {"limit": "a gate that fails says why"}]
