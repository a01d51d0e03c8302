"""Step 3 (paper section 3.3): LoRA turns the teacher into a text+image-to-image model on its own curated pairs.

    python finetune.py                                      # the miniature: about 6 minutes on two CPU cores
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
import json
import time
from pathlib import Path

import matplotlib
import torch
from accelerate import Accelerator
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel, cast_training_params
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
    return pairs


def load_canvas(folder, pairs):
    """Pictures of some pairs -> (reference, target), each (n, 3, H, W) in [-1, 1]."""
    images = [[dsd.open_image(folder / p[f"{side}_file_name"]) for p in pairs] for side in ("reference", "target")]
    sizes = {image.size for side in images for image in side}
    if len(sizes) > 1:
        raise dsd.DsdError(f"{folder}: pictures of several sizes {sorted(sizes)[:3]}; curate grids of one size at a time")
    return [dsd.to_pixels(side) for side in images]


def encode_pairs(pipe, pairs, folder, cache):
    """Encode what is not in `cache` yet, SHARD pairs a file: canvas and condition latents, prompt embeddings."""
    for start in tqdm(range(0, len(pairs), SHARD), desc="encode", disable=None):
        path = cache / f"{start:08d}.safetensors"
        if path.exists():
            continue
        shard, x_0, condition = pairs[start:start + SHARD], [], []
        for i in range(0, len(shard), 32):
            reference, target = load_canvas(folder, shard[i:i + 32])
            x_0.append(dsd.encode(pipe.vae, dsd.canvas(reference, target)))  # (32, N, 64), both frames
            condition.append(dsd.encode(pipe.vae, dsd.canvas(reference)))  # (32, N, 64), the right frame is black
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

    Returns x_0, eps (b, N, 64), sigma (b,), condition (b, N, 64), text."""
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
        part[drop_prompt[mine]] = null.float()  # the null prompt: "" (R)
    move = lambda t: t.to(accelerator.device)  # noqa: E731
    return move(x_0), move(eps), move(sigma[mine]), move(condition), tuple(move(t) for t in text)


def train(transformer, cache, null_text, size, settings, accelerator, out, validate):
    """The loop: draw, noise, predict, compare both frames, step."""
    h, w = size
    ids = dsd.position_ids(h, w).to(accelerator.device)
    columns = dsd.condition_columns(transformer)
    others = [p for p in transformer.parameters() if p.requires_grad and p is not columns]
    optimizer = torch.optim.AdamW([{"params": others, "factor": 1.0},
                                   {"params": [columns], "factor": settings["condition_lr_factor"]}], weight_decay=0.0)
    parameters = [*others, columns]
    ema = EMAModel(parameters, decay=settings["ema"]) if settings["ema"] else None
    first = load_checkpoint(out / "checkpoint.safetensors", parameters, optimizer, ema)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    micros, main = settings["accumulate"], accelerator.is_main_process
    begun, bar = time.time(), tqdm(total=settings["steps"], initial=first, desc="finetune", disable=not main)

    for step in range(first, settings["steps"]):
        losses = torch.zeros(3, device=accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * group["factor"] * learning_rate_share(step, settings["steps"])
        for micro in range(micros):
            x_0, eps, sigma, condition, text = draw(cache, null_text, settings, step, micro, accelerator)
            x_sigma = dsd.interpolate(x_0, eps, sigma)
            v_pred = dsd.run_transformer(model, torch.cat([x_sigma, condition], dim=2), sigma, text, ids,
                                         settings["guidance_scale"])
            loss, *frames = dsd.two_frame_loss(v_pred, dsd.velocity(x_0, eps), h, w, settings["frame_weights"])
            accelerator.backward(loss / micros)
            losses += torch.stack([loss.detach(), *(f.detach() for f in frames)]) / micros
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(parameters)

        losses = accelerator.reduce(losses, "mean").tolist()
        if not all(map(torch.isfinite, torch.tensor(losses))):
            raise dsd.DsdError(f"the loss is not a number at step {step}; the last checkpoint is in {out}; "
                               "lower --learning_rate")
        bar.set_postfix(loss=f"{losses[0]:.3f}", frame_1=f"{losses[1]:.3f}", frame_2=f"{losses[2]:.3f}", refresh=False)
        bar.update()
        last = step + 1 == settings["steps"]
        if main:
            dsd.append_records(out / "log.jsonl", [{"step": step, "loss": losses[0], "frame_1": losses[1],
                                                    "frame_2": losses[2]}])
        if main and ((step + 1) % settings["save_every"] == 0 or last):
            save_checkpoint(out / "checkpoint.safetensors", parameters, optimizer, ema, step + 1)
            draw_losses(out)
        if main and ((step + 1) % settings["validate_every"] == 0 or last):
            if ema and last:
                ema.copy_to(parameters)
            validate(step + 1)
    return (time.time() - begun) / max(settings["steps"] - first, 1)


def learning_rate_share(step, steps, warmup=20):
    """* Linear warm-up, a plateau, linear decay over the last 40 % (the paper's rate is constant)."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.4 * steps))


def save_checkpoint(path, parameters, optimizer, ema, step):
    """Weights, both AdamW moments and averages in one safetensors file, written aside and renamed."""
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
    if not path.exists():
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


def draw_losses(out, window=25):
    """loss.png: both frames' losses, averaged over `window` steps."""
    log = {record["step"]: record for record in dsd.read_records(out / "log.jsonl")}
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("frame_1", "frame 1 (identity)"), ("frame_2", "frame 2 (edit)")):
        values = torch.tensor([record[name] for record in log.values()])
        k = min(window, len(values))
        axes.plot(list(log)[k - 1:], values.unfold(0, k, 1).mean(1), label=label)
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
    add("--frame_weights", type=float, nargs=2, help="weights of the losses of frame 1 and frame 2")
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
        condition_lr_factor=5.0, frame_weights=[1.0, 1.0], condition_dropout=0.1, prompt_dropout=0.1, shift=3.0,
        guidance_scale=3.5, ema=0.0, gradient_checkpointing=False, precision="bf16", save_every=250,
        validate_every=500, seed=0)
    accelerator = Accelerator(mixed_precision=settings["precision"])
    if settings["batch_size"] % accelerator.num_processes:
        raise dsd.DsdError(f"--batch_size must be a multiple of the {accelerator.num_processes} processes")
    pairs = read_pairs(args.pairs)
    cache = args.out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    claim(args.out, {**settings, "model": str(args.model), "pairs": len(pairs)}, accelerator)

    # phase 1: encode, then drop the encoders
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, transformer=None)
    examples = pairs[::max(1, len(pairs) // 6)][:6]
    references, targets = load_canvas(args.pairs, examples)
    text, null_text = (dsd.encode_prompts(pipe, p) for p in ([e["prompt"] for e in examples], [""]))
    if accelerator.is_main_process:
        encode_pairs(pipe, pairs, args.pairs, cache)
    accelerator.wait_for_everyone()
    pipe.text_encoder = pipe.text_encoder_2 = None

    # phase 2: widen, add LoRA, train on tensors
    torch.manual_seed(settings["seed"])
    pipe.transformer = load_transformer(args.model, settings, pipe.vae.dtype).to(accelerator.device)
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    size = references.shape[2] // scale, 2 * references.shape[3] // scale  # the canvas in latent pixels

    def validate(step):
        sampling = {"steps": 20, "image_guidance": 1.0, "text_guidance": 1.0, "unguided_steps": 0,
                    "guidance_scale": settings["guidance_scale"]}
        with accelerator.autocast():
            drawn = dsd.sample(pipe, references, text, tuple(t.expand(len(examples), *t.shape[1:]) for t in null_text),
                               list(range(len(examples))), sampling)
        rows = [[(dsd.open_image(args.pairs / e["reference_file_name"]), "reference"), (image, e["prompt"]),
                 (dsd.open_image(args.pairs / e["target_file_name"]), "the pair's target")]
                for e, image in zip(examples, drawn)]
        (args.out / "validation").mkdir(exist_ok=True)
        dsd.contact_sheet(rows, args.out / "validation" / f"step_{step:06d}.png")

    seconds = train(pipe.transformer, Cache(cache, len(pairs)), null_text, size, settings, accelerator, args.out, validate)
    if accelerator.is_main_process:
        dsd.save_adapter(pipe.transformer, args.out, torch.float16 if dsd.device() == "cpu" else torch.bfloat16)
        memory = dsd.peak_memory()
        dsd.write_json(args.out / "summary.json", {"pairs": len(pairs), "steps": settings["steps"],
                                                   "seconds_per_step": seconds, "peak_memory_gb": memory})
        print(f"adapter in {args.out}: {len(pairs)} pairs, {settings['steps']} steps, {seconds:.2f} s a step, peak memory "
              f"{memory:.1f} GB; look at {args.out / 'validation'} and {args.out / 'loss.png'}")


def claim(out, settings, accelerator):
    """Write settings.json, or refuse a folder that holds a run with other settings."""
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise dsd.DsdError(f"{out} holds a run with other settings or pairs; give another --out or delete it")
    if accelerator.is_main_process:
        dsd.write_json(path, settings)


def load_transformer(model, settings, dtype):
    """The teacher's transformer, widened, with LoRA in float32: at this moment it still is the teacher."""
    transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer", torch_dtype=dtype,
                                                         use_safetensors=True)
    dsd.add_lora(dsd.widen(transformer), settings["rank"])
    cast_training_params(transformer, torch.float32)
    if settings["gradient_checkpointing"]:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


if __name__ == "__main__":
    dsd.run(main)
