"""Step 3 (paper section 3.3): LoRA turns the teacher into a text+image-to-image model on its own curated pairs.

    python finetune.py                                      # the miniature: about 6 minutes on two CPU cores, 1 GB
    python finetune.py --model black-forest-labs/FLUX.1-dev # one CUDA GPU
    accelerate launch finetune.py                           # several GPUs: the same batch, shared among them

The reference is frame 1 and the edit frame 2 of one canvas twice as wide as high. The model sees the condition
[reference | black] beside the noisy canvas and learns to draw both frames: frame 1 as it is, frame 2 as the prompt says.

Pictures and prompts are encoded once, to --out/cache; then the encoders are dropped and training reads tensors.
Writes to --out: `pytorch_lora_weights.safetensors` (a standard FLUX Control LoRA), `settings.json`, `log.jsonl`,
`loss.png`, `validation/*.png` and `summary.json`. Stopped and started again with the same command, it goes on from its
last checkpoint.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import matplotlib
import numpy
import torch
from accelerate import Accelerator
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel, cast_training_params
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import dsd

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

SHARD = 256  # pairs a cache file


# ---- the cache: everything encoded once ------------------------------------------------------------------------------
def read_pairs(folder):
    """The records of curate.py: reference and target file, and the target's prompt."""
    pairs = dsd.read_records(folder / "metadata.jsonl")
    if not pairs:
        raise dsd.DsdError(f"no pairs in {folder}; run curate.py first, or give --pairs")
    for number, pair in enumerate(pairs, 1):
        if not {"reference_file_name", "target_file_name", "prompt"} <= set(pair):
            raise dsd.DsdError(f"{folder}/metadata.jsonl, line {number}: not a pair; run curate.py again")
    return pairs


def load_canvas(folder, pairs, size):
    """Pictures of some pairs -> (reference, target), each (n, 3, H, W) in [-1, 1]; `size` is (W, H)."""
    images = [[dsd.open_image(folder / p[f"{side}_file_name"]) for p in pairs] for side in ("reference", "target")]
    if odd := [image.size for side in images for image in side if image.size != size]:
        raise dsd.DsdError(f"{folder}: pictures of {size} and of {odd[0]} pixels; curate grids of one size at a time")
    return [dsd.to_pixels(side) for side in images]


def encode_pairs(pipe, pairs, folder, size, cache, frames=2):
    """Encode what is not in `cache` yet, SHARD pairs a file: canvas and condition latents, prompt embeddings.

    With one frame (an ablation) the target is the whole canvas and the reference its condition."""
    for start in tqdm(range(0, len(pairs), SHARD), desc="encode", disable=None):
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
        save_file(tensors, f"{path}.part")
        Path(f"{path}.part").replace(path)


class Cache:
    """The encoded pairs on disk, read a few at a time (memory does not grow with their number)."""

    def __init__(self, cache, count):
        self.count = count
        self.shards = [safe_open(path, framework="pt") for path in sorted(cache.glob("*.safetensors"))]

    def batch(self, indices):
        """x_0 and condition (B, N, 64), text = (embeds (B, L, D), pooled (B, P))."""
        rows = []
        for i in indices.tolist():
            shard, k = self.shards[i // SHARD], i % SHARD
            prompt = int(shard.get_slice("prompt")[k:k + 1])
            rows.append([shard.get_slice(name)[j:j + 1] for name, j in
                         (("x_0", k), ("condition", k), ("embeds", prompt), ("pooled", prompt))])
        x_0, condition, embeds, pooled = (torch.cat(parts).float() for parts in zip(*rows))
        return x_0, condition, (embeds, pooled)


# ---- training --------------------------------------------------------------------------------------------------------
def draw(cache, null_text, settings, step, micro, accelerator):
    """This process's share of a global batch, drawn by (seed, step) alone: a resumed run draws the same.

    Returns x_0, eps (b, N, 64), sigma (b,), condition (b, N, 64), embeds (b, L, D), pooled (b, P)."""
    b = settings["batch_size"]
    generator = torch.Generator().manual_seed((settings["seed"] * 1_000_003 + step) * 64 + micro)
    indices = torch.randint(cache.count, (b,), generator=generator)
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
    return [t.to(accelerator.device) for t in (x_0, eps, sigma[mine], condition, *text)]


def batch_losses(model, batch, size, ids, settings):
    """(3,): the loss of one batch, and the losses of its two frames."""
    x_0, eps, sigma, condition, *text = batch
    tokens = torch.cat([dsd.interpolate(x_0, eps, sigma), condition], dim=2)  # (b, N, 128)
    v_pred = dsd.run_transformer(model, tokens, sigma, text, ids, settings["guidance_scale"])
    return torch.stack(dsd.two_frame_loss(v_pred, dsd.velocity(x_0, eps), *size, settings["frame_weights"]))


def make_optimizer(transformer, settings):
    """The trainable parameters, the condition columns last, AdamW on them and their averages (EMA) or None."""
    columns = dsd.condition_columns(transformer)
    others = [p for p in transformer.parameters() if p.requires_grad and p is not columns]
    optimizer = torch.optim.AdamW([{"params": others, "factor": settings["lora_lr_factor"]},
                                   {"params": [columns], "factor": settings["condition_lr_factor"]}], weight_decay=0.0)
    parameters = [*others, columns]
    return parameters, optimizer, EMAModel(parameters, decay=settings["ema"]) if settings["ema"] else None


def train(transformer, cache, null_text, size, settings, accelerator, out, validate):
    """The loop: draw, noise, predict, compare both frames, step. `size`: the canvas in latent pixels (h, w).

    Returns the seconds a step took."""
    ids = dsd.position_ids(*size).to(accelerator.device)
    parameters, optimizer, ema = make_optimizer(transformer, settings)
    first = resume(out, parameters, optimizer, ema, accelerator)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    micros, main, steps = settings["accumulate"], accelerator.is_main_process, settings["steps"]
    begun, bar = time.time(), tqdm(total=steps, initial=first, desc="finetune", disable=not main)

    for step in range(first, steps):
        losses = torch.zeros(3, device=accelerator.device)
        for micro in range(micros):
            batch = draw(cache, null_text, settings, step, micro, accelerator)
            parts = batch_losses(model, batch, size, ids, settings) / micros
            accelerator.backward(parts[0])
            losses += parts.detach()
        accelerator.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * group["factor"] * learning_rate_share(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(parameters)
        record = dict(zip(("loss", "frame_1", "frame_2"), accelerator.reduce(losses, "mean").tolist()))
        if not math.isfinite(record["loss"]):
            raise dsd.DsdError(f"the loss is not a number at step {step}; try a lower --learning_rate and another --out")
        bar.set_postfix({name: f"{value:.3f}" for name, value in record.items()}, refresh=False)
        bar.update()
        if main:
            dsd.append_records(out / "log.jsonl", [{"step": step, **record}])
            if (step + 1) % settings["validate_every"] == 0 and step + 1 < steps:
                validate(step + 1)
            if (step + 1) % settings["save_every"] == 0 or step + 1 == steps:
                dsd.save_checkpoint(out / "checkpoint.safetensors", parameters, optimizer, ema, step + 1)
                draw_losses(out)
    if ema:
        ema.copy_to(parameters)
    return (time.time() - begun) / max(steps - first, 1)


def learning_rate_share(step, steps, warmup=20):
    """* Linear warm-up, a plateau, linear decay over the last 40 % (the paper's rate is constant)."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.4 * steps))


def resume(out, parameters, optimizer, ema, accelerator):
    """Restore the last checkpoint and cut the log to it; returns the next step, 0 if there is no checkpoint."""
    step = dsd.load_checkpoint(out / "checkpoint.safetensors", parameters, optimizer, ema)
    if accelerator.is_main_process:
        log = [r for r in dsd.read_records(out / "log.jsonl") if r["step"] < step]
        dsd.write_text(out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))
    return step


def draw_losses(out, window=25):
    """loss.png: both frames' losses, averaged over `window` steps."""
    log = dsd.read_records(out / "log.jsonl")
    k = min(window, len(log))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("frame_1", "frame 1 (identity)"), ("frame_2", "frame 2 (edit)")):
        axes.plot(range(k, len(log) + 1), numpy.convolve([r[name] for r in log], [1 / k] * k, "valid"), label=label)
    axes.set(xlabel="step", ylabel="flow-matching loss", title=f"mean of {window} steps", ylim=(0, None))
    axes.legend()
    figure.savefig(out / "loss.png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)


# ---- command line ----------------------------------------------------------------------------------------------------
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=Path, default="runs/pairs", help="what curate.py wrote (default: %(default)s)")
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: FLUX folder or hub name (default: the miniature)")
    add("--out", type=Path, default="runs/adapter", help="where the adapter goes (default: %(default)s)")
    add("--steps", type=int, help="optimiser steps")
    add("--rank", type=int, help="rank of the LoRA; the paper's is 512")
    add("--batch_size", type=int, help="pairs a step, over all processes")
    add("--accumulate", type=int, help="backward passes a step; the batch is so many times larger")
    add("--learning_rate", type=float)
    add("--condition_lr_factor", type=float, help="the condition columns learn so much faster: they start from zero")
    add("--lora_lr_factor", type=float, help="ablation: 0 trains the condition columns alone")
    add("--frame_weights", type=float, nargs=2, help="weights of the losses of frame 1 and frame 2")
    add("--frames", type=int, choices=[1, 2], help="ablation: 1 is the edit alone, conditioned by its channels only")
    add("--ema", type=float, help="decay of the averaged weights, 0 is off")
    add("--gradient_checkpointing", action="store_true", default=None, help="less memory, a third more time")
    add("--precision", choices=["bf16", "no"], help="of the arithmetic; the LoRA itself is kept in float32")
    add("--save_every", type=int, help="steps between checkpoints")
    add("--validate_every", type=int, help="steps between validation pictures")
    add("--seed", type=int, help="of data order, noise and LoRA initialisation")
    return parser.parse_args()


def main():
    args = parse_args()
    settings = dsd.model_settings(
        args.model, "finetune", args, steps=10_000, rank=64, batch_size=1, accumulate=1, learning_rate=1e-4,
        condition_lr_factor=5.0, lora_lr_factor=1.0, frames=2, frame_weights=[1.0, 1.0], condition_dropout=0.1,
        prompt_dropout=0.1, shift=3.0, guidance_scale=3.5, ema=0.0, gradient_checkpointing=False, precision="bf16",
        save_every=250, validate_every=500, seed=0)
    if min(settings[name] for name in ("steps", "rank", "batch_size", "accumulate", "save_every", "validate_every")) < 1:
        raise dsd.DsdError("--steps, --rank, --batch_size, --accumulate, --save_every, --validate_every: at least 1")
    accelerator = Accelerator(mixed_precision=settings["precision"])
    if settings["batch_size"] % accelerator.num_processes:
        raise dsd.DsdError(f"--batch_size must be a multiple of the {accelerator.num_processes} processes")
    pairs = read_pairs(args.pairs)
    width, height = size = dsd.open_image(args.pairs / pairs[0]["reference_file_name"]).size

    # phase 1: encode, then drop the encoders
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, transformer=None)
    if width % (2 * pipe.vae_scale_factor) or height % (2 * pipe.vae_scale_factor):
        raise dsd.DsdError(f"{args.pairs}: pictures of {size} pixels; this model needs multiples of "
                           f"{2 * pipe.vae_scale_factor}")
    claim(args, settings, accelerator)
    if accelerator.is_main_process:
        encode_pairs(pipe, pairs, args.pairs, size, args.out / "cache", settings["frames"])
    accelerator.wait_for_everyone()
    null_text = dsd.encode_prompts(pipe, [""])
    validate = make_validation(pipe, pairs, size, args, settings, accelerator)
    pipe.text_encoder = pipe.text_encoder_2 = None

    # phase 2: widen, add LoRA, train on tensors
    torch.manual_seed(settings["seed"])
    pipe.transformer = load_transformer(args.model, settings, pipe.vae.dtype).to(accelerator.device)
    cache = Cache(args.out / "cache", len(pairs))
    latent_size = height // pipe.vae_scale_factor, settings["frames"] * width // pipe.vae_scale_factor  # canvas
    seconds = train(pipe.transformer, cache, null_text, latent_size, settings, accelerator, args.out, validate)
    if accelerator.is_main_process:
        dsd.save_adapter(pipe.transformer, args.out, torch.float16 if dsd.device() == "cpu" else torch.bfloat16)
        validate(settings["steps"])
        memory = dsd.peak_memory()
        dsd.write_json(args.out / "summary.json", {"pairs": len(pairs), "steps": settings["steps"],
                                                   "seconds_per_step": seconds, "peak_memory_gb": memory})
        print(f"adapter in {args.out}: {len(pairs)} pairs, {settings['steps']} steps, {seconds:.2f} s a step, peak memory "
              f"{memory:.1f} GB; look at {args.out / 'validation'} and {args.out / 'loss.png'}")
    accelerator.end_training()


def claim(args, settings, accelerator):
    """Write settings.json, or refuse a folder that holds a run with other settings or other pairs."""
    digest = hashlib.sha256((args.pairs / "metadata.jsonl").read_bytes()).hexdigest()
    settings, path = {**settings, "model": dsd.name_of(args.model), "pairs": digest}, args.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise dsd.DsdError(f"{args.out} holds a run with other settings or pairs; give another --out or delete it")
    if accelerator.is_main_process:
        for folder in ("cache", "validation"):
            (args.out / folder).mkdir(parents=True, exist_ok=True)
        dsd.write_json(path, settings)


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


def load_transformer(model, settings, dtype):
    """The teacher's transformer, widened, with LoRA in float32: at this moment it still is the teacher."""
    transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer", dtype=dtype, use_safetensors=True)
    dsd.add_lora(dsd.widen(transformer), settings["rank"])
    cast_training_params(transformer, torch.float32)
    if settings["gradient_checkpointing"]:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


if __name__ == "__main__":
    dsd.run(main)
