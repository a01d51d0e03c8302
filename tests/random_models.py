"""Folders in FLUX.1's and Qwen2.5-VL's own form with random weights of any size: all but the download.

The layouts are those of the hub: CLIP's tokenizer from vocab.json and merges.txt, T5's from tokenizer.json, a VAE of
factor 8, text encoders of two widths; FLUX.1-dev with a guidance embedding and a noise schedule that follows the
resolution, FLUX.1-schnell with neither. There is no dsd.json, as in a model from the hub."""

import dsd

import json

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from miniature.computed import FLUX_1

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALL = {  # the widths are multiples of 64, since weights of 4 bits come in blocks of 64
    "vae": FLUX_1["vae"]
    | {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "projection_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "text_encoder_2": {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "transformer": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
}


def write_tokenizers(folder):
    """FLUX.1's `tokenizer` (byte-level BPE, 77 tokens) and `tokenizer_2` (unigram, 512 tokens). Returns their sizes."""
    (folder / "tokenizer").mkdir(parents=True)
    words = [
        *BYTES,
        *(b + "</w>" for b in BYTES),
        "th",
        "the</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (folder / "tokenizer" / "vocab.json").write_text(
        json.dumps({w: i for i, w in enumerate(words)})
    )
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    dsd.write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0)]
    pieces += [(chr(i), -4.0) for i in range(33, 127)]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(
        folder / "tokenizer_2"
    )
    return len(words), len(pieces)


def make_flux(folder, guidance_embeds=True, size=SMALL, dtype=torch.float32, device="cpu"):
    """A folder of FLUX.1-dev's classes, or, without guidance embedding, FLUX.1-schnell's."""
    torch.manual_seed(0)
    clip_words, t5_words = write_tokenizers(folder)
    makers = {
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=guidance_embeds, shift=3.0 if guidance_embeds else 1.0
        ),
        "vae": lambda: AutoencoderKL(**size["vae"]),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                **{
                    "vocab_size": clip_words,
                    "bos_token_id": 0,
                    "eos_token_id": 2,
                    "pad_token_id": 1,
                    **size["text_encoder"],
                }
            )
        ),
        "text_encoder_2": lambda: T5EncoderModel(
            T5Config(
                **{
                    "vocab_size": t5_words,
                    "feed_forward_proj": "gated-gelu",
                    **size["text_encoder_2"],
                }
            )
        ),
        "transformer": lambda: FluxTransformer2DModel(
            guidance_embeds=guidance_embeds, **size["transformer"]
        ),
    }
    index = {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
    }
    for name, make in makers.items():  # one at a time: at full size they fill a GPU
        torch.set_default_dtype(dtype)
        with torch.device(device):
            part = make()
        torch.set_default_dtype(torch.float32)
        part.save_pretrained(folder / name)
        index[name] = [
            "transformers" if name.startswith("text") else "diffusers",
            type(part).__name__,
        ]
        del part
    dsd.write_json(folder / "model_index.json", {"_class_name": "FluxPipeline", **index})
    return folder


def make_qwen(folder):
    """A small Qwen2.5-VL and its processor, which needs torchvision."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor

    torch.manual_seed(0)
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate([*BYTES, *special])},
        merges=[],
        additional_special_tokens=special[1:],
    )
    number = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|endoftext|>"),
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    ).save_pretrained(folder)
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    Qwen2_5_VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template
    ).save_pretrained(folder)
    return folder
