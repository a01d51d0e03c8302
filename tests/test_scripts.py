"""The four scripts called in this process: their options, what a second start does, several kinds of input."""

import dsd

import json
import shutil
import types

import pytest
import torch
from conftest import critter, noise_image, pictures, predict, words, written
from diffusers import FluxTransformer2DModel
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import difference
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import curate
import finetune
import generate_grids
import sample

SCRIPTS = {module.__name__: module for module in (generate_grids, curate, finetune, sample)}


@pytest.fixture
def run(call, commands):
    """run(script, *options): a step at its tiny settings, but for these options -> (stdout, stderr)."""

    def run(script, *options, code=0):
        done, out, err = call(SCRIPTS[script], *words(*commands[script]), *options)
        assert done == code, err
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
    assert (
        code == 0 and SCRIPTS[script].__doc__.split(".")[0] in out and out.count("(default: ") > 5
    )


# ---- a finished run --------------------------------------------------------------------------------------------------
def test_a_finished_run_started_again_changes_nothing(copied, commands, call):
    before = written(copied)
    for script, args in commands.items():
        assert call(SCRIPTS[script], *words(*args))[0] in ((0, 2) if script == "curate" else (0,))
    assert written(copied) == before


def test_a_larger_count_adds_grids_and_only_these_are_asked_about(
    copied, commands, call, run, monkeypatch
):
    grids, ask, asked = copied / "grids", curate.ask, []
    monkeypatch.setattr(curate, "ask", lambda *args: asked.append(len(args[2])) or ask(*args))
    before = pictures(grids)
    run("generate_grids", "--count", 7)
    after = pictures(grids)
    assert {name for name in after if after[name] != before.get(name)} == {
        "000006.png",
        "overview.png",
    }
    call(curate, *words(*commands["curate"]))
    assert len(dsd.read_records(grids / "grids.jsonl")) == 7 and asked[0] == 6  # pairs of one grid
    assert len(list((copied / "pairs" / "transcripts").iterdir())) == 7
    for name in ("000000.png", "000006.png"):
        (grids / name).unlink()
    run("generate_grids", "--count", 7)  # drawn again in the same batches
    assert pictures(grids) == after


def test_a_finished_training_is_lengthened_and_other_options_of_speed_may_change(
    copied, run, monkeypatch
):
    compiled, adapter = [], copied / "adapter"
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks", lambda *args, **more: compiled.append(1)
    )
    before, weights = (
        dsd.read_records(adapter / "log.jsonl"),
        (adapter / dsd.ADAPTER_FILE).read_bytes(),
    )
    run(
        "finetune",
        "--steps",
        8,
        "--save_every",
        3,
        "--validate_every",
        5,
        "--compile",
        "--gradient_checkpointing",
    )
    log = dsd.read_records(adapter / "log.jsonl")
    assert log[:6] == before and [r["step"] for r in log] == list(range(8)) and compiled
    assert (adapter / dsd.ADAPTER_FILE).read_bytes() != weights


@pytest.mark.parametrize(
    "script, change",
    [
        ("finetune", ["--rank", 8]),
        ("finetune", ["--seed", 1]),
        ("generate_grids", ["--steps", 5]),
        ("curate", ["--tolerance", 1]),
        ("sample", ["--seed", 3]),
    ],
)
def test_what_decides_the_result_makes_another_run_which_is_refused(copied, run, script, change):
    before = written(copied)
    assert "holds another run" in run(script, *change, code=2)[1] and written(copied) == before


def test_another_picture_behind_the_same_record_makes_another_run(pairs, tmp_path, run):
    shutil.copytree(pairs, tmp_path / "pairs")
    train = (
        "finetune",
        "--pairs",
        tmp_path / "pairs",
        "--steps",
        1,
        "--validation_grids",
        0,
        "--out",
    )
    run(*train, tmp_path / "one")
    noise_image(32, 32).save(tmp_path / "pairs" / "images" / "000002_1.png")
    assert "holds another run" in run(*train, tmp_path / "one", code=2)[1]
    run(*train, tmp_path / "two")
    one, two = (
        {file.name for file in (tmp_path / name / "cache").iterdir()} for name in ("one", "two")
    )
    assert len(one) == len(two) == 8 and len(one & two) == 6


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, precision", [([], "no"), (["--precision", "bf16"], "bf16")])
def test_a_cpu_trains_in_float32_unless_it_is_told_otherwise(
    flags, precision, commands, tmp_path, call
):
    others = [word for word in words(*commands["finetune"]) if word not in ("--precision", "no")]
    assert (
        call(finetune, *others, "--steps", 1, "--device", "cpu", "--out", tmp_path, *flags)[0] == 0
    )
    assert dsd.read_json(tmp_path / "settings.json")["precision"] == precision


@pytest.mark.parametrize(
    "wanted, grids", [(0, 0), (1, 1), (4, 1)]
)  # of four grids at most a quarter
def test_pairs_are_held_out_by_whole_grids(pairs, wanted, grids):
    training, held_out = finetune.read_pairs(
        types.SimpleNamespace(pairs=pairs, seed=0, validation_grids=wanted)
    )
    assert len(held_out) == 2 * grids and len(training) == 8 - 2 * grids
    assert {r["grid"] for r in training}.isdisjoint(r["grid"] for r in held_out)


@pytest.fixture
def encoded(pipe, pairs, tmp_path):
    """encoded(**options): all pairs, encoded, and draw(generator, ...), which draws one process's share of a batch."""

    def encoded(**options):
        args = types.SimpleNamespace(
            **dict(
                pairs=pairs,
                out=tmp_path,
                width=32,
                height=32,
                frames=2,
                validation_grids=0,
                seed=0,
                batch_size=2,
                shift=3,
                condition_dropout=0.1,
                prompt_dropout=0.1,
                prompt_tokens=None,
            )
            | options
        )
        records, _ = finetune.read_pairs(args)
        for pair in records:
            pair["cache"] = finetune.cache_file(args, pair)
        finetune.encode_pairs(pipe, records, args)

        def draw(generator, index=0, count=1):
            process = types.SimpleNamespace(device="cpu", process_index=index, num_processes=count)
            return finetune.draw_batch(
                records, dsd.encode_prompts(pipe, [""]), args, generator, process
            )

        return records, draw

    return encoded


@pytest.mark.parametrize("frames", [2, 1])
def test_the_cache_holds_both_canvases_and_the_prompt_of_every_pair(pipe, pairs, encoded, frames):
    records, _ = encoded(frames=frames)
    x_0, condition, (embeds, pooled) = finetune.read_cache(records)
    reference, target = (
        dsd.to_pixels([dsd.open_image(pairs / r[f"{side}_file_name"]) for r in records])
        for side in ("reference", "target")
    )
    if frames == 2:
        target, reference = (
            torch.cat([reference, target], 3),
            torch.cat([reference, 0 * reference - 1], 3),
        )
    wanted = (
        *(dsd.encode(pipe.vae, pixels) for pixels in (target, reference)),
        *dsd.encode_prompts(pipe, [r["prompt"] for r in records]),
    )
    for tensor, found in zip(wanted, (x_0, condition, embeds, pooled), strict=True):
        torch.testing.assert_close(found, tensor.cpu(), rtol=0.01, atol=0.01)  # it keeps bfloat16
    assert (x_0[0] - x_0[1]).abs().max() > 0.1 and (embeds[0] - embeds[1]).abs().max() > 0.1


def test_a_batch_is_drawn_alike_however_many_processes_share_it(pipe, encoded):
    """And dropout, noise and noise levels with it; half of the dropped references drop the prompt too."""
    _, draw = encoded(batch_size=30, condition_dropout=0.5, prompt_dropout=0.5)
    whole, other, *parts = (
        draw(torch.Generator().manual_seed(seed), index, count)
        for seed, index, count in ((5, 0, 1), (6, 0, 1), (5, 0, 3), (5, 1, 3), (5, 2, 3))
    )
    for tensor, shares in zip(whole, zip(*parts), strict=True):
        assert torch.equal(torch.stack(shares, 1).flatten(0, 1), tensor)
    assert not torch.equal(whole[1], other[1])
    without, unprompted = (
        (whole[3] == 0).all(2).all(1),
        (whole[5] == dsd.encode_prompts(pipe, [""])[1].cpu()).all(1),
    )
    assert (
        len({*zip(without.tolist(), unprompted.tolist())}) == 4
    )  # each with and without the other


def test_the_logged_loss_is_the_mean_over_the_accumulated_batches_computed_by_hand(
    pipe, encoded, tmp_path, run
):
    run(
        "finetune",
        "--steps",
        1,
        "--accumulate",
        3,
        "--frame_weights",
        1,
        3,
        "--validation_grids",
        0,
        "--out",
        tmp_path,
    )
    (_, draw), generator, frames = encoded(), torch.Generator().manual_seed(0), []
    for _ in range(3):
        x_0, eps, sigma, _, *text = draw(generator)
        x_sigma = (1 - sigma.view(-1, 1, 1)) * x_0 + sigma.view(-1, 1, 1) * eps
        error = predict(pipe.transformer, x_sigma, sigma, text, dsd.position_ids(8, 16)) - (
            eps - x_0
        )
        error = dsd.unpack(error**2, 8, 16)  # at the first step the student still is the teacher
        frames.append([error[..., :8].mean().item(), error[..., 8:].mean().item()])
    first, second = (sum(losses) / 3 for losses in zip(*frames))
    wanted = {"step": 0, "loss": (first + 3 * second) / 4, "frame_1": first, "frame_2": second}
    assert dsd.read_records(tmp_path / "log.jsonl") == [pytest.approx(wanted, abs=1e-4)]


def test_no_two_micro_batches_are_alike(tmp_path, run, monkeypatch):
    seen = []

    def batch_losses(model, batch, size, args):
        seen.append((batch[2].item(), batch[1].sum().item()))  # sigma and noise
        return sum(p.sum() for p in model.parameters() if p.requires_grad) * torch.zeros(3)

    monkeypatch.setattr(finetune, "batch_losses", batch_losses)
    run(
        "finetune",
        "--steps",
        2,
        "--batch_size",
        1,
        "--accumulate",
        70,
        "--validation_grids",
        0,
        "--out",
        tmp_path,
    )
    assert len(set(seen)) == len(seen) == 140


def test_gradient_checkpointing_leaves_the_losses_alone(chain, run, tmp_path):
    run("finetune", "--gradient_checkpointing", "--out", tmp_path / "adapter")
    logs = [
        dsd.read_records(folder / "log.jsonl")
        for folder in (chain[0] / "runs" / "adapter", tmp_path / "adapter")
    ]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_stopped_run_can_be_sampled(run, draw, tmp_path, monkeypatch):
    def stop(step, steps):
        if step == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(finetune, "learning_rate_share", stop)
    stopped = "\nstopped; the same command goes on from what is saved"
    run("finetune", "--save_every", 2, "--out", tmp_path / "adapter", code=stopped)
    assert draw("--adapter", tmp_path / "adapter")


# ---- grids -----------------------------------------------------------------------------------------------------------
def test_batch_size_does_not_change_the_grids_but_seed_and_family_do(chain, run, tmp_path):
    for name, *options in (
        ("a", "--batch_size", 4),
        ("b", "--count", 2, "--steps", 1, "--seed", 1),
        ("c", "--count", 2, "--steps", 1, "--family", "relight"),
    ):
        run("generate_grids", "--out", tmp_path / name, *options)
    for i in range(6):
        ours, theirs = (
            dsd.open_image(path / f"{i:06d}.png")
            for path in (tmp_path / "a", chain[0] / "runs" / "grids")
        )
        assert difference(ours, theirs) <= 1
    a, b, c = (dsd.read_records(tmp_path / name / "grids.jsonl") for name in "abc")
    assert {r["prompt"] for r in a}.isdisjoint(r["prompt"] for r in b) and a[0]["seed"] != b[0][
        "seed"
    ]
    assert all(r["family"] == "relight" and "scene" in r["prompt"] for r in c)


def test_grids_from_a_prompts_file(flux, tmp_path, call):
    out = tmp_path / "grids"
    (tmp_path / "prompts.txt").write_text(
        "a round horned critter | in space | in a cave | by moonlight | on the beach\n\n"
        "  a tall critter|at noon|at sunset|under neon|in the snow  \n"
    )
    draw = (
        generate_grids,
        "--model",
        flux,
        "--steps",
        1,
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        out,
    )
    assert call(*draw)[0] == 0
    first, second = dsd.read_records(out / "grids.jsonl")
    assert (
        first["subject"] == "round horned critter"
        and second["panel_prompts"][3] == "a tall critter in the snow"
    )
    assert (
        "the same round horned critter: " in first["prompt"]
        and "second in a cave" in first["prompt"]
    )
    assert call(*draw, "--count", 3)[0] == 0
    third = dsd.read_records(out / "grids.jsonl")[2]
    assert (
        third["prompt"] == first["prompt"] and third["seed"] != first["seed"]
    )  # drawn again, with other noise
    assert difference(*(dsd.open_image(out / r["file"]) for r in (first, third))) > 5


SETTINGS = ["on sand", "under snow", "in libraries", "aboard boats"]
ANSWER = json.dumps({"subject": "a red robot", "settings": SETTINGS})  # no word occurs twice


def make_chat_model(folder):
    """A Llama whose next word follows from the last one alone: when it is its turn it says ANSWER, else nothing."""
    words = ["<answer>", *ANSWER.split(), "<unk>", "</s>"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} <answer>{% endif %}"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=template
    ).save_pretrained(folder)
    n = len(words)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n,
            hidden_size=n,
            intermediate_size=n,
            num_hidden_layers=0,
            num_attention_heads=1,
            eos_token_id=n - 1,
            bos_token_id=None,
        )
    )
    model.model.embed_tokens.weight.data, model.lm_head.weight.data = (
        torch.eye(n),
        99 * torch.eye(n).roll(1, 0),
    )
    model.save_pretrained(folder)


def test_a_chat_model_invents_subjects_and_its_answers_are_kept(tmp_path, run, monkeypatch):
    make_chat_model(tmp_path / "llm")
    out = tmp_path / "grids"
    draw = "generate_grids", "--llm", tmp_path / "llm", "--steps", 1, "--out", out, "--count"
    run(*draw, 1)
    (record,) = dsd.read_records(out / "grids.jsonl")
    assert (record["subject"], record["panel_prompts"][2]) == (
        "red robot",
        "a red robot in libraries",
    )
    assert "second under snow" in record["prompt"]
    _, err = run(*draw, 2, code=2)
    assert "only 1 of " in err and "answers could be used" in err  # it repeats itself
    dsd.write_json(max((out / "subjects").iterdir()), {"answer": ANSWER.replace("robot", "fox")})
    monkeypatch.setattr(generate_grids, "load_llm", None)  # no model, no new answer
    run(*draw, 2)
    assert [r["subject"] for r in dsd.read_records(out / "grids.jsonl")] == ["red robot", "red fox"]


@pytest.mark.parametrize(
    "answer, usable",
    [
        (ANSWER, True),
        (f"Sure!\n```json\n{ANSWER}\n```", True),
        (f"{ANSWER}\nHope {{this}} helps }}", True),
        (f'<think>{{"subject": "a cat"}}? {ANSWER[:-2]}</think>{ANSWER}', True),
        (f'Like {{"subject": "...", "settings": ["..."]}}: {ANSWER}', True),
        (f"<think>{ANSWER}</think> I cannot", False),
        ("", False),
        ("a red robot", False),
        ("{}", False),
        (ANSWER[:-1], False),
        (ANSWER.replace("aboard boats", "On Sand"), False),
        (ANSWER.replace(', "aboard boats"', ""), False),
        (ANSWER.replace("aboard boats", "very " * 16), False),
        (ANSWER.replace("a red robot", ""), False),
        (ANSWER.replace("a red robot", "very " * 13), False),
        (ANSWER.replace('"aboard boats"', "7"), False),
        ('["subject", "settings"]', False),
    ],
)
def test_an_answer_counts_only_with_a_subject_and_four_different_settings(answer, usable):
    assert generate_grids.parse_llm(answer) == (("a red robot", SETTINGS) if usable else None)


# ---- curation with known answers -------------------------------------------------------------------------------------
YES = (
    "subject: a critter\nimage 1: red\nimage 2: red\ncompare: colour same, ears same\nverdict: yes"
)
NO = "subject: a critter\nimage 1: red\nimage 2: blue\ncompare: colour different, ears same\nverdict: no"
ANSWERS = [YES, NO, NO, f"subject: a critter {curate.TRUNCATED}", NO, "yes, they look the same"]
COPY = critter(7, [1, 0, 0])
GRIDS = {
    "subject": [
        critter(7, [scene, 0, 0]) for scene in range(4)
    ],  # the panels of two grids, by their family
    "relight": [Image.new("RGB", (32, 32), "red"), COPY, COPY, critter(99, [5, 0, 3])],
}


@pytest.fixture
def curated(tmp_path, monkeypatch, run):
    """curate.py on these grids, with a VLM that gives these answers: (folder, how to start it again)."""

    def ask(model, processor, cases, question, *rest):
        return [
            ANSWERS[i % 6] if question == curate.PAIR_QUESTION else f"caption {i}"
            for i in range(len(cases))
        ]

    for family, panels in GRIDS.items():
        make_image_grid(panels, 2, 2).save(tmp_path / f"{family}.png")
    dsd.write_json(
        tmp_path / "grids.jsonl",
        [
            {
                "file": f"{family}.png",
                "prompt": "a grid",
                "subject": "a critter",
                "family": family,
                "rows": 2,
                "columns": 2,
            }
            for family in GRIDS
        ],
    )
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(curate, "ask", ask)
    start = "curate", "--grids", tmp_path, "--tolerance", 0, "--out", tmp_path / "pairs"
    run(*start)
    return tmp_path / "pairs", start


def test_accepted_pairs_become_training_pairs_in_both_orders_and_some_are_set_aside(
    curated, run, tmp_path
):
    folder, _ = curated
    told = [dsd.read_json(file)["pairs"] for file in sorted((folder / "transcripts").iterdir())]
    assert [[r["verdict"] for r in some] for some in told] == [
        ["yes", "no", "no", "truncated", "no", "unparsable"],
        ["blank", "blank", "blank", "copies", "yes", "no"],
    ]
    assert [r["panels"] for r in told[1]] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    records = dsd.read_records(folder / "metadata.jsonl")
    assert [
        (r["family"], r["grid"], r["reference_panel"], r["target_panel"], r["prompt"])
        for r in records
    ] == [
        ("subject", 0, 0, 1, "caption 1"),
        ("subject", 0, 1, 0, "caption 0"),
        ("relight", 1, 1, 3, "caption 3"),
        ("relight", 1, 3, 1, "caption 2"),
    ]
    for r in records:
        assert (folder / r["reference_file_name"]).exists() and (
            folder / r["target_file_name"]
        ).exists()
    assert (
        dsd.read_json(folder / "summary.json").items()
        >= {
            "pairs": 12,
            "yes": 2,
            "no": 4,
            "truncated": 1,
            "unparsable": 1,
            "blank": 3,
            "copies": 1,
            "training_pairs": 4,
            "accept_rate": round(1 / 6, 4),
        }.items()
    )
    assert (folder / "accepted.png").exists() and (folder / "rejected.png").exists()
    run("finetune", "--pairs", folder, "--steps", 1, "--out", tmp_path / "adapter")


def test_datasets_reads_the_pairs_as_an_imagefolder(curated, tmp_path):
    datasets, (folder, _) = (
        pytest.importorskip("datasets", reason="datasets is not installed"),
        curated,
    )
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    records = dsd.read_records(folder / "metadata.jsonl")
    assert {"reference", "target"} <= set(rows.column_names) and rows["prompt"][:] == [
        r["prompt"] for r in records
    ]
    assert (
        difference(
            rows[0]["target"].convert("RGB"),
            dsd.open_image(folder / records[0]["target_file_name"]),
        )
        == 0
    )


def test_a_verdict_that_is_overruled_takes_effect_and_its_caption_is_made(curated, run):
    folder, start = curated
    for number, pair, verdict in ((0, 2, "yes"), (1, 4, "no")):
        file = folder / "transcripts" / f"{number:06d}.json"
        told = dsd.read_json(file)
        told["pairs"][pair]["verdict"] = verdict
        dsd.write_json(file, told)
    run(*start)
    records = dsd.read_records(folder / "metadata.jsonl")
    assert [(r["grid"], r["reference_panel"], r["target_panel"], r["prompt"]) for r in records] == [
        (0, 0, 1, "caption 1"),
        (0, 1, 0, "caption 0"),
        (0, 0, 3, "caption 1"),
        (0, 3, 0, "caption 0"),
    ]
    assert dsd.read_json(folder / "summary.json")["yes"] == 2


def test_a_panel_that_was_deleted_is_cut_again_without_a_model(curated, run, monkeypatch):
    folder, start = curated
    before = written(folder)
    (folder / "images" / "000001_2.png").unlink()
    monkeypatch.setattr(curate, "load_vlm", None)
    run(*start)
    assert written(folder) == before


# ---- sampling --------------------------------------------------------------------------------------------------------
@pytest.fixture
def draw(run, tmp_path):
    """draw(*options): sample.py, one step and one seed -> what the pictures tell of themselves."""

    def draw(*options, out="out"):
        run(
            "sample",
            "--prompt",
            "a {name} in space",
            "--steps",
            1,
            "--seed",
            0,
            "--out",
            tmp_path / out,
            *options,
        )
        return [
            json.loads(Image.open(file).text["dsd"])
            for file in sorted((tmp_path / out).glob("0*.png"))
        ]

    return draw


def test_sample_takes_a_folder_of_pictures_the_adapters_file_and_other_proportions(
    copied, reference, tmp_path, draw
):
    (tmp_path / "in").mkdir()
    shutil.copy(reference, tmp_path / "in" / "a.png")
    critter(5, [0, 0, 0]).save(tmp_path / "in" / "b.jpg")
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path / "in" / name).write_text("no picture")
    adapter = copied / "adapter" / dsd.ADAPTER_FILE
    for fit in ("crop", "pad"):
        told = draw("--adapter", adapter, "--image", tmp_path / "in", "--fit", fit, out=fit)
        assert [t["text"] for t in told] == ["a a in space", "a b in space"]
    a, b = (
        [dsd.open_image(tmp_path / fit / f"000{i}.png") for fit in ("crop", "pad")] for i in (0, 1)
    )
    assert difference(*a) > 0 == difference(*b)  # b is square


def test_an_adapter_says_how_it_is_to_be_sampled_and_flags_go_first(copied, tmp_path, draw):
    file = copied / "adapter" / dsd.ADAPTER_FILE
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    config["dsd"] = {
        "frames": 1,
        "width": 48,
        "height": 32,
        "image_guidance": 1.25,
        "text_guidance": 1.75,
    }
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(config)})
    (told,) = draw("--text_guidance", 1, "--prompt", "a critter")
    assert (told["image_guidance"], told["text_guidance"]) == (1.25, 1)
    assert dsd.open_image(tmp_path / "out" / "0000.png").size == (48, 32)


def test_sample_takes_the_released_layout(pipe, tmp_path, draw):
    state = {n: t.clone() for n, t in pipe.transformer.state_dict().items()}
    q, width = "transformer.transformer_blocks.0.attn.to_q", len(state["x_embedder.bias"])
    state["c_embedder.weight"] = 0.1 * torch.ones_like(state["x_embedder.weight"])
    state["c_embedder.bias"] = torch.zeros(width)
    (tmp_path / "transformer").mkdir()
    save_file(state, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(
        {f"{q}.lora_A.weight": torch.ones(2, width), f"{q}.lora_B.weight": torch.zeros(width, 2)},
        tmp_path / dsd.ADAPTER_FILE,
    )
    assert [told["text"] for told in draw("--adapter", tmp_path)] == [
        "a round horned critter in space"
    ]


def test_enhanced_prompts_and_what_of_a_long_one_is_not_read(
    copied, vlm, reference, tmp_path, run, draw, monkeypatch
):
    options = "--prompt", "a critter in space", "red " * 70 + "hat", "--enhance", vlm
    told, _ = draw(*options)
    assert told["prompt"] == "a critter in space" and told["text"].startswith(
        "a critter in space, "
    )
    monkeypatch.setattr(curate, "load_vlm", None)  # what it saw was kept
    (tmp_path / "out" / "0001.png").unlink()
    out, err = run("sample", *options, "--steps", 1, "--seed", 0, "--out", tmp_path / "out")
    assert f"{reference.as_posix()}: " in out and err.count("warning") == 1 and "red hat" in err
