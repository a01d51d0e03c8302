"""The scripts on FLUX.1's own classes and on a Qwen2.5-VL, with small random weights: all but the download.

Layouts as on the hub: CLIP's tokenizer from vocab.json and merges.txt, T5's from tokenizer.json, a VAE of factor 8
with attention, text encoders of two widths; FLUX.1-dev with a guidance embedding and a schedule that follows the
resolution, FLUX.1-schnell with neither. No dsd.json: what the flags leave open is FLUX.1's setting."""

import json

import pytest
import torch
from conftest import noise_image
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxPipeline,
                       FluxTransformer2DModel)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, T5Config, T5EncoderModel,
                          T5TokenizerFast)

import curate
import dsd
import finetune
import generate_grids
import sample

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


# ---- folders ---------------------------------------------------------------------------------------------------------
def write_tokenizers(folder):
    """FLUX.1's `tokenizer` (byte-level BPE, 77 tokens) and `tokenizer_2` (unigram, 512 tokens)."""
    (folder / "tokenizer").mkdir(parents=True)
    words = [*BYTES, *(b + "</w>" for b in BYTES), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
         "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("▁", -2.), ("▁the", -3.)]
    pieces += [(chr(i), -4.) for i in range(33, 127)]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer_2")
    return len(words), len(pieces)


SMALL = {  # FLUX.1's configs with small numbers in them; tests/benchmark.py has the full ones
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 24, "intermediate_size": 32, "projection_dim": 24, "num_hidden_layers": 1,
                     "num_attention_heads": 2},
    "text_encoder_2": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "transformer": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
                    "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6)}}


def make_flux(folder, guidance_embeds, size=SMALL, dtype=torch.float32, device="cpu"):
    """A folder of FLUX.1-dev's classes (or, without guidance embedding, FLUX.1-schnell's) with random weights."""
    torch.manual_seed(0)
    clip_words, t5_words = write_tokenizers(folder)
    makers = {
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=guidance_embeds, shift=3.0 if guidance_embeds else 1.0),
        "vae": lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=.3611, shift_factor=.1159, **size["vae"]),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**{
            "vocab_size": clip_words, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, **size["text_encoder"]})),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**{
            "vocab_size": t5_words, "feed_forward_proj": "gated-gelu", **size["text_encoder_2"]})),
        "transformer": lambda: FluxTransformer2DModel(guidance_embeds=guidance_embeds, **size["transformer"])}
    index = {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    for name, make in makers.items():  # one at a time: at full size they fill a GPU
        torch.set_default_dtype(dtype)
        with torch.device(device):
            part = make()
        torch.set_default_dtype(torch.float32)
        part.save_pretrained(folder / name)
        index[name] = ["transformers" if name.startswith("text") else "diffusers", type(part).__name__]
        del part
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}))
    return folder


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    return make_flux(tmp_path_factory.mktemp("real") / "FLUX.1-dev", True)


@pytest.fixture(scope="session")
def schnell(tmp_path_factory):
    return make_flux(tmp_path_factory.mktemp("real") / "FLUX.1-schnell", False)


@pytest.fixture(params=["dev", "schnell"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A Qwen2.5-VL and its processor, whose video half is what needs torchvision."""
    try:
        from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor
        videos = Qwen2VLVideoProcessor()
    except Exception as error:  # absent, or built for another torch
        pytest.skip(f"Qwen2.5-VL's processor needs torchvision: {dsd.one_line(error)}")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("real") / "qwen"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab={w: i for i, w in enumerate([*BYTES, *special])}, merges=[],
                               additional_special_tokens=special[1:])
    number = tokenizer.convert_tokens_to_ids
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": number("<|im_end|>"),
            "pad_token_id": number("<|endoftext|>"), "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
              "fullatt_block_indexes": [0]}
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"), vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"))).save_pretrained(folder)
    template = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
                "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}"
                "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=template).save_pretrained(folder)
    return folder


# ---- step 1: grids ---------------------------------------------------------------------------------------------------
def test_grids_of_real_classes_are_the_stock_pipelines(model, tmp_path, call):
    code, _, err = call(generate_grids, "--model", model, "--count", 2, "--panel", 32, "--steps", 2, "--out", tmp_path)
    assert code == 0, err
    record = dsd.read_records(tmp_path / "grids.jsonl")[1]
    pipe = FluxPipeline.from_pretrained(model)
    assert isinstance(pipe.tokenizer, CLIPTokenizer) and isinstance(pipe.tokenizer_2, T5TokenizerFast)
    image = pipe(record["prompt"], width=64, height=64, num_inference_steps=2, guidance_scale=3.5,
                 max_sequence_length=dsd.prompt_tokens(pipe),
                 generator=torch.Generator().manual_seed(record["seed"])).images[0]
    assert image.tobytes() == dsd.open_image(tmp_path / record["file"]).tobytes()


# ---- steps 3 and 4: training and sampling ----------------------------------------------------------------------------
@pytest.fixture
def adapter(model, pairs, tmp_path, call):
    code, out, err = call(finetune, "--model", model, "--pairs", pairs, "--out", tmp_path / "adapter", "--steps", 2,
                          "--rank", 2, "--gradient_checkpointing")
    assert code == 0, err
    return tmp_path / "adapter"


def test_training_on_real_classes_ends_in_an_adapter_that_stock_diffusers_loads(adapter, model):
    log = dsd.read_records(adapter / "log.jsonl")
    assert len(log) == 2 and all(0 < r["loss"] < 100 for r in log)
    pipe = FluxControlPipeline.from_pretrained(model)
    pipe.load_lora_weights(str(adapter))
    assert pipe.transformer.config.in_channels == 128
    assert pipe.transformer.x_embedder.lora_B["default_0"].weight.abs().max() > 0


def test_sampling_on_real_classes_follows_prompt_and_guidance(adapter, model, tmp_path, call):
    noise_image(48, 40).save(tmp_path / "photo.jpg")
    code, out, err = call(sample, "--model", model, "--adapter", adapter, "--image", tmp_path / "photo.jpg",
                          "--width", 48, "--height", 32, "--prompt", "the cat at sea", "the " * 600, "--steps", 3,
                          "--image_guidance", 1.5, "--text_guidance", 2, "--out", tmp_path / "samples")
    assert code == 0, err
    one, other = (Image.open(tmp_path / "samples" / f"000{i}.png") for i in (0, 1))
    assert one.size == (48, 32) and one.tobytes() != other.tobytes()
    assert "not read" in out + err  # 600 words are more than T5's tokens


# ---- step 2: a real vision-language model ----------------------------------------------------------------------------
def test_a_qwen_is_asked_about_every_pair_and_its_babble_is_rejected(qwen, dev, tmp_path, call):
    call(generate_grids, "--model", dev, "--count", 1, "--panel", 32, "--steps", 1, "--out", tmp_path / "grids")
    code, _, err = call(curate, "--grids", tmp_path / "grids", "--vlm", qwen, "--out", tmp_path / "pairs",
                        "--batch_size", 4)
    assert code == 2 and "none of 6 pairs" in err
    transcripts = dsd.read_records(tmp_path / "pairs" / "transcripts.jsonl")
    assert {r["verdict"] for r in transcripts} == {"unparsable"} and all(r["answer"] for r in transcripts)


def test_a_qwens_answer_does_not_depend_on_the_batch(qwen):
    vlm, processor = curate.load_vlm(str(qwen))
    cases = [[noise_image(32, 32, i), noise_image(40, 32, i + 1)] for i in range(3)]
    together = curate.ask(vlm, processor, cases, "Same?", 3, 5)
    assert together == [curate.ask(vlm, processor, [case], "Same?", 1, 5)[0] for case in cases]


def test_sample_enhances_prompts_with_a_qwen(qwen, dev, pairs, tmp_path, call):
    call(finetune, "--model", dev, "--pairs", pairs, "--out", tmp_path / "adapter", "--steps", 1, "--rank", 2)
    reference = next((pairs / "images").glob("*.png"))
    code, _, err = call(sample, "--model", dev, "--adapter", tmp_path / "adapter", "--image", reference,
                        "--prompt", "a fox", "--width", 32, "--height", 32, "--steps", 1, "--enhance", qwen,
                        "--out", tmp_path / "samples")
    assert code == 0, err
    case = json.loads(Image.open(tmp_path / "samples" / "0000.png").text["dsd"])
    assert case["text"].startswith("a fox, ")
