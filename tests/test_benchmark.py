"""The benchmark at tiny settings: every row is there and its figures are of one another's kind. No test of speed."""

import dsd  # first: see its head

import pytest
from conftest import run_script

import benchmark

ROWS = ["a grid", "a pair curated", "a training sample, float32", "an image, one pass", "an image, guided"]


def test_benchmark_measures_every_step_beside_its_peer_and_its_limit(flux, vlm, tmp_path):
    out, _ = run_script("miniature/benchmark.py", "--model", flux, "--vlm", vlm, "--repeat", 1, "--batch", 1,
                        "--steps", 1, "--rank", 2, "--batch_size", 2, "--product", 64, "--out", tmp_path, cwd=tmp_path)
    result = dsd.read_json(tmp_path / "benchmark.json")
    rows = {row["step"]: row for row in result["rows"]}
    assert list(rows) == ROWS and all(f"| {name} |" in out for name in ROWS)
    for row in rows.values():
        assert row["seconds"] > 0 and "GB" in row["memory"] and row["operations"] > 1e8
        assert row["limit_seconds"] == pytest.approx(row["operations"] / result["rates"]["float32"])
        assert (row["peer_seconds"] is None) == (row["step"] == "a pair curated")
    assert 1.5 < rows["an image, guided"]["operations"] / rows["an image, one pass"]["operations"] < 3.1  # one decoder


def test_flux_size_without_a_gpu_names_the_computed_costs(tmp_path, call):
    code, _, err = call(benchmark, "--size", "flux.1-dev", "--device", "cpu", "--out", tmp_path)
    assert code == 2 and "miniature/computed.py" in err and err.count("error:") == 1 and not list(tmp_path.iterdir())
