"""The four scripts called in this process: their options, what a second start does, several kinds of input."""

import dsd  # first: see its head

import json
import shutil
import types

import pytest
import torch
from conftest import critter, noise_image, pictures, predict, written
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import difference
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import curate
import finetune
import generate_grids
import sample

SCRIPTS = {module.__name__: module for module in (generate_grids, curate, finetune, sample)}


@pytest.fixture
def run(call):
    """run(script, *args): its exit code must be 0; returns (stdout, stderr)."""
    def run(script, *args):
        code, out, err = call(SCRIPTS[script], *args)
        assert code == 0, err
        return out, err
    return run


@pytest.fixture
def copied(chain, tmp_path, monkeypatch):
    """A copy of the folder in which the four steps have run, as the working directory: its runs/."""
    shutil.copytree(chain[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring_and_every_option(script, call):
    code, out, _ = call(SCRIPTS[script], "--help")
    assert code == 0 and SCRIPTS[script].__doc__.split(".")[0] in out and out.count("(default: ") > 5


# ---- a finished run --------------------------------------------------------------------------------------------------
def test_a_finished_run_started_again_changes_nothing(copied, commands, call):
    before = written(copied)
    for script, args in commands.items():
        assert call(SCRIPTS[script], *args)[0] in ((0, 2) if script == "curate" else (0,))
    assert written(copied) == before


def test_a_larger_count_adds_grids_and_only_these_are_asked_about(copied, commands, call, run, monkeypatch):
    before, ask, asked = pictures(copied / "grids"), curate.ask, []
    monkeypatch.setattr(curate, "ask", lambda vlm, processor, cases, *rest: asked.append(len(cases)) or ask(
        vlm, processor, cases, *rest))
    run("generate_grids", *commands["generate_grids"], "--count", 7)
    after = pictures(copied / "grids")
    assert set(after) - set(before) == {"000006.png"} and all(
        after[name] == before[name] for name in before if name != "overview.png")
    call(curate, *commands["curate"])
    assert len(dsd.read_records(copied / "grids" / "grids.jsonl")) == 7 and asked[0] == 6  # pairs of one grid
    assert len(list((copied / "pairs" / "transcripts").iterdir())) == 7
    lost = [copied / "grids" / name for name in ("000000.png", "000006.png")]
    for file in lost:
        file.unlink()
    run("generate_grids", *commands["generate_grids"], "--count", 7)  # drawn again in the same batches
    assert pictures(copied / "grids") == after


def test_a_finished_training_is_lengthened_and_other_options_of_speed_may_change(copied, commands, run, monkeypatch):
    compiled, adapter = [], copied / "adapter"
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda *args, **more: compiled.append(1))
    before, weights = dsd.read_records(adapter / "log.jsonl"), (adapter / dsd.ADAPTER_FILE).read_bytes()
    run("finetune", *commands["finetune"], "--steps", 8, "--save_every", 3, "--validate_every", 5, "--compile",
        "--gradient_checkpointing")
    log = dsd.read_records(adapter / "log.jsonl")
    assert log[:6] == before and [r["step"] for r in log] == list(range(8)) and compiled
    assert (adapter / dsd.ADAPTER_FILE).read_bytes() != weights


@pytest.mark.parametrize("script, change", [
    ("finetune", ["--rank", 8]), ("finetune", ["--seed", 1]), ("generate_grids", ["--steps", 5]),
    ("curate", ["--tolerance", 1]), ("sample", ["--seed", 3])])
def test_what_decides_the_result_makes_another_run_which_is_refused(copied, commands, call, script, change):
    before = written(copied)
    code, _, err = call(SCRIPTS[script], *commands[script], *change)
    assert code == 2 and "holds another run" in err and written(copied) == before


def test_another_picture_behind_the_same_record_makes_another_run(pairs, flux, tmp_path, call):
    shutil.copytree(pairs, tmp_path / "pairs")
    train = finetune, "--model", flux, "--pairs", tmp_path / "pairs", "--steps", 1, "--rank", 4, "--batch_size", 1
    assert call(*train, "--out", tmp_path / "one")[0] == 0
    noise_image(32, 32).save(tmp_path / "pairs" / "images" / "000002_1.png")
    code, _, err = call(*train, "--out", tmp_path / "one")
    assert code == 2 and "holds another run" in err
    assert call(*train, "--out", tmp_path / "two")[0] == 0
    one, two = ({file.name for file in (tmp_path / name / "cache").iterdir()} for name in ("one", "two"))
    assert len(one) == len(two) == 8 and len(one & two) == 6


@pytest.mark.parametrize("flags, precision", [([], "no"), (["--precision", "bf16"], "bf16")])
def test_a_cpu_trains_in_float32_unless_it_is_told_otherwise(flags, precision, pairs, flux, tmp_path, run):
    run("finetune", "--model", flux, "--pairs", pairs, "--rank", 4, "--batch_size", 1, "--validation_grids", 0, "--steps",
        1, "--device", "cpu", "--out", tmp_path, *flags)
    assert dsd.read_json(tmp_path / "settings.json")["precision"] == precision


# ---- training --------------------------------------------------------------------------------------------------------
def arguments(pairs, out, **changes):
    """What finetune.py's functions read of its options, and the pairs with their places in the cache."""
    args = types.SimpleNamespace(**{
        "pairs": pairs, "out": out, "width": 32, "height": 32, "frames": 2, "validation_grids": 4, "seed": 0,
        "batch_size": 6,
        "shift": 3.0, "condition_dropout": .1, "prompt_dropout": .1, "prompt_tokens": None} | changes)
    training, held_out = finetune.read_pairs(args)
    for pair in [*training, *held_out]:
        pair["cache"] = finetune.cache_file(args, pair)
    return args, training, held_out


def process(index=0, count=1):
    """One of several processes, as far as finetune.py's functions look at it."""
    return types.SimpleNamespace(device="cpu", process_index=index, num_processes=count)


@pytest.mark.parametrize("wanted, grids", [(0, 0), (1, 1), (4, 1)])  # of four grids at most a quarter
def test_pairs_are_held_out_by_whole_grids(pairs, tmp_path, wanted, grids):
    _, training, held_out = arguments(pairs, tmp_path, validation_grids=wanted)
    assert len(held_out) == 2 * grids and len(training) == 8 - 2 * grids
    assert {r["grid"] for r in training}.isdisjoint(r["grid"] for r in held_out)


@pytest.mark.parametrize("frames", [2, 1])
def test_the_cache_holds_both_canvases_and_the_prompt_of_every_pair(pipe, pairs, tmp_path, frames):
    args, records, _ = arguments(pairs, tmp_path, frames=frames)
    finetune.encode_pairs(pipe, records, args)
    x_0, condition, (embeds, pooled) = finetune.read_cache(records)
    reference, target = (dsd.to_pixels([dsd.open_image(pairs / r[f"{side}_file_name"]) for r in records])
                         for side in ("reference", "target"))
    if frames == 2:
        target, reference = torch.cat([reference, target], 3), torch.cat([reference, 0 * reference - 1], 3)
    close = {"rtol": .01, "atol": .01}  # it keeps bfloat16
    torch.testing.assert_close(x_0, dsd.encode(pipe.vae, target).cpu(), **close)
    torch.testing.assert_close(condition, dsd.encode(pipe.vae, reference).cpu(), **close)
    for wanted, found in zip(dsd.encode_prompts(pipe, [r["prompt"] for r in records]), (embeds, pooled)):
        torch.testing.assert_close(found, wanted.cpu(), **close)
    assert (x_0[0] - x_0[1]).abs().max() > .1 and (embeds[0] - embeds[1]).abs().max() > .1


def test_a_batch_is_drawn_alike_however_many_processes_share_it(pipe, pairs, tmp_path):
    """And dropout, noise and noise levels with it; half of the dropped references drop the prompt too."""
    args, records, _ = arguments(pairs, tmp_path, batch_size=30, condition_dropout=.5, prompt_dropout=.5)
    finetune.encode_pairs(pipe, records, args)
    null_text = dsd.encode_prompts(pipe, [""])

    def draw(index, count, seed=5):
        return finetune.draw_batch(records, null_text, args, torch.Generator().manual_seed(seed), process(index, count))
    whole, parts = draw(0, 1), [draw(i, 3) for i in range(3)]
    for k, tensor in enumerate(whole):
        assert torch.equal(torch.stack([part[k] for part in parts], 1).flatten(0, 1), tensor)
    assert not torch.equal(whole[1], draw(0, 1, seed=6)[1])
    without, unprompted = (whole[3] == 0).all(2).all(1), (whole[5] == null_text[1].cpu()).all(1)
    for a, b in ((without, unprompted), (without, ~unprompted), (~without, unprompted), (~without, ~unprompted)):
        assert (a & b).any()


def test_the_logged_loss_is_the_mean_over_the_accumulated_batches_computed_by_hand(pipe, pairs, flux, tmp_path, run):
    run("finetune", "--model", flux, "--pairs", pairs, "--steps", 1, "--rank", 4, "--precision", "no", "--batch_size",
        2,
        "--accumulate", 3, "--frame_weights", 1, 3, "--validation_grids", 0, "--out", tmp_path)
    args, records, _ = arguments(pairs, tmp_path, batch_size=2, validation_grids=0)
    frames, generator = [], torch.Generator().manual_seed(0)
    for _ in range(3):
        x_0, eps, sigma, _, *text = finetune.draw_batch(records, dsd.encode_prompts(pipe, [""]), args, generator,
                                                        process())
        x_sigma = (1 - sigma.view(-1, 1, 1)) * x_0 + sigma.view(-1, 1, 1) * eps
        error = predict(pipe.transformer, x_sigma, sigma, text, dsd.position_ids(8, 16)) - (eps - x_0)
        error = dsd.unpack(error ** 2, 8, 16)  # at the first step the student still is the teacher
        frames.append([error[..., :8].mean().item(), error[..., 8:].mean().item()])
    first, second = (sum(losses) / 3 for losses in zip(*frames))
    log, = dsd.read_records(tmp_path / "log.jsonl")
    assert log == pytest.approx({"step": 0, "loss": (first + 3 * second) / 4, "frame_1": first, "frame_2": second},
                                abs=1e-4)


def test_no_two_micro_batches_are_alike(pairs, flux, tmp_path, run, monkeypatch):
    seen = []

    def batch_losses(model, batch, args):
        seen.append((batch[2].item(), batch[1].sum().item()))  # sigma and noise
        return sum(p.sum() for p in model.parameters() if p.requires_grad) * torch.zeros(3)
    monkeypatch.setattr(finetune, "batch_losses", batch_losses)
    run("finetune", "--model", flux, "--pairs", pairs, "--steps", 2, "--rank", 1, "--batch_size", 1, "--accumulate", 70,
        "--validation_grids", 0, "--out", tmp_path)
    assert len(set(seen)) == len(seen) == 140


def test_gradient_checkpointing_leaves_the_losses_alone_and_a_stopped_run_can_be_sampled(
        chain, commands, run, tmp_path, reference, flux):
    run("finetune", *commands["finetune"], "--gradient_checkpointing", "--out", tmp_path / "adapter")
    logs = [dsd.read_records(folder / "log.jsonl") for folder in (chain[0] / "runs" / "adapter", tmp_path / "adapter")]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    (tmp_path / "adapter" / dsd.ADAPTER_FILE).unlink()
    run("sample", "--model", flux, "--adapter", tmp_path / "adapter" / "checkpoint", "--image", reference, "--prompt",
        "a critter", "--steps", 1, "--out", tmp_path / "samples")
    assert (tmp_path / "samples" / "0000.png").exists()


# ---- grids -----------------------------------------------------------------------------------------------------------
def test_batch_size_does_not_change_the_grids_but_seed_and_family_do(chain, commands, run, tmp_path):
    run("generate_grids", *commands["generate_grids"], "--batch_size", 4, "--out", tmp_path / "a")
    for i in range(6):
        ours, theirs = (dsd.open_image(path / f"{i:06d}.png") for path in (tmp_path / "a", chain[0] / "runs" / "grids"))
        assert difference(ours, theirs) <= 1
    for name, *options in (("b", "--seed", 1), ("c", "--family", "relight")):
        run("generate_grids", *commands["generate_grids"], "--count", 2, "--steps", 1, "--out", tmp_path / name,
            *options)
    a, b, c = (dsd.read_records(tmp_path / name / "grids.jsonl") for name in "abc")
    assert {r["prompt"] for r in a}.isdisjoint(r["prompt"] for r in b) and a[0]["seed"] != b[0]["seed"]
    assert all(r["family"] == "relight" and "scene" in r["prompt"] for r in c)


def test_grids_from_a_prompts_file(flux, tmp_path, run):
    (tmp_path / "prompts.txt").write_text(
        "a round horned critter | in space | in a cave | by moonlight | on the beach\n\n"
        "  a tall critter|at noon|at sunset|under neon|in the snow  \n")
    draw = ("generate_grids", "--model", flux, "--steps", 1, "--prompts", tmp_path / "prompts.txt", "--out",
            tmp_path / "grids")
    run(*draw)
    first, second = dsd.read_records(tmp_path / "grids" / "grids.jsonl")
    assert first["subject"] == "round horned critter" and second["panel_prompts"][3] == "a tall critter in the snow"
    assert "the same round horned critter: " in first["prompt"] and "second in a cave" in first["prompt"]
    run(*draw, "--count", 3)
    third = dsd.read_records(tmp_path / "grids" / "grids.jsonl")[2]
    assert third["prompt"] == first["prompt"] and third["seed"] != first["seed"]  # drawn again, with other noise
    assert difference(*(dsd.open_image(tmp_path / "grids" / r["file"]) for r in (first, third))) > 5


ANSWER = '{ "subject": "a red robot", "settings": [ "on a beach", "in the snow", "in a library", "on a boat" ] }'
SETTINGS = ["on a beach", "in the snow", "in a library", "on a boat"]
TEMPLATE = ("{% for message in messages %}{{ message['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}<answer>{% endif %}")


def make_chat_model(folder, steps):
    """A Llama of a few words that has learned for `steps` steps to answer every request with ANSWER."""
    words = ["<pad>", "</s>", "<unk>", "<answer>", *dict.fromkeys(ANSWER.split())]
    backend = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>",
                                        unk_token="<unk>",
                                        extra_special_tokens=["<answer>"], chat_template=TEMPLATE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=1))
    optimizer, answer = torch.optim.AdamW(model.parameters(), lr=3e-3), tokenizer(ANSWER + " </s>").input_ids
    for step in range(steps):
        captions = "; ".join(generate_grids.CAPTIONS[(step + i) % 9] for i in range(3))
        request = [{"role": "user", "content": generate_grids.LLM_REQUEST.format(captions=captions)}]
        asked = tokenizer.apply_chat_template(request, add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([[*asked, *answer]])
        model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(asked), -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_model_invents_subjects_and_its_answers_are_kept(flux, tmp_path, call, run, monkeypatch):
    llm, out = make_chat_model(tmp_path / "llm", 80), tmp_path / "grids"
    draw = "generate_grids", "--model", flux, "--llm", llm, "--steps", 1, "--out", out
    said, _ = run(*draw, "--count", 1)
    record, = dsd.read_records(out / "grids.jsonl")
    assert (record["subject"], record["panel_prompts"][2]) == ("red robot", "a red robot in a library")
    assert "second in the snow" in record["prompt"]
    code, _, err = call(generate_grids, *draw[1:], "--count", 2)
    assert code == 2 and "only 1 of " in err and "answers could be used" in err  # it repeats itself
    answers = sorted((out / "subjects").iterdir())
    usable = next(filter(generate_grids.parse_llm, (dsd.read_json(file)["answer"] for file in answers)))
    dsd.write_json(answers[-1], {"answer": usable.replace("robot", "fox")})
    monkeypatch.setattr(generate_grids, "load_llm", None)  # no model, no new answer
    run(*draw, "--count", 2)
    assert [r["subject"] for r in dsd.read_records(out / "grids.jsonl")] == ["red robot", "red fox"]


@pytest.mark.parametrize("answer, wanted", [
    (ANSWER, ("a red robot", SETTINGS)), (f"Sure!\n```json\n{ANSWER}\n```", ("a red robot", SETTINGS)),
    ("", None), ("a red robot", None), ("{}", None), (ANSWER[:-3], None),
    (ANSWER.replace("on a boat", "On a Beach"), None),
    (ANSWER.replace(', "on a boat"', ""), None), (ANSWER.replace("on a boat", "very " * 16), None),
    (ANSWER.replace("a red robot", ""), None), (ANSWER.replace("a red robot", "very " * 13), None),
    (ANSWER.replace('"on a boat"', "7"), None), ('["subject", "settings"]', None)])
def test_an_answer_counts_only_with_a_subject_and_four_different_settings(answer, wanted):
    assert generate_grids.parse_llm(answer) == wanted


# ---- curation with known answers -------------------------------------------------------------------------------------
YES = "subject: a critter\nimage 1: red\nimage 2: red\ncompare: colour same, ears same\nverdict: yes"
NO = "subject: a critter\nimage 1: red\nimage 2: blue\ncompare: colour different, ears same\nverdict: no"
ANSWERS = [YES, NO, NO, f"subject: a critter {curate.TRUNCATED}", NO, "yes, they look the same"]


def scripted(model, processor, cases, question, *rest):
    """A VLM that gives these answers to the six pairs of each grid."""
    if question == curate.PAIR_QUESTION:
        return [ANSWERS[i % 6] for i in range(len(cases))]
    return [f"caption {i}" for i in range(len(cases))]


@pytest.fixture
def curated(chain, tmp_path, monkeypatch, run):
    """curate.py on the six grids with these answers: (folder, how to start it again)."""
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(curate, "ask", scripted)
    monkeypatch.setattr(curate, "set_aside", lambda a, b: None)  # the teacher may have drawn anything
    start = "curate", "--grids", chain[0] / "runs" / "grids", "--out", tmp_path / "pairs"
    run(*start)
    return tmp_path / "pairs", start


def test_accepted_pairs_become_training_pairs_in_both_orders(curated, run, flux, tmp_path):
    folder, _ = curated
    records = dsd.read_records(folder / "metadata.jsonl")
    assert [(r["grid"], r["reference_panel"], r["target_panel"]) for r in records] == [
        (g, *order) for g in range(6) for order in ((0, 1), (1, 0))]
    for r in records:
        assert r["prompt"].startswith("caption") and r["family"] in ("subject", "relight")
        assert (folder / r["reference_file_name"]).exists() and (folder / r["target_file_name"]).exists()
    summary = dsd.read_json(folder / "summary.json")
    counted = {"pairs": 36, "yes": 6, "no": 18, "truncated": 6, "unparsable": 6, "training_pairs": 12}
    assert summary.items() >= counted.items()
    assert summary["accept_rate"] == pytest.approx(1 / 6, abs=1e-3)
    assert (folder / "accepted.png").exists() and (folder / "rejected.png").exists()
    run("finetune", "--model", flux, "--pairs", folder, "--steps", 1, "--rank", 4, "--batch_size", 1, "--out",
        tmp_path / "a")


def test_datasets_reads_the_pairs_as_an_imagefolder(curated, tmp_path):
    datasets, (folder, _) = pytest.importorskip("datasets", reason="datasets is not installed"), curated
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    records = dsd.read_records(folder / "metadata.jsonl")
    assert {"reference", "target"} <= set(rows.column_names) and rows["prompt"][:] == [r["prompt"] for r in records]
    assert difference(rows[0]["target"].convert("RGB"), dsd.open_image(folder / records[0]["target_file_name"])) == 0


def test_a_verdict_that_is_overruled_takes_effect_and_its_caption_is_made(curated, run):
    folder, start = curated
    for number, pair, verdict in ((0, 2, "yes"), (3, 0, "no")):
        file = folder / "transcripts" / f"{number:06d}.json"
        told = dsd.read_json(file)
        told["pairs"][pair]["verdict"] = verdict
        dsd.write_json(file, told)
    run(*start)
    records = dsd.read_records(folder / "metadata.jsonl")
    assert [(r["reference_panel"], r["target_panel"]) for r in records if r["grid"] == 0] == [(0, 1), (1, 0), (0, 3),
                                                                                              (3, 0)]
    assert all(r["prompt"].startswith("caption") for r in records) and not [r for r in records if r["grid"] == 3]
    assert dsd.read_json(folder / "summary.json")["yes"] == 6


def test_panels_with_nothing_to_see_and_copies_are_set_aside_before_the_vlm_is_asked(tmp_path, run, monkeypatch):
    grid = Image.new("RGB", (64, 64), "red")  # panels: one colour, a critter, the same critter, another one
    for k, panel in ((1, critter(7, [1, 0, 0])), (2, critter(7, [1, 0, 0])), (3, critter(99, [5, 0, 3]))):
        grid.paste(panel, (k % 2 * 32, k // 2 * 32))
    grid.save(tmp_path / "000000.png")
    dsd.write_json(tmp_path / "grids.jsonl", [{"file": "000000.png", "prompt": "a grid", "subject": "a critter",
                                               "family": "subject", "rows": 2, "columns": 2}])
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(curate, "ask", scripted)
    run("curate", "--grids", tmp_path, "--out", tmp_path / "pairs")
    told = dsd.read_json(tmp_path / "pairs" / "transcripts" / "000000.json")["pairs"]
    assert [(*r["panels"], r["verdict"]) for r in told] == [
        (0, 1, "blank"), (0, 2, "blank"), (0, 3, "blank"), (1, 2, "copies"), (1, 3, "yes"), (2, 3, "no")]
    summary = dsd.read_json(tmp_path / "pairs" / "summary.json")
    assert (summary["blank"], summary["copies"], summary["yes"], summary["no"]) == (3, 1, 1, 1)


# ---- sampling --------------------------------------------------------------------------------------------------------
def settings_of(picture):
    with Image.open(picture) as image:
        return json.loads(image.text["dsd"])


def test_sample_takes_a_folder_of_pictures_the_adapters_file_and_other_proportions(chain, flux, reference, tmp_path,
                                                                                   run):
    (tmp_path / "in").mkdir()
    shutil.copy(reference, tmp_path / "in" / "a.png")
    critter(5, [0, 0, 0]).save(tmp_path / "in" / "b.jpg")
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path / "in" / name).write_text("no picture")
    drawn = {}
    for fit in ("crop", "pad"):
        run("sample", "--model", flux, "--adapter", chain[0] / "runs" / "adapter" / dsd.ADAPTER_FILE, "--image",
            tmp_path / "in",
            "--prompt", "a {name} in space", "--steps", 1, "--fit", fit, "--out", tmp_path / fit)
        assert [settings_of(tmp_path / fit / f"{i:04d}.png")["text"] for i in (0, 1)] == ["a a in space",
                                                                                          "a b in space"]
        drawn[fit] = pictures(tmp_path / fit)
    assert len(drawn["pad"]) == 3 and drawn["crop"]["0000.png"] != drawn["pad"]["0000.png"]
    assert difference(*[dsd.open_image(tmp_path / fit / "0001.png") for fit in drawn]) == 0  # it is square


def test_an_adapter_says_how_it_is_to_be_sampled_and_flags_go_first(chain, flux, reference, tmp_path, run):
    file, trained = tmp_path / "adapter" / dsd.ADAPTER_FILE, chain[0] / "runs" / "adapter" / dsd.ADAPTER_FILE
    with safe_open(trained, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    config["dsd"] = {"frames": 1, "width": 48, "height": 32, "image_guidance": 1.25, "text_guidance": 1.75}
    file.parent.mkdir()
    save_file(load_file(trained), file, {"lora_adapter_metadata": json.dumps(config)})
    run("sample", "--model", flux, "--adapter", file.parent, "--image", reference, "--prompt", "a critter", "--steps",
        1,
        "--text_guidance", 1, "--out", tmp_path / "out")
    told, kept = settings_of(tmp_path / "out" / "0000.png"), dsd.read_json(tmp_path / "out" / "settings.json")
    assert (told["image_guidance"], told["text_guidance"], kept["frames"]) == (1.25, 1, 1)
    assert dsd.open_image(tmp_path / "out" / "0000.png").size == (48, 32)


def test_sample_takes_the_released_layout(pipe, flux, reference, tmp_path, run):
    state = {n: t.clone() for n, t in pipe.transformer.state_dict().items()}
    state |= {"c_embedder.weight": .1 * torch.ones_like(state["x_embedder.weight"]),
              "c_embedder.bias": torch.zeros_like(state["x_embedder.bias"])}
    (tmp_path / "released" / "transformer").mkdir(parents=True)
    q, width = "transformer_blocks.0.attn.to_q", state["x_embedder.bias"].shape[0]
    state |= {f"{q}.lora_A.default.weight": torch.ones(2, width), f"{q}.lora_B.default.weight": torch.zeros(width, 2)}
    save_file(state, tmp_path / "released" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({f"transformer.{q}.lora_A.weight": torch.ones(2, width),
               f"transformer.{q}.lora_B.weight": torch.zeros(width, 2)},
              tmp_path / "released" / dsd.ADAPTER_FILE)
    run("sample", "--model", flux, "--adapter", tmp_path / "released", "--image", reference, "--prompt",
        "a {name} in space",
        "--steps", 1, "--out", tmp_path / "out")
    assert settings_of(tmp_path / "out" / "0000.png")["text"] == "a round horned critter in space"


def test_sample_enhances_prompts_and_says_what_of_a_long_one_is_not_read(chain, vlm, reference, flux, tmp_path, run,
                                                                         monkeypatch):
    draw = ["sample", "--model", flux, "--adapter", chain[0] / "runs" / "adapter", "--image", reference, "--prompt",
            "a critter in space", "red " * 70 + "hat", "--steps", 1, "--enhance", vlm, "--out", tmp_path]
    out, err = run(*draw)
    told = settings_of(tmp_path / "0000.png")
    assert told["prompt"] == "a critter in space" and told["text"].startswith("a critter in space, ")
    assert f"{reference.as_posix()}: " in out and err.count("warning") == 1 and "red hat" in err
    monkeypatch.setattr(curate, "load_vlm", None)  # what it saw was kept
    (tmp_path / "0001.png").unlink()
    run(*draw)
