"""The two-frame model: it starts as the teacher, its file is a standard Control LoRA, sampling equals diffusers'."""

import json

import pytest
import torch
from conftest import give_random_weights, noise_image, predict, random_inputs, random_transformer
from diffusers import FluxControlPipeline, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dsd

SETTINGS = {"steps": 3, "image_guidance": 1.0, "text_guidance": 1.0, "guidance_scale": 2.0, "unguided_steps": 0}


def student(rank=4, **kind):
    return dsd.add_lora(dsd.widen(random_transformer(**kind)), rank)


def trained(steps=3, rank=4):
    """A student after a few real optimiser steps on random data."""
    torch.manual_seed(9)  # of LoRA's A
    model = student(rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        x, condition, sigma, text, ids = random_inputs(seed=step)
        v = dsd.run_transformer(model, torch.cat([x, condition], 2), sigma, text, ids, 1.0)
        dsd.two_frame_loss(v, x - condition, 4, 8)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def stock_pipe(transformer):
    """diffusers' own pipeline around a transformer, nothing of ours in it."""
    return FluxControlPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
                               tokenizer_2=None, transformer=transformer)


# ---- at the start it is the teacher ----------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_student_at_the_start_is_the_teacher_bit_for_bit_whatever_the_condition(guidance_embeds):
    x, condition, sigma, text, ids = random_inputs()
    teacher, model = random_transformer(guidance_embeds=guidance_embeds), student(guidance_embeds=guidance_embeds)
    wanted = predict(teacher, x, sigma, text, ids)
    for c in (condition, 100 * condition, 0 * condition):
        assert torch.equal(predict(model, torch.cat([x, c], 2), sigma, text, ids), wanted)


def test_distilled_guidance_reaches_a_model_that_has_it():
    x, _, sigma, text, ids = random_inputs()
    model = random_transformer(guidance_embeds=True)
    assert not torch.equal(predict(model, x, sigma, text, ids, 1.0), predict(model, x, sigma, text, ids, 3.5))


def test_condition_reaches_the_output_once_its_columns_are_not_zero():
    x, condition, sigma, text, ids = random_inputs()
    model = student()
    dsd.condition_columns(model).data[:, 3] = torch.linspace(-1, 1, 64)
    v = [predict(model, torch.cat([x, c], 2), sigma, text, ids) for c in (condition, -condition)]
    assert (v[0] - v[1]).abs().max() > 1e-3


def test_widened_transformer_says_so_in_its_config():
    model = dsd.widen(random_transformer())
    assert (model.config.in_channels, model.config.out_channels) == (128, 64)


def test_only_lora_of_the_blocks_and_the_condition_columns_train():
    model = student()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    linears = {name for name, m in random_transformer().named_modules()
               if isinstance(m, torch.nn.Linear) and "blocks." in name}
    assert trainable == {f"{name}.lora_{part}.default.weight" for name in linears for part in "AB"} | {
        "x_embedder.lora_B.default.weight"}


def test_training_leaves_base_and_lora_a_of_the_embedder_alone():
    before, after = (m.state_dict() for m in (student(), trained()))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("lora_" in name for name in changed) and "x_embedder.lora_A.default.weight" not in changed
    assert "x_embedder.lora_B.default.weight" in changed
    assert any("single_transformer_blocks" in name for name in changed)


# ---- the adapter file ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without metadata"])
@pytest.mark.parametrize("rank", [4, 64])
def test_unmodified_diffusers_loads_the_adapter_and_predicts_the_students_velocity(tmp_path, rank, metadata):
    model = trained(rank=rank)
    dsd.save_adapter(model, tmp_path)
    if not metadata:
        save_file(load_file(tmp_path / dsd.ADAPTER_FILE), tmp_path / dsd.ADAPTER_FILE)
    pipe = stock_pipe(random_transformer())
    pipe.load_lora_weights(str(tmp_path))
    x, condition, sigma, text, ids = random_inputs(seed=7)
    tokens = torch.cat([x, condition], 2)
    v, teachers = (predict(m, tokens[..., :m.config.in_channels], sigma, text, ids)
                   for m in (model, random_transformer()))
    torch.testing.assert_close(predict(pipe.transformer, tokens, sigma, text, ids), v, rtol=0, atol=1e-6)
    assert (v - teachers).abs().max() > .01  # it learned something
    assert set(pipe.transformer.x_embedder.scaling.values()) == {1.0}


def test_embedder_lora_in_the_file_is_zero_and_identity_and_the_columns(tmp_path):
    model = trained()
    dsd.save_adapter(model, tmp_path)
    file = load_file(tmp_path / dsd.ADAPTER_FILE)
    a, b = (file[f"transformer.x_embedder.lora_{part}.weight"] for part in "AB")
    assert torch.equal(a, torch.cat([torch.zeros(64, 64), torch.eye(64)], 1))
    assert torch.equal(b, dsd.condition_columns(model)) and b.abs().min() > 0
    assert all(tensor.shape[0 if ".lora_A" in name else 1] == 4 for name, tensor in file.items() if "x_embedder" not in name)


def test_adapter_metadata_records_ranks_and_alphas(tmp_path):
    dsd.save_adapter(student(rank=4), tmp_path)
    with safe_open(tmp_path / dsd.ADAPTER_FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 4
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == {"x_embedder": 64}


def test_adapter_can_be_written_in_half_precision(tmp_path):
    dsd.save_adapter(student(), tmp_path, torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / dsd.ADAPTER_FILE).values()} == {torch.float16}


def save_other_width(folder):
    dsd.save_adapter(student(heads=3), folder)


def save_cut(folder):
    dsd.save_adapter(student(), folder)
    file = folder / dsd.ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize("make, words", [
    (lambda folder: None, "no adapter"), (save_other_width, "does not fit"), (save_cut, "does not fit"),
    (lambda folder: (folder / dsd.ADAPTER_FILE).write_text("?"), "does not fit")],
    ids=["missing", "of another width", "cut", "garbage"])
def test_adapter_that_cannot_be_used_is_an_error_of_one_line(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(dsd.DsdError, match=words) as caught:
        dsd.load_adapter(stock_pipe(random_transformer()), tmp_path)
    assert "\n" not in str(caught.value)


# ---- the authors' released layout ------------------------------------------------------------------------------------
def released(folder, heads=2):
    """A folder in the released layout, and its model by hand: velocity(x, condition, ...)."""
    model = random_transformer(seed=11, heads=heads)
    embedder = torch.nn.Linear(64, model.config.num_attention_heads * 32)
    state = model.state_dict() | {f"c_embedder.{name}": p.data for name, p in embedder.named_parameters()}
    names, folder = sorted(state), folder / "transformer"
    folder.mkdir(parents=True)
    for i in (0, 1):  # in two shards
        save_file({name: state[name].clone() for name in names[i::2]}, folder / f"model-{i + 1}-of-2.safetensors")
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_out.0", "x_embedder", "proj_mlp"]))
    give_random_weights(model, .1)
    FluxPipeline.save_lora_weights(folder.parent, transformer_lora_layers=get_peft_model_state_dict(model))

    def velocity(x, condition, *rest):
        hook = model.x_embedder.register_forward_hook(lambda module, args, out: out + embedder(condition))
        v = predict(model, x, *rest)
        hook.remove()
        return v
    return velocity


def test_released_layout_gives_the_velocity_of_its_two_embedders_summed(tmp_path):
    velocity = released(tmp_path)
    pipe = stock_pipe(random_transformer(seed=12))  # every weight comes from the folder
    dsd.load_adapter(pipe, tmp_path)
    x, condition, *rest = random_inputs()
    v = velocity(x, condition, *rest)
    torch.testing.assert_close(predict(pipe.transformer, torch.cat([x, condition], 2), *rest), v, rtol=0, atol=2e-6)
    assert (v - velocity(x, 0 * condition, *rest)).abs().max() > .01


def drop(name):
    def change(folder):
        for file in folder.glob("transformer/*.safetensors"):
            save_file({n: t for n, t in load_file(file).items() if n != name}, file)
    return change


@pytest.mark.parametrize("change", [
    drop("c_embedder.weight"), drop("c_embedder.bias"), drop("proj_out.weight"),
    lambda folder: (folder / "transformer" / "model-1-of-2.safetensors").write_bytes(b"?")],
    ids=["no c_embedder", "no c_embedder bias", "a weight missing", "garbage"])
def test_incomplete_released_layout_is_an_error_of_one_line(tmp_path, change):
    released(tmp_path)
    change(tmp_path)
    with pytest.raises(dsd.DsdError, match="not a released DSD transformer") as caught:
        dsd.load_adapter(stock_pipe(random_transformer()), tmp_path)
    assert "\n" not in str(caught.value)


def test_released_layout_of_another_width_is_an_error_of_one_line(tmp_path):
    released(tmp_path, heads=3)
    with pytest.raises(dsd.DsdError, match="not a released DSD transformer") as caught:
        dsd.load_adapter(stock_pipe(random_transformer()), tmp_path)
    assert "\n" not in str(caught.value)


# ---- sampling --------------------------------------------------------------------------------------------------------
@pytest.fixture
def adapter(pipe, tmp_path):
    """An adapter of random weights for the model folder: it changes every layer."""
    torch.manual_seed(4)
    dsd.save_adapter(give_random_weights(dsd.add_lora(dsd.widen(pipe.transformer), 4)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def conditioned(flux, adapter):
    """The model folder with that adapter, loaded by dsd."""
    pipe = dsd.load_pipeline(FluxControlPipeline, flux)
    dsd.load_adapter(pipe, adapter)
    return pipe


PROMPTS = ["a round horned critter in space at noon", "a tall earless critter in a cave under neon with a hat"]


def draw(pipe, images, seeds, prompts=PROMPTS, **changes):
    text, null_text = (dsd.encode_prompts(pipe, p) for p in (prompts, [""] * len(prompts)))
    return dsd.sample(pipe, dsd.to_pixels(images), text, null_text, seeds, {**SETTINGS, **changes})


def difference(a, b):
    """The largest difference of two images or lists of images in grey levels."""
    a, b = ((dsd.to_pixels(i if isinstance(i, list) else [i]) + 1) * 127.5 for i in (a, b))
    return (a - b).abs().max().item()


def test_sample_equals_the_unmodified_control_pipeline_within_one_grey_level(flux, adapter, conditioned):
    references = [noise_image(32, 32, seed) for seed in (0, 1)]
    ours = draw(conditioned, references, [5, 6])
    stock = FluxControlPipeline.from_pretrained(flux, dtype=torch.float32)
    stock.load_lora_weights(str(adapter))
    for image, reference, prompt, seed in zip(ours, references, PROMPTS, (5, 6)):
        theirs = stock(prompt, control_image=dsd.build_grid([reference, noise_image(32, 32).point(lambda v: 0)], 1, 2),
                       height=32, width=64, num_inference_steps=SETTINGS["steps"],
                       guidance_scale=SETTINGS["guidance_scale"], max_sequence_length=dsd.prompt_tokens(conditioned),
                       generator=torch.Generator("cpu").manual_seed(seed)).images[0]
        assert theirs.size == (64, 32) and difference(image, theirs.crop((32, 0, 64, 32))) <= 1
    assert difference(*ours) > 10


def test_sample_follows_reference_prompt_and_seed(conditioned):
    reference, other = noise_image(32, 32), noise_image(32, 32, 1)
    image = draw(conditioned, [reference], [5], PROMPTS[:1])[0]
    assert difference(image, draw(conditioned, [reference], [5], PROMPTS[:1])[0]) == 0
    for changed in (draw(conditioned, [other], [5], PROMPTS[:1]), draw(conditioned, [reference], [6], PROMPTS[:1]),
                    draw(conditioned, [reference], [5], PROMPTS[1:])):
        assert difference(image, changed[0]) > 5


def test_a_batch_does_not_change_its_pictures(conditioned):
    references = [noise_image(32, 32, seed) for seed in (0, 1)]
    together = draw(conditioned, references, [5, 6], text_guidance=2.0)
    for i in (0, 1):
        alone = draw(conditioned, [references[i]], [5 + i], [PROMPTS[i]], text_guidance=2.0)
        assert difference(alone[0], together[i]) <= 1


def test_each_guidance_scale_changes_the_picture_and_is_off_in_the_unguided_steps(conditioned):
    reference = [noise_image(32, 32)]
    plain = draw(conditioned, reference, [5], PROMPTS[:1])
    for scales in ({"image_guidance": 2.0}, {"text_guidance": 3.0}):
        assert difference(plain, draw(conditioned, reference, [5], PROMPTS[:1], **scales)) > 5
        assert difference(plain, draw(conditioned, reference, [5], PROMPTS[:1], **scales, unguided_steps=3)) == 0


def test_sampling_runs_only_the_passes_it_needs(conditioned):
    rows = []
    conditioned.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True)
    for scales in ({}, {"text_guidance": 3.0}, {"image_guidance": 1.5, "text_guidance": 3.0}):
        draw(conditioned, [noise_image(32, 32)], [5], PROMPTS[:1], **scales, unguided_steps=1)
    assert rows == [1, 1, 1, 1, 2, 2, 1, 3, 3]


def test_encoded_canvas_decodes_to_itself_in_the_pipelines_scale(pipe):
    """Up to the VAE's error, which need not be small: the same as with diffusers' own steps."""
    pixels = dsd.canvas(dsd.to_pixels([noise_image(32, 32)]))
    tokens = dsd.encode(pipe.vae, pixels)
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    back = pipe._unpack_latents(tokens, 32, 64, pipe.vae_scale_factor)
    torch.testing.assert_close(back / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor, latents)


def test_schedule_is_the_stock_pipelines(flux):
    """With FLUX.1-dev's resolution-dependent shift, which the miniature does not have."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    import numpy as np
    ours, theirs = (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_shift=.5, max_shift=1.15)
                    for _ in range(2))
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=calculate_shift(2048, 256, 4096, .5, 1.15))
    torch.testing.assert_close(dsd.start_schedule(ours, 7, 2048, "cpu"), theirs.timesteps)
