"""Diffusion Self-Distillation, the core that every script shares.

A text-to-image model draws sheets of one subject, the sheets are cut into pairs, and the same model learns from the
pairs to follow a reference image (Cai, Chan, Zhang, Guibas, Wu, Wetzstein: "Diffusion Self-Distillation for Zero-Shot
Customized Image Generation", CVPR 2025, arXiv 2411.18616). In comments, "R": where the paper is silent, the authors'
released inference code settles it; "*": our own choice.

Notation: `x_0` clean latents, `eps` Gaussian noise, `sigma` in [0, 1] the noise level, `v` the velocity. Latents are
packed: a token holds 2x2 latent pixels of 16 channels, so x is (B, N, 64) with N = (h / 2) (w / 2). `I` is the
reference image (as condition tokens), `T` the prompt (as text embeddings).
"""

import json
import os
import resource
import sys
import textwrap
from pathlib import Path

import numpy
import torch
from diffusers import FluxControlPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file

MINIATURE = Path(__file__).resolve().parent / "miniature"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it


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
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator=generator)
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


# ---- images: grids and canvases --------------------------------------------------------------------------------------
def cut_grid(image, rows=2, columns=2):
    """One grid image -> its panels in reading order, a list of rows * columns images."""
    w, h = image.width // columns, image.height // rows
    return [image.crop((c * w, r * h, (c + 1) * w, (r + 1) * h)) for r in range(rows) for c in range(columns)]


def build_grid(panels, rows=2, columns=2):
    """Panels in reading order -> one grid image, the inverse of `cut_grid`."""
    w, h = panels[0].size
    grid = Image.new("RGB", (columns * w, rows * h))
    for i, panel in enumerate(panels):
        grid.paste(panel, (i % columns * w, i // columns * h))
    return grid


def to_pixels(images):
    """RGB images of one size -> (B, 3, H, W) in [-1, 1]."""
    raw = torch.stack([torch.from_numpy(numpy.array(image)) for image in images])  # (B, H, W, 3)
    return raw.permute(0, 3, 1, 2).float() / 127.5 - 1


def canvas(reference, target=None):
    """Two frames (B, 3, H, W) side by side: (B, 3, H, 2 W). Without a target the right frame is black (R)."""
    return torch.cat([reference, torch.full_like(reference, -1) if target is None else target], dim=3)


def open_image(path):
    """Any image file as RGB: EXIF orientation applied, transparency composed on white, 16 bits scaled to 8."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = image.point(lambda v: v / 256).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DsdError(f"{path}: not an image that can be read ({error}); give a PNG or JPEG file") from None


def fit_panel(image, width, height):
    """Centre-crop to the panel's proportions and resize to width x height."""
    return ImageOps.fit(image, (width, height), Image.LANCZOS)


def contact_sheet(rows, path, side=128):
    """Save rows of (image, caption) as one labelled picture; small images are enlarged without smoothing."""
    rows = [[labelled(image, caption, side) for image, caption in row] for row in rows]
    sheet = Image.new("RGB", (max(sum(cell.width for cell in row) for row in rows),
                              sum(max(cell.height for cell in row) for row in rows)), "white")
    y = 0
    for row in rows:
        x = 0
        for cell in row:
            sheet.paste(cell, (x, y))
            x += cell.width
        y += max(cell.height for cell in row)
    sheet.save(path)


def labelled(image, caption, side, margin=6):
    """An image scaled to the height `side`, its caption below, white around both."""
    width, font = side * image.width // image.height, ImageFont.load_default(size=11)
    lines = textwrap.wrap(caption, max(width // 6, 1)) or [""]  # a letter is about 6 pixels wide
    cell = Image.new("RGB", (width + margin, side + margin + 14 * len(lines)), "white")
    cell.paste(image.resize((width, side), Image.NEAREST if image.height < side else Image.LANCZOS), (margin, margin))
    ImageDraw.Draw(cell).multiline_text((margin, margin + side), "\n".join(lines), fill="black", font=font)
    return cell


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
    """Write the adapter so that FluxControlPipeline.load_lora_weights(folder) reads it."""
    config = transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # the same file every time
    layers = {name: tensor.to("cpu", dtype) for name, tensor in lora_state(transformer).items()}
    FluxControlPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config)


def load_adapter(pipe, folder):
    """Load an adapter folder into a FluxControlPipeline: ours, or the authors' released layout."""
    folder = Path(folder)
    if not (folder / ADAPTER_FILE).exists():
        raise DsdError(f"no adapter ({ADAPTER_FILE}) in {folder}; train one with finetune.py or give --adapter")
    if (folder / "transformer").is_dir():
        load_released_transformer(pipe.transformer, folder / "transformer")
    try:
        pipe.load_lora_weights(str(folder), weight_name=ADAPTER_FILE)
    except Exception as error:  # diffusers raises many kinds here: wrong shapes, a cut file, foreign names
        raise DsdError(f"the adapter in {folder} does not fit this model: {one_line(error)}") from None


def load_released_transformer(transformer, folder):
    """The authors' layout: `x_embedder` and `c_embedder` (R) become one embedder, weights side by side, biases added."""
    state = {}
    try:
        for file in sorted(Path(folder).glob("*.safetensors")):
            state |= load_file(file)
        weights, biases = ([state.pop(f"{name}.{kind}") for name in ("x_embedder", "c_embedder")]
                           for kind in ("weight", "bias"))
        state |= {"x_embedder.weight": torch.cat(weights, dim=1), "x_embedder.bias": sum(biases)}  # (width, 128)
        widen(transformer).load_state_dict(state)
    except Exception as error:  # a cut file, no c_embedder, weights of another size
        raise DsdError(f"{folder}: not a released DSD transformer for this model: {one_line(error)}") from None


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
    """How many T5 tokens a prompt may have: FLUX's 512, or fewer if the loaded tokenizer says so."""
    return min(512, pipe.tokenizer_2.model_max_length)


def start_schedule(scheduler, steps, tokens, device):
    """Set the loaded scheduler to `steps` Euler steps for an image of so many tokens; returns its timesteps."""
    c = scheduler.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, device=device, mu=mu if c.use_dynamic_shifting else None)
    return scheduler.timesteps


# ---- models and settings ---------------------------------------------------------------------------------------------
def device():
    """"cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(cls, model, **parts):
    """A FLUX folder or hub name as a pipeline of class `cls`: bfloat16 on a GPU, float32 on a CPU."""
    folder = Path(model)
    hub = not folder.exists() and str(model).count("/") == 1 and not folder.parent.is_dir()  # owner/name
    if not hub and not (folder / "model_index.json").exists():
        raise DsdError(f"no FLUX model at {model} (model_index.json missing); give a diffusers folder or a hub name")
    try:
        dtype = torch.bfloat16 if device() == "cuda" else torch.float32
        pipe = cls.from_pretrained(model, dtype=dtype, use_safetensors=True, **parts)
    except Exception as error:  # a cut file, a missing part, a gated model: many kinds, one answer
        raise DsdError(f"cannot load {model} as {cls.__name__}: {one_line(error)}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device())


def model_settings(model, step, flags, **defaults):
    """Settings of one script: a flag if it was given, else what the model's folder says (dsd.json), else the default."""
    folder = Path(model)
    own = json.loads((folder / "dsd.json").read_text()).get(step, {}) if (folder / "dsd.json").exists() else {}
    given = {name: value for name, value in vars(flags).items() if value is not None}
    return {name: given.get(name, own.get(name, default)) for name, default in defaults.items()}


def name_of(path):
    """How records name a model or a file: inside this project relative to it, else as it was given."""
    root, whole = Path(__file__).resolve().parent, Path(path).resolve()
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(path)


def peak_memory():
    """The most memory used so far, in GB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kilobytes


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def save_checkpoint(path, parameters, optimizer, ema, step):
    """All that step `step` depends on, weights, AdamW's moments, averages (or ema None), in one safetensors file."""
    tensors = {"step": torch.tensor(step), "ema_steps": torch.tensor(ema.optimization_step if ema else 0)}
    for i, p in enumerate(parameters):
        state = optimizer.state[p]
        tensors |= {f"{i}.p": p.data, f"{i}.m": state["exp_avg"], f"{i}.v": state["exp_avg_sq"], f"{i}.n": state["step"]}
        if ema:
            tensors[f"{i}.ema"] = ema.shadow_params[i]
    save_file({name: t.contiguous() for name, t in tensors.items()}, f"{path}.part")
    Path(f"{path}.part").replace(path)


def load_checkpoint(path, parameters, optimizer, ema):
    """Restore what `save_checkpoint` wrote; returns the next step, 0 if there is no checkpoint."""
    if not Path(path).exists():
        return 0
    tensors = load_file(path)
    for i, p in enumerate(parameters):
        p.data.copy_(tensors[f"{i}.p"])
        optimizer.state[p] = {"step": tensors[f"{i}.n"], "exp_avg": tensors[f"{i}.m"].to(p.device),
                              "exp_avg_sq": tensors[f"{i}.v"].to(p.device)}
        if ema:
            ema.shadow_params[i].copy_(tensors[f"{i}.ema"])
    if ema:
        ema.optimization_step = int(tensors["ema_steps"])
    return int(tensors["step"])


# ---- records on disk -------------------------------------------------------------------------------------------------
class DsdError(Exception):
    """A user's mistake: one line that says what is wrong and what to do."""


def one_line(error):
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def run(main):
    """Run a script's main; a DsdError becomes one line on stderr and exit code 2."""
    try:
        main()
    except DsdError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("stopped; the same command goes on from here", file=sys.stderr) or 130)


def append_records(path, records):
    """Append records as JSON lines and see them to the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_records(path):
    """The records of a JSON-lines file, [] if there is none. A half-written last line is dropped, with a notice."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    whole, half = data[:data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1:]
    try:
        if half:
            print(f"{path}: dropped a half-written last line", file=sys.stderr)
            write_text(path, whole.decode())
        return [json.loads(line) for line in whole.split(b"\n")[:-1]]
    except ValueError as error:
        raise DsdError(f"{path}: not a file of JSON lines ({error}); delete it or restore it") from None


def write_text(path, text):
    """Write a text file whole: aside first, then renamed, so that a reader never sees half of it."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path, value):
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
