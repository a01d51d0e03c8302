"""The four steps as a user starts them, in processes of their own: what they write and print, the same bytes again, and
two processes that share the work."""

import dsd  # first: see its head

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TIMEOUT, pictures, written
from PIL import Image
from safetensors.torch import load_file

DRIVER = ROOT / "tests" / "drive.py"


def test_generate_grids_writes_a_picture_and_a_record_for_each_grid(chain, flux):
    grids, out = chain[0] / "runs" / "grids", chain[1]["generate_grids"][0]
    assert set(written(grids)) == {*(f"{i:06d}.png" for i in range(6)), "overview.png", "grids.jsonl", "settings.json"}
    assert {Image.open(grids / f"{i:06d}.png").size for i in range(6)} == {(64, 64)}
    records = dsd.read_records(grids / "grids.jsonl")
    assert [r["file"] for r in records] == [f"{i:06d}.png" for i in range(6)]
    for r in records:
        assert set(r) == {"file", "prompt", "panel_prompts", "subject", "family", "seed", "model", "rows", "columns",
                          "settings"}
        assert r["model"] == dsd.name_of(flux) and r["family"] in ("subject",
                                                                   "relight") and len(r["panel_prompts"]) == 4
        assert r["settings"]["steps"] == 4 and r["prompt"].startswith("a grid of 4 images representing the same")
    assert len({r["seed"] for r in records}) == len({r["prompt"] for r in records}) == 6
    assert "6 grids" in out and "overview.png" in out


def test_curate_asks_about_every_pair_and_keeps_the_transcripts(chain):
    folder = chain[0] / "runs" / "pairs"
    files = sorted((folder / "transcripts").iterdir())
    records = [r for file in files for r in dsd.read_json(file)["pairs"]]
    assert [file.name for file in files] == [f"{i:06d}.json" for i in range(6)]
    assert [(r["grid"], *r["panels"]) for r in records] == [
        (g, i, j) for g in range(6) for i in range(4) for j in range(i + 1, 4)]
    assert all(r["question"] and r["answer"] and r["reason"] for r in records)
    assert {r["verdict"] for r in records} <= {"yes", "no", "unparsable", "truncated"}
    panels = dsd.cut_grid(dsd.open_image(chain[0] / "runs/grids/000002.png"))
    for k, panel in enumerate(panels):
        assert dsd.open_image(folder / f"images/000002_{k}.png").tobytes() == panel.tobytes()
    assert len(pictures(folder / "images")) == 24
    summary, accepted = dsd.read_json(folder / "summary.json"), sum(r["verdict"] == "yes" for r in records)
    assert (summary["pairs"], summary["yes"]) == (36, accepted)
    assert sum(family["pairs"] for family in summary["by_family"].values()) == 36
    assert len(dsd.read_records(folder / "metadata.jsonl")) == summary["training_pairs"] <= 2 * accepted


def test_finetune_writes_adapter_log_checkpoint_figure_and_validation(chain, flux):
    folder, out = chain[0] / "runs" / "adapter", chain[1]["finetune"][0]
    assert len(list((folder / "cache").iterdir())) == 8
    assert {name for name in written(folder) if "cache" not in name} == {
        "pytorch_lora_weights.safetensors", "settings.json", "log.jsonl", "loss.png",
        "validation/step_000003.png", "validation/step_000006.png", "checkpoint/pytorch_lora_weights.safetensors",
        "checkpoint/training_state.pt"}
    log = dsd.read_records(folder / "log.jsonl")
    assert [r["step"] for r in log] == list(range(6))
    assert [r["step"] for r in log if "held_out" in r] == [2, 5]  # the validations
    settings = dsd.read_json(folder / "settings.json")
    first, second = settings["frame_weights"]
    for r in log:
        for name in ("", "held_out_") if "held_out" in r else ("",):
            mean = (first * r[f"{name}frame_1"] + second * r[f"{name}frame_2"]) / (first + second)
            assert abs(r[name.rstrip("_") or "loss"] - mean) < 1e-5
    assert (settings["rank"], settings["precision"], settings["model"]) == (4, "no", dsd.name_of(flux))
    tensors = load_file(folder / dsd.ADAPTER_FILE)
    assert tensors["transformer.x_embedder.lora_B.weight"].abs().max() > 0
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("attn.to_q.lora_A.weight")} == {4}
    assert dsd.adapter_facts(folder)[1].items() >= {"frames": 2, "width": 32, "height": 32}.items()
    assert "6 pairs, 2 more held out, 6 steps" in out and "loss.png" in out


def test_sample_writes_a_picture_for_each_prompt_and_seed_with_its_settings_inside(chain, reference):
    samples, out = chain[0] / "runs" / "samples", chain[1]["sample"][0]
    assert set(written(samples)) == {"0000.png", "0001.png", "0002.png", "0003.png", "contact_sheet.png",
                                     "settings.json"}
    told = []
    for i in range(4):
        with Image.open(samples / f"{i:04d}.png") as image:
            assert image.size == (32, 32)
            told.append(json.loads(image.text["dsd"]))
    assert [(t["text"], t["seed"]) for t in told] == [
        (text, seed) for text in ("a round horned critter in space at noon", "a critter in a cave") for seed in (0, 1)]
    assert {(t["image"], t["adapter"], t["steps"]) for t in told} == {(reference.as_posix(), "runs/adapter", 3)}
    assert len(set(pictures(samples).values())) == 5 and "4 pictures" in out


OWN_WORDS = {  # what a script may print beside its progress bars, as regular expressions
    "generate_grids": r"6 grids in runs.grids, .* look at .*overview\.png",
    "curate": r"\d+ of 36 pairs accepted .*|error: none of 36 pairs was accepted .*",
    "finetune": r"adapter in runs.adapter: 6 pairs, 2 more held out, 6 steps.*loss\.png",
    "sample": r"4 pictures in runs.samples with the adapter .*contact_sheet\.png"}


@pytest.mark.parametrize("script", OWN_WORDS)
def test_a_script_prints_one_line_of_its_own_and_progress_bars(chain, script):
    lines = [line.strip() for line in re.split(r"[\r\n]", "\n".join(chain[1][script])) if line.strip()]
    others = [line for line in lines if not re.fullmatch(r"(grids|curate|encode|finetune|sample): .*\| \d+/\d+ \[.*\]",
                                                         line)]
    assert len(others) == 1 and re.fullmatch(OWN_WORDS[script], others[0]), others


# ---- again, and by two processes -------------------------------------------------------------------------------------
def drive(folder, commands, *launcher, **env):
    """Some commands, one after the other in one fresh process (or in several)."""
    task = json.dumps({"commands": commands, "counts": str(folder / "counts")})
    done = subprocess.run([sys.executable, *launcher, str(DRIVER), task], cwd=folder, capture_output=True, text=True,
                          timeout=TIMEOUT, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return [dsd.read_json(file) for file in sorted(folder.glob("counts*"))]


def test_the_same_commands_in_a_fresh_process_give_the_same_bytes(chain, commands, tmp_path):
    """Grids, records, transcripts, adapter with its metadata, checkpoint, log, figures, pictures.

    The driver also refuses modules that only some systems have, to these scripts and to all others."""
    steps = [[script, *args] for script, args in commands.items()]
    others = "evaluate", "ablations", "benchmark", "computed", "measure", "pretrain"
    steps += [[script, "--help"] for script in others]
    counts, = drive(tmp_path, steps, PYTHONHASHSEED="77")  # another order of sets
    assert written(tmp_path / "runs") == written(chain[0] / "runs")
    assert counts == {"generate_grids": 3, "curate": 3, "finetune": 6, "sample": 2}


def test_two_processes_write_what_one_writes_and_share_the_work(chain, commands, tmp_path):
    """Training sums in another order: there the losses are the same but for rounding."""
    shutil.copytree(chain[0] / "runs" / "adapter", tmp_path / "runs" / "adapter")  # which sample.py uses
    steps = [[script, *commands[script]] for script in ("generate_grids", "curate", "sample", "finetune")]
    steps[-1] += ["--out", "two"]  # the last one, since it ends what connects the processes
    counts = drive(tmp_path, steps, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--main_process_port", "0", OMP_WAIT_POLICY="PASSIVE")  # twice the threads: they had better sleep
    assert written(tmp_path / "runs") == written(chain[0] / "runs")
    assert counts == [{"generate_grids": 2, "curate": 2, "finetune": 6, "sample": 1},
                      {"generate_grids": 1, "curate": 1, "finetune": 6, "sample": 1}]
    one, two = (dsd.read_records(folder / "log.jsonl") for folder in (chain[0] / "runs" / "adapter", tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    one, two = (load_file(folder / dsd.ADAPTER_FILE) for folder in (chain[0] / "runs" / "adapter", tmp_path / "two"))
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=2e-3) for name in one)
