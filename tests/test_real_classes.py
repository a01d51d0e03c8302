"""The scripts on FLUX.1's own classes and on a Qwen2.5-VL, with small random weights: all but the download."""

import dsd  # first: see its head

import json

import pytest
import torch
from conftest import noise_image
from diffusers import FluxControlPipeline, FluxPipeline
from PIL import Image
from transformers import CLIPTokenizer, T5TokenizerFast

import curate
import finetune
import generate_grids
import sample
from random_models import make_flux, make_qwen


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    return make_flux(tmp_path_factory.mktemp("real") / "FLUX.1-dev")


@pytest.fixture(scope="session")
def schnell(tmp_path_factory):
    return make_flux(tmp_path_factory.mktemp("real") / "FLUX.1-schnell", guidance_embeds=False)


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
def adapter(model, pairs, tmp_path, call):
    code, _, err = call(finetune, "--model", model, "--pairs", pairs, "--out", tmp_path / "adapter", "--steps", 2,
                        "--rank", 2, "--gradient_checkpointing", "--precision", "no")
    assert code == 0, err
    return tmp_path / "adapter"


# ---- step 1: grids ---------------------------------------------------------------------------------------------------
def test_what_the_flags_leave_open_is_flux_1s_setting(monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate_grids.py", "--model", "black-forest-labs/FLUX.1-dev"])
    args = generate_grids.parse_args()
    assert (args.steps, args.width, args.height, args.guidance_scale, args.true_cfg_scale) == (28, 512, 512, 3.5, 1.0)
    assert args.grammar is generate_grids.GRAMMAR


def test_grids_of_real_classes_are_the_stock_pipelines(model, tmp_path, call):
    code, _, err = call(generate_grids, "--model", model, "--count", 2, "--panel", 32, "--steps", 2, "--out", tmp_path)
    assert code == 0, err
    record = dsd.read_records(tmp_path / "grids.jsonl")[1]
    pipe = FluxPipeline.from_pretrained(model)
    assert isinstance(pipe.tokenizer, CLIPTokenizer) and isinstance(pipe.tokenizer_2, T5TokenizerFast)
    image = pipe(record["prompt"], width=64, height=64, num_inference_steps=2, guidance_scale=3.5,
                 max_sequence_length=256 if "schnell" in str(model) else 512,
                 generator=torch.Generator().manual_seed(record["seed"])).images[0]
    assert image.tobytes() == dsd.open_image(tmp_path / record["file"]).tobytes()


def test_prompts_of_schnell_have_256_tokens_and_of_dev_512(dev, schnell):
    for folder, tokens in ((dev, 512), (schnell, 256)):
        assert dsd.encode_prompts(dsd.load_pipeline(FluxPipeline, folder), ["a fox"])[0].shape[1] == tokens


def test_panels_need_not_be_square(dev, tmp_path, call):
    run = ["--model", dev, "--count", 1, "--steps", 1, "--height", 32]
    code, _, err = call(generate_grids, *run, "--width", 48, "--out", tmp_path / "grids")
    assert code == 0, err
    assert {p.size for p in dsd.cut_grid(dsd.open_image(tmp_path / "grids" / "000000.png"))} == {(48, 32)}
    code, _, err = call(generate_grids, *run, "--width", 40, "--out", tmp_path / "odd")
    assert code == 2 and "40 x 32 pixels" in err and "multiples of 16" in err


# ---- steps 3 and 4: training and sampling ----------------------------------------------------------------------------
def test_training_on_real_classes_ends_in_an_adapter_that_stock_diffusers_loads(adapter, model):
    log = dsd.read_records(adapter / "log.jsonl")
    assert len(log) == 2 and all(0 < r["loss"] < 100 for r in log)
    pipe = FluxControlPipeline.from_pretrained(model)
    pipe.load_lora_weights(str(adapter))
    assert pipe.transformer.config.in_channels == 128
    assert pipe.transformer.x_embedder.lora_B["default_0"].weight.abs().max() > 0


def test_one_pass_of_real_classes_is_the_stock_control_pipelines(adapter, model):
    pipe, reference = dsd.load_pipeline(FluxControlPipeline, model, adapter=adapter), noise_image(48, 32)
    texts = [dsd.encode_prompts(pipe, [prompt]) for prompt in ("the cat at sea", "")]
    ours, = dsd.sample_edit(pipe, dsd.to_pixels([reference]), *texts, [7], steps=3)
    canvas = Image.new("RGB", (96, 32))
    canvas.paste(reference)
    stock = pipe("the cat at sea", control_image=canvas, width=96, height=32, num_inference_steps=3, guidance_scale=3.5,
                 max_sequence_length=pipe.tokenizer_2.model_max_length,
                 generator=torch.Generator().manual_seed(7)).images[0]
    assert abs(dsd.to_pixels([ours]) - dsd.to_pixels([stock.crop((48, 0, 96, 32))])).max() <= 2.1 / 127.5  # grey levels


def test_sampling_on_real_classes_follows_prompt_and_guidance(adapter, model, tmp_path, call):
    noise_image(48, 40).save(tmp_path / "photo.jpg")
    run = [sample, "--model", model, "--adapter", adapter, "--image", tmp_path / "photo.jpg", "--width", 48,
           "--height", 32, "--steps", 3, "--prompt", "the cat at sea"]
    code, _, err = call(*run, "the " * 600, "--image_guidance", 1.5, "--text_guidance", 2, "--out", tmp_path / "guided")
    assert code == 0 and "1 of 2 prompts are longer" in err, err
    assert call(*run, "--out", tmp_path / "plain")[0] == 0
    images = [dsd.open_image(tmp_path / file) for file in ("guided/0000.png", "guided/0001.png", "plain/0000.png")]
    assert images[0].size == (48, 32) and len({image.tobytes() for image in images}) == 3


# ---- step 2: a real vision-language model ----------------------------------------------------------------------------
def test_a_qwen_is_asked_about_every_pair_and_its_babble_is_rejected(qwen, dev, tmp_path, call):
    call(generate_grids, "--model", dev, "--count", 1, "--panel", 32, "--steps", 1, "--out", tmp_path / "grids")
    code, _, err = call(curate, "--grids", tmp_path / "grids", "--vlm", qwen, "--out", tmp_path / "pairs",
                        "--batch_size", 4, "--max_new_tokens", 20)
    assert code == 2 and "none of 6 pairs" in err
    records = dsd.read_json(tmp_path / "pairs" / "transcripts" / "000000.json")["pairs"]
    assert {r["verdict"] for r in records} <= {"unparsable", "truncated"} and all(r["answer"] for r in records)


def test_a_qwens_answer_does_not_depend_on_the_batch(qwen):
    vlm, processor = curate.load_vlm(str(qwen))
    cases = [[noise_image(32, 32, i), noise_image(40, 32, i + 1)] for i in range(3)]
    together = curate.ask(vlm, processor, cases, "Same?", 3, 5)
    assert together == [curate.ask(vlm, processor, [case], "Same?", 1, 5)[0] for case in cases]


def test_sample_enhances_prompts_with_a_qwen(qwen, dev, pairs, tmp_path, call):
    call(finetune, "--model", dev, "--pairs", pairs, "--out", tmp_path / "adapter", "--steps", 1, "--rank", 2)
    reference = next((pairs / "images").glob("*.png"))
    code, _, err = call(sample, "--model", dev, "--adapter", tmp_path / "adapter", "--image", reference,
                        "--prompt", "a fox", "--steps", 1, "--enhance", qwen, "--out", tmp_path / "samples")
    assert code == 0, err
    assert json.loads(Image.open(tmp_path / "samples" / "0000.png").text["dsd"])["text"].startswith("a fox, ")
