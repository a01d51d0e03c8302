"""Memory and time of everything but the models, at 1,000 and at 100,000 synthetic records, each in a fresh process.

    python tests/scale.py          # a few minutes; a line a step: seconds a thousand records, peak memory

grids: the plan is made, recorded batch by batch, and compared on the way back, as a resumed run does. curation: the whole
of curate.py with a model that answers at once. training: batches drawn from a cache of so many pairs.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import curate  # noqa: E402
import dsd  # noqa: E402
import finetune  # noqa: E402
import generate_grids  # noqa: E402

ANSWER = "subject: a fox\nimage 1: a red fox, {0}\nimage 2: a red fox, {0}\ncompare: fur same, eyes same\nverdict: yes"


def planned(count):
    with unittest.mock.patch("sys.argv", ["generate_grids", "--model", "FLUX.1-dev", "--count", str(count)]):
        args, settings = generate_grids.parse_args()
    return generate_grids.plan(args, settings, None)


def grids(count, folder):
    plan, path = planned(count), folder / "grids.jsonl"
    for i in range(0, count, 100):
        dsd.append_records(path, plan[i:i + 100])
    assert dsd.read_records(path) == plan


def curation(count, folder):
    """All pairs of count / 6 grids."""
    dsd.write_records(folder / "grids.jsonl", planned(count // 6))
    panel = Image.new("RGB", (8, 8))
    with unittest.mock.patch.multiple(
            curate, load_vlm=lambda *args: (None, None), cut=lambda *args: [panel] * 4,
            ask=lambda model, processor, cases, *rest: [ANSWER.format("painted in oil " * 20)] * len(cases)), \
            unittest.mock.patch("dsd.open_image", lambda path: panel), \
            unittest.mock.patch("sys.argv", ["curate", "--grids", str(folder), "--out", str(folder / "pairs")]):
        curate.main()
    assert len(dsd.read_records(folder / "pairs" / "metadata.jsonl")) == 2 * (count // 6 * 6)


def training(count, folder):
    dsd.write_records(folder / "metadata.jsonl", (
        {"reference_file_name": f"{i}_0.png", "target_file_name": f"{i}_1.png", "prompt": f"a fox, number {i}"}
        for i in range(count)))
    pairs, shard = finetune.read_pairs(folder), finetune.SHARD
    latents, text = torch.zeros(shard, 8, 64, dtype=torch.bfloat16), torch.zeros(shard, 4, 16, dtype=torch.bfloat16)
    for start in range(0, count, shard):
        save_file({"x_0": latents, "condition": latents.clone(), "embeds": text, "pooled": text[:, 0].clone(),
                   "prompt": torch.arange(shard)}, folder / f"{start:08d}.safetensors")
    cache, null_text = finetune.Cache(folder, pairs), (text[:1], text[:1, 0])
    settings = {"batch_size": 16, "seed": 0, "shift": 3.0, "condition_dropout": .1, "prompt_dropout": .1}
    accelerator = Accelerator(cpu=True)
    for step in range(50):
        finetune.draw(cache, null_text, settings, step, 0, accelerator)


def main():
    if len(sys.argv) == 3:  # the process that does one step
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            globals()[sys.argv[1]](int(sys.argv[2]), Path(folder))
            seconds = time.perf_counter() - begun
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))
        return
    print("| | seconds a thousand, of 1,000 | of 100,000 | peak MB, 1,000 | 100,000 |\n|---|---|---|---|---|", flush=True)
    for step in ("grids", "curation", "training"):
        (few, small), (many, large) = (json.loads(subprocess.run(
            [sys.executable, __file__, step, str(count)], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]) for count in (1000, 100_000))
        print(f"| {step} | {few:.2f} | {many / 100:.2f} | {small:.0f} | {large:.0f} |", flush=True)


if __name__ == "__main__":
    main()
