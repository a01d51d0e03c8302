"""What a user gets wrong ends with exit code 2 and one line that says what to do, never with a traceback."""

import json
import shutil

import pytest
from conftest import critter, run_script

import curate
import dsd
import finetune
import generate_grids
import sample


@pytest.fixture
def work(tmp_path, monkeypatch, pairs):
    """An empty working folder with broken things in it."""
    monkeypatch.chdir(tmp_path)
    critter(7, [1, 0, 0]).save("good.png")
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "prompts.txt").write_text("a fox | in the snow | at noon\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    dsd.append_records(tmp_path / "other_grids.jsonl", [{"file": "000000.png"}])
    (tmp_path / "other").mkdir()
    shutil.copy("other_grids.jsonl", "other/grids.jsonl")
    (tmp_path / "garbage").mkdir()
    for name in ("grids.jsonl", "metadata.jsonl"):
        (tmp_path / "garbage" / name).write_text("no JSON\n")
    for name, change in (("cut", lambda p: p.write_bytes(p.read_bytes()[:100])), ("lost", lambda p: p.unlink()),
                         ("sizes", lambda p: critter(7, [1, 0, 0]).resize((48, 48)).save(p))):
        shutil.copytree(pairs, tmp_path / name)
        change(tmp_path / name / "images" / "000001_0.png")
    (tmp_path / "records").mkdir()
    dsd.append_records(tmp_path / "records" / "metadata.jsonl", [{"file_name": "a.png"}])
    (tmp_path / "claimed").mkdir()
    (tmp_path / "claimed" / "settings.json").write_text(json.dumps({"rank": 1}))
    return tmp_path


FLUX, VLM, PAIRS = "the FLUX folder", "the VLM folder", "the pairs"  # put in by the test
CASES = [  # script, what is wrong, arguments, words that the line must hold
    (generate_grids, "missing model", ["--model", "nowhere"], "no FLUX model at nowhere"),
    (generate_grids, "missing model in a folder", ["--model", "empty/nowhere"], "no FLUX model at empty/nowhere"),
    (generate_grids, "VLM as model", ["--model", VLM], "model_index.json missing"),
    (generate_grids, "model without parts", ["--model", "model"], "cannot load model"),
    (generate_grids, "no steps", ["--model", FLUX, "--steps", 0], "--steps"),
    (generate_grids, "no grids", ["--model", FLUX, "--count", 0], "--count"),
    (generate_grids, "no batch", ["--model", FLUX, "--batch_size", -1], "--batch_size"),
    (generate_grids, "missing prompts", ["--model", FLUX, "--prompts", "none.txt"], "none.txt"),
    (generate_grids, "broken prompts", ["--model", FLUX, "--prompts", "prompts.txt"], "prompts.txt, line 1"),
    (generate_grids, "empty prompts", ["--model", FLUX, "--prompts", "empty.txt"], "empty.txt: no prompt"),
    (generate_grids, "binary prompts", ["--model", FLUX, "--prompts", "good.png"], "good.png"),
    (generate_grids, "two sources of prompts", ["--model", FLUX, "--prompts", "prompts.txt", "--llm", "x"], "exclude"),
    (generate_grids, "missing LLM", ["--model", FLUX, "--llm", "nowhere"], "--llm nowhere"),
    (generate_grids, "VLM as LLM", ["--model", FLUX, "--llm", VLM], "not a chat model"),
    (generate_grids, "FLUX as LLM", ["--model", FLUX, "--llm", FLUX], "not a chat model"),
    (generate_grids, "folder of another run", ["--model", FLUX, "--out", "other"], "other holds grids of another run"),
    (generate_grids, "broken records", ["--model", FLUX, "--out", "garbage"], "garbage/grids.jsonl"),
    (curate, "no grids", [], "run generate_grids.py first"),
    (curate, "broken grids", ["--grids", "garbage"], "garbage/grids.jsonl"),
    (curate, "incomplete grids", ["--grids", "other"], "not a record of generate_grids.py"),
    (finetune, "missing pairs", ["--model", FLUX], "no pairs in runs/pairs; run curate.py first"),
    (finetune, "broken pairs", ["--model", FLUX, "--pairs", "garbage"], "garbage/metadata.jsonl"),
    (finetune, "other records", ["--model", FLUX, "--pairs", "records"], "records/metadata.jsonl, line 1"),
    (finetune, "cut picture", ["--model", FLUX, "--pairs", "cut"], "cut/images/000001_0.png"),
    (finetune, "lost picture", ["--model", FLUX, "--pairs", "lost"], "lost/images/000001_0.png"),
    (finetune, "pictures of two sizes", ["--model", FLUX, "--pairs", "sizes"], "(48, 48)"),
    (finetune, "missing model", ["--model", "nowhere", "--pairs", PAIRS], "no FLUX model at nowhere"),
    (finetune, "VLM as model", ["--model", VLM, "--pairs", PAIRS], "model_index.json missing"),
    (finetune, "no steps", ["--model", FLUX, "--pairs", PAIRS, "--steps", 0], "--steps"),
    (finetune, "no rank", ["--model", FLUX, "--pairs", PAIRS, "--rank", 0], "--rank"),
    (finetune, "folder of another run", ["--model", FLUX, "--pairs", PAIRS, "--out", "claimed"], "claimed holds a run"),
    (sample, "missing model", ["--model", "nowhere", "--image", "good.png", "--prompt", "a"], "no FLUX model at nowhere"),
    (sample, "no adapter", ["--model", FLUX, "--image", "good.png", "--prompt", "a", "--adapter", "empty"], "no adapter"),
    (sample, "missing picture", ["--model", FLUX, "--image", "none.png", "--prompt", "a"], "none.png"),
    (sample, "no picture", ["--model", FLUX, "--image", "good.png", "text.png", "--prompt", "a"], "text.png: not an image"),
    (sample, "no steps", ["--model", FLUX, "--image", "good.png", "--prompt", "a", "--steps", 0], "--steps"),
    (sample, "no width", ["--model", FLUX, "--image", "good.png", "--prompt", "a", "--width", 0], "--width"),
    (sample, "odd width", ["--model", FLUX, "--image", "good.png", "--prompt", "a", "--width", 33, "--adapter", "empty"],
     "multiples of"),
    (sample, "FLUX as VLM", ["--model", FLUX, "--image", "good.png", "--prompt", "a", "--enhance", FLUX],
     "vision-language"),
]


def check(err, words):
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and words in lines[0], err[-2000:]
    assert "Traceback" not in err


@pytest.mark.parametrize("script, args, words", [case[:1] + case[2:] for case in CASES],
                         ids=[f"{case[0].__name__}: {case[1]}" for case in CASES])
def test_bad_input_is_one_line_and_code_2(script, args, words, work, flux, vlm, pairs, call):
    folders = {FLUX: flux, VLM: vlm, PAIRS: pairs}
    code, _, err = call(script, *(folders.get(arg, arg) for arg in args))
    assert code == 2
    check(err, words)


@pytest.mark.parametrize("vlm_name", ["nowhere", "empty", FLUX])
def test_curate_without_a_vision_language_model(vlm_name, work, flux, call):
    (work / "grids").mkdir()
    dsd.build_grid([critter(7, [i, 0, 0]) for i in range(4)]).save("grids/000000.png")
    dsd.append_records(work / "grids" / "grids.jsonl", [{
        "file": "000000.png", "prompt": "p", "subject": "s", "family": "subject", "rows": 2, "columns": 2}])
    code, _, err = call(curate, "--grids", "grids", "--vlm", flux if vlm_name is FLUX else vlm_name)
    assert code == 2
    check(err, "model")


def test_sample_without_prompt_asks_for_one(work, flux, call):
    """A model folder without dsd.json brings no prompts, no references and no adapter."""
    shutil.copytree(flux, "bare", ignore=shutil.ignore_patterns("dsd.json"))
    for args, words in ((["--image", "good.png"], "--prompt"), (["--prompt", "a"], "--image"),
                        (["--image", "good.png", "--prompt", "a", "--width", 32, "--height", 32], "finetune.py first")):
        code, _, err = call(sample, "--model", "bare", *args)
        assert code == 2
        check(err, words)


def test_model_whose_weights_are_cut(work, flux, call):
    shutil.copytree(flux, "cut_model")
    file = next((work / "cut_model" / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    code, _, err = call(generate_grids, "--model", "cut_model", "--count", 1)
    assert code == 2
    check(err, "cannot load cut_model")


@pytest.mark.parametrize("script, args, words", [
    ("finetune.py", [], "no pairs in runs/pairs"), ("generate_grids.py", ["--model", "nowhere"], "no FLUX model")])
def test_bad_input_in_a_process_of_its_own(script, args, words, tmp_path):
    check(run_script(script, *args, cwd=tmp_path, code=2)[1], words)


def test_nothing_is_written_before_the_input_is_known_to_be_good(work, flux, call):
    assert call(generate_grids, "--model", "nowhere")[0] == call(finetune, "--model", flux)[0] == 2
    assert call(sample, "--model", flux, "--image", "text.png", "--prompt", "a")[0] == 2
    assert not (work / "runs").exists()
