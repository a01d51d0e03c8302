"""Know before you start: what a recipe needs on a card, computed without running it. No GPU, no
weights, a minute.

    python -m miniature.computed --recipe evening    # a recipe of the README: evening, 16, 24 or 80
    python -m miniature.computed --card 3090 --quantize nf4 --count 2000 --panel 512 --rank 64
    python -m miniature.computed --model FOLDER      # sizes of a local folder, not FLUX.1-dev's

For each step it prints pictures, tokens, the peak of the card's memory, hours and disk. An option
means what it means in the scripts; --grid_steps and --sample_steps are --steps of the first and the
last, --vlm_batch_size is curate.py's.

Memory: tensors on the meta device have a size and no content. The code of diffusers, transformers
and PEFT runs on them, and the bytes alive at once are added up: in training with autocast's float32
norms and the gradients, in validation and sampling with all guided passes, and the VAE's pictures.
To these come the weights (in nf4 every linear layer but the embedder and T5's `wo`, which stay in
bfloat16), LoRA with AdamW's moments (of 8 bits beside nf4) and what frameworks reserve: runs at
1024 pixels were measured to hold 4.7 GiB above the weights, in bfloat16 and in nf4, of which the
tensors counted here are 1.5. Attention is taken to be fused. A checkpoint is copied to main memory
and needs nothing. The VLM is estimated from its size, see `curation`.

Time: the arithmetic of those runs at the rate of the card, see CARDS. In nf4 each pass also writes
every weight once in bfloat16.
"""

import dsd

import argparse
import functools
import math
import unittest.mock
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

FLUX_1 = {  # FLUX.1-dev's sizes; what is not said is the classes' own default, which is FLUX.1's
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_attention_heads": 12,
    },
    "text_encoder_2": {
        "d_model": 4096,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
    "transformer": {},
}
# Reported seconds of one pass of FLUX.1-dev at 1024 pixels, 74 TFLOP: 2.05 to 2.25 on a 3090
# (users' reports), 0.59 on a 4090 (1.7 it/s of BFL's code, README of aredden/flux-fp8-api), 0.24 on
# an H100 (6.71 s for 28, docs/performance/flux.md of xDiT). At 512 pixels, 22 TFLOP: 0.17 on an
# L40S (8.71 s for 50, "Speeding up FLUX.1[dev]" at pruna.ai).
CARDS = {  # GB of memory, TFLOP/s that FLUX.1 reaches in bfloat16, TB/s of the memory
    "3090": {"memory": 24, "tflops": 35, "bandwidth": 0.94},
    "4090": {"memory": 24, "tflops": 100, "bandwidth": 1.01},
    "L40S": {"memory": 48, "tflops": 120, "bandwidth": 0.86},
    "H100": {"memory": 80, "tflops": 300, "bandwidth": 3.35},
}
BF16 = torch.bfloat16
NF4_BYTES = 0.5 + 1 / 64 + 1 / (64 * 64)  # of a weight: 4 bits, 8 for 64 of them, 32 for 64 * 256
RESERVED = (4.7 - 1.5) * 2**30  # bytes that frameworks hold beside the tensors
PNG_BYTES = 1.6  # of a pixel of a photograph
ASKED, ACCEPTED, CAPTIONS = 6, 0.35, 3  # of a grid: pairs, share accepted (as in UNO), captions
SMALL = {"quantize": "nf4", "count": 1000, "panel": 256, "grid_steps": 20, "steps": 3000}
RECIPES = {
    "evening": {"card": "4090", **SMALL, "vlm_batch_size": 24},
    "16": {"card": "3090", "memory": 16, **SMALL, "vlm_billions": 3.8},
    "24": {"card": "4090", "quantize": "nf4", "count": 2000},
    "80": {"card": "H100", "count": 2000, "vlm_batch_size": 32, "batch_size": 4},
}


# ---- counting on tensors without content ---------------------------------------------------------
class Counter(TorchDispatchMode):
    """`peak`: the most bytes alive at once in storages that were made within it; `operations`: of
    its products."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.operations = {}, 0, 0, 0

    def free(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        known = {t.untyped_storage()._cdata for t in given}
        out = function(*args, **kwargs)
        for storage in [t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)]:
            key = storage._cdata
            if key not in known and key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.now)
        if function._overloadpacket in flop_registry:
            count = flop_registry[function._overloadpacket]
            self.operations += count(*args, **kwargs, out_val=out)
        return out


class Autocast(TorchFunctionMode):
    """What torch.autocast does on a GPU; it leaves meta tensors alone."""

    FLOAT32 = ["layer_norm", "rms_norm", "group_norm", "pow", "rsqrt"]
    DTYPES = {"linear": BF16, "conv2d": BF16, **dict.fromkeys(FLOAT32, torch.float32)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, dtype = kwargs or {}, self.DTYPES.get(getattr(function, "__name__", ""))
        if dtype:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(dtype), (args, kwargs))
        return function(*args, **kwargs)


class Linear4bit(torch.nn.Linear):
    """bitsandbytes' layer, as far as memory goes: the output has the number format of the input,
    and PEFT copies it."""

    def forward(self, x):
        return torch.nn.functional.linear(x.to(BF16), self.weight, self.bias).to(x.dtype).clone()


def fused_attention(query, key, value, **_):
    """Attention as it is on a GPU: the matrix of scores is never whole."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query.to(BF16), key.to(BF16), value.to(BF16))[0]


def measure(work, autocast=False, grad=False, device="meta"):
    """The Counter of `work`, which makes its own inputs."""
    name = "torch.nn.functional.scaled_dot_product_attention"
    with (
        torch.device(device),
        unittest.mock.patch(name, fused_attention),
        torch.set_grad_enabled(grad),
        Autocast() if autocast else nullcontext(),
        Counter() as counter,
    ):
        work()
    return counter


# ---- the model -----------------------------------------------------------------------------------
def part_config(args, name):
    """The configuration of a part of the model, which says its sizes."""
    if not args.model:
        return FLUX_1[name]
    file = Path(args.model) / name / "config.json"
    if not file.exists():
        raise dsd.DsdError(f"no {file}; leave --model out for FLUX.1-dev's sizes")
    return dsd.read_json(file)


def load_transformer(args):
    config = {"guidance_embeds": True} | part_config(args, "transformer")
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config).to(BF16)


def is_quantised(name, module, args):
    """Whether a layer is of 4 bits: not the embedder, which gets wider, and not T5's `wo`, which
    transformers keeps."""
    kept = name == "x_embedder" or name.split(".")[-1] == "wo"
    return args.quantize == "nf4" and isinstance(module, torch.nn.Linear) and not kept


def weight_bytes(model, args):
    """Bytes of a model's weights on the card; one that two modules share counts once."""
    sizes = {}
    for name, module in model.named_modules():
        small = is_quantised(name, module, args)
        for key, p in module.named_parameters(recurse=False):
            sizes[id(p)] = p.numel() * (NF4_BYTES if small and key == "weight" else 2)
    return sum(sizes.values())


def make_student(args):
    """The transformer as finetune.py trains it: widened, with LoRA in float32."""
    transformer = load_transformer(args)
    for name, module in transformer.named_modules():
        if is_quantised(name, module, args):
            module.__class__ = Linear4bit
    with torch.device("meta"):
        student = dsd.add_lora(dsd.widen(transformer), args.rank)
    for p in student.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    if args.gradient_checkpointing:
        how = {"use_reentrant": False, "context_fn": recomputing}
        student.enable_gradient_checkpointing(functools.partial(checkpoint, **how))
    return student


def recomputing():
    """Of a checkpointed block: what it runs under at first, and when it is recomputed."""
    return nullcontext(), Autocast()


# ---- the steps -----------------------------------------------------------------------------------
class Recipe:
    """The rows of the table: one method a row. `batch` counts pictures or canvases that are
    computed together."""

    def __init__(self, args):
        self.args, self.teacher, self.student = args, load_transformer(args), make_student(args)
        t5 = {"feed_forward_proj": "gated-gelu"} | part_config(args, "text_encoder_2")
        with torch.device("meta"):
            self.vae = AutoencoderKL.from_config(part_config(args, "vae")).to(BF16)
            self.t5 = T5EncoderModel(T5Config(**t5)).to(BF16)
            self.clip = CLIPTextModel(CLIPTextConfig(**part_config(args, "text_encoder")))
        self.side = 2 ** len(self.vae.config.block_out_channels)  # of a token, in pixels
        self.weights = {
            "text": weight_bytes(self.t5, args) + weight_bytes(self.clip, args),
            "transformer": weight_bytes(self.teacher, args),
            "vae": weight_bytes(self.vae, args),
        }
        self.lora = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        self.moments = 2 if args.quantize == "nf4" else 8
        s_i, s_t = args.image_guidance, args.text_guidance
        self.passes = sum(weight != 0 for weight in (1 - s_i, s_i - s_t, s_t))  # of a guided step
        layers = [p.numel() for p in self.teacher.parameters() if p.ndim == 2]
        if args.quantize != "nf4":
            layers = [0]
        self.unpacked = 2 * max(layers)  # bytes of the one weight that is in bfloat16 at a time
        self.unpacking = sum(layers) * (2 + NF4_BYTES) / (args.bandwidth * 1e12)  # seconds a pass
        self.canvas = 2 * args.panel, args.panel
        self.canvas_tokens = 2 * (args.panel // self.side) ** 2 + args.prompt_tokens

    def seconds(self, operations, passes=0):
        return operations / (self.args.tflops * 1e12) + passes * self.unpacking

    def row(self, step, pictures, tokens, alive, seconds, disk):
        """A row of the table from bytes alive on the card, seconds and bytes on disk."""
        peak = (alive + RESERVED) / 1e9
        return {
            "step": step,
            "pictures": pictures,
            "tokens a pass": tokens,
            "peak GB": round(peak, 1),
            "fits": "yes" if peak <= self.args.memory else "NO",
            "hours": round(seconds / 3600, 2),
            "disk GB": round(disk / 1e9, 1),
        }

    def run(self, model, batch, width, height, prompt_tokens):
        """One pass of the transformer."""
        n, config = width * height // self.side**2, model.config
        tokens = torch.randn(batch, n, config.in_channels, dtype=BF16)
        embeds = torch.randn(batch, prompt_tokens, config.joint_attention_dim, dtype=BF16)
        pooled = torch.randn(batch, config.pooled_projection_dim, dtype=BF16)
        sigma, ids = torch.rand(batch, dtype=BF16), torch.zeros(n, 3)
        return dsd.run_transformer(model, tokens, sigma, (embeds, pooled), ids, 3.5)

    def train_step(self):
        tokens = self.args.prompt_tokens
        v = self.run(self.student, self.args.batch_size, *self.canvas, tokens)
        v.float().mean().backward()
        self.student.zero_grad()

    def decode(self, batch, width, height, **how):
        channels = self.vae.config.latent_channels
        shape = batch, channels, 2 * height // self.side, 2 * width // self.side
        return measure(lambda: self.vae.decode(torch.randn(shape, dtype=BF16)), **how)

    def encode(self, batch, width, height, **how):
        shape = batch, 3, height, width
        return measure(lambda: self.vae.encode(torch.randn(shape).to(BF16)), **how)

    def encode_text(self, batch, tokens):
        return measure(lambda: self.t5(torch.zeros(batch, tokens, dtype=torch.long)))

    def place(self, weights, needs):
        """Bytes of a pipeline of which one part works at a time. Quantised parts are all made on
        the card at first."""
        if self.args.offload == "none":
            return sum(weights.values()) + max(needs.values())
        made = sum(weights.values()) if self.args.quantize == "nf4" else 0
        return max(made, *(weights[part] + needs[part] for part in weights))

    def grids(self):
        """With text guidance each step has a second pass."""
        args, size = self.args, 2 * self.args.panel
        text, picture = self.encode_text(1, 512), self.decode(1, size, size)
        one = measure(lambda: self.run(self.teacher, 1, size, size, 512))
        passes = args.grid_steps * (2 if args.true_cfg_scale > 1 else 1)
        needs = {"text": text.peak, "transformer": one.peak + self.unpacked, "vae": picture.peak}
        operations = passes * one.operations + text.operations + picture.operations
        seconds = args.count * self.seconds(operations, passes)
        tokens, disk = (size // self.side) ** 2 + 512, args.count * PNG_BYTES * size**2
        alive = self.place(self.weights, needs)
        return self.row("1 generate_grids.py", args.count, tokens, alive, seconds, disk)

    def curation(self):
        """By rule, for a VLM in bfloat16: a token holds 60 kB of keys and values and, while the
        question is read, 250 kB of activations; a token of a picture covers 28x28 pixels; answers
        have 300 tokens, captions 50; a token of a batch reads all weights once, which takes at
        least 30 ms."""
        args, weights = self.args, 2e9 * self.args.vlm_billions
        asked, captions = ASKED * args.count, CAPTIONS * args.count
        picture = math.ceil(args.panel / 28) ** 2
        question = 2 * picture + 120
        token = max(0.03, weights / (args.bandwidth * 1e12))
        seconds = (asked * 300 + captions * 50) / args.vlm_batch_size * token
        seconds += self.seconds(weights * (asked * question + captions * (picture + 30)))
        alive = weights + args.vlm_batch_size * ((question + 400) * 60e3 + question * 250e3)
        disk = 4 * args.count * PNG_BYTES * args.panel**2
        return self.row("2 curate.py", 4 * args.count, question, alive, seconds, disk)

    def encoding(self):
        args, pairs = self.args, round(2 * ASKED * ACCEPTED * self.args.count)
        batch = 32 if args.panel < 512 else 4  # as in finetune.encode_pairs
        text, canvas = self.encode_text(batch, args.prompt_tokens), self.encode(batch, *self.canvas)
        alive = self.weights["text"] + self.weights["vae"] + max(text.peak, canvas.peak)
        seconds = pairs / batch * self.seconds(text.operations + 2 * canvas.operations)
        latents = 2 * (self.canvas_tokens - args.prompt_tokens) * self.teacher.config.in_channels
        disk = 2 * pairs * (latents + args.prompt_tokens * self.t5.config.d_model)
        return self.row("3 finetune.py: encoding", pairs, "", alive, seconds, disk)

    def resident(self):
        """Bytes that are on the card while finetune.py trains."""
        weights = self.weights["transformer"] + self.weights["vae"]
        return weights + self.lora * (4 + self.moments)

    def training(self):
        args, self.student = self.args, self.student.train()
        step = measure(self.train_step, autocast=True, grad=True)
        update = self.lora * (8 if args.quantize == "none" else 4)  # gradients, and AdamW's copy
        alive = self.resident() + max(step.peak + self.unpacked, update)
        passes = 3 if args.gradient_checkpointing else 2
        seconds = args.steps * self.seconds(step.operations, passes)
        disk = self.lora * 2 * (2 + 4 + self.moments)  # adapter and state, written aside first
        pictures, tokens = args.steps * args.batch_size, args.batch_size * self.canvas_tokens
        return self.row("3 finetune.py: training", pictures, tokens, alive, seconds, disk)

    def drawing(self, batch, steps, **how):
        """A batch of pictures for references: {part: bytes}, seconds, and the operations of one
        pass of one canvas."""
        n, student = self.passes, self.student.eval()
        tokens = self.args.prompt_tokens
        step = measure(lambda: self.run(student, n * batch, *self.canvas, tokens), **how)
        picture = self.decode(batch, *self.canvas, **how)
        reference = self.encode(batch, *self.canvas, **how)
        unguided = min(2, steps)
        operations = (steps - unguided + unguided / n) * step.operations
        operations += picture.operations + reference.operations
        peaks = {"transformer": step.peak + self.unpacked}
        peaks["vae"] = max(picture.peak, reference.peak)
        return peaks, self.seconds(operations, steps), step.operations / (n * batch)

    def validation(self):
        args, batch = self.args, min(self.args.batch_size, 24)
        needs, seconds, one = self.drawing(1, 20, autocast=True)
        size = *self.canvas, args.prompt_tokens
        losses = measure(lambda: self.run(self.student, batch, *size), autocast=True)
        times = math.ceil(args.steps / args.validate_every)
        tokens = max(batch, self.passes) * self.canvas_tokens
        alive = self.resident() + max(losses.peak + self.unpacked, *needs.values())
        seconds = times * (6 * seconds + self.seconds(24 * one, 24))
        return self.row("3 finetune.py: validation", 6 * times, tokens, alive, seconds, 0)

    def sampling(self):
        args, text = self.args, self.encode_text(1, self.args.prompt_tokens)
        needs, seconds, _ = self.drawing(1, args.sample_steps)
        weights = self.weights | {"transformer": self.weights["transformer"] + 2 * self.lora}
        tokens = self.passes * self.canvas_tokens
        alive = self.place(weights, needs | {"text": text.peak})
        seconds = args.pictures * (seconds + self.seconds(2 * text.operations))
        disk = args.pictures * PNG_BYTES * args.panel**2
        return self.row("4 sample.py", args.pictures, tokens, alive, seconds, disk)

    def rows(self):
        steps = self.grids, self.curation, self.encoding, self.training
        return [step() for step in (*steps, self.validation, self.sampling)]

    def downloads(self):
        """GB of the model and of the VLM as they are downloaded, in bfloat16."""
        plain, parts = argparse.Namespace(quantize="none"), (self.teacher, self.t5, self.clip)
        bytes_ = sum(weight_bytes(part, plain) for part in (*parts, self.vae))
        return bytes_ / 1e9, 2 * self.args.vlm_billions


# ---- command line --------------------------------------------------------------------------------
COUNTS = {  # options that mean what they mean in the scripts
    "count": 100,
    "panel": 512,
    "grid_steps": 28,
    "vlm_batch_size": 8,
    "steps": 10_000,
    "rank": 64,
    "batch_size": 1,
    "prompt_tokens": 128,
    "validate_every": 500,
    "pictures": 24,
    "sample_steps": 28,
}


def parse_args(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=dsd.HelpFormatter)
    add, amount = parser.add_argument, dsd.at_least(0, float)
    add("--recipe", choices=list(RECIPES), help="options of a recipe; given ones override them")
    add("--card", choices=list(CARDS), default="4090", help="its memory and its rate")
    add("--memory", type=amount, help="GB of the card; if not given, the card's")
    add("--tflops", type=amount, help="that it reaches in these models; if not given, the card's")
    add("--bandwidth", type=amount, help="TB/s of its memory; if not given, the card's")
    add("--model", help="folder whose configurations give the sizes; if not given, FLUX.1-dev's")
    add("--quantize", choices=["none", "nf4"], default="none", help="of steps 1, 3 and 4")
    add("--offload", choices=["none", "model"], default="none", help="of steps 1 and 4")
    checkpointing = argparse.BooleanOptionalAction
    add("--gradient_checkpointing", action=checkpointing, default=True, help="in training")
    for name, default in COUNTS.items():
        add(f"--{name}", type=dsd.at_least(1), default=default, help="as in the scripts")
    add("--vlm_billions", type=amount, default=8.3, help="Qwen2.5-VL-7B has 8.3, -3B 3.8")
    add("--true_cfg_scale", type=amount, default=1.0, help="of step 1")
    add("--image_guidance", type=amount, default=1.0, help="of validation and of step 4")
    add("--text_guidance", type=amount, default=1.0, help="of validation and of step 4")
    recipe = parser.parse_known_args(given)[0].recipe
    if recipe:
        parser.set_defaults(**RECIPES[recipe])
    args = parser.parse_args(given)
    if args.model and not Path(args.model).is_dir():
        raise dsd.DsdError(f"no folder {args.model}; leave --model out for FLUX.1-dev's sizes")
    for name, value in CARDS[args.card].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main():
    args = parse_args()
    recipe = Recipe(args)
    rows, (model, vlm) = recipe.rows(), recipe.downloads()
    print(f"Computed, not measured: {args.card}, {args.tflops:g} TFLOP/s, {args.memory:g} GB.\n")
    print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    hours, disk = (sum(row[name] for row in rows) for name in ("hours", "disk GB"))
    print(f"\n{hours:.1f} hours and {disk:.0f} GB of disk in all, besides loading the models.")
    print(
        f"Downloads: {model:.1f} GB of the model, {vlm:.1f} GB of the VLM. "
        f"Main memory: {model:.1f} GB for each process, until its weights are on the card."
    )


if __name__ == "__main__":
    dsd.run_main(main)
