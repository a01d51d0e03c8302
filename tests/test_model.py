"""The two-frame model: it starts as the teacher, its file is a standard Control LoRA, and what a
picture depends on."""

import dsd

import argparse

import pytest
import torch
from conftest import (
    difference,
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

FACTS = {"frames": 2, "clean_reference": False, "prompt_tokens": 24, "width": 32, "height": 32}
FACTS |= {"guidance_scale": 1.0, "image_guidance": 2.0, "text_guidance": 1.5}


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


# ---- at the start it is the teacher --------------------------------------------------------------
@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_a_new_student_is_the_teacher_bit_for_bit_whatever_the_condition(guidance_embeds):
    x, condition, sigma, text, ids = random_inputs()
    teacher = random_transformer(guidance_embeds=guidance_embeds)
    model = student(guidance_embeds=guidance_embeds)
    assert (model.config.in_channels, model.config.out_channels) == (128, 64)
    wanted = predict(teacher, x, sigma, text, ids)
    for c in (condition, 100 * condition, 0 * condition):
        assert torch.equal(predict(model, torch.cat([x, c], 2), sigma, text, ids), wanted)
    # where there is an embedding of it, the guidance scale matters
    other_scale = predict(teacher, x, sigma, text, ids, guidance_scale=1.0)
    assert torch.equal(other_scale, wanted) != guidance_embeds


def test_only_the_loras_of_the_blocks_and_the_condition_columns_learn():
    wanted = {"x_embedder.lora_B.default.weight"}
    for name, module in random_transformer().named_modules():
        if isinstance(module, torch.nn.Linear) and "blocks." in name:
            wanted |= {f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"}
    assert {name for name, p in student().named_parameters() if p.requires_grad} == wanted
    before, after = student().state_dict(), trained().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "x_embedder.lora_B.default.weight" in changed and changed <= wanted


@pytest.mark.parametrize("kind", ablations.RIVALS)
def test_a_rival_is_at_first_the_teacher_then_learns_and_draws_what_is_evaluated(
    kind, pairs, tmp_path
):
    out = tmp_path / "out"
    options = f"{kind} --steps 3 --batch_size 2", "--pairs", pairs, "--out", out
    run_script("miniature.ablations", *options, cwd=tmp_path)
    guidance = {"image_guidance": 2.0, "text_guidance": 2.0, "guidance_scale": 1.0}
    size = {"width": 32, "height": 32, "steps": 2, "unguided_steps": 1}
    args = argparse.Namespace(seed=0, model=dsd.MINIATURE / "flux", **guidance, **size)

    pipe = dsd.load_pipeline(FluxPipeline, args.model, dtype=torch.float32)
    x, reference, *rest = random_inputs(h=8, w=8)
    teacher = predict(pipe.transformer, x, *rest)
    new = ablations.load_rival(kind, pipe.transformer, args)
    v = predict(new, torch.cat([x, reference], 2), *rest)
    torch.testing.assert_close(v, teacher, atol=1e-5, rtol=0)
    assert not any("transformer.x_embedder" in name for name in new.trained())  # it is frozen

    learned = ablations.load_rival(kind, new.transformer, args, out)
    v = predict(learned, torch.cat([x, reference], 2), *rest)
    other = predict(learned, torch.cat([x, -reference], 2), *rest)
    assert (v - teacher).abs().max() > 1e-4 and (v - other).abs().max() > 1e-6
    images = ablations.draw_rival(pipe, exams.world_cases([0], 1, 0, 32), args, kind, out)
    assert [image.size for image in images] == [(32, 32), (32, 32)]


# ---- the adapter file ----------------------------------------------------------------------------
def edit(file, change=dict):
    """Replace the tensors of a file, {name: tensor}, by what `change` makes of them."""
    save_file(change(load_file(file)), file)


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
    v = predict(model, torch.cat([x, condition], 2), *rest)
    found = predict(pipe.transformer, torch.cat([x, condition], 2), *rest)
    torch.testing.assert_close(found, v, rtol=0, atol=1e-6)
    # it learned something, also of the condition
    assert (v - predict(random_transformer(), x, *rest)).abs().max() > 0.01
    assert (v - predict(model, torch.cat([x, -condition], 2), *rest)).abs().max() > 1e-3
    assert set(pipe.transformer.x_embedder.scaling.values()) == {1.0}


def test_the_file_holds_the_condition_columns_exactly_and_the_facts(tmp_path):
    model, file = trained(), tmp_path / dsd.ADAPTER_FILE
    dsd.save_adapter(model, tmp_path, FACTS)
    tensors = load_file(file)
    a = tensors.pop("transformer.x_embedder.lora_A.weight")
    b = tensors.pop("transformer.x_embedder.lora_B.weight")
    assert torch.equal(a, torch.cat([torch.zeros(64, 64), torch.eye(64)], 1))
    assert torch.equal(b, model.x_embedder.lora_B["default"].weight) and b.abs().min() > 0
    for name, tensor in tensors.items():
        assert tensor.shape[0 if ".lora_A" in name else 1] == 4
    for adapter in (tmp_path, file):
        assert dsd.adapter_file(adapter) == file and dsd.adapter_facts(adapter) == FACTS
    dsd.save_adapter(model, tmp_path / "half", FACTS, torch.float16)
    halves = load_file(tmp_path / "half" / dsd.ADAPTER_FILE)
    assert {tensor.dtype for tensor in halves.values()} == {torch.float16}


def released(folder, heads=2):
    """A folder in the authors' layout, in which the LoRA's entries stand in transformer/ as well.
    Returns its model, put together by hand: velocity(x, condition, ...)."""
    model, embedder = random_transformer(seed=11, heads=heads), torch.nn.Linear(64, heads * 32)
    state = model.state_dict()
    state |= {f"c_embedder.{name}": p.data for name, p in embedder.named_parameters()}
    layers = ["to_q", "to_out.0", "x_embedder", "proj_mlp"]
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=layers))
    give_random_weights(model, 0.1)
    state |= {name: p for name, p in model.state_dict().items() if ".lora_" in name}
    names = sorted(state)
    (folder / "transformer").mkdir(parents=True)
    for i in (0, 1):  # in two shards
        shard = {name: state[name].clone() for name in names[i::2]}
        save_file(shard, folder / f"transformer/model-{i + 1}-of-2.safetensors")
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model))

    def velocity(x, condition, *rest):
        hook = model.x_embedder.register_forward_hook(
            lambda module, args, out: out + embedder(condition)
        )
        v = predict(model, x, *rest)
        hook.remove()
        return v

    return velocity


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_the_released_layout_gives_the_velocity_of_its_two_embedders_summed(tmp_path, dtype, error):
    """The published LoRA is stored in bfloat16. Every weight comes from the folder."""
    velocity, pipe = released(tmp_path), stock_pipe(random_transformer(seed=12))
    edit(tmp_path / dsd.ADAPTER_FILE, lambda old: {name: old[name].to(dtype) for name in old})
    dsd.load_adapter(pipe, tmp_path)
    x, condition, *rest = random_inputs()
    v = velocity(x, condition, *rest)
    found = predict(pipe.transformer, torch.cat([x, condition], 2), *rest)
    torch.testing.assert_close(found, v, rtol=0, atol=error)
    assert (v - velocity(x, 0 * condition, *rest)).abs().max() > 0.1


@pytest.mark.parametrize("missing", ["c_embedder", "proj_out.weight", "heads", "everything"])
def test_a_released_layout_that_cannot_be_used_is_an_error_of_one_line(missing, tmp_path):
    released(tmp_path, heads=3 if missing == "heads" else 2)
    for file in tmp_path.glob("transformer/*"):
        if missing == "everything":
            file.write_bytes(b"?")
        else:
            edit(file, lambda old: {name: old[name] for name in old if missing not in name})
    with pytest.raises(dsd.DsdError, match="^[^\n]*not a released DSD transformer[^\n]*$"):
        dsd.load_adapter(stock_pipe(random_transformer()), tmp_path)


# ---- sampling ------------------------------------------------------------------------------------
PROMPTS = ["a round horned critter in space at noon", "a tall earless critter under neon"]
REFERENCES = [noise_image(32, 32, seed) for seed in (0, 1)]


@pytest.fixture
def conditioned(pipe):
    """The model with LoRA of random weights, which changes every layer."""
    give_random_weights(dsd.add_lora(dsd.widen(pipe.transformer), 4))
    return pipe


def draw(pipe, images=REFERENCES[:1], seeds=(5,), prompts=PROMPTS[:1], **changes):
    text, null_text = dsd.encode_prompts(pipe, prompts), dsd.encode_prompts(pipe, [""])
    options = {"steps": 3, "guidance_scale": 2.0, "unguided_steps": 0} | changes
    return dsd.sample_edit(pipe, dsd.to_pixels(images), text, null_text, seeds, **options)


def test_a_picture_follows_reference_prompt_and_seed_and_not_its_batch(conditioned):
    (image,) = draw(conditioned, text_guidance=2.0)
    assert difference(image, draw(conditioned, text_guidance=2.0)[0]) == 0
    first, _ = draw(conditioned, REFERENCES, [5, 6], PROMPTS, text_guidance=2.0)
    assert difference(image, first) <= 1
    for changed in ({"images": REFERENCES[1:]}, {"seeds": [6]}, {"prompts": PROMPTS[1:]}):
        assert difference(image, draw(conditioned, text_guidance=2.0, **changed)[0]) > 5


SCALES = [({}, 1), ({"text_guidance": 3.0}, 2), ({"image_guidance": 1.5}, 3)]


@pytest.mark.parametrize("scales, passes", SCALES)
def test_each_guidance_scale_changes_the_picture_after_the_unguided_steps(
    conditioned, scales, passes
):
    plain, calls = draw(conditioned), []
    conditioned.transformer.register_forward_pre_hook(lambda module, args: calls.append(module))
    guided = draw(conditioned, **scales, unguided_steps=1)
    assert (difference(plain, guided) > 2) == bool(scales)
    assert len(calls) == 1 + passes + passes
    assert difference(plain, draw(conditioned, **scales, unguided_steps=3)) == 0
    assert len(calls) == 1 + passes + passes + 3


def test_a_clean_reference_stays_in_frame_1_at_every_step(conditioned, monkeypatch):
    """Not the paper's way: no noise on it, no condition, and zeros in a pass without it."""
    run, decode, read, drawn = dsd.run_transformer, dsd.decode, [], []

    def run_transformer(model, tokens, *rest):
        read.append(tokens)
        return run(model, tokens, *rest)

    def decode_and_keep(vae, tokens, *size):
        drawn.append(tokens)
        return decode(vae, tokens, *size)

    monkeypatch.setattr(dsd, "run_transformer", run_transformer)
    monkeypatch.setattr(dsd, "decode", decode_and_keep)
    draw(conditioned, clean_reference=True, image_guidance=2.0)
    generator = [torch.Generator().manual_seed(5)]
    condition = dsd.encode(conditioned.vae, dsd.canvas(dsd.to_pixels(REFERENCES[:1])), generator)
    reference, _ = dsd.split_frames(condition, 8, 16)
    first, second = zip(*[dsd.split_frames(tokens[..., :64], 8, 16) for tokens in read])
    assert not any(tokens[..., 64:].any() for tokens in read)
    for k in range(0, 9, 3):  # each step's passes: v(0,0), v(I,0), v(I,T)
        assert not first[k].any() and all(torch.equal(x, reference) for x in first[k + 1 : k + 3])
        assert torch.equal(second[k], second[k + 2]) and not torch.equal(second[k], second[k - 1])
    assert torch.equal(dsd.split_frames(drawn[0], 8, 16)[0], reference)


def test_an_encoded_canvas_is_in_the_pipelines_scale(pipe):
    pixels = dsd.canvas(dsd.to_pixels(REFERENCES))
    tokens = dsd.encode(pipe.vae, pixels)
    latents = pipe.vae.encode(pixels.to(tokens.device)).latent_dist.mode()
    back = pipe._unpack_latents(tokens, 32, 64, pipe.vae_scale_factor)
    back = back / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    torch.testing.assert_close(back, latents)


def test_stock_lines_draw_with_the_miniature_and_its_adapter_as_they_stand():
    pipe = FluxPipeline.from_pretrained(dsd.MINIATURE / "flux")
    image = pipe("a critter", height=32, width=32, num_inference_steps=1).images[0]
    assert image.size == (32, 32)
    pipe = FluxControlPipeline.from_pretrained(dsd.MINIATURE / "flux")
    pipe.load_lora_weights(dsd.MINIATURE / "adapter")
    options = {"control_image": noise_image(64, 32), "height": 32, "width": 64}
    assert pipe("a critter", num_inference_steps=1, **options).images[0].size == (64, 32)


def test_noise_levels_in_bfloat16_are_rounded_as_the_stock_pipeline_rounds_them(
    conditioned, monkeypatch
):
    """The timestep is cast before the division; casting after it would give other levels."""
    seen = []

    def run_transformer(model, tokens, sigma, *rest):
        seen.append(sigma.item())
        return tokens[..., :64]

    monkeypatch.setattr(dsd, "run_transformer", run_transformer)
    monkeypatch.setattr(type(conditioned.transformer), "dtype", torch.bfloat16)
    draw(conditioned, steps=28)
    levels = conditioned.scheduler.timesteps
    assert seen == [(t.to(torch.bfloat16) / 1000).item() for t in levels]
    assert seen != [(t / 1000).to(torch.bfloat16).item() for t in levels]
