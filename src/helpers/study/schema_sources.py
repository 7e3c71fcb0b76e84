"""Where a study takes its models and its items from, as its file says it."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from helpers.core.architectures import ARCHITECTURES
from helpers.study.schema_fields import Count, Fraction, Name, Number, Strict, Whole, sole_key

HubName = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
Revision = Annotated[str, Field(min_length=1)]  # a branch, a tag or a commit


OTHER_FORMATS = {
    "csv": "a table in CSV",
    "tsv": "a table in TSV",
    "xlsx": "a spreadsheet",
    "json": "one JSON document, or JSON lines by another name (.jsonl)",
    "arrow": "an Arrow file",
}
EXPECTED_FORMAT = (
    "expected JSON lines, one object per line, or parquet: pandas' DataFrame.to_json('rows.jsonl', "
    "orient='records', lines=True) writes them"
)


class ShippedDataset(Strict):
    """Items written for this project."""

    shipped: Literal["arc", "squad_v2", "boolq", "openmath_eval", "openmath_train"]


class Stream(Strict):
    """At most `rows` rows of a split too large to fetch, from `pieces` of it drawn with `seed`."""

    rows: Count
    pieces: Count
    seed: Annotated[Whole, Field(ge=0, lt=2**32)]


class HubDataset(Strict):
    """One split of a dataset on the Hub, at a revision; without `stream` all of its rows."""

    hub: HubName
    config: str | None
    split: Annotated[str, Field(min_length=1)]
    revision: Revision
    stream: Stream | None = None


def _rows_file(file: str) -> str:
    """The name, if its extension is that of a supported format."""
    extension = file.rpartition(".")[2].lower()
    if extension in ("jsonl", "parquet"):
        return file
    description = OTHER_FORMATS.get(extension, "neither JSON lines (.jsonl) nor parquet")
    raise PydanticCustomError(
        "rows", "is {seen}; {expected}", {"seen": description, "expected": EXPECTED_FORMAT}
    )


class FileDataset(Strict):
    """Local JSONL or parquet in the Hub's schema: one file, or several by a pattern (`a/*.jsonl`).

    Relative paths start at the project.
    """

    file: Annotated[str, AfterValidator(_rows_file)]


DatasetSource = Annotated[
    Annotated[ShippedDataset, Tag("shipped")]
    | Annotated[HubDataset, Tag("hub")]
    | Annotated[FileDataset, Tag("file")],
    Discriminator(sole_key),
]


class HubModel(Strict):
    """A model repository on the Hub, at a revision."""

    hub: HubName
    revision: Revision


class FolderModel(Strict):
    """A local folder in the Hub's layout (config, safetensors, tokenizer)."""

    folder: str


class BundledModel(Strict):
    """A model that comes from the package registry."""

    bundled: Literal["smollm2-135m-instruct"]


if TYPE_CHECKING:
    Family = str  # a type checker cannot read a table
else:
    Family = Literal[*ARCHITECTURES]


class RandomModel(Strict):
    """A model with seeded random weights: tiny, for tests, or as large as Qwen3-0.6B."""

    random: Family
    size: Literal["tiny", "0.6b"] = "tiny"

    @model_validator(mode="after")
    def _size_of_a_family(self):
        if self.size == "0.6b" and self.random != "qwen3":
            raise ValueError(f"size = {self.size!r} is that of random: qwen3; leave it out")
        return self


class FineTuning(Strict):
    """Full supervised fine-tuning of another model of the study, loss on the answer only."""

    start: Name
    dataset: DatasetSource
    items: Count
    heldout_items: Count
    epochs: Count
    learning_rate: Annotated[Number, Field(gt=0, lt=1)]
    warmup_fraction: Fraction
    batch_items: Count
    max_tokens: Annotated[Whole, Field(ge=16)]
    autocast: Literal["none", "bfloat16"]


class FineTunedModel(Strict):
    """A model this study trains itself."""

    finetune: FineTuning


ModelSource = Annotated[
    Annotated[BundledModel, Tag("bundled")]
    | Annotated[HubModel, Tag("hub")]
    | Annotated[FolderModel, Tag("folder")]
    | Annotated[RandomModel, Tag("random")]
    | Annotated[FineTunedModel, Tag("finetune")],
    Discriminator(sole_key),
]
