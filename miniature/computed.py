"""What FLUX.1-dev costs in arithmetic and memory, computed without running it: no GPU, no weights, a minute.

    python miniature/computed.py              # 512-pixel panels, rank 16, 64 and 512

Tensors on the meta device have a size and no content: operations are counted and allocations added up as torch would
make them. Three transformers of one or two blocks of each kind stand for the 19 and 38 of FLUX.1: both costs are linear
in them. Not in these figures: CUDA itself (about half a GB), what the allocator wastes (a few percent).
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import dsd  # noqa: E402; first: see its head

import argparse  # noqa: E402
import functools  # noqa: E402
import weakref  # noqa: E402

import torch  # noqa: E402
from diffusers import FluxTransformer2DModel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import random_models  # noqa: E402

TYPE = torch.bfloat16
BYTES = {"none": 2, "nf4": .516}  # a weight on a GPU; nf4: 4 bits, and 8 bits for each block of 64
PARAMETERS = {"transformer": 11.9e9, "text encoders": 4.9e9}  # of FLUX.1


class Memory(TorchDispatchMode):
    """`peak`: the most bytes alive at once in storages that were made within it."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def free(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)]:
            key = storage._cdata
            if key not in given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.now)
        return out


def costs(work):
    """(operations, peak bytes) of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    with Memory() as memory:
        work()
    return torch.tensor([counter.get_total_flops(), memory.peak], device="cpu", dtype=torch.float64)


def whole(cost):
    """cost(double blocks, single blocks) -> the costs of FLUX.1's 19 and 38."""
    one, double, single = cost(1, 1), cost(2, 1), cost(1, 2)
    return (one + 18 * (double - one) + 37 * (single - one)).tolist()


def transformer(double, single, rank=0):
    model = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True).to(TYPE)
    return dsd.add_lora(dsd.widen(model), rank).to(TYPE) if rank else model


def predict(model, width, height, batch=1):
    """One pass for a picture of width x height pixels and prompts of 512 tokens."""
    tokens = torch.randn(batch, width * height // 256, model.config.in_channels, dtype=TYPE)
    text = torch.randn(batch, 512, 4096, dtype=TYPE), torch.randn(batch, 768, dtype=TYPE)
    ids = torch.zeros(tokens.shape[1], 3)
    return dsd.run_transformer(model, tokens, torch.rand(batch, dtype=TYPE), text, ids, 3.5)


def training(rank, side, checkpointing=True):
    def cost(double, single):
        model = transformer(double, single, rank).train()
        if checkpointing:
            model.enable_gradient_checkpointing()

        def step():
            predict(model, 2 * side, side).float().square().mean().backward()
            model.zero_grad()
        step()
        return costs(step)
    return whole(cost)


def drawing(width, height, batch=1):
    with torch.no_grad():
        return whole(lambda *blocks: costs(
            functools.partial(predict, transformer(*blocks).eval(), width, height, batch)))


def decoding(width, height):
    vae = random_models.make_vae(random_models.FLUX_1["vae"]).to(TYPE)
    with torch.no_grad():
        return costs(lambda: vae.decode(torch.randn(1, 16, height // 8, width // 8, dtype=TYPE))).tolist()


def weights(kind, *parts):
    return sum(PARAMETERS[part] for part in parts) * BYTES[kind]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", type=int, default=512, help="side of a panel in pixels")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64, 512])
    side, ranks = parser.parse_args().panel, parser.parse_args().rank
    print("| one | TFLOP | GB, bfloat16 | GB, nf4 |\n|---|---|---|---|")

    def line(name, operations, gb):
        print(f"| {name} | {operations / 1e12:.1f} | " + " | ".join(f"{gb(kind) / 1e9:.1f}" for kind in BYTES),
              "|")

    with torch.device("meta"):
        both = ["transformer", "text encoders"]
        for name, size, passes in (("step of a grid", (2 * side, 2 * side), 1),
                                   ("step of an image", (2 * side, side), 1),
                                   ("guided step of an image", (2 * side, side), 3)):
            (operations, activations), (_, decoder) = drawing(*size, passes), decoding(*size)
            line(name, operations, lambda kind: weights(kind, *both) + max(activations, decoder))
        for rank in ranks:
            operations, activations = training(rank, side)
            count = sum(p.numel() for p in transformer(19, 38, rank).parameters() if p.requires_grad)
            # LoRA: weight and gradient of 4 bytes each, a copy of 2 for autocast, moments of 8, or 2 if quantised
            line(f"training step, rank {rank}, checkpointing", operations, lambda kind: (
                weights(kind, "transformer") + count * (18 if kind == "none" else 12) + activations + .2e9))
        operations, activations = training(ranks[0], side, checkpointing=False)
        print(f"\nWithout checkpointing a training step is {operations / 1e12:.1f} TFLOP and its activations "
              f"{activations / 1e9:.0f} GB.")


if __name__ == "__main__":
    main()
