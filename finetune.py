"""Step 3 (paper section 3.3): LoRA turns the teacher into a text+image-to-image model on its own curated pairs.

    python finetune.py                                      # the miniature: 8 minutes on two CPU cores, 1 GB
    python finetune.py --model black-forest-labs/FLUX.1-dev # one CUDA GPU
    accelerate launch finetune.py                           # several GPUs: the same batch, shared among them

The reference is frame 1 and the edit frame 2 of one canvas twice as wide as high. The model sees the condition
[reference | black] beside the noisy canvas and learns to draw both frames: frame 1 as it is, frame 2 as the prompt says.

Pictures and prompts are encoded once, to --out/cache; then the encoders are dropped and training reads tensors.
Writes to --out: `pytorch_lora_weights.safetensors` (a standard FLUX Control LoRA), `settings.json`, `log.jsonl`,
`loss.png`, `validation/*.png` and `summary.json`. Stopped and started again with the same command, it goes on from its
last checkpoint.
"""

import contextlib
import math
import time
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from diffusers import FluxControlPipeline
from diffusers.training_utils import EMAModel, cast_training_params
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import dsd

SHARD = 256  # pairs a cache file
FILES = [dsd.ADAPTER_FILE, "checkpoint.safetensors", "log.jsonl", "loss.png", "summary.json", "cache/*", "validation/*",
         "*.part"]  # what this script writes


# ---- the cache: everything encoded once ------------------------------------------------------------------------------
def read_pairs(folder):
    """The records of curate.py: reference and target file, and the target's prompt. A pair listed twice counts once."""
    path = folder / "metadata.jsonl"
    records = dsd.read_records(path, reference_file_name=str, target_file_name=str, prompt=str)
    for number, record in enumerate(records, 1):
        dsd.check_text(record["prompt"], f"{path}, line {number}, prompt")
    numbers = dsd.distinct(records, "pairs", "reference_file_name", "target_file_name", "prompt")
    if not numbers:
        raise dsd.DsdError(f"no pairs in {folder}; run curate.py first, or give --pairs")
    return dsd.Lazy(len(numbers), lambda i: records[numbers[i]])


def load_canvas(folder, pairs, size):
    """Pictures of some pairs -> (reference, target), each (n, 3, H, W) in [-1, 1]; `size` is (W, H)."""
    images = [[dsd.open_image(dsd.inside(folder, p[f"{side}_file_name"])) for p in pairs] for side in ("reference", "target")]
    if odd := [image.size for side in images for image in side if image.size != size]:
        raise dsd.DsdError(f"{folder}: pictures of {size} and of {odd[0]} pixels; curate grids of one size at a time")
    return [dsd.to_pixels(side) for side in images]


def encode_pairs(pipe, pairs, folder, size, cache, frames=2):
    """Encode what is not in `cache` yet, SHARD pairs a file: canvas and condition latents, prompt embeddings.

    With one frame (an ablation) the target is the whole canvas and the reference its condition."""
    state = dsd.processes()  # which share the files
    starts = range(0, len(pairs), SHARD)[state.process_index::state.num_processes]
    for start in tqdm(starts, desc="encode", disable=not state.is_main_process):
        path = cache / f"{start:08d}.safetensors"
        if path.exists():
            continue
        shard, x_0, condition = pairs[start:start + SHARD], [], []
        for i in range(0, len(shard), 32):
            reference, target = load_canvas(folder, shard[i:i + 32], size)
            both, given = (dsd.canvas(reference, target), dsd.canvas(reference)) if frames == 2 else (target, reference)
            x_0.append(dsd.encode(pipe.vae, both))  # (32, N, 64), both frames
            condition.append(dsd.encode(pipe.vae, given))  # (32, N, 64), the right frame is black
        prompts = sorted({p["prompt"] for p in shard})
        encoded = [dsd.encode_prompts(pipe, prompts[i:i + 32]) for i in range(0, len(prompts), 32)]
        tensors = {"x_0": torch.cat(x_0), "condition": torch.cat(condition),
                   "embeds": torch.cat([e for e, _ in encoded]), "pooled": torch.cat([p for _, p in encoded])}
        tensors = {name: t.to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}
        tensors["prompt"] = torch.tensor([prompts.index(p["prompt"]) for p in shard])
        with dsd.writing(path) as part:
            save_file(tensors, part)


class Cache:
    """The encoded pairs on disk, read a few at a time (memory does not grow with their number)."""

    def __init__(self, cache, pairs):
        self.pairs, self.cache = pairs, cache
        for i in range(0, len(pairs), SHARD):
            self.shard(i)  # is it there?

    def shard(self, i):
        """The file that pair i is in, open for as long as it is used."""
        with dsd.explained(f"{self.cache}: delete this folder, it is made again"):
            return safe_open(self.cache / f"{i - i % SHARD:08d}.safetensors", framework="pt")

    def batch(self, indices):
        """x_0 and condition (B, N, 64), text = (embeds (B, L, D), pooled (B, P))."""
        rows = []
        for i in indices.tolist():
            shard, k = self.shard(i), i % SHARD
            prompt = int(shard.get_slice("prompt")[k:k + 1])
            rows.append([shard.get_slice(name)[j:j + 1] for name, j in
                         (("x_0", k), ("condition", k), ("embeds", prompt), ("pooled", prompt))])
        x_0, condition, embeds, pooled = (torch.cat(parts).float() for parts in zip(*rows))
        return x_0, condition, (embeds, pooled)


# ---- training --------------------------------------------------------------------------------------------------------
def draw(cache, null_text, settings, step, micro, accelerator):
    """This process's share of a global batch, drawn by (seed, step) alone: a resumed run draws the same.

    Returns their pairs, x_0, eps (b, N, 64), sigma (b,), condition (b, N, 64), embeds (b, L, D), pooled (b, P)."""
    b = settings["batch_size"]
    generator = torch.Generator().manual_seed((settings["seed"] * 1_000_003 + step) * 64 + micro)
    indices = torch.randint(len(cache.pairs), (b,), generator=generator)
    sigma = dsd.sample_sigmas(b, settings["shift"], generator)
    drop_condition, drop_prompt = (torch.rand(b, generator=generator) < settings[name]
                                   for name in ("condition_dropout", "prompt_dropout"))
    noise_seeds = torch.randint(2**31, (b,), generator=generator)
    mine = slice(accelerator.process_index, b, accelerator.num_processes)
    x_0, condition, text = cache.batch(indices[mine])
    eps = torch.stack([torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(int(s)))
                       for s in noise_seeds[mine]])
    condition[drop_condition[mine]] = 0  # the null condition: zero latents (R)
    for part, null in zip(text, null_text):
        part[drop_prompt[mine]] = null.float().cpu()  # the null prompt: "" (R)
    pairs = [cache.pairs[i] for i in indices[mine].tolist()]
    return pairs, *(t.to(accelerator.device) for t in (x_0, eps, sigma[mine], condition, *text))


def batch_losses(model, batch, size, ids, settings):
    """(3,): the loss of one batch, and the losses of its two frames. `size`: the canvas in latent pixels (h, w)."""
    _, x_0, eps, sigma, condition, *text = batch
    tokens = torch.cat([dsd.interpolate(x_0, eps, sigma), condition], dim=2)  # (b, N, 128)
    v_pred = dsd.run_transformer(model, tokens, sigma, text, ids, settings["guidance_scale"])
    return torch.stack(dsd.two_frame_loss(v_pred, dsd.velocity(x_0, eps), *size, settings["frame_weights"]))


def make_optimizer(transformer, settings):
    """The trainable parameters, the condition columns last, AdamW on them and their averages (EMA) or None."""
    columns = dsd.condition_columns(transformer)
    others = [p for p in transformer.parameters() if p.requires_grad and p is not columns]
    optimizer = dsd.adamw(settings["quantize"])(
        [{"params": others, "factor": settings["lora_lr_factor"]},
         {"params": [columns], "factor": settings["condition_lr_factor"]}], weight_decay=0.0)
    parameters = [*others, columns]
    return parameters, optimizer, EMAModel(parameters, decay=settings["ema"]) if settings["ema"] else None


def train(transformer, cache, null_text, size, settings, accelerator, out, validate):
    """The loop: draw, noise, predict, compare both frames, step. Returns the seconds a step took."""
    ids, steps = dsd.position_ids(*size).to(accelerator.device), settings["steps"]
    parameters, optimizer, ema = make_optimizer(transformer, settings)
    first = resume(out, parameters, optimizer, ema, accelerator)
    model, optimizer = accelerator.prepare(transformer, optimizer, device_placement=[False, True])
    begun, bar = time.time(), tqdm(total=steps, initial=first, desc="finetune", disable=not accelerator.is_main_process)

    for step in range(first, steps):
        batches = [draw(cache, null_text, settings, step, micro, accelerator) for micro in range(settings["accumulate"])]
        losses = torch.zeros(3, device=accelerator.device)
        for batch in batches:
            with attention(accelerator.device):
                parts = batch_losses(model, batch, size, ids, settings) / len(batches)
                accelerator.backward(parts[0])
            losses += parts.detach()
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        record = dict(zip(("loss", "frame_1", "frame_2"), accelerator.reduce(losses, "mean").tolist()))
        if not math.isfinite(record["loss"] + norm):  # before it reaches the weights
            names = culprits(batches, lambda batch: batch_losses(model, batch, size, ids, settings))
            raise dsd.DsdError(f"the loss is not a number at step {step}, at {names}; the checkpoint before it is kept. "
                               "Try a lower --learning_rate, or without these pairs, and another --out")
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * group["factor"] * learning_rate_share(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(parameters)
        bar.set_postfix({name: f"{value:.3f}" for name, value in record.items()}, refresh=False)
        bar.update()
        if accelerator.is_main_process:
            dsd.append_records(out / "log.jsonl", [{"step": step, **record}])
            if (step + 1) % settings["validate_every"] == 0 and step + 1 < steps:
                validate(step + 1)
            if (step + 1) % settings["save_every"] == 0 or step + 1 == steps:  # last: what precedes it is done again
                dsd.save_checkpoint(out / "checkpoint.safetensors", parameters, optimizer, ema, step + 1)
    if ema:
        ema.copy_to(parameters)
    return (time.time() - begun) / max(steps - first, 1)


def attention(device):
    """On a CPU plain attention: the backward pass of the fused one is the slower one there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


@torch.no_grad()
def culprits(batches, losses_of):
    """The pairs of this process whose own loss is not a number, by the target's file name; all if each alone is fine."""
    losses = [(pair["target_file_name"], losses_of([None, *(t[k:k + 1] for t in tensors)])[0])
              for pairs, *tensors in batches for k, pair in enumerate(pairs)]
    bad = [name for name, loss in losses if not loss.isfinite()]
    return ", ".join(dict.fromkeys(bad or [name for name, _ in losses]))


def learning_rate_share(step, steps, warmup=20):
    """* Linear warm-up, a plateau, linear decay over the last 40 % (the paper's rate is constant)."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.4 * steps))


def resume(out, parameters, optimizer, ema, accelerator):
    """Restore the last checkpoint and cut the log to it; returns the next step, 0 if there is no checkpoint."""
    step = dsd.load_checkpoint(out / "checkpoint.safetensors", parameters, optimizer, ema)
    if accelerator.is_main_process:
        dsd.write_records(out / "log.jsonl", [r for r in dsd.read_records(out / "log.jsonl", step=int) if r["step"] < step])
    return step


def draw_losses(out, window=25):
    """loss.png: both frames' losses, averaged over `window` steps."""
    log = dsd.read_records(out / "log.jsonl", frame_1=float, frame_2=float)
    k = min(window, len(log))
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, label in (("frame_1", "frame 1 (identity)"), ("frame_2", "frame 2 (edit)")):
        axes.plot(range(k, len(log) + 1), numpy.convolve([r[name] for r in log], [1 / k] * k, "valid"), label=label)
    axes.set(xlabel="step", ylabel="flow-matching loss", title=f"mean of {window} steps", ylim=(0, None))
    axes.legend()
    with dsd.writing(out / "loss.png") as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight")


# ---- command line ----------------------------------------------------------------------------------------------------
def parse_args():
    parser = dsd.Parser(__doc__, "runs/adapter", "model", "quantize")
    add, setting = parser.add_argument, parser.setting
    add("--pairs", type=Path, default="runs/pairs", help="what curate.py wrote (default: %(default)s)")
    setting("steps", 10_000, "optimiser steps")
    setting("rank", 64, "rank of the LoRA; the paper's is 512")
    setting("batch_size", 1, "pairs a step, over all processes")
    setting("accumulate", 1, "backward passes a step; the batch is so many times larger")
    setting("learning_rate", 1e-4, "of AdamW, after a warm-up")
    setting("condition_lr_factor", 5.0, "the condition columns learn so much faster: they start from zero")
    setting("shift", 3.0, "of the noise levels: the larger it is, the more of them are high, where colours are decided")
    setting("lora_lr_factor", 1.0, "ablation: 0 trains the condition columns alone")
    setting("frames", 2, "ablation: 1 is the edit alone, conditioned by its channels only", choices=[1, 2])
    setting("frame_weights", [1.0, 1.0], "weights of the losses of frame 1 and frame 2", nargs=2)
    setting("ema", 0.0, "decay of the averaged weights, 0 is off")
    setting("gradient_checkpointing", False, "less memory, a third more time")
    setting("compile", False, "compile the blocks: a minute, and then faster steps")
    setting("precision", "bf16", "of the arithmetic; the LoRA itself is kept in float32", choices=["bf16", "no"])
    setting("save_every", 250, "steps between checkpoints")
    setting("validate_every", 500, "steps between validation pictures")
    setting("seed", 0, "of data order, noise and LoRA initialisation")
    args = parser.parse_args()
    return args, dsd.model_settings(args.model, "finetune", args, **parser.defaults, condition_dropout=0.1,
                                    prompt_dropout=0.1, guidance_scale=3.5, quantize="none")


def check(args, settings, pairs, processes):
    """Refuse what could not be trained; returns the size (W, H) of the pictures."""
    width, height = dsd.open_image(dsd.inside(args.pairs, pairs[0]["reference_file_name"])).size
    channels = dsd.check_model(args.model, width=width, height=height)
    if settings["rank"] > channels:
        raise dsd.DsdError(f"--rank {settings['rank']} is above the {channels} channels of this model's layers")
    if settings["batch_size"] % processes:
        raise dsd.DsdError(f"--batch_size must be a multiple of the {processes} processes")
    if len(settings["frame_weights"]) != 2 or not any(settings["frame_weights"]):
        raise dsd.DsdError("--frame_weights: two numbers, not both 0")
    if not settings["shift"]:
        raise dsd.DsdError("--shift 0: every noise level would be 0; it must be above 0, and 1 leaves the levels even")
    if settings["ema"] >= 1:
        raise dsd.DsdError(f"--ema {settings['ema']}: the decay must be below 1")
    return width, height


def main():
    args, settings = parse_args()
    dsd.check_machine(args, ["transformer"])
    accelerator = Accelerator(mixed_precision=settings["precision"], cpu=dsd.device() == "cpu")
    pairs = read_pairs(args.pairs)
    size = check(args, settings, pairs, accelerator.num_processes)
    with accelerator.main_process_first():
        dsd.open_out(args.out, {"step": "finetune", **settings, "model": dsd.name_of(args.model),
                                "pairs": dsd.file_digest(args.pairs / "metadata.jsonl")}, FILES, args.overwrite)

    # phase 1: encode, then drop the encoders
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, transformer=None)
    if accelerator.is_main_process:
        dsd.warn_of_prompts(pipe, (pair["prompt"] for pair in pairs))
    encode_pairs(pipe, pairs, args.pairs, size, args.out / "cache", settings["frames"])
    accelerator.wait_for_everyone()  # for all of the cache
    null_text = dsd.encode_prompts(pipe, [""])
    validate = make_validation(pipe, pairs, size, args, settings, accelerator)
    pipe.text_encoder = pipe.text_encoder_2 = None

    # phase 2: widen, add LoRA, train on tensors
    torch.manual_seed(settings["seed"])
    pipe.transformer = load_transformer(args.model, settings)
    latent_size = size[1] // pipe.vae_scale_factor, settings["frames"] * size[0] // pipe.vae_scale_factor  # canvas
    seconds = train(pipe.transformer, Cache(args.out / "cache", pairs), null_text, latent_size, settings, accelerator,
                    args.out, validate)
    if accelerator.is_main_process:
        draw_losses(args.out)
        validate(settings["steps"])
        dsd.save_adapter(pipe.transformer, args.out, torch.float16 if dsd.device() == "cpu" else torch.bfloat16)
        dsd.write_json(args.out / "summary.json", {"pairs": len(pairs), "steps": settings["steps"],
                                                   "seconds_per_step": seconds, "peak_memory_gb": dsd.peak_memory()})
        print(f"adapter in {args.out}: {len(pairs)} pairs, {settings['steps']} steps, {seconds:.2f} s a step, peak memory "
              f"{dsd.peak_memory():.1f} GB; look at {args.out / 'validation'} and {args.out / 'loss.png'}")
    accelerator.end_training()


def make_validation(pipe, pairs, size, args, settings, accelerator):
    """A function that draws the prompts of six of the pairs and saves them beside the pictures, validate(step)."""
    examples = pairs[::max(1, len(pairs) // 6)][:6]
    references, _ = load_canvas(args.pairs, examples, size)
    text = dsd.encode_prompts(pipe, [e["prompt"] for e in examples])
    sampling = {"steps": 20, "image_guidance": 1.0, "text_guidance": 1.0, "unguided_steps": 0,
                "guidance_scale": settings["guidance_scale"]}

    def validate(step):
        if settings["frames"] == 1:  # not what dsd.sample draws; evaluate.py does
            return
        with accelerator.autocast():  # without guidance the null prompt is not used
            drawn = dsd.sample(pipe, references, text, text, list(range(len(examples))), sampling)
        rows = [[(dsd.open_image(args.pairs / e["reference_file_name"]), "reference"), (image, e["prompt"]),
                 (dsd.open_image(args.pairs / e["target_file_name"]), "the pair's target")]
                for e, image in zip(examples, drawn)]
        dsd.contact_sheet(rows, args.out / "validation" / f"step_{step:06d}.png")

    return validate


def load_transformer(model, settings):
    """The teacher's transformer, widened, with LoRA in float32: at this moment it still is the teacher."""
    others = dict.fromkeys(["vae", "text_encoder", "text_encoder_2"])
    transformer = dsd.load_pipeline(FluxControlPipeline, model, settings["quantize"], **others).transformer
    dsd.add_lora(dsd.widen(transformer), settings["rank"])
    cast_training_params(transformer, torch.float32)
    if settings["gradient_checkpointing"]:
        transformer.enable_gradient_checkpointing()
    if settings["compile"]:
        transformer.compile_repeated_blocks(fullgraph=True)
    return transformer.train()


if __name__ == "__main__":
    dsd.run(main)
