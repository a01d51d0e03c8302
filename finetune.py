"""Step 3 (section 3.3): LoRA turns the teacher into a text+image-to-image model on its own pairs.

    python finetune.py                                       # the miniature: minutes on a CPU
    python finetune.py --model black-forest-labs/FLUX.1-dev --gradient_checkpointing  # a CUDA GPU
    accelerate launch finetune.py                            # several GPUs share each batch

The reference (frame 1) and the edit (frame 2) lie side by side on one canvas, twice as wide as a
picture. The model sees the condition [reference | black] beside the noisy canvas and learns to draw
both frames: frame 1 as it is, frame 2 as prompted. --clean_reference is newer, not the paper's way
(OminiControl, UNO, FLUX.1 Kontext): frame 1 is the reference itself, without noise, there is no
condition, and the loss is frame 2's alone. The adapter keeps which way it is, and sampling follows.

Pictures and prompts are encoded once, to --out/cache; then the encoders are dropped and training
reads only tensors.

Writes to --out: `pytorch_lora_weights.safetensors` (a standard FLUX Control LoRA in 16 bits),
`log.jsonl`, `loss.png`, `settings.json`, `validation/*.png` (pairs held out of training) and
`training_state.pt`, with which the same command goes on from its last save. Every --save_every
steps the adapter is saved as well, so that sample.py can use it before the end. A larger --steps
lengthens a finished run (the learning rate then rises again). The name of --pairs, --compile,
--gradient_checkpointing, --save_every and --validate_every may change in between, too.

The defaults in this file are for FLUX.1. A model's folder may bring others in its dsd.json, as the
miniature's does: --help shows those that are in force.
"""

import dsd

import math
import random
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin
from diffusers import FluxControlPipeline
from diffusers.training_utils import cast_training_params
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tqdm import tqdm

FILES = "reference_file_name", "target_file_name"  # of a pair, in its record
TENSORS = "x_0", "condition", "embeds", "pooled"  # of a pair, in the cache
FACTS = "frames", "clean_reference", "width", "height", "prompt_tokens"  # what sampling must know
SCALES = "guidance_scale", "image_guidance", "text_guidance"  # and what more it must know
CHANGEABLE = "pairs", "steps", "compile", "gradient_checkpointing", "save_every", "validate_every"


# ---- the cache: everything is encoded once -----------------------------------------------------
def read_pairs(args):
    """The records of curate.py, without doubles: those to train on, and those held out of training.

    Whole grids are held out, since the pairs of one grid show the same subject."""
    path = args.pairs / "metadata.jsonl"
    if not path.exists():
        raise dsd.DsdError(f"no pairs in {args.pairs}; run curate.py first, or give --pairs")
    unique = {}  # (reference, target, prompt) -> record
    for record in dsd.read_records(path, *FILES, "prompt"):
        record["grid"] = str(record.get("grid", record["reference_file_name"]))  # others name none
        unique[tuple(record[name] for name in (*FILES, "prompt"))] = record
    records = list(unique.values())
    if not records or not all(record["prompt"].strip() for record in records):
        raise dsd.DsdError(f"{path}: no pairs, or a pair with an empty prompt")
    grids = sorted({record["grid"] for record in records})
    chosen = random.Random(args.seed).sample(grids, min(args.validation_grids, len(grids) // 4))
    pairs = [record for record in records if record["grid"] not in chosen]
    held_out = [record for record in records if record["grid"] in chosen]
    return pairs, held_out


def open_pair(args, pair):
    """Reference and target of a pair as images of the training size."""
    images = [dsd.open_image(args.pairs / pair[name]) for name in FILES]
    return [dsd.fit_image(image, args.width, args.height) for image in images]


def cache_file(args, pair):
    """Where a pair's tensors are kept. The name follows from pictures and prompt."""
    pictures = [args.pairs / pair[name] for name in FILES]
    text = str([pair["prompt"], args.width, args.height, args.prompt_tokens])
    return args.out / "cache" / f"{dsd.digest(*pictures, text=text)}.safetensors"


def encode_pairs(pipe, pairs, args):
    """Encode the pairs whose files in the cache are missing; several processes share them.

    With --frames 1 (an ablation) the target is the canvas, and the reference its condition."""
    n = 32 if args.height < 512 else 4  # the VAE would need 22 GB for 32 canvases of FLUX.1's size
    for part in dsd.batches(pairs, n, "encode"):
        if all(pair["cache"].exists() for pair in part):
            continue
        images = [open_pair(args, pair) for pair in part]
        references = dsd.to_pixels([reference for reference, _ in images])  # (n, 3, H, W)
        targets = dsd.to_pixels([target for _, target in images])
        if args.frames == 2:
            drawn, shown = dsd.canvas(references, targets), dsd.canvas(references)
        else:
            drawn, shown = targets, references
        x_0, condition = dsd.encode(pipe.vae, drawn), dsd.encode(pipe.vae, shown)  # (n, N, 64)
        embeds, pooled = dsd.encode_prompts(pipe, [pair["prompt"] for pair in part])
        batch = [t.to("cpu", torch.bfloat16) for t in (x_0, condition, embeds, pooled)]
        for k, pair in enumerate(part):
            with dsd.writing(pair["cache"]) as file:
                save_file({name: t[k].contiguous() for name, t in zip(TENSORS, batch)}, file)


def read_cache(pairs):
    """x_0, condition (B, N, 64), text = [embeds (B, L, D), pooled (B, P)] of pairs, in float32."""
    folder = pairs[0]["cache"].parent
    with dsd.explained(f"{folder}: a file is damaged; delete this folder, it will be made again"):
        rows = [load_file(pair["cache"]) for pair in pairs]
        batch = [torch.stack([row[name] for row in rows]).float() for name in TENSORS]
    return batch[0], batch[1], batch[2:]


# ---- one training step -------------------------------------------------------------------------
def draw_batch(pairs, null_text, args, generator, accelerator):
    """This process's share of a batch: x_0, eps (b, N, 64), sigma (b,), condition, embeds, pooled.

    All chance comes from the step's generator: a resumed run draws what one without a break would
    have drawn. With replacement: there are no epochs."""
    n = args.batch_size
    indices = torch.randint(len(pairs), (n,), generator=generator)
    sigma = dsd.sample_sigmas(n, args.shift, generator)
    # (Our choice) Half of the pairs without reference have no prompt: guidance needs v(0,0) too.
    #   u:  0 ...... half ...... condition_dropout ...... half + prompt_dropout ...... 1
    #       no reference | neither                | no prompt                   | both are shown
    u = torch.rand(n, generator=generator)
    half = args.condition_dropout / 2
    no_reference = u < args.condition_dropout  # (n,)
    no_prompt = (u >= half) & (u < half + args.prompt_dropout)  # (n,)
    noise_seeds = torch.randint(2**31, (n,), generator=generator)

    # every process has drawn the whole batch's numbers; each computes its own share
    mine = slice(accelerator.process_index, n, accelerator.num_processes)
    x_0, condition, text = read_cache([pairs[i] for i in indices[mine]])
    eps = torch.empty_like(x_0)
    for k, seed in enumerate(noise_seeds[mine].tolist()):
        eps[k] = torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(seed))
    condition[no_reference[mine]] = 0  # the null condition: zeros (released code)
    for part, null in zip(text, null_text):
        part[no_prompt[mine]] = null.float().cpu()  # the null prompt: "" (released code)
    return [tensor.to(accelerator.device) for tensor in (x_0, eps, sigma[mine], condition, *text)]


def canvas_size(pipe, args):
    """Height and width of the canvas in latent pixels."""
    factor = pipe.vae_scale_factor
    return args.height // factor, args.frames * args.width // factor


def batch_losses(model, batch, size, args):
    """(3,): the loss of a batch (both frames, weighted), and the losses of frame 1 and frame 2.

    size: of the canvas, see `canvas_size`."""
    x_0, eps, sigma, condition, *text = batch
    x_sigma = dsd.interpolate(x_0, eps, sigma)
    ids = dsd.position_ids(*size).to(x_sigma.device)
    if args.clean_reference:  # the model is told frame 2's sigma, though frame 1 has no noise
        x_sigma, condition = dsd.with_clean_reference(x_sigma, condition, ids)
    tokens = torch.cat([x_sigma, condition], dim=2)  # (b, N, 128)
    v_pred = dsd.run_transformer(model, tokens, sigma, text, ids, args.guidance_scale)
    v = dsd.velocity(x_0, eps)
    if args.clean_reference:  # frame 1 is given, not drawn
        _, v_pred = dsd.split_frames(v_pred, *size)
        _, v = dsd.split_frames(v, *size)
    if args.frames == 1 or args.clean_reference:  # the loss of frame 2 alone
        loss = (v_pred.float() - v).square().mean()
        return torch.stack([loss, 0 * loss, loss])
    return torch.stack(dsd.two_frame_loss(v_pred, v, *size, args.frame_weights))


def learning_rate_share(step, steps, warmup=20):
    """Linear warm-up, a plateau, linear decay over the last 40 % (our choice; the paper's rate is
    constant)."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.4 * steps))


# ---- the run -----------------------------------------------------------------------------------
def load_student(args):
    """The teacher's transformer, widened, with LoRA in float32: it still is exactly the teacher."""
    dtype = torch.float32 if args.precision == "no" else None  # without autocast there is one dtype
    parts = {"vae": None, "text_encoder": None, "text_encoder_2": None, "dtype": dtype}
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, **parts)
    transformer = dsd.add_lora(dsd.widen(pipe.transformer), args.rank)
    cast_training_params(transformer, torch.float32)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks(fullgraph=True)
    return transformer.train()


def make_optimizer(transformer, args):
    """The trainable parameters, and AdamW on them, whose learning rates `train` sets each step."""
    columns = transformer.x_embedder.lora_B["default"].weight  # W_c, see dsd.add_lora
    others = [p for p in transformer.parameters() if p.requires_grad and p is not columns]
    groups = [  # "factor" is ours: `train` multiplies the learning rate by it
        {"params": others, "factor": 1.0},
        {"params": [columns], "factor": args.condition_lr_factor},
    ]
    optimizer_class = torch.optim.AdamW
    if args.quantize != "none":  # moments of 8 bits beside quantised weights
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    return [*others, columns], optimizer_class(groups, weight_decay=0.0)


def save_checkpoint(transformer, parameters, optimizer, log, args):
    """The adapter so far, which sample.py can use, and, last, all that is needed to resume."""
    dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float16  # 16 bits halve the file
    facts = {name: getattr(args, name) for name in (*FACTS, *SCALES)}
    facts["edition"] = dsd.folder_settings(args.model).get("edition")
    dsd.save_adapter(transformer, args.out, facts, dtype)
    dsd.write_json(args.out / "log.jsonl", log)
    weights = [p.detach().cpu() for p in parameters]
    state = {"log": log, "parameters": weights, "optimizer": optimizer.state_dict()}
    with dsd.writing(args.out / "training_state.pt") as part:
        torch.save(state, part)


def resume(parameters, optimizer, args):
    """Restore the last checkpoint. Returns the log of the steps before it, [] if there is none."""
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
    size = canvas_size(pipe, args)
    model, optimizer = accelerator.prepare(
        pipe.transformer, optimizer, device_placement=[False, True]
    )
    main_process = accelerator.is_main_process
    saved = len(log)  # steps in the last checkpoint
    steps = range(saved, args.steps)
    bar = tqdm(steps, "finetune", initial=saved, total=args.steps, disable=not main_process)
    for step in bar:
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 64)
        losses = 0
        for _ in range(args.accumulate):
            batch = draw_batch(pairs, null_text, args, generator, accelerator)
            parts = batch_losses(model, batch, size, args) / args.accumulate
            accelerator.backward(parts[0])
            losses = losses + parts.detach()
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        loss, frame_1, frame_2 = accelerator.reduce(losses, "mean").tolist()
        if not math.isfinite(loss + frame_1 + frame_2 + norm):  # before it reaches the weights
            raise dsd.DsdError(
                f"the loss or its gradient is not finite at step {step}; the last checkpoint is "
                "kept. Try a lower --learning_rate, and another --out"
            )
        rate = args.learning_rate * learning_rate_share(step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss, "frame_1": frame_1, "frame_2": frame_2})
        done = step + 1
        last = done == args.steps
        if main_process and held_out and (last or done % args.validate_every == 0):
            with accelerator.autocast():
                log[-1] |= validate(pipe, held_out, null_text, args, done)
        if main_process and not last and done % args.save_every == 0:
            save_checkpoint(pipe.transformer, parameters, optimizer, log, args)
            saved = done
        shown = f"frame_1={frame_1:.3f}, frame_2={frame_2:.3f}, saved={saved}"
        bar.set_postfix_str(shown, refresh=False)
    if main_process:  # also when a finished run is started again: a lost file is written anew
        save_checkpoint(pipe.transformer, parameters, optimizer, log, args)
    return log


@torch.no_grad()
def validate(pipe, held_out, null_text, args, step):
    """Losses of 24 held-out pairs, {name: loss}, and a sheet of six of them, drawn, and the truth.

    Pairs, noise and noise levels are the same at every step, so that losses can be compared."""
    device, generator = pipe.transformer.device, torch.Generator().manual_seed(0)
    chosen = random.Random(0).sample(held_out, min(24, len(held_out)))
    is_schnell = not pipe.scheduler.config.use_dynamic_shifting
    steps = dsd.folder_settings(args.model, "sample").get("steps", 4 if is_schnell else 20)
    settings = {name: getattr(args, name) for name in ("frames", "clean_reference", *SCALES)}
    losses, rows = 0, []
    for i in range(0, len(chosen), args.batch_size):
        part = chosen[i : i + args.batch_size]
        x_0, condition, text = read_cache(part)
        eps = torch.randn(x_0.shape, generator=generator)
        sigma = dsd.sample_sigmas(len(part), args.shift, generator)
        batch = [tensor.to(device) for tensor in (x_0, eps, sigma, condition, *text)]
        parts = batch_losses(pipe.transformer, batch, canvas_size(pipe, args), args)
        losses = losses + parts * len(part) / len(chosen)
    for seed, pair in enumerate(chosen[:6]):
        reference, target = open_pair(args, pair)
        text = [tensor.to(device) for tensor in read_cache([pair])[2]]
        pixels = dsd.to_pixels([reference])
        image = dsd.sample_edit(pipe, pixels, text, null_text, [seed], steps, **settings)[0]
        row = [(reference, "reference"), (image, pair["prompt"]), (target, "the pair's target")]
        rows.append(row)
    dsd.contact_sheet(rows, args.out / "validation" / f"step_{step:06d}.png")
    return dict(zip(("held_out", "held_out_frame_1", "held_out_frame_2"), losses.tolist()))


def draw_losses(log, path, window=25):
    """loss.png: both frames in training, means over up to `window` steps, and on held-out pairs."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    k = min(window, len(log))
    frames = ("frame_1", "frame 1 (identity)", "C0"), ("frame_2", "frame 2 (edit)", "C1")
    for name, label, colour in frames:
        means = numpy.convolve([r[name] for r in log], [1 / k] * k, "valid")  # moving means
        axes.plot(range(k, len(log) + 1), means, colour, label=label)
        validated = [r for r in log if f"held_out_{name}" in r]
        if validated:
            steps = [r["step"] + 1 for r in validated]
            losses = [r[f"held_out_{name}"] for r in validated]
            axes.plot(steps, losses, colour + "o", label=f"{label}, held out")
    axes.set(xlabel="step", ylabel="flow-matching loss", title=f"mean of {k} steps", ylim=(0, None))
    axes.legend()
    with dsd.writing(path) as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight")


# ---- command line ------------------------------------------------------------------------------
def parse_args():
    parser = dsd.Parser(__doc__, "runs/adapter")
    add, positive, amount = parser.add_argument, dsd.at_least(1), dsd.at_least(0, float)
    whole, shift = dsd.at_least(0), dsd.at_least(1e-9, float)
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add("--pairs", type=Path, default=Path("runs/pairs"), help="what curate.py wrote")
    for side in ("--width", "--height"):
        add(side, type=positive, help="of a frame in pixels (default: the first picture's)")
    add("--steps", type=positive, default=10_000, help="optimiser steps")
    add("--rank", type=positive, default=64, help="rank of the LoRA; the paper's is 512")
    add("--batch_size", type=positive, default=1, help="pairs per step, over all processes")
    add("--accumulate", type=positive, default=1, help="batches per step")
    add("--learning_rate", type=amount, default=1e-4, help="of AdamW, after a warm-up")
    add("--condition_lr_factor", type=amount, default=5.0, help="for the condition columns")
    add("--shift", type=shift, default=3.0, help="of the noise levels; larger means noisier")
    text = "share of pairs without reference, half of them without prompt too; for image guidance"
    add("--condition_dropout", type=amount, default=0.1, help=text)
    text = "share of pairs without prompt, with or without reference; for text guidance"
    add("--prompt_dropout", type=amount, default=0.1, help=text)
    add("--prompt_tokens", type=positive, help="128 hold any caption and save time (default: all)")
    add("--frames", type=int, choices=[1, 2], default=2, help="ablation: 1 is frame 2 alone")
    text = "not the paper's way: frame 1 is the reference, without noise; only frame 2 is learned"
    add("--clean_reference", action="store_true", help=text)
    add("--frame_weights", type=amount, nargs=2, default=[1.0, 1.0], help="of the frames' losses")
    add("--guidance_scale", type=amount, default=3.5, help="distilled, for models that have it")
    add("--image_guidance", type=amount, default=1.0, help="s_i when this adapter is used")
    add("--text_guidance", type=amount, default=1.0, help="s_t when this adapter is used")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--compile", action="store_true", help="takes a minute, then steps are faster")
    add("--precision", choices=["bf16", "no"], help="default: bf16 on a GPU that has it, else no")
    add("--validation_grids", type=whole, default=4, help="grids held out, at most a quarter")
    add("--validate_every", type=positive, default=500, help="steps between validations on these")
    add("--save_every", type=positive, default=250, help="steps between checkpoints")
    add("--seed", type=whole, default=0, help="of data order, noise and LoRA weights")
    return parser.parse("finetune")


def prepare(args, processes):
    """Refuse invalid settings, fill in open ones. Returns the pairs to train on, and held out."""
    pairs, held_out = read_pairs(args)
    first = dsd.open_image(args.pairs / pairs[0]["reference_file_name"])
    args.width = args.width or first.width
    args.height = args.height or first.height
    args.precision = args.precision or ("bf16" if dsd.weight_dtype() == torch.bfloat16 else "no")
    dsd.check_model(args.model, args.width, args.height)
    if args.batch_size % processes:
        raise dsd.DsdError(f"--batch_size must be a multiple of the {processes} processes")
    if args.clean_reference and args.frames == 1:
        raise dsd.DsdError("--clean_reference needs two frames; drop --frames 1")
    if not any(args.frame_weights):
        raise dsd.DsdError("--frame_weights: not both can be 0")
    if max(args.condition_dropout, args.condition_dropout / 2 + args.prompt_dropout) > 1:
        raise dsd.DsdError("--condition_dropout, --prompt_dropout: give shares, such as 0.1")
    if args.compile:
        with dsd.explained("--compile needs a C++ compiler, and on a GPU Triton as well"):
            torch.compile(torch.sin)(torch.ones(1, device=PartialState().device))
    for pair in [*pairs, *held_out]:
        pair["cache"] = cache_file(args, pair)
    return pairs, held_out


def main():
    args = parse_args()
    pairs, held_out = prepare(args, PartialState().num_processes)
    every = [*pairs, *held_out]
    contents = dsd.digest(text=str([pair["cache"].stem for pair in every]))
    lock = dsd.open_out(args, "finetune", CHANGEABLE, pairs_sha256=contents)
    accelerator = Accelerator(
        mixed_precision=args.precision,
        cpu=args.device == "cpu",
        gradient_accumulation_plugin=GradientAccumulationPlugin(1),  # not the environment's number
    )

    # phase 1: encode, then drop the encoders
    parts = {"prompt_tokens": args.prompt_tokens, "transformer": None}
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, **parts)
    dsd.warn_of_prompts(pipe, [pair["prompt"] for pair in pairs])
    encode_pairs(pipe, every, args)
    null_text = dsd.encode_prompts(pipe, [""])
    pipe.text_encoder = pipe.text_encoder_2 = None

    # phase 2: widen, add LoRA, train on tensors
    torch.manual_seed(args.seed)
    pipe.transformer = load_student(args)
    log = train(pipe, pairs, held_out, null_text, args, accelerator)
    if accelerator.is_main_process:
        draw_losses(log, args.out / "loss.png")
        print(
            f"adapter in {args.out}: {len(pairs)} pairs, {len(held_out)} more held out, {len(log)} "
            f"steps; look at {args.out}/loss.png and what is in {args.out}/validation"
        )
    lock.release()
    accelerator.end_training()


if __name__ == "__main__":
    dsd.run_main(main)
