"""The schema of a study file: models, variants, datasets, and how they are compared.

Every scientific setting is required here and has its value in `params/`, so that a study file is
the whole account of a study. Names of studies, models, variants and data sets become folders and
files: each is one lower-case part of a path, so that no two differ in case alone, and none that
Windows keeps for a device. What is refused here is refused in words that follow the value.
Reading, references between settings and error messages are in `helpers.study.loading`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from helpers.core.architectures import HEAD

PATTERN = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
RULE = "small letters, digits, _, - and dots, at most 64, the first a letter or a digit"
# Names that the project writes beside them.
RESERVED_NAMES = {
    "models": {"notebooks", "partial", "report", "report_files", "report.md", "report.html"}
    | {"summary.json", "summary.csv", "answers", "lm-eval", "sources.json", "items.html"}
    | {"tasks.json"},
    "variants": {"model", "calibration", "cost"},
    "evaluation.datasets": {"shared_text"},
}
# Folders of outputs/ that belong to no study.
RESERVED_STUDIES = {"bank", "bench", "coverage", "gpu", "scale", "serve-check"}
DEVICES = {"con", "prn", "aux", "nul"}
DEVICES |= {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


def name_problem(name: str) -> str | None:
    """Why a name that fits the pattern is no portable folder name; None if it is one."""
    if name.endswith("."):
        return "ends in a dot, which Windows leaves out; rename it"
    if name.partition(".")[0] in DEVICES:
        return "is the name of a device on Windows; rename it"
    return None


def _in_unit_interval(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise PydanticCustomError("range", "is outside [0, 1]; give a fraction in that range")
    return value


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "is not a number; give one")
    return value


# The keys that tell which kind of source a mapping is; in any place among its keys.
SOURCE_TAGS = {"bundled", "hub", "folder", "random", "finetune", "rotate", "shipped", "file"}


def sole_key(value: Any) -> str | None:
    """The tag of a mapping such as `{hub: …, revision: …}`; its first key if it has none."""
    keys = list(value if isinstance(value, dict) else getattr(type(value), "model_fields", {}))
    return next((key for key in keys if key in SOURCE_TAGS), next(iter(keys), None))


def _portable(name: str) -> str:
    if problem := name_problem(name):
        raise PydanticCustomError("name", "{trouble}", {"trouble": problem})
    return name


Name = Annotated[str, Field(pattern=PATTERN), AfterValidator(_portable)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]
Whole = Annotated[int, Field(strict=True)]
Fraction = Annotated[Number, AfterValidator(_in_unit_interval)]
Count = Annotated[Whole, Field(ge=1)]


class Strict(BaseModel):
    """Unknown keys are errors; a validated study cannot be edited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                matches = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"did you mean {matches[0]!r}?" if matches else "remove it"
                raise PydanticCustomError(
                    "unknown_key",
                    "is not a known key; {hint} (known here: {known})",
                    {"key": str(key), "hint": hint, "known": ", ".join(cls.model_fields)},
                )
        return data


HubName = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
Revision = Annotated[str, Field(min_length=1)]  # a branch, a tag or a commit


ROW_FORMATS = ("jsonl", "csv", "tsv", "parquet", "arrow")
OTHER_FORMATS = {
    "xlsx": "a spreadsheet",
    "xls": "a spreadsheet",
    "json": "one JSON document, or JSON lines by another name (.jsonl)",
}
EXPECTED_FORMAT = (
    "expected JSON lines (.jsonl), CSV (.csv, .tsv), parquet or Arrow: pandas' "
    "DataFrame.to_json('rows.jsonl', orient='records', lines=True) or .to_csv('rows.csv') writes it"
)
# The fields of an item that a local source may have under other names (`columns`).
FIELDS = {
    "arc": ("id", "question", "choices", "answerKey"),
    "boolq": ("question", "passage", "answer"),
    "squad_v2": ("id", "title", "context", "question", "answers"),
    "openmath": ("problem", "expected_answer", "generated_solution"),
    "shared_text": ("context",),
}
LIST_FIELDS = ("choices", "answers")  # may be spread over several columns


class ShippedDataset(Strict):
    """Items written for this project."""

    shipped: Literal["arc", "squad_v2", "boolq", "boolq_stated", "openmath_eval", "openmath_train"]


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
    if extension in ROW_FORMATS:
        return file
    description = OTHER_FORMATS.get(extension, "none of the formats that are read")
    raise PydanticCustomError(
        "rows", "is {seen}; {expected}", {"seen": description, "expected": EXPECTED_FORMAT}
    )


def _column(value: Any) -> Any:
    """A column's name, or a list of several; in YAML `no` and `1` are not text."""
    names = value if isinstance(value, list | tuple) else [value]
    if names and all(isinstance(name, str) for name in names):
        return value
    raise PydanticCustomError(
        "column", "is no column's name; write field: column, with quotes around numbers and yes/no"
    )


def _label(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_none(value: Any) -> bool:
    return value is None


def _is_empty(value: Any) -> bool:
    return not value


# Left out of a dump if not given, so that older fingerprints stay.
Columns = Annotated[
    dict[str, Annotated[str | tuple[str, ...], BeforeValidator(_column)]] | None,
    Field(min_length=1, exclude_if=_is_none),
]
Label = Annotated[str, BeforeValidator(_label), Field(min_length=1)]
Labels = Annotated[tuple[Label, ...] | None, Field(min_length=1, exclude_if=_is_none)]


class FileDataset(Strict):
    """Local JSONL, CSV, parquet or Arrow: one file, or several by a pattern (`a/*.jsonl`).

    Relative paths start at the project. Rows are in the Hub's schema, or `columns` tells which
    column of the file each field of the adapter is in: `{question: prompt}` reads `question` from
    the column `prompt`. `labels` names options that have none in the file (A, B, C, …).
    """

    file: Annotated[str, AfterValidator(_rows_file)]
    columns: Columns = None
    labels: Labels = None


class FolderDataset(Strict):
    """A local folder: what `save_to_disk` of `datasets` wrote, or files that `FileDataset` reads.

    `split` selects one if the folder holds several; of plain files, those with it in their names.
    """

    folder: str
    split: Annotated[str, Field(min_length=1)] | None = None
    columns: Columns = None
    labels: Labels = None


DatasetSource = Annotated[
    Annotated[ShippedDataset, Tag("shipped")]
    | Annotated[HubDataset, Tag("hub")]
    | Annotated[FileDataset, Tag("file")]
    | Annotated[FolderDataset, Tag("folder")],
    Discriminator(sole_key),
]
LocalDataset = FileDataset | FolderDataset


class HubModel(Strict):
    """A model repository on the Hub, at a revision."""

    hub: HubName
    revision: Revision


class FolderModel(Strict):
    """A local folder in the Hub's layout (config, safetensors, tokenizer)."""

    folder: str


class GgufModel(Strict):
    """A local GGUF file, which transformers dequantizes."""

    gguf: str


class BundledModel(Strict):
    """A model that comes from the package registry."""

    bundled: Literal["smollm2-135m-instruct"]


Family = Literal[
    "gemma3_text", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe"
]  # those with tiny sizes in `helpers.sources.models`


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

    @property
    def start(self) -> str:
        """The model of the study that it is trained from."""
        return self.finetune.start


# Families whose blocks are Llama's: RMSNorms alone, and Linears of their own for queries, keys and
# values, and for gate and up.
ROTATED = ("llama", "mistral", "qwen2", "qwen3")


def _offline(rotation: Any) -> Any:
    if rotation in ("r3", "r4"):
        raise PydanticCustomError(
            "rotation", "is multiplied while a model runs, which no engine here does; use r1 or r2"
        )
    return rotation


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("repeats one; name each once")
    return names


Rotations = Annotated[
    tuple[Annotated[Literal["r1", "r2"], BeforeValidator(_offline)], ...],
    Field(min_length=1),
    AfterValidator(_each_once),
]


class Rotation(Strict):
    """SpinQuant's rotations of another model of the study, multiplied into its weights."""

    start: Name
    rotations: Rotations


class RotatedModel(Strict):
    """A model this study rotates itself; its function is that of its start."""

    rotate: Rotation

    @property
    def start(self) -> str:
        """The model of the study that it is rotated from."""
        return self.rotate.start


MadeModel = FineTunedModel | RotatedModel

ModelSource = Annotated[
    Annotated[BundledModel, Tag("bundled")]
    | Annotated[HubModel, Tag("hub")]
    | Annotated[FolderModel, Tag("folder")]
    | Annotated[GgufModel, Tag("gguf")]
    | Annotated[RandomModel, Tag("random")]
    | Annotated[FineTunedModel, Tag("finetune")]
    | Annotated[RotatedModel, Tag("rotate")],
    Discriminator(sole_key),
]


SmoothingTarget = Literal["attention_input", "mlp_input", "mlp_down", "attention_output"]
Weights = Literal["channel", "tensor"]
FloatType = Literal["float32", "bfloat16"]
Activations = Literal["token_dynamic", "tensor_dynamic", "tensor_static"]
Rounding = Literal["nearest", "mse", "gptq"]
KvCache = Literal["int8"]

# The paper's levels (arXiv:2211.10438, table 2) and the scheme the ecosystem ships.
PRESETS: dict[str, tuple[Weights, Activations]] = {
    "w8a8": ("channel", "token_dynamic"),
    "o1": ("tensor", "token_dynamic"),
    "o2": ("tensor", "tensor_dynamic"),
    "o3": ("tensor", "tensor_static"),
}


class Numbers(NamedTuple):
    """The numbers that values are rounded to: integers, or floats of 4 exponent bits (E4M3)."""

    kind: Literal["int", "float"]
    bits: int
    granularity: Literal["channel", "group", "token"]


class Ruler(NamedTuple):
    """What a ruler rounds, each None if it stays float."""

    weights: Numbers | None
    activations: Numbers | None


# Other recipes than int8 W8A8, simulated by compressed-tensors: they tell how large a loss is.
RULERS = {
    "w8a16": Ruler(Numbers("int", 8, "channel"), None),
    "w4a16": Ruler(Numbers("int", 4, "group"), None),
    "a8": Ruler(None, Numbers("int", 8, "token")),
    "fp8": Ruler(Numbers("float", 8, "channel"), Numbers("float", 8, "token")),
}


PATTERN_MARK = "re:"  # of compressed-tensors: a regular expression follows
LONGEST_PATTERN = 200  # characters


def name_or_pattern(text: str) -> str:
    """The text, if it is a name or a pattern that can be used."""
    if not text.startswith(PATTERN_MARK):
        return text
    pattern, problem = text.removeprefix(PATTERN_MARK), ""
    if not pattern or len(pattern) > LONGEST_PATTERN:
        problem = f"has a pattern of {len(pattern)} characters; give 1 to {LONGEST_PATTERN}"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        problem = f"is no regular expression ({error}); correct it"
    if problem:
        raise PydanticCustomError("pattern", "{trouble}", {"trouble": problem})
    return text


def is_ignored(name: str, ignore: Iterable[str]) -> bool:
    """Whether a Linear is kept float: its name or its last part is listed, or matches a pattern.

    Args:
        name: module name of a Linear (`model.layers.0.mlp.down_proj`).
        ignore: names, whole or their last part, and patterns (`re:.*layers\\.0\\.`) that have to
            match from the start of the name, as in compressed-tensors.
    """
    return any(
        re.match(entry.removeprefix(PATTERN_MARK), name) is not None
        if entry.startswith(PATTERN_MARK)
        else name == entry or name.endswith(f".{entry}")
        for entry in ignore
    )


def _alpha_grid(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) < 2 or len(set(values)) < len(values):
        raise PydanticCustomError(
            "grid", "is no choice; list two values or more, each once, or give one number"
        )
    return values


def _kind_of_alpha(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "list"
    return "auto" if isinstance(value, str) else "number"


class Smooth(Strict):
    """SmoothQuant's migration strength and the places it is folded into.

    α is a number, a list from which the best is chosen, or `auto` for one α per group. Scales are
    folded into all `targets`, and into the `optional` ones too, all or none of them, if the model
    is better for it. Both are chosen on held-out calibration items
    (helpers.quantization.simulation).
    """

    alpha: Annotated[
        Annotated[Fraction, Tag("number")]
        | Annotated[tuple[Fraction, ...], AfterValidator(_alpha_grid), Tag("list")]
        | Annotated[Literal["auto"], Tag("auto")],
        Discriminator(_kind_of_alpha),
    ]
    targets: Annotated[tuple[SmoothingTarget, ...], Field(min_length=1)]
    optional: Annotated[tuple[SmoothingTarget, ...], Field(exclude_if=_is_empty)] = ()

    @model_validator(mode="after")
    def _one_choice(self):
        if twice := [t for t in self.optional if t in self.targets]:
            raise ValueError(f"optional = {twice[0]!r} is among targets too; keep one of them")
        if self.optional and self.alpha == "auto":
            raise ValueError(
                "optional targets are chosen by the KL, and alpha = 'auto' by the error of each "
                "group; give alpha a number or a list"
            )
        return self

    @property
    def is_chosen(self) -> bool:
        """Whether held-out calibration items decide α or the targets."""
        return bool(self.optional) or not isinstance(self.alpha, float)

    @property
    def alternatives(self) -> tuple["Smooth", ...]:
        """The smoothing with its targets alone, and with the optional ones; one if it has none."""
        return (self.folding(False), self.folding(True)) if self.optional else (self,)

    def folding(self, optional: bool) -> "Smooth":
        """The smoothing after the choice: with or without the optional targets."""
        targets = (*self.targets, *(self.optional if optional else ()))
        return self.model_copy(update={"targets": targets, "optional": ()})


class Protect(Strict):
    """How many Linears stay float: as many as a share of the float model's bytes allows.

    Which ones is chosen on held-out calibration items (helpers.quantization.simulation).
    """

    bytes: Annotated[Number, Field(gt=0.0, lt=1.0)]


def _by_model(value: Any) -> Any:
    """Checkpoints by model; a folder alone is that of the study's one model, by an empty name."""
    sources = [value, *value.values()] if isinstance(value, dict) else []
    if any(isinstance(source, dict) and isinstance(source.get("hub"), str) for source in sources):
        raise PydanticCustomError(
            "folder",
            "names a Hub, and a checkpoint is read from a folder; download it "
            "(hf download NAME --revision COMMIT --local-dir FOLDER) and give folder: FOLDER",
        )
    is_one = isinstance(value, dict) and list(value) == ["folder"]
    return {"": value} if is_one and not isinstance(value["folder"], dict) else value


class Variant(Strict):
    """How a model is quantized; without weights and activations it stays float.

    `recipe: seed` is the known broken recipe (helpers.quantization.variants), a control
    that must be flagged; it brings its own quantization scheme. `dtype` is a control too: the
    same weights, computed in another float type, differ by rounding alone and show the size
    of differences that mean nothing. `repeats` is how many checkpoints are made of the variant,
    each from calibration items of its own: one checkpoint is one draw of its recipe.

    The presets `w8a16` and `w4a16` (weights alone), `a8` (activations alone) and `fp8` are rulers:
    compressed-tensors simulates them, and their speed is not measured.

    `ignore` lists the Linears that stay float: names, whole or their last part (`down_proj`), and
    patterns after `re:` (`re:.*layers\\.0\\.`), which match from the start of a whole name.
    `protect` leaves more of them float: those that the quantization of each model chooses.

    `rounding` is how weights get onto their grid: `nearest`; `mse`, to nearest on a grid clipped
    to the least error (llmcompressor's observer); `gptq`, by llmcompressor's GPTQ on the
    calibration items.

    `kv: int8` keeps keys and values in int8, one scale for a token and a head. The checkpoint is
    the same; the evaluation simulates the cache.

    `calibration` names one of the study's `calibrations`; without it the variant is made from the
    study's `calibration`.

    `checkpoint` is a checkpoint made elsewhere, by the name of its model. What it is stands in its
    files: `weights`, `activations` and `ignore` are filled in when the study is loaded
    (`helpers.study.inputs`).
    """

    recipe: Literal["seed"] | None = None
    dtype: FloatType | None = None
    preset: Literal["w8a8", "o1", "o2", "o3", "w8a16", "w4a16", "a8", "fp8"] | None = None
    weights: Weights | None = None
    activations: Activations | None = None
    rounding: Rounding = "nearest"
    smooth: Smooth | None = None
    ignore: tuple[Annotated[str, AfterValidator(name_or_pattern)], ...] = (HEAD,)
    repeats: Count = 1
    calibration: Annotated[Name | None, Field(exclude_if=_is_none)] = None
    kv: Annotated[KvCache | None, Field(exclude_if=_is_none)] = None
    protect: Annotated[Protect | None, Field(exclude_if=_is_none)] = None
    checkpoint: Annotated[
        dict[str, FolderModel] | None,
        BeforeValidator(_by_model),
        Field(min_length=1, exclude_if=_is_none),
    ] = None

    @model_validator(mode="after")
    def _whole_scheme(self):
        if self.checkpoint and (beside := self.model_fields_set - {"checkpoint", "kv"}):
            raise ValueError(
                f"a checkpoint is read as it was made, so that {' and '.join(sorted(beside))} "
                "cannot be chosen; give checkpoint alone, or with kv"
            )
        if self.preset and (self.weights or self.activations):
            raise ValueError(
                f"preset = {self.preset!r} already names weights and activations; keep one of them"
            )
        if bool(self.weights) != bool(self.activations):
            raise ValueError("weights and activations go together; name both, or a preset")
        if self.recipe and (self.preset or self.weights or not self.smooth):
            raise ValueError(
                f"recipe = {self.recipe!r} takes smooth, and neither preset nor weights; it has "
                "its own"
            )
        return self

    @model_validator(mode="after")
    def _rounding_of_its_scheme(self):
        if self.rounding != "nearest" and (self.recipe or not (self.preset or self.weights)):
            raise ValueError(
                f"rounding = {self.rounding!r} is for a variant with a preset or weights of its "
                "own; leave it out"
            )
        if self.ruler and self.rounding != "nearest":
            raise ValueError(
                f"rounding = {self.rounding!r} is for int8 weights with int8 activations, and "
                f"preset = {self.preset!r} is a ruler, rounded to nearest; leave it out"
            )
        if self.ruler and not is_ignored(HEAD, self.ignore):
            raise ValueError(
                f"preset = {self.preset!r} keeps the head float; add lm_head to ignore"
            )
        if self.rounding == "gptq" and not is_ignored(HEAD, self.ignore):
            raise ValueError(
                "rounding = 'gptq' works on decoder blocks, which the head is no part of; add "
                "lm_head to ignore"
            )
        return self

    @model_validator(mode="after")
    def _smoothing_it_can_choose(self):
        is_chosen = self.smooth and self.smooth.is_chosen
        key = "optional" if self.smooth and self.smooth.optional else "alpha"
        if is_chosen and (self.recipe or not (self.preset or self.weights)):
            raise ValueError(
                f"smooth.{key} is chosen by the error of quantization, and this variant has none "
                f"of its own; {'leave it out' if key == 'optional' else 'give a number'}"
            )
        if self.ruler and is_chosen:
            raise ValueError(
                f"smooth.{key} is chosen for int8 W8A8, and preset = {self.preset!r} is a ruler "
                "beside it; give what was chosen"
            )
        return self

    @model_validator(mode="after")
    def _settings_it_has_a_use_for(self):
        if self.kv and self.recipe:
            raise ValueError(
                f"kv = {self.kv!r} is no part of recipe = {self.recipe!r}; leave it out"
            )
        if self.dtype and (self.preset or self.weights or self.recipe or self.smooth or self.kv):
            raise ValueError(
                f"dtype = {self.dtype!r} belongs to a variant that changes no weights; give it "
                "alone, or leave it out"
            )
        if self.protect and not self.quantized:
            raise ValueError(
                "protect leaves Linears float in a variant that quantizes the others, and this one "
                "has neither preset nor weights of its own; leave it out"
            )
        if self.repeats > 1 and not self.reads_calibration:
            raise ValueError(
                f"repeats = {self.repeats} but nothing in it is computed from calibration items, "
                "so that all checkpoints would be the same; leave it out"
            )
        if self.calibration and not self.reads_calibration:
            raise ValueError(
                f"calibration = {self.calibration!r} but nothing in it is computed from "
                "calibration items; leave it out"
            )
        return self

    @property
    def scheme(self) -> tuple[Weights, Activations] | None:
        """(weights, activations) granularity of int8, or None for any other variant."""
        if self.preset:
            return PRESETS.get(self.preset)
        if self.weights is None or self.activations is None:
            return None
        return self.weights, self.activations

    @property
    def quantized(self) -> bool:
        """Whether weights and activations become int8."""
        return self.scheme is not None or self.made_elsewhere

    @property
    def made_elsewhere(self) -> bool:
        """Whether its checkpoint is given, and nothing of it made by the study."""
        return self.checkpoint is not None

    @property
    def ruler(self) -> Ruler | None:
        """What a simulated ruler rounds; None for any other variant."""
        return RULERS.get(self.preset or "")

    @property
    def compressed(self) -> bool:
        """Whether weights or activations of its Linears are rounded, to int8 or as a ruler does."""
        return self.quantized or self.ruler is not None

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the variant has a checkpoint: it is quantized or smoothed."""
        return self.compressed or self.smooth is not None

    @property
    def reads_calibration(self) -> bool:
        """Whether calibration items determine the checkpoint.

        They do by smoothing, by GPTQ, by static scales, and by the choice of protected Linears.
        """
        if self.made_elsewhere:
            return False
        static = self.scheme is not None and self.scheme[1] == "tensor_static"
        chosen = self.smooth is not None or self.protect is not None
        return chosen or static or self.rounding == "gptq"

    @property
    def is_unmodified(self) -> bool:
        """Whether the variant is the source model in the study's float type."""
        return not self.needs_checkpoint and self.dtype is None and self.kv is None

    @property
    def is_lossy(self) -> bool:
        """Whether answers may differ by more than the rounding of floats."""
        return self.claim.compressed or self.kv is not None

    @property
    def claim(self) -> "Variant":
        """The variant as its report declares it; the gates check this declaration.

        The seed recipe's report calls it SmoothQuant W8A8, weights per tensor, head kept.
        """
        if self.recipe != "seed":
            return self
        declared = {"weights": "tensor", "activations": "token_dynamic", "recipe": None}
        return self.model_copy(update=declared)

    def smoothed_at(self, smooth: Smooth) -> "Variant":
        """The variant with another smoothing, as after a choice."""
        return self.model_copy(update={"smooth": smooth})

    def leaving_float(self, names: Iterable[str]) -> "Variant":
        """The variant with more Linears among those that it ignores, by their whole names."""
        return self.model_copy(update={"ignore": (*self.ignore, *names)})


def speed_key(variant: Variant) -> tuple:
    """The settings that determine a quantized variant's speed and size."""
    protected = variant.protect and (variant.protect, variant.smooth, variant.calibration)
    return variant.scheme, variant.ignore, variant.dtype, protected


def variant_per_scheme(variants: Mapping[str, Variant]) -> dict[tuple, str]:
    """The variant to measure for each `speed_key`: the last quantized variant that has it."""
    return {speed_key(recipe): name for name, recipe in variants.items() if recipe.quantized}


Adapter = Literal["arc", "squad_v2", "openmath", "boolq"]


class Runtime(Strict):
    """Where jobs run. `threads` is per job: jobs run side by side.

    `auto` takes the best device of the machine a job runs on, and the dtype that suits it;
    `device_map: auto` spreads a model over all its GPUs. `quantized` is what quantized
    variants are evaluated on: this project's int8 runtime, the simulation of
    compressed-tensors, or vLLM in an environment of its own (`make .venv-vllm/.study-ready`).
    `cost: no` leaves out the measurement of speed and memory; the report says so.
    """

    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["auto", "float32", "bfloat16"]
    threads: Count
    quantized: Literal["int8", "reference", "vllm"]
    device_map: Literal["auto"] | None = None
    cost: Annotated[bool, Field(strict=True)] = True


class LogLikelihood(Strict):
    """Each option's text is scored as the continuation of the prompt; the best is the answer.

    `shots` worked examples stand before the question; of boolq there are six.
    """

    protocol: Literal["loglikelihood"]
    normalize: Literal["bytes", "none"]
    shots: Annotated[Whole, Field(ge=0, le=6)] = 0


class Generate(Strict):
    """The model answers a chat greedily; the answer is parsed from its text.

    `stop: answer` ends an answer with its first complete box, `stop: turn` where the model does.
    """

    protocol: Literal["generate"]
    answer: Literal["boxed", "text"]
    stop: Literal["turn", "answer"]
    shots: Annotated[Whole, Field(ge=0, le=3)]
    max_new_tokens: Annotated[Whole, Field(ge=1, le=32768)]

    @model_validator(mode="after")
    def _a_box_to_stop_at(self):
        if self.stop == "answer" and self.answer != "boxed":
            raise ValueError("stop = 'answer' needs answer = 'boxed'; use stop: turn")
        return self


class EvaluationSet(Strict):
    """The items of one evaluation set, and how the model is asked.

    `keep: numeric_answers` leaves out items whose gold answer is no single number; without
    it all items stay, and gold answers that are no numbers are matched as text.
    """

    adapter: Adapter
    source: DatasetSource
    keep: Literal["numeric_answers"] | None = None
    items: Count
    ask: Annotated[LogLikelihood | Generate, Field(discriminator="protocol")]


OutputType = Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"]
MOST_SHOTS = 64


class TaskDefinition(Strict):
    """A task file of lm-evaluation-harness as it was read (`helpers.study.tasks`).

    Attributes:
        harness: version of the package that builds and scores the requests.
        source, shots_source: rows of the evaluated split, and of the worked examples if they
            come from a split.
        splits: names of the two splits in the task file.
        metric: the task's metric that says right or wrong, as `acc,none`; None if it has none.
        file: where the task file is; not part of its content.
        settings: the file with what it includes, as canonical JSON.
        code_sha256: hash of the Python files that it names; empty if there are none.
    """

    harness: str
    output_type: OutputType
    source: DatasetSource
    shots_source: DatasetSource | None
    splits: tuple[str, str | None]
    metric: str | None
    max_new_tokens: int
    settings: str
    code_sha256: str
    file: Annotated[str, Field(exclude=True)] = ""


class ScoredTarget(Strict):
    """The likelihood of one given text, beside that of a foil."""

    protocol: Literal["target"] = "target"
    shots: int


class TaskSet(Strict):
    """A task of lm-evaluation-harness as an evaluation set: a registered name, or a task file.

    `metric` names the task's metric that decides right or wrong (`acc_norm`, or
    `exact_match,flexible-extract` with its filter); without it, the first that can. Python code
    that a task file of one's own names runs only with `trust_task_code: true`. `definition` is
    filled in when the study is loaded.
    """

    task: Annotated[str, Field(min_length=1)]
    items: Count
    shots: Annotated[Whole, Field(ge=0, le=MOST_SHOTS)]
    metric: Annotated[str, Field(min_length=1)] | None = None
    trust_task_code: Annotated[bool, Field(strict=True)] = False
    definition: TaskDefinition | None = None

    @property
    def adapter(self) -> Literal["task"]:
        """The kind of its rows."""
        return "task"

    @property
    def keep(self) -> None:
        """All items stay."""
        return None

    @property
    def read(self) -> TaskDefinition:
        """The task file, which a loaded study holds."""
        if self.definition is None:
            raise ValueError(f"task {self.task!r} was not read; load its study by load_study")
        return self.definition

    @property
    def source(self) -> DatasetSource:
        """The rows of the evaluated split."""
        return self.read.source

    @property
    def ask(self) -> "LogLikelihood | Generate | ScoredTarget":
        """The protocol that answers the task's requests."""
        if self.read.output_type == "multiple_choice":
            by_length = self.metric_name in ("acc_norm", "acc_bytes")
            return LogLikelihood(
                protocol="loglikelihood", normalize="bytes" if by_length else "none"
            )
        if self.read.output_type == "generate_until":
            return Generate(
                protocol="generate",
                answer="text",
                stop="turn",
                shots=0,
                max_new_tokens=self.read.max_new_tokens,
            )
        return ScoredTarget(shots=self.shots)

    @property
    def metric_name(self) -> str:
        """The name of the metric that decides right or wrong, without its filter."""
        return (self.read.metric or "").partition(",")[0]


def _kind_of_set(value: Any) -> str:
    is_task = isinstance(value, TaskSet) or (isinstance(value, dict) and "task" in value)
    return "harness task" if is_task else "own items"


AnySet = Annotated[
    Annotated[EvaluationSet, Tag("own items")] | Annotated[TaskSet, Tag("harness task")],
    Discriminator(_kind_of_set),
]


class SharedText(Strict):
    """Passages on which perplexity, KL and top-1 agreement are measured."""

    dataset: DatasetSource
    passages: Count
    max_tokens: Annotated[Whole, Field(ge=8)]


class Batch(Strict):
    """The limits of one forward pass; answers do not depend on them.

    At most `tokens` tokens of prompts are read at once, and at most `rows` answers generated.
    """

    tokens: Count
    rows: Count


class Evaluation(Strict):
    """The evaluation sets, and the shared text that every variant reads."""

    batch: Batch
    datasets: Annotated[dict[Name, AnySet], Field(min_length=1)]
    shared_text: SharedText


class Calibration(Strict):
    """The items whose activations set the smoothing and the static scales."""

    adapter: Adapter
    dataset: DatasetSource
    items: Count
    max_tokens: Annotated[Whole, Field(ge=8)]
    batch_tokens: Annotated[Whole, Field(ge=64)]


class Comparison(Strict):
    """`variant` is compared with `baseline` on one dataset, for one model."""

    model: Name
    dataset: Name
    baseline: Name
    variant: Name


Score = Literal["accuracy", "graded"]


class DeclaredComparison(Comparison):
    """A comparison judged by right and wrong, by graded scores, or without a `score` by both."""

    score: Score | None = None

    @property
    def comparison(self) -> Comparison:
        """What is compared, whichever score judges it."""
        return Comparison(**{name: getattr(self, name) for name in Comparison.model_fields})


class GradedMargins(Strict):
    """Largest harmless differences: of graded scores (probability, 0-1), of KL (nats a token)."""

    probability: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.03
    nats: Annotated[Number, Field(gt=0.0, lt=10.0)] = 0.05


class Statistics(Strict):
    """Confidence, power, equivalence margins and the declared comparisons."""

    confidence: Annotated[Number, Field(gt=0.5, lt=1.0)]
    power: Annotated[Number, Field(gt=0.5, lt=1.0)]
    margin: Annotated[Number, Field(gt=0.0, lt=1.0)]
    graded_margins: GradedMargins = GradedMargins()
    resamples: Annotated[Whole, Field(ge=100)]
    primary: tuple[DeclaredComparison, ...]

    def declared(self, score: Score) -> tuple[Comparison, ...]:
        """The comparisons that are judged by this score, in the file's order."""
        judged = [c.comparison for c in self.primary if c.score in (None, score)]
        return tuple(dict.fromkeys(judged))

    @property
    def scores(self) -> int:
        """How many scores judge declared comparisons, 1 or 2; they share the level."""
        return sum(bool(self.declared(score)) for score in get_args(Score)) or 1


class Study(Strict):
    """One YAML file: the whole account of a study.

    `enable_thinking` goes to the chat template of models that think aloud before they
    answer; a study of such a model has to say it.
    `calibration` serves every variant but those that name one of `calibrations`, which ask what
    another number, length or kind of calibration items would change.
    `old_rules_chapter` names variants that the report also shows, in one chapter, under the
    rules of the report this project redoes (helpers.report.naive_rules_chapter); mostly there are
    none.
    """

    title: Annotated[str, Field(min_length=1)]
    seed: Annotated[Whole, Field(ge=0, lt=2**32)]
    runtime: Runtime
    enable_thinking: Annotated[bool, Field(strict=True)] | None = None
    models: Annotated[dict[Name, ModelSource], Field(min_length=1)]
    calibration: Calibration
    calibrations: Annotated[dict[Name, Calibration], Field(exclude_if=_is_empty)] = {}
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
    baseline: Name
    evaluation: Evaluation
    statistics: Statistics
    old_rules_chapter: tuple[Name, ...] = ()

    @property
    def repeats(self) -> int:
        """The most checkpoints that are made of any one variant."""
        return max(variant.repeats for variant in self.variants.values())

    def calibration_called(self, name: str) -> Calibration:
        """The settings of a named calibration; of the study's own if the name is empty."""
        return self.calibrations[name] if name else self.calibration

    def calibration_of(self, variant: str) -> str:
        """The name of the calibration that a variant is made from; empty for the study's own."""
        return self.variants[variant].calibration or ""

    def calibration_draws(self, name: str) -> int:
        """How often items are drawn for a calibration: the most repeats of its variants."""
        users = [v.repeats for v in self.variants.values() if (v.calibration or "") == name]
        return max(users, default=1)

    @property
    def with_option_sets_only(self) -> "Study":
        """The study as further draws of a variant answer it: no answers are generated."""
        option_sets = {
            name: evaluation_set
            for name, evaluation_set in self.evaluation.datasets.items()
            if evaluation_set.ask.protocol == "loglikelihood"
        }
        evaluation = self.evaluation.model_copy(update={"datasets": option_sets})
        return self.model_copy(update={"evaluation": evaluation})
