"""Diffusion Self-Distillation, the core that every script shares.

A text-to-image model draws sheets of one subject, the sheets are cut into pairs, and the same model learns from the
pairs to follow a reference image (Cai, Chan, Zhang, Guibas, Wu, Wetzstein: "Diffusion Self-Distillation for Zero-Shot
Customized Image Generation", CVPR 2025, arXiv 2411.18616). In comments, "R": where the paper is silent, the authors'
released inference code settles it; "*": our own choice.

Notation: `x_0` clean latents, `eps` Gaussian noise, `sigma` in [0, 1] the noise level, `v` the velocity. Latents are
packed: a token holds 2x2 latent pixels of 16 channels, so x is (B, N, 64) with N = (h / 2) (w / 2). `I` is the
reference image (as condition tokens), `T` the prompt (as text embeddings).
"""

import argparse
import array
import collections.abc
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import math
import operator
import os
import re
import resource
import sys
import textwrap
import unicodedata
from itertools import accumulate
from pathlib import Path

import diffusers
import numpy
import torch
import transformers
from accelerate import PartialState
from diffusers import FluxControlPipeline, FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils import make_image_grid
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

MINIATURE = Path(__file__).resolve().parent / "miniature"
SCHNELL = dict.fromkeys(["generate_grids", "sample"], {"steps": 4})  # FLUX.1-schnell is distilled to so few
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it
BYTES = {"none": 2, "int8": 1, "nf4": .516}  # a weight on a GPU; nf4: 4 bits, and 8 bits for each block of 64
FLUX_1 = {"transformer": 11.9e9, "text encoders": 4.9e9}  # parameters
WORKING = 3.0  # * GB beside the weights: activations at 1024x1024, the VAE, CUDA itself


# ---- rectified flow --------------------------------------------------------------------------------------------------
def interpolate(x_0, eps, sigma):
    """x_sigma = (1 - sigma) x_0 + sigma eps, for x_0, eps (B, N, C) and sigma (B,)."""
    sigma = sigma.view(-1, 1, 1).to(x_0.dtype)
    return (1 - sigma) * x_0 + sigma * eps


def velocity(x_0, eps):
    """The target v = eps - x_0 = d x_sigma / d sigma (FLUX's parametrisation)."""
    return eps - x_0


def sample_sigmas(n, shift, generator):
    """`n` noise levels sigma = s u / (1 + (s - 1) u) with uniform u and s = `shift`.

    * These are the very levels that a sampler with this shift visits. A large shift favours high noise, where colours
    and layout are decided; the logit-normal draws of Stable Diffusion 3 hardly ever go there."""
    u = torch.rand(n, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


def two_frame_loss(v_pred, v, h, w, weights=(1.0, 1.0)):
    """Flow-matching loss over both frames of a canvas (paper section 3.3: frame 1 identity, frame 2 edit).

    v_pred, v: (B, N, C) for a canvas of h x w latent pixels, w counting both frames. Returns (loss, loss of frame 1,
    loss of frame 2): mean squared errors, the first their mean weighted by `weights`."""
    first, second = split_frames((v_pred.float() - v.float()) ** 2, h, w)  # (B, N/2, C) each
    first, second = first.mean(), second.mean()
    return (weights[0] * first + weights[1] * second) / sum(weights), first, second


# ---- latents and tokens ----------------------------------------------------------------------------------------------
def pack(latents):
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): each token holds a 2x2 block of latent pixels."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens, h, w):
    """(B, h/2 * w/2, 4 C) -> (B, C, h, w), the inverse of `pack`."""
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2)), 2)


def position_ids(h, w):
    """Position ids (h/2 * w/2, 3) of an image of h x w latent pixels: (0, row, column), ordinary 2-D positions.

    The two frames of a canvas are numbered through as one wide image (R)."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(h / 2), torch.arange(w / 2))


def split_frames(tokens, h, w):
    """Tokens (B, N, C) of a canvas of h x w latent pixels -> its left and its right frame, (B, N/2, C) each."""
    left, right = tokens.unflatten(1, (h // 2, w // 2)).chunk(2, dim=2)  # (B, h/2, w/4, C) each
    return left.flatten(1, 2), right.flatten(1, 2)


@torch.no_grad()
def encode(vae, pixels, generator=None):
    """Images (B, 3, H, W) in [-1, 1] -> packed latents (B, N, 64) of about unit variance, in the pipeline's scale.

    Their mean; with a generator (or a list of one for each image) a sample, as the stock pipelines draw it."""
    posterior = vae.encode(pixels.to(device(), vae.dtype)).latent_dist  # offloaded weights are elsewhere
    latents = posterior.mode() if generator is None else posterior.sample(generator=generator)
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


# ---- images: grids and canvases --------------------------------------------------------------------------------------
def cut_grid(image, rows=2, columns=2):
    """One grid image -> its panels in reading order, a list of rows * columns images."""
    w, h = image.width // columns, image.height // rows
    return [image.crop((c * w, r * h, (c + 1) * w, (r + 1) * h)) for r in range(rows) for c in range(columns)]


def build_grid(panels, rows=2, columns=2):
    """Panels in reading order -> one grid image, the inverse of `cut_grid`."""
    return make_image_grid(panels, rows, columns)


def to_pixels(images):
    """RGB images of one size -> (B, 3, H, W) in [-1, 1]."""
    raw = torch.stack([torch.from_numpy(numpy.array(image)) for image in images])  # (B, H, W, 3)
    return raw.permute(0, 3, 1, 2).float() / 127.5 - 1


def canvas(reference, target=None):
    """Two frames (B, 3, H, W) side by side: (B, 3, H, 2 W). Without a target the right frame is black (R)."""
    return torch.cat([reference, torch.full_like(reference, -1) if target is None else target], dim=3)


# ---- the two-frame model ---------------------------------------------------------------------------------------------
def widen(transformer):
    """Give the transformer 64 condition channels beside its 64 noisy ones, with zero weights: it still is the teacher.

    The released model adds a second embedder, x_embedder(noisy) + c_embedder(cond) (R). The sum equals one Linear on
    the channels side by side, [noisy, cond] (B, N, 128): diffusers' Control form, which needs no class of our own."""
    old = transformer.x_embedder
    wide = torch.nn.Linear(2 * old.in_features, old.out_features, device=old.weight.device, dtype=old.weight.dtype)
    wide.weight.data = torch.cat([old.weight.data, torch.zeros_like(old.weight.data)], dim=1)
    wide.bias.data = old.bias.data
    transformer.x_embedder = wide
    transformer.register_to_config(in_channels=2 * old.in_features, out_channels=old.in_features)
    return transformer


def add_lora(transformer, rank):
    """LoRA of `rank` on the linear layers of all blocks of a widened transformer; the condition columns at full rank.

    The columns W_c are themselves a LoRA on x_embedder, exactly: A = [0 | I] (frozen), B = W_c, scale 1. So what is
    trained is what is saved, and the file is a standard FLUX Control LoRA. B = 0 at the start: still the teacher."""
    blocks = [name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in name]
    channels = transformer.config.out_channels
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=[*blocks, "x_embedder"],
        rank_pattern={"x_embedder": channels}, alpha_pattern={"x_embedder": channels}))
    columns = transformer.x_embedder.lora_A["default"].weight  # (64, 128)
    columns.data = torch.cat([torch.zeros(channels, channels), torch.eye(channels)], dim=1).to(columns)
    columns.requires_grad_(False)
    return transformer


def condition_columns(transformer):
    """The trainable W_c (width, 64) of a transformer with LoRA."""
    return transformer.x_embedder.lora_B["default"].weight


def lora_state(transformer):
    """The adapter's tensors by name, without a prefix."""
    return {name: tensor.detach().contiguous() for name, tensor in get_peft_model_state_dict(transformer).items()}


def save_adapter(transformer, folder, dtype=torch.float32):
    """Write the adapter so that FluxControlPipeline.load_lora_weights(folder) reads it: the same weights, the same bytes.

    Its metadata are diffusers' own and a checksum of the whole. They are one entry on purpose: safetensors writes
    several in an order that changes from process to process."""
    config = transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    tensors = {f"transformer.{name}": t.to("cpu", dtype).contiguous() for name, t in lora_state(transformer).items()}
    about = {f"transformer.{name}": value for name, value in config.items()}
    about["sha256"] = checksum(tensors, about)
    with writing(Path(folder) / ADAPTER_FILE) as part:
        save_file(tensors, part, {"lora_adapter_metadata": json.dumps(about, indent=2, sort_keys=True)})


def checksum(tensors, about):
    """SHA-256 of tensors by name and of what their file says about them."""
    sha = hashlib.sha256(json.dumps({**about, "sha256": ""}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def adapter_file(folder):
    """The file of an adapter's folder."""
    if not (Path(folder) / ADAPTER_FILE).is_file():
        raise DsdError(f"no adapter ({ADAPTER_FILE}) in {folder}; train one with finetune.py or give --adapter")
    return Path(folder) / ADAPTER_FILE


def load_adapter(pipe, folder):
    """Load an adapter folder into a FluxControlPipeline: ours, or the authors' released layout."""
    folder, file = Path(folder), adapter_file(folder)
    if (folder / "transformer").is_dir():
        load_released_transformer(pipe.transformer, folder / "transformer")
    with explained(f"the adapter in {folder} does not fit this model"):  # wrong shapes, a cut file, foreign names
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        tensors = load_file(file)
        if "sha256" in about and about["sha256"] != checksum(tensors, about):
            raise ValueError("the file is damaged")
        pipe.load_lora_weights(str(folder), weight_name=ADAPTER_FILE, use_safetensors=True, adapter_name="default")
        ours = {name.removeprefix("transformer.") for name in tensors if name.startswith("transformer.") and "lora_" in name}
        if lost := ours - set(lora_state(pipe.transformer)):  # diffusers leaves out what it does not know
            raise ValueError(f"{len(lost)} of its layers, {min(lost)} for one, have no place in it")


def load_released_transformer(transformer, folder):
    """The authors' layout: `x_embedder` and `c_embedder` (R) become one embedder, weights side by side, biases added."""
    state = {}
    with explained(f"{folder}: not a released DSD transformer for this model"):  # cut, no c_embedder, another size
        for file in sorted(Path(folder).glob("*.safetensors")):
            state |= load_file(file)
        weights, biases = ([state.pop(f"{name}.{kind}") for name in ("x_embedder", "c_embedder")]
                           for kind in ("weight", "bias"))
        state |= {"x_embedder.weight": torch.cat(weights, dim=1), "x_embedder.bias": sum(biases)}  # (width, 128)
        widen(transformer).load_state_dict(state)


# ---- sampling --------------------------------------------------------------------------------------------------------
def guidance_weights(s_i, s_t):
    """v = v(0,0) + s_i (v(I,0) - v(0,0)) + s_t (v(I,T) - v(I,0)), sorted by pass: weights of v(0,0), v(I,0), v(I,T).

    Each scale works by itself (the released code ignores s_t unless s_i > 1). A weight of 0 is a pass not run."""
    return 1 - s_i, s_i - s_t, s_t


def guided_velocity(model, x, condition, text, null_text, s_i=1.0, s_t=1.0):
    """The guided velocity (B, N, 64) at x, from the passes that have a weight, run as one batch.

    model(x, condition, text) -> v; condition (B, N, 64), null condition = zeros (R); text and null_text are tuples of
    tensors with B rows, null prompt = "" (R)."""
    nothing = torch.zeros_like(condition)
    passes = zip(guidance_weights(s_i, s_t), ((nothing, null_text), (condition, null_text), (condition, text)))
    weights, inputs = zip(*[(weight, given) for weight, given in passes if weight != 0])
    n = len(weights)
    v = model(torch.cat([x] * n), torch.cat([c for c, _ in inputs]),
              tuple(torch.cat(parts) for parts in zip(*[t for _, t in inputs])))
    return sum(weight * part for weight, part in zip(weights, v.chunk(n)))


@torch.no_grad()
def sample(pipe, references, text, null_text, seeds, settings):
    """Zero-shot sampling (paper section 3.3): images of the references' subjects as the prompts say.

    references (B, 3, H, W) in [-1, 1]; text and null_text from `encode_prompts`, of B rows; seeds a list of B.
    `settings`: steps, image_guidance, text_guidance, guidance_scale (the distilled one), unguided_steps. Both frames
    are denoised from noise and the left one is thrown away (R). Every image has a generator of its own, so batches do
    not change it. Returns a list of images."""
    vae, transformer, device = pipe.vae, pipe.transformer, pipe._execution_device
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    condition = encode(vae, canvas(references), generators).to(transformer.dtype)  # (B, N, 64)
    height, width = references.shape[2], 2 * references.shape[3]
    x, ids = pipe.prepare_latents(len(seeds), vae.config.latent_channels, height, width, transformer.dtype, device,
                                  generators)
    timesteps = start_schedule(pipe.scheduler, settings["steps"], x.shape[1], device)

    for i, t in enumerate(pipe.progress_bar(timesteps)):
        def model(x, condition, text):
            return run_transformer(transformer, torch.cat([x, condition], dim=2), t.expand(len(x)) / 1000, text, ids,
                                   settings["guidance_scale"])

        guided = i >= settings["unguided_steps"]  # no guidance in the first two steps (R)
        s_i, s_t = (settings["image_guidance"], settings["text_guidance"]) if guided else (1.0, 1.0)
        v = guided_velocity(model, x, condition, text, null_text, s_i, s_t)
        x = pipe.scheduler.step(v, t, x, return_dict=False)[0]  # Euler: x + (sigma_next - sigma) v

    latents = unpack(x, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    frames = vae.decode((latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
    pipe.maybe_free_model_hooks()  # of --offload model
    return pipe.image_processor.postprocess(frames[..., width // 2:], output_type="pil")


def run_transformer(transformer, tokens, sigma, text, ids, guidance_scale):
    """One forward pass: tokens (B, N, 128), sigma (B,), text from `encode_prompts` -> velocity (B, N, 64)."""
    embeds, pooled = text
    config = getattr(transformer, "module", transformer).config  # several GPUs wrap the model
    guidance = torch.full_like(sigma, guidance_scale) if config.guidance_embeds else None
    return transformer(
        hidden_states=tokens, timestep=sigma.to(tokens.dtype), guidance=guidance, encoder_hidden_states=embeds,
        pooled_projections=pooled, img_ids=ids, txt_ids=embeds.new_zeros(embeds.shape[1], 3)).sample


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """Prompts -> (T5 embeddings (B, L, D), pooled CLIP embeddings (B, P)), L as the loaded tokenizer says."""
    return pipe.encode_prompt(prompts, prompts, max_sequence_length=prompt_tokens(pipe))[:2]


def prompt_tokens(pipe):
    """How many T5 tokens a prompt may have: FLUX.1-dev's 512, 256 for FLUX.1-schnell (whose schedule does not follow the
    resolution), or fewer if the loaded tokenizer says so."""
    return min(512 if pipe.scheduler.config.use_dynamic_shifting else 256, pipe.tokenizer_2.model_max_length)


def start_schedule(scheduler, steps, tokens, device):
    """Set the loaded scheduler to `steps` Euler steps for an image of so many tokens; returns its timesteps."""
    c = scheduler.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu if c.use_dynamic_shifting else None)
    return scheduler.timesteps


# ======================================================================================================================
# The method ends here. What follows is housekeeping: loading, prompts, memory, pictures, options, files.
# ======================================================================================================================

# ---- models and prompts ----------------------------------------------------------------------------------------------
def device():
    """The device that --device chose, else "cuda" if there is one, else "cpu"."""
    return Parser.device or ("cuda" if torch.cuda.is_available() else "cpu")


def on_hub(model):
    """True if `model` reads as a hub name, owner/name, and not as a folder here."""
    path = Path(model)
    return not path.exists() and str(model).count("/") == 1 and not path.parent.is_dir()


def check_model(model, **sides):
    """Refuse, from its configuration files alone, a model that is no FLUX folder or hub name, and `sides` of a picture, in
    pixels, that do not fill its tokens. Returns how many channels the transformer's layers have."""
    if not on_hub(model) and not (Path(model) / "model_index.json").exists():
        raise DsdError(f"no FLUX model at {model} (model_index.json missing); give a diffusers folder or a hub name")
    with explained(f"cannot load {model}"):  # a folder copied in half, a gated model
        kind = FluxPipeline.load_config(model)["_class_name"]
        vae, transformer = (FluxTransformer2DModel.load_config(model, subfolder=p) for p in ("vae", "transformer"))
        unit = 2 ** len(vae["block_out_channels"])  # a token is 2x2 latent pixels
        channels, width = transformer["in_channels"], transformer["num_attention_heads"] * transformer["attention_head_dim"]
    if kind != "FluxPipeline" or channels != 64:
        raise DsdError(f"{model} is a {kind} of {channels} channels; the teacher must be a FluxPipeline of 64")
    for name, side in sides.items():
        if side % unit:
            raise DsdError(f"{name} is {side} pixels; this model needs multiples of {unit}")
    return width


def load_pipeline(cls, model, quantize="none", offload="none", **parts):
    """A FLUX folder or hub name as a pipeline of class `cls`: bfloat16 on a GPU, float32 on a CPU.

    quantize, offload: as the options of these names say; parts: a part=None is not loaded."""
    check_model(model)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # what matters is checked and said here
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    with explained(f"cannot load {model} as {cls.__name__}"):  # a cut file, a missing part
        pipe = cls.from_pretrained(model, dtype=dtype, use_safetensors=True, **quantization(quantize, parts), **parts)
    pipe.set_progress_bar_config(disable=True)
    file = Path(model) / "dsd.json"
    if cls is FluxControlPipeline and file.exists():  # * a canvas' prompt is shorter than a grid's: fewer tokens, faster
        limit = read_json(file).get("canvas_prompt_tokens", pipe.tokenizer_2.model_max_length)
        pipe.tokenizer_2.model_max_length = min(limit, pipe.tokenizer_2.model_max_length)
    if device() == "cuda" and pipe.vae:
        pipe.vae.enable_slicing()  # one picture at a time takes a fraction of the memory
    return place(pipe, offload)


def check_text(text, source):
    """`text` without space around it; empty text and control characters are refused. `source` says where it is from."""
    if not text.strip():
        raise DsdError(f"{source}: empty; say what to draw")
    if odd := [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"]:
        raise DsdError(f"{source}: has the control character {odd[0]!a}; remove it")
    return text.strip()


def warn_of_prompts(pipe, prompts):
    """Say on stderr what the text encoders will not read of each prompt: words beyond their limit, unknown words."""
    known = set()
    for prompt in prompts:
        if hash(prompt) in known:
            continue
        known.add(hash(prompt))
        for name, tokenizer, limit in (("CLIP", pipe.tokenizer, pipe.tokenizer.model_max_length),
                                       ("T5", pipe.tokenizer_2, prompt_tokens(pipe))):
            ids = tokenizer(prompt).input_ids
            if len(ids) > limit:
                print(f"warning: a prompt has more than {name}'s {limit - 1} tokens; not read: "
                      f"\"{tokenizer.decode(ids[limit - 1:-1])}\"", file=sys.stderr)
        t5 = pipe.tokenizer_2
        if unknown := [word for word in prompt.split() if t5.unk_token_id in t5(word).input_ids]:
            print(f"warning: words that this model does not know: {' '.join(dict.fromkeys(unknown))}", file=sys.stderr)


def name_of(path):
    """How records name a model or a file: inside this project relative to it, else as it was given."""
    root, whole = Path(__file__).resolve().parent, Path(path).resolve()
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(path)


def peak_memory():
    """The most memory used so far, in GB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kilobytes


# ---- large models on the machine at hand -----------------------------------------------------------------------------
def check_machine(args, flux=(), language=None):
    """Refuse what this machine cannot do. flux: the parts of args.model that share a GPU; language: another model."""
    cuda, offload = device() == "cuda", getattr(args, "offload", "none")
    if (args.quantize, offload) != ("none", "none") and not cuda:
        raise DsdError("--quantize and --offload need a CUDA GPU, which this machine does not have")
    if args.quantize != "none" and not importlib.util.find_spec("bitsandbytes"):
        raise DsdError(f"--quantize {args.quantize} needs bitsandbytes: pip install bitsandbytes")
    if args.quantize != "none" and offload in ("group", "sequential"):
        raise DsdError(f"--quantize {args.quantize} goes with --offload model or none")
    each = BYTES[args.quantize] if cuda else 4
    if flux and on_hub(args.model):  # of a folder none is too large: its owner has seen it
        gb = [FLUX_1[part] * each / 1e9 for part in flux]
        check_memory(args.model, {"none": sum(gb), "model": max(gb)}.get(offload, 0), cuda)
    if language and on_hub(language) and (billions := re.search(r"(\d+(?:\.\d+)?)b\b", Path(language).name.lower())):
        check_memory(language, float(billions[1]) * each, cuda)


def check_memory(name, gb, cuda):
    """Refuse a model of so many GB of weights if the GPU, or without one main memory, is smaller."""
    if cuda:
        has, place = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9, "the GPU"
        advice = "try --quantize nf4, or --offload model where there is that option"
    else:
        has, place = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, "this machine without a CUDA GPU"
        advice = "run it on a CUDA GPU, or leave the option out to use the miniature"
    if gb and gb + WORKING > has:
        raise DsdError(f"{name} needs about {gb + WORKING:.0f} GB and {place} has {has:.0f} GB; {advice}")


BITS = {"int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.bfloat16}}


def bits(library, kind, **more):
    """The configuration of `library` (diffusers or transformers) for nf4 or int8 weights, None for "none"."""
    return None if kind == "none" else library.BitsAndBytesConfig(**BITS[kind], **more)


def quantization(kind, left_out):
    """What from_pretrained takes to quantise a pipeline's large parts. The embedder stays as it is: it gets wider."""
    configs = {"transformer": bits(diffusers, kind, llm_int8_skip_modules=["x_embedder"]),
               "text_encoder_2": bits(transformers, kind)}
    mapping = {part: config for part, config in configs.items() if config and part not in left_out}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)} if mapping else {}


def language_model(cls, name, kind, dtype):
    """A transformers model on the device."""
    return cls.from_pretrained(name, dtype=dtype, use_safetensors=True, device_map=device(),
                               quantization_config=bits(transformers, kind)).eval()


def adamw(kind):
    """AdamW; beside quantised weights its moments have 8 bits too."""
    if kind == "none":
        return torch.optim.AdamW
    import bitsandbytes  # only where it is needed: not every machine has it
    return bitsandbytes.optim.AdamW8bit


def place(pipe, offload):
    """Put a pipeline on the device, or have its weights fetched when they are needed."""
    if offload == "none":
        return pipe.to(device())
    if offload == "group":
        pipe.enable_group_offload(torch.device(device()), offload_type="leaf_level", use_stream=True)
    else:
        {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}[offload]()
    return pipe


def processes():
    """Which process this is, of how many (accelerate's PartialState): one of one, unless `accelerate launch` started it."""
    return PartialState(cpu=device() == "cpu")


# ---- pictures as files -----------------------------------------------------------------------------------------------
def open_image(path):
    """Any picture file as RGB: turned as its EXIF says, transparency composed on white, 16 bits scaled to 8, of an
    animation the first frame."""
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


def save_image(image, path, **options):
    """Write a PNG file whole."""
    with writing(path) as part:
        image.save(part, format="PNG", **options)


def fit_panel(image, width, height):
    """Centre-crop to the panel's proportions and resize to width x height."""
    return ImageOps.fit(image, (width, height), Image.LANCZOS)


def contact_sheet(rows, path, side=128):
    """Save rows of (image, caption) as one labelled picture; small images are enlarged without smoothing."""
    rows = [[labelled(image, caption, side) for image, caption in row] for row in rows]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (max(sum(cell.width for cell in row) for row in rows), sum(heights)), "white")
    for row, y in zip(rows, accumulate(heights, initial=0)):
        for cell, x in zip(row, accumulate((cell.width for cell in row), initial=0)):
            sheet.paste(cell, (x, y))
    save_image(sheet, path)


def labelled(image, caption, side, margin=6):
    """An image scaled to the height `side`, its caption below, white around both."""
    width, font = side * image.width // image.height, ImageFont.load_default(size=11)
    lines = textwrap.wrap(caption, max(width // 6, 1)) or [""]  # a letter is about 6 pixels wide
    cell = Image.new("RGB", (width + margin, side + margin + 15 * len(lines) + 4), "white")
    cell.paste(image.resize((width, side), Image.NEAREST if image.height < side else Image.LANCZOS), (margin, margin))
    ImageDraw.Draw(cell).multiline_text((margin, margin + side), "\n".join(lines), fill="black", font=font)
    return cell


# ---- the command line ------------------------------------------------------------------------------------------------
class DsdError(Exception):
    """A user's mistake: one line that says what is wrong and what to do."""


def one_line(error):
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def explained(message, *kinds):
    """`with explained(message):` any error in it, or one of `kinds`, becomes a DsdError: the message, and what it says.

    What a damaged file raises depends on the place of the damage: many kinds, one answer."""
    try:
        yield
    except DsdError:
        raise
    except kinds or Exception as error:
        raise DsdError(f"{message} ({one_line(error)})") from None


SHARED = {  # options that several scripts have
    "model": {"default": MINIATURE / "flux", "help": "the teacher: FLUX folder or hub name (default: the miniature)"},
    "vlm": {"default": str(MINIATURE / "vlm"), "help": "an image-text-to-text folder or hub name (default: the miniature)"},
    "quantize": {"choices": BYTES, "default": "none", "help": "weights of 8 or 4 bits; needs bitsandbytes"},
    "offload": {"choices": ["none", "model", "group", "sequential"], "default": "none", "help": "weights wait in main "
                "memory: whole models at a time, groups of layers, single layers (slowest)"},
}


class Parser(argparse.ArgumentParser):
    """A script's options: those that all have, and some of SHARED. A mistake in them is one line, like all others."""

    device = None  # as --device chose

    def __init__(self, doc, out, *shared):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.defaults = {}  # of the settings
        for name in shared:
            self.add_argument(f"--{name}", **SHARED[name])
        self.add_argument("--out", type=Path, default=out, help="folder for what is made (default: %(default)s)")
        self.add_argument("--overwrite", action="store_true", help="if --out holds another run, delete that one first")
        self.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")

    def error(self, message):
        raise DsdError(f"{message}; --help explains the options")

    def setting(self, name, default, help, **more):
        """An option of the default's kind. A model's folder may bring a default of its own (see `model_settings`)."""
        first = default[0] if isinstance(default, list) else default
        kind = {"action": "store_true", "default": None} if default is False else {"type": type(first)}
        self.defaults[name] = default
        self.add_argument(f"--{name}", help=f"{help} (default: {default})", **kind, **more)

    def parse_args(self):
        args = super().parse_args()
        if args.device == "cuda" and not torch.cuda.is_available():
            raise DsdError("--device cuda: there is no CUDA device here, or torch was installed without CUDA")
        Parser.device = args.device
        return args


def model_settings(model, step, flags, **defaults):
    """Settings of one script: a flag if it was given, else what the model's folder says (dsd.json), else the default."""
    file = Path(model) / "dsd.json"
    own = read_json(file) if file.exists() else SCHNELL if "schnell" in Path(model).name.lower() else {}
    own = own.get(step, {})
    if not isinstance(own, dict):
        raise DsdError(f"{file}: \"{step}\" must be an object; restore it")
    given = {name: value for name, value in vars(flags).items() if value is not None}
    settings = {name: given.get(name, own.get(name, default)) for name, default in defaults.items()}
    for name, value in settings.items():
        check_setting(name, value, defaults[name])
    return settings


def check_setting(name, value, default):
    """Refuse a value of another kind than the default's: whole numbers from 1 (some from 0), finite numbers from 0."""
    low = 0 if type(default) is float or name in ("seed", "tolerance", "unguided_steps") else 1
    if type(default) is int and not (type(value) is int and low <= value < 2**31):
        raise DsdError(f"--{name} {value}: must be a whole number, at least {low} and below 2**31")
    if type(default) is float and not (type(value) in (int, float) and low <= value < math.inf):
        raise DsdError(f"--{name} {value}: must be a number, at least {low}")
    if type(default) in (bool, str, list, dict) and (type(value) is not type(default)):
        raise DsdError(f"{name} {value!r}: must be of the kind of {default!r}")
    for part in value if type(default) is list else []:
        check_setting(name, part, default[0])


def run(main):
    """Run a script's main; a mistake becomes one line on stderr and exit code 2."""
    try:
        main()
        return
    except DsdError as error:
        line, code = f"error: {error}", 2
    except OSError as error:  # no permission, a file where a folder should be, a full disk
        line, code = f"error: {error.filename or 'a file'}: {error.strerror or one_line(error)}", 2
    except (MemoryError, RuntimeError) as error:  # what torch raises depends on the device
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        line, code = f"error: out of memory; take a smaller --batch_size or picture ({one_line(error)})", 2
    except KeyboardInterrupt:
        line, code = "stopped; the same command goes on from here", 130
    finally:
        LOCKS.clear()
    tqdm.write(line, file=sys.stderr)  # not in the middle of a progress bar
    sys.exit(code)


# ---- files: written whole, or not at all -----------------------------------------------------------------------------
LOCKS = {}  # output folder -> its open lock file; closing it, or the end of the process, however it ends, unlocks


def open_out(folder, run, files, overwrite=False):
    """Make an output folder, for this run alone, and note in its settings.json which one it is (the main process does).

    run: the script ("step") and all that decides what the folder will hold; files: patterns of what it writes there.
    Refused: a folder in use, one with files of unknown origin, and one with another run of this script unless `overwrite`
    says to delete its `files`. A run that goes on finds its own settings."""
    folder, run = Path(folder), json.loads(json.dumps(run))
    if not processes().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() not in LOCKS:
        lock = open(folder / ".lock", "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DsdError(f"{folder} is in use by another process; wait for it or give another --out") from None
        LOCKS[folder.resolve()] = lock
    path, old = folder / "settings.json", None
    with contextlib.suppress(DsdError, FileNotFoundError):
        old = read_json(path)
    if old == run:
        return
    found = [file for pattern in files for file in sorted(folder.glob(pattern))]
    if (old or {}).get("step") != run["step"] and (found or path.exists()):  # these may be anyone's
        raise DsdError(f"{folder} holds files that are not of such a run ({(found or [path])[0].name}); give another --out")
    if found and not overwrite:
        raise DsdError(f"{folder} holds another run ({found[0].name}); give another --out, or --overwrite to replace it")
    for file in found:
        file.unlink()
    write_json(path, run)  # last: a deletion that was interrupted is found and finished


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as part:` fills the file `part`, which then takes the place of `path`: nobody sees half a file,
    and a full disk leaves `path` as it was."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explained(f"cannot write {path}; make room or give another --out", OSError, SafetensorError):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file whole."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may not be Unicode


def write_json(path, value):
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_json(data, source, **fields):
    """The JSON object in `data` (bytes), which must have these fields: name=type. `source` says where it is from."""
    with explained(f"{source}: not a JSON file of this project; restore or delete it", ValueError, RecursionError):
        value = json.loads(data.decode())
        if not isinstance(value, dict):
            raise ValueError("no object")
        if odd := [name for name, kind in fields.items() if not isinstance(value.get(name), kind)]:
            raise ValueError(f"no {fields[odd[0]].__name__} called {odd[0]}")
        return value


def read_json(path):
    """The object in a JSON file."""
    return parse_json(Path(path).read_bytes(), path)


def write_records(path, records):
    """Write a file of JSON lines whole."""
    with writing(path) as part, open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_records(path, records):
    """Append records as JSON lines, after the last whole line, and see them to the disk."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = text.encode("utf-8", errors="backslashreplace")
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read() not in (b"", b"\n"):  # a half-written line
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
        try:
            with explained(f"cannot write {path}; make room or give another --out", OSError):
                if file.write(data) < len(data):
                    raise OSError("no space left on the device")
                os.fsync(file.fileno())
        except DsdError:
            file.truncate(end)
            raise


class Lazy(collections.abc.Sequence):
    """A list whose items are made when they are asked for: memory does not grow with their number."""

    def __init__(self, count, item):
        self.items, self.item = range(count), item

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        found = self.items[index]
        return Lazy(len(found), lambda i: self.item(found[i])) if isinstance(index, slice) else self.item(found)

    def __eq__(self, other):
        return len(self) == len(other) and all(map(operator.eq, self, other))


def read_records(path, **fields):
    """The records of a JSON-lines file, [] if there is none: all are checked now, and read again when asked for.

    A half-written last line is left out, with a notice. fields: name=type of what every record must have, or the file is
    refused."""
    if not Path(path).exists():
        return Lazy(0, None)
    starts = array.array("Q", [0])  # of the lines in the file
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                print(f"{path}: left out a half-written last line", file=sys.stderr)
                break
            parse_json(line, f"{path}, line {number}", **fields)
            starts.append(starts[-1] + len(line))

    def record(i):
        with open(path, "rb") as file:
            file.seek(starts[i])
            return json.loads(file.read(starts[i + 1] - starts[i]))
    return Lazy(len(starts) - 1, record)


def distinct(records, what, *fields):
    """The numbers of the records that are the first with these values; how many are not is said, as `what`."""
    first = {}
    for number, record in enumerate(records):
        first.setdefault(hash(tuple(record[name] for name in fields)), number)  # hashes: values would take memory
    if len(first) < len(records):
        print(f"{len(records) - len(first)} {what} are listed twice and count once", file=sys.stderr)
    return array.array("Q", first.values())


def inside(folder, name):
    """The path of the file that a record names, which must lie in the record's folder."""
    try:
        if (Path(folder) / name).resolve().is_relative_to(Path(folder).resolve()):
            return Path(folder) / name
    except (ValueError, OSError, RuntimeError):  # a name that no file can have, links in a circle
        pass
    raise DsdError(f"a record in {folder} names {name!a}, which is not in this folder; correct it or make it again")


def file_digest(path):
    """The first 16 hexadecimal digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def save_checkpoint(path, parameters, optimizer, ema, step):
    """All that step `step` depends on, weights, AdamW's moments, averages (or ema None), in one safetensors file."""
    tensors = {"step": torch.tensor(step), "ema_steps": torch.tensor(ema.optimization_step if ema else 0)}
    for i, p in enumerate(parameters):
        tensors[f"{i}.p"] = p.data
        tensors |= {f"{i}.adam.{name}": torch.as_tensor(value) for name, value in optimizer.state[p].items()}
        if ema:
            tensors[f"{i}.ema"] = ema.shadow_params[i]
    with writing(path) as part:  # clones: some optimisers share a tensor among parameters
        save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, part)


def load_checkpoint(path, parameters, optimizer, ema):
    """Restore what `save_checkpoint` wrote; returns the next step, 0 if there is no checkpoint."""
    if not Path(path).exists():
        return 0
    with explained(f"{path}: not a checkpoint of this run; delete it to start again"):
        tensors = load_file(path)
        for i, p in enumerate(parameters):
            p.data.copy_(tensors[f"{i}.p"])
            state = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{i}.adam.")}
            optimizer.state[p] = {name: t if name == "step" else t.to(p.device) for name, t in state.items()}
            if ema:
                ema.shadow_params[i].copy_(tensors[f"{i}.ema"])
        if ema:
            ema.optimization_step = int(tensors["ema_steps"])
        return int(tensors["step"])
