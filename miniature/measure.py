"""Measures the miniature's models: `python -m miniature.measure vae`, `judge`, `vlm`, ...

Each prints what it finds and writes it to runs/measure as JSON. Everything is drawn from held-out
identities, but for the teacher's grids, in which it chooses the critters itself.

vae      how well panels survive encoding and decoding, in dB
judge    share of right answers for each attribute of a rendered panel
vlm      verdicts on rendered pairs, asked by curate.py's own code in its own words: half of the
         pairs show one critter, half two that differ in one or two attributes
teacher  the grids that generate_grids.py drew (--grids), read by the judge: is the context as
         asked, do panels of a grid show one critter, and grids different ones; and is the VLM's
         verdict on two panels the judge's, and a second judge's
seen     which critters the judge finds in the pairs of --pairs; written into --adapter, the folder
         of the adapter that was trained on them (seen.json): the evaluation leaves those out
"""

import dsd

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

import curate
from miniature import exams, models, pretrain, vlm_data, world

COLOUR, SECOND, POSE = (world.COLUMN[name] for name in ("colour", "second", "pose"))
MOVES = ["same pose", "moved", "turned"]  # from one panel to the other, see world.move
ASKED = dict(list(world.IDENTITY.items())[: world.NAMED])  # what prompts tell
ASKED |= world.CONTEXT | {"pose": list(world.POSES)}


def share(truths):
    """The share of true ones, or None of none."""
    return round(truths.float().mean().item(), 4) if truths.numel() else None


def identity(attributes):
    """The columns of the identity of (..., columns)."""
    return attributes[..., : world.N_IDENTITY]


# ---- the VAE and the judge -----------------------------------------------------------------------
def held_out_panels(count, seed):
    """`count` panels (count, 3, s, s) in [0, 1] of held-out critters in all poses, and their
    attributes (count, columns)."""
    generator = torch.Generator().manual_seed(seed + 2_000)
    critters = world.identity_of(world.draw_identities(count, generator, held_out=True))
    context = world.draw_contexts(count, generator)
    named = torch.arange(count) % len(world.POSES)
    pose = world.in_pose(world.draw_poses(count, generator), named)
    panels = world.render(critters, context, pose, models.PANEL)
    return panels, torch.cat([critters, context, named[:, None]], 1)


@torch.inference_mode()
def measure_vae(args):
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
    images, _ = held_out_panels(args.count, args.seed)
    errors = []
    for x in tqdm(images.split(30), desc="panels"):
        y = vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5
        errors.append((y - x).square().mean())
    psnr = -10 * torch.stack(errors).mean().log10().item()
    return {"panels": args.count, "psnr_db": round(psnr, 2)}


def seen_by(judge, images):
    """What the judge sees in some images: attributes by number (N, columns)."""
    values = [*vlm_data.VALUES[:POSE], world.POSE_NAMES]
    rows = []
    for seen in judge(images):
        words = [word.replace("nothing", "") for word in seen.values()]
        rows.append([known.index(word) for known, word in zip(values, words)])
    return torch.tensor(rows)


def measure_judge(args):
    images, attributes = held_out_panels(args.count, args.seed)
    seen = seen_by(exams.Judge(args.judge), [exams.to_image(x) for x in images])
    right = seen == attributes
    result = {"panels": args.count}
    result |= {name: share(right[:, column]) for name, column in world.COLUMN.items()}
    return result | {"all_identity": share(identity(right).all(1)), "all": share(right.all(1))}


# ---- the teacher ---------------------------------------------------------------------------------
def asked_for(prompt):
    """What a grid's prompt asks for in each panel, by number: a list of {attribute: number}."""
    head, panels = prompt.split(": ")
    asked = []
    for panel in panels.split(", "):
        text, numbers = f" {head} {panel} ", {}
        for name, values in ASKED.items():
            told = [k for k, value in enumerate(values) if value and f" {value} " in text]
            numbers[name] = told[0] if told else values.index("")
        asked.append(numbers)
    return asked


def agreement(equal):
    """Of pairs of panels, from which attributes are equal (N, N_IDENTITY)."""
    differing = (~equal).sum(1)
    result = {"pairs": len(equal)}
    result |= {name: share(equal[:, k]) for k, name in enumerate(world.IDENTITY)}
    return result | {
        "all": share(differing == 0),
        "all but one": share(differing <= 1),
        "three or more differ": share(differing > 2),
    }


def variety(critters):
    """How much critters (grids, panels, N_IDENTITY) of different grids differ, since guidance
    narrows what is drawn.

    values: how many of each attribute are shown, as the exponential of the entropy. equal: the
    share of attributes that are equal in two panels of different grids, 0.183 by chance."""
    grids, panels, attributes = critters.shape
    values, equal = {}, 0
    for k, (name, known) in enumerate(world.IDENTITY.items()):
        shown = F.one_hot(critters[..., k], len(known)).sum(1).double()  # (grids, values): panels
        shares = shown.mean(0) / panels
        values[name] = round(torch.special.entr(shares).sum().exp().item(), 2)
        equal += (shown.sum(0).square().sum() - shown.square().sum()).item()
    pairs = grids * (grids - 1) * panels**2  # of panels of different grids
    return {"values": values, "equal": round(equal / max(pairs, 1) / attributes, 4)}


def measure_teacher(args):
    grids = dsd.read_records(args.grids / "grids.jsonl", "file")[: args.count]
    panels = [dsd.cut_grid(dsd.open_image(args.grids / grid["file"])) for grid in grids]
    judge = exams.Judge(args.judge)
    seen = seen_by(judge, [panel for four in panels for panel in four]).view(len(grids), 4, -1)
    asked = [asked_for(grid["prompt"]) for grid in grids]
    result = {"grids": len(grids), "as_asked": {}}
    for name in ASKED:
        numbers = torch.tensor([[panel[name] for panel in four] for four in asked])
        result["as_asked"][name] = share(seen[..., world.COLUMN[name]] == numbers)

    result["variety"] = variety(identity(seen))
    pairs = list(itertools.combinations(range(4), 2))
    left, right = (identity(seen[:, [pair[side] for pair in pairs]]) for side in (0, 1))
    equal = (left == right).flatten(0, 1)  # (grids * 6, N_IDENTITY)
    result["pairs_equal"] = agreement(equal)
    moves = [world.move(four[i]["pose"], four[j]["pose"]) for four in asked for i, j in pairs]
    for name in MOVES:
        result[f"pairs_equal, {name}"] = agreement(equal[[move == name for move in moves]])
    if args.vlm:
        result["vlm"] = measure_curation(args, panels[:170], pairs, equal)
    return result


def measure_curation(args, panels, pairs, equal):
    """How often the VLM's verdict on a pair is the judge's, and the judge's a second judge's."""
    cases = [[four[i], four[j]] for four in panels for i, j in pairs]
    answers = curate.ask(*curate.load_vlm(args.vlm), cases, curate.PAIR_QUESTION, 64, 200)
    said = torch.tensor([curate.parse(answer)[0] == "yes" for answer in answers])
    judged = equal[: len(cases)].all(1)
    witness = exams.Judge(args.witness)
    seen = [identity(seen_by(witness, images)) for images in zip(*cases)]
    return {
        "pairs": len(cases),
        "agrees": share(said == judged),
        "accepted": share(said),
        "judge_accepts": share(judged),
        "accepted_that_judge_accepts": share(judged[said]),
        "judge_agrees_with_witness": share(judged == (seen[0] == seen[1]).all(1)),
    }


# ---- the student ---------------------------------------------------------------------------------
def measure_seen(args):
    names = "reference_file_name", "target_file_name"
    records = dsd.read_records(args.pairs / "metadata.jsonl", *names)
    files = sorted({record[name] for record in records for name in names})
    images = [dsd.open_image(args.pairs / file) for file in files]
    found = identity(seen_by(exams.Judge(args.judge), images))
    found = found[found[:, COLOUR] != found[:, SECOND]]  # no critter has one colour twice
    identities = sorted(set(world.identity_number(found).tolist()))
    held_out = world.is_held_out(torch.tensor(identities)).sum().item()
    dsd.write_json(Path(args.adapter) / "seen.json", {"identities": identities})
    return {"pictures": len(files), "identities": len(identities), "held_out": held_out}


# ---- the VLM -------------------------------------------------------------------------------------
def held_out_change(critters, count, generator):
    """world.change_attributes, drawn again until the result is held out too. A few identities have
    no held-out neighbour at one attribute's distance: after 300 draws two attributes change."""
    changed = world.change_attributes(critters, count, generator)
    for tries in itertools.count(1):
        bad = ~world.is_held_out(world.identity_number(changed))
        if not bad.any():
            return changed
        number = count[bad] if tries < 300 else count[bad].clamp(min=2)
        changed[bad] = world.change_attributes(critters[bad], number, generator)


def held_out_pairs(count, generator):
    """`count` pairs of panels (count, 2, 3, s, s) in uint8, attributes (count, 2, columns)."""
    images, attributes = vlm_data.draw_pool(count, generator, held_out_change, held_out=True)
    yes = torch.arange(count) % 2 == 0
    pick = torch.randint(15, (count,), generator=generator)
    same = torch.tensor([[0, 1], [0, 2], [1, 2]])[pick % 3]
    other = torch.tensor([[0, 3], [1, 3], [0, 4], [1, 4], [2, 3]])[pick % 5]
    panel = torch.where(yes[:, None], same, other)
    rows = torch.arange(count)[:, None]
    return images[rows, panel], attributes[rows, panel]


def measure_vlm(args):
    generator = torch.Generator().manual_seed(args.seed + 1_000)
    images, attributes = held_out_pairs(args.count, generator)
    if args.through_vae:
        vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
        images = pretrain.through_vae(images.flatten(0, 1), vae).view(images.shape)
    vlm = curate.load_vlm(args.vlm)
    pairs = [[exams.to_image(a / 255), exams.to_image(b / 255)] for a, b in images]
    answers = curate.ask(*vlm, pairs, curate.PAIR_QUESTION, args.batch_size, 200)
    result = verdicts(answers, identity(attributes))
    moves = [world.move(*pair) for pair in attributes[..., POSE].tolist()]
    for name in MOVES:
        some = [k for k, move in enumerate(moves) if move == name]
        right = verdicts([answers[k] for k in some], identity(attributes[some]))
        result[name] = {key: right[key] for key in ("pairs", "right", "right_yes", "right_no")}
    return result


def verdicts(answers, identities):
    """Shares of right verdicts. identities (N, 2, N_IDENTITY)."""
    differs = identities[:, 0] != identities[:, 1]  # (N, N_IDENTITY)
    no = torch.tensor([curate.parse(answer)[0] == "no" for answer in answers])
    yes = torch.tensor([curate.parse(answer)[0] == "yes" for answer in answers])
    negative = differs.any(1)
    return {
        "pairs": len(answers),
        "right": share(torch.where(negative, no, yes)),
        "right_yes": share(yes[~negative]),
        "right_no": share(no[negative]),
        "unparsable": share(~(yes | no)),
        "accepted_that_are_same": share(~negative[yes]),
    }


# ---- command line --------------------------------------------------------------------------------
COMMANDS = {
    "vae": measure_vae,
    "judge": measure_judge,
    "vlm": measure_vlm,
    "teacher": measure_teacher,
    "seen": measure_seen,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=dsd.HelpFormatter)
    add = parser.add_argument
    add("what", choices=COMMANDS)
    home = dsd.MINIATURE
    add("--vlm", default=str(home / "vlm"), help='the VLM; teacher: "" measures without it')
    add("--judge", default=home / "judge", help="the judge")
    add("--witness", default=home / "witness", help="teacher: a second judge")
    add("--adapter", default=home / "adapter", help="seen: the adapter's folder")
    add("--vae", default=home / "flux" / "vae", help="the VAE")
    add("--through_vae", action="store_true", help="vlm: send the panels through the VAE first")
    add("--grids", type=Path, default=Path("runs/grids"), help="teacher: what it drew")
    add("--pairs", type=Path, default=Path("runs/pairs"), help="seen: what it learned from")
    add("--count", type=int, default=600, help="panels, pairs or grids")
    add("--batch_size", type=int, default=64, help="vlm: pairs asked about together")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--out", type=Path, default=Path("runs/measure"), help="folder of the JSON files")
    args = parser.parse_args()
    result = COMMANDS[args.what](args)
    for key, value in result.items():
        print(f"{key}: {value}")
    args.out.mkdir(parents=True, exist_ok=True)
    dsd.write_json(args.out / f"{args.what}.json", result)


if __name__ == "__main__":
    dsd.run_main(main)
