"""The rivals of the long table: at first the teacher, then trained on the same pairs and drawn by the same row."""

import argparse

import pytest
import torch
from conftest import ROOT, run_script
from diffusers import FluxPipeline

import dsd
from miniature import exams, rivals

ARGS = argparse.Namespace(seed=0, width=32, height=32, prompt_tokens=[24, 40], steps=2, image_guidance=2.0,
                          text_guidance=2.0, guidance_scale=1.0, unguided_steps=1)


@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_a_rival_is_at_first_the_teacher_and_then_learns_from_the_pairs(kind, pairs, tmp_path):
    pipe = dsd.load_pipeline(FluxPipeline, ROOT / "miniature" / "flux", dtype=torch.float32)
    pipe.tokenizer_2.model_max_length, g = 24, torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 2, 16, 64, generator=g)  # (B, N, 64) each
    text, ids = dsd.encode_prompts(pipe, ["a round horned critter"] * 2), dsd.position_ids(8, 8)
    sigma, flags = torch.ones(2) / 2, ["--steps", 3, "--batch_size", 2, "--out", "out"]
    run_script("miniature/rivals.py", kind, "--pairs", pairs, *flags, cwd=tmp_path)
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3
    with torch.no_grad():
        teacher = dsd.run_transformer(pipe.transformer, x, sigma, text, ids, 1.0)
        rival = rivals.load(kind, pipe.transformer, ARGS)
        told = torch.cat([x, reference], 2), sigma, text, ids, 1.0
        torch.testing.assert_close(dsd.run_transformer(rival, *told), teacher, atol=1e-5, rtol=0)
        assert not any("transformer.x_embedder" in name for name in rival.trained())  # the teacher is frozen
        trained = rivals.load(kind, rival.transformer, ARGS, tmp_path / "out")
        assert (dsd.run_transformer(trained, *told) - teacher).abs().max() > 1e-4
        other = torch.cat([x, -reference], 2)
        assert (dsd.run_transformer(trained, *told) - dsd.run_transformer(trained, other, *told[1:])).abs().max() > 1e-6


def test_a_rival_draws_the_cases_of_the_evaluation():
    pipe = dsd.load_pipeline(FluxPipeline, ROOT / "miniature" / "flux", dtype=torch.float32)
    cases = exams.world_cases([0], 1, 0, 32)
    images = rivals.draw(pipe, cases, argparse.Namespace(**vars(ARGS) | {"rival": ("ip_adapter", None)}))
    assert [image.size for image in images] == [(32, 32)] * 2
