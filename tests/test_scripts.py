"""The four scripts as a user runs them, at tiny settings: what they write, determinism, several processes."""

import json
import os
import subprocess
import sys

import generate_grids
import pytest
import torch
from conftest import command, critter, predict, run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from test_model import difference
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import curate
import dsd
import finetune
import sample

TINY_GRIDS = ["--count", 6, "--steps", 4, "--batch_size", 2]
TINY_TRAINING = ["--steps", 12, "--rank", 4, "--batch_size", 2, "--save_every", 4, "--ema", .9]
TINY_SAMPLES = ["--steps", 3, "--seed", 0, 1, "--prompt", "a {name} in space at noon", "a critter in a cave",
                "--image_guidance", 1.5, "--text_guidance", 2]


def pictures(folder):
    """The PNG files of a folder: {name: bytes}."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# ---- the chain, each script in a process of its own ------------------------------------------------------------------
@pytest.fixture(scope="session")
def grids_run(flux, tmp_path_factory):
    """A folder in which generate_grids.py has run: (folder, its stdout)."""
    folder = tmp_path_factory.mktemp("chain")
    return folder, run_script("generate_grids.py", "--model", flux, *TINY_GRIDS, cwd=folder)[0]


@pytest.fixture(scope="session")
def curate_run(grids_run, vlm):
    """curate.py after it; whether a VLM of unknown quality accepts anything is open: (folder, exit code, stderr)."""
    folder, _ = grids_run
    done = subprocess.run(command("curate.py", "--vlm", vlm), cwd=folder, capture_output=True, text=True, timeout=1800)
    return folder / "runs" / "pairs", done.returncode, done.stderr


@pytest.fixture(scope="session")
def finetune_run(grids_run, pairs, flux):
    """finetune.py in the same folder, on rendered pairs: (folder, its stdout)."""
    folder, _ = grids_run
    return folder, run_script("finetune.py", "--model", flux, "--pairs", pairs, *TINY_TRAINING, cwd=folder)[0]


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A picture of another size than the model's panels."""
    path = tmp_path_factory.mktemp("reference") / "round horned critter.png"
    critter(4321, [1, 0, 0]).resize((90, 64)).save(path)
    return path


@pytest.fixture(scope="session")
def sample_run(finetune_run, reference, flux):
    """sample.py with the adapter just trained, found by itself: (folder, its stdout)."""
    folder, _ = finetune_run
    return folder, run_script("sample.py", "--model", flux, "--image", reference, *TINY_SAMPLES, cwd=folder)[0]


def test_generate_grids_writes_a_picture_and_a_record_for_each_grid(grids_run, flux):
    folder, out = grids_run
    grids = folder / "runs" / "grids"
    assert set(pictures(grids)) == {*(f"{i:06d}.png" for i in range(6)), "overview.png"}
    assert {Image.open(grids / f"{i:06d}.png").size for i in range(6)} == {(64, 64)}
    records = dsd.read_records(grids / "grids.jsonl")
    assert [r["file"] for r in records] == [f"{i:06d}.png" for i in range(6)]
    for r in records:
        assert set(r) == {"file", "prompt", "panel_prompts", "subject", "family", "seed", "model", "rows", "columns",
                          "settings"}
        assert r["model"] == dsd.name_of(flux) and r["family"] in ("subject", "relight") and len(r["panel_prompts"]) == 4
        assert r["settings"]["steps"] == 4 and r["prompt"].startswith("a grid of 4 images representing the same")
    assert len({r["seed"] for r in records}) == len({r["prompt"] for r in records}) == 6
    assert "6 grids" in out and "overview.png" in out


def test_curate_asks_about_every_pair_and_keeps_the_transcripts(curate_run):
    folder, code, err = curate_run
    records = dsd.read_records(folder / "transcripts.jsonl")
    assert sorted((r["grid"], *r["panels"]) for r in records) == [
        (g, i, j) for g in range(6) for i in range(4) for j in range(i + 1, 4)]
    assert all(r["question"] and "answer" in r and r["reason"] for r in records)
    assert {r["verdict"] for r in records} <= {"yes", "no", "unparsable"}
    assert {Image.open(path).size for path in (folder / "images").glob("*.png")} == {(32, 32)}
    assert len(pictures(folder / "images")) == 24
    summary = json.loads((folder / "summary.json").read_text())
    accepted = sum(r["verdict"] == "yes" for r in records)
    assert (summary["asked"], summary["yes"], summary["yes"] + summary["no"] + summary["unparsable"]) == (36, accepted, 36)
    assert sum(family["asked"] for family in summary["by_family"].values()) == 36
    assert (code, "error: " in err) == ((0, False) if summary["training_pairs"] else (2, True)), err[-2000:]
    assert len(dsd.read_records(folder / "metadata.jsonl")) == summary["training_pairs"] <= 2 * accepted


def test_finetune_writes_adapter_log_loss_figure_and_validation(finetune_run, flux):
    folder, out = finetune_run
    adapter = folder / "runs" / "adapter"
    assert {"pytorch_lora_weights.safetensors", "settings.json", "log.jsonl", "loss.png", "summary.json", "validation",
            "cache"} <= {path.name for path in adapter.iterdir()}
    log = dsd.read_records(adapter / "log.jsonl")
    assert [r["step"] for r in log] == list(range(12)) and all(set(r) == {"step", "loss", "frame_1", "frame_2"} for r in log)
    assert all(abs(r["loss"] - (r["frame_1"] + r["frame_2"]) / 2) < 1e-5 for r in log)
    settings = json.loads((adapter / "settings.json").read_text())
    assert (settings["rank"], settings["steps"], settings["model"]) == (4, 12, dsd.name_of(flux))
    assert list(pictures(adapter / "validation")) == ["step_000012.png"]
    summary = json.loads((adapter / "summary.json").read_text())
    assert summary["pairs"] == 8 and summary["seconds_per_step"] > 0 and .1 < summary["peak_memory_gb"] < 30
    assert "peak memory" in out and "s a step" in out
    tensors = load_file(adapter / dsd.ADAPTER_FILE)
    assert tensors["transformer.x_embedder.lora_B.weight"].abs().max() > 0
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("attn.to_q.lora_A.weight")} == {4}


def test_sample_writes_a_picture_for_each_prompt_and_seed_with_its_settings_inside(sample_run, reference):
    folder, out = sample_run
    samples = folder / "runs" / "samples"
    assert set(pictures(samples)) == {"0000.png", "0001.png", "0002.png", "0003.png", "contact_sheet.png"}
    told = []
    for i in range(4):
        with Image.open(samples / f"{i:04d}.png") as image:
            assert image.size == (32, 32)
            told.append(json.loads(image.text["dsd"]))
    assert [(t["text"], t["seed"]) for t in told] == [
        (text, seed) for text in ("a round horned critter in space at noon", "a critter in a cave") for seed in (0, 1)]
    assert {t["image"] for t in told} == {str(reference)} and {t["adapter"] for t in told} == {"runs/adapter"}
    assert {(t["steps"], t["image_guidance"], t["text_guidance"]) for t in told} == {(3, 1.5, 2.0)}
    assert len(set(pictures(samples).values())) == 5
    assert "4 pictures" in out


def written(folder):
    """What a script wrote: {name: bytes}, but for the lock and the measured times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock" and (folder.name, path.name) != ("adapter", "summary.json")}


def test_the_same_commands_in_fresh_processes_give_the_same_bytes(
        grids_run, curate_run, finetune_run, sample_run, reference, pairs, flux, vlm, tmp_path, monkeypatch):
    """Grids, records, transcripts, adapter with its metadata, checkpoint, log, figures, pictures."""
    runs = grids_run[0] / "runs"
    first = {name: written(runs / name) for name in ("grids", "pairs", "adapter", "samples")}
    monkeypatch.setenv("PYTHONHASHSEED", "77")  # another order of sets
    run_script("generate_grids.py", "--model", flux, *TINY_GRIDS, cwd=tmp_path)
    run_script("curate.py", "--vlm", vlm, cwd=tmp_path, code=curate_run[1])
    run_script("finetune.py", "--model", flux, "--pairs", pairs, *TINY_TRAINING, cwd=tmp_path)
    run_script("sample.py", "--model", flux, "--image", reference, *TINY_SAMPLES, cwd=tmp_path)
    assert {name: written(tmp_path / "runs" / name) for name in first} == first


def test_a_finished_run_started_again_changes_nothing(grids_run, finetune_run, sample_run, pairs, reference, flux, call,
                                                      monkeypatch):
    monkeypatch.chdir(grids_run[0])
    before = {name: written(grids_run[0] / "runs" / name) for name in ("grids", "adapter", "samples")}
    for module, *args in ((generate_grids, *TINY_GRIDS), (finetune, "--pairs", pairs, *TINY_TRAINING),
                          (sample, "--image", reference, *TINY_SAMPLES)):
        assert call(module, "--model", flux, *args)[0] == 0
    assert {name: written(grids_run[0] / "runs" / name) for name in before} == before


# ---- interruption (test_interruption.py kills the scripts) -----------------------------------------------------------
def test_grids_lost_from_a_batch_are_drawn_again_in_the_same_batch(flux, tmp_path, call):
    run = [generate_grids, "--model", flux, "--count", 4, "--steps", 2, "--batch_size", 4, "--out", tmp_path]
    assert call(*run)[0] == 0
    before, records = pictures(tmp_path), (tmp_path / "grids.jsonl").read_bytes()
    (tmp_path / "grids.jsonl").write_bytes(b"".join(records.splitlines(True)[:1]))
    for i in (1, 2, 3):
        (tmp_path / f"{i:06d}.png").unlink()
    assert call(*run)[0] == 0
    assert pictures(tmp_path) == before and (tmp_path / "grids.jsonl").read_bytes() == records


# ---- several processes, options --------------------------------------------------------------------------------------
def test_two_processes_log_the_losses_of_one_process_on_the_same_global_batch(pairs, flux, tmp_path, call):
    run = ["--model", flux, "--pairs", pairs, "--steps", 4, "--rank", 4, "--batch_size", 4, "--precision", "no"]
    assert call(finetune, *run, "--out", tmp_path / "one")[0] == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", "0"]
    done = subprocess.run(launch + command("finetune.py", *run, "--out", "two")[1:], cwd=tmp_path, capture_output=True,
                          text=True, timeout=1800, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (dsd.read_records(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a == pytest.approx(b, abs=1e-4)
    one, two = (load_file(tmp_path / name / dsd.ADAPTER_FILE) for name in ("one", "two"))
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-3) for name in one)


def finetuned(call, pairs, flux, out, *options):
    """An adapter trained for four steps in this process, and its log."""
    code, _, err = call(finetune, "--model", flux, "--pairs", pairs, "--steps", 4, "--rank", 4, "--precision", "no",
                        "--batch_size", 2, "--out", out, *options)
    assert code == 0, err
    return load_file(out / dsd.ADAPTER_FILE), dsd.read_records(out / "log.jsonl")


def farthest(a, b):
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def test_ema_and_gradient_checkpointing_leave_the_losses_alone(pairs, flux, tmp_path, call):
    plain, log = finetuned(call, pairs, flux, tmp_path / "plain")
    averaged, averaged_log = finetuned(call, pairs, flux, tmp_path / "averaged", "--ema", .5, "--gradient_checkpointing",
                                       "--validate_every", 2)
    for a, b in zip(log, averaged_log, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert 0 < farthest(plain, averaged) < farthest(plain, {name: 0 * t for name, t in plain.items()})
    assert list(pictures(tmp_path / "averaged" / "validation")) == ["step_000002.png", "step_000004.png"]


class Process:
    """What `finetune.draw` wants to know of the accelerator."""
    device = "cpu"

    def __init__(self, index=0, count=1):
        self.process_index, self.num_processes = index, count


def test_logged_loss_is_the_weighted_mean_over_the_accumulated_batches_computed_by_hand(pipe, pairs, flux, tmp_path, call):
    _, log = finetuned(call, pairs, flux, tmp_path, "--accumulate", 3, "--frame_weights", 1, 3)
    settings = json.loads((tmp_path / "settings.json").read_text())
    cache, frames = finetune.Cache(tmp_path / "cache", finetune.read_pairs(pairs)), []
    for micro in range(3):
        _, x_0, eps, sigma, _, *text = finetune.draw(cache, dsd.encode_prompts(pipe, [""]), settings, 0, micro, Process())
        x_sigma = (1 - sigma.view(-1, 1, 1)) * x_0 + sigma.view(-1, 1, 1) * eps
        error = predict(pipe.transformer, x_sigma, sigma, text, dsd.position_ids(8, 16)) - (eps - x_0)
        error = dsd.unpack(error ** 2, 8, 16)  # at the first step the student still is the teacher
        frames.append([error[..., :8].mean().item(), error[..., 8:].mean().item()])
    first, second = (sum(losses) / 3 for losses in zip(*frames))
    assert log[0] == pytest.approx({"step": 0, "loss": (first + 3 * second) / 4, "frame_1": first, "frame_2": second}, abs=1e-4)


def test_training_that_diverges_is_an_error_and_leaves_no_adapter(pairs, flux, tmp_path, call):
    code, _, err = call(finetune, "--model", flux, "--pairs", pairs, "--steps", 6, "--rank", 4, "--batch_size", 2,
                        "--learning_rate", 1e20, "--out", tmp_path)
    assert code == 2 and "error: the loss is not a number" in err
    assert not (tmp_path / dsd.ADAPTER_FILE).exists() and not (tmp_path / "checkpoint.safetensors").exists()


def test_cache_holds_both_canvases_and_the_prompt_of_every_pair(pipe, pairs, tmp_path):
    records = finetune.read_pairs(pairs)
    finetune.encode_pairs(pipe, records, pairs, (32, 32), tmp_path)
    x_0, condition, (embeds, pooled) = finetune.Cache(tmp_path, records).batch(torch.arange(8))
    reference, target = (dsd.to_pixels([dsd.open_image(pairs / r[f"{side}_file_name"]) for r in records])
                         for side in ("reference", "target"))
    close = {"rtol": .01, "atol": .01}  # it keeps bfloat16
    torch.testing.assert_close(x_0, dsd.encode(pipe.vae, torch.cat([reference, target], 3)), **close)
    torch.testing.assert_close(condition, dsd.encode(pipe.vae, torch.cat([reference, 0 * reference - 1], 3)), **close)
    for wanted, found in zip(dsd.encode_prompts(pipe, [r["prompt"] for r in records]), (embeds, pooled)):
        torch.testing.assert_close(found, wanted, **close)
    assert (x_0[0] - x_0[1]).abs().max() > .1 and (embeds[0] - embeds[1]).abs().max() > .1
    assert (pooled[0] - pooled[2]).abs().max() > .05  # two critters; five times what `close` forgives


def test_the_training_batch_is_drawn_alike_however_many_processes_share_it(pipe, pairs, tmp_path):
    """And dropout, noise and noise levels with it."""
    records = finetune.read_pairs(pairs)
    finetune.encode_pairs(pipe, records, pairs, (32, 32), tmp_path)
    cache, null_text = finetune.Cache(tmp_path, records), dsd.encode_prompts(pipe, [""])
    settings = {"batch_size": 6, "seed": 0, "shift": 3.0, "condition_dropout": .4, "prompt_dropout": .4}
    drawn, *whole = finetune.draw(cache, null_text, settings, 5, 0, Process(0, 1))
    x_0, eps, sigma, condition, embeds, pooled = whole
    parts = [finetune.draw(cache, null_text, settings, 5, 0, Process(i, 3)) for i in range(3)]
    for k, tensor in enumerate(whole, 1):
        assert torch.equal(torch.stack([p[k] for p in parts], 1).flatten(0, 1), tensor)
    assert [pair for shares in zip(*(p[0] for p in parts)) for pair in shares] == drawn
    assert not torch.equal(eps, finetune.draw(cache, null_text, settings, 6, 0, Process(0, 1))[2])
    dropped, unprompted = (condition == 0).all(2).all(1), (pooled == null_text[1]).all(1)
    assert 0 < dropped.sum() < 6 and 0 < unprompted.sum() < 6 and not torch.equal(dropped, unprompted)


def test_batch_size_does_not_change_the_grids(grids_run, flux, tmp_path, call):
    folder, _ = grids_run
    assert call(generate_grids, "--model", flux, *TINY_GRIDS, "--batch_size", 4, "--out", tmp_path)[0] == 0
    for i in range(6):
        ours, theirs = (dsd.open_image(path / f"{i:06d}.png") for path in (tmp_path, folder / "runs" / "grids"))
        assert difference(ours, theirs) <= 1


def test_seed_and_family_change_the_grids(flux, tmp_path, call):
    for name, options in (("a", []), ("b", ["--seed", 1]), ("c", ["--family", "relight"])):
        assert call(generate_grids, "--model", flux, "--count", 2, "--steps", 1, "--out", tmp_path / name, *options)[0] == 0
    a, b, c = (dsd.read_records(tmp_path / name / "grids.jsonl") for name in "abc")
    assert {r["prompt"] for r in a}.isdisjoint(r["prompt"] for r in b) and a[0]["seed"] != b[0]["seed"]
    assert all(r["family"] == "relight" and "scene" in r["prompt"] for r in c)


def test_grids_from_a_prompts_file(flux, tmp_path, call):
    (tmp_path / "prompts.txt").write_text(
        "a round horned critter | in space | in a cave | by moonlight | on the beach\n\n"
        "  a tall critter|at noon|at sunset|under neon|in the snow  \n")
    assert call(generate_grids, "--model", flux, "--steps", 1, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path)[0] == 0
    first, second = dsd.read_records(tmp_path / "grids.jsonl")
    assert first["subject"] == "a round horned critter"
    assert "the same round horned critter: " in first["prompt"] and "second in a cave" in first["prompt"]
    assert second["panel_prompts"][3] == "a tall critter in the snow"
    assert call(generate_grids, "--model", flux, "--steps", 1, "--count", 3, "--prompts", tmp_path / "prompts.txt",
                "--out", tmp_path)[0] == 0
    third = dsd.read_records(tmp_path / "grids.jsonl")[2]
    assert third["prompt"] == first["prompt"] and third["seed"] != first["seed"]  # drawn again, with other noise
    assert difference(*(dsd.open_image(tmp_path / r["file"]) for r in (first, third))) > 5


def test_sample_takes_the_released_layout_and_puts_the_files_name_into_the_prompt(pipe, flux, reference, tmp_path, call):
    state = {n: t.clone() for n, t in pipe.transformer.state_dict().items()}
    state |= {"c_embedder.weight": .1 * torch.ones_like(state["x_embedder.weight"]),
              "c_embedder.bias": torch.zeros_like(state["x_embedder.bias"])}
    (tmp_path / "released" / "transformer").mkdir(parents=True)
    save_file(state, tmp_path / "released" / "transformer" / "diffusion_pytorch_model.safetensors")
    q = "transformer_blocks.0.attn.to_q"
    width = state[f"{q}.weight"].shape[0]
    save_file({f"transformer.{q}.lora_A.weight": torch.ones(2, width), f"transformer.{q}.lora_B.weight": torch.zeros(width, 2)},
              tmp_path / "released" / dsd.ADAPTER_FILE)
    code, _, err = call(sample, "--model", flux, "--adapter", tmp_path / "released", "--image", reference, "--prompt",
                        "a {name} in space", "--steps", 1, "--out", tmp_path / "out")
    assert code == 0, err
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert json.loads(image.text["dsd"])["text"] == "a round horned critter in space"


def test_sample_enhances_prompts_with_what_a_vlm_sees(finetune_run, vlm, reference, flux, tmp_path, call):
    code, out, err = call(sample, "--model", flux, "--adapter", finetune_run[0] / "runs" / "adapter", "--image", reference,
                          "--prompt", "a critter in space", "--steps", 1, "--enhance", vlm, "--out", tmp_path)
    assert code == 0, err
    with Image.open(tmp_path / "0000.png") as image:
        told = json.loads(image.text["dsd"])
    assert told["prompt"] == "a critter in space" and told["text"].startswith("a critter in space, ")
    assert f"{reference}: " in out


def test_sample_says_what_of_a_long_prompt_is_not_read(finetune_run, reference, flux, tmp_path, call):
    _, _, err = call(sample, "--model", flux, "--adapter", finetune_run[0] / "runs" / "adapter", "--image", reference,
                     "--prompt", "red " * 70 + "hat", "a critter", "--steps", 1, "--out", tmp_path)
    assert err.count("warning") == 1 and "red hat" in err


# ---- curation with known answers -------------------------------------------------------------------------------------
YES = "subject: a critter\nimage 1: red\nimage 2: red\ncompare: colour same, ears same\nverdict: yes"
NO = "subject: a critter\nimage 1: red\nimage 2: blue\ncompare: colour different, ears same\nverdict: no"


def scripted(model, processor, cases, question, *rest):
    """A VLM that accepts the first pair of every six, rejects the next four, and answers nonsense to the last."""
    if question == curate.PAIR_QUESTION:
        return [[YES, NO, NO, NO, NO, "yes, they look the same"][i % 6] for i in range(len(cases))]
    return [f"caption {i}" for i in range(len(cases))]


@pytest.fixture
def curated(grids_run, tmp_path, monkeypatch, call):
    """curate.py on the six grids with these answers."""
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(curate, "ask", scripted)
    code, _, err = call(curate, "--grids", grids_run[0] / "runs" / "grids", "--tolerance", 0, "--out", tmp_path / "pairs")
    assert code == 0, err
    return tmp_path / "pairs"


def test_accepted_pairs_become_training_pairs_in_both_orders(curated):
    records = dsd.read_records(curated / "metadata.jsonl")
    assert [(r["grid"], r["reference_panel"], r["target_panel"]) for r in records] == [
        (g, *order) for g in range(6) for order in ((0, 1), (1, 0))]
    for r in records:
        assert r["prompt"].startswith("caption") and r["family"] in ("subject", "relight")
        assert (curated / r["reference_file_name"]).exists() and (curated / r["target_file_name"]).exists()
    summary = json.loads((curated / "summary.json").read_text())
    assert (summary["yes"], summary["no"], summary["unparsable"], summary["training_pairs"]) == (6, 24, 6, 12)
    assert summary["accept_rate"] == pytest.approx(1 / 6, abs=1e-3)
    assert (curated / "accepted.png").exists() and (curated / "rejected.png").exists()


def test_panels_are_cut_from_their_grid(curated, grids_run):
    panels = dsd.cut_grid(dsd.open_image(grids_run[0] / "runs" / "grids" / "000002.png"))
    for k, panel in enumerate(panels):
        assert dsd.open_image(curated / "images" / f"000002_{k}.png").tobytes() == panel.tobytes()


def test_datasets_reads_the_pairs_as_an_imagefolder(curated, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (see requirements.txt)")
    rows = datasets.load_dataset("imagefolder", data_dir=str(curated), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 12 and {"reference", "target", "prompt"} <= set(rows.column_names)
    records = dsd.read_records(curated / "metadata.jsonl")
    assert rows["prompt"][:] == [r["prompt"] for r in records]
    assert rows[0]["target"].convert("RGB").tobytes() == dsd.open_image(curated / records[0]["target_file_name"]).tobytes()


def test_finetune_trains_on_what_curate_wrote(curated, flux, tmp_path, call):
    code, _, err = call(finetune, "--model", flux, "--pairs", curated, "--steps", 1, "--rank", 4, "--out", tmp_path / "adapter")
    assert code == 0 and (tmp_path / "adapter" / dsd.ADAPTER_FILE).exists(), err


# ---- a chat model invents the subjects -------------------------------------------------------------------------------
ANSWER = ('{ "subject": "a red robot", "settings": [ "on a beach", "in the snow", "in a library", "on a boat" ] }')
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("models") / "llm", 80)


def make_chat_model(folder, steps):
    """A Llama of a few words that has learned for `steps` steps to answer every request with ANSWER."""
    words = ["<pad>", "</s>", "<unk>", "<answer>", *dict.fromkeys(ANSWER.split())]
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                        extra_special_tokens=["<answer>"], chat_template=TEMPLATE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=1))
    optimizer, answer = torch.optim.AdamW(model.parameters(), lr=3e-3), tokenizer(ANSWER + " </s>").input_ids
    for step in range(steps):
        references = "; ".join(generate_grids.REFERENCES[(step + i) % 9] for i in range(3))
        request = generate_grids.LLM_REQUEST.format(references=references)
        asked = tokenizer.apply_chat_template([{"role": "user", "content": request}], add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([[*asked, *answer]])
        labels = ids.clone()
        labels[:, :len(asked)] = -100
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_models_usable_answer_becomes_a_grid(chat_model, flux, tmp_path, call):
    code, out, err = call(generate_grids, "--model", flux, "--llm", chat_model, "--count", 1, "--steps", 1, "--out", tmp_path)
    assert code == 0, err
    record, = dsd.read_records(tmp_path / "grids.jsonl")
    assert record["subject"] == "a red robot" and record["panel_prompts"][2] == "a red robot in a library"
    assert "second in the snow" in record["prompt"] and "1 subjects" in out


def test_a_chat_models_answers_are_kept_and_not_asked_for_again(chat_model, flux, tmp_path, call, monkeypatch):
    run = [generate_grids, "--model", flux, "--llm", chat_model, "--count", 2, "--steps", 1, "--out", tmp_path]
    (tmp_path / "subjects.jsonl").write_text("")
    assert call(*run)[0] == 2  # a file of unknown origin
    (tmp_path / "subjects.jsonl").unlink()
    code, _, err = call(*run)
    assert code == 2 and "24 answers could not be used, 1 could" in err  # it repeats itself
    answers = dsd.read_records(tmp_path / "subjects.jsonl")
    assert len(answers) == 25
    usable = next(a["answer"] for a in answers if generate_grids.parse_llm(a["answer"]))
    dsd.write_records(tmp_path / "subjects.jsonl", [{"answer": usable}, {"answer": usable.replace("robot", "fox")}])
    monkeypatch.setattr(generate_grids.AutoModelForCausalLM, "from_pretrained", None)  # no model, no new answer
    code, _, err = call(*run)
    assert code == 0, err
    assert [r["subject"] for r in dsd.read_records(tmp_path / "grids.jsonl")] == ["a red robot", "a red fox"]


def test_a_chat_model_without_any_usable_answer_is_an_error(flux, tmp_path, call):
    llm = make_chat_model(tmp_path / "llm", 0)
    code, _, err = call(generate_grids, "--model", flux, "--llm", llm, "--count", 1, "--steps", 1, "--out", tmp_path / "grids")
    assert code == 2 and "21 answers could not be used, 0 could" in err and "Traceback" not in err
    assert not list(tmp_path.glob("grids/*.png"))


@pytest.mark.parametrize("answer, wanted", [
    (ANSWER, ("a red robot", ["on a beach", "in the snow", "in a library", "on a boat"])),
    (f"Sure!\n```json\n{ANSWER}\n```", ("a red robot", ["on a beach", "in the snow", "in a library", "on a boat"])),
    ("", None), ("a red robot", None), ("{}", None), (ANSWER[:-3], None), (ANSWER.replace("on a boat", "On a Beach"), None),
    (ANSWER.replace(', "on a boat"', ""), None), (ANSWER.replace("on a boat", "very " * 16), None),
    (ANSWER.replace("a red robot", ""), None), (ANSWER.replace("a red robot", "very " * 13), None),
    (ANSWER.replace('"on a boat"', "7"), None), ('["subject", "settings"]', None)])
def test_parse_llm_accepts_only_a_subject_and_four_different_settings(answer, wanted):
    assert generate_grids.parse_llm(answer) == wanted
