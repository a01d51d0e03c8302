"""How fast the four steps are, beside what, and how far from the machine's limit.

    OMP_NUM_THREADS=2 python tests/benchmark.py                      # the miniature: about 4 minutes on two CPU cores
    OMP_NUM_THREADS=2 python tests/benchmark.py --compile            # training with compiled blocks: 2 minutes more
    python tests/benchmark.py --size flux.1-dev --gradient_checkpointing    # FLUX.1-dev, random weights, a CUDA GPU
    python tests/benchmark.py --size flux.1-dev --quantize nf4 --rank 16 --gradient_checkpointing

Peer: the stock pipeline for grids and for one-pass sampling; three passes one after another for guided sampling, as the
released code does; for training a step that encodes its pictures and prompts in the loop, as diffusers' example
trainers do. Both are timed in turn in one process, the faster of --repeat runs counts. Limit: the arithmetic in the step
(matrix products, convolutions, attention; recomputed activations too) at the measured rate of a large matrix product in
the same precision. Speed and memory do not depend on the weights' values, so random ones of the right size will do.

Prints a table and writes it as JSON to --out. Training is the loop's own code on the pairs of this file's making.
"""

import argparse
import platform
import sys
import tempfile
import time
import unittest.mock
from contextlib import nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from conftest import noise_image  # noqa: E402
from diffusers import FluxControlPipeline, FluxPipeline  # noqa: E402
from test_real_classes import make_flux  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import curate  # noqa: E402
import dsd  # noqa: E402
import finetune  # noqa: E402
import generate_grids  # noqa: E402
import sample  # noqa: E402

FLUX_1 = {  # the sizes of FLUX.1-dev; what is not said is the classes' own default, which is FLUX.1's
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "text_encoder": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
                     "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "transformer": {}}
SCRIPTS = ["generate_grids", "finetune", "sample"]
PRODUCT = 2048  # side of the matrices whose product is the limit; four times so much on a GPU
PROMPT = "a round horned critter in space at noon with a hat"


# ---- measuring -------------------------------------------------------------------------------------------------------
def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work):
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def product_rate(dtype):
    """Operations a second of a large square matrix product, the best of ten."""
    n = PRODUCT * (4 if dsd.device() == "cuda" else 1)
    a, b = torch.randn(2, n, n, device=dsd.device()).to(dtype)
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(10))


def arithmetic(work):
    """Operations in `work`. On a CPU with plain attention: of the fused one nothing is counted there."""
    plain = sdpa_kernel(SDPBackend.MATH) if dsd.device() == "cpu" else nullcontext()
    with FlopCounterMode(display=False) as counter, plain:
        work()
    return counter.get_total_flops()


def timed(works, count, repeat):
    """The fastest of `repeat` runs of each work, taken in turn, in seconds a unit; and the peak memory, in GB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    taken = [[seconds(work) / count for work in works] for _ in range(repeat)]
    return [min(times) for times in zip(*taken)], dsd.peak_memory()


def row(name, ours, peer, operations, rate, memory):
    """One line of the table, all of it for one unit of work."""
    print(f"{name}: {ours:.4g} s", file=sys.stderr, flush=True)
    return {"step": name, "seconds": ours, "peer_seconds": peer, "limit_seconds": operations / rate,
            "operations": operations, "peak_memory_gb": memory}


def compare(name, ours, peer, count, rate, repeat):
    """The line of `ours` and `peer`, which both do `count` units of work."""
    operations = arithmetic(ours) / count  # the first run, so it warms up too
    if peer is None:
        (fast,), memory = timed([ours], count, repeat)
        return row(name, fast, None, operations, rate, memory)
    peer()
    _, memory = timed([ours], count, 1)
    (fast, slow), _ = timed([ours, peer], count, repeat)
    return row(name, fast, slow, operations, rate, memory)


# ---- the steps -------------------------------------------------------------------------------------------------------
def grids_row(args, rate):
    pipe = dsd.load_pipeline(FluxPipeline, args.model, args.quantize, args.offload)
    settings = settings_of(args, generate_grids)
    grids = [{"prompt": f"a grid of 4 images representing the same critter: {PROMPT}", "seed": i} for i in range(args.batch)]

    def stock():
        pipe([grid["prompt"] for grid in grids], negative_prompt=[""] * len(grids), height=2 * settings["panel"],
             width=2 * settings["panel"], num_inference_steps=settings["steps"], guidance_scale=settings["guidance_scale"],
             true_cfg_scale=settings["true_cfg_scale"], max_sequence_length=dsd.prompt_tokens(pipe),
             generator=torch.Generator().manual_seed(0))

    return compare("a grid", lambda: generate_grids.draw_grids(pipe, grids, settings), stock, len(grids), rate, args.repeat)


def curation_row(args, rate):
    vlm, processor = curate.load_vlm(args.vlm, args.quantize)
    cases = [[noise_image(args.panel, args.panel, 2 * i + k) for k in (0, 1)] for i in range(8 * args.batch)]
    return compare("a pair curated", lambda: curate.ask(vlm, processor, cases, curate.PAIR_QUESTION, len(cases), 400),
                   None, len(cases), rate, args.repeat)


def sampling_rows(args, rate, work):
    """One pass a step, and all three guided passes. The peer of the first is diffusers' own pipeline and call."""
    student = finetune.load_transformer(args.model, settings_of(args, finetune))
    dsd.save_adapter(student, work)
    student = None
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, args.offload)
    dsd.load_adapter(pipe, work)
    settings = settings_of(args, sample) | {"unguided_steps": 0}
    n, side = args.batch, args.panel
    references = [noise_image(side, side, i) for i in range(n)]
    canvases = [dsd.build_grid([r, r.point(lambda v: 0)], 1, 2) for r in references]
    unguided, guided = ({**settings, "image_guidance": s_i, "text_guidance": s_t} for s_i, s_t in ((1., 1.), (1.5, 2.)))

    def ours(chosen):
        text, null_text = (dsd.encode_prompts(pipe, [p] * n) for p in (PROMPT, ""))
        dsd.sample(pipe, dsd.to_pixels(references).to(dsd.device()), text, null_text, list(range(n)), chosen)

    def stock():
        pipe([PROMPT] * n, control_image=canvases, height=side, width=2 * side, num_inference_steps=settings["steps"],
             guidance_scale=settings["guidance_scale"], max_sequence_length=dsd.prompt_tokens(pipe),
             generator=[torch.Generator().manual_seed(i) for i in range(n)])

    def one_by_one():
        together, dsd.guided_velocity = dsd.guided_velocity, three_passes
        ours(guided)
        dsd.guided_velocity = together

    return [compare("an image, one pass", lambda: ours(unguided), stock, n, rate, args.repeat),
            compare("an image, guided", lambda: ours(guided), one_by_one, n, rate, args.repeat)]


def three_passes(model, x, condition, text, null_text, s_i, s_t):
    """Guidance as the released code does it: three passes, one after another."""
    nothing = torch.zeros_like(condition)
    v_00, v_i0, v_it = model(x, nothing, null_text), model(x, condition, null_text), model(x, condition, text)
    return v_00 + s_i * (v_i0 - v_00) + s_t * (v_it - v_i0)


def training_row(args, precision, rate, work):
    """A step on cached tensors; the peer encodes two canvases and a prompt a sample in each step, at the same batch."""
    settings = settings_of(args, finetune, "--precision", precision,
                           *["--gradient_checkpointing"] * args.gradient_checkpointing)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the line before
    accelerator = Accelerator(mixed_precision=precision)
    folder, size, n = work / "pairs", (args.panel, args.panel), settings["batch_size"]
    pairs = make_pairs(folder, args.panel, n)
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, transformer=None)
    canvas = args.panel // pipe.vae_scale_factor, 2 * args.panel // pipe.vae_scale_factor
    (work / "cache").mkdir(exist_ok=True)
    finetune.encode_pairs(pipe, pairs, folder, size, work / "cache")
    cache, null_text = finetune.Cache(work / "cache", pairs), dsd.encode_prompts(pipe, [""])
    pipe = None  # the encoders are dropped, as in finetune.py

    def stepper(batch, compiled, attention):
        """A whole optimiser step on what `batch` gives, as finetune.train takes it."""
        torch.manual_seed(0)
        transformer = finetune.load_transformer(args.model, {**settings, "compile": compiled})
        parameters, optimizer, _ = finetune.make_optimizer(transformer, settings)
        model, optimizer = accelerator.prepare(transformer, optimizer, device_placement=[False, True])
        ids = dsd.position_ids(*canvas).to(accelerator.device)

        def step():
            with attention(accelerator.device):
                accelerator.backward(finetune.batch_losses(model, batch(), canvas, ids, settings)[0])
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return step

    def cached():
        return finetune.draw(cache, null_text, settings, 0, 0, accelerator)

    def encoded():
        reference, target = finetune.load_canvas(folder, pairs, size)
        x_0, condition = (dsd.encode(pipe.vae, p) for p in (dsd.canvas(reference, target), dsd.canvas(reference)))
        text = dsd.encode_prompts(pipe, [pair["prompt"] for pair in pairs])
        sigma = dsd.sample_sigmas(n, settings["shift"], None).to(accelerator.device)
        return [pairs, x_0, torch.randn_like(x_0), sigma, condition, *text]

    operations = arithmetic(stepper(cached, False, finetune.attention)) / n
    ours = stepper(cached, args.compile, finetune.attention)
    ours()  # compiles
    (fast,), memory = timed([ours], n, 5 * args.repeat)
    ours = None
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, transformer=None)
    peer = stepper(encoded, False, lambda device: nullcontext())
    peer()
    (slow,), _ = timed([peer], n, 5 * args.repeat)
    return row(f"a training sample, {'bfloat16' if precision == 'bf16' else 'float32'}", fast, slow, operations, rate, memory)


def make_pairs(folder, side, count):
    """Pairs of noise, as curate.py writes them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(2 * count):
        noise_image(side, side, i).save(folder / "images" / f"{i}.png")
    return [{"reference_file_name": f"images/{2 * i}.png", "target_file_name": f"images/{2 * i + 1}.png",
             "prompt": f"{PROMPT}, number {i}"} for i in range(count)]


def settings_of(args, script, *options):
    """The settings of a script for this model, as its own command line gives them."""
    options += tuple(part for name in ("steps", "panel", "width", "height", "rank", "batch_size", "quantize") if (
        value := args.given.get((script.__name__, name))) for part in (f"--{name}", str(value)))
    with unittest.mock.patch("sys.argv", [script.__name__, "--model", str(args.model), *options]):
        return script.parse_args()[1]


# ---- command line ----------------------------------------------------------------------------------------------------
def table(result):
    """The result as a Markdown table."""
    lines = ["| for | seconds | peer's | faster by | limit | share of the limit | peak GB |", "|---|---|---|---|---|---|---|"]
    for r in result["rows"]:
        peer, ratio = ("", "") if r["peer_seconds"] is None else (
            f"{r['peer_seconds']:.4g}", f"{r['peer_seconds'] / r['seconds']:.2f}x")
        lines.append(f"| {r['step']} | {r['seconds']:.4g} | {peer} | {ratio} | {r['limit_seconds']:.4g} | "
                     f"{r['limit_seconds'] / r['seconds']:.0%} | {r['peak_memory_gb']:.1f} |")
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in result["rates"].items())
    return "\n".join([*lines, "", f"{result['machine']}; matrix products, GFLOP/s: {rates}."])


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    amx = ", AMX" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else ""
    return f"{found[0] if found else platform.processor()}{amx}, {torch.get_num_threads()} threads"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=["miniature", "flux.1-dev"], default="miniature")
    add("--model", help="a FLUX folder of your own instead")
    add("--vlm", help="for the curation line (default: the miniature's; with another --size, none)")
    add("--steps", type=int, help="of the sampler (default: the model's own)")
    add("--panel", type=int, help="side of a panel (default: the model's own)")
    add("--batch", type=int, help="grids and pictures drawn together (default: 8 on the miniature, else 1)")
    add("--rank", type=int)
    add("--batch_size", type=int, help="samples in a training step (default: the model's own)")
    add("--quantize", choices=["none", "nf4", "int8"], default="none")
    add("--offload", choices=["none", "model", "group", "sequential"], default="none", help="for grids and sampling")
    add("--gradient_checkpointing", action="store_true")
    add("--compile", action="store_true", help="compile the transformer's blocks for training")
    add("--rows", nargs="+", choices=["grids", "curation", "training", "sampling"],
        default=["grids", "curation", "training", "sampling"])
    add("--repeat", type=int, default=2)
    add("--out", type=Path, default=Path("runs/benchmark.json"))
    return parser.parse_args()


def find_models(args):
    """The folders of this size, and what its scripts would use; random weights are made once."""
    small = args.size == "miniature" and not args.model
    if args.size == "flux.1-dev" and not args.model:
        if dsd.device() == "cpu":
            raise dsd.DsdError("--size flux.1-dev needs a CUDA GPU; tests/computed.py computes its costs without one")
        args.model = args.out.parent / "random" / "FLUX.1-dev"
        if not (args.model / "model_index.json").exists():
            make_flux(args.model, True, FLUX_1, torch.bfloat16, "cuda")
    args.model = args.model or dsd.MINIATURE / "flux"
    args.vlm = args.vlm or (str(dsd.MINIATURE / "vlm") if small else None)
    args.panel = args.panel or dsd.model_settings(args.model, "sample", argparse.Namespace(), width=512)["width"]
    args.batch = args.batch or (8 if small else 1)
    args.given = {
        ("generate_grids", "steps"): args.steps, ("generate_grids", "panel"): args.panel, ("sample", "steps"): args.steps,
        ("sample", "width"): args.panel, ("sample", "height"): args.panel, ("finetune", "rank"): args.rank,
        ("finetune", "batch_size"): args.batch_size, **{(s, "quantize"): args.quantize for s in SCRIPTS}}


def main():
    args = parse_args()
    find_models(args)
    torch.manual_seed(0)
    rates = {name: product_rate(dtype) for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))}
    precisions = ["bf16", "no"] if dsd.device() == "cpu" else ["bf16"]
    stored, rows = rates["float32" if dsd.device() == "cpu" else "bfloat16"], []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        if "grids" in args.rows:
            rows.append(grids_row(args, stored))
        if "curation" in args.rows and args.vlm:
            rows.append(curation_row(args, stored))
        if "training" in args.rows:
            rows += [training_row(args, p, rates["bfloat16" if p == "bf16" else "float32"], work) for p in precisions]
        if "sampling" in args.rows:
            rows += sampling_rows(args, stored, work)
    chosen = {name: str(value) for name, value in vars(args).items() if name not in ("given", "out")}
    result = {"machine": machine(), "torch": torch.__version__, "settings": chosen, "rates": rates, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    dsd.write_json(args.out, result)
    print(table(result))


if __name__ == "__main__":
    dsd.run(main)
