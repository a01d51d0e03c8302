"""evaluate.py: metrics on hand-made verdicts, the cases, resumption, each kind of row at tiny settings."""

import importlib
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, critter, give_random_weights, noise_image, run_script
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

import curate
import dsd
import evaluate
import models
from miniature import exams, world

SETTINGS = {"width": 32, "height": 32, "steps": 2, "guidance_scale": 1.0, "true_cfg_scale": 1.0, "shift": 3.0,
            "panel_prompt_tokens": 24, "sheet_prompt_tokens": 40}
TINY = ["--references", 2, "--prompts", 1, "--steps", 2]


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """A judge folder: the miniature's if it is there, else random weights in the same form."""
    if (ROOT / "miniature" / "judge" / "model.safetensors").exists():
        return ROOT / "miniature" / "judge"
    folder = tmp_path_factory.mktemp("models") / "judge"
    torch.manual_seed(0)
    models.make_judge().half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(flux, tmp_path_factory):
    """An adapter of random weights that fits the model."""
    folder = tmp_path_factory.mktemp("adapter")
    transformer = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer", dtype=torch.float32)
    dsd.save_adapter(give_random_weights(dsd.add_lora(dsd.widen(transformer), rank=2)), folder)
    return folder


@pytest.fixture
def quick_vlm(monkeypatch):
    """A VLM that always says the same, at once; returns the list of what it was asked."""
    asked = []

    def ask(model, processor, cases, questions, batch_size, max_new_tokens):
        asked.extend(zip(cases, questions, strict=True))
        return ["image: a critter\nscore: 3"] * len(cases)

    monkeypatch.setattr(curate, "ask", ask)
    monkeypatch.setattr(curate, "load_vlm", lambda name: (None, None))
    return asked


@pytest.fixture
def run(call, flux, judge, vlm, adapter):
    """run(out, *args): evaluate.py in this process at tiny settings."""
    def run(out, *args, code=0):
        done, said, err = call(evaluate, "--model", flux, "--judge", judge, "--vlm", vlm, "--adapter", adapter, *TINY,
                               "--out", out, *args)
        assert done == code, err[-2000:]
        return said if code == 0 else err
    return run


def files(folder, leave_out=("seconds.jsonl", "table.md")):
    """What a run wrote, {path: bytes}, but for measured times."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in leave_out}


def case(**changes):
    """A case of hand-made truth: the reference is on the beach at noon with nothing, asked is space at noon with a hat."""
    identity = {"shape": "round", "ears": "horned", "colour": "red", "tone": "vivid", "second": "blue", "pattern": "dots",
                "eyes": "two"}
    asked = {"scene": "in space", "accessory": "with a hat", "light": "at noon"}
    shown = {"scene": "on the beach", "accessory": "nothing", "light": "at noon"}
    return exams.Case(**{"reference": 0, "image": critter(10, [1, 0, 0]), "subject": "round horned critter",
                             "prompt": "a round horned critter in space", "reference_prompt": "", "sheet_prompt": "",
                             "class_prompts": [], "seed": 0, "identity": identity, "context": asked, "shown": shown} | changes)


# ---- metrics ---------------------------------------------------------------------------------------------------------
def test_scores_of_hand_made_verdicts():
    c = case()
    perfect = exams.marks(c, c.identity | c.context)
    assert {perfect[k] for k in ("cp", "all_kept", "pf", "cp_pf", "pf_new", "cp_pf_new")} == {1.0}
    copied = exams.marks(c, c.identity | c.shown)
    assert (copied["cp"], copied["all_kept"], copied["pf_new"], copied["cp_pf_new"]) == (1, 1, 0, 0)
    assert copied["pf"] == copied["cp_pf"] == pytest.approx(1 / 3)  # the light was asked for and is the reference's
    mixed = exams.marks(c, c.identity | c.context | {"eyes": "one", "scene": "in a cave"})
    assert (mixed["all_kept"], mixed["eyes_as_wanted"], mixed["scene_as_wanted"], mixed["light_as_wanted"]) == (0, 0, 0, 1)
    assert mixed["cp"] == pytest.approx(6 / 7) and mixed["pf"] == pytest.approx(2 / 3) and mixed["pf_new"] == 1 / 2
    assert mixed["cp_pf"] == pytest.approx(6 / 7 * 2 / 3) and mixed["cp_pf_new"] == pytest.approx(6 / 7 / 2)


def test_bootstrap_interval_of_known_data():
    assert evaluate.bootstrap([0.25] * 12, list(range(12))) == [0.25] * 3
    assert evaluate.bootstrap([], []) is evaluate.bootstrap([None], [0]) is None
    coins = [k % 2 for k in range(400)]
    mean, low, high = evaluate.bootstrap(coins, range(400))
    assert mean == 0.5 and low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01) and high == pytest.approx(1 - low, abs=0.01)
    # four equal pictures of each reference tell no more than one: twice the interval of independent ones
    _, wide_low, wide_high = evaluate.bootstrap(coins, [k // 2 % 100 * 2 + k % 2 for k in range(400)])
    assert wide_high - wide_low == pytest.approx(2 ** .5 * (high - low), rel=0.15)
    assert evaluate.bootstrap([1.0, None, 0.0, None], [0, 0, 1, 1])[0] == 0.5
    assert evaluate.bootstrap([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1])[0] == 0.75  # of pictures, not of references


def test_difference_is_taken_on_common_subject_cases_only():
    record = lambda n, value, kind="subject": {"reference": n, "kind": kind, "cp_pf": value}  # noqa: E731
    ours = [record(0, 1.0), record(0, 0.0, "relight"), record(1, 0.5), record(2, 0.0)]
    theirs = [record(0, 0.5), record(0, 1.0, "relight"), record(1, None)]
    assert evaluate.difference(ours, theirs, "cp_pf") == [0.5] * 3
    assert evaluate.difference(ours, ours, "cp_pf") == [0.0] * 3


def test_summary_averages_each_kind_and_counts_missing_scores():
    records = [{"case": 0, "reference": 0, "kind": "subject", "cp": 1.0, "vlm_cp": None, "answers": {"vlm_cp": "?"}},
               {"case": 1, "reference": 1, "kind": "subject", "cp": 0.0, "vlm_cp": 0.75, "answers": {"vlm_cp": "score: 3"}},
               {"case": 2, "reference": 1, "kind": "relight", "cp": 0.5, "vlm_cp": 0.5, "pose": 0.9, "answers": {}}]
    summary = evaluate.summarise(records)
    assert summary["subject"]["cp"][0] == 0.5 and summary["subject"]["vlm_cp"] == [0.75] * 3
    assert (summary["subject"]["n"], summary["subject"]["unscored"], summary["relight"]["pose"][0]) == (2, 1, 0.9)


@pytest.mark.parametrize("answer, score", [
    ("compare: same\nscore: 3", 0.75), ("**Score**: 4/4", 1.0), ("score: 0 to 4? I say score: 1.", 0.25),
    ("score: 5", None), ("score: 10", None), ("score: 3.5", None), ("", None), ("four of four", None)])
def test_parse_score(answer, score):
    assert evaluate.parse_score(answer) == score


def test_pose_kept_sees_the_pose_and_not_the_light():
    there = exams.world_cases(range(12), 1, 0, 32)
    for relit in (c for c in there if c.kind == "relight"):
        assert exams.pose_kept(relit.truth, relit.truth) == 1
        dim = Image.eval(relit.truth, lambda v: round(0.5 * v + 20))
        assert exams.pose_kept(dim, relit.truth) == pytest.approx(1, abs=2e-3)
        moved = Image.new("RGB", (32, 32))
        moved.paste(relit.truth, (9, 6))
        assert exams.pose_kept(relit.image, relit.truth) > 0.6 > exams.pose_kept(moved, relit.truth)
    assert exams.pose_kept(Image.eval(there[0].truth, lambda v: 255 - v), there[0].truth) == 0
    assert exams.pose_kept(Image.new("RGB", (32, 32)), there[0].truth) == 0
    assert exams.pose_kept(noise_image(32, 32), there[0].truth) < 0.3


def test_the_judge_takes_the_best_label_of_each_attribute(judge):
    seen = exams.Judge(judge)
    assert {name: [v for _, v in block] for name, block in seen.labels.items()} == {
        name: [v or "nothing" for v in values] for name, values in (world.IDENTITY | world.CONTEXT).items()}
    wanted = {name: values[-1] or "nothing" for name, values in (world.IDENTITY | world.CONTEXT).items()}
    logits = torch.zeros(2, 53)
    for name, block in seen.labels.items():  # a large logit of one attribute must not win in another
        logits[1, [number for number, value in block if value == wanted[name]]] = 1 + 100 * (name == "colour")
    assert [set(s) for s in seen([critter(10, [0, 0, 0])] * 2)] == [set(wanted)] * 2  # its weights may be float16
    seen.model = type("Fixed", (), {"device": "cpu", "__call__": lambda self, pixel_values: SimpleNamespace(logits=logits)})()
    first, second = seen([critter(10, [0, 0, 0])] * 2)
    assert second == wanted and first == {name: block[0][1] for name, block in seen.labels.items()}
    assert seen.sureness([critter(10, [0, 0, 0])] * 2).tolist() == pytest.approx([1 / 8, math.e / (math.e + 7)])  # of 8 values


# ---- cases -----------------------------------------------------------------------------------------------------------
def test_every_rendered_reference_is_held_out(monkeypatch):
    seen = []

    def watch(identity, context, pose, size):
        seen.extend(identity.tolist())
        return torch.zeros(len(identity), 3, size, size)

    monkeypatch.setattr(world, "render", watch)
    cases = exams.world_cases([*range(75), *range(evaluate.SEARCH, evaluate.SEARCH + 8)], 4, 0, 32)
    assert len(cases) == 83 * 5 and sum(c.kind == "subject" for c in cases) >= 300
    assert world.is_held_out(world.identity_number(torch.tensor(seen))).all() and len(seen) == 83 * 6
    values = [[world.IDENTITY[name].index(c.identity[name]) for name in world.IDENTITY] for c in cases]
    assert world.is_held_out(world.identity_number(torch.tensor(values))).all()


def test_cases_ask_for_new_scenes_or_for_another_light_only():
    cases = exams.world_cases(range(6), 3, 0, 32)
    for c in cases:
        if c.kind == "subject":
            assert c.context["scene"] != c.shown["scene"]
        else:
            assert [c.context[k] == c.shown[k] for k in ("scene", "accessory", "light")] == [True, True, False]
            assert c.sheet_prompt.startswith("2 images representing the same scene")
        assert c.subject in c.prompt and c.subject in c.reference_prompt and c.context["scene"] in c.prompt
        assert all(v in c.prompt for v in c.context.values() if v != "nothing")
    assert len({c.seed for c in cases}) == len(cases)
    few = exams.world_cases(range(2), 3, 0, 32)
    assert [(c.prompt, c.seed, c.truth.tobytes()) for c in few] == [(c.prompt, c.seed, c.truth.tobytes()) for c in cases[:8]]
    assert few[0].prompt != exams.world_cases(range(2), 3, 1, 32)[0].prompt


def make_benchmark(folder):
    """A small folder in DreamBench++'s layout: two subjects, two prompts each."""
    for path, subject in (("live_subject/animal/00", "kitten"), ("object/03", "red mug")):
        for kind in ("images", "captions"):
            (folder / kind / path).parent.mkdir(parents=True, exist_ok=True)
        noise_image(48, 40, len(subject)).save(folder / "images" / f"{path}.jpg")
        (folder / "captions" / f"{path}.txt").write_text(f"{subject}\na {subject} on the beach\n\na {subject} in space\n")
    return folder


def test_a_dreambench_folder_with_the_vlm_as_judge(tmp_path, run, quick_vlm):
    folder = make_benchmark(tmp_path / "bench")
    said = run(tmp_path / "out", "--folder", folder, "--judge", "nowhere")
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert set(rows) == {"prompt alone", "reference copied", "SDEdit 0.5", "in-context inpainting", "DSD"}
    for row in rows.values():
        assert row["cases"]["prompt"] == ["a kitten on the beach", "a kitten in space", "a red mug on the beach",
                                                       "a red mug in space"]
        assert row["subject"]["vlm_cp"][0] == 0.75 and row["subject"]["vlm_cp_pf"][0] == 0.75 ** 2
        assert row["subject"]["vlm_cp_pf_new"][0] == 0.75 ** 2 and "cp" not in row["subject"]
    images, question = quick_vlm[-1]
    assert len(images) == 2 and "a red mug in space" in question and "copies" in question
    assert {len(images) for images, question in quick_vlm if question == evaluate.SUBJECT_CRITERIA} == {2}
    assert "VLM de-biased" in said and "relit" not in said and (tmp_path / "out" / "scatter.png").exists()


def test_a_folder_without_captions_or_pictures_is_answered(tmp_path, run, quick_vlm):
    folder = make_benchmark(tmp_path / "bench")
    (folder / "captions" / "object" / "03.txt").unlink()
    assert "03.txt: wanted the subject's name" in run(tmp_path / "out", "--folder", folder, code=2)
    assert "no pictures below" in run(tmp_path / "out", "--folder", tmp_path / "captions", code=2)


# ---- whole runs ------------------------------------------------------------------------------------------------------
def test_quick_run_as_a_user_starts_it(tmp_path, flux, judge, vlm, adapter):
    out, _ = run_script("evaluate.py", "--model", flux, "--judge", judge, "--vlm", vlm, "--adapter", adapter, *TINY,
                        cwd=tmp_path)
    folder = tmp_path / "runs" / "evaluate"
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    names = ["prompt alone", "reference copied", "true rendering", "SDEdit 0.5", "in-context inpainting", "DSD"]
    assert list(rows) == names and all(f"| {name} |" in out for name in names)
    for name, row in rows.items():
        cases = row["cases"]
        assert (row["subject"]["n"], row["relight"]["n"], len(cases["prompt"])) == (2, 2, 4)
        assert all(0 <= v <= 1 for k in ("cp", "pf", "cp_pf", "all_kept", "pf_new", "eyes_as_wanted") for v in cases[k])
        assert [v is None for v in cases["pose"]] == [True, False] * 2
        pictures = sorted((folder / "rows" / name.lower().replace(" ", "-")).glob("*.png"))
        assert [Image.open(p).size for p in pictures] == [(32, 32)] * 4
    assert rows["true rendering"]["relight"]["pose"] == [1.0] * 3
    assert rows["DSD"]["subject"]["dsd_minus"] == [0.0] * 3
    assert "DSD minus this row" in (folder / "table.md").read_text()
    assert Image.open(folder / "scatter.png").size[0] > 300 and Image.open(folder / "contact_sheet.png").size[1] > 7 * 128


def test_interrupted_and_started_again_it_writes_the_same_files(tmp_path, run, quick_vlm, monkeypatch):
    rows = ["--rows", "prompt", "SDEdit", "copied"]
    run(tmp_path / "whole", *rows)
    whole, drawn, append = files(tmp_path / "whole"), len(quick_vlm), dsd.append_records

    def dies(path, records):
        if path.parent.name == "sdedit-0.5" and path.name == "scores.jsonl":
            path.write_text(json.dumps(records[0], ensure_ascii=False) + "\n" + json.dumps(records[1])[:40])  # torn
            raise KeyboardInterrupt
        append(path, records)

    monkeypatch.setattr(dsd, "append_records", dies)
    run(tmp_path / "torn", *rows, code=130)
    monkeypatch.setattr(dsd, "append_records", append)
    run(tmp_path / "torn", *rows)
    assert files(tmp_path / "torn") == whole
    asked = len(quick_vlm)
    run(tmp_path / "torn", *rows)
    assert len(quick_vlm) == asked and files(tmp_path / "torn") == whole  # nothing is drawn or scored twice
    assert drawn * 2 < asked < drawn * 3
    run(tmp_path / "torn", *rows, "--references", 3)
    longer = dsd.read_records(tmp_path / "torn" / "rows" / "sdedit-0.5" / "scores.jsonl")
    assert len(longer) == 6 and len(quick_vlm) == asked + drawn // 2


def test_a_rows_whole_name_means_that_row_and_a_part_all_that_contain_it():
    def chosen(*words):
        return [row.name for row in evaluate.choose_rows(SimpleNamespace(full=True, folder=None, rows=words), None)]

    assert chosen("dsd") == ["DSD"] and chosen("SDEdit 0.5", "true") == ["true rendering", "SDEdit 0.5"]
    assert len(chosen("sdedit")) == len(evaluate.STRENGTHS) and len(chosen("DSD,")) == len(evaluate.GUIDANCE) + 1
    assert chosen("tuning")[-1] == "DreamBooth-LoRA" and len(chosen("tuning")) > 1  # with the search that it needs


def test_a_row_drawn_with_other_settings_is_not_taken(tmp_path, run, quick_vlm):
    run(tmp_path / "out", "--rows", "copied")
    assert "holds another run" in run(tmp_path / "out", "--rows", "copied", "--seed", 1, code=2)


@pytest.mark.parametrize("flags, message", [
    (["--rows", "nothing"], "no row is called nothing"), (["--references", 0], "at least 1"),
    (["--judge", "nowhere"], "no judge at nowhere"), (["--rows", "DSD", "--adapter", "nowhere"], "no adapter"),
    (["--full", "--rows", "rank 4", "--pairs", "nowhere"], "no nowhere/metadata.jsonl")])
def test_mistakes_are_answered_in_one_line(tmp_path, run, quick_vlm, flags, message):
    err = run(tmp_path / "out", *flags, code=2)
    assert message in err and err.strip().splitlines()[-1].startswith("error: ")


# ---- rows of the full run --------------------------------------------------------------------------------------------
def test_dreambooth_learns_the_reference_and_leaves_the_teacher_as_it_was(flux):
    settings = SETTINGS | {"true_cfg_scale": 2.0}
    models_ = evaluate.Models(SimpleNamespace(model=flux), settings)
    cases = exams.world_cases([0], 1, 0, 32)
    pixels = dsd.to_pixels
    before = pixels(evaluate.prompt_alone(models_, cases))
    untuned, tuned, again = (pixels(evaluate.dreambooth(models_, cases, steps, 2e-3)) for steps in (0, 6, 6))
    assert torch.equal(tuned, again) and not torch.equal(tuned, untuned)
    assert torch.equal(pixels(evaluate.prompt_alone(models_, cases)), before)


def test_dreambooth_takes_the_best_of_the_searched_settings(tmp_path, run, quick_vlm, monkeypatch):
    monkeypatch.setattr(evaluate, "LEARNING_RATES", [1e-3])
    monkeypatch.setattr(evaluate, "TUNING_STEPS", [1, 2])
    monkeypatch.setattr(evaluate, "SEARCH_COUNT", 1)
    used = []
    monkeypatch.setattr(evaluate, "dreambooth", lambda models, cases, **options: used.append((cases[0].reference, options))
                        or [c.truth if options["steps"] == 2 or c.reference < evaluate.SEARCH else Image.new("RGB", (32, 32))
                            for c in cases])
    marks = exams.marks
    monkeypatch.setattr(exams, "marks", lambda c, seen: marks(
        c, c.identity | c.context if used[-1][1]["steps"] == 2 else c.identity | c.shown))
    run(tmp_path / "out", "--full", "--rows", "tuning", "--tuned_references", 1)
    few, more = ({"steps": steps, "learning_rate": 1e-3} for steps in (1, 2))
    assert used == [(evaluate.SEARCH, few), (evaluate.SEARCH, more), (0, more)]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| DreamBooth-LoRA | 1 |" in table and "searched on other references" in table and "minutes a reference" in table


def test_a_condition_of_zeros_makes_every_student_the_teacher_again(flux, tmp_path):
    """An adapter that has learnt nothing: the held frame still shows, and a single frame is the teacher's own picture."""
    transformer = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer", dtype=torch.float32)
    dsd.save_adapter(dsd.add_lora(dsd.widen(transformer), rank=2), tmp_path)
    models_, cases = evaluate.Models(SimpleNamespace(model=flux), SETTINGS), exams.world_cases([0], 1, 0, 32)
    single = evaluate.single_frame(models_, cases, tmp_path)
    held = evaluate.held_frame(models_, cases, tmp_path)
    assert [i.size for i in single + held] == [(32, 32)] * 4
    pipe = models_.load(FluxPipeline)
    assert pipe.transformer.config.in_channels == 64  # the teacher's own, loaded anew
    inpainted = evaluate.inpainting(models_, [c for c in cases])
    assert [i.size for i in inpainted] == [(32, 32)] * 2


def test_pairs_of_the_ablations(pairs, tmp_path, monkeypatch):
    args = SimpleNamespace(pairs=pairs, grids="grids", vlm="vlm", out=tmp_path, seed=0, model="flux", ablation_steps=None)
    whole = dsd.read_records(pairs / "metadata.jsonl")
    quarter, half = (evaluate.pairs_for(which, args) for which in ("quarter", "half"))
    some = dsd.read_records(half / "metadata.jsonl")
    assert [r["prompt"] for r in some] == [r["prompt"] for r in whole[:4]]
    assert len(dsd.read_records(quarter / "metadata.jsonl")) == 2
    assert (half / some[0]["reference_file_name"]).read_bytes() == (pairs / whole[0]["reference_file_name"]).read_bytes()

    def curated(script, *flags):
        assert script == "curate.py" and flags[flags.index("--tolerance") + 1] == 99
        folder = flags[flags.index("--out") + 1]
        shutil.copytree(pairs / "images", folder / "images")
        dsd.append_records(folder / "metadata.jsonl", [{**r, "prompt": f"{k} {r['prompt']}"} for k in range(3) for r in whole])
        dsd.write_json(folder / "summary.json", {})

    monkeypatch.setattr(evaluate, "run_script", curated)
    assert len(dsd.read_records(evaluate.pairs_for("as many", args) / "metadata.jsonl")) == len(whole)
    assert len(dsd.read_records(evaluate.pairs_for("uncurated", args) / "metadata.jsonl")) == 3 * len(whole)
    assert evaluate.pairs_for("curated", args) == pairs


@pytest.mark.parametrize("name", ["single frame", "only condition columns"])
def test_an_ablation_is_trained_by_finetune_once(tmp_path, run, quick_vlm, pairs, monkeypatch, name):
    ran = []

    def in_this_process(script, *flags):
        ran.append(flags)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags), "--rank", "2", "--batch_size", "2"])
        importlib.import_module(script.removesuffix(".py")).main()

    monkeypatch.setattr(evaluate, "run_script", in_this_process)
    flags = ["--full", "--rows", f"ablation: {name}", "--pairs", pairs, "--ablation_steps", 2, "--references", 1]
    run(tmp_path / "out", *flags)
    folder = tmp_path / "out" / "ablations" / name.replace(" ", "_")
    assert (folder / dsd.ADAPTER_FILE).exists() and json.loads((folder / "settings.json").read_text())["steps"] == 2
    learnt = {"x_embedder" in key for key, t in load_file(folder / dsd.ADAPTER_FILE).items() if "lora_B" in key and t.any()}
    assert learnt == {"single frame": {True, False}, "only condition columns": {True}}[name]
    x_0 = load_file(folder / "cache" / "00000000.safetensors")["x_0"]
    assert x_0.shape[1] == (16 if name == "single frame" else 32)  # tokens of one panel, of two
    run(tmp_path / "out", *flags)
    assert len(ran) == 1 and [str(f) for f in evaluate.ABLATIONS[name][1]] == [str(f) for f in ran[0][6:-2]]
