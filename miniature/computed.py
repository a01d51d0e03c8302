"""Know before you start: what a recipe needs on a card, computed without running it. No GPU, no weights, a minute.

    python -m miniature.computed --recipe evening               # a recipe of the README: evening, 16, 24 or 80
    python -m miniature.computed --card 24 --quantize nf4 --count 2000 --panel 512 --rank 64
    python -m miniature.computed --card 24 --model FOLDER       # sizes from a local folder instead of FLUX.1-dev's

For each step it prints pictures, tokens, the peak of the card's memory, hours and disk. An option means what it means
in the scripts; --grid_steps and --sample_steps are --steps of the first and the last, --vlm_batch_size is curate.py's.

Memory: tensors on the meta device have a size and no content. The code of diffusers, transformers and PEFT runs on
them, and the bytes alive at once are added up: in training with autocast's float32 norms and the gradients, in
validation and sampling with all guided passes, and the VAE's pictures. To these come the weights (in nf4 every linear
layer but the embedder and T5's `wo`, which stay in bfloat16), LoRA with AdamW's moments (of 8 bits beside nf4), half a
GB for CUDA and 5 % that the allocator wastes. Attention is taken to be fused. A checkpoint is copied to main memory and
needs nothing. The VLM is estimated from its size, see `curation`.

Time: the arithmetic of those runs at 45 % of --tflops. In nf4 each pass also writes every weight once in bfloat16.
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
from torch.utils._pytree import tree_leaves, tree_map
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
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
    "transformer": {},
}
BF16 = torch.bfloat16
NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # of a weight: 4 bits, 8 for each block of 64, 32 for 256 blocks
UTILISATION, WASTE, CUDA_BYTES = 0.45, 0.05, 0.5e9
PNG_BYTES = 1.6  # of a pixel of a photograph
ASKED, ACCEPTED, CAPTIONS = (
    6,
    0.35,
    3,
)  # of a grid: pairs asked about, share accepted (as in UNO), panels captioned
SMALL = {"quantize": "nf4", "count": 1000, "panel": 256, "grid_steps": 20, "steps": 3000}
RECIPES = {
    "evening": {"card": 24, **SMALL, "vlm_batch_size": 24},
    "16": {"card": 16, **SMALL, "vlm_billions": 3.8},
    "24": {"card": 24, "quantize": "nf4", "count": 2000},
    "80": {"card": 80, "count": 2000, "vlm_batch_size": 32, "batch_size": 4},
}


# ---- counting on tensors without content -----------------------------------------------------------------------------
class Counter(TorchDispatchMode):
    """`peak`: the most bytes alive at once in storages that were made within it; `operations`: of its products."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.operations = {}, 0, 0, 0

    def free(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)
        }
        out = function(*args, **kwargs)
        for storage in [t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)]:
            key = storage._cdata
            if key not in given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.now)
        if function._overloadpacket in flop_registry:
            self.operations += flop_registry[function._overloadpacket](*args, **kwargs, out_val=out)
        return out


class Autocast(TorchFunctionMode):
    """What torch.autocast does on a GPU; it leaves meta tensors alone."""

    DTYPES = {
        "linear": BF16,
        "conv2d": BF16,
        **dict.fromkeys(["layer_norm", "rms_norm", "group_norm", "pow", "rsqrt"], torch.float32),
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, dtype = kwargs or {}, self.DTYPES.get(getattr(function, "__name__", ""))
        if dtype:
            args, kwargs = tree_map(
                lambda t: t.to(dtype) if torch.is_tensor(t) else t, (args, kwargs)
            )
        return function(*args, **kwargs)


class Linear4bit(torch.nn.Linear):
    """bitsandbytes' layer, as far as memory goes: the output has the number format of the input, and PEFT copies it."""

    def forward(self, x):
        return torch.nn.functional.linear(x.to(BF16), self.weight, self.bias).to(x.dtype).clone()


def fused_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Attention as it is on a GPU: the matrix of scores is never whole."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query.to(BF16), key.to(BF16), value.to(BF16)
    )[0]


def measure(work, autocast=False, grad=False, device="meta"):
    """The Counter of `work`, which makes its own inputs."""
    attention = unittest.mock.patch(
        "torch.nn.functional.scaled_dot_product_attention", fused_attention
    )
    with (
        torch.device(device),
        attention,
        torch.set_grad_enabled(grad),
        Autocast() if autocast else nullcontext(),
        Counter() as counter,
    ):
        work()
    return counter


# ---- the model -------------------------------------------------------------------------------------------------------
def load_transformer(args):
    config = {"guidance_embeds": True} | part_config(args, "transformer")
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config).to(BF16)


def part_config(args, name):
    """The configuration of a part of the model, which says its sizes."""
    if not args.model:
        return FLUX_1[name]
    if not (file := Path(args.model) / name / "config.json").exists():
        raise dsd.DsdError(f"no {file}; leave --model out for FLUX.1-dev's sizes")
    return dsd.read_json(file)


def is_quantised(name, module, args):
    """Whether a layer is of 4 bits: not the embedder, which gets wider, and not T5's `wo`, which transformers keeps."""
    kept = name == "x_embedder" or name.split(".")[-1] == "wo"
    return args.quantize == "nf4" and isinstance(module, torch.nn.Linear) and not kept


def weight_bytes(model, args):
    """Bytes of a model's weights on the card."""
    sizes = {
        id(p): p.numel()
        * (NF4_BYTES if key == "weight" and is_quantised(name, module, args) else 2)
        for name, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False)
    }
    return sum(sizes.values())  # a tied weight, which is in two modules, counts once


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
        student.enable_gradient_checkpointing(
            functools.partial(
                checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), Autocast())
            )
        )  # recomputed in it too
    return student


class Recipe:
    """The rows of the table: one method a row. `batch` counts pictures or canvases that are computed together."""

    def __init__(self, args):
        self.args, self.teacher, self.student = args, load_transformer(args), make_student(args)
        with torch.device("meta"):
            self.vae = AutoencoderKL.from_config(part_config(args, "vae")).to(BF16)
            self.t5 = T5EncoderModel(
                T5Config(
                    **{"feed_forward_proj": "gated-gelu"} | part_config(args, "text_encoder_2")
                )
            ).to(BF16)
            clip = CLIPTextModel(CLIPTextConfig(**part_config(args, "text_encoder")))
        self.side = 2 ** len(self.vae.config.block_out_channels)  # of a token, in pixels
        self.weights = {
            "text": weight_bytes(self.t5, args) + weight_bytes(clip, args),
            "transformer": weight_bytes(self.teacher, args),
            "vae": weight_bytes(self.vae, args),
        }
        self.lora = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        self.moments = 2 if args.quantize == "nf4" else 8
        self.passes = sum(
            w != 0
            for w in (
                1 - args.image_guidance,
                args.image_guidance - args.text_guidance,
                args.text_guidance,
            )
        )  # of a guided step; see dsd.guided_velocity
        layers = [
            p.numel() * (args.quantize == "nf4") for p in self.teacher.parameters() if p.ndim == 2
        ]
        self.unpacked = 2 * max(layers)  # bytes of the one weight that is in bfloat16 at a time
        self.unpacking = (
            sum(layers) * (2 + NF4_BYTES) / (2e12 if args.card >= 40 else 0.9e12)
        )  # seconds a pass
        self.canvas = 2 * args.panel, args.panel
        self.canvas_tokens = 2 * (args.panel // self.side) ** 2 + args.prompt_tokens

    def seconds(self, operations, passes=0):
        return operations / (self.args.tflops * 1e12 * UTILISATION) + passes * self.unpacking

    def row(self, step, pictures, tokens, alive, seconds, disk):
        peak = (alive * (1 + WASTE) + CUDA_BYTES) / 1e9
        return {
            "step": step,
            "pictures": pictures,
            "tokens a pass": tokens,
            "peak GB": round(peak, 1),
            "fits": "yes" if peak <= self.args.card else "NO",
            "hours": round(seconds / 3600, 2),
            "disk GB": round(disk / 1e9, 1),
        }

    def run(self, model, batch, width, height, prompt_tokens):
        """One pass of the transformer."""
        tokens = torch.randn(
            batch, width * height // self.side**2, model.config.in_channels, dtype=BF16
        )
        text = (
            torch.randn(batch, prompt_tokens, model.config.joint_attention_dim, dtype=BF16),
            torch.randn(batch, model.config.pooled_projection_dim, dtype=BF16),
        )
        ids = torch.zeros(tokens.shape[1], 3)
        return dsd.run_transformer(model, tokens, torch.rand(batch, dtype=BF16), text, ids, 3.5)

    def train_step(self):
        self.run(
            self.student, self.args.batch_size, *self.canvas, self.args.prompt_tokens
        ).float().mean().backward()
        self.student.zero_grad()

    def decode(self, batch, width, height, **how):
        shape = (
            batch,
            self.vae.config.latent_channels,
            2 * height // self.side,
            2 * width // self.side,
        )
        return measure(lambda: self.vae.decode(torch.randn(shape, dtype=BF16)), **how)

    def encode(self, batch, width, height, **how):
        return measure(
            lambda: self.vae.encode(torch.randn(batch, 3, height, width).to(BF16)), **how
        )

    def encode_text(self, batch, tokens):
        return measure(lambda: self.t5(torch.zeros(batch, tokens, dtype=torch.long)))

    def place(self, weights, needs):
        """Bytes of a pipeline of which one part works at a time. Quantised parts are all made on the card at first."""
        if self.args.offload == "none":
            return sum(weights.values()) + max(needs.values())
        made = sum(weights.values()) if self.args.quantize == "nf4" else 0
        return max(made, *(weights[part] + needs[part] for part in weights))

    def grids(self):
        args, size = self.args, 2 * self.args.panel
        text, picture = self.encode_text(1, 512), self.decode(1, size, size)
        passes = [measure(lambda: self.run(self.teacher, 1, size, size, 512))]
        if args.agreement > 0:  # the four panels alone
            passes.append(measure(lambda: self.run(self.teacher, 4, args.panel, args.panel, 512)))
        peak = max(one.peak for one in passes)
        step = sum(one.operations for one in passes)
        needs = {"text": text.peak, "transformer": peak + self.unpacked, "vae": picture.peak}
        one = self.seconds(
            text.operations + args.grid_steps * step + picture.operations,
            args.grid_steps * len(passes),
        )
        return self.row(
            "1 generate_grids.py",
            args.count,
            (size // self.side) ** 2 + 512,
            self.place(self.weights, needs),
            args.count * one,
            args.count * PNG_BYTES * size**2,
        )

    def curation(self):
        """By rule, for a VLM in bfloat16: a token holds 60 kB of keys and values and, while the question is read, 250
        kB of activations; a token of a picture covers 28x28 pixels; answers have 300 tokens, captions 50; a token of
        a batch reads all weights once, which takes at least 30 ms."""
        args, bytes_ = self.args, 2e9 * self.args.vlm_billions
        picture, asked, captions = (
            math.ceil(args.panel / 28) ** 2,
            ASKED * args.count,
            CAPTIONS * args.count,
        )
        question = 2 * picture + 120
        token = max(0.03, bytes_ / (2e12 if args.card >= 40 else 0.9e12))
        seconds = (asked * 300 + captions * 50) / args.vlm_batch_size * token
        seconds += self.seconds(bytes_ * (asked * question + captions * (picture + 30)))
        alive = bytes_ + args.vlm_batch_size * ((question + 400) * 60e3 + question * 250e3)
        return self.row(
            "2 curate.py",
            4 * args.count,
            question,
            alive,
            seconds,
            4 * args.count * PNG_BYTES * args.panel**2,
        )

    def encoding(self):
        args, pairs = self.args, round(2 * ASKED * ACCEPTED * self.args.count)
        batch = 32 if args.panel < 512 else 4  # as in finetune.encode_pairs
        text, canvas = self.encode_text(batch, args.prompt_tokens), self.encode(batch, *self.canvas)
        latents = 2 * (self.canvas_tokens - args.prompt_tokens) * self.teacher.config.in_channels
        return self.row(
            "3 finetune.py: encoding",
            pairs,
            "",
            self.weights["text"] + self.weights["vae"] + max(text.peak, canvas.peak),
            pairs / batch * self.seconds(text.operations + 2 * canvas.operations),
            2 * pairs * (latents + args.prompt_tokens * self.t5.config.d_model),
        )

    def training(self):
        args, self.student = self.args, self.student.train()
        step = measure(self.train_step, autocast=True, grad=True)
        update = self.lora * (
            8 if args.quantize == "none" else 4
        )  # gradients; AdamW in float32 makes a copy more
        self.resident = (
            self.weights["transformer"] + self.weights["vae"] + self.lora * (4 + self.moments)
        )
        return self.row(
            "3 finetune.py: training",
            args.steps * args.batch_size,
            args.batch_size * self.canvas_tokens,
            self.resident + max(step.peak + self.unpacked, update),
            args.steps * self.seconds(step.operations, 3 if args.gradient_checkpointing else 2),
            self.lora * 2 * (2 + 4 + self.moments),
        )  # adapter and state, written aside and renamed

    def drawing(self, batch, steps, **how):
        """A batch of pictures for references: {part: bytes}, seconds, and the operations of one pass of one canvas."""
        n, student = self.passes, self.student.eval()
        step = measure(
            lambda: self.run(student, n * batch, *self.canvas, self.args.prompt_tokens), **how
        )
        picture, reference = (
            self.decode(batch, *self.canvas, **how),
            self.encode(batch, *self.canvas, **how),
        )
        unguided = min(2, steps)
        operations = (
            (steps - unguided + unguided / n) * step.operations
            + picture.operations
            + reference.operations
        )
        return (
            {"transformer": step.peak + self.unpacked, "vae": max(picture.peak, reference.peak)},
            self.seconds(operations, steps),
            step.operations / (n * batch),
        )

    def validation(self):
        args, batch = self.args, min(self.args.batch_size, 24)
        needs, seconds, one = self.drawing(1, 20, autocast=True)
        losses = measure(
            lambda: self.run(self.student, batch, *self.canvas, args.prompt_tokens), autocast=True
        )
        times = math.ceil(args.steps / args.validate_every)
        return self.row(
            "3 finetune.py: validation",
            6 * times,
            max(batch, self.passes) * self.canvas_tokens,
            self.resident + max(losses.peak + self.unpacked, *needs.values()),
            times * (6 * seconds + self.seconds(24 * one, 24)),
            0,
        )

    def sampling(self):
        args, text = self.args, self.encode_text(1, self.args.prompt_tokens)
        needs, seconds, _ = self.drawing(1, args.sample_steps)
        weights = self.weights | {"transformer": self.weights["transformer"] + 2 * self.lora}
        return self.row(
            "4 sample.py",
            args.pictures,
            self.passes * self.canvas_tokens,
            self.place(weights, needs | {"text": text.peak}),
            args.pictures * (seconds + self.seconds(2 * text.operations)),
            args.pictures * PNG_BYTES * args.panel**2,
        )

    def rows(self):
        return [
            self.grids(),
            self.curation(),
            self.encoding(),
            self.training(),
            self.validation(),
            self.sampling(),
        ]


# ---- command line ----------------------------------------------------------------------------------------------------
def parse_args(given=None):
    style = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=type("Formatter", style, {})
    )
    add, positive, amount = parser.add_argument, dsd.at_least(1), dsd.at_least(0, float)
    add(
        "--recipe",
        choices=list(RECIPES),
        help="options of a recipe in the README; those that are given override them",
    )
    add("--card", type=amount, default=24, help="GB of the card's memory")
    add("--model", help="folder whose configurations give the sizes; None: FLUX.1-dev's")
    add(
        "--tflops",
        type=amount,
        help="of the card in bfloat16, without sparsity; None: 120, from 40 GB on 650",
    )
    add("--quantize", choices=["none", "nf4"], default="none", help="of steps 1, 3 and 4")
    add("--offload", choices=["none", "model"], default="none", help="of steps 1 and 4")
    add(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in training",
    )
    for name, default in (
        ("count", 100),
        ("panel", 512),
        ("grid_steps", 28),
        ("vlm_batch_size", 8),
        ("steps", 10_000),
        ("rank", 64),
        ("batch_size", 1),
        ("prompt_tokens", 128),
        ("validate_every", 500),
        ("pictures", 24),
        ("sample_steps", 28),
    ):
        add(f"--{name}", type=positive, default=default, help="as in the scripts")
    add(
        "--vlm_billions",
        type=amount,
        default=8.3,
        help="parameters: Qwen2.5-VL-7B has 8.3, -3B 3.8",
    )
    add("--agreement", type=amount, default=0.0, help="of step 1, as in generate_grids.py")
    for name in ("image_guidance", "text_guidance"):
        add(f"--{name}", type=amount, default=1.0, help="of validation and of step 4")
    if recipe := parser.parse_known_args(given)[0].recipe:
        parser.set_defaults(**RECIPES[recipe])
    args = parser.parse_args(given)
    if args.model and not Path(args.model).is_dir():
        raise dsd.DsdError(f"no folder {args.model}; leave --model out for FLUX.1-dev's sizes")
    args.tflops = args.tflops or (650 if args.card >= 40 else 120)
    return args


def main():
    args = parse_args()
    rows = Recipe(args).rows()
    print(
        f"Computed, not measured: a card of {args.card:g} GB, {UTILISATION:.0%} of {args.tflops:g} TFLOP/s.\n"
    )
    print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    hours, disk = (sum(row[name] for row in rows) for name in ("hours", "disk GB"))
    print(
        f"\n{hours:.1f} hours and {disk:.0f} GB of disk in all, besides downloading and loading the models."
    )


if __name__ == "__main__":
    dsd.run_main(main)
