"""What a recipe needs, computed: the counts agree with real tensors, real 4-bit layers and each other."""

import dsd  # first: see its head

import pytest
import torch
from diffusers import FluxControlPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5EncoderModel

import computed
import curate
import finetune
import generate_grids
import random_models
import sample


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return random_models.make_flux(tmp_path_factory.mktemp("computed") / "FLUX.1-dev")


def rows(*options):
    made = computed.Recipe(computed.parse_args([str(option) for option in options])).rows()
    return {row["step"].removeprefix("3 finetune.py: "): row for row in made}


def test_a_training_step_takes_the_same_memory_on_real_tensors(dev, monkeypatch):
    """With plain attention, since a CPU's fused one is another: the peak differs by small index tensors only."""
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(computed, "fused_attention", lambda query, key, value, **_: plain(
        *(tensor.to(torch.bfloat16) for tensor in (query, key, value))))
    peaks = {}
    for device in ("meta", "cpu"):
        recipe = computed.Recipe(computed.parse_args(["--model", str(dev), "--rank", "8", "--panel", "128"]))
        recipe.student.to_empty(device=device).train()
        with sdpa_kernel(SDPBackend.MATH):
            peaks[device] = computed.measure(recipe.train_step, autocast=True, grad=True, device=device)
    assert peaks["cpu"].peak == pytest.approx(peaks["meta"].peak, rel=.01)
    assert peaks["cpu"].operations == peaks["meta"].operations


def test_autocast_is_torchs():
    """The functions that it casts are those that torch casts on a GPU, and no others that FLUX calls."""
    def cast(name):
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")
    assert all(cast({"pow": "pow.Tensor_Scalar"}.get(name, name)) for name in computed.Autocast.DTYPES)
    assert not any(map(cast, ("silu", "gelu", "mul.Tensor", "add.Tensor")))
    seen = []

    def work():
        x = torch.nn.functional.layer_norm(torch.ones(4, 8, dtype=torch.bfloat16), (8,))
        seen.extend([x.dtype, torch.nn.functional.linear(x, torch.ones(8, 8)).dtype])
    computed.measure(work, autocast=True)
    assert seen == [torch.float32, torch.bfloat16]


def test_weights_of_4_bits_are_as_bitsandbytes_makes_them(dev, monkeypatch):
    """Real quantised parts on a CPU: which layers, and how many bytes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as quantizer

    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    pipe = dsd.load_pipeline(FluxControlPipeline, dev, "nf4", dtype=torch.bfloat16)
    args = computed.parse_args(["--model", str(dev), "--quantize", "nf4"])
    for real, plain in ((pipe.transformer, computed.load_transformer(args)),
                        (pipe.text_encoder_2, T5EncoderModel.from_pretrained(dev / "text_encoder_2"))):
        kept = {name for name, p in real.named_parameters() if p.dtype != torch.uint8}
        assert all(p.dtype == torch.bfloat16 for name, p in real.named_parameters() if name in kept)
        assert kept == {name for name, _ in plain.named_parameters() if not (name.endswith("weight") and (
            computed.is_quantised(name.removesuffix(".weight"), plain.get_submodule(name.rpartition(".")[0]), args)))}
        stored = sum(p.numel() * p.element_size() for p in real.parameters())
        states = [p.quant_state for p in real.parameters() if p.dtype == torch.uint8]
        stored += sum(s.absmax.numel() * s.absmax.element_size() + 4 * s.state2.absmax.numel() for s in states)
        assert computed.weight_bytes(plain, args) == pytest.approx(stored, rel=.01)


def test_the_rows_follow_from_the_options(dev):
    """On a small model: what fits, how many pictures, and how many tokens."""
    run = "--model", dev, "--panel", 64, "--count", 10, "--rank", 8, "--card", 1, "--prompt_tokens", 64
    plain = rows(*run)
    assert all(row["fits"] == "yes" and row["peak GB"] >= .5 for name, row in plain.items() if "curate" not in name)
    assert plain["2 curate.py"]["fits"] == "NO"  # a VLM of 8 billion
    assert plain["1 generate_grids.py"]["pictures"] == 10 and plain["encoding"]["pictures"] == 42
    assert plain["training"]["tokens a pass"] == 2 * 4 * 4 + 64
    guided = rows(*run, "--image_guidance", 1.5, "--text_guidance", 2)
    assert guided["validation"]["tokens a pass"] == guided["4 sample.py"]["tokens a pass"] == 3 * (32 + 64)
    with pytest.raises(dsd.DsdError, match="no folder nowhere; leave --model out"):
        rows("--model", "nowhere")
    assert rows(*run, "--prompt_tokens", 512)["training"]["tokens a pass"] == 32 + 512


def test_the_evening_on_one_card_is_four_hours():
    """FLUX.1-dev's full size. T5 in 4 bits is 4.15 GB, since its `wo` is not quantised."""
    recipe = computed.Recipe(computed.parse_args(["--recipe", "evening"]))
    assert recipe.weights["transformer"] == pytest.approx(6.2e9, rel=.02)
    assert recipe.lora == pytest.approx(344e6, rel=.01)
    assert computed.weight_bytes(recipe.t5, recipe.args) == pytest.approx(4.15e9, rel=.01)
    table = recipe.rows()
    assert all(row["fits"] == "yes" for row in table) and 3.5 < sum(row["hours"] for row in table) < 4.5


@pytest.mark.parametrize("name", ["evening", "16", "24", "80"])
def test_a_recipes_options_are_the_scripts(name, dev, pairs, monkeypatch, tmp_path):
    """Each option of a recipe is taken by the script that it is meant for."""
    given, scripts = computed.RECIPES[name], {
        generate_grids: {"count": "count", "panel": "panel", "grid_steps": "steps"},
        curate: {"vlm_batch_size": "batch_size"},
        finetune: {"steps": "steps", "batch_size": "batch_size", "prompt_tokens": "prompt_tokens", "rank": "rank"},
        sample: {"sample_steps": "steps"}}
    known = {option for options in scripts.values() for option in options}
    assert set(given) <= known | {"card", "quantize", "offload", "vlm_billions"}
    for script, options in scripts.items():
        argv = [part for option, flag in options.items() if option in given for part in (f"--{flag}", given[option])]
        argv += {sample: ["--prompt", "a fox"]}.get(script, []) + ([] if script is curate else ["--model", dev])
        if script is sample:
            (tmp_path / dsd.ADAPTER_FILE).write_bytes((dsd.MINIATURE / "adapter" / dsd.ADAPTER_FILE).read_bytes())
            argv += ["--adapter", tmp_path]
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, argv)])
        args = script.parse_args()
        assert all(getattr(args, flag) == given[option] for option, flag in options.items() if option in given)
