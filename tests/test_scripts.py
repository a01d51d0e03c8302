"""The four scripts called in this process: options, a second start, several kinds of input."""

import dsd

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from conftest import critter, difference, noise_image, pictures, predict, written
from diffusers import FluxTransformer2DModel
from diffusers.utils import make_image_grid
from PIL import Image
from random_models import make_chat_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import curate
import finetune
import generate_grids
import sample

SCRIPTS = [generate_grids, curate, finetune, sample]


@pytest.fixture
def step(run, commands):
    """step(script, *options, code=0): one of the four at tiny settings, but for these options."""

    def step(script, *options, code=0):
        return run(script, *commands[script.__name__], *options, code=code)

    return step


@pytest.fixture
def copied(chain, tmp_path, monkeypatch):
    """runs/ in a copy of the folder in which the four steps have run, the working directory."""
    shutil.copytree(chain[0] / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring_and_every_option(script, run):
    out = run(script, "--help").out
    assert script.__doc__.split(".")[0] in out and out.count("(default: ") > 5


# ---- a finished run ------------------------------------------------------------------------------
def test_a_finished_run_started_again_changes_nothing(copied, step):
    before = written(copied)
    for script in SCRIPTS:
        step(script)
    assert written(copied) == before


def test_a_larger_count_adds_grids_and_only_these_are_asked_about(copied, step, monkeypatch):
    grids, ask, asked = copied / "grids", curate.ask, []
    monkeypatch.setattr(curate, "ask", lambda *args: asked.append(len(args[2])) or ask(*args))
    before = pictures(grids)
    step(generate_grids, "--count 7")
    after = pictures(grids)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"000006.png", "overview.png"}
    step(curate)
    assert len(dsd.read_records(grids / "grids.jsonl")) == 7
    assert asked[0] == 6  # pairs of one grid
    assert len(list((copied / "pairs" / "transcripts").iterdir())) == 7
    for name in ("000000.png", "000006.png"):
        (grids / name).unlink()
    step(generate_grids, "--count 7")  # drawn again in the same batches
    assert pictures(grids) == after


def test_a_finished_training_is_lengthened_and_options_of_speed_may_change(
    copied, step, monkeypatch
):
    compiled, adapter = [], copied / "adapter"
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks", lambda self, **_: compiled.append(1)
    )
    before = dsd.read_records(adapter / "log.jsonl")
    weights = (adapter / dsd.ADAPTER_FILE).read_bytes()
    speed = "--save_every 3 --validate_every 5 --compile --gradient_checkpointing"
    step(finetune, "--steps 8", speed)
    log = dsd.read_records(adapter / "log.jsonl")
    assert log[:6] == before and [r["step"] for r in log] == list(range(8)) and compiled
    assert (adapter / dsd.ADAPTER_FILE).read_bytes() != weights


def test_what_decides_the_result_makes_another_run_which_is_refused(copied, step):
    before = written(copied)
    changes = {finetune: "--rank 8", generate_grids: "--steps 5"}
    changes |= {curate: "--tolerance 1", sample: "--seed 3"}
    for script, change in changes.items():
        assert "holds another run" in step(script, change, code=2).err
    assert written(copied) == before


def test_another_picture_behind_the_same_record_makes_another_run(pairs, tmp_path, step):
    shutil.copytree(pairs, tmp_path / "pairs")
    train = finetune, "--steps 1 --validation_grids 0 --pairs", tmp_path / "pairs", "--out"
    step(*train, tmp_path / "one")
    noise_image(32, 32).save(tmp_path / "pairs" / "images" / "000002_1.png")
    assert "holds another run" in step(*train, tmp_path / "one", code=2).err
    step(*train, tmp_path / "two")
    one = {file.name for file in (tmp_path / "one" / "cache").iterdir()}
    two = {file.name for file in (tmp_path / "two" / "cache").iterdir()}
    assert len(one) == len(two) == 8 and len(one & two) == 6


# ---- training ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, precision", [("", "no"), ("--precision bf16", "bf16")])
def test_a_cpu_trains_in_float32_unless_it_is_told_otherwise(
    options, precision, pairs, tmp_path, run
):
    tiny = "--steps 1 --rank 4 --batch_size 2 --device cpu"
    run(finetune, tiny, options, "--pairs", pairs, "--out", tmp_path)
    assert dsd.read_json(tmp_path / "settings.json")["precision"] == precision


@pytest.mark.parametrize("wanted, grids", [(0, 0), (1, 1), (4, 1)])  # at most a quarter of four
def test_pairs_are_held_out_by_whole_grids(pairs, wanted, grids):
    args = types.SimpleNamespace(pairs=pairs, seed=0, validation_grids=wanted)
    training, held_out = finetune.read_pairs(args)
    assert len(held_out) == 2 * grids and len(training) == 8 - 2 * grids
    assert {r["grid"] for r in training}.isdisjoint(r["grid"] for r in held_out)


ENCODING = {"width": 32, "height": 32, "frames": 2, "prompt_tokens": None}
DRAWING = {"batch_size": 2, "shift": 3, "condition_dropout": 0.1, "prompt_dropout": 0.1}


@pytest.fixture
def encoded(pipe, pairs, tmp_path):
    """encoded(**options): all pairs, encoded, and a function that draws one process's batch."""

    def encoded(**options):
        chosen = ENCODING | DRAWING | options
        args = types.SimpleNamespace(
            pairs=pairs, out=tmp_path, seed=0, validation_grids=0, **chosen
        )
        records, _ = finetune.read_pairs(args)
        for pair in records:
            pair["cache"] = finetune.cache_file(args, pair)
        finetune.encode_pairs(pipe, records, args)
        null_text = dsd.encode_prompts(pipe, [""])

        def draw(generator, index=0, count=1):
            process = types.SimpleNamespace(device="cpu", process_index=index, num_processes=count)
            return finetune.draw_batch(records, null_text, args, generator, process)

        return records, draw

    return encoded


@pytest.mark.parametrize("frames", [2, 1])
def test_the_cache_holds_both_canvases_and_the_prompt_of_every_pair(pipe, pairs, encoded, frames):
    records, _ = encoded(frames=frames)
    x_0, condition, (embeds, pooled) = finetune.read_cache(records)

    def pixels_of(name):
        return dsd.to_pixels([dsd.open_image(pairs / record[name]) for record in records])

    reference, target = pixels_of("reference_file_name"), pixels_of("target_file_name")
    if frames == 2:
        target = torch.cat([reference, target], 3)
        reference = torch.cat([reference, torch.full_like(reference, -1)], 3)
    prompts = dsd.encode_prompts(pipe, [r["prompt"] for r in records])
    wanted = dsd.encode(pipe.vae, target), dsd.encode(pipe.vae, reference), *prompts
    for tensor, found in zip(wanted, (x_0, condition, embeds, pooled), strict=True):
        torch.testing.assert_close(found, tensor.cpu(), rtol=0.01, atol=0.01)  # it keeps bfloat16
    assert (x_0[0] - x_0[1]).abs().max() > 0.1 and (embeds[0] - embeds[1]).abs().max() > 0.1


def test_a_batch_is_drawn_alike_however_many_processes_share_it(pipe, encoded):
    """Noise, noise levels and dropout too; half of the dropped references drop the prompt."""
    _, draw = encoded(batch_size=30, condition_dropout=0.5, prompt_dropout=0.5)
    whole, other = draw(torch.Generator().manual_seed(5)), draw(torch.Generator().manual_seed(6))
    assert not torch.equal(whole[1], other[1])
    parts = [draw(torch.Generator().manual_seed(5), index, 3) for index in range(3)]
    for tensor, shares in zip(whole, zip(*parts), strict=True):
        assert torch.equal(torch.stack(shares, 1).flatten(0, 1), tensor)
    null_pooled = dsd.encode_prompts(pipe, [""])[1].cpu()
    without = (whole[3] == 0).all(2).all(1)
    unprompted = (whole[5] == null_pooled).all(1)
    kinds = set(zip(without.tolist(), unprompted.tolist()))
    assert len(kinds) == 4  # each with and without the other


def test_the_logged_loss_is_the_mean_over_the_accumulated_batches(pipe, encoded, tmp_path, step):
    options = "--steps 1 --accumulate 3 --frame_weights 1 3 --validation_grids 0"
    step(finetune, options, "--out", tmp_path)
    (_, draw), generator, frames = encoded(), torch.Generator().manual_seed(0), []
    for _ in range(3):
        x_0, eps, sigma, _, *text = draw(generator)
        share = sigma.view(-1, 1, 1)
        x_sigma = (1 - share) * x_0 + share * eps
        # at the first step the student still is the teacher
        v = predict(pipe.transformer, x_sigma, sigma, text, dsd.position_ids(8, 16))
        error = dsd.unpack((v - (eps - x_0)) ** 2, 8, 16)
        frames.append([error[..., :8].mean().item(), error[..., 8:].mean().item()])
    first, second = (sum(losses) / 3 for losses in zip(*frames))
    wanted = {"step": 0, "loss": (first + 3 * second) / 4, "frame_1": first, "frame_2": second}
    assert dsd.read_records(tmp_path / "log.jsonl") == [pytest.approx(wanted, abs=1e-4)]


def test_with_a_clean_reference_only_frame_2_is_learned_and_sampling_follows(
    pipe, encoded, tmp_path, step, draw, monkeypatch
):
    step(finetune, "--clean_reference --steps 1 --validation_grids 0 --out", tmp_path)
    x_0, eps, sigma, condition, *text = encoded()[1](torch.Generator().manual_seed(0))
    x_sigma = dsd.unpack(dsd.interpolate(x_0, eps, sigma), 8, 16)
    x_sigma[..., :8] = dsd.unpack(condition, 8, 16)[..., :8]
    v = predict(pipe.transformer, dsd.pack(x_sigma), sigma, text, dsd.position_ids(8, 16))
    loss = dsd.unpack((v - (eps - x_0)) ** 2, 8, 16)[..., 8:].mean().item()
    wanted = {"step": 0, "loss": loss, "frame_1": 0, "frame_2": loss}
    assert dsd.read_records(tmp_path / "log.jsonl") == [pytest.approx(wanted, abs=1e-4)]

    used, way = [], dsd.with_clean_reference
    monkeypatch.setattr(dsd, "with_clean_reference", lambda *of: used.append(1) or way(*of))
    draw("--adapter", tmp_path)
    assert used


def test_an_environment_for_other_trainers_changes_nothing(step, tmp_path, monkeypatch):
    for out in ("plain", "set"):
        step(finetune, "--steps 2 --validation_grids 0 --out", tmp_path / out)
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    plain, changed = (tmp_path / out / dsd.ADAPTER_FILE for out in ("plain", "set"))
    assert plain.read_bytes() == changed.read_bytes()


def test_no_two_micro_batches_are_alike(tmp_path, step, monkeypatch):
    seen = []

    def batch_losses(model, batch, size, args):
        x_0, eps, sigma, *_ = batch
        seen.append((sigma.item(), eps.sum().item()))
        return sum(p.sum() for p in model.parameters() if p.requires_grad) * torch.zeros(3)

    monkeypatch.setattr(finetune, "batch_losses", batch_losses)
    options = "--steps 2 --batch_size 1 --accumulate 70 --validation_grids 0"
    step(finetune, options, "--out", tmp_path)
    assert len(set(seen)) == len(seen) == 140


def test_gradient_checkpointing_leaves_the_losses_alone(chain, step, tmp_path):
    step(finetune, "--gradient_checkpointing", "--out", tmp_path)
    logs = [chain[0] / "runs" / "adapter" / "log.jsonl", tmp_path / "log.jsonl"]
    for a, b in zip(*map(dsd.read_records, logs), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_stopped_run_can_be_sampled(step, draw, tmp_path, monkeypatch):
    def stop(number, steps):
        if number == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(finetune, "learning_rate_share", stop)
    stopped = "\nstopped; the same command goes on from what is saved"
    said = step(finetune, "--save_every 2", "--out", tmp_path / "adapter", code=stopped).err
    assert "saved=2" in said.splitlines()[-1]  # the bar names the step
    assert draw("--adapter", tmp_path / "adapter")


# ---- grids ---------------------------------------------------------------------------------------
def test_batch_size_does_not_change_the_grids_but_seed_and_family_do(chain, step, tmp_path):
    step(generate_grids, "--batch_size 4 --out", tmp_path / "a")
    step(generate_grids, "--count 2 --steps 1 --seed 1 --out", tmp_path / "b")
    step(generate_grids, "--count 2 --steps 1 --family relight --out", tmp_path / "c")
    for i in range(6):
        ours = dsd.open_image(tmp_path / "a" / f"{i:06d}.png")
        theirs = dsd.open_image(chain[0] / "runs" / "grids" / f"{i:06d}.png")
        assert difference(ours, theirs) <= 1
    a, b, c = (dsd.read_records(tmp_path / name / "grids.jsonl") for name in "abc")
    assert {r["prompt"] for r in a}.isdisjoint(r["prompt"] for r in b)
    assert a[0]["seed"] != b[0]["seed"]
    assert all(r["family"] == "relight" and "scene" in r["prompt"] for r in c)


def test_grids_from_a_prompts_file(tmp_path, run):
    out, file = tmp_path / "grids", tmp_path / "prompts.txt"
    file.write_text(
        "a round horned critter | in space | in a cave | by moonlight | on the beach\n\n"
        "  a tall critter|at noon|at sunset|under neon|in the snow  \n"
    )
    draw = generate_grids, "--steps 1 --prompts", file, "--out", out
    run(*draw)
    first, second = dsd.read_records(out / "grids.jsonl")
    assert first["subject"] == "round horned critter"
    assert second["prompt"].endswith("in the snow")
    assert "the same round horned critter: " in first["prompt"]
    assert "second in a cave" in first["prompt"]
    run(*draw, "--count 3")  # the first one is drawn again, with other noise
    third = dsd.read_records(out / "grids.jsonl")[2]
    assert third["prompt"] == first["prompt"] and third["seed"] != first["seed"]
    assert difference(*(dsd.open_image(out / r["file"]) for r in (first, third))) > 5


SETTINGS = ["on sand", "under snow", "in libraries", "aboard boats"]
ANSWER = json.dumps({"subject": "a red robot", "settings": SETTINGS})  # no word occurs twice


def test_a_chat_model_invents_subjects_and_its_answers_are_kept(tmp_path, step, monkeypatch):
    make_chat_model(tmp_path / "llm", ANSWER)
    out = tmp_path / "grids"
    draw = generate_grids, "--llm", tmp_path / "llm", "--out", out, "--steps 1"
    step(*draw, "--count 1")
    (record,) = dsd.read_records(out / "grids.jsonl")
    assert record["subject"] == "red robot"
    assert "third in libraries" in record["prompt"]
    assert "second under snow" in record["prompt"]
    said = step(*draw, "--count 2", code=2).err  # it repeats itself
    assert "only 1 of " in said and "answers could be used" in said
    dsd.write_json(max((out / "subjects").iterdir()), {"answer": ANSWER.replace("robot", "fox")})
    monkeypatch.setattr(generate_grids, "load_llm", None)  # no model, no new answer
    step(*draw, "--count 2")
    assert [r["subject"] for r in dsd.read_records(out / "grids.jsonl")] == ["red robot", "red fox"]


USABLE = [
    ANSWER,
    f"Sure!\n```json\n{ANSWER}\n```",
    f"{ANSWER}\nHope {{this}} helps }}",
    f'<think>{{"subject": "a cat"}}? {ANSWER[:-2]}</think>{ANSWER}',
]
USELESS = [
    "",
    "a red robot",
    '["subject", "settings"]',
    f"<think>{ANSWER}</think> I cannot",
    ANSWER[:-1],
    ANSWER.replace("aboard boats", "On Sand"),
    ANSWER.replace(', "aboard boats"', ""),
    ANSWER.replace("aboard boats", "very " * 16),
    ANSWER.replace("a red robot", ""),
    ANSWER.replace("a red robot", "very " * 13),
    ANSWER.replace('"aboard boats"', "7"),
]


@pytest.mark.parametrize("answer", [*USABLE, *USELESS])
def test_an_answer_counts_only_with_a_subject_and_four_different_settings(answer):
    wanted = ("a red robot", SETTINGS) if answer in USABLE else None
    assert generate_grids.parse_llm(answer) == wanted


# ---- curation with known answers -----------------------------------------------------------------
YES = "subject: fox\nimage 1: red\nimage 2: red\ncompare: colour same, ears same\nverdict: yes"
NO = "subject: fox\nimage 1: red\nimage 2: blue\ncompare: colour different, ears same\nverdict: no"
ANSWERS = [YES, NO, NO, NO.replace("verdict: no", ""), NO, "yes, they look the same"]
COPY = critter(7, [1, 0, 0])
PANELS = {  # of two grids, by their family
    "subject": [critter(7, [scene, 0, 0]) for scene in range(4)],
    "relight": [Image.new("RGB", (32, 32), "red"), COPY, COPY, critter(99, [5, 0, 3])],
}


@pytest.fixture
def curated(tmp_path, monkeypatch, step):
    """curate.py on these grids, with a VLM that gives these answers: (folder, its arguments)."""

    def ask(model, processor, cases, question, *rest):
        if question == curate.PAIR_QUESTION:
            return [ANSWERS[i % 6] for i in range(len(cases))]
        return [f"caption {i}" for i in range(len(cases))]

    grids = []
    for family, panels in PANELS.items():
        make_image_grid(panels, 2, 2).save(tmp_path / f"{family}.png")
        grid = {"file": f"{family}.png", "prompt": "a grid", "subject": "a critter"}
        grids.append(grid | {"family": family, "rows": 2, "columns": 2})
    dsd.write_json(tmp_path / "grids.jsonl", grids)
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(curate, "ask", ask)
    start = curate, "--tolerance 0 --grids", tmp_path, "--out", tmp_path / "pairs"
    step(*start)
    return tmp_path / "pairs", start


def training_pairs(folder):
    """(grid, reference panel, target panel, prompt) of every pair that curate.py wrote."""
    pairs = []
    for record in dsd.read_records(folder / "metadata.jsonl"):
        files = record["reference_file_name"], record["target_file_name"]
        panels = [int(Path(file).stem.split("_")[1]) for file in files]
        pairs.append((record["grid"], *panels, record["prompt"]))
    return pairs


def test_accepted_pairs_become_training_pairs_in_both_orders_and_some_are_set_aside(
    curated, step, tmp_path
):
    folder, _ = curated
    first, second = (
        dsd.read_json(file)["pairs"] for file in sorted((folder / "transcripts").iterdir())
    )
    wanted = ["yes", "no", "no", "unparsable", "no", "unparsable"]
    assert [r["verdict"] for r in first] == wanted
    wanted = ["blank", "blank", "blank", "copies", "yes", "no"]
    assert [r["verdict"] for r in second] == wanted
    assert [r["panels"] for r in second] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert training_pairs(folder) == [
        (0, 0, 1, "caption 1"),
        (0, 1, 0, "caption 0"),
        (1, 1, 3, "caption 7"),
        (1, 3, 1, "caption 5"),
    ]
    for record in dsd.read_records(folder / "metadata.jsonl"):
        assert record["family"] == ["subject", "relight"][record["grid"]]
        assert (folder / record["reference_file_name"]).exists()
        assert (folder / record["target_file_name"]).exists()
    counts = {"yes": 2, "no": 4, "unparsable": 2, "blank": 3, "copies": 1}
    counts |= {"pairs": 12, "training_pairs": 4, "accept_rate": round(1 / 6, 4)}
    assert dsd.read_json(folder / "summary.json").items() >= counts.items()
    assert (folder / "accepted.png").exists() and (folder / "rejected.png").exists()
    step(finetune, "--steps 1 --pairs", folder, "--out", tmp_path / "adapter")


def test_datasets_reads_the_pairs_as_an_imagefolder(curated, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    folder, _ = curated
    options = {"data_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    rows = datasets.load_dataset("imagefolder", split="train", **options)
    records = dsd.read_records(folder / "metadata.jsonl")
    assert {"reference", "target"} <= set(rows.column_names)
    assert rows["prompt"][:] == [r["prompt"] for r in records]
    target = dsd.open_image(folder / records[0]["target_file_name"])
    assert difference(rows[0]["target"].convert("RGB"), target) == 0


def test_a_verdict_that_is_overruled_takes_effect_without_the_model(curated, step, monkeypatch):
    folder, start = curated
    monkeypatch.setattr(curate, "load_vlm", None)
    for grid, pair, verdict in ((0, 2, "yes"), (1, 4, "no")):
        file = folder / "transcripts" / f"{grid:06d}.json"
        told = dsd.read_json(file)
        told["pairs"][pair]["verdict"] = verdict
        dsd.write_json(file, told)
    step(*start)
    assert training_pairs(folder) == [
        (0, 0, 1, "caption 1"),
        (0, 1, 0, "caption 0"),
        (0, 0, 3, "caption 3"),
        (0, 3, 0, "caption 0"),
    ]
    assert dsd.read_json(folder / "summary.json")["yes"] == 2


def test_a_grid_behind_which_another_picture_lies_is_asked_about_again(curated, step, tmp_path):
    folder, start = curated
    before = written(folder)
    make_image_grid(PANELS["subject"][::-1], 2, 2).save(tmp_path / "subject.png")
    step(*start)
    after = written(folder)
    changed = {name for name in after if after[name] != before[name]}
    assert "transcripts/000000.json" in changed and "images/000000_0.png" in changed
    assert not any("000001" in name for name in changed)


# ---- sampling ------------------------------------------------------------------------------------
@pytest.fixture
def draw(step, tmp_path):
    """draw(*options): sample.py, one step and one seed -> what the pictures tell of themselves."""

    def draw(*options, out="out"):
        tiny = "--prompt 'a {name} in space' --steps 1 --seed 0"
        step(sample, tiny, "--out", tmp_path / out, *options)
        files = sorted((tmp_path / out).glob("0*.png"))
        return [json.loads(Image.open(file).text["dsd"]) for file in files]

    return draw


def test_sample_takes_a_folder_of_pictures_the_adapters_file_and_other_proportions(
    copied, reference, tmp_path, step, draw
):
    (tmp_path / "in").mkdir()
    shutil.copy(reference, tmp_path / "in" / "a.png")
    critter(5, [0, 0, 0]).save(tmp_path / "in" / "b.jpg")
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path / "in" / name).write_text("no picture")
    options = "--adapter", copied / "adapter" / dsd.ADAPTER_FILE, "--image", tmp_path / "in"
    for fit in ("crop", "pad"):
        told = draw(*options, f"--fit {fit}", out=fit)
        assert [t["text"] for t in told] == ["a a in space", "a b in space"]

    # in another order they are other pictures
    files = [tmp_path / "in" / name for name in ("b.jpg", "a.png")]
    again = "--prompt 'a {name} in space' --steps 1 --seed 0 --out", tmp_path / "crop"
    assert "another run" in step(sample, *again, *options[:2], "--image", *files, code=2).err

    def change(file):  # from cropped to padded
        return difference(*(dsd.open_image(tmp_path / fit / file) for fit in ("crop", "pad")))

    assert change("0000.png") > 0 and change("0001.png") == 0  # the second one is square


def test_a_files_name_may_be_none_in_utf_8():
    args = types.SimpleNamespace(prompt=["a {name} in space"], seed=[0])
    name = b"caf\xe9.png".decode(errors="surrogateescape")  # as a system hands it over
    (case,) = sample.all_cases(args, [name], {})
    assert case["text"] == "a caf? in space"


def test_an_adapter_says_how_it_is_to_be_sampled_and_flags_go_first(copied, tmp_path, draw):
    file = copied / "adapter" / dsd.ADAPTER_FILE
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    config["dsd"] |= {"frames": 1, "width": 48, "height": 32}
    config["dsd"] |= {"image_guidance": 1.25, "text_guidance": 1.75}
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(config)})
    (told,) = draw("--text_guidance 1 --prompt 'a critter'")
    assert (told["image_guidance"], told["text_guidance"]) == (1.25, 1)
    assert dsd.open_image(tmp_path / "out" / "0000.png").size == (48, 32)


def test_an_animation_shows_both_frames_after_each_step(copied, tmp_path, draw):
    draw("--animate --steps 3")
    with Image.open(tmp_path / "out" / "0000.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (256, 128)  # enlarged
        gif.seek(2)
        frame_2 = gif.convert("RGB").resize((64, 32), Image.NEAREST).crop((32, 0, 64, 32))
    assert difference(frame_2, dsd.open_image(tmp_path / "out" / "0000.png")) < 64  # 256 colours


def test_sample_takes_the_released_layout(pipe, tmp_path, draw):
    state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    width = len(state["x_embedder.bias"])
    state["c_embedder.weight"] = 0.1 * torch.ones_like(state["x_embedder.weight"])
    state["c_embedder.bias"] = torch.zeros(width)
    (tmp_path / "transformer").mkdir()
    save_file(state, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, width)}
    lora[f"{layer}.lora_B.weight"] = torch.zeros(width, 2)
    save_file(lora, tmp_path / dsd.ADAPTER_FILE)
    (told,) = draw("--adapter", tmp_path)
    assert told["text"] == "a round horned critter in space"


def test_enhanced_prompts_and_what_of_a_long_one_is_not_read(
    copied, vlm, reference, tmp_path, step, draw, monkeypatch
):
    long = "red " * 70 + "hat"
    options = f"--prompt 'a critter in space' '{long}' --enhance", vlm
    told, _ = draw(*options)
    assert told["prompt"] == "a critter in space"
    assert told["text"].startswith("a critter in space, ")
    monkeypatch.setattr(curate, "load_vlm", None)  # what it saw was kept
    (tmp_path / "out" / "0001.png").unlink()
    said = step(sample, *options, "--steps 1 --seed 0", "--out", tmp_path / "out")
    assert f"{reference.as_posix()}: " in said.out
    assert said.err.count("warning") == 1 and "prompts cut after 23 tokens: 1" in said.err
