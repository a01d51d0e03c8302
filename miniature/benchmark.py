"""How fast the four steps are, beside what, and how far from the machine's limit.

    OMP_NUM_THREADS=2 python -m miniature.benchmark                  # the miniature: minutes on two CPU cores
    OMP_NUM_THREADS=2 python -m miniature.benchmark --compile        # training with compiled blocks
    python -m tests.random_models runs/FLUX.1-dev       # FLUX.1-dev's size, random weights; the rest on a CUDA GPU
    python -m miniature.benchmark --model runs/FLUX.1-dev --gradient_checkpointing
    python -m miniature.benchmark --model runs/FLUX.1-dev --quantize nf4 --rank 16 --gradient_checkpointing

Each row compares our code with a peer, timed in turn in one process; the fastest of --repeat runs counts. The peer is
the stock pipeline for grids and for one-pass sampling; for guided sampling three passes one after another, as in the
released code; for training a step that encodes its pictures and prompts in the loop, as diffusers' example trainers do.
The limit is the arithmetic in the row (matrix products, convolutions, attention; recomputed activations too) at the
measured rate of a large matrix product in the same number format. Speed and memory do not depend on what the weights
are, so random ones of the right size will do.

Training is timed in the number format that finetune.py takes on this machine; --bfloat16 adds the other on a CPU.
Prints a table and writes it as JSON to --out.
"""

import dsd

import platform
import sys
import tempfile
import time
import unittest.mock
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from diffusers import FluxControlPipeline, FluxPipeline
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import curate
import finetune
import generate_grids
import sample

PROMPT = "a round horned critter in space at noon with a hat"
NAMES = {"bf16": "bfloat16", "no": "float32"}


# ---- measuring -------------------------------------------------------------------------------------------------------
def seconds(work):
    """How long `work` takes, with all that it started on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def product_rate(dtype, side):
    """Operations a second of a large square matrix product, the best of five."""
    a, b = torch.randn(2, side, side, device=PartialState().device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(5))


def arithmetic(work):
    """Operations in `work`. On a CPU with plain attention, since what the fused one does is not counted there."""
    plain = sdpa_kernel(SDPBackend.MATH) if PartialState().device.type == "cpu" else nullcontext()
    with FlopCounterMode(display=False) as counter, plain:
        work()
    return counter.get_total_flops()


def memory_in_use():
    """On a GPU the most memory that this process has used so far, on a CPU what it uses now."""
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_allocated()
    else:
        used = psutil.Process().memory_info().rss
    return f"{used / 1e9:.1f} GB in use"


def row(name, ours, peer, count, rate, repeat, operations=None):
    """A row of the table for one unit of work; `ours` and `peer` (None if there is none) do `count` units."""
    operations = operations or arithmetic(ours)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ours()
    memory, works = memory_in_use(), [ours, peer] if peer else [ours]
    works[-1]()  # both are warm now
    taken = [
        min(times) / count
        for times in zip(*[[seconds(work) for work in works] for _ in range(repeat)])
    ]
    print(f"{name}: {taken[0]:.4g} s", file=sys.stderr, flush=True)
    return {
        "step": name,
        "seconds": taken[0],
        "peer_seconds": taken[1] if peer else None,
        "limit_seconds": operations / count / rate,
        "operations": operations / count,
        "memory": memory,
    }


# ---- the steps -------------------------------------------------------------------------------------------------------
def options(args, script, *more):
    """The options of a script for this model, as its own command line gives them."""
    names = {
        generate_grids: ["steps", "panel", "quantize", "offload"],
        finetune: ["rank", "batch_size", "quantize"],
        sample: ["steps", "quantize", "offload"],
    }[script]
    given = [
        part for name in names if (value := getattr(args, name)) for part in (f"--{name}", value)
    ]
    with unittest.mock.patch(
        "sys.argv", [str(part) for part in ("benchmark", "--model", args.model, *given, *more)]
    ):
        return script.parse_args()


def noise(side, seed):
    raw = torch.randint(
        256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(raw.numpy())


def grids_row(args, rate):
    chosen = options(args, generate_grids)
    pipe = dsd.load_pipeline(FluxPipeline, args.model, args.quantize, args.offload)
    prompt = f"a grid of 4 images representing the same critter: {PROMPT}"
    grid = {"prompt": prompt, "rows": 2, "columns": 2}
    grids = [{**grid, "seed": seed} for seed in range(args.batch)]

    def stock():
        pipe(
            [grid["prompt"] for grid in grids],
            negative_prompt=[""] * len(grids),
            width=2 * chosen.width,
            height=2 * chosen.height,
            num_inference_steps=chosen.steps,
            guidance_scale=chosen.guidance_scale,
            true_cfg_scale=chosen.true_cfg_scale,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            generator=torch.Generator().manual_seed(0),
        )

    return row(
        "a grid",
        lambda: generate_grids.draw_grids(pipe, grids, chosen),
        stock,
        len(grids),
        rate,
        args.repeat,
    )


def curation_row(args, rate):
    model = curate.load_vlm(args.vlm, args.quantize)
    cases = [[noise(args.panel, 2 * i + k) for k in (0, 1)] for i in range(8 * args.batch)]
    return row(
        "a pair curated",
        lambda: curate.ask(*model, cases, curate.PAIR_QUESTION, len(cases), 400),
        None,
        len(cases),
        rate,
        args.repeat,
    )


def three_passes(model, x, condition, text, null_text, s_i, s_t):
    """Guidance as the released code does it: three passes, one after another."""
    nothing = torch.zeros_like(condition)
    v_00, v_i0, v_it = (
        model(x, nothing, null_text),
        model(x, condition, null_text),
        model(x, condition, text),
    )
    return v_00 + s_i * (v_i0 - v_00) + s_t * (v_it - v_i0)


def sampling_rows(args, rate, work):
    """One pass a step, and all three guided passes."""
    dsd.save_adapter(finetune.load_student(options(args, finetune, "--precision", "no")), work, {})
    chosen = options(
        args,
        sample,
        "--adapter",
        work,
        "--prompt",
        PROMPT,
        "--unguided_steps",
        0,
        "--width",
        args.panel,
        "--height",
        args.panel,
    )
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, args.offload, work)
    images, n = [noise(args.panel, i) for i in range(args.batch)], args.batch
    canvases = [Image.new("RGB", (2 * args.panel, args.panel)) for _ in images]
    for canvas, image in zip(canvases, images):
        canvas.paste(image)

    def ours(s_i, s_t):
        chosen.image_guidance, chosen.text_guidance = s_i, s_t
        sample.draw_pictures(pipe, images, [PROMPT] * n, list(range(n)), chosen)

    def stock():
        pipe(
            [PROMPT] * n,
            control_image=canvases,
            height=args.panel,
            width=2 * args.panel,
            num_inference_steps=chosen.steps,
            guidance_scale=chosen.guidance_scale,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            generator=[torch.Generator().manual_seed(i) for i in range(n)],
        )

    def one_by_one():
        with unittest.mock.patch("dsd.guided_velocity", three_passes):
            ours(1.5, 2.0)

    return [
        row("an image, one pass", lambda: ours(1.0, 1.0), stock, n, rate, args.repeat),
        row("an image, guided", lambda: ours(1.5, 2.0), one_by_one, n, rate, args.repeat),
    ]


def training_row(args, precision, rate, work):
    """A step on cached tensors; the peer encodes two canvases and a prompt a sample in each step, at the same batch."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the row before
    chosen = options(
        args,
        finetune,
        "--precision",
        precision,
        "--pairs",
        work / "pairs",
        "--out",
        work / "adapter",
        "--validation_grids",
        0,
        *["--gradient_checkpointing"] * args.gradient_checkpointing,
    )
    make_pairs(chosen.pairs, args.panel, chosen.batch_size)
    pairs, _ = finetune.prepare(chosen, 1)
    accelerator = Accelerator(mixed_precision=precision, cpu=chosen.device == "cpu")
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, transformer=None)
    finetune.encode_pairs(pipe, pairs, chosen)
    null_text = dsd.encode_prompts(pipe, [""])
    size = finetune.canvas_size(pipe, chosen)
    pipe, encoders = None, []  # dropped, as in finetune.py; the peer loads its own

    def stepper(compiled):
        """A whole optimiser step, as finetune.train takes it, on the tensors that a function gives."""
        chosen.compile = compiled
        parameters, optimizer = finetune.make_optimizer(
            student := finetune.load_student(chosen), chosen
        )
        model, optimizer = accelerator.prepare(student, optimizer, device_placement=[False, True])

        def step(batch):
            accelerator.backward(finetune.batch_losses(model, batch(), size, chosen)[0])
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def cached():
        return finetune.draw_batch(
            pairs, null_text, chosen, torch.Generator().manual_seed(0), accelerator
        )

    def encoded():
        if not encoders:
            encoders.append(
                dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, transformer=None)
            )
        reference, target = map(
            dsd.to_pixels, zip(*[finetune.open_pair(chosen, pair) for pair in pairs])
        )
        x_0 = dsd.encode(encoders[0].vae, dsd.canvas(reference, target))
        condition = dsd.encode(encoders[0].vae, dsd.canvas(reference))
        text = dsd.encode_prompts(encoders[0], [pair["prompt"] for pair in pairs])
        sigma = dsd.sample_sigmas(len(pairs), chosen.shift, None).to(x_0.device)
        return [x_0, torch.randn_like(x_0), sigma, condition, *text]

    plain = stepper(False)
    operations = arithmetic(lambda: plain(cached))
    ours = stepper(True) if args.compile else plain  # at FLUX.1's size there is no room for two
    return row(
        f"a training sample, {NAMES[precision]}",
        lambda: ours(cached),
        lambda: plain(encoded),
        len(pairs),
        rate,
        5 * args.repeat,
        operations,
    )


def make_pairs(folder, side, count):
    """Pairs of noise, as curate.py writes them."""
    for i in range(2 * count):
        dsd.save_image(noise(side, i), folder / "images" / f"{i}.png")
    dsd.write_json(
        folder / "metadata.jsonl",
        [
            {
                "reference_file_name": f"images/{2 * i}.png",
                "target_file_name": f"images/{2 * i + 1}.png",
                "prompt": f"{PROMPT}, number {i}",
            }
            for i in range(count)
        ],
    )


# ---- command line ----------------------------------------------------------------------------------------------------
def table(result):
    """The result as a Markdown table."""
    lines = [
        "| for | seconds | peer's | faster by | limit | share of the limit | memory |",
        "|---" * 7 + "|",
    ]
    for r in result["rows"]:
        peer, ratio = (
            ("", "")
            if r["peer_seconds"] is None
            else (f"{r['peer_seconds']:.4g}", f"{r['peer_seconds'] / r['seconds']:.2f}x")
        )
        lines.append(
            f"| {r['step']} | {r['seconds']:.4g} | {peer} | {ratio} | {r['limit_seconds']:.4g} | "
            f"{r['limit_seconds'] / r['seconds']:.0%} | {r['memory']} |"
        )
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in result["rates"].items())
    return "\n".join([*lines, "", f"{result['machine']}; matrix products, GFLOP/s: {rates}."])


def parse_args():
    parser = dsd.Parser(__doc__, "runs/benchmark")
    add, steps = parser.add_argument, ["grids", "curation", "training", "sampling"]
    add("--model", default=dsd.MINIATURE / "flux", help="a FLUX folder; its size is what counts")
    add("--vlm", help="for the row of curation (default: the miniature's; with another model none)")
    add("--steps", type=dsd.at_least(1), help="of the sampler (default: the model's own)")
    add("--panel", type=dsd.at_least(1), help="side of a panel (default: the model's own)")
    add("--batch", type=dsd.at_least(1), default=8, help="grids and pictures drawn together")
    add("--rank", type=dsd.at_least(1), help="of the LoRA (default: the model's own)")
    add(
        "--batch_size",
        type=dsd.at_least(1),
        help="samples in a training step (default: the model's own)",
    )
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--compile", action="store_true", help="compile the transformer's blocks for training")
    add("--bfloat16", action="store_true", help="on a CPU, time the training in bfloat16 as well")
    add("--rows", nargs="+", choices=steps, default=steps, help="what to measure")
    add("--repeat", type=dsd.at_least(1), default=2, help="runs, of which the fastest counts")
    add(
        "--product",
        type=dsd.at_least(1),
        default=2048,
        help="side of the matrices whose product is the limit",
    )
    parser.add_large_model_options()
    return parser.parse("benchmark")


def main():
    args = parse_args()
    gpu = PartialState().device.type == "cuda"
    if Path(args.model) == dsd.MINIATURE / "flux":
        args.vlm = args.vlm or dsd.MINIATURE / "vlm"
    args.panel = args.panel or options(args, generate_grids).panel
    dsd.check_model(args.model, args.panel)
    torch.manual_seed(0)
    stored = str(dsd.weight_dtype()).removeprefix("torch.")  # the number format of drawing
    precisions = [name for name in NAMES if NAMES[name] == stored] + ["bf16"] * (
        args.bfloat16 and not gpu
    )
    side = args.product * (4 if gpu else 1)
    rates = {
        name: product_rate(getattr(torch, name), side)
        for name in {stored, *(NAMES[p] for p in precisions)}
    }
    trainings = precisions if "training" in args.rows else []
    with tempfile.TemporaryDirectory() as work:
        rows = [
            *([grids_row(args, rates[stored])] if "grids" in args.rows else []),
            *([curation_row(args, rates[stored])] if "curation" in args.rows and args.vlm else []),
            *(
                training_row(args, precision, rates[NAMES[precision]], Path(work))
                for precision in trainings
            ),
            *(sampling_rows(args, rates[stored], Path(work)) if "sampling" in args.rows else []),
        ]
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if gpu else cpu
    result = {"machine": machine, "torch": torch.__version__, "rates": rates, "rows": rows}
    dsd.write_json(args.out / "benchmark.json", result)
    print(table(result))


if __name__ == "__main__":
    dsd.run_main(main)
