"""Small folders in FLUX.1's and Qwen2.5-VL's own form, with random weights, and a chat model.

The layouts are those of the hub: CLIP's tokenizer from vocab.json and merges.txt, T5's from
tokenizer.json, a VAE of factor 8, text encoders of two widths; FLUX.1-dev with a guidance embedding
and a noise schedule that follows the resolution, FLUX.1-schnell with neither. As on the hub there
is no dsd.json."""

import dsd

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from miniature.computed import FLUX_1

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# The widths are multiples of 64, since weights of 4 bits come in blocks of 64.
VAE = FLUX_1["vae"] | {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1}
CLIP = {"hidden_size": 64, "intermediate_size": 64, "projection_dim": 64, "num_attention_heads": 2}
CLIP |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "num_hidden_layers": 1}
T5 = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
TRANSFORMER = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (8, 12, 12)}
TRANSFORMER |= {"attention_head_dim": 32, "num_attention_heads": 2}
TRANSFORMER |= {"joint_attention_dim": 64, "pooled_projection_dim": 64}


def write_clip_tokenizer(folder):
    """Byte-level BPE of 77 tokens. Returns how many words it knows."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [*BYTES, *(byte + "</w>" for byte in BYTES), "th", "the</w>", start, end]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    config |= {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    dsd.write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    dsd.write_json(folder / "tokenizer_config.json", config)
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    return len(words)


def write_t5_tokenizer(folder):
    """A unigram model of 512 tokens. Returns how many words it knows."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0)]
    pieces += [(chr(i), -4.0) for i in range(33, 127)]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(folder)
    return len(pieces)


def make_flux(folder, guidance_embeds=True):
    """A folder of FLUX.1-dev's classes, or, without guidance embedding, FLUX.1-schnell's."""
    torch.manual_seed(0)
    words = write_clip_tokenizer(folder / "tokenizer")
    clip = CLIPTextConfig(vocab_size=words, **CLIP)
    words = write_t5_tokenizer(folder / "tokenizer_2")
    t5 = T5Config(vocab_size=words, feed_forward_proj="gated-gelu", **T5)
    schedule = {"use_dynamic_shifting": guidance_embeds, "shift": 3.0 if guidance_embeds else 1.0}
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**schedule),
        "vae": AutoencoderKL(norm_num_groups=4, **VAE),
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
        "transformer": FluxTransformer2DModel(guidance_embeds=guidance_embeds, **TRANSFORMER),
    }
    index = {"_class_name": "FluxPipeline"}
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "transformers" if name.startswith("text") else "diffusers"
        index[name] = [library, type(part).__name__]
    dsd.write_json(folder / "model_index.json", index)
    return folder


QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_qwen(folder):
    """A small Qwen2.5-VL and its processor, which needs torchvision."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor

    torch.manual_seed(0)
    end, special = "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = {word: i for i, word in enumerate([*BYTES, end, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"vocab_size": len(tokenizer), "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"eos_token_id": vocabulary["<|im_end|>"], "pad_token_id": vocabulary[end]}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
    ids = {f"{name}_token_id": vocabulary[f"<|{name}_pad|>"] for name in ("image", "video")}
    ids["vision_start_token_id"] = vocabulary["<|vision_start|>"]
    ids["vision_end_token_id"] = vocabulary["<|vision_end|>"]
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    videos = Qwen2VLVideoProcessor()
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=QWEN_TEMPLATE)
    processor.save_pretrained(folder)
    return folder


def make_chat_model(folder, answer):
    """A Llama that always says the same: its next word follows from the last one alone.

    `answer` has an odd number of words, none of them twice."""
    words = ["<answer>", *answer.split(), "<unk>", "</s>"]
    n = len(words)
    numbers = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} <answer>{% endif %}"
    special = {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    size = {"vocab_size": n, "hidden_size": n, "intermediate_size": n, "num_attention_heads": 1}
    ends = {"eos_token_id": n - 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, **size, **ends))
    model.model.embed_tokens.weight.data = torch.eye(n)
    model.lm_head.weight.data = 99 * torch.eye(n).roll(1, 0)
    model.save_pretrained(folder)
