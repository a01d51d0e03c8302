"""What a CPU can show of the way on a GPU: the number formats of a card, weights of 4 bits, offloading with an adapter.

Stand-ins: a card is what torch says of it; accelerate fetches layers from main memory to main memory; bitsandbytes
works on a CPU. What only a GPU can show is in the README."""

import dsd  # first: see its head

import types

import pytest
import torch
from accelerate import cpu_offload
from conftest import give_random_weights, noise_image
from diffusers import FluxControlPipeline, FluxTransformer2DModel

import curate
import finetune
import generate_grids
import sample
from random_models import make_flux

HUB = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return make_flux(tmp_path_factory.mktemp("gpu") / "FLUX.1-dev")


# ---- without a GPU ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module, options", [
    *((module, ["--quantize", "nf4"]) for module in (generate_grids, curate, finetune, sample)),
    *((module, ["--offload", "sequential"]) for module in (generate_grids, sample)), (finetune, ["--model", HUB]),
    (generate_grids, ["--model", HUB]), (generate_grids, ["--llm", HUB]), (curate, ["--vlm", "Qwen/Qwen2.5-VL-72B"]),
    (sample, ["--model", HUB, "--prompt", "a fox", "--image", "x.png", "--adapter", "ADAPTER"])])
def test_what_needs_a_gpu_is_refused_before_a_download(module, options, flux, pairs, tmp_path, call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dsd.write_json(tmp_path / "grids.jsonl", [{
        "file": "000000.png", "prompt": "p", "subject": "s", "family": "subject", "rows": 2, "columns": 2}])
    noise_image(64, 64).save(tmp_path / "000000.png")
    options = [{"ADAPTER": flux.parent / "adapter"}.get(option, option) for option in options]
    more = {curate: ["--grids", tmp_path], finetune: ["--pairs", pairs]}.get(module, [])
    code, _, err = call(module, *options, *more, "--out", tmp_path / "out")
    assert code == 2 and "need a CUDA GPU" in err and err.strip().count("\n") == 0 and "Traceback" not in err
    assert {p.name for p in (tmp_path / "out").rglob("*")} <= {".lock", "settings.json"}


# ---- number formats --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_card_computes_in_what_it_has_natively(native, dtype, monkeypatch):
    """A T4 or a V100 emulates bfloat16, which torch counts as support unless it is asked not to."""
    monkeypatch.setattr(dsd, "PartialState", lambda: types.SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert dsd.weight_dtype() == dtype


@pytest.mark.parametrize("flags, precision", [(["--precision", "no"], "no"), (["--precision", "bf16"], "bf16"),
                                              ([], "bf16")])
def test_a_base_in_bfloat16_is_trained_in_either_precision(flags, precision, dev, pairs, tmp_path, call, monkeypatch):
    monkeypatch.setattr(dsd, "weight_dtype", lambda: torch.bfloat16)
    code, _, err = call(finetune, "--model", dev, "--pairs", pairs, "--rank", 2, "--steps", 1, "--batch_size", 1,
                        "--out", tmp_path, *flags)
    assert code == 0, err
    assert dsd.read_json(tmp_path / "settings.json")["precision"] == precision


def test_compile_compiles_the_blocks(flux, monkeypatch):
    calls = []
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda self, **how: calls.append(how))
    for compiled in (False, True):
        finetune.load_student(types.SimpleNamespace(
            model=flux, quantize="none", rank=2, gradient_checkpointing=False, compile=compiled, precision="no"))
    assert calls == [{"fullgraph": True}]


# ---- offloading ------------------------------------------------------------------------------------------------------
@pytest.fixture
def offloading(monkeypatch):
    """Sequential offloading to the CPU, where diffusers' own would ask for a device named cpu:0."""
    def offload(pipe, device):
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)
    monkeypatch.setattr(FluxControlPipeline, "enable_sequential_cpu_offload", offload)


@pytest.fixture(scope="module")
def adapter(dev, tmp_path_factory):
    pipe = dsd.load_pipeline(FluxControlPipeline, dev)
    folder = tmp_path_factory.mktemp("adapter")
    dsd.save_adapter(give_random_weights(dsd.add_lora(dsd.widen(pipe.transformer), 2)), folder, {})
    return folder


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_pipelines_with_an_adapter_draw_the_same_pictures(offload, dev, adapter, offloading):
    """The adapter is loaded first: it would not find weights that were taken away."""
    drawn = {}
    for way in ("none", offload):
        pipe = dsd.load_pipeline(FluxControlPipeline, dev, offload=way, adapter=adapter)
        texts = [dsd.encode_prompts(pipe, [prompt]) for prompt in ("a fox", "")]
        reference = dsd.to_pixels([noise_image(32, 32)])
        drawn[way] = [dsd.sample_edit(pipe, reference, *texts, [seed], 2, 1.5, 2.0, unguided_steps=1)
                      for seed in (0, 1)]  # twice, since after a picture the parts are put back
        assert (next(pipe.transformer.parameters()).device.type == "meta") == (way == "sequential")
    assert [i.tobytes() for i, in drawn["none"]] == [i.tobytes() for i, in drawn[offload]]


# ---- weights of 4 bits -----------------------------------------------------------------------------------------------
@pytest.fixture
def bitsandbytes(monkeypatch):
    """The package, and a quantiser that does its work on a CPU."""
    package = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as quantizer

    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    plain = dsd.Parser.parse

    def parse(parser, *args, **more):  # --quantize is refused on a CPU: it is set after that
        options = plain(parser, *args, **more)
        options.quantize = "nf4"
        return options
    monkeypatch.setattr(dsd.Parser, "parse", parse)
    return package


def test_training_in_4_bits_goes_on_with_its_moments_of_8_bits(bitsandbytes, dev, pairs, tmp_path, call, monkeypatch):
    """Stopped at a step and started again, the end is the same; then sample.py draws with the quantised base."""
    run = [finetune, "--model", dev, "--pairs", pairs, "--rank", 64, "--gradient_checkpointing", "--precision", "no",
           "--batch_size", 1, "--steps", 4, "--save_every", 2]
    code, _, err = call(*run, "--out", tmp_path / "whole")
    assert code == 0, err
    losses, calls = finetune.batch_losses, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*args)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "batch_losses", stop)
        assert call(*run, "--out", tmp_path / "parts")[0] == "\nstopped; the same command goes on from here"
    kept = torch.load(tmp_path / "parts" / "checkpoint" / "training_state.pt", weights_only=True)
    moments = kept["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"]
    assert kept["step"] == 2 and moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    assert call(*run, "--out", tmp_path / "parts")[0] == 0
    whole, parts = ((tmp_path / name / dsd.ADAPTER_FILE).read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    code, _, err = call(sample, "--model", dev, "--adapter", tmp_path / "parts", "--prompt", "a fox", "--steps", 1,
                        "--image", next((pairs / "images").glob("*.png")), "--out", tmp_path / "samples")
    assert code == 0 and (tmp_path / "samples" / "0000.png").exists(), err


def test_what_is_quantised_is_every_linear_layer_but_the_embedder_which_gets_wider(bitsandbytes, dev):
    student = finetune.load_student(types.SimpleNamespace(
        model=dev, quantize="nf4", rank=2, gradient_checkpointing=False, compile=False, precision="bf16"))
    kinds = {name: type(m) for name, m in student.named_modules() if name.endswith("base_layer")}
    assert kinds.pop("x_embedder.base_layer") is torch.nn.Linear
    assert len(kinds) > 10 and set(kinds.values()) == {bitsandbytes.nn.Linear4bit}
