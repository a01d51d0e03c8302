"""How grids are drawn so that more panels agree, and where their prompts come from."""

import dsd

import os
import threading

import pytest
import torch
from conftest import difference, noise_image
from diffusers import FluxPipeline

import generate_grids


@pytest.fixture(params=["flux", "dev", "schnell"])
def teacher(request):
    return request.getfixturevalue(request.param)


# ---- drawing -------------------------------------------------------------------------------------
def test_offloaded_pipelines_draw_the_same_grids(dev, monkeypatch):
    options = f"--model {dev} --count 2 --steps 2 --panel 32"
    monkeypatch.setattr("sys.argv", ["generate_grids.py", *options.split()])
    args, drawn = generate_grids.parse_args(), {}
    grids = generate_grids.plan(args, generate_grids.read_grammar(args), None)
    for way in ("none", "model"):
        pipe = dsd.load_pipeline(FluxPipeline, dev, offload=way)
        # two batches, since the parts are put back after each
        drawn[way] = [generate_grids.draw_grids(pipe, [grid], args)[0] for grid in grids]
    assert difference(drawn["none"], drawn["model"]) <= 1


# ---- the opposite as negative prompt -------------------------------------------------------------
def test_an_opposite_differs_from_the_prompt_in_its_opening_only(teacher, monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate_grids.py", f"--model={teacher}"])
    grammar = generate_grids.read_grammar(generate_grids.parse_args())
    for family in ("subject", "relight"):
        grid = generate_grids.grammar_prompt(grammar, [family], 0)
        (ours, rest), (theirs, same) = (grid[k].split(": ") for k in ("prompt", "opposite"))
        assert rest == same and ours != theirs
        assert "same" in ours and ("different" in theirs or "representing other" in theirs)


def test_the_opposite_is_what_the_stock_pipeline_guides_against(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a tall critter | at noon | at sunset | in a cave | x\n")
    draw = "--steps 2 --true_cfg_scale 3 --prompts", tmp_path / "prompts.txt", "--out"
    for name, options in (("plain", "--no-negative"), ("against", "--negative")):
        run(generate_grids, *draw, tmp_path / name, options)
    (grid,) = dsd.read_records(tmp_path / "against" / "grids.jsonl")
    pipe = FluxPipeline.from_pretrained(dsd.MINIATURE / "flux", dtype=torch.float32)
    how = {"width": 64, "height": 64, "num_inference_steps": 2, "max_sequence_length": 65}
    how |= {"negative_prompt": grid["opposite"], "true_cfg_scale": 3.0}
    image = pipe(grid["prompt"], generator=torch.manual_seed(grid["seed"]), **how).images[0]
    against = dsd.open_image(tmp_path / "against" / "000000.png")
    plain = dsd.open_image(tmp_path / "plain" / "000000.png")
    assert "other tall critter: first at noon" in grid["opposite"]
    assert against == image and difference(against, plain) > 1


# ---- prompts -------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_prompts_may_come_from_a_pipe(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    line = "a round critter | at noon | at sunset | in a cave | in space\n"
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[line])
    writer.start()
    run(generate_grids, "--steps 1 --prompts", tmp_path / "pipe", "--out", tmp_path / "grids")
    writer.join()
    assert len(dsd.read_records(tmp_path / "grids" / "grids.jsonl")) == 1


def test_captions_of_contact_sheets_may_be_cyrillic(tmp_path):
    for name, text in (("a", "кот"), ("b", "сон")):  # boxes would all be alike
        dsd.contact_sheet([[(noise_image(32, 32), text)]], tmp_path / f"{name}.png")
    assert difference(*(dsd.open_image(tmp_path / f"{name}.png") for name in "ab")) > 100


def test_the_form_that_a_chat_model_is_shown_is_the_form_that_is_read():
    request = generate_grids.LLM_REQUEST.format(captions="a cat")
    subject, settings = generate_grids.parse_llm(request)
    assert subject == "a clockwork owl with copper wings" and len(settings) == 4
