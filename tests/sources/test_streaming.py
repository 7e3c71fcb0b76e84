"""A bounded sample of a split: seeded, from all files, as many rows as asked, no row twice."""

import io

import pytest
from pyarrow.parquet import ParquetFile

from helpers.sources import fetching
from helpers.study.schema import Stream
from hub_repositories import table

SIZES = [230, 95, 410]  # rows of the split's files
GROUP = 20


@pytest.fixture
def sample(monkeypatch):
    """sample(rows, pieces, seed): what is read of three files of numbered rows."""
    numbers, files = iter(range(sum(SIZES))), {}
    for i, size in enumerate(SIZES):
        rows = [{"file": i, "number": next(numbers)} for _ in range(size)]
        files[f"{i}.parquet"] = table(rows, group=GROUP)

    def opened(urls):
        return ((url, ParquetFile(io.BytesIO(files[url]))) for url in urls)

    monkeypatch.setattr(fetching, "_open_parquet", opened)
    return lambda **wanted: fetching._sample(list(files), Stream(**wanted))


def numbers(read) -> list[int]:
    return [row["number"] for row in read.rows]


@pytest.mark.parametrize(("rows", "pieces"), [(100, 10), (101, 10), (7, 10), (300, 37), (1, 1)])
def test_it_is_as_large_as_asked_and_no_row_comes_twice(sample, rows, pieces):
    read = sample(rows=rows, pieces=pieces, seed=5)
    assert len(set(numbers(read))) == len(read.rows) == rows
    assert read.of_rows == sum(SIZES)
    assert read.pieces == (min(rows, pieces), 12 + 5 + 21)


def test_it_is_no_larger_than_its_pieces(sample):
    read = sample(rows=10_000, pieces=3, seed=5)
    assert len(read.rows) <= 3 * GROUP
    everything = sample(rows=10_000, pieces=10_000, seed=5)
    assert sorted(numbers(everything)) == list(range(sum(SIZES)))


def test_the_seed_decides(sample):
    drawn = [numbers(sample(rows=60, pieces=12, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_row_is_about_as_likely_as_any_other(sample):
    """300 draws of 38 of 735 rows: 15.5 expected of each, in every tenth of the split alike."""
    counts = [0] * sum(SIZES)
    for seed in range(300):
        for number in numbers(sample(rows=38, pieces=19, seed=seed)):
            counts[number] += 1
    tenth = len(counts) // 10
    shares = [sum(counts[i * tenth : (i + 1) * tenth]) / sum(counts) for i in range(10)]
    assert min(shares) > 0.08
    assert max(shares) < 0.12
    assert min(counts) > 0


def test_pieces_too_large_for_the_limit_are_fewer(sample, monkeypatch):
    monkeypatch.setattr(fetching, "MOST_BYTES", 1)
    read = sample(rows=20, pieces=30, seed=5)
    assert read.pieces[0] == 1
    assert len(read.rows) <= GROUP
