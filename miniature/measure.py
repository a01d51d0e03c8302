"""Measures the miniature's models: `python miniature/measure.py vlm`. Prints what it finds and writes it as JSON.

vlm: verdicts on rendered pairs of held-out critters, asked by curate.py's own code in its own words. Half of the
pairs show one critter, half two that differ in one or two attributes.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import curate  # noqa: E402
import dsd  # noqa: E402
import pretrain  # noqa: E402
import world  # noqa: E402

ATTRIBUTES = {"shape": "shape", "ears": "ears", "colour": "colour", "tone": "tone", "second": "trim",
              "pattern": "pattern", "eyes": "eyes"}  # of the world -> the VLM's word for it


# ---- the VLM ---------------------------------------------------------------------------------------------------------
def held_out_change(identity, count, generator):
    """world.change_attributes, drawn again until the result is held out too and no more than `count` attributes differ."""
    changed = world.change_attributes(identity, count, generator)
    while True:
        differing = (changed != identity).sum(1)
        bad = ~world.is_held_out(world.identity_number(changed)) | (differing > count)
        if not bad.any():
            return changed
        changed[bad] = world.change_attributes(identity[bad], count[bad], generator)


def held_out_pairs(count, generator):
    """`count` pairs of panels (count, 2, 3, s, s) in uint8 and their attributes (count, 2, 10)."""
    images, attributes = pretrain.draw_pool(count, generator, held_out_change, held_out=True)
    yes = torch.arange(count) % 2 == 0
    pick = torch.randint(15, (count,), generator=generator)
    same = torch.tensor([[0, 1], [0, 2], [1, 2]])[pick % 3]
    other = torch.tensor([[0, 3], [1, 3], [0, 4], [1, 4], [2, 3]])[pick % 5]
    panel = torch.where(yes[:, None], same, other)
    rows = torch.arange(count)[:, None]
    return images[rows, panel], attributes[rows, panel]


def to_image(panel):
    """(3, s, s) in uint8 -> an RGB image."""
    return Image.fromarray(panel.permute(1, 2, 0).contiguous().numpy())


def measure_vlm(args):
    generator = torch.Generator().manual_seed(args.seed + 1_000)
    images, attributes = held_out_pairs(args.count, generator)
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
        images = pretrain.through_vae(images.flatten(0, 1), vae).view(images.shape)
    model = curate.load_vlm(args.vlm)
    cases = [[to_image(a), to_image(b)] for a, b in images]
    begun = time.time()
    answers = curate.ask(*model, cases, curate.PAIR_QUESTION, args.batch_size, 200)
    seconds = time.time() - begun
    panels = [[to_image(a)] for a in images[:200, 0]]
    truth = [row[0].tolist() for row in attributes[:200]]
    captions = curate.ask(*model, panels, curate.DESCRIBE_QUESTION, args.batch_size, 60)
    details = curate.ask(*model, panels, curate.DETAILS_QUESTION, args.batch_size, 60)
    orders = curate.ask(*model, cases[:200], curate.INSTRUCTION_QUESTION, args.batch_size, 60)
    wanted = [pretrain.instruction(*pair.tolist()) for pair in attributes[:200]]
    share = lambda said, true: sum(a == b for a, b in zip(said, true)) / len(said)  # noqa: E731
    result = verdicts(answers, attributes[:, :, :7]) | {
        "descriptions_exact": share(captions, [world.panel_caption(t[:7], t[7:]) for t in truth]),
        "details_exact": share(details, [world.details(t[:7]) for t in truth]),
        "instructions_exact": share(orders, wanted), "pairs_per_second": args.count / seconds}
    print_verdicts(result)
    return result


def verdicts(answers, identities):
    """Shares of right verdicts, in all and by the attribute that differs. identities (N, 2, 7)."""
    differs = identities[:, 0] != identities[:, 1]  # (N, 7)
    no = torch.tensor([curate.parse(a)[0] == "no" for a in answers])
    yes = torch.tensor([curate.parse(a)[0] == "yes" for a in answers])
    named = torch.tensor([[bool(re.search(rf"{word} \S+ \S+ different", a)) for word in ATTRIBUTES.values()]
                          for a in answers])  # the line "compare" says: "trim red teal different"
    negative = differs.any(1)
    mean = lambda x: round(x.float().mean().item(), 4) if len(x) else None  # noqa: E731
    table = {}
    for k, name in enumerate(ATTRIBUTES):
        only = differs[:, k] & (differs.sum(1) == 1)
        table[name] = {"pairs_differ": int(differs[:, k].sum()), "difference_seen": mean(named[differs[:, k], k]),
                       "pairs_only": int(only.sum()), "verdict_no_only": mean(no[only]),
                       "false_alarm": mean(named[~differs[:, k], k])}
    return {"pairs": len(answers), "right": mean(torch.where(negative, no, yes)), "right_yes": mean(yes[~negative]),
            "right_no": mean(no[negative]), "unparsable": mean(~(yes | no)),
            "accepted_that_are_same": mean(~negative[yes]), "by_attribute": table}


def print_verdicts(result):
    """The table for a reader."""
    print(f"right verdicts {result['right']:.1%} of {result['pairs']} pairs; same critter {result['right_yes']:.1%}, "
          f"another {result['right_no']:.1%}; unparsable {result['unparsable']:.1%}")
    print(f"{'attribute':>10} {'differs in':>10} {'seen':>6} {'only this':>10} {'verdict no':>10} {'false alarm':>11}")
    for name, row in result["by_attribute"].items():
        seen, no, alarm = ("-" if row[k] is None else f"{row[k]:.0%}"
                           for k in ("difference_seen", "verdict_no_only", "false_alarm"))
        print(f"{name:>10} {row['pairs_differ']:>10} {seen:>6} {row['pairs_only']:>10} {no:>10} {alarm:>11}")
    print({name: value for name, value in result.items() if name not in ("by_attribute", "pairs")})


# ---- command line ----------------------------------------------------------------------------------------------------
COMMANDS = {"vlm": measure_vlm}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--vlm", default=str(HERE / "vlm"))
    parser.add_argument("--count", type=int, default=600, help="pairs to ask about")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--vae", help="vlm: send the panels through this VAE folder first, as all generated panels are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/measure"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = COMMANDS[args.what](args)
    args.out.mkdir(parents=True, exist_ok=True)
    dsd.write_json(args.out / f"{args.what}.json", result)


if __name__ == "__main__":
    dsd.run(main)
