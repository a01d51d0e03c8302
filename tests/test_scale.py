"""Memory does not grow with the number of records: what is alive at most, at two sizes, without models."""

import tracemalloc
from pathlib import Path

import pytest
import scale

import dsd


def peak(work, *args):
    tracemalloc.start()
    try:
        work(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step, few, many", [("grids", 200, 2000), ("curation", 120, 1200), ("training", 1000, 11_000)])
def test_memory_does_not_grow_with_the_records(step, few, many, tmp_path):
    for name in ("warm", "few", "many"):
        (tmp_path / name).mkdir()
    getattr(scale, step)(few, tmp_path / "warm")  # what is imported and cached once
    grown = peak(getattr(scale, step), many, tmp_path / "many") - peak(getattr(scale, step), few, tmp_path / "few")
    assert grown / (many - few) < 250  # bytes a record: its place in the file and a hash, not the record of a kilobyte


def test_no_cache_file_stays_open(tmp_path, monkeypatch):
    scale.training(600, tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_lazy_is_a_list_of_items_made_when_asked_for():
    made = []
    squares = dsd.Lazy(5, lambda i: made.append(i) or i * i)
    assert squares[3] == 9 and made == [3]
    assert squares[1:4][-1] == 9 and squares[::2] == [0, 4, 16] and [0, 4, 16] == squares[::2]
    assert len(squares[10:]) == 0 and squares[:2] != [0, 2] and squares[:2] != [0]
    with pytest.raises(IndexError):
        squares[5]
