"""FLUX.1's own classes and a Qwen2.5-VL with small random weights, and what a CPU can show of the
way on a GPU.

Stand-ins: a card is what torch says of it; accelerate fetches layers from main memory to main
memory; bitsandbytes works on a CPU. What only a GPU can show is in the README."""

import dsd

import re
import types

import pytest
import torch
from conftest import difference, give_random_weights, noise_image
from diffusers import FluxControlPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from diffusers.utils import make_image_grid
from PIL import Image
from random_models import make_qwen
from test_model import PROMPTS, draw
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5EncoderModel

import curate
import finetune
import generate_grids
import sample
from miniature import computed

HUB = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(params=["dev", "schnell"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    try:
        return make_qwen(tmp_path_factory.mktemp("real") / "qwen")
    except Exception as error:  # torchvision is absent, or built for another torch
        pytest.skip(f"Qwen2.5-VL's processor needs torchvision: {str(error).splitlines()[0]}")


@pytest.fixture
def bitsandbytes(monkeypatch):
    """A quantiser that does its work on a CPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantizer = BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


def student(model):
    """The model as finetune.py trains it, with random weights."""
    transformer = FluxTransformer2DModel.from_pretrained(model / "transformer")
    return give_random_weights(dsd.add_lora(dsd.widen(transformer), 2))


# ---- the four steps ------------------------------------------------------------------------------
def test_what_the_flags_leave_open_is_flux_1s_setting(monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate_grids.py", "--model", HUB])
    args = generate_grids.parse_args()
    assert (args.steps, args.width, args.height) == (28, 512, 512)
    assert (args.guidance_scale, args.true_cfg_scale) == (3.5, 1.0)


def test_grids_are_the_stock_pipelines_and_panels_need_not_be_square(model, tmp_path, run, refused):
    options = generate_grids, "--count 2 --steps 2 --height 32 --model", model
    run(*options, "--width 48", "--out", tmp_path)
    record = dsd.read_records(tmp_path / "grids.jsonl")[1]
    how = {"width": 96, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.5}
    how["max_sequence_length"] = 256 if "schnell" in str(model) else 512
    how["generator"] = torch.Generator().manual_seed(record["seed"])
    image = FluxPipeline.from_pretrained(model)(record["prompt"], **how).images[0]
    assert dsd.open_image(tmp_path / record["file"]) == image
    line = refused(*options, "--width 40", "--out", tmp_path / "odd")
    assert "40 x 32 pixels" in line and "multiples of 16" in line


def test_stock_diffusers_loads_what_is_trained_and_sampling_follows_prompt_and_guidance(
    model, pairs, tmp_path, run
):
    adapter, photo = tmp_path / "adapter", tmp_path / "photo.jpg"
    options = "--steps 2 --rank 2 --gradient_checkpointing --precision no"
    run(finetune, options, "--model", model, "--pairs", pairs, "--out", adapter)
    log = dsd.read_records(adapter / "log.jsonl")
    assert len(log) == 2 and all(0 < r["loss"] < 100 for r in log)
    pipe = FluxControlPipeline.from_pretrained(model)
    pipe.load_lora_weights(str(adapter))
    assert pipe.transformer.config.in_channels == 128
    assert pipe.transformer.x_embedder.lora_B["default_0"].weight.abs().max() > 0

    noise_image(48, 40).save(photo)
    options = sample, "--model", model, "--adapter", adapter, "--image", photo
    options += ("--width 48 --height 32 --steps 3 --prompt 'the cat at sea'",)
    guidance = "--image_guidance 1.5 --text_guidance 2"
    said = run(*options, f"'{'the ' * 600}'", guidance, "--out", tmp_path / "guided").err
    assert "prompts cut after" in said
    run(*options, "--out", tmp_path / "plain")
    files = "guided/0000.png", "guided/0001.png", "plain/0000.png"
    images = [dsd.open_image(tmp_path / file) for file in files]
    assert images[0].size == (48, 32) and len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("model", ["flux", "dev", "schnell"], indirect=True)
def test_pictures_equal_the_unmodified_control_pipelines_within_one_grey_level(model, tmp_path):
    """Also with FLUX.1-dev's schedule, which follows the resolution, and its guidance embedding."""
    edition = dsd.folder_settings(model).get("edition")  # the miniature has one
    dsd.save_adapter(student(model), tmp_path, {"edition": edition})
    pipe = dsd.load_pipeline(FluxControlPipeline, model, adapter=tmp_path)
    stock = FluxControlPipeline.from_pretrained(model, dtype=torch.float32).to(pipe.device)
    stock.load_lora_weights(str(tmp_path))
    references = [noise_image(48, 32, seed) for seed in (0, 1)]
    ours = draw(pipe, references, [5, 6], PROMPTS)
    how = {"height": 32, "width": 96, "num_inference_steps": 3, "guidance_scale": 2.0}
    how["max_sequence_length"] = pipe.tokenizer_2.model_max_length
    for image, reference, prompt, seed in zip(ours, references, PROMPTS, (5, 6)):
        how["control_image"] = make_image_grid([reference, Image.new("RGB", (48, 32))], 1, 2)
        how["generator"] = torch.Generator("cpu").manual_seed(seed)
        theirs = stock(prompt, **how).images[0]
        assert theirs.size == (96, 32) and difference(image, theirs.crop((48, 0, 96, 32))) <= 1
    torch.testing.assert_close(pipe.scheduler.sigmas, stock.scheduler.sigmas, rtol=0, atol=1e-6)
    assert difference(*ours) > 10


def test_a_qwen_is_asked_about_every_pair_and_its_babble_is_rejected(
    qwen, dev, tmp_path, run, refused
):
    grids, out = tmp_path / "grids", tmp_path / "pairs"
    run(generate_grids, "--count 1 --panel 32 --steps 1 --model", dev, "--out", grids)
    options = "--batch_size 4 --max_new_tokens 20 --grids"
    assert "none of 6 pairs" in refused(curate, options, grids, "--vlm", qwen, "--out", out)
    records = dsd.read_json(out / "transcripts" / "000000.json")["pairs"]
    assert {r["verdict"] for r in records} <= {"unparsable"}
    assert all(r["answer"] for r in records)


def test_a_qwens_answer_does_not_depend_on_the_batch(qwen):
    vlm, processor = curate.load_vlm(str(qwen))
    cases = [[noise_image(32, 32, i), noise_image(40, 32, i + 1)] for i in range(3)]
    together = curate.ask(vlm, processor, cases, "Same?", 3, 5)
    assert together == curate.ask(vlm, processor, cases, "Same?", 1, 5)
    # as sample.py --enhance does
    assert curate.ask(vlm, processor, [cases[0][:1]], curate.DETAILS_QUESTION, 1, 5)[0]


# ---- on a GPU ------------------------------------------------------------------------------------
NEED_A_GPU = [
    (finetune, f"--model {HUB}"),
    (generate_grids, f"--model {HUB}"),
    (generate_grids, f"--llm {HUB}"),
    (curate, "--vlm Qwen/Qwen2.5-VL-72B"),
    (sample, f"--model {HUB} --prompt a --image x.png --adapter '{dsd.MINIATURE}/adapter'"),
]


@pytest.mark.parametrize("module, options", NEED_A_GPU)
def test_what_needs_a_gpu_is_refused_before_a_download(
    module, options, pairs, tmp_path, refused, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    grid = {"file": "000000.png", "prompt": "p", "subject": "s", "family": "subject"}
    dsd.write_json(tmp_path / "grids.jsonl", [grid | {"rows": 2, "columns": 2}])
    noise_image(64, 64).save(tmp_path / "000000.png")
    inputs = {curate: ["--grids", tmp_path], finetune: ["--pairs", pairs]}
    line = refused(module, options, *inputs.get(module, []), "--out", tmp_path / "out")
    assert re.search("needs? a CUDA GPU", line)
    assert {p.name for p in (tmp_path / "out").rglob("*")} <= {".lock", "settings.json"}


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_card_computes_in_what_it_has_natively(native, dtype, monkeypatch):
    """A T4 or a V100 emulates bfloat16, which torch counts as support unless asked not to."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or native

    cuda = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(dsd, "PartialState", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert dsd.weight_dtype() == dtype


@pytest.mark.parametrize("flag, precision", [("--precision no", "no"), ("--compile", "bf16")])
def test_a_base_in_bfloat16_is_trained_in_either_precision(
    flag, precision, dev, pairs, tmp_path, run, monkeypatch
):
    compiled = []
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks", lambda self, **how: compiled.append(how)
    )
    monkeypatch.setattr(dsd, "weight_dtype", lambda: torch.bfloat16)
    options = "--steps 1 --batch_size 1", flag, "--model", dev, "--pairs", pairs
    run(finetune, *options, "--out", tmp_path)
    assert dsd.read_json(tmp_path / "settings.json")["precision"] == precision
    assert compiled == ([{"fullgraph": True}] if flag == "--compile" else [])


def test_offloaded_pipelines_with_an_adapter_draw_the_same_pictures(dev, tmp_path):
    """The same way of loading gives the same bytes. Another way puts the weights elsewhere in
    memory, where a matrix product may round otherwise: so it is equal to one grey level."""

    def pictures(way):
        pipe = dsd.load_pipeline(FluxControlPipeline, dev, offload=way, adapter=tmp_path)
        options = {"image_guidance": 1.5, "text_guidance": 2.0, "unguided_steps": 1}
        # two pictures, since the parts are put back after each
        return [draw(pipe, seeds=[seed], **options)[0] for seed in (0, 1)]

    dsd.save_adapter(student(dev), tmp_path, {})
    plain = pictures("none")
    assert pictures("none") == plain
    assert difference(pictures("model"), plain) <= 1


def test_validation_draws_with_the_models_own_steps(model, pairs, tmp_path, run, monkeypatch):
    asked = []

    def sample_edit(pipe, pixels, text, null_text, seeds, steps, **more):
        asked.append(steps)
        return [noise_image(32, 32)]

    monkeypatch.setattr(dsd, "sample_edit", sample_edit)
    options = "--steps 1 --rank 2 --batch_size 1", "--model", model, "--pairs", pairs
    run(finetune, *options, "--out", tmp_path)
    assert set(asked) == {20 if "dev" in model.name else 4}


def test_training_in_4_bits_goes_on_with_its_moments_of_8_bits(
    bitsandbytes, dev, pairs, tmp_path, run, monkeypatch
):
    """Stopped and started again, the end is the same; sample.py draws with the quantised base."""

    def parse_nf4(*args, **more):  # --quantize is refused on a CPU: it is set after that
        options = parse(*args, **more)
        options.quantize = "nf4"
        return options

    def stop(step, steps):
        if step == 3:
            raise KeyboardInterrupt
        return share(step, steps)

    parse, share = dsd.Parser.parse, finetune.learning_rate_share
    monkeypatch.setattr(dsd.Parser, "parse", parse_nf4)
    options = "--rank 64 --gradient_checkpointing --precision no --batch_size 1 --steps 4"
    train = finetune, options, "--save_every 2", "--model", dev, "--pairs", pairs, "--out"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*train, whole)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "learning_rate_share", stop)
        run(*train, parts, code="\nstopped; the same command goes on from what is saved")
    kept = torch.load(parts / "training_state.pt", weights_only=True)
    moments = kept["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"]
    assert len(kept["log"]) == 2
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    run(*train, parts)
    assert (whole / dsd.ADAPTER_FILE).read_bytes() == (parts / dsd.ADAPTER_FILE).read_bytes()
    picture, out = pairs / "images" / "000000_0.png", tmp_path / "samples"
    options = sample, "--prompt 'a fox' --steps 1", "--model", dev, "--adapter", parts
    run(*options, "--image", picture, "--out", out)
    assert (out / "0000.png").exists()


# ---- what a recipe needs: computed, and measured -------------------------------------------------
def recipe(*options):
    return computed.Recipe(computed.parse_args([*map(str, options)]))


def test_a_training_step_takes_the_computed_memory_on_real_tensors(dev, monkeypatch):
    """With plain attention, since a CPU's fused one is another: only small index tensors differ."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, **_):
        return plain(*(tensor.to(torch.bfloat16) for tensor in (query, key, value)))

    monkeypatch.setattr(computed, "fused_attention", attention)
    peaks = {}
    for device in ("meta", "cpu"):
        made = recipe("--model", dev, "--rank", 8, "--panel", 128)
        made.student.to_empty(device=device).train()
        options = {"autocast": True, "grad": True, "device": device}
        with sdpa_kernel(SDPBackend.MATH):
            peaks[device] = computed.measure(made.train_step, **options)
    assert peaks["cpu"].peak == pytest.approx(peaks["meta"].peak, rel=0.01)
    assert peaks["cpu"].operations == peaks["meta"].operations


def test_autocast_is_torchs():
    """The functions that it casts are those that torch casts on a GPU, and no other of FLUX."""

    def is_cast(name):
        name = {"pow": "pow.Tensor_Scalar"}.get(name, name)
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")

    assert all(is_cast(name) for name in computed.Autocast.DTYPES)
    assert not any(is_cast(name) for name in ("silu", "gelu", "mul.Tensor", "add.Tensor"))
    seen = []

    def layers():
        seen.append(torch.nn.LayerNorm(8)(torch.ones(4, 8, dtype=torch.bfloat16)))
        seen.append(torch.nn.Linear(8, 8)(torch.ones(4, 8)))

    computed.measure(layers, autocast=True)
    assert [tensor.dtype for tensor in seen] == [torch.float32, torch.bfloat16]


def test_weights_of_4_bits_are_those_of_linear_layers_but_the_embedder_which_gets_wider(
    bitsandbytes, dev
):
    """Real quantised parts on a CPU: which layers, and how many bytes."""
    pipe = dsd.load_pipeline(FluxControlPipeline, dev, "nf4", dtype=torch.bfloat16)
    args = computed.parse_args(["--model", str(dev), "--quantize", "nf4"])
    t5 = T5EncoderModel.from_pretrained(dev / "text_encoder_2")
    transformer = computed.load_transformer(args)
    for real, plain in ((pipe.transformer, transformer), (pipe.text_encoder_2, t5)):
        quantised = set()
        for name, module in plain.named_modules():
            if computed.is_quantised(name, module, args):
                quantised.add(f"{name}.weight")
        assert len(quantised) > 5
        for name, p in real.named_parameters():
            assert p.dtype == (torch.uint8 if name in quantised else torch.bfloat16), name
        stored = sum(p.numel() * p.element_size() for p in real.parameters())
        for p in real.parameters():
            if p.dtype == torch.uint8:
                scales = p.quant_state
                stored += scales.absmax.numel() * scales.absmax.element_size()
                stored += scales.state2.absmax.numel() * 4
        assert computed.weight_bytes(plain, args) == pytest.approx(stored, rel=0.01)


def test_the_rows_follow_from_the_options(dev):
    """On a small model: what fits, how many pictures, and how many tokens."""

    def rows(*options):
        return {row["step"].removeprefix("3 finetune.py: "): row for row in recipe(*options).rows()}

    small = "--model", dev, "--panel", 64, "--count", 10, "--rank", 8, "--memory", 5
    plain = rows(*small, "--prompt_tokens", 64)
    for name, row in plain.items():
        # a VLM of 8 billion weights does not fit
        assert row["fits"] == ("NO" if name == "2 curate.py" else "yes") and row["peak GB"] >= 3.4
    assert plain["1 generate_grids.py"]["pictures"] == 10 and plain["encoding"]["pictures"] == 42
    assert plain["training"]["tokens a pass"] == 2 * 4 * 4 + 64
    large = *small, "--count", 10**8, "--true_cfg_scale"
    plain, guided = (rows(*large, scale)["1 generate_grids.py"] for scale in (1, 3))
    assert 1.5 < guided["hours"] / plain["hours"] < 2
    guidance = "--image_guidance", 1.5, "--text_guidance", 2
    guided = rows(*small, "--prompt_tokens", 64, *guidance)
    assert guided["validation"]["tokens a pass"] == 3 * (32 + 64)
    assert guided["4 sample.py"]["tokens a pass"] == 3 * (32 + 64)
    assert rows(*small, "--prompt_tokens", 512)["training"]["tokens a pass"] == 32 + 512
    for folder, words in (("nowhere", "no folder nowhere"), (dev / "vae", "config.json")):
        with pytest.raises(dsd.DsdError, match=f"{words}; leave --model out"):
            rows("--model", folder)


def test_the_evening_on_one_card_is_an_evening_and_its_downloads_are_told(run):
    """FLUX.1-dev's full size. T5 in 4 bits is 4.15 GB, since its `wo` is not quantised."""
    evening = recipe("--recipe", "evening")
    assert evening.weights["transformer"] == pytest.approx(6.2e9, rel=0.02)
    assert evening.lora == pytest.approx(344e6, rel=0.01)
    assert computed.weight_bytes(evening.t5, evening.args) == pytest.approx(4.15e9, rel=0.01)
    out = run(computed, "--recipe evening").out
    hours = float(re.search(r"([\d.]+) hours", out)[1])
    assert 2 < hours < 3 and out.count("| yes |") == 6
    assert "33.7 GB of the model, 16.6 GB of the VLM" in out and "Main memory: 33.7 GB" in out


REPORTED = [  # card, pixels, seconds of a pass, see computed.CARDS
    ("3090", 1024, 2.15),
    ("4090", 1024, 0.59),
    ("L40S", 512, 8.71 / 50),
    ("H100", 1024, 6.71 / 28),
]


@pytest.mark.parametrize("card, pixels, seconds", REPORTED)
def test_a_pass_of_flux_takes_the_seconds_that_are_reported(card, pixels, seconds):
    made = recipe("--card", card)
    measured = computed.measure(lambda: made.run(made.teacher, 1, pixels, pixels, 512))
    assert seconds / 1.5 < made.seconds(measured.operations) < seconds * 1.5


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_memory_is_the_weights_and_what_runs_were_measured_to_hold_above_them(quantize):
    """Grids of 1024 pixels: 4.7 GiB, in bfloat16 and in nf4."""
    made = recipe("--quantize", quantize, "--count", 1)
    above = made.grids()["peak GB"] * 1e9 - sum(made.weights.values())
    assert above == pytest.approx(4.7 * 2**30, rel=0.05)


TAKEN = {  # script -> the options of a recipe that are meant for it, each with its flag there
    generate_grids: {"count": "count", "panel": "panel", "grid_steps": "steps"},
    curate: {"vlm_batch_size": "batch_size"},
    finetune: {"steps": "steps", "batch_size": "batch_size"},
}


@pytest.mark.parametrize("given", computed.RECIPES.values(), ids=computed.RECIPES)
def test_a_recipes_options_are_the_scripts(given, dev, monkeypatch):
    known = {"card", "memory", "quantize", "vlm_billions"}.union(*TAKEN.values())
    assert set(given) <= known
    for script, flags in TAKEN.items():
        wanted = {flag: given[option] for option, flag in flags.items() if option in given}
        argv = [script.__name__] if script is curate else [script.__name__, "--model", str(dev)]
        for flag, value in wanted.items():
            argv += [f"--{flag}", str(value)]
        monkeypatch.setattr("sys.argv", argv)
        assert wanted.items() <= vars(script.parse_args()).items()
