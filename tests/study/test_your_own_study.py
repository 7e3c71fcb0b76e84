"""docs/your-own-study.md: what it shows can be pasted, and what it says is so."""

import json
import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from tools.sample_size import smallest_claimable_margin

from helpers.core.files import PROJECT
from helpers.sources.items import ADAPTERS
from helpers.sources.sampling import load_items
from helpers.statistics.intervals import detectable_loss
from helpers.study.loading import load_study
from helpers.study.schema import FIELDS, FileDataset, FolderDataset

GUIDE = PROJECT / "docs" / "your-own-study.md"
TEXT = GUIDE.read_text("utf-8")
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", TEXT, re.S) for kind in ("yaml", "json", "csv")}
ROWS = dict(
    zip(["openmath", "arc", "boolq", "squad_v2"], BLOCKS["json"][0].split("\n"), strict=False)
)


@pytest.fixture
def pasted(tmp_path, write_study):
    """The study file of the guide, its model and questions put into a folder of the test."""
    model = tmp_path / "my-fine-tune"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text('{"model_type": "llama"}', encoding="utf-8")
    save_file({"model.norm.weight": np.ones(4, "float32")}, model / "model.safetensors")
    questions = tmp_path / "my-questions.jsonl"
    questions.write_text(ROWS["openmath"] + "\n", encoding="utf-8")
    text = BLOCKS["yaml"][2]
    for path in (model, questions):
        assert text.count(path.name) == 1
        text = text.replace(path.name, str(path))
    return text, write_study


def test_the_study_file_is_valid_as_it_stands(pasted):
    text, write_study = pasted
    loaded = load_study(write_study(text))
    assert set(loaded.evaluation.datasets) == {"mine"}


def test_the_parts_from_a_hub_fit_into_it(pasted):
    text, write_study = pasted
    study, more = yaml.safe_load(text), yaml.safe_load(BLOCKS["yaml"][3])
    study["models"] |= more["models"]
    study["evaluation"]["datasets"]["mine"] |= more["evaluation"]["datasets"]["mine"]
    loaded = load_study(write_study(study))
    assert loaded.evaluation.datasets["mine"].source.hub == "your-name/your-questions"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_row_it_shows_is_one_of_its_adapter(write_rows, adapter):
    source = FileDataset(file=write_rows([json.loads(ROWS[adapter])]))
    (item,) = load_items(source, adapter=adapter)
    assert item.golds
    assert f"| `{adapter}` |" in TEXT


@pytest.mark.parametrize("separator", [";", ","])
def test_the_table_it_shows_is_read_with_the_columns_it_shows(tmp_path, separator):
    table, source = BLOCKS["csv"][0], yaml.safe_load(BLOCKS["yaml"][0])["source"]
    path = tmp_path / source["file"]
    path.write_text(table.replace(";", separator), encoding="utf-8")
    items = load_items(FileDataset(**source | {"file": str(path)}), adapter="arc")
    assert [item.id for item in items] == ["1", "2"]
    assert [len(item.options) for item in items] == [3, 2]
    assert [item.options[item.labels.index(item.golds[0])] for item in items] == ["copper", "water"]


def test_the_folder_it_shows_is_a_source():
    source = FolderDataset(**yaml.safe_load(BLOCKS["yaml"][1])["source"])
    assert set(source.columns) <= set(FIELDS["openmath"])


def test_the_table_of_sizes_is_what_the_power_functions_say():
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) / ([\d.]+) \| ([\d.]+) \|$", TEXT, flags=re.M)
    assert len(rows) == 4
    for n, *told in rows:
        losses = [
            detectable_loss(int(n), gain_rate=gain, alpha=0.05, power=0.8) for gain in (0.02, 0.05)
        ]
        margin = smallest_claimable_margin(int(n), alpha=0.05)
        assert [float(x) for x in told] == [round(100 * x, 1) for x in (*losses, margin)]


def test_it_is_linked_and_its_links_lead_somewhere():
    assert "(docs/your-own-study.md)" in (PROJECT / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (GUIDE.parent / link).exists(), link


def test_every_command_it_names_exists():
    known = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, flags=re.M)) <= known
