"""Diffusion Self-Distillation (DSD): the core that every script shares. The method comes first.

A text-to-image model draws grids of one subject, the grids are cut into pairs, and the same model
learns from the pairs to follow a reference image (Cai et al., "Diffusion Self-Distillation for
Zero-Shot Customized Image Generation", CVPR 2025, arXiv 2411.18616). Where the paper is silent,
comments say "(released code)" for what we took from the authors' inference code, or "(our choice)".

Notation: `x_0` clean latents, `eps` Gaussian noise, `sigma` in [0, 1] the noise level, `v` the
velocity. Latents are packed: a token holds 2x2 latent pixels of 16 channels, so x is (B, N, 64)
with N = (h / 2) (w / 2). `I` is the reference image (as tokens), `T` the prompt (as embeddings).
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import sys
import textwrap
import warnings
from pathlib import Path

if sys.excepthook is sys.__excepthook__:  # Ctrl-C during the imports: an end without a traceback
    show = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else show(kind, *rest)

import diffusers
import matplotlib
import numpy
import torch
import transformers
from accelerate import PartialState
from filelock import FileLock
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

MINIATURE = Path(__file__).resolve().parent / "miniature"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # not only Latin
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

# Both libraries import their parts, which print notices, when these are first used: after this.
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # norms, in autocast
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
Image.MAX_IMAGE_PIXELS = 2**27  # an error above twice as many; a camera has 200 million
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; node editors write whole graphs into their PNGs


class DsdError(Exception):
    """A user's mistake: one line that says what is wrong and what to do."""


# ---- rectified flow ----------------------------------------------------------------------------
def interpolate(x_0, eps, sigma):
    """x_sigma = (1 - sigma) x_0 + sigma eps, for x_0, eps (B, N, C) and sigma (B,)."""
    sigma = sigma.view(-1, 1, 1).to(x_0.dtype)
    return (1 - sigma) * x_0 + sigma * eps


def velocity(x_0, eps):
    """The training target v = eps - x_0 = d x_sigma / d sigma (FLUX's parametrisation)."""
    return eps - x_0


def sample_sigmas(n, shift, generator):
    """Draw noise levels (n,): sigma = s u / (1 + (s - 1) u) with u uniform and s = `shift`.
    (Our choice) These are the levels that a sampler with this shift visits. A large s makes most of
    them high, where colours and layout are decided; logit-normal draws hardly ever go there."""
    u = torch.rand(n, generator=generator)
    return shift * u / (1 + (shift - 1) * u)


# ---- latents and tokens ------------------------------------------------------------------------
def pack(latents):
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): each token holds a 2x2 block of latent pixels."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens, h, w):
    """(B, h/2 * w/2, 4 C) -> (B, C, h, w), the inverse of `pack`."""
    blocks = tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2))  # (B, 4 C, h/2, w/2)
    return torch.nn.functional.pixel_shuffle(blocks, 2)


def position_ids(h, w):
    """Position ids (h/2 * w/2, 3) of an image of h x w latent pixels: (0, row, column), as floats.
    The two frames of a canvas are the halves of one wide image (released code)."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(h / 2), torch.arange(w / 2))


def split_frames(tokens, h, w):
    """Tokens (B, N, C) of a canvas of h x w latent pixels -> left and right frame, (B, N/2, C)."""
    left, right = tokens.unflatten(1, (h // 2, w // 2)).chunk(2, dim=2)  # (B, h/2, w/4, C) each
    return left.flatten(1, 2), right.flatten(1, 2)


@torch.no_grad()
def encode(vae, pixels, generator=None):
    """Images (B, 3, H, W) in [-1, 1] -> packed latents (B, N, 64) of about unit variance: the
    posterior's mean, or a sample if there is a generator (or a list of one for each image)."""
    posterior = vae.encode(pixels.to(PartialState().device, vae.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator=generator)
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


@torch.no_grad()
def decode(vae, tokens, h, w):
    """Packed latents (B, N, 64) of h x w latent pixels -> images (B, 3, H, W), about [-1, 1]."""
    latents = unpack(tokens, h, w) / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.dtype)).sample


def decode_images(pipe, tokens, h, w):
    """Packed latents (B, N, 64) of h x w latent pixels -> B images, by a pipeline's VAE."""
    pixels = decode(pipe.vae, tokens, h, w)
    return to_images(pipe.image_processor.postprocess(pixels, output_type="pt"))


# ---- images: grids and canvases ----------------------------------------------------------------
def cut_grid(image, rows=2, columns=2):
    """Cut a grid into its panels, a list of rows * columns images in reading order."""
    w, h = image.width // columns, image.height // rows
    corners = [(c * w, r * h) for r in range(rows) for c in range(columns)]
    return [image.crop((x, y, x + w, y + h)) for x, y in corners]


def to_pixels(images):
    """RGB images of one size -> (B, 3, H, W) in [-1, 1]."""
    raw = torch.stack([torch.from_numpy(numpy.array(image)) for image in images])  # (B, H, W, 3)
    return raw.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_images(pixels):
    """(B, 3, H, W) in [0, 1] -> B images. Numbers that are not finite are an error."""
    if not pixels.isfinite().all():
        raise DsdError("a picture is not finite; check the weights, or lower the guidance")
    processor = diffusers.image_processor.VaeImageProcessor
    return processor.numpy_to_pil(processor.pt_to_numpy(pixels))


def canvas(reference, target=None):
    """Two frames (B, 3, H, W) side by side: (B, 3, H, 2 W). No target: black (released code)."""
    if target is None:
        target = torch.full_like(reference, -1)
    return torch.cat([reference, target], dim=3)


# ---- the two-frame model -----------------------------------------------------------------------
def widen(transformer):
    """Give the transformer 64 condition channels beside its 64 noisy ones, in place; returns it.
    The new columns are zero, so the output is still exactly the teacher's. The released code adds a
    second embedder instead, x_embedder(noisy) + c_embedder(cond). That sum equals one Linear on the
    concatenated channels [noisy, cond] (B, N, 128), which is diffusers' Control form and needs no
    transformer class of our own."""
    old = transformer.x_embedder
    channels = old.in_features
    wide = torch.nn.Linear(2 * channels, old.out_features).to(old.weight)
    wide.weight.data = torch.cat([old.weight.data, torch.zeros_like(old.weight.data)], dim=1)
    wide.bias.data = old.bias.data
    transformer.x_embedder = wide
    transformer.register_to_config(in_channels=2 * channels, out_channels=channels)
    return transformer


def add_lora(transformer, rank):
    """Add LoRA to all linear layers in the blocks of a widened transformer, in place; returns it.
    The condition columns W_c of the embedder are trained at full rank. They too are written as a
    LoRA, on x_embedder, which is exact: A = [0 | I] (frozen), B = W_c, scale 1. So what is trained
    is what is saved, and the file is a standard FLUX Control LoRA. All B are zero at the start, so
    the output is still the teacher's."""
    channels = transformer.config.out_channels  # 64
    targets = ["x_embedder"]
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks." in name:
            targets.append(name)
    exceptions = {"x_embedder": channels}  # its rank and alpha are 64, all others' are `rank`
    config = LoraConfig(
        target_modules=targets,
        r=rank,
        lora_alpha=rank,  # so the scale alpha / r is 1
        rank_pattern=exceptions,
        alpha_pattern=exceptions,
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(config)
    a = transformer.x_embedder.lora_A["default"].weight  # (64, 128)
    a.data = torch.eye(channels, 2 * channels).roll(channels, dims=1).to(a)  # [0 | I]
    a.requires_grad_(False)
    return transformer


def with_clean_reference(x, condition, ids):
    """Not the paper's way (OminiControl, UNO and FLUX.1 Kontext have it): the model reads the
    reference in frame 1 of the canvas, without noise at any step, and not in the condition.
    x, condition (B, N, 64) and ids (N, 3) of the canvas -> x whose frame 1 is the condition's
    (zeros without a reference), and the condition channels, all zero."""
    column = ids[:, 2:]  # (N, 1); frame 1 is the left half
    x = torch.where(column < column.max() / 2, condition, x)
    return x, torch.zeros_like(condition)


def run_transformer(transformer, tokens, sigma, text, ids, guidance_scale):
    """One forward pass: the velocity (B, N, 64) at noise level sigma (B,).
    tokens (B, N, 128); text: T5's embeddings (B, L, D) and CLIP's pooled one (B, P); ids (N, 3);
    guidance_scale: distilled guidance, for models that have it."""
    embeds, pooled = text
    config = getattr(transformer, "module", transformer).config  # several GPUs wrap the model
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
def encode_prompts(pipe, prompts, tokens=None):
    """B prompts -> T5's embeddings (B, L, D) of L tokens, by default the limit; CLIP's (B, P)."""
    tokens = tokens or pipe.tokenizer_2.model_max_length
    return pipe.encode_prompt(prompts, prompts, max_sequence_length=tokens)[:2]


def two_frame_loss(v_pred, v, h, w, weights=(1.0, 1.0)):
    """Flow-matching loss over both frames of a canvas (section 3.3): identity, then edit.
    v_pred, v: (B, N, C) on a canvas of h x w latent pixels, where w counts both frames. Returns
    three scalars: the weighted mean of the two frames' losses, and each of them. The paper names no
    weights. (Our choice: 1 to 10 in the miniature, so that it copies more into frame 2.)"""
    error_1, error_2 = split_frames((v_pred.float() - v.float()) ** 2, h, w)  # (B, N/2, C) each
    loss_1, loss_2 = error_1.mean(), error_2.mean()
    w_1, w_2 = weights
    loss = (w_1 * loss_1 + w_2 * loss_2) / (w_1 + w_2)
    return loss, loss_1, loss_2


# ---- guidance and sampling ---------------------------------------------------------------------
def guided_velocity(model, x, condition, text, null_text, s_i=1.0, s_t=1.0):
    """The velocity at x, pushed towards the reference and towards the prompt (released code):
    v = v(0,0) + s_i (v(I,0) - v(0,0)) + s_t (v(I,T) - v(I,0)), here sorted by the three passes.

    model(x, condition, text) -> v; x, condition (B, N, 64); null condition: zeros (released code);
    text: tensors with B rows; null_text: the same for "" (released code), with one row or B. A pass
    of weight 0 is left out. The released code ignores s_t unless s_i > 1; here each works alone."""
    null_condition = torch.zeros_like(condition)
    null_text = [part.expand(len(x), *part.shape[1:]) for part in null_text]
    v = 0
    if s_i != 1:
        v = v + (1 - s_i) * model(x, null_condition, null_text)
    if s_i != s_t:
        v = v + (s_i - s_t) * model(x, condition, null_text)
    if s_t != 0:
        v = v + s_t * model(x, condition, text)
    return v


def start_schedule(pipe, steps, tokens):
    """Set the scheduler to so many Euler steps for an image of so many tokens, as stock pipelines
    do: FLUX.1-dev shifts the noise levels by them. Returns the timesteps, 1000 sigma."""
    config = pipe.scheduler.config
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
    pipe.scheduler.set_timesteps(sigmas=sigmas, device=pipe._execution_device, mu=mu)
    return pipe.scheduler.timesteps


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
    clean_reference=False,
    canvases=None,
):
    """Zero-shot sampling (section 3.3): B images of the references' subjects, as the prompts say.
    references (B, 3, H, W) in [-1, 1]; text and null_text from `encode_prompts`; seeds: B numbers,
    of each image's own generator. The first steps are not guided, both frames are denoised from
    noise, the left one is thrown away (released code). frames=1 (an ablation) draws frame 2 alone;
    canvases: a list that is given the B images on the canvas after each step."""
    vae, transformer = pipe.vae, pipe.transformer
    dtype, device = transformer.dtype, pipe._execution_device
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shown = canvas(references) if frames == 2 else references  # (B, 3, H, frames W)
    height, width = shown.shape[2:]
    size = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor  # in latent pixels
    condition = encode(vae, shown, generators).to(dtype)  # (B, N, 64), sampled (released code)
    x, ids = pipe.prepare_latents(  # (B, N, 64) and (N, 3)
        len(seeds), vae.config.latent_channels, height, width, dtype, device, generators
    )

    def predict(sigma, x, condition, text):
        if clean_reference:
            x, condition = with_clean_reference(x, condition, ids)
        tokens = torch.cat([x, condition], dim=2)  # (B, N, 128)
        return run_transformer(transformer, tokens, sigma, text, ids, guidance_scale)

    for i, t in enumerate(start_schedule(pipe, steps, tokens=x.shape[1])):  # t = 1000 sigma
        sigma = t.expand(len(x)).to(dtype) / 1000  # (B,), cast first (released code)
        s_i, s_t = (image_guidance, text_guidance) if i >= unguided_steps else (1.0, 1.0)
        model = functools.partial(predict, sigma)
        v = guided_velocity(model, x, condition, text, null_text, s_i, s_t)
        x = pipe.scheduler.step(v, t, x, return_dict=False)[0]  # Euler: x + (sigma_next - sigma) v
        if clean_reference:
            x, _ = with_clean_reference(x, condition, ids)
        if canvases is not None:
            canvases.append(decode_images(pipe, x, *size))
    images = decode_images(pipe, x, *size)
    pipe.maybe_free_model_hooks()  # --offload model moves the last part back to main memory
    return [cut_grid(image, 1, frames)[-1] for image in images]


# ---- the method ends here; what follows is housekeeping, first: errors and files ---------------
@contextlib.contextmanager
def explained(message):
    """Turn any error inside into a DsdError with this message: damaged files raise all kinds."""
    try:
        yield
    except DsdError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DsdError(f"{message} ({reason})") from error


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as part:` fill the file `part`, which then replaces `path` as a whole."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explained(f"cannot write {path}; make room or give another --out"):
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file; in a file named *.jsonl each item of a list gets a line of its own."""
    if Path(path).suffix == ".jsonl":
        lines = [json.dumps(item, ensure_ascii=False) for item in value]
    else:
        lines = [json.dumps(value, ensure_ascii=False, indent=2)]
    text = "".join(line + "\n" for line in lines)
    with writing(path) as part:
        part.write_bytes(text.encode(errors="backslashreplace"))


def read_json(path):
    """The object in a JSON file, {} if there is no file."""
    with explained(f"{path}: not a JSON file of this project; restore or delete it"):
        return dict(json.loads(Path(path).read_bytes())) if Path(path).exists() else {}


def read_records(path, *texts):
    """The objects in a file of JSON lines. texts: the fields that each must have, as text."""
    with explained(f"{path}: give a UTF-8 file"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        with explained(f"{path}, line {number}: not a record; correct it or make it again"):
            if line.strip():
                records.append(dict(json.loads(line)))
                if not all(isinstance(records[-1][name], str) for name in texts):
                    raise ValueError(f"it needs {' and '.join(texts)}, as text")
    return records


def name_of(path):
    """How records name a model or a file: from this project or the working folder on if inside one
    of them, else in full; what is not here (but on the hub) as it is given."""
    whole = Path(path).resolve()
    for root in (MINIATURE.parent, Path.cwd()):
        if whole.exists() and whole.is_relative_to(root):
            return whole.relative_to(root).as_posix()
    return (whole if whole.exists() else Path(path)).as_posix()


def digest(*files, text=""):
    """The first 16 hexadecimal digits of the SHA-256 of some files' contents, and of a text."""
    parts = [hashlib.sha256(Path(file).read_bytes()).digest() for file in files]
    parts.append(text.encode(errors="backslashreplace"))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


# ---- the adapter file --------------------------------------------------------------------------
def save_adapter(transformer, folder, facts, dtype=torch.float32):
    """Write the adapter as FluxControlPipeline.load_lora_weights reads it, always the same bytes.
    facts: what sampling must know, {name: number}: frames, clean_reference, size, prompt_tokens,
    guidance, the model's edition. They join diffusers' metadata entry: safetensors has no fixed
    order for several."""
    config = transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    about = {f"transformer.{name}": value for name, value in config.items()}
    about["dsd"] = facts
    tensors = {}
    for name, tensor in get_peft_model_state_dict(transformer).items():
        tensors[f"transformer.{name}"] = tensor.detach().to("cpu", dtype).contiguous()
    metadata = {"lora_adapter_metadata": json.dumps(about, indent=2, sort_keys=True)}
    with writing(Path(folder) / ADAPTER_FILE) as part:
        save_file(tensors, part, metadata)


def adapter_file(adapter):
    """The file of an adapter, which is given as a folder or a file."""
    file = Path(adapter) / ADAPTER_FILE if Path(adapter).is_dir() else Path(adapter)
    if not file.is_file():
        raise DsdError(f"no adapter {file}; finetune.py trains one")
    return file


def adapter_facts(adapter):
    """What `save_adapter` was told, {name: number}; an adapter of others draws two frames."""
    file = adapter_file(adapter)
    with explained(f"the adapter {file} cannot be read"), safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        about = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        of_others = {"frames": 2, "clean_reference": False, "prompt_tokens": None}
        return of_others | about.get("dsd", {})


def check_edition(model, adapter):
    """Refuse an adapter that was trained on other weights than this model's. A folder whose weights
    are exchanged from time to time numbers them: "edition" in its dsd.json."""
    edition = folder_settings(model).get("edition")
    trained_on = adapter_facts(adapter).get("edition")
    whole = (adapter_file(adapter).parent / "transformer").is_dir()  # released layout: all weights
    if trained_on != edition and not whole:
        what = f"{adapter} was trained on edition {trained_on} of its model, and this is {edition}"
        raise DsdError(f"{what}; train it again")


def load_adapter(pipe, adapter):
    """Load an adapter of finetune.py, or one of the authors' released layout, in place."""
    file = adapter_file(adapter)
    with explained(f"the adapter {file} does not fit this model"):  # wrong shapes, a cut file
        if (file.parent / "transformer").is_dir():
            load_released_transformer(pipe.transformer, file.parent / "transformer")
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, use_safetensors=True, adapter_name="default"
        )
    if pipe.transformer.config.in_channels == 64:  # it was not widened
        raise DsdError(f"{file} is an ordinary LoRA, which takes no reference")


def load_released_transformer(transformer, folder):
    """The authors' layout: `x_embedder` and `c_embedder` become one, biases added (released code).
    Their files hold the LoRA's entries as well; these are read from the adapter file."""
    if getattr(transformer, "hf_quantizer", None):
        raise DsdError(f"{folder} is a whole transformer, not of 4 bits; drop --quantize")
    with explained(f"{folder}: not a released DSD transformer for this model"):
        state = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        state = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
        columns = [state["x_embedder.weight"], state.pop("c_embedder.weight")]
        state["x_embedder.weight"] = torch.cat(columns, dim=1)
        state["x_embedder.bias"] = state["x_embedder.bias"] + state.pop("c_embedder.bias")
        widen(transformer).load_state_dict(state)


# ---- models ------------------------------------------------------------------------------------
def weight_dtype():
    """The number format of models: bfloat16 on a GPU that has it natively, else float32."""
    cuda = PartialState().device.type == "cuda"
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def check_here(model):
    """Refuse the name of a model on the hub on a machine without a GPU that can run such models."""
    if not Path(model).is_dir() and weight_dtype() != torch.bfloat16:
        need = "models from the hub need a CUDA GPU with bfloat16 (RTX 30 or newer)"
        raise DsdError(f"no model folder {model}; {need}, and torch finds none")


def check_model(model, *sides):
    """Before a model is loaded: is it FLUX.1, and are a picture's sides whole numbers of tokens?"""
    check_here(model)
    with explained(f"{model}: not a FLUX.1 text-to-image model in diffusers' form"):
        kind = diffusers.FluxPipeline.load_config(model)["_class_name"]
        if kind != "FluxPipeline":
            raise ValueError(f"a {kind}")
        vae = diffusers.AutoencoderKL.load_config(model, subfolder="vae")
        unit = 2 ** len(vae["block_out_channels"])  # a token is 2x2 latent pixels
    if any(side % unit for side in sides):
        size = " x ".join(map(str, sides))
        raise DsdError(f"a picture of {size} pixels: this model needs multiples of {unit}")


def load_pipeline(
    cls, model, quantize=None, offload=None, adapter=None, prompt_tokens=None, dtype=None, **parts
):
    """A FLUX.1 folder or hub name as a pipeline of class `cls` on the device.
    quantize, offload, adapter are the options of these names; prompt_tokens: how many the T5 reads,
    if not the model's own limit; transformer=None, for example, leaves that part out."""
    dtype, device = dtype or weight_dtype(), PartialState().device
    if quantize == "nf4":  # the large parts, but not the embedder, which `widen` must read
        skipped = {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": ["x_embedder"]}
        parts["quantization_config"] = diffusers.PipelineQuantizationConfig(
            "bitsandbytes_4bit", NF4 | skipped, ["transformer", "text_encoder_2"]
        )
    if adapter:
        check_edition(model, adapter)
    with explained(f"cannot load {model} as {cls.__name__}"):  # a cut file, a missing part
        pipe = cls.from_pretrained(model, dtype=dtype, use_safetensors=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    t5, is_schnell = pipe.tokenizer_2, not pipe.scheduler.config.use_dynamic_shifting
    limit = prompt_tokens or (256 if is_schnell else 512)
    t5.model_max_length = min(t5.model_max_length, limit)
    if adapter:
        load_adapter(pipe, adapter)  # before offloading takes the weights away
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def load_language_model(cls, name, quantize):
    """A chat model or a vision-language model on the device."""
    check_here(name)
    dtype, device, config = weight_dtype(), str(PartialState().device), None
    if quantize == "nf4":
        config = transformers.BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    return cls.from_pretrained(
        name, use_safetensors=True, dtype=dtype, device_map=device, quantization_config=config
    ).eval()


def warn_of_prompts(pipe, prompts):
    """Say on stderr what the T5 will not read: ends of prompts, and words that it does not know."""
    t5, limit = pipe.tokenizer_2, pipe.tokenizer_2.model_max_length
    cut = sum(len(ids) > limit for ids in t5(prompts).input_ids)
    if cut and PartialState().is_main_process:
        print(f"warning: prompts cut after {limit - 1} tokens: {cut}", file=sys.stderr)
    words = sorted({word for prompt in prompts for word in prompt.split()})
    unknown = [word for word in words if t5.unk_token_id in t5(word).input_ids]
    if unknown and PartialState().is_main_process:
        print("warning: words unknown to this model:", *unknown[:20], file=sys.stderr)


# ---- pictures ----------------------------------------------------------------------------------
def open_image(path):
    """A picture file as RGB: turned as EXIF says, transparency on white, the colours of its ICC
    profile as sRGB's, greys of 16 bits as of 8."""
    with explained(f"{path}: not an image that can be read"), Image.open(path) as image:
        profile = io.BytesIO(image.info.get("icc_profile") or b"")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel")
        if image.mode.startswith("I;16"):  # Pillow would make nearly all of it white
            image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # no profile, or not of colours
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"))
        return image


def fit_image(image, width, height, fit="crop"):
    """An image resized (bicubic: released code), cropped, or (fit="pad") with white added."""
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.BICUBIC, color="white")
    return ImageOps.fit(image, (width, height), Image.BICUBIC)


def save_image(image, path, **options):
    with writing(path) as part:
        image.save(part, format="PNG", **options)


def contact_sheet(rows, path, side=128):
    """Save rows of (image, caption) as one labelled picture; small images are enlarged."""
    widths = [side * image.width // image.height for row in rows for image, _ in row]
    width = max(60, *widths)  # room for a word; a letter is about 6 x 15 pixels
    cells = [[(image, textwrap.wrap(text, width // 6)) for image, text in row] for row in rows]
    heights = [side + 10 + 15 * max(len(lines) for _, lines in row) for row in cells]
    columns = max(len(row) for row in cells)
    sheet = Image.new("RGB", ((width + 6) * columns, sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 10)
    for r, row in enumerate(cells):
        for c, (image, lines) in enumerate(row):
            x, y = (width + 6) * c + 6, sum(heights[:r]) + 6
            way = Image.NEAREST if image.height < side else Image.LANCZOS
            sheet.paste(ImageOps.contain(image, (width, side), way), (x, y))
            draw.text((x, y + side), "\n".join(lines), fill="black", font=font)
    save_image(sheet, path)


# ---- options -----------------------------------------------------------------------------------
class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of a script's docstring, and names an option's default if any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Plain argparse, with what all scripts share."""

    def __init__(self, doc, out):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        self.add_argument("--out", type=Path, default=Path(out), help="folder for the results")
        self.add_argument("--device", choices=devices, default=devices[-1], help="where to compute")
        text = "nf4: weights of 4 bits; needs bitsandbytes and a CUDA GPU"
        self.add_argument("--quantize", choices=["none", "nf4"], default="none", help=text)

    def error(self, message):
        raise DsdError(f"{message}; --help explains the options")

    def peek(self, name):
        """The value of --name on the command line, on which the defaults of others depend. What is
        wrong with the other options is said when all are parsed."""
        default = self.get_default(name)
        only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        only.add_argument(f"--{name}", dest="value", nargs="?", default=default, const=default)
        known, _ = only.parse_known_args()
        return known.value

    def parse(self, script, folder="model", **more):
        """The options. Defaults, the strongest last: those in the code, those for this script in
        the dsd.json of --model (or of another option that names a folder), and `more`."""
        defaults = folder_settings(self.peek(folder), script) | more
        for action in self._actions:  # checked as if they were typed
            if action.dest in defaults:
                value = defaults[action.dest]
                with explained(f"--{action.dest} {value}, in dsd.json or the adapter"):
                    typed = action.type and not action.nargs and value is not None
                    action.default = action.type(value) if typed else value
        args = self.parse_args()
        able = args.device == "cuda" and importlib.util.find_spec("bitsandbytes")
        if args.quantize == "nf4" and not able:
            install = "pip install -c requirements.txt bitsandbytes"
            raise DsdError(f"--quantize nf4 needs a CUDA GPU and bitsandbytes: {install}")
        with explained("RANK, WORLD_SIZE and so on are set: use accelerate launch, or unset them"):
            PartialState(cpu=args.device == "cpu")  # PartialState() reports this device from now on
        return args


def folder_settings(model, script=None):
    """What a model's folder says in its dsd.json, {} if it says nothing: all, or for one script."""
    file = Path(model) / "dsd.json"
    settings = read_json(file)
    with explained(f'{file}: "{script}" must hold values of options'):
        return dict(settings.get(script, {})) if script else settings


def at_least(low, kind=int):
    """A type for argparse: a number from `low` up, and below 2**31, which keeps out infinity."""

    def number(text):
        if not low <= kind(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low} and below 2**31")
        return kind(text)

    return number


# ---- runs: processes, folders, ends ------------------------------------------------------------
def batches(items, size, name):
    """This process's batches of some items, with a progress bar; waits for the others at the end.
    What is done already does not change the batches: a resumed run computes the same ones."""
    state = PartialState()
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    mine = parts[state.process_index :: state.num_processes]
    yield from tqdm(mine, name, unit="batch", disable=not state.is_main_process)
    state.wait_for_everyone()


def open_out(args, script, changeable, **more):
    """Make the folder --out for one run and lock it. Returns the lock, which the caller holds.
    A run is identified by its options, except the `changeable` ones, and by `more`, which are kept
    in settings.json: the same run goes on, and another one is refused, like a folder in use."""
    lock, file = FileLock(args.out / ".lock"), args.out / "settings.json"
    run = {"step": script, **vars(args), **more}
    for name in run.keys() & {"model", "vlm", "llm", "enhance", "adapter"}:
        run[name] = run[name] and name_of(run[name])
    run = {name: run[name] for name in run if name not in ("out", "device", *changeable)}
    run = json.loads(json.dumps(run, default=name_of))  # in the file's form: tuples become lists
    with PartialState().main_process_first():  # nobody writes before the folder is accepted
        if not PartialState().is_main_process:
            return lock
        args.out.mkdir(parents=True, exist_ok=True)
        with explained(f"{args.out} is in use by another process; give another --out"):
            lock.acquire(blocking=False)
        before = read_json(file)
        changed = [name for name in {**before, **run} if before.get(name) != run.get(name)]
        ours = ".lock", file.name, f"{file.name}.part"
        holds_more = any(path.name not in ours for path in args.out.iterdir())
        if changed and holds_more:
            was = f"its {changed[0]} was {str(before.get(changed[0]))[:60]}"
            holds = f"{args.out} holds another run or other files ({was})"
            raise DsdError(f"{holds}; delete it or give another --out")
        write_json(file, run)
    return lock


def run_main(main):
    """Run a script's main; a user's mistake becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a letter shows its code
        stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from what is saved")
    except DsdError as error:
        line = str(error)
    except OSError as error:  # no permission, a file where a folder should be, a full disk
        line = f"{error.filename or 'a file'}: {error.strerror or error}"
    except torch.OutOfMemoryError as error:
        ways = "--batch_size 1, --gradient_checkpointing, --quantize nf4, --offload model"
        line = f"out of memory; try {ways} or smaller pictures ({error})"
    print("\nerror: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(2)
