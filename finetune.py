"""Step 3 (paper section 3.3): LoRA turns the teacher into a text+image-to-image model on its own curated pairs.

    python finetune.py                                       # the miniature: minutes on two CPU cores
    python finetune.py --model black-forest-labs/FLUX.1-dev  # one CUDA GPU
    accelerate launch finetune.py                            # several GPUs share each batch

The reference (frame 1) and the edit (frame 2) lie side by side on one canvas, twice as wide as a picture. The model
sees the condition [reference | black] beside the noisy canvas and learns to draw both frames: frame 1 as it is, frame 2
as prompted.

Pictures and prompts are encoded once, to --out/cache; then the encoders are dropped and training reads only tensors.

Writes to --out: `pytorch_lora_weights.safetensors` (a standard FLUX Control LoRA in 16 bits), `log.jsonl`, `loss.png`,
`settings.json`, `validation/*.png` (pairs held out of training) and `training_state.pt`, with which the same command
goes on from its last save. Every --save_every steps the adapter is saved as well, so that sample.py can use it before
the end. A larger --steps lengthens a finished run (the learning rate then rises again). The name of --pairs, --compile,
--gradient_checkpointing, --save_every and --validate_every may change in between, too.

The defaults in this file are for FLUX.1. A model's folder may bring others in its dsd.json, as the miniature's does:
--help shows those that are in force. In comments, "R" marks what we took from the authors' released code because the
paper is silent, and "*" our own choices.
"""

import dsd

import math
import random
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator, PartialState
from diffusers import FluxControlPipeline
from diffusers.training_utils import cast_training_params
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tqdm import tqdm

FILES = "reference_file_name", "target_file_name"  # of a pair, in its record


# ---- the cache: everything is encoded once ---------------------------------------------------------------------------
def read_pairs(args):
    """The records of curate.py (reference and target file, the target's prompt): those to train on, those held out.

    Whole grids are held out, since the pairs of one grid show the same subject."""
    path = args.pairs / "metadata.jsonl"
    if not path.exists():
        raise dsd.DsdError(f"no pairs in {args.pairs}; run curate.py first, or give --pairs")
    names = *FILES, "prompt"
    records = list(
        {tuple(r[name] for name in names): r for r in dsd.read_records(path, *names)}.values()
    )
    if not records or not all(r["prompt"].strip() for r in records):
        raise dsd.DsdError(f"{path}: no pairs, or a pair with an empty prompt")
    grid_of = [str(r.get("grid", r["reference_file_name"])) for r in records]
    grids = sorted(set(grid_of))
    held_out = random.Random(args.seed).sample(grids, min(args.validation_grids, len(grids) // 4))
    return (
        [r for r, grid in zip(records, grid_of) if grid not in held_out],
        [r for r, grid in zip(records, grid_of) if grid in held_out],
    )


def open_pair(args, pair):
    """Reference and target of a pair as images of the training size."""
    return [
        dsd.fit_image(dsd.open_image(args.pairs / pair[name]), args.width, args.height)
        for name in FILES
    ]


def cache_file(args, pair):
    """Where a pair's tensors are kept. The name follows from the contents: another picture has another file."""
    name = dsd.digest(
        *[args.pairs / pair[name] for name in FILES],
        text=str([pair["prompt"], args.width, args.height, args.prompt_tokens]),
    )
    return args.out / "cache" / f"{name}.safetensors"


def encode_pairs(pipe, pairs, args):
    """Encode the pairs whose files in the cache are missing, a few at a time; several processes share them.

    With --frames 1 (an ablation) the target is the whole canvas, and the reference its condition."""
    n = 32 if args.height < 512 else 4  # the VAE would need 22 GB for 32 canvases of FLUX.1's size
    for part in dsd.batches(pairs, n, "encode"):
        if all(pair["cache"].exists() for pair in part):
            continue
        reference, target = map(
            dsd.to_pixels, zip(*[open_pair(args, pair) for pair in part])
        )  # (n, 3, H, W)
        two = args.frames == 2
        x_0 = dsd.encode(
            pipe.vae, dsd.canvas(reference, target) if two else target
        )  # (n, N, 64), both frames
        condition = dsd.encode(
            pipe.vae, dsd.canvas(reference) if two else reference
        )  # right frame black
        tensors = x_0, condition, *dsd.encode_prompts(pipe, [pair["prompt"] for pair in part])
        for pair, *row in zip(part, *(tensor.to("cpu", torch.bfloat16) for tensor in tensors)):
            with dsd.writing(pair["cache"]) as file:
                save_file(
                    dict(
                        zip(("x_0", "condition", "embeds", "pooled"), (t.contiguous() for t in row))
                    ),
                    file,
                )


def read_cache(pairs):
    """x_0 and condition (B, N, 64) and text = (embeds (B, L, D), pooled (B, P)) of some pairs, in float32."""
    with dsd.explained(
        f"{pairs[0]['cache'].parent}: a file is damaged; delete this folder, it will be made again"
    ):
        rows = [load_file(pair["cache"]) for pair in pairs]
    x_0, condition, *text = (
        torch.stack([row[name] for row in rows]).float()
        for name in ("x_0", "condition", "embeds", "pooled")
    )
    return x_0, condition, text


# ---- one training step -----------------------------------------------------------------------------------------------
def draw_batch(pairs, null_text, args, generator, accelerator):
    """This process's share of a batch: x_0, eps (b, N, 64), sigma (b,), condition (b, N, 64), embeds, pooled.

    All chance comes from the step's generator, so a resumed run draws what an uninterrupted one would have drawn."""
    n = args.batch_size
    indices = torch.randint(
        len(pairs), (n,), generator=generator
    )  # with replacement: there are no epochs
    sigma = dsd.sample_sigmas(n, args.shift, generator)
    # One u decides what is left out: below `start` the reference, from there to condition_dropout both, from there to
    # start + prompt_dropout the prompt, above that nothing. * Guidance (dsd.guided_velocity) needs v(0,0), which has
    # neither, and v(I,0), which has no prompt.
    u, start = torch.rand(n, generator=generator), args.condition_dropout / 2
    drop_condition = u < args.condition_dropout  # (b,)
    drop_prompt = (start <= u) & (u < start + args.prompt_dropout)  # (b,)
    noise_seeds = torch.randint(2**31, (n,), generator=generator)
    mine = slice(accelerator.process_index, n, accelerator.num_processes)
    x_0, condition, text = read_cache([pairs[i] for i in indices[mine]])
    eps = torch.stack(
        [
            torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(int(seed)))
            for seed in noise_seeds[mine]
        ]
    )
    condition[drop_condition[mine]] = 0  # the null condition: zero latents (R)
    for part, null in zip(text, null_text):
        part[drop_prompt[mine]] = null.float().cpu()  # the null prompt: "" (R)
    return [tensor.to(accelerator.device) for tensor in (x_0, eps, sigma[mine], condition, *text)]


def canvas_size(pipe, args):
    """Height and width of the canvas in latent pixels."""
    factor = pipe.vae_scale_factor
    return args.height // factor, args.frames * args.width // factor


def batch_losses(model, batch, size, args):
    """(3,): the loss of a batch (the weighted mean of both frames), and the losses of frame 1 and of frame 2.

    size: of the canvas, see `canvas_size`."""
    x_0, eps, sigma, condition, *text = batch
    h, w = size
    tokens = torch.cat([dsd.interpolate(x_0, eps, sigma), condition], dim=2)  # (b, N, 128)
    ids = dsd.position_ids(h, w).to(tokens.device)
    v_pred = dsd.run_transformer(model, tokens, sigma, text, ids, args.guidance_scale)
    if args.frames == 1:  # an ablation: there is frame 2 alone
        loss = (v_pred.float() - dsd.velocity(x_0, eps)).square().mean()
        return torch.stack([loss, 0 * loss, loss])
    return torch.stack(dsd.two_frame_loss(v_pred, dsd.velocity(x_0, eps), h, w, args.frame_weights))


def learning_rate_share(step, steps, warmup=20):
    """* Linear warm-up, a plateau, linear decay over the last 40 % (the paper's rate is constant)."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.4 * steps))


# ---- the run ---------------------------------------------------------------------------------------------------------
def load_student(args):
    """The teacher's transformer, widened, with LoRA in float32: at this moment it is still exactly the teacher."""
    dtype = (
        torch.float32 if args.precision == "no" else None
    )  # without autocast base and LoRA share one dtype
    others = dict.fromkeys(["vae", "text_encoder", "text_encoder_2"])
    transformer = dsd.load_pipeline(
        FluxControlPipeline, args.model, args.quantize, dtype=dtype, **others
    ).transformer
    dsd.add_lora(dsd.widen(transformer), args.rank)
    cast_training_params(transformer, torch.float32)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks(fullgraph=True)
    return transformer.train()


def make_optimizer(transformer, args):
    """The trainable parameters, and AdamW on them, whose learning rates `train` sets in every step."""
    columns = transformer.x_embedder.lora_B[
        "default"
    ].weight  # W_c, see dsd.add_lora: it starts at zero
    others = [p for p in transformer.parameters() if p.requires_grad and p is not columns]
    adamw = torch.optim.AdamW
    if args.quantize != "none":
        from bitsandbytes.optim import (
            AdamW8bit as adamw,
        )  # moments of 8 bits beside quantised weights
    return [*others, columns], adamw(
        [
            {"params": others, "factor": args.lora_lr_factor},
            {"params": [columns], "factor": args.condition_lr_factor},
        ],
        weight_decay=0.0,
    )


def save_checkpoint(transformer, parameters, optimizer, log, args):
    """The adapter so far, which sample.py can use, and, written last, everything that is needed to resume."""
    dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float16  # 16 bits halve the file
    dsd.save_adapter(
        transformer,
        args.out,
        {
            name: getattr(args, name)
            for name in (
                "frames",
                "width",
                "height",
                "prompt_tokens",
                "guidance_scale",
                "image_guidance",
                "text_guidance",
            )
        },
        dtype,
    )
    dsd.write_json(args.out / "log.jsonl", log)
    with dsd.writing(args.out / "training_state.pt") as part:
        torch.save(
            {
                "log": log,
                "parameters": [p.detach().cpu() for p in parameters],
                "optimizer": optimizer.state_dict(),
            },
            part,
        )


def resume(parameters, optimizer, args):
    """Restore the last checkpoint; returns the log of the steps before it, [] if there is none."""
    file = args.out / "training_state.pt"
    if not file.exists():
        return []
    with dsd.explained(f"{file}: not a checkpoint of this run; delete it to train from the start"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        for p, saved in zip(parameters, state["parameters"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return state["log"]


def train(pipe, pairs, held_out, null_text, args, accelerator):
    """The loop: draw a batch, add noise, predict, compare both frames, step. Returns the log."""
    parameters, optimizer = make_optimizer(pipe.transformer, args)
    log = resume(parameters, optimizer, args)
    model, optimizer = accelerator.prepare(
        pipe.transformer, optimizer, device_placement=[False, True]
    )
    first, main_process, size = len(log), accelerator.is_main_process, canvas_size(pipe, args)

    bar = tqdm(
        range(first, args.steps),
        initial=first,
        total=args.steps,
        desc="finetune",
        disable=not main_process,
    )
    for step in bar:
        generator = torch.Generator().manual_seed(
            (args.seed * 1_000_003 + step) * 64
        )  # each step has its own
        losses = 0
        for _ in range(args.accumulate):
            batch = draw_batch(pairs, null_text, args, generator, accelerator)
            parts = (
                batch_losses(model, batch, size, args) / args.accumulate
            )  # both, frame 1, frame 2
            accelerator.backward(parts[0])
            losses = losses + parts.detach()
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        losses = accelerator.reduce(losses, "mean").tolist()
        if not math.isfinite(sum(losses) + norm):  # before it reaches the weights
            raise dsd.DsdError(
                f"the loss or its gradient is not finite at step {step}; the last checkpoint is kept. "
                "Try a lower --learning_rate, and another --out"
            )
        for group in optimizer.param_groups:
            group["lr"] = (
                args.learning_rate * group["factor"] * learning_rate_share(step, args.steps)
            )
        optimizer.step()
        optimizer.zero_grad()
        log.append(dict(zip(("step", "loss", "frame_1", "frame_2"), (step, *losses))))
        bar.set_postfix(
            {name: f"{log[-1][name]:.3f}" for name in ("frame_1", "frame_2")}, refresh=False
        )
        if (
            main_process
            and held_out
            and (step + 1 == args.steps or (step + 1) % args.validate_every == 0)
        ):
            with accelerator.autocast():
                log[-1] |= validate(pipe, held_out, null_text, args, step + 1)
        if main_process and (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save_checkpoint(pipe.transformer, parameters, optimizer, log, args)
    if main_process:  # also when a finished run is started again: a lost file is written anew
        save_checkpoint(pipe.transformer, parameters, optimizer, log, args)
    return log


@torch.no_grad()
def validate(pipe, held_out, null_text, args, step):
    """Losses of both frames over 24 held-out pairs, {name: loss}, and a sheet of six of them, drawn, beside the truth.

    Pairs, noise and noise levels are the same at every step, so that the losses can be compared."""
    chosen, generator = (
        random.Random(0).sample(held_out, min(24, len(held_out))),
        torch.Generator().manual_seed(0),
    )
    losses, rows, device = 0, [], pipe.transformer.device
    for i in range(0, len(chosen), args.batch_size):
        part = chosen[i : i + args.batch_size]
        x_0, condition, text = read_cache(part)
        eps, sigma = (
            torch.randn(x_0.shape, generator=generator),
            dsd.sample_sigmas(len(part), args.shift, generator),
        )
        batch = [tensor.to(device) for tensor in (x_0, eps, sigma, condition, *text)]
        parts = batch_losses(pipe.transformer, batch, canvas_size(pipe, args), args)
        losses = losses + parts * len(part) / len(chosen)
    for seed, pair in enumerate(chosen[:6]):
        reference, target = open_pair(args, pair)
        text = [tensor.to(device) for tensor in read_cache([pair])[2]]
        (image,) = dsd.sample_edit(
            pipe,
            dsd.to_pixels([reference]),
            text,
            null_text,
            [seed],
            20,
            args.image_guidance,
            args.text_guidance,
            args.guidance_scale,
            frames=args.frames,
        )
        rows.append(
            [(reference, "reference"), (image, pair["prompt"]), (target, "the pair's target")]
        )
    dsd.contact_sheet(rows, args.out / "validation" / f"step_{step:06d}.png")
    return dict(zip(("held_out", "held_out_frame_1", "held_out_frame_2"), losses.tolist()))


def draw_losses(log, path, window=25):
    """loss.png: the losses of both frames in training, averaged over up to `window` steps, and on held-out pairs."""
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    k = min(window, len(log))
    for colour, (name, label) in zip(
        ("C0", "C1"), (("frame_1", "frame 1 (identity)"), ("frame_2", "frame 2 (edit)"))
    ):
        means = numpy.convolve([r[name] for r in log], [1 / k] * k, "valid")
        axes.plot(range(k, len(log) + 1), means, colour, label=label)
        held_out = [(r["step"] + 1, r[f"held_out_{name}"]) for r in log if f"held_out_{name}" in r]
        if held_out:
            axes.plot(*zip(*held_out), colour + "o", label=f"{label}, held out")
    axes.set(xlabel="step", ylabel="flow-matching loss", title=f"mean of {k} steps", ylim=(0, None))
    axes.legend()
    with dsd.writing(path) as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight")


def parse_args():
    parser = dsd.Parser(__doc__, "runs/adapter")
    add, positive, amount = parser.add_argument, dsd.at_least(1), dsd.at_least(0, float)
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add("--pairs", type=Path, default=Path("runs/pairs"), help="what curate.py wrote")
    add("--width", type=positive, help="width of a frame in pixels (default: the first picture's)")
    add(
        "--height", type=positive, help="height of a frame in pixels (default: the first picture's)"
    )
    add("--steps", type=positive, default=10_000, help="optimiser steps")
    add("--rank", type=positive, default=64, help="rank of the LoRA; the paper's is 512")
    add("--batch_size", type=positive, default=1, help="pairs per step, over all processes")
    add(
        "--accumulate",
        type=positive,
        default=1,
        help="backward passes per step; multiplies the batch size",
    )
    add(
        "--learning_rate", type=amount, default=1e-4, help="learning rate of AdamW, after a warm-up"
    )
    add(
        "--condition_lr_factor",
        type=amount,
        default=5.0,
        help="the condition columns learn faster by this factor",
    )
    add(
        "--lora_lr_factor",
        type=amount,
        default=1.0,
        help="ablation: 0 trains the condition columns alone",
    )
    add(
        "--shift",
        type=dsd.at_least(1e-9, float),
        default=3.0,
        help="shift of the noise levels; larger means noisier",
    )
    add(
        "--condition_dropout",
        type=amount,
        default=0.1,
        help="share of the pairs that are trained without their "
        "reference; up to half of them lose their prompt too. Image guidance needs this",
    )
    add(
        "--prompt_dropout",
        type=amount,
        default=0.1,
        help="share of the pairs that are trained without their prompt, "
        "with or without their reference. Text guidance needs this",
    )
    add(
        "--prompt_tokens",
        type=positive,
        help="T5 tokens of a prompt; 128 hold any caption and save time and disk "
        "(default: what the model's folder says, else the model's own limit)",
    )
    add("--frames", type=int, choices=[1, 2], default=2, help="ablation: 1 trains on frame 2 alone")
    add(
        "--frame_weights",
        type=amount,
        nargs=2,
        default=[1.0, 1.0],
        help="weights of the losses of frame 1 (identity) and frame 2 (edit)",
    )
    add(
        "--guidance_scale",
        type=amount,
        default=3.5,
        help="distilled guidance, for models that have it",
    )
    add(
        "--image_guidance",
        type=amount,
        default=1.0,
        help="default s_i when sampling with this adapter",
    )
    add(
        "--text_guidance",
        type=amount,
        default=1.0,
        help="default s_t when sampling with this adapter",
    )
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add(
        "--compile",
        action="store_true",
        help="compile the blocks: it takes a minute, then steps are faster",
    )
    add(
        "--precision",
        choices=["bf16", "no"],
        help="bf16: mixed precision; no: all in float32 (default: bf16 on a "
        "GPU that has it natively, else no)",
    )
    add(
        "--validation_grids",
        type=dsd.at_least(0),
        default=4,
        help="grids held out of training, at most a quarter",
    )
    add(
        "--validate_every",
        type=positive,
        default=500,
        help="steps between validations on these grids",
    )
    add("--save_every", type=positive, default=250, help="steps between checkpoints")
    add(
        "--seed",
        type=dsd.at_least(0),
        default=0,
        help="random seed of data order, noise and LoRA weights",
    )
    parser.add_large_model_options(offload=False)
    return parser.parse("finetune")


def prepare(args, processes):
    """Reject invalid settings and fill in open ones; return the pairs to train on and those held out."""
    pairs, held_out = read_pairs(args)
    size = dsd.open_image(args.pairs / pairs[0]["reference_file_name"]).size
    args.width, args.height = args.width or size[0], args.height or size[1]
    dsd.check_model(args.model, args.width, args.height)
    for wrong, words in (
        (
            args.batch_size % processes,
            f"--batch_size must be a multiple of the {processes} processes",
        ),
        (not any(args.frame_weights), "--frame_weights: not both can be 0"),
        (
            max(args.condition_dropout, args.condition_dropout / 2 + args.prompt_dropout) > 1,
            "--condition_dropout and --prompt_dropout are shares of the pairs, such as 0.1",
        ),
    ):
        if wrong:
            raise dsd.DsdError(words)
    args.precision = args.precision or ("bf16" if dsd.weight_dtype() == torch.bfloat16 else "no")
    for pair in [*pairs, *held_out]:
        pair["cache"] = cache_file(args, pair)
    return pairs, held_out


def main():
    args = parse_args()
    state = PartialState()
    pairs, held_out = prepare(args, state.num_processes)
    lock = dsd.open_out(
        args,
        "finetune",
        changeable=[
            "pairs",
            "steps",
            "compile",
            "gradient_checkpointing",
            "save_every",
            "validate_every",
        ],
        pairs_sha256=dsd.digest(text=str([pair["cache"].stem for pair in [*pairs, *held_out]])),
    )
    accelerator = Accelerator(mixed_precision=args.precision, cpu=state.device.type == "cpu")

    # phase 1: encode, then drop the encoders
    pipe = dsd.load_pipeline(
        FluxControlPipeline,
        args.model,
        args.quantize,
        prompt_tokens=args.prompt_tokens,
        transformer=None,
    )
    dsd.warn_of_prompts(pipe, [pair["prompt"] for pair in pairs])
    encode_pairs(pipe, [*pairs, *held_out], args)
    null_text = dsd.encode_prompts(pipe, [""])
    pipe.text_encoder = pipe.text_encoder_2 = None

    # phase 2: widen, add LoRA, train on tensors
    torch.manual_seed(args.seed)
    pipe.transformer = load_student(args)
    log = train(pipe, pairs, held_out, null_text, args, accelerator)
    if accelerator.is_main_process:
        draw_losses(log, args.out / "loss.png")
        folder = args.out / "validation"
        print(
            f"adapter in {args.out}: {len(pairs)} pairs, {len(held_out)} more held out, {len(log)} steps, "
            f"{dsd.memory_in_use()}; look at {f'{folder} and ' if held_out else ''}{args.out / 'loss.png'}"
        )
    lock.release()
    accelerator.end_training()


if __name__ == "__main__":
    dsd.run_main(main)
