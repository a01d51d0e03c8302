"""Large models: what the machine lacks is said before a download, weights are quantised and offloaded as asked."""

import argparse
import importlib.util
import types

import pytest
import torch
from diffusers import FluxTransformer2DModel
from test_real_classes import SMALL, dev, make_flux, schnell  # noqa: F401

import curate
import dsd
import finetune
import generate_grids
import sample

HUB = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def card(monkeypatch):
    """card(gb, bitsandbytes): this machine seems to have a CUDA GPU of so many GB, and the package or not."""
    def card(gb, bitsandbytes=True):
        monkeypatch.setattr(dsd, "device", lambda: "cuda")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: types.SimpleNamespace(total_memory=gb * 1e9))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: bitsandbytes or None)
    return card


def flags(**given):
    return argparse.Namespace(**{"model": HUB, "quantize": "none", "offload": "none", **given})


# ---- what the machine lacks ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module, options", [
    (generate_grids, ["--quantize", "nf4"]), (generate_grids, ["--offload", "model"]), (sample, ["--offload", "group"]),
    (sample, ["--quantize", "int8"]), (finetune, ["--quantize", "nf4"]), (curate, ["--quantize", "nf4"])])
def test_without_a_gpu_what_needs_one_is_refused_in_one_line(module, options, without_gpu, tmp_path, call):
    code, _, err = call(module, *options, "--out", tmp_path / "out")
    assert code == 2 and "need a CUDA GPU" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module, options", [
    (generate_grids, ["--model", HUB]), (sample, ["--model", HUB, "--prompt", "a fox", "--image", "x.png"]),
    (finetune, ["--model", HUB]), (curate, ["--vlm", "Qwen/Qwen2.5-VL-72B-Instruct"])])
def test_without_a_gpu_a_large_model_is_refused_before_it_is_downloaded(module, options, without_gpu, tmp_path, call,
                                                                        monkeypatch):
    monkeypatch.setattr(dsd.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 16e9}[name])
    code, _, err = call(module, *options, "--out", tmp_path / "out")
    assert code == 2 and "this machine without a CUDA GPU has 16 GB" in err and err.count("\n") == 1


ALL = ["transformer", "text encoders"]


@pytest.mark.parametrize("gb, options, parts, fits", [
    (80, {}, ALL, True), (24, {}, ALL, False), (24, {"offload": "model"}, ALL, False), (32, {"offload": "model"}, ALL, True),
    (24, {"quantize": "nf4"}, ALL, True), (16, {"quantize": "nf4"}, ALL, True), (16, {"quantize": "int8"}, ALL, False),
    (16, {"quantize": "int8", "offload": "model"}, ALL, True), (12, {"offload": "sequential"}, ALL, True),
    (24, {}, ["transformer"], False), (16, {"quantize": "nf4"}, ["transformer"], True)])
def test_flux_fits_a_card_or_is_refused(gb, options, parts, fits, card):
    card(gb)
    if fits:
        return dsd.check_machine(flags(**options), parts)
    with pytest.raises(dsd.DsdError, match=f"needs about .* GB and the GPU has {gb} GB"):
        dsd.check_machine(flags(**options), parts)


@pytest.mark.parametrize("gb, name, quantize, fits", [
    (24, "Qwen/Qwen2.5-VL-7B-Instruct", "none", True), (16, "Qwen/Qwen2.5-VL-7B-Instruct", "none", False),
    (16, "Qwen/Qwen2.5-VL-7B-Instruct", "nf4", True), (24, "Qwen/Qwen2.5-VL-32B-Instruct", "nf4", True),
    (24, "a/model-of-unknown-size", "none", True)])
def test_a_language_models_size_is_read_from_its_name(gb, name, quantize, fits, card):
    card(gb)
    if fits:
        return dsd.check_machine(flags(quantize=quantize), language=name)
    with pytest.raises(dsd.DsdError, match="needs about"):
        dsd.check_machine(flags(quantize=quantize), language=name)


def test_a_folder_is_not_measured_by_the_hubs_models(card, flux):
    card(8)
    dsd.check_machine(flags(model=flux), ALL)


@pytest.mark.parametrize("options, words", [
    ({"quantize": "nf4"}, "needs bitsandbytes"), ({"quantize": "int8", "offload": "group"}, "needs bitsandbytes")])
def test_a_missing_package_is_named(options, words, card):
    card(80, bitsandbytes=False)
    with pytest.raises(dsd.DsdError, match=words):
        dsd.check_machine(flags(**options), ALL)


def test_what_does_not_go_together_is_refused(card):
    card(80)
    with pytest.raises(dsd.DsdError, match="goes with --offload"):
        dsd.check_machine(flags(quantize="nf4", offload="sequential"), ALL)


# ---- settings at FLUX.1's scale --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, steps", [("FLUX.1-dev", 28), ("FLUX.1-schnell", 4)])
def test_settings_follow_the_model_by_themselves(name, steps, monkeypatch):
    for module in (generate_grids, sample):
        monkeypatch.setattr("sys.argv", ["script", "--model", f"black-forest-labs/{name}"])
        settings = module.parse_args()[1]
        assert (settings["steps"], settings["width"], settings["height"]) == (steps, 512, 512)
        assert settings["guidance_scale"] == 3.5 and settings["batch_size"] == 1


def test_prompts_of_schnell_have_256_tokens_and_of_dev_512(dev, schnell):  # noqa: F811
    lengths = [dsd.encode_prompts(dsd.load_pipeline(dsd.diffusers.FluxPipeline, model), ["a fox"])[0].shape[1]
               for model in (dev, schnell)]
    assert lengths == [512, 256]


def test_panels_need_not_be_square(dev, tmp_path, call):  # noqa: F811
    run = ["--model", dev, "--count", 1, "--steps", 1, "--height", 32]
    code, _, err = call(generate_grids, *run, "--width", 48, "--out", tmp_path / "grids")
    assert code == 0, err
    grid, = dsd.read_records(tmp_path / "grids" / "grids.jsonl")
    panels = dsd.cut_grid(dsd.open_image(tmp_path / "grids" / grid["file"]), grid["rows"], grid["columns"])
    assert [p.size for p in panels] == [(48, 32)] * 4
    code, _, err = call(generate_grids, *run, "--width", 40, "--out", tmp_path / "odd")
    assert code == 2 and "width" in err and "multiples of 16" in err


# ---- loading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offload, wanted", [
    ("none", "to"), ("model", "enable_model_cpu_offload"), ("sequential", "enable_sequential_cpu_offload"),
    ("group", "enable_group_offload")])
def test_offloading_is_diffusers_own(offload, wanted):
    calls = []

    class Pipe:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append(name) or self

    pipe = Pipe()
    assert dsd.place(pipe, offload) is pipe and calls == [wanted]


def test_offloaded_pipelines_draw_the_same_pictures(dev, tmp_path, call, monkeypatch):  # noqa: F811
    """With layers fetched from main memory to main memory: the way is the same."""
    run = ["--model", dev, "--count", 2, "--panel", 32, "--steps", 2]
    assert call(generate_grids, *run, "--out", tmp_path / "none")[0] == 0
    monkeypatch.setattr(dsd, "check_machine", lambda *args, **kwargs: None)
    monkeypatch.setattr(dsd, "place", lambda pipe, offload: pipe.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level") or pipe)
    code, _, err = call(generate_grids, *run, "--offload", "group", "--out", tmp_path / "group")
    assert code == 0, err
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "group" / name).read_bytes()


def test_compile_compiles_the_blocks(flux, monkeypatch):
    calls = []
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda self, **how: calls.append(how))
    settings = {"rank": 2, "gradient_checkpointing": False, "quantize": "none"}
    for compiled in (False, True):
        finetune.load_transformer(flux, {**settings, "compile": compiled})
    assert calls == [{"fullgraph": True}]


@pytest.fixture
def bitsandbytes(monkeypatch):
    """The package, and quantisers that do their work on a CPU."""
    package = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer as ours
    for quantizer in (ours.BnB4BitDiffusersQuantizer, ours.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(dsd, "check_machine", lambda *args, **kwargs: None)
    return package


BLOCKS_OF_64 = {  # what 4-bit weights come in
    "vae": SMALL["vae"], "text_encoder": {**SMALL["text_encoder"], "hidden_size": 64, "projection_dim": 64},
    "text_encoder_2": {**SMALL["text_encoder_2"], "d_model": 64, "d_kv": 32},
    "transformer": {**SMALL["transformer"], "attention_head_dim": 32, "joint_attention_dim": 64,
                    "pooled_projection_dim": 64, "axes_dims_rope": (8, 12, 12)}}


def test_quantised_training_and_sampling(bitsandbytes, pairs, tmp_path, call):
    dev = make_flux(tmp_path / "FLUX.1-dev", True, BLOCKS_OF_64)
    run = ["--model", dev, "--pairs", pairs, "--rank", 2, "--quantize", "nf4",
           "--gradient_checkpointing", "--out", tmp_path / "adapter"]
    code, _, err = call(finetune, *run, "--steps", 3, "--save_every", 2)
    assert code == 0, err
    transformer = finetune.load_transformer(dev, {"rank": 2, "gradient_checkpointing": False, "compile": False,
                                                  "quantize": "nf4"})
    kinds = {type(m).__name__ for name, m in transformer.named_modules() if name.endswith("base_layer")}
    assert kinds == {"Linear4bit", "Linear"} and type(transformer.x_embedder.base_layer) is torch.nn.Linear
    code, _, err = call(sample, "--model", dev, "--adapter", tmp_path / "adapter", "--quantize", "nf4", "--prompt", "a fox",
                        "--image", next((pairs / "images").glob("*.png")), "--width", 32, "--height", 32, "--steps", 1,
                        "--out", tmp_path / "samples")
    assert code == 0, err


def test_moments_of_8_bits_are_restored_from_a_checkpoint(bitsandbytes, tmp_path):
    def make():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(100, 100)), torch.nn.Parameter(torch.randn(5))]
        return parameters, dsd.adamw("nf4")(parameters, lr=1e-2)

    def step(parameters, optimizer, seed):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    whole, optimizer = make()
    step(whole, optimizer, 0)
    dsd.save_checkpoint(tmp_path / "c.safetensors", whole, optimizer, None, 1)
    step(whole, optimizer, 1)
    resumed, optimizer = make()
    assert dsd.load_checkpoint(tmp_path / "c.safetensors", resumed, optimizer, None) == 1
    step(resumed, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
