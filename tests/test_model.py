"""The two-frame model: it starts as the teacher, its file is a standard Control LoRA, what a picture depends on."""

import dsd

import argparse

import pytest
import torch
from conftest import (
    give_random_weights,
    noise_image,
    predict,
    random_inputs,
    random_transformer,
    run_script,
)
from diffusers import FluxControlPipeline, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from miniature import ablations, exams

FACTS = {
    "frames": 2,
    "prompt_tokens": 24,
    "width": 32,
    "height": 32,
    "guidance_scale": 1.0,
    "image_guidance": 2.0,
    "text_guidance": 1.5,
}


def student(rank=4, **kind):
    return dsd.add_lora(dsd.widen(random_transformer(**kind)), rank)


def trained(rank=4):
    """A student after a few real optimiser steps on random data."""
    model = student(rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        x, condition, sigma, text, ids = random_inputs(seed=step)
        v = dsd.run_transformer(model, torch.cat([x, condition], 2), sigma, text, ids, 1.0)
        dsd.two_frame_loss(v, x - condition, 4, 8)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def stock_pipe(transformer):
    """diffusers' own pipeline around a transformer, nothing of ours in it."""
    return FluxControlPipeline(None, None, None, None, None, None, transformer)


# ---- at the start it is the teacher ----------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_a_new_student_is_the_teacher_bit_for_bit_whatever_the_condition(guidance_embeds):
    x, condition, sigma, text, ids = random_inputs()
    teacher, model = (
        random_transformer(guidance_embeds=guidance_embeds),
        student(guidance_embeds=guidance_embeds),
    )
    assert (model.config.in_channels, model.config.out_channels) == (128, 64)
    wanted = predict(teacher, x, sigma, text, ids)
    for c in (condition, 100 * condition, 0 * condition):
        assert torch.equal(predict(model, torch.cat([x, c], 2), sigma, text, ids), wanted)
    assert (
        torch.equal(predict(teacher, x, sigma, text, ids, 1.0), wanted) != guidance_embeds
    )  # its scale reaches it


def test_only_the_loras_of_the_blocks_and_the_condition_columns_learn():
    linears = {
        name
        for name, m in random_transformer().named_modules()
        if isinstance(m, torch.nn.Linear) and "blocks." in name
    }
    wanted = {f"{name}.lora_{part}.default.weight" for name in linears for part in "AB"}
    wanted.add("x_embedder.lora_B.default.weight")
    assert {name for name, p in student().named_parameters() if p.requires_grad} == wanted
    before, after = student().state_dict(), trained().state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= wanted
    assert not torch.equal(
        before["x_embedder.lora_B.default.weight"], after["x_embedder.lora_B.default.weight"]
    )


@pytest.mark.parametrize("kind", ablations.RIVALS)
def test_a_rival_is_at_first_the_teacher_then_learns_from_the_pairs_and_draws_what_is_evaluated(
    kind, pairs, tmp_path
):
    run_script(
        "miniature.ablations",
        kind,
        "--pairs",
        pairs,
        "--steps",
        3,
        "--batch_size",
        2,
        "--out",
        "out",
        cwd=tmp_path,
    )
    assert len(dsd.read_records(tmp_path / "out" / "log.jsonl")) == 3
    args = argparse.Namespace(
        seed=0,
        width=32,
        height=32,
        prompt_tokens=[24, 40],
        steps=2,
        image_guidance=2.0,
        text_guidance=2.0,
        guidance_scale=1.0,
        unguided_steps=1,
        rival=(kind, tmp_path / "out"),
    )
    pipe = dsd.load_pipeline(FluxPipeline, dsd.MINIATURE / "flux", dtype=torch.float32)
    x, reference, *rest = random_inputs(h=8, w=8)
    teacher = predict(pipe.transformer, x, *rest)
    new = ablations.load_rival(kind, pipe.transformer, args)
    torch.testing.assert_close(
        predict(new, torch.cat([x, reference], 2), *rest), teacher, atol=1e-5, rtol=0
    )
    assert not any(
        "transformer.x_embedder" in name for name in new.trained()
    )  # the teacher is frozen
    learned = ablations.load_rival(kind, new.transformer, args, tmp_path / "out")
    v, other = (
        predict(learned, torch.cat([x, given], 2), *rest) for given in (reference, -reference)
    )
    assert (v - teacher).abs().max() > 1e-4 and (v - other).abs().max() > 1e-6
    assert [
        image.size for image in ablations.draw_rival(pipe, exams.world_cases([0], 1, 0, 32), args)
    ] == [(32, 32)] * 2


# ---- the adapter file ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank, metadata", [(4, True), (64, True), (64, False)])
def test_unmodified_diffusers_loads_the_adapter_and_predicts_the_students_velocity(
    tmp_path, rank, metadata
):
    model, pipe = trained(rank), stock_pipe(random_transformer())
    dsd.save_adapter(model, tmp_path, FACTS)
    if not metadata:
        edit(tmp_path / dsd.ADAPTER_FILE)
    pipe.load_lora_weights(str(tmp_path))
    x, condition, *rest = random_inputs(seed=7)
    tokens = torch.cat([x, condition], 2)
    v = predict(model, tokens, *rest)
    torch.testing.assert_close(predict(pipe.transformer, tokens, *rest), v, rtol=0, atol=1e-6)
    assert (v - predict(random_transformer(), x, *rest)).abs().max() > 0.01  # it learned something,
    assert (
        v - predict(model, torch.cat([x, -condition], 2), *rest)
    ).abs().max() > 1e-3  # also of the condition
    assert set(pipe.transformer.x_embedder.scaling.values()) == {1.0}


def test_the_file_holds_the_condition_columns_exactly_and_the_facts(tmp_path, monkeypatch):
    model, file = trained(), tmp_path / dsd.ADAPTER_FILE
    dsd.save_adapter(model, tmp_path, FACTS)
    tensors = load_file(file)
    a, b = (tensors[f"transformer.x_embedder.lora_{part}.weight"] for part in "AB")
    assert torch.equal(a, torch.cat([torch.zeros(64, 64), torch.eye(64)], 1))
    assert torch.equal(b, model.x_embedder.lora_B["default"].weight) and b.abs().min() > 0
    assert all(
        t.shape[0 if ".lora_A" in name else 1] == 4
        for name, t in tensors.items()
        if "x_embedder" not in name
    )
    monkeypatch.setattr(
        dsd, "snapshot_download", lambda name, allow_patterns: {"owner/name": str(tmp_path)}[name]
    )
    assert all(
        (dsd.adapter_file(given), dsd.adapter_facts(given)) == (file, FACTS)
        for given in (tmp_path, file, "owner/name")
    )
    with pytest.raises(dsd.DsdError, match="no adapter owner/other"):
        dsd.adapter_facts("owner/other")
    dsd.save_adapter(model, tmp_path / "half", FACTS, torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "half" / dsd.ADAPTER_FILE).values()} == {
        torch.float16
    }


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    model, infinite = student(), torch.zeros(64, 64).fill_diagonal_(torch.inf)
    dsd.save_adapter(model, tmp_path, FACTS)
    edit(
        tmp_path / dsd.ADAPTER_FILE,
        lambda tensors: tensors | {"transformer.x_embedder.lora_B.weight": infinite},
    )
    with pytest.raises(dsd.DsdError, match="its weights are not finite"):
        dsd.load_adapter(stock_pipe(random_transformer()), tmp_path)
    model.x_embedder.lora_B["default"].weight.data[3, 4] = torch.nan
    with pytest.raises(dsd.DsdError, match="not finite and is not saved"):
        dsd.save_adapter(model, tmp_path / "new", FACTS)
    assert not (tmp_path / "new").exists()


def released(folder, heads=2):
    """A folder in the authors' published layout, in which the LoRA's entries stand in transformer/ as well.

    Returns its model, put together by hand: velocity(x, condition, ...)."""
    model, embedder = random_transformer(seed=11, heads=heads), torch.nn.Linear(64, heads * 32)
    state = model.state_dict() | {
        f"c_embedder.{name}": p.data for name, p in embedder.named_parameters()
    }
    model.add_adapter(
        LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_out.0", "x_embedder", "proj_mlp"])
    )
    give_random_weights(model, 0.1)
    state |= {name: p for name, p in model.state_dict().items() if ".lora_" in name}
    names = sorted(state)
    (folder / "transformer").mkdir(parents=True)
    for i in (0, 1):  # in two shards
        save_file(
            {name: state[name].clone() for name in names[i::2]},
            folder / f"transformer/model-{i + 1}-of-2.safetensors",
        )
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model))

    def velocity(x, condition, *rest):
        hook = model.x_embedder.register_forward_hook(
            lambda module, args, out: out + embedder(condition)
        )
        v = predict(model, x, *rest)
        hook.remove()
        return v

    return velocity


def edit(file, change=dict):
    """Put what `change` makes of a file's tensors, {name: tensor}, in their place; the metadata is lost."""
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_released_layout_gives_the_velocity_of_its_two_embedders_summed(tmp_path, bfloat16):
    velocity, pipe = (
        released(tmp_path),
        stock_pipe(random_transformer(seed=12)),
    )  # every weight comes from the folder
    if bfloat16:  # the published LoRA is stored so
        edit(
            tmp_path / dsd.ADAPTER_FILE,
            lambda tensors: {name: t.bfloat16() for name, t in tensors.items()},
        )
    dsd.load_adapter(pipe, tmp_path)
    x, condition, *rest = random_inputs()
    v = velocity(x, condition, *rest)
    found = predict(pipe.transformer, torch.cat([x, condition], 2), *rest)
    torch.testing.assert_close(found, v, rtol=0, atol=0.02 if bfloat16 else 2e-6)
    assert (v - velocity(x, 0 * condition, *rest)).abs().max() > 0.1


def without(part):
    return lambda file: edit(
        file, lambda tensors: {name: t for name, t in tensors.items() if part not in name}
    )


@pytest.mark.parametrize(
    "spoil, heads",
    [
        (without("c_embedder.weight"), 2),
        (without("c_embedder.bias"), 2),
        (without("proj_out.weight"), 2),
        (lambda file: file.write_bytes(b"?"), 2),
        (lambda file: None, 3),
    ],
    ids=["no c_embedder", "no bias", "a weight missing", "garbage", "of another width"],
)
def test_a_released_layout_that_cannot_be_used_is_an_error_of_one_line(spoil, heads, tmp_path):
    released(tmp_path, heads)
    for file in tmp_path.glob("transformer/*"):
        spoil(file)
    with pytest.raises(dsd.DsdError, match="not a released DSD transformer") as caught:
        dsd.load_adapter(stock_pipe(random_transformer()), tmp_path)
    assert "\n" not in str(caught.value)


# ---- sampling --------------------------------------------------------------------------------------------------------
PROMPTS = [
    "a round horned critter in space at noon",
    "a tall earless critter in a cave under neon with a hat",
]
REFERENCES = [noise_image(32, 32, seed) for seed in (0, 1)]


@pytest.fixture
def conditioned(pipe):
    """The model with LoRA of random weights, which changes every layer."""
    give_random_weights(dsd.add_lora(dsd.widen(pipe.transformer), 4))
    return pipe


def draw(pipe, images=REFERENCES[:1], seeds=(5,), prompts=PROMPTS[:1], **changes):
    text, null_text = (dsd.encode_prompts(pipe, p) for p in (prompts, [""] * len(prompts)))
    options = {"steps": 3, "guidance_scale": 2.0, "unguided_steps": 0} | changes
    return dsd.sample_edit(pipe, dsd.to_pixels(images), text, null_text, seeds, **options)


def difference(a, b):
    """The largest difference of two images or lists of images in grey levels."""
    a, b = ((dsd.to_pixels(i if isinstance(i, list) else [i]) + 1) * 127.5 for i in (a, b))
    return (a - b).abs().max().item()


def test_a_picture_follows_reference_prompt_and_seed_and_not_its_batch(conditioned):
    (image,) = draw(conditioned, text_guidance=2.0)
    assert difference(image, draw(conditioned, text_guidance=2.0)) == 0
    assert (
        difference(image, draw(conditioned, REFERENCES, [5, 6], PROMPTS, text_guidance=2.0)[0]) <= 1
    )
    for changed in ({"images": REFERENCES[1:]}, {"seeds": [6]}, {"prompts": PROMPTS[1:]}):
        assert difference(image, draw(conditioned, **changed, text_guidance=2.0)) > 5


@pytest.mark.parametrize(
    "scales, passes",
    [
        ({}, 1),
        ({"text_guidance": 3.0}, 2),
        ({"image_guidance": 1.5}, 3),
        ({"image_guidance": 1.5, "text_guidance": 3.0}, 3),
    ],
)
def test_each_guidance_scale_changes_the_picture_after_the_unguided_steps(
    conditioned, scales, passes
):
    plain, rows = draw(conditioned), []
    conditioned.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    assert (difference(plain, draw(conditioned, **scales, unguided_steps=1)) > 2) == bool(scales)
    assert difference(plain, draw(conditioned, **scales, unguided_steps=3)) == 0
    assert len(rows) == 1 + passes + passes + 3  # steps of the first picture and of the second


def test_an_encoded_canvas_is_in_the_pipelines_scale(pipe):
    pixels = dsd.canvas(dsd.to_pixels(REFERENCES))
    tokens = dsd.encode(pipe.vae, pixels)
    latents = pipe.vae.encode(pixels.to(tokens.device)).latent_dist.mode()
    back = pipe._unpack_latents(tokens, 32, 64, pipe.vae_scale_factor)
    torch.testing.assert_close(
        back / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor, latents
    )


@pytest.mark.skipif(
    not (dsd.MINIATURE / "adapter" / dsd.ADAPTER_FILE).exists(), reason="the miniature is not there"
)
def test_stock_lines_draw_with_the_miniature_and_its_adapter_as_they_stand():
    pipe = FluxPipeline.from_pretrained(dsd.MINIATURE / "flux")
    assert pipe("a critter", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)
    pipe = FluxControlPipeline.from_pretrained(dsd.MINIATURE / "flux")
    pipe.load_lora_weights(dsd.MINIATURE / "adapter")
    image = pipe(
        "a critter", control_image=noise_image(64, 32), height=32, width=64, num_inference_steps=1
    ).images[0]
    assert image.size == (64, 32)


def test_noise_levels_in_bfloat16_are_rounded_as_the_stock_pipeline_rounds_them(
    conditioned, monkeypatch
):
    """The timestep is cast before the division; casting after it would give other levels."""
    seen = []
    monkeypatch.setattr(
        dsd,
        "run_transformer",
        lambda model, x, sigma, *rest: seen.append(sigma.item()) or x[..., :64],
    )
    monkeypatch.setattr(type(conditioned.transformer), "dtype", torch.bfloat16)
    draw(conditioned, steps=28)
    levels = conditioned.scheduler.timesteps
    assert seen == [(t.to(torch.bfloat16) / 1000).item() for t in levels]
    assert seen != [(t / 1000).to(torch.bfloat16).item() for t in levels]
