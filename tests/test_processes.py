"""The four steps as a user starts them, in processes of their own: what they write and print, the
same bytes again, and two processes that share the work."""

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

FILES = {  # of each script's folder, besides settings.json
    "grids": r"grids.jsonl overview.png 00000\d.png",
    "pairs": r"metadata.jsonl summary.json transcripts/00000\d.json images/00000\d_\d.png "
    "accepted.png rejected.png",
    "adapter": r"pytorch_lora_weights.safetensors log.jsonl loss.png training_state.pt "
    r"cache/\w+.safetensors validation/step_00000[36].png",
    "samples": r"000\d.png contact_sheet.png",
}
STEPS = {  # script: its folder, and what it prints besides its progress bars
    "generate_grids": ("grids", r"6 grids in runs.grids; look at .*overview\.png"),
    "curate": ("pairs", r"\d+ of 36 pairs accepted .*"),
    "finetune": ("adapter", "adapter in runs.adapter: 6 pairs, 2 more held out, 6 steps; .*"),
    "sample": ("samples", r"4 pictures in runs.samples with the adapter .*contact_sheet\.png"),
}


@pytest.mark.parametrize("script", STEPS)
def test_a_script_writes_its_files_and_prints_one_line_and_progress_bars(chain, script):
    folder, one_line = STEPS[script]
    files, found = f"settings.json {FILES[folder]}", written(chain[0] / "runs" / folder)
    for pattern in set(files.split()) - {"accepted.png", "rejected.png"}:  # if there are such pairs
        assert any(re.fullmatch(pattern, name) for name in found), pattern
    unknown = [name for name in found if not re.fullmatch(files.replace(" ", "|"), name)]
    assert not unknown
    lines = [line.strip() for line in re.split("[\r\n]", "\n".join(chain[1][script]))]
    bar = r"(grids|curate|encode|finetune|sample): .*\| \d+/\d+ \[.*\]"
    others = [line for line in lines if line and not re.fullmatch(bar, line)]
    assert len(others) == 1 and re.fullmatch(one_line, others[0]), others


def test_generate_grids_records_how_each_grid_was_drawn(chain):
    grids = chain[0] / "runs" / "grids"
    records = dsd.read_records(grids / "grids.jsonl")
    assert [r["file"] for r in records] == [f"{i:06d}.png" for i in range(6)]
    assert {Image.open(grids / r["file"]).size for r in records} == {(64, 64)}
    names = "file prompt opposite subject family seed rows columns"
    for r in records:
        assert set(r) == set(names.split())
        assert r["family"] in ("subject", "relight")
        assert r["prompt"].startswith("a grid of 4 images representing the same")
    assert len({r["seed"] for r in records}) == len({r["prompt"] for r in records}) == 6


def test_curate_asks_about_every_pair_and_keeps_the_transcripts(chain):
    folder, records = chain[0] / "runs" / "pairs", []
    for grid in range(6):
        pairs = dsd.read_json(folder / f"transcripts/{grid:06d}.json")["pairs"]
        assert {r["grid"] for r in pairs} == {grid}
        assert [r["panels"] for r in pairs] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
        records += pairs
    assert all(r["question"] and r["answer"] and r["reason"] for r in records)
    assert {r["verdict"] for r in records} <= {"yes", "no", "unparsable"}
    for k, panel in enumerate(dsd.cut_grid(dsd.open_image(chain[0] / "runs/grids/000002.png"))):
        assert dsd.open_image(folder / f"images/000002_{k}.png").tobytes() == panel.tobytes()
    summary = dsd.read_json(folder / "summary.json")
    accepted = sum(r["verdict"] == "yes" for r in records)
    assert (summary["pairs"], summary["yes"]) == (36, accepted)
    assert sum(family["pairs"] for family in summary["by_family"].values()) == 36
    training_pairs = len(dsd.read_records(folder / "metadata.jsonl"))
    assert training_pairs == summary["training_pairs"] <= 2 * accepted


def test_finetune_logs_each_step_and_writes_an_adapter_that_learned(chain):
    folder = chain[0] / "runs" / "adapter"
    settings, log = dsd.read_json(folder / "settings.json"), dsd.read_records(folder / "log.jsonl")
    assert len(list((folder / "cache").iterdir())) == 8
    assert [r["step"] for r in log] == list(range(6))
    validated = [r for r in log if "held_out" in r]
    assert [r["step"] for r in validated] == [2, 5]
    first, second = settings["frame_weights"]
    means = [(r["loss"], r["frame_1"], r["frame_2"]) for r in log]
    means += [(r["held_out"], r["held_out_frame_1"], r["held_out_frame_2"]) for r in validated]
    for loss, frame_1, frame_2 in means:
        assert abs(loss - (first * frame_1 + second * frame_2) / (first + second)) < 1e-5
    assert (settings["rank"], settings["precision"]) == (4, "no")
    assert settings["model"] == "miniature/flux"
    tensors = load_file(folder / dsd.ADAPTER_FILE)
    assert tensors["transformer.x_embedder.lora_B.weight"].abs().max() > 0
    queries = [t for name, t in tensors.items() if name.endswith("attn.to_q.lora_A.weight")]
    assert {t.shape[0] for t in queries} == {4}
    assert dsd.adapter_facts(folder).items() >= {"frames": 2, "width": 32, "height": 32}.items()


def test_sample_draws_each_prompt_and_seed_and_puts_the_settings_into_the_picture(chain, reference):
    samples, told = chain[0] / "runs" / "samples", []
    for i in range(4):
        with Image.open(samples / f"{i:04d}.png") as image:
            assert image.size == (32, 32)
            told.append(json.loads(image.text["dsd"]))
    first, second = "a round horned critter in space at noon", "a critter in a cave"
    wanted = [(first, 0), (first, 1), (second, 0), (second, 1)]
    assert [(t["text"], t["seed"]) for t in told] == wanted
    for t in told:
        assert t["image"] == reference.as_posix()
        assert (t["adapter"], t["steps"]) == ("runs/adapter", 3)
    assert len(set(pictures(samples).values())) == 5


# ---- again, and by two processes -----------------------------------------------------------------
def test_no_script_uses_what_only_some_systems_have():
    foreign = r"(?m)^ *(import|from)\b.*\b(fcntl|resource|pwd|grp|termios|msvcrt)\b|\bsysconf\b"
    for file in [*ROOT.glob("*.py"), *ROOT.glob("miniature/*.py"), *ROOT.glob("notebooks/*.py")]:
        assert not re.search(foreign, file.read_text(encoding="utf-8")), file


def drive(folder, commands, *launcher, **env):
    """Some commands in one fresh process (or in several): how many batches each process did."""
    (folder / "commands.json").write_text(json.dumps([words(*command) for command in commands]))
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "tests" / "drive.py", "commands.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [dsd.read_json(file) for file in sorted(folder.glob("batches_*"))]


def test_the_same_commands_in_a_fresh_process_give_the_same_bytes(chain, commands, tmp_path):
    steps = [[script, *args] for script, args in commands.items()]
    modules = ("ablations", "computed", "measure", "pretrain")
    steps += [["evaluate --help"], *([f"miniature.{name} --help"] for name in modules)]
    (counts,) = drive(tmp_path, steps, PYTHONHASHSEED="77")  # another order of sets
    assert written(tmp_path / "runs") == written(chain[0] / "runs")
    assert counts == {"grids": 3, "curate": 3, "encode": 1, "sample": 2}


def test_two_processes_write_what_one_writes_and_share_the_work(chain, commands, tmp_path):
    """Training sums in another order: there the losses are the same but for rounding."""
    one, two = chain[0] / "runs" / "adapter", tmp_path / "two"
    shutil.copytree(one, tmp_path / "runs" / "adapter")  # which sample.py uses
    steps = [[name, *commands[name]] for name in ("generate_grids", "curate", "sample", "finetune")]
    steps[-1] += ["--out", two]  # the last one, since it ends what connects the processes
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
    # with twice the threads they had better sleep than wait busily
    counts = drive(tmp_path, steps, *launcher.split(), OMP_WAIT_POLICY="PASSIVE")
    assert written(tmp_path / "runs") == written(chain[0] / "runs")
    assert counts == [
        {"grids": 2, "curate": 2, "encode": 1, "sample": 1},
        {"grids": 1, "curate": 1, "sample": 1},
    ]
    logs = [dsd.read_records(folder / "log.jsonl") for folder in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    one, two = load_file(one / dsd.ADAPTER_FILE), load_file(two / dsd.ADAPTER_FILE)
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=2e-3) for name in one)
