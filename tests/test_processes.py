"""The four steps as a user starts them, in processes of their own: what they write and print, the same bytes again, and
two processes that share the work."""

import dsd

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TIMEOUT, pictures, words, written
from PIL import Image
from safetensors.torch import load_file

STEPS = {  # script -> its folder in runs/, the files in it but for a cache, what it prints besides its progress bars
    "generate_grids": (
        "grids",
        {*(f"{i:06d}.png" for i in range(6)), "overview.png", "grids.jsonl", "settings.json"},
        r"6 grids in runs.grids; look at .*overview\.png",
    ),
    "curate": (
        "pairs",
        {
            *(f"images/{i:06d}_{k}.png" for i in range(6) for k in range(4)),
            "summary.json",
            *(f"transcripts/{i:06d}.json" for i in range(6)),
            "metadata.jsonl",
            "settings.json",
        },
        r"\d+ of 36 pairs accepted .*",
    ),
    "finetune": (
        "adapter",
        {
            "pytorch_lora_weights.safetensors",
            "settings.json",
            "log.jsonl",
            "loss.png",
            "validation/step_000003.png",
            "validation/step_000006.png",
            "training_state.pt",
        },
        r"adapter in runs.adapter: 6 pairs, 2 more held out, 6 steps; look at .*validation",
    ),
    "sample": (
        "samples",
        {"0000.png", "0001.png", "0002.png", "0003.png", "contact_sheet.png", "settings.json"},
        r"4 pictures in runs.samples with the adapter .*contact_sheet\.png",
    ),
}


@pytest.mark.parametrize("script", STEPS)
def test_a_script_writes_its_files_and_prints_one_line_and_progress_bars(chain, script):
    folder, files, own_words = STEPS[script]
    found = {name for name in written(chain[0] / "runs" / folder) if not name.startswith("cache/")}
    assert found - {"accepted.png", "rejected.png"} == files  # these two if there are such pairs
    lines = [
        line.strip() for line in re.split(r"[\r\n]", "\n".join(chain[1][script])) if line.strip()
    ]
    others = [
        line
        for line in lines
        if not re.fullmatch(r"(grids|curate|encode|finetune|sample): .*\| \d+/\d+ \[.*\]", line)
    ]
    assert len(others) == 1 and re.fullmatch(own_words, others[0]), others


def test_generate_grids_records_how_each_grid_was_drawn(chain):
    grids = chain[0] / "runs" / "grids"
    records = dsd.read_records(grids / "grids.jsonl")
    assert [r["file"] for r in records] == [f"{i:06d}.png" for i in range(6)]
    assert {Image.open(grids / r["file"]).size for r in records} == {(64, 64)}
    for r in records:
        assert set(r) == {
            "file",
            "prompt",
            "panel_prompts",
            "subject",
            "family",
            "seed",
            "rows",
            "columns",
        }
        assert r["family"] in ("subject", "relight") and len(r["panel_prompts"]) == 4
        assert r["prompt"].startswith("a grid of 4 images representing the same")
    assert len({r["seed"] for r in records}) == len({r["prompt"] for r in records}) == 6


def test_curate_asks_about_every_pair_and_keeps_the_transcripts(chain):
    folder = chain[0] / "runs" / "pairs"
    records = [
        r for i in range(6) for r in dsd.read_json(folder / f"transcripts/{i:06d}.json")["pairs"]
    ]
    assert [(r["grid"], *r["panels"]) for r in records] == [
        (g, i, j) for g in range(6) for i in range(4) for j in range(i + 1, 4)
    ]
    assert all(r["question"] and r["answer"] and r["reason"] for r in records)
    assert {r["verdict"] for r in records} <= {"yes", "no", "unparsable", "truncated"}
    for k, panel in enumerate(dsd.cut_grid(dsd.open_image(chain[0] / "runs/grids/000002.png"))):
        assert dsd.open_image(folder / f"images/000002_{k}.png").tobytes() == panel.tobytes()
    summary, accepted = (
        dsd.read_json(folder / "summary.json"),
        sum(r["verdict"] == "yes" for r in records),
    )
    assert (summary["pairs"], summary["yes"]) == (36, accepted)
    assert sum(family["pairs"] for family in summary["by_family"].values()) == 36
    assert (
        len(dsd.read_records(folder / "metadata.jsonl"))
        == summary["training_pairs"]
        <= 2 * accepted
    )


def test_finetune_logs_each_step_and_writes_an_adapter_that_learned(chain, flux):
    folder = chain[0] / "runs" / "adapter"
    settings, log = dsd.read_json(folder / "settings.json"), dsd.read_records(folder / "log.jsonl")
    assert len(list((folder / "cache").iterdir())) == 8
    assert [r["step"] for r in log] == list(range(6))
    assert [r["step"] for r in log if "held_out" in r] == [2, 5]  # the validations
    first, second = settings["frame_weights"]
    for r in log:
        for name in ("", "held_out_") if "held_out" in r else ("",):
            mean = (first * r[f"{name}frame_1"] + second * r[f"{name}frame_2"]) / (first + second)
            assert abs(r[name.rstrip("_") or "loss"] - mean) < 1e-5
    assert (settings["rank"], settings["precision"], settings["model"]) == (
        4,
        "no",
        dsd.name_of(flux),
    )
    tensors = load_file(folder / dsd.ADAPTER_FILE)
    assert tensors["transformer.x_embedder.lora_B.weight"].abs().max() > 0
    assert {
        t.shape[0] for name, t in tensors.items() if name.endswith("attn.to_q.lora_A.weight")
    } == {4}
    assert dsd.adapter_facts(folder).items() >= {"frames": 2, "width": 32, "height": 32}.items()


def test_sample_draws_each_prompt_and_seed_and_puts_the_settings_into_the_picture(chain, reference):
    samples, told = chain[0] / "runs" / "samples", []
    for i in range(4):
        with Image.open(samples / f"{i:04d}.png") as image:
            assert image.size == (32, 32)
            told.append(json.loads(image.text["dsd"]))
    assert [(t["text"], t["seed"]) for t in told] == [
        (text, seed)
        for text in ("a round horned critter in space at noon", "a critter in a cave")
        for seed in (0, 1)
    ]
    assert {(t["image"], t["adapter"], t["steps"]) for t in told} == {
        (reference.as_posix(), "runs/adapter", 3)
    }
    assert len(set(pictures(samples).values())) == 5


# ---- again, and by two processes -------------------------------------------------------------------------------------
def test_no_script_uses_what_only_some_systems_have():
    foreign = (
        r"(?m)^ *(import|from)\b.*\b(fcntl|resource|pwd|grp|termios|msvcrt|winreg)\b|\bsysconf\b"
    )
    for file in [*ROOT.glob("*.py"), *ROOT.glob("miniature/*.py"), *ROOT.glob("notebooks/*.py")]:
        assert not re.search(foreign, file.read_text(encoding="utf-8")), file


def drive(folder, commands, *launcher, **env):
    """Some commands, one after the other in one fresh process (or in several): how many batches each process did."""
    task = json.dumps({"commands": commands, "counts": folder / "counts"}, default=str)
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "tests" / "drive.py", task],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [dsd.read_json(file) for file in sorted(folder.glob("counts*"))]


def test_the_same_commands_in_a_fresh_process_give_the_same_bytes(chain, commands, tmp_path):
    steps = [[script, *words(*args)] for script, args in commands.items()] + [
        [script, "--help"]
        for script in (
            "evaluate",
            *(f"miniature.{name}" for name in ("ablations", "computed")),
            *(f"miniature.{name}" for name in ("measure", "pretrain")),
        )
    ]
    (counts,) = drive(tmp_path, steps, PYTHONHASHSEED="77")  # another order of sets
    assert written(tmp_path / "runs") == written(chain[0] / "runs")
    assert counts == {"generate_grids": 3, "curate": 3, "finetune": 6, "sample": 2}


def test_two_processes_write_what_one_writes_and_share_the_work(chain, commands, tmp_path):
    """Training sums in another order: there the losses are the same but for rounding."""
    one, two = chain[0] / "runs" / "adapter", tmp_path / "two"
    shutil.copytree(one, tmp_path / "runs" / "adapter")  # which sample.py uses
    steps = [
        [script, *words(*commands[script])]
        for script in ("generate_grids", "curate", "sample", "finetune")
    ]
    steps[-1] += ["--out", "two"]  # the last one, since it ends what connects the processes
    counts = drive(
        tmp_path,
        steps,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        OMP_WAIT_POLICY="PASSIVE",
    )  # twice the threads: they had better sleep
    assert written(tmp_path / "runs") == written(chain[0] / "runs")
    assert counts == [
        {"generate_grids": 2, "curate": 2, "finetune": 6, "sample": 1},
        {"generate_grids": 1, "curate": 1, "finetune": 6, "sample": 1},
    ]
    for a, b in zip(
        dsd.read_records(one / "log.jsonl"), dsd.read_records(two / "log.jsonl"), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-4)
    one, two = load_file(one / dsd.ADAPTER_FILE), load_file(two / dsd.ADAPTER_FILE)
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=2e-3) for name in one)
