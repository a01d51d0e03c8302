"""The benchmark at tiny settings: every line is there and its figures are of one another's kind. No test of speed."""

import json

import benchmark
import pytest

import dsd

ROWS = ["a grid", "a pair curated", "a training sample, bfloat16", "a training sample, float32", "an image, one pass",
        "an image, guided"]


def test_benchmark_measures_every_step_beside_its_peer_and_its_limit(flux, vlm, tmp_path, call, monkeypatch):
    monkeypatch.setattr(benchmark, "PRODUCT", 64)
    code, out, err = call(benchmark, "--model", flux, "--vlm", vlm, "--repeat", 1, "--batch", 1, "--steps", 1, "--rank", 2,
                          "--batch_size", 2, "--out", tmp_path / "result.json")
    assert code == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["step"] for row in result["rows"]] == ROWS and all(name in out for name in ROWS)
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["peak_memory_gb"] > 0
        rate = result["rates"]["bfloat16" if "bfloat16" in row["step"] else "float32"]
        assert row["limit_seconds"] == pytest.approx(row["operations"] / rate) and row["operations"] > 1e8
        assert (row["peer_seconds"] is None) == (row["step"] == "a pair curated")
    grid, _, bf16, full, one, guided = (row["operations"] for row in result["rows"])
    assert bf16 == full and 1.5 < guided / one < 3.1  # three passes, one decoder
    one_row = benchmark.table({**result, "rows": [{**result["rows"][0], "seconds": 2., "peer_seconds": 3., "limit_seconds": .5}]})
    assert "| a grid | 2 | 3 | 1.50x | 0.5 | 25% |" in one_row


def test_flux_size_without_a_gpu_names_the_computed_costs(tmp_path, call, monkeypatch):
    monkeypatch.setattr(dsd.torch.cuda, "is_available", lambda: False)
    code, _, err = call(benchmark, "--size", "flux.1-dev", "--out", tmp_path / "result.json")
    assert code == 2 and "computed.py" in err and err.count("\n") == 1
