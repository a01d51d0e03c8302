"""What the miniature's models are made of: stock classes, small sizes."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)

from miniature import world

PANEL = 32  # side of a panel, in pixels
VAE_FACTOR = 4  # pixels are one latent pixel, 2x2 latent pixels one token: a panel is 16 tokens
SHIFT = 3.0  # of the noise schedule, in training and in sampling
TOKENS = {(1, 1): 24, (1, 2): 40, (2, 2): 65}  # of a prompt, by layout: as many as its longest has
PROMPT_TOKENS = TOKENS[2, 2]
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
NUMBERS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}  # see word_tokenizer
SPARE_WORDS = """. an image picture photo drawing of the this that it its same put show make place
    move change draw now but keep as to is and or other new another side light scene wearing one
    critters grid panels images two frames left right reference subject character object identical
    instruction"""


# ---- words ---------------------------------------------------------------------------------------
def world_words():
    """Every word that the world's captions can contain, sorted."""
    texts = [SPARE_WORDS, ": ,", "a critter with trim and eye eyes"] + world.ORDINALS
    texts += [v for values in [*world.IDENTITY.values(), *world.CONTEXT.values()] for v in values]
    openings = [opening for ways in world.SHEET_OPENINGS.values() for opening in ways]
    texts += [opening.format("scene") + " critters" for opening in openings]
    return sorted({word for text in texts for word in text.lower().split()})


def flux_words():
    """The words of the teacher. Those of poses, which came last, stand at the end."""
    words = world_words()
    return words + sorted({word for pose in world.POSES for word in pose.split()} - set(words))


def word_tokenizer(words, length, bos=False, extra=()):
    """A word-level tokenizer: <pad> 0, </s> 1, <unk> 2, <s> 3, then `extra` special tokens, then
    `words`.

    Words are split at spaces and at punctuation, hyphens stay; an unknown one becomes <unk>."""
    special = ["<pad>", "</s>", "<unk>", "<s>", *extra]
    words = special + [word for word in words if word not in special]
    vocabulary = {word: number for number, word in enumerate(words)}
    t = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    t.normalizer = normalizers.Lowercase()
    marks = pre_tokenizers.Split(Regex(r"[.,:;?!()\"]"), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    form = "<s> $A </s>" if bos else "$A </s>"
    numbers = [("<s>", 3), ("</s>", 1)]
    t.post_processor = processors.TemplateProcessing(single=form, special_tokens=numbers)
    return wrap(t, length, extra)


def wrap(tokenizer, length, extra, **more):
    """A tokenizer as transformers has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=list(extra),
        model_max_length=length,
        **SPECIAL,
        **more,
    )


# ---- FLUX ----------------------------------------------------------------------------------------
def make_vae():
    """FLUX's VAE but for its size and its factor: 4 in place of 8."""
    levels = VAE_FACTOR.bit_length()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32, 64, 96, 96)[:levels],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=PANEL,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def make_clip(words):
    """A CLIP text encoder of one layer for so many words."""
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        **NUMBERS,
    )
    return CLIPTextModel(config)


def make_t5(words):
    """A T5 encoder of two layers for so many words."""
    config = T5Config(
        vocab_size=words,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        relative_attention_num_buckets=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def make_flux(vae):
    """A FluxPipeline of tiny parts around `vae`."""
    words = flux_words()
    clip_tokenizer = word_tokenizer(words, 77, bos=True)
    t5_tokenizer = word_tokenizer(words, PROMPT_TOKENS)
    clip, t5 = make_clip(len(clip_tokenizer)), make_t5(len(t5_tokenizer))
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=t5.config.d_model,
        pooled_projection_dim=clip.config.hidden_size,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def zero_init(transformer):
    """Start every block as the identity and the output at zero (adaLN-zero, as in DiT)."""
    for name, p in transformer.named_parameters():
        modulation = "norm" in name and ".linear." in name
        if modulation or name.startswith(("proj_out", "norm_out.linear")):
            torch.nn.init.zeros_(p)


# ---- the VLM -------------------------------------------------------------------------------------
VLM_SPECIAL = ["<image>", "<answer>"]  # <image>: a token of a panel; <answer> opens the reply
VLM_TEMPLATE = """{%- for message in messages -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- if message['role'] == 'assistant' -%}</s>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<answer>{%- endif -%}"""


def vlm_tokenizer(words):
    """The word-level tokenizer, with line breaks as words of their own and nothing added around a
    text."""
    backend = word_tokenizer(["\n", *words], 512, extra=VLM_SPECIAL).backend_tokenizer
    spaces = pre_tokenizers.Split(Regex(r"[ \t]+"), "removed")
    marks = pre_tokenizers.Split(Regex(r"[.,:;?!()\"\n]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, marks])
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    joined = [  # by spaces, but for punctuation and line breaks
        decoders.WordPiece(prefix="##", cleanup=True),
        decoders.Fuse(),
        decoders.Replace(" :", ":"),
        decoders.Replace(" \n ", "\n"),
    ]
    backend.decoder = decoders.Sequence(joined)
    return wrap(backend, 512, VLM_SPECIAL, padding_side="left")


def make_vlm(words):
    """A LLaVA and its processor: a CLIP vision transformer sees a panel as 16 patches of 8x8 pixels
    and a class token, a two-layer projector hands all 17 to a Llama. `words` are what it can read
    and write."""
    tokenizer = vlm_tokenizer(words)
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=PANEL,
        patch_size=PANEL // 4,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **NUMBERS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=17,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    unused = model.model.vision_tower.post_layernorm  # LLaVA takes the features before it
    unused.requires_grad_(False)
    return model, make_processor(tokenizer)


def make_processor(tokenizer):
    """The VLM's pictures and texts as tensors."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": PANEL},
        crop_size={"height": PANEL, "width": PANEL},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PANEL // 4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=VLM_TEMPLATE,
    )


# ---- the judges ----------------------------------------------------------------------------------
def judge_labels():
    """The judge's logits, in order: "shape: round", "shape: square", ... all values of all
    attributes."""
    attributes = world.IDENTITY | world.CONTEXT | {"pose": world.POSE_NAMES}
    pairs = [(name, value) for name, values in attributes.items() for value in values]
    return [f"{name}: {value or 'nothing'}" for name, value in pairs]


def label_tables():
    """The labels by number and the numbers by label, as a configuration wants them."""
    labels = dict(enumerate(judge_labels()))
    return {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}


def make_judge():
    """A small ConvNeXt whose logits are one classification for each attribute, side by side."""
    config = ConvNextConfig(
        image_size=PANEL,
        patch_size=2,
        num_stages=3,
        hidden_sizes=[48, 96, 160],
        depths=[2, 2, 2],
        drop_path_rate=0.0,
        **label_tables(),
    )
    return ConvNextForImageClassification(config)


def make_witness():
    """A judge of another architecture: a small vision transformer, which sees a panel as 64 patches
    of 4x4 pixels."""
    config = ViTConfig(
        image_size=PANEL,
        patch_size=4,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        **label_tables(),
    )
    return ViTForImageClassification(config)
