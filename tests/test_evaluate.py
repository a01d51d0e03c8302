"""evaluate.py and the ablations: marks of hand-made answers, intervals, cases, rows, resumption."""

import dsd

import argparse
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import critter, difference, noise_image, run_script, written
from diffusers import FluxPipeline
from PIL import Image

import curate
import evaluate
import finetune
from miniature import ablations, exams, world

TINY = "--references 2 --prompts 1 --steps 2"
JUDGE = dsd.MINIATURE / "judge"


@pytest.fixture
def asked(monkeypatch):
    """A VLM that always says the same, at once; the list of what it was asked."""
    asked = []

    def ask(model, processor, cases, questions, batch_size, max_new_tokens):
        asked.extend(zip(cases, questions, strict=True))
        return ["image: a critter\nscore: 3"] * len(cases)

    monkeypatch.setattr(curate, "load_vlm", lambda name, quantize: (None, None))
    monkeypatch.setattr(curate, "ask", ask)
    return asked


# ---- marks and intervals -------------------------------------------------------------------------
IDENTITY = {"shape": "round", "ears": "horned", "colour": "red"}
IDENTITY |= {"second": "blue", "pattern": "dots", "eyes": "two"}
ASKED = {"scene": "in space", "accessory": "with a hat", "light": "at noon"}
SHOWN = {"scene": "on the beach", "accessory": "nothing", "light": "at noon"}


@pytest.mark.parametrize(
    "seen, cp, all_kept, pf, pf_new",
    [
        (ASKED, 1, 1, 1, 1),
        (SHOWN, 1, 1, 1 / 3, 0),  # a copy: the light was asked for and is the reference's
        (ASKED | {"eyes": "one", "scene": "in a cave"}, 5 / 6, 0, 2 / 3, 1 / 2),
    ],
)
def test_marks_of_hand_made_verdicts(seen, cp, all_kept, pf, pf_new):
    facts = {"identity": IDENTITY, "context": ASKED, "shown": SHOWN, "move": "moved"}
    marks = exams.marks(exams.Case(0, None, "", "", "", 0, **facts), IDENTITY | seen)
    wanted = {"cp": cp, "all_kept": all_kept, "pf": pf, "pf_new": pf_new}
    wanted |= {"cp_pf": cp * pf, "cp_pf_new": cp * pf_new, "cp_pf_moved": cp * pf}
    wanted["eyes_as_wanted"] = float("eyes" not in seen)
    wanted["scene_as_wanted"] = float(seen["scene"] == "in space")
    assert {name: marks[name] for name in wanted} == pytest.approx(wanted)
    assert "cp_pf_turned" not in marks


SCORES = {  # of four: answers that say so
    1: ["score: 0 to 4? I say score: 1."],
    2: ["__Score:__ **2**"],
    3: ["compare: same\nscore: 3", "Score (0-4): 3", "score: 3.0/4.0", "Rating: 3", "score (3)"],
    4: ["**Score**: 4/4", "The score is 4"],
    None: ["score: 5", "score: 10", "score: 3.5", "", "four of four", "illustrating 3 foxes"],
}


@pytest.mark.parametrize("score", SCORES)
def test_parse_score(score):
    for answer in SCORES[score]:
        assert exams.parse_score(answer) == (score and score / 4), answer


def test_bootstrap_interval_of_known_data():
    assert evaluate.bootstrap([0.25] * 12, range(12)) == [0.25] * 3
    assert evaluate.bootstrap([], []) is None and evaluate.bootstrap([None], [0]) is None
    coins = [k % 2 for k in range(400)]
    mean, low, high = evaluate.bootstrap(coins, range(400))
    wanted = [0.5, 0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025]
    assert [mean, low, high] == pytest.approx(wanted, abs=0.01)
    # two equal pictures of each reference tell no more than one
    references = [k // 2 % 100 * 2 + k % 2 for k in range(400)]
    _, wide_low, wide_high = evaluate.bootstrap(coins, references)
    assert wide_high - wide_low == pytest.approx(2**0.5 * (high - low), rel=0.15)
    assert evaluate.bootstrap([1.0, None, 0.0, None], [0, 0, 1, 1])[0] == 0.5
    # the mean is that of pictures, not of references
    assert evaluate.bootstrap([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1])[0] == 0.75


def test_summary_averages_each_kind_counts_missing_scores_and_compares_with_dsd_case_by_case():
    def record(reference, value, kind="subject", answer="score: 3", **marks):
        answers = {"vlm_cp": answer}
        return {"reference": reference, "kind": kind, "cp_pf": value, "answers": answers, **marks}

    ours = [record(0, 1.0), record(0, 0.0, "relight"), record(1, 0.5), record(2, 0.0)]
    theirs = [record(0, 0.5, answer="?"), record(0, 1.0, "relight", pose=0.9), record(1, None)]
    summary = evaluate.summarise(theirs, ours)
    assert summary["subject"].items() >= {"dsd_minus": [0.5] * 3, "n": 2, "unscored": 1}.items()
    assert summary["relight"].items() >= {"pose": [0.9] * 3, "unscored": 0}.items()
    assert evaluate.summarise(ours, ours)["subject"]["dsd_minus"] == [0.0] * 3


def test_pose_kept_sees_the_pose_and_not_the_light():
    relit = exams.world_cases([0], 1, 0, 32)[1]
    moved = Image.new("RGB", (32, 32))
    moved.paste(relit.truth, (9, 6))
    dim = Image.eval(relit.truth, lambda v: round(0.5 * v + 20))
    inverted = Image.eval(relit.truth, lambda v: 255 - v)
    assert exams.pose_kept(relit.truth, relit.truth) == 1
    assert exams.pose_kept(dim, relit.truth) == pytest.approx(1, abs=2e-3)
    assert exams.pose_kept(relit.image, relit.truth) > 0.6 > exams.pose_kept(moved, relit.truth)
    for other in (inverted, Image.new("RGB", (32, 32)), noise_image(32, 32)):
        assert exams.pose_kept(other, relit.truth) < 0.3


def test_the_judge_takes_the_best_label_of_each_attribute():
    judge, two = exams.Judge(JUDGE), [critter(10, [0, 0, 0])] * 2
    first = {name: block[0][1] for name, block in judge.labels.items()}
    last = {name: block[-1][1] for name, block in judge.labels.items()}
    assert set(first) >= {*world.IDENTITY, *world.CONTEXT}
    assert [set(seen) for seen in judge(two)] == [set(first)] * 2  # its weights may be float16
    logits = torch.zeros(2, len(judge.model.config.id2label))
    for name, block in judge.labels.items():
        # a large logit of one attribute must not win in another
        logits[1, block[-1][0]] = 101 if name == "colour" else 1

    class Model:
        device = "cpu"

        def __call__(self, **inputs):
            return SimpleNamespace(logits=logits)

    judge.model = Model()
    assert judge(two) == [first, last]


# ---- cases ---------------------------------------------------------------------------------------
def identity_of(case):
    """A case's identity in numbers."""
    return [values.index(case.identity[name]) for name, values in world.IDENTITY.items()]


def test_every_rendered_reference_is_held_out(monkeypatch):
    seen = []

    def render(identity, context, pose, size):
        seen.extend(identity.tolist())
        return torch.zeros(len(identity), 3, size, size)

    monkeypatch.setattr(world, "render", render)
    cases = exams.world_cases(range(83), 4, 0, 32)
    assert len(cases) == 83 * 5 and len(seen) == 83 * 6
    assert sum(case.kind == "subject" for case in cases) == 83 * 4
    identities = torch.tensor(seen + [identity_of(case) for case in cases])
    assert world.is_held_out(world.identity_number(identities)).all()


def test_cases_ask_for_another_scene_or_another_light_only_in_poses_that_the_prompts_tell():
    cases, turns = exams.world_cases(range(20), 4, 0, 32), {"lying down": 1, "upside down": 2}
    for case in cases:
        asked, shown, relit = case.context, case.shown, case.kind == "relight"
        same = [asked[name] == shown[name] for name in ("scene", "accessory", "light")]
        assert same == [True, True, False] if relit else not same[0]
        assert case.sheet_prompt.startswith("2 images representing the same scene") == relit
        assert case.subject in case.prompt and case.subject in case.reference_prompt
        told = [value for value in asked.values() if value not in ("nothing", "standing")]
        assert all(value in case.prompt for value in told)
        for context, prompt in ((asked, case.prompt), (shown, case.reference_prompt)):
            poses = [pose for pose in world.POSE_NAMES[1:] if pose in prompt]
            assert poses == ([] if context["pose"] == "standing" else [context["pose"]])
        assert asked["pose"] == "standing" or f" {asked['pose']} " in case.sheet_prompt
        assert case.move == "same pose" or not relit
        assert (case.move == "same pose") == (asked["pose"] == shown["pose"])
        assert (case.move == "turned") == (turns.get(asked["pose"]) != turns.get(shown["pose"]))
    assert {case.move for case in cases} == {"same pose", "moved", "turned"}
    assert {case.shown["pose"] for case in cases} == set(world.POSE_NAMES)
    assert len({case.seed for case in cases}) == len(cases)


def test_a_case_depends_on_its_number_and_the_seed_and_those_that_training_saw_are_left_out(
    tmp_path, capsys
):
    def facts(references, prompts, **more):
        cases = exams.world_cases(references, prompts, 0, 32, **more)
        return [(case.prompt, case.seed, case.truth.tobytes()) for case in cases]

    assert facts(range(2), 3) == facts(range(3), 3)[:8]  # more references do not change the first
    cases = exams.world_cases(range(3), 1, 0, 32)
    assert cases[0].prompt != exams.world_cases(range(1), 1, 1, 32)[0].prompt
    number = world.identity_number(torch.tensor([identity_of(cases[2])])).item()
    dsd.write_json(tmp_path / "seen.json", {"identities": [number, 5]})
    assert facts(range(3), 1, seen=exams.seen_identities(tmp_path)) == facts([0, 2], 1)
    assert "reference 1 is left out" in capsys.readouterr().out
    assert exams.seen_identities(tmp_path / "elsewhere") == set()
    assert exams.seen_identities(None) == set()


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """bench/, a small folder in DreamBench++'s layout: two subjects, and what editors add."""
    monkeypatch.chdir(tmp_path)
    folder = Path("bench")
    for path, subject in (("live_subject/animal/00", "kitten"), ("object/03", "red mug")):
        image, text = folder / "images" / f"{path}.jpg", folder / "captions" / f"{path}.txt"
        image.parent.mkdir(parents=True)
        text.parent.mkdir(parents=True)
        noise_image(48, 40, len(subject)).save(image)
        lines = f"{subject}\na {subject} on the beach\n\na {subject} in space\n"
        text.write_text(lines, encoding="utf-8-sig")  # with a byte-order mark
    for path in ("object/._03.jpg", "object/.ipynb_checkpoints/03.png", "__MACOSX/object/03.jpg"):
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / path).write_bytes(b"no picture")
    return folder


def test_a_dreambench_folder_with_the_vlm_as_judge(benchmark, run, asked):
    said = run(evaluate, TINY, "--out out --folder bench --judge nowhere --prompts 2")
    summary, out = dsd.read_json("out/scores.json"), Path("out")
    rows = ["prompt alone", "reference copied", "SDEdit 0.5", "in-context inpainting", "DSD"]
    assert list(summary) == rows
    assert "VLM de-biased" in said.out and "relit" not in said.out and "warning" not in said.err
    prompts = ["a kitten on the beach", "a kitten in space"]
    prompts += ["a red mug on the beach", "a red mug in space"]
    for name in rows:
        records = [dsd.read_json(out / "rows" / name / f"000{k}.json") for k in range(4)]
        assert [record["prompt"] for record in records] == prompts
        subject = summary[name]["subject"]
        assert subject["vlm_cp"][0] == 0.75
        assert subject["vlm_cp_pf"][0] == subject["vlm_cp_pf_new"][0] == 0.75**2
        assert "cp" not in subject
    images, question = asked[-1]
    assert len(images) == 2 and "a red mug in space" in question and "copies" in question
    shown = [len(images) for images, question in asked if question == exams.SUBJECT_CRITERIA]
    assert set(shown) == {2}
    noise_image(8, 8).save(benchmark / "images/object/03.png")
    rows = "--out more --folder bench --rows 'reference copied' --references 5"
    assert "share the caption" in run(evaluate, TINY, rows).err
    assert len(list(Path("more").rglob("rows/*/*.png"))) == 3


BAD_FOLDERS = [  # a file, what it holds instead (None: it is missing), words
    ("captions/object/03.txt", b"", "subject's name"),
    ("captions/object/03.txt", b"mug\na mug\n", "at least 2 prompts"),
    ("captions/object", None, "not a text"),
    ("captions/object/03.txt", b"\xff\xfe\x00", "UTF-8"),
    ("images/object/03.jpg", b"text", "not an image"),
    ("images", None, "no pictures below"),
]


@pytest.mark.parametrize("file, contents, words", BAD_FOLDERS)
def test_bad_folders_are_answered_in_one_line(benchmark, refused, file, contents, words):
    if contents is None:
        shutil.rmtree(benchmark / file)
    else:
        (benchmark / file).write_bytes(contents)
    assert words in refused(evaluate, TINY, "--out out --folder bench --prompts 2")
    assert not Path("out/rows").exists()


MISTAKES = [
    (evaluate, "--rows nothing", "no row or group is called nothing; there are: bounds"),
    (evaluate, "--references 0", "at least 1"),
    (evaluate, "--judge nowhere", "no judge at nowhere"),
    (evaluate, "--witness nowhere", "no judge at nowhere"),
    (evaluate, "--adapter nowhere", "no adapter"),
    (evaluate, "--prompts 90", "reference 0 has"),
    (evaluate, "--strengths 2", "invalid choice"),
    (evaluate, "--width 33", "multiples of"),
    (ablations, "--rows 'DSD, LoRA rank 4' --pairs nowhere", "no nowhere/metadata.jsonl"),
    (ablations, "--folder x", "for the miniature"),
]


@pytest.mark.parametrize("script, options, words", MISTAKES)
def test_mistakes_are_answered_in_one_line(tmp_path, refused, asked, script, options, words):
    assert words in refused(script, TINY, "--out", tmp_path, options)
    assert not (tmp_path / "rows").exists()


# ---- whole runs ----------------------------------------------------------------------------------
def test_quick_run_as_a_user_starts_it(tmp_path):
    options = TINY, "--references 1 --witness", JUDGE
    out, _ = run_script("evaluate.py", *options, cwd=tmp_path)
    folder = tmp_path / "runs" / "evaluate"
    summary, table = dsd.read_json(folder / "scores.json"), (folder / "table.md").read_text()
    names = ["prompt alone", "reference copied", "true rendering", "SDEdit 0.5"]
    names += ["in-context inpainting", "DSD"]
    assert list(summary) == names and table.strip() in out and "DSD minus this row" in table
    for name in names:
        row = folder / "rows" / name
        subject, relight = dsd.read_json(row / "0000.json"), dsd.read_json(row / "0001.json")
        assert f"| {name} | 1 |" in table and "pose" in relight and "pose" not in subject
        for mark in ("cp", "pf", "cp_pf", "pf_new"):
            assert 0 <= subject[mark] <= 1 and 0 <= relight[mark] <= 1
        # the witness is the judge once more
        assert subject["judges_agree"] == 1 and subject["witness_cp"] == subject["cp"]
        assert Image.open(row / "0001.png").size == (32, 32)
    truth = summary["true rendering"]
    assert truth["relight"]["pose"] == truth["subject"]["pf"] == [1.0] * 3
    assert summary["DSD"]["subject"]["dsd_minus"] == [0.0] * 3
    assert Image.open(folder / "scatter.png").width > 300
    assert Image.open(folder / "contact_sheet.png").height > 7 * 128


def test_started_again_it_makes_what_is_missing_and_nothing_twice(
    tmp_path, run, refused, asked, monkeypatch
):
    drawn, teacher, rows = [], evaluate.teacher, tmp_path / "rows"

    def counted_teacher(pipe, cases, *args, **more):
        drawn.extend(cases)
        return teacher(pipe, cases, *args, **more)

    monkeypatch.setattr(evaluate, "teacher", counted_teacher)
    command = evaluate, TINY, "--rows zero-shot", "--out", tmp_path
    run(*command)
    whole = written(rows)
    both = ["0002.json", "0002.png"]
    for lost, pictures, questions in (([], 0, 0), (both[:1], 0, 8), (both, 4, 8)):  # batches of 4
        for name in lost:
            (rows / "SDEdit 0.5" / name).unlink()
        drawn.clear()
        asked.clear()
        run(*command)
        assert written(rows) == whole and (len(drawn), len(asked)) == (pictures, questions)
    run(*command, "--references 3")
    assert written(rows).items() >= whole.items()  # the first cases are the same
    assert "holds another run" in refused(*command, "--seed 1")


# ---- the long table ------------------------------------------------------------------------------
def test_dreambooth_learns_the_reference_and_leaves_the_teacher_as_it_was(flux):
    settings = {"width": 32, "height": 32, "steps": 2, "guidance_scale": 1.0, "model": flux}
    args = argparse.Namespace(**settings)
    pipe, cases = dsd.load_pipeline(FluxPipeline, flux), exams.world_cases([0], 1, 0, 32)
    before = evaluate.teacher(pipe, cases, args)
    untuned, tuned, again = [ablations.dreambooth(pipe, cases, args, n, 2e-3) for n in (0, 4, 4)]
    after = evaluate.teacher(pipe, cases, args)
    assert difference(tuned, again) == difference(before, after) == 0 < difference(tuned, untuned)


def test_every_row_of_the_long_table(tmp_path, run, asked, pairs, monkeypatch):
    """Drawn at tiny settings; finetune.py itself trains the ablations."""
    trained, tuned, tune, out = [], [], ablations.tune, tmp_path / "out"

    def train(script, *options):
        trained.append(Path(options[options.index("--out") + 1]).name)
        run(finetune, *options, "--rank 2 --batch_size 2")

    def counted_tune(pipe, x, text, args, seed, steps, learning_rate):
        tuned.append(steps)
        return tune(pipe, x, text, args, seed, steps, learning_rate)

    monkeypatch.setattr(ablations, "run_script", train)
    monkeypatch.setattr(ablations, "tune", counted_tune)
    monkeypatch.setattr(ablations, "TUNING", {2: 1e-3})
    few = {name: ablations.ABLATIONS[name] for name in ("single frame", "LoRA rank 4")}
    monkeypatch.setattr(ablations, "ABLATIONS", few)
    options = "--ablation_steps 1 --references 1 --unguided_steps 0 --rows tuning DSD"
    command = ablations, TINY, options, "sampling ablation --pairs", pairs, "--out", out
    said = run(*command).out
    rows = ["in-context, clean reference", "DreamBooth-LoRA, 2 steps", "DSD"]
    rows += ["DSD, single frame", "DSD, LoRA rank 4"]
    assert all(f"| {name} | 1 |" in said for name in rows)
    assert len({(out / "rows" / name / "0000.png").read_bytes() for name in rows}) == len(rows)
    assert tuned == [2] and set(trained) == {"single_frame", "LoRA_rank_4"}
    assert dsd.adapter_facts(out / "ablations" / "single_frame")["frames"] == 1
    asked.clear()
    trained.clear()
    run(*command)
    assert not asked and not trained


def test_pairs_of_the_ablations(pairs, tmp_path, monkeypatch):
    folders = {"pairs": pairs, "grids": tmp_path / "grids", "vlm": "vlm", "out": tmp_path}
    args = argparse.Namespace(seed=0, device="cpu", model=dsd.MINIATURE / "flux", **folders)
    dsd.write_json(args.grids / "grids.jsonl", [{}, {}])
    whole = dsd.read_records(pairs / "metadata.jsonl")

    def curated(script, *options):
        told = dict(zip(options[::2], options[1::2]))
        if script == "curate.py":
            assert ("--tolerance" in told) == (told["--grids"] == args.grids)
            dsd.write_json(told["--out"] / "metadata.jsonl", whole * 3)
        else:
            assert told["--count"] == 4 and options[-1] == "--no-negative"

    monkeypatch.setattr(ablations, "run_script", curated)
    counts = {"curated": 8, "half": 4, "quarter": 2, "by lot": 8}
    counts |= {"as many grids": 12, "as many pairs": 8}
    for which, count in counts.items():
        folder = ablations.pairs_for(which, args)
        records = dsd.read_records(folder / "metadata.jsonl")
        assert len(records) == count
        if which != "by lot":
            assert records[1]["prompt"] == whole[1]["prompt"]
        if which in ("half", "quarter"):
            picture = folder / records[0]["target_file_name"]
            assert picture.samefile(pairs / whole[0]["target_file_name"])
