"""Diffusion Self-Distillation (DSD): the core that every script shares. The method comes first, housekeeping after it.

A text-to-image model draws grids of one subject, the grids are cut into pairs, and the same model learns from the pairs
to follow a reference image (Cai et al., "Diffusion Self-Distillation for Zero-Shot Customized Image Generation", CVPR
2025, arXiv 2411.18616). In comments, "R" marks what we took from the authors' released inference code because the
paper is silent, and "*" marks our own choices.

Notation: `x_0` clean latents, `eps` Gaussian noise, `sigma` in [0, 1] the noise level, `v` the velocity. Latents are
packed: one token holds 2x2 latent pixels of 16 channels, so x has the shape (B, N, 64) with N = (h / 2) (w / 2). `I` is
the reference image (as condition tokens) and `T` the prompt (as text embeddings).
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

import diffusers
import numpy
import psutil
import torch
import transformers
from accelerate import PartialState
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

for library in (
    diffusers,
    transformers,
):  # Some of the imports below print notices, so scripts import dsd first.
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
warnings.filterwarnings(
    "ignore", "Mismatch dtype between input and weight"
)  # under autocast norms are in float32
from diffusers import (
    FluxControlPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig, get_peft_model_state_dict

MINIATURE = Path(__file__).resolve().parent / "miniature"
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}  # 4 bits a weight
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


# ---- rectified flow --------------------------------------------------------------------------------------------------
def interpolate(x_0, eps, sigma):
    """x_sigma = (1 - sigma) x_0 + sigma eps, for x_0, eps (B, N, C) and sigma (B,)."""
    sigma = sigma.view(-1, 1, 1).to(x_0.dtype)
    return (1 - sigma) * x_0 + sigma * eps


def velocity(x_0, eps):
    """The training target v = eps - x_0 = d x_sigma / d sigma (FLUX's parametrisation)."""
    return eps - x_0


def sample_sigmas(n, shift, generator):
    """Draw noise levels (n,): sigma = s u / (1 + (s - 1) u) with u uniform and s = `shift`.

    * These are the levels that a sampler with this shift visits. With a large s most of them are high, where colours
    and layout are decided; the logit-normal draws of Stable Diffusion 3 hardly ever go there."""
    u = torch.rand(n, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


def two_frame_loss(v_pred, v, h, w, weights=(1.0, 1.0)):
    """Flow-matching loss over both frames of a canvas (paper section 3.3: frame 1 is the identity, frame 2 the edit).

    v_pred, v: (B, N, C) on a canvas of h x w latent pixels, where w counts both frames. Returns three scalars: the
    weighted mean of the two frames' losses, and the mean squared error of each frame. The paper names no weights.
    * The miniature gives frame 1 a tenth: with more, a model this small copies less of the reference into frame 2."""
    first, second = split_frames((v_pred.float() - v.float()) ** 2, h, w)  # (B, N/2, C) each
    first, second = first.mean(), second.mean()
    return (weights[0] * first + weights[1] * second) / sum(weights), first, second


# ---- latents and tokens ----------------------------------------------------------------------------------------------
def pack(latents):
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): each token holds a 2x2 block of latent pixels."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens, h, w):
    """(B, h/2 * w/2, 4 C) -> (B, C, h, w), the inverse of `pack`."""
    return torch.nn.functional.pixel_shuffle(
        tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2)), 2
    )


def position_ids(h, w):
    """Position ids (h/2 * w/2, 3) of an image of h x w latent pixels: (0, row, column) for each token.

    The two frames of a canvas share one coordinate system, like the halves of one wide image (R)."""
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(h / 2), torch.arange(w / 2)
    )  # floats, as FLUX wants


def split_frames(tokens, h, w):
    """Tokens (B, N, C) of a canvas of h x w latent pixels -> its left and its right frame, (B, N/2, C) each."""
    left, right = tokens.unflatten(1, (h // 2, w // 2)).chunk(2, dim=2)  # (B, h/2, w/4, C) each
    return left.flatten(1, 2), right.flatten(1, 2)


@torch.no_grad()
def encode(vae, pixels, generator=None):
    """Images (B, 3, H, W) in [-1, 1] -> packed latents (B, N, 64) of about unit variance, in the pipeline's scale.

    Returns the posterior mean, or a sample if a generator (or a list of one for each image) is given."""
    posterior = vae.encode(pixels.to(PartialState().device, vae.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator=generator)
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


# ---- images: grids and canvases --------------------------------------------------------------------------------------
def cut_grid(image, rows=2, columns=2):
    """Cut one grid image into its panels, a list of rows * columns images in reading order."""
    w, h = image.width // columns, image.height // rows
    return [
        image.crop((c * w, r * h, (c + 1) * w, (r + 1) * h))
        for r in range(rows)
        for c in range(columns)
    ]


def to_pixels(images):
    """RGB images of one size -> (B, 3, H, W) in [-1, 1]."""
    raw = torch.stack([torch.from_numpy(numpy.array(image)) for image in images])  # (B, H, W, 3)
    return raw.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def canvas(reference, target=None):
    """Two frames (B, 3, H, W) side by side: (B, 3, H, 2 W). Without a target the right frame is black (R)."""
    return torch.cat(
        [reference, torch.full_like(reference, -1) if target is None else target], dim=3
    )


# ---- the two-frame model ---------------------------------------------------------------------------------------------
def widen(transformer):
    """Give the transformer 64 condition channels beside its 64 noisy ones, in place, and return it.

    The new columns are initialised to zero, so the output is still exactly the teacher's. The released model adds a
    second embedder instead, x_embedder(noisy) + c_embedder(cond) (R). That sum equals one Linear on the concatenated
    channels [noisy, cond] (B, N, 128), which is diffusers' Control form and needs no transformer class of our own."""
    old = transformer.x_embedder
    wide = torch.nn.Linear(
        2 * old.in_features, old.out_features, device=old.weight.device, dtype=old.weight.dtype
    )
    wide.weight.data = torch.cat([old.weight.data, torch.zeros_like(old.weight.data)], dim=1)
    wide.bias.data = old.bias.data
    transformer.x_embedder = wide
    transformer.register_to_config(in_channels=2 * old.in_features, out_channels=old.in_features)
    return transformer


def add_lora(transformer, rank):
    """Add LoRA of `rank` to all linear layers in the blocks of a widened transformer, in place, and return it.

    The condition columns W_c of the embedder are trained at full rank. They too are written as a LoRA, on x_embedder,
    which is exact: A = [0 | I] (frozen), B = W_c, scale 1. So what is trained is what is saved, and the file is a
    standard FLUX Control LoRA. All B are zero at the start, so the output is still the teacher's."""
    blocks = [
        name
        for name, m in transformer.named_modules()
        if isinstance(m, torch.nn.Linear) and "blocks." in name
    ]
    channels = transformer.config.out_channels
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights=True,
            target_modules=[*blocks, "x_embedder"],
            rank_pattern={"x_embedder": channels},
            alpha_pattern={"x_embedder": channels},
        )
    )
    identity = transformer.x_embedder.lora_A["default"].weight  # (64, 128)
    identity.data = torch.cat([torch.zeros(channels, channels), torch.eye(channels)], dim=1).to(
        identity
    )
    identity.requires_grad_(False)
    return transformer


def run_transformer(transformer, tokens, sigma, text, ids, guidance_scale):
    """One forward pass: tokens (B, N, 128), sigma (B,), text = (embeds (B, L, D), pooled (B, P)), ids (N, 3) -> the
    velocity (B, N, 64)."""
    embeds, pooled = text
    config = getattr(
        transformer, "module", transformer
    ).config  # training on several GPUs wraps the model
    guidance = torch.full_like(sigma, guidance_scale) if config.guidance_embeds else None
    return transformer(
        hidden_states=tokens,
        timestep=sigma.to(tokens.dtype),
        guidance=guidance,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        img_ids=ids,
        txt_ids=embeds.new_zeros(embeds.shape[1], 3),
    ).sample


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """B prompts -> (T5 embeddings (B, L, D), pooled CLIP embeddings (B, P)); L is the tokenizer's limit."""
    prompts = list(prompts)  # diffusers fails at a tuple if it holds an unknown word
    return pipe.encode_prompt(
        prompts, prompts, max_sequence_length=pipe.tokenizer_2.model_max_length
    )[:2]


# ---- guidance and sampling -------------------------------------------------------------------------------------------
def guided_velocity(model, x, condition, text, null_text, s_i=1.0, s_t=1.0):
    """The velocity at x (B, N, 64), pushed from the unconditional one towards the reference and towards the prompt (R):
    v = v(0,0) + s_i (v(I,0) - v(0,0)) + s_t (v(I,T) - v(I,0)).

    model(x, condition, text) -> v; condition (B, N, 64), whose null form is zeros (R); text: a tuple of tensors with B
    rows; null_text: the same for the null prompt "" (R), with one row or B. The passes run as one batch; a pass whose
    weight is 0 is skipped. (The released code ignores s_t unless s_i > 1; here each scale works by itself.)"""
    null_text = [part.expand(len(x), *part.shape[1:]) for part in null_text]
    weights = 1 - s_i, s_i - s_t, s_t  # of v(0,0), v(I,0) and v(I,T): the formula, sorted by pass
    passes = (torch.zeros_like(condition), null_text), (condition, null_text), (condition, text)
    weights, passes = zip(
        *[(weight, given) for weight, given in zip(weights, passes) if weight != 0]
    )
    n = len(weights)
    v = model(
        torch.cat([x] * n),
        torch.cat([c for c, _ in passes]),
        tuple(torch.cat(parts) for parts in zip(*[t for _, t in passes])),
    )  # (n B, N, 64)
    return sum(weight * part for weight, part in zip(weights, v.chunk(n)))


@torch.no_grad()
def sample_edit(
    pipe,
    references,
    text,
    null_text,
    seeds,
    steps=28,
    image_guidance=1.0,
    text_guidance=1.0,
    guidance_scale=3.5,
    unguided_steps=2,
    frames=2,
):
    """Zero-shot sampling (paper section 3.3): B images that show the references' subjects as the prompts say.

    references (B, 3, H, W) in [-1, 1]; text and null_text from `encode_prompts`; seeds: B numbers, one for each image's
    own generator, so that the batch size changes an image by rounding only; guidance_scale: distilled guidance, for
    models that have it. Both frames are denoised from noise and the left one is thrown away (R). With frames=1 (an
    ablation) only frame 2 is drawn. Returns a list of images."""
    vae, transformer, device = pipe.vae, pipe.transformer, pipe._execution_device
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    given = canvas(references) if frames == 2 else references  # (B, 3, H, frames W)
    condition = encode(vae, given, generators).to(
        transformer.dtype
    )  # (B, N, 64); a sample (R), in training the mean
    height, width = given.shape[2:]
    x, ids = pipe.prepare_latents(
        len(seeds), vae.config.latent_channels, height, width, transformer.dtype, device, generators
    )  # (B, N, 64) and (N, 3)

    def model(x, condition, text):
        tokens = torch.cat([x, condition], dim=2)  # (n B, N, 128)
        sigma = (
            t.expand(len(x)).to(x.dtype) / 1000
        )  # (n B,), t is the loop's; cast first, as in diffusers and R
        return run_transformer(transformer, tokens, sigma, text, ids, guidance_scale)

    config, names = (
        pipe.scheduler.config,
        ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"),
    )
    mu = calculate_shift(
        x.shape[1], *(config[name] for name in names)
    )  # FLUX.1-dev's shift; other models ignore it
    pipe.scheduler.set_timesteps(
        sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), device=device, mu=mu
    )
    for i, t in enumerate(pipe.scheduler.timesteps):  # t = 1000 sigma
        s_i, s_t = (
            (image_guidance, text_guidance) if i >= unguided_steps else (1.0, 1.0)
        )  # none in the first steps (R)
        v = guided_velocity(model, x, condition, text, null_text, s_i, s_t)
        x = pipe.scheduler.step(v, t, x, return_dict=False)[0]  # Euler: x + (sigma_next - sigma) v

    latents = unpack(x, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    decoded = vae.decode(
        (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
    ).sample
    pipe.maybe_free_model_hooks()  # --offload model moves the last part back to main memory
    return to_images(
        pipe.image_processor.postprocess(decoded[..., -references.shape[3] :], output_type="pt")
    )


# ---- the adapter file ------------------------------------------------------------------------------------------------
def save_adapter(transformer, folder, facts, dtype=torch.float32):
    """Write the adapter as FluxControlPipeline.load_lora_weights(folder) reads it; same weights, same bytes.

    facts: what sampling must know: frames, width, height, prompt_tokens and the guidance scales. They go into
    diffusers' own metadata entry, since safetensors writes several entries in no fixed order."""
    config = transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    about = {f"transformer.{name}": value for name, value in config.items()} | {"dsd": facts}
    tensors = {
        f"transformer.{name}": tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in get_peft_model_state_dict(transformer).items()
    }
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise DsdError(
            "the adapter's weights are not finite and are not saved; try a lower --learning_rate"
        )
    with writing(Path(folder) / ADAPTER_FILE) as part:
        save_file(
            tensors, part, {"lora_adapter_metadata": json.dumps(about, indent=2, sort_keys=True)}
        )


def adapter_facts(adapter):
    """The file of an adapter, which is given as a folder, a file or a hub name, and the facts that `save_adapter` put
    into it, or {}."""
    if not Path(adapter).exists() and (name := Path(adapter).as_posix()).count("/") == 1:
        with explained(f"no adapter {name}, neither here nor on the hub"):
            adapter = snapshot_download(
                name, allow_patterns=[ADAPTER_FILE, "transformer/*.safetensors"]
            )
    file = Path(adapter) if Path(adapter).is_file() else Path(adapter) / ADAPTER_FILE
    if not file.is_file():
        raise DsdError(
            f"no adapter ({ADAPTER_FILE}) in {adapter}; train one with finetune.py or give --adapter"
        )
    with explained(f"the adapter {file} does not fit this model"), safe_open(file, "pt") as opened:
        facts = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}")).get(
            "dsd", {}
        )
        if facts.get("frames", 2) not in (1, 2) or {type(fact) for fact in facts.values()} - {
            int,
            float,
            type(None),
        }:
            raise ValueError(f"it says {facts}")
    return file, facts


def load_adapter(pipe, adapter):
    """Load an adapter into a FluxControlPipeline, in place: one of finetune.py, or the authors' released layout.
    Returns its facts."""
    file, facts = adapter_facts(adapter)
    with explained(
        f"the adapter {file} does not fit this model"
    ):  # wrong shapes, a cut file, foreign layers
        tensors = load_file(file)
        if (file.parent / "transformer").is_dir():
            if getattr(pipe.transformer, "hf_quantizer", None):
                raise DsdError(
                    f"{file.parent} holds a whole transformer, not for weights of 4 bits; drop --quantize"
                )
            load_released_transformer(pipe.transformer, file.parent / "transformer")
        elif not any("x_embedder.lora_B" in name for name in tensors):
            raise DsdError(
                f"{file} is an ordinary LoRA, without weights for a reference; give a DSD adapter"
            )
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("its weights are not finite")
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, use_safetensors=True, adapter_name="default"
        )
        loaded = {f"transformer.{name}" for name in get_peft_model_state_dict(pipe.transformer)}
        if (
            lost := {
                name for name in tensors if name.startswith("transformer.") and ".lora_" in name
            }
            - loaded
        ):
            raise ValueError(
                f"the model has no place for {len(lost)} of its layers, such as {min(lost)}"
            )
    return facts


def load_released_transformer(transformer, folder):
    """The authors' layout: `x_embedder` and `c_embedder` (R) become one embedder, weights side by side, biases added.

    Their files hold the LoRA's entries as well; these are read from the adapter file."""
    state = {}
    with explained(f"{folder}: not a released DSD transformer for this model"):
        for file in sorted(folder.glob("*.safetensors")):
            state |= {
                name: tensor for name, tensor in load_file(file).items() if ".lora_" not in name
            }
        state["x_embedder.weight"] = torch.cat(
            [state["x_embedder.weight"], state.pop("c_embedder.weight")], dim=1
        )
        state["x_embedder.bias"] = state["x_embedder.bias"] + state.pop("c_embedder.bias")
        widen(transformer).load_state_dict(state)


# ======================================================================================================================
# The method ends here. What follows is housekeeping: devices, loading, options, files, pictures.
# ======================================================================================================================


# ---- devices and models ----------------------------------------------------------------------------------------------
def weight_dtype():
    """The number format that models are loaded in: bfloat16 on a GPU that has it natively, else float32."""
    native = PartialState().device.type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return torch.bfloat16 if native else torch.float32


def memory_in_use():
    """For messages: on a GPU the most memory that this process has used so far, on a CPU what it uses now."""
    cuda = PartialState().device.type == "cuda"
    return f"{(torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss) / 1e9:.1f} GB in use"


def check_here(model):
    """Refuse the name of a model on the hub on a machine without a GPU that can run such models."""
    if not Path(model).is_dir() and weight_dtype() != torch.bfloat16:
        raise DsdError(
            f"no model folder {model}; models from the hub need a CUDA GPU with native bfloat16 (RTX 30 or "
            "newer). The miniature, in miniature/, runs anywhere"
        )


def check_model(model, *sides):
    """Reject, from the configuration alone, a model that is not FLUX and a picture whose sides (in pixels) are not
    whole numbers of tokens."""
    check_here(model)
    with explained(f"{model}: not a FLUX model in diffusers' form, or not all of it"):
        pipeline = FluxPipeline.load_config(model)["_class_name"]
        load = FluxTransformer2DModel.load_config  # it reads the configuration of any part
        vae, config = (load(model, subfolder=part) for part in ("vae", "transformer"))
        if pipeline != "FluxPipeline" or config["in_channels"] != 64:
            raise ValueError(
                f"a {pipeline} of {config['in_channels']} channels; give a FluxPipeline of 64"
            )
        unit = 2 ** len(vae["block_out_channels"])  # a token is 2x2 latent pixels
    if any(side % unit for side in sides):
        raise DsdError(
            f"a picture of {' x '.join(map(str, sides))} pixels: this model needs multiples of {unit}"
        )


def load_pipeline(
    cls,
    model,
    quantize="none",
    offload="none",
    adapter=None,
    dtype=None,
    prompt_tokens=None,
    **parts,
):
    """A FLUX folder or hub name as a pipeline of class `cls` on the device, with an adapter if one is given.

    quantize and offload are the options of these names; transformer=None, for example, leaves that part out."""
    check_model(model)
    dtype = dtype or weight_dtype()
    nf4 = {**NF4, "bnb_4bit_compute_dtype": dtype}
    large = (
        {
            "transformer": diffusers.BitsAndBytesConfig(
                **nf4, llm_int8_skip_modules=["x_embedder"]
            ),  # widened later
            "text_encoder_2": transformers.BitsAndBytesConfig(**nf4),
        }
        if quantize == "nf4"
        else {}
    )
    large = {name: config for name, config in large.items() if name not in parts}
    config = PipelineQuantizationConfig(quant_mapping=large) if large else None
    with explained(f"cannot load {model} as {cls.__name__}"):  # a cut file, a missing part
        pipe = cls.from_pretrained(
            model, dtype=dtype, use_safetensors=True, quantization_config=config, **parts
        )
    pipe.set_progress_bar_config(disable=True)
    limits = [
        pipe.tokenizer_2.model_max_length,
        512 if pipe.scheduler.config.use_dynamic_shifting else 256,
    ]  # schnell
    if adapter:
        prompt_tokens = load_adapter(pipe, adapter).get(
            "prompt_tokens"
        )  # before offloading takes the weights away
    if (
        cls is FluxControlPipeline
    ):  # * the prompt of a canvas describes one panel and is shorter than a grid's
        limits.append(prompt_tokens or folder_settings(model).get("canvas_prompt_tokens", 512))
    pipe.tokenizer_2.model_max_length = min(limits)
    if offload == "none":
        return pipe.to(PartialState().device)
    getattr(pipe, f"enable_{offload}_cpu_offload")(device=PartialState().device)
    return pipe


def load_language_model(cls, name, quantize):
    """A chat model or a vision-language model on the device."""
    dtype, device = weight_dtype(), str(PartialState().device)
    nf4 = (
        transformers.BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
        if quantize == "nf4"
        else None
    )
    return cls.from_pretrained(
        name, dtype=dtype, use_safetensors=True, device_map=device, quantization_config=nf4
    ).eval()


def warn_of_prompts(pipe, prompts):
    """Say on stderr what the T5 will not read: ends of prompts beyond its limit, and words that it does not know."""
    t5, limit, prompts = (
        pipe.tokenizer_2,
        pipe.tokenizer_2.model_max_length,
        list(dict.fromkeys(prompts)),
    )
    encoded = t5(prompts).input_ids
    if long := [ids for ids in encoded if len(ids) > limit]:
        print(
            f"warning: {len(long)} of {len(prompts)} prompts are longer than the {limit - 1} tokens that are read; "
            f'left out of the first: "{t5.decode(long[0][limit - 1 : -1])}"',
            file=sys.stderr,
        )
    words = {
        word
        for text, ids in zip(prompts, encoded)
        if t5.unk_token_id in ids
        for word in text.split()
    }
    if unknown := sorted(word for word in words if t5.unk_token_id in t5(word).input_ids):
        print(
            f"warning: {len(unknown)} words are unknown to this model: {' '.join(unknown[:10])}",
            file=sys.stderr,
        )


# ---- options ---------------------------------------------------------------------------------------------------------
class DsdError(Exception):
    """A user's mistake: one line that says what is wrong and what to do."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of a script's docstring, and names an option's default where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Plain argparse. Flags override the model folder's dsd.json, which overrides the defaults in the code."""

    def __init__(self, doc, out):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        self.add_argument("--out", type=Path, default=Path(out), help="folder for the results")
        self.add_argument("--device", choices=devices, default=devices[-1], help="where to compute")

    def error(self, message):
        raise DsdError(f"{message}; --help explains the options")

    def add_large_model_options(self, offload=True):
        self.add_argument(
            "--quantize",
            choices=["none", "nf4"],
            default="none",
            help="nf4: weights of 4 bits; needs bitsandbytes and a CUDA GPU",
        )
        if offload:
            self.add_argument(
                "--offload",
                choices=["none", "model", "sequential"],
                default="none",
                help="keep weights "
                "in main memory until they are needed: whole models, or (slower, smaller) single layers",
            )

    def parse(self, step, source="model", **more):
        """The options. Defaults for this step come from the folder of --model (or --vlm); `more` overrides them."""
        first = argparse.ArgumentParser(
            add_help=False, allow_abbrev=False
        )  # reads this option only
        first.error = self.error
        first.add_argument(f"--{source}", dest="folder", default=self.get_default(source))
        folder = first.parse_known_args()[0].folder
        with explained(
            f'{folder}/dsd.json: "{step}" must hold values of options; restore the model\'s folder'
        ):
            more = dict(folder_settings(folder).get(step, {}) if folder else {}) | more
            typed = [option.dest for option in self._actions if option.type and not option.nargs]
            if odd := [name for name in typed if isinstance(more.get(name), (list, dict))]:
                raise ValueError(f"{odd[0]} is not one value")
        texts = {
            name: str(more[name]) for name in typed if more.get(name) is not None
        }  # argparse checks texts only
        self.set_defaults(**more | texts)
        args = self.parse_args()
        if args.device == "cpu" and {
            getattr(args, name, "none") for name in ("quantize", "offload")
        } != {"none"}:
            raise DsdError("--quantize and --offload need a CUDA GPU")
        PartialState(
            cpu=args.device == "cpu"
        )  # later PartialState() calls report this device and this process's rank
        return args


def folder_settings(model):
    """What a model's folder says in its dsd.json, {script: {option: default}} and more, or {} if there is none."""
    return read_json(Path(model) / "dsd.json")


def at_least(low, number=int):
    """A type for argparse: a number from `low` up, and below 2**31, which keeps out infinity."""

    def check(text):
        if not low <= number(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low} and below 2**31")
        return number(text)

    check.__name__ = {int: "whole number", float: "number"}[number]  # for argparse's message
    return check


# ---- errors and files ------------------------------------------------------------------------------------------------
def run_main(main):
    """Run a script's main; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    except DsdError as error:
        line = str(error)
    except OSError as error:  # no permission, a file where a folder should be, a full disk
        line = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch's allocators raise RuntimeError, on a GPU a subclass
        if not re.search("out of memory|can't allocate memory", str(error)) and not isinstance(
            error, MemoryError
        ):
            raise
        line = f"out of memory; take a smaller --batch_size or picture ({error})"
    print("\nerror: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def explained(message, *errors):
    """Turn any error inside, or only those in `errors`, into a DsdError: damaged files raise all kinds of errors."""
    try:
        yield
    except DsdError:
        raise
    except errors or Exception as error:
        raise DsdError(
            f"{message} ({' '.join(str(error).split())[:300] or type(error).__name__})"
        ) from error


def open_out(args, step, changeable, **more):
    """Make the folder --out for one run and lock it for as long as `args`, which holds the lock, is in use.

    A run is identified by its options, except the `changeable` ones, which may differ from one start to the next, and
    by `more`. They are kept in settings.json: the same run goes on, and another one is refused, like a folder in use.
    Of several processes only the main one does this."""
    if not PartialState().is_main_process:
        return
    run = {
        name: value
        for name, value in vars(args).items()
        if name not in ("out", "device", *changeable)
    }
    run |= {
        name: name_of(run[name]) for name in ("model", "vlm", "llm", "adapter") if run.get(name)
    }
    run = json.loads(
        json.dumps({"step": step, **run, **more})
    )  # in the file's form: tuples become lists
    args.out.mkdir(parents=True, exist_ok=True)
    args.lock, path = FileLock(args.out / ".lock"), args.out / "settings.json"
    with explained(
        f"{args.out} is in use by another process; wait for it or give another --out", Timeout
    ):
        args.lock.acquire(blocking=False)
    before = read_json(path)
    names = {file.name for file in args.out.iterdir() if file.name[0] != "."} - {
        path.name,
        f"{path.name}.part",
    }
    if names and before != run:
        odd = (
            [
                f"its {name} was {str(before.get(name))[:60]}"
                for name in {**before, **run}
                if before.get(name) != run.get(name)
            ]
            if before
            else [min(names)]
        )
        raise DsdError(
            f"{args.out} holds another run or other files ({odd[0]}); delete it or give another --out"
        )
    write_json(path, run)


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as part:` fill the file `part`, which then replaces `path`: so it is whole or absent."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explained(
            f"cannot write {path}; make room or give another --out",
            OSError,
            SafetensorError,
            RuntimeError,
        ):  # the last is torch.save's
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file; in a file named *.jsonl each item of a list gets a line of its own."""
    items, indent = (value, None) if Path(path).suffix == ".jsonl" else ([value], 2)
    text = "".join(json.dumps(item, indent=indent, ensure_ascii=False) + "\n" for item in items)
    with writing(path) as part:
        part.write_bytes(text.encode(errors="backslashreplace"))


def read_json(path):
    """The object in a JSON file, {} if there is no file."""
    with explained(f"{path}: not a JSON file of this project; restore or delete it"):
        return dict(json.loads(Path(path).read_bytes())) if Path(path).exists() else {}


def read_records(path, *texts):
    """The objects in a file of JSON lines, a list. texts: names of fields that every record must have, as text."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        with explained(
            f"{path}, line {number}: not a record of this project; correct it or make it again"
        ):
            records.append(dict(json.loads(line)))
            if odd := [name for name in texts if not isinstance(records[-1][name], str)]:
                raise ValueError(f"{odd[0]} is not text")
    return records


def name_of(path):
    """How records name a model or file: relative to this project if inside, with forward slashes, else as given."""
    root, whole = Path(__file__).resolve().parent, Path(path).resolve()
    inside = whole.exists() and whole.is_relative_to(root)  # a hub name does not exist here
    return whole.relative_to(root).as_posix() if inside else str(path).replace("\\", "/")


def digest(*files, text=""):
    """The first 16 hexadecimal digits of the SHA-256 of some files' contents, and of a text."""
    parts = [hashlib.sha256(Path(file).read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join([*parts, text.encode(errors="backslashreplace")])).hexdigest()[
        :16
    ]


def batches(items, size, name):
    """This process's batches of some items, with a progress bar. What is done already does not change them: so a run
    that was interrupted computes the same batches, and the same bytes."""
    state, parts = PartialState(), [items[i : i + size] for i in range(0, len(items), size)]
    return tqdm(
        parts[state.process_index :: state.num_processes],
        name,
        unit="batch",
        disable=not state.is_main_process,
    )


# ---- pictures --------------------------------------------------------------------------------------------------------
def open_image(path):
    """Any picture file as RGB: turned as its EXIF says, transparency on white, 16 bits scaled to 8, the first frame."""
    with explained(f"{path}: not an image that can be read; give a PNG or JPEG file"):
        with Image.open(path) as image:
            image.verify()  # a PNG's checksums; it closes the file
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel")
            if image.mode.startswith("I;16"):
                image = image.point(lambda v: v / 256).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def fit_image(image, width, height, fit="crop"):
    """An image resized to width x height (bicubic: R), cropped at its centre or, with fit="pad", with white added."""
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.BICUBIC, color="white")
    return ImageOps.fit(image, (width, height), Image.BICUBIC)


def to_images(pixels):
    """(B, 3, H, W) in [0, 1] -> B images. Numbers that are not finite would become black: they are an error."""
    if not pixels.isfinite().all():
        raise DsdError(
            "the model drew a picture that is not finite; check the weights, or lower the guidance"
        )
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))


def save_image(image, path, **options):
    with writing(path) as part:
        image.save(part, format="PNG", **options)


def contact_sheet(rows, path, side=128):
    """Save rows of (image, caption) as one labelled picture; small images are enlarged without smoothing."""
    width = max(
        60, *(side * image.width // image.height for row in rows for image, _ in row)
    )  # room for a word
    rows = [
        [(image, textwrap.wrap(text, width // 6)) for image, text in row] for row in rows
    ]  # 6 pixels a letter
    heights = [side + 10 + 15 * max(len(lines) for _, lines in row) for row in rows]
    sheet = Image.new("RGB", ((width + 6) * max(map(len, rows)), sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for r, row in enumerate(rows):
        for c, (image, lines) in enumerate(row):
            x, y, size = (
                (width + 6) * c + 6,
                sum(heights[:r]) + 6,
                (max(side * image.width // image.height, 1), side),
            )
            sheet.paste(
                image.resize(size, Image.NEAREST if image.height < side else Image.LANCZOS), (x, y)
            )
            draw.text((x, y + side), "\n".join(lines), fill="black", font=font)
    save_image(sheet, path)
