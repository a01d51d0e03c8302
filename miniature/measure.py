"""Measures the miniature's models: `python -m miniature.measure vae`, `judge`, `vlm`, `teacher`, `looking`, ...

Each prints what it finds and writes it to runs/measure as JSON. Everything is drawn from held-out identities.

vae      how well panels survive encoding and decoding, in dB
judge    share of right answers for each attribute of a panel, as rendered, and muddled: noise on its VAE latents
vlm      verdicts on rendered pairs, asked by curate.py's own code in its own words; half of the pairs show one critter,
         half two that differ in one or two attributes; and the answers to the two scoring questions of evaluate.py
teacher  grids as generate_grids.py draws them, read by the judge: is the context as asked, do panels show one critter;
         and how often the VLM's verdict on two panels is the judge's: of all pairs, and where the judge is sure; and
         how often a second judge's verdict is
looking  whether one panel of the teacher looks at another: its loss on the right panel of two while the left one is as
         noisy, is shown without noise, or shows another critter without noise
moved    what an adapter keeps of held-out critters that stand in the reference as they are wanted, 8 pixels to a side
         of it, or in a named pose; what is asked for always stands
seen     which critters the judge finds in the pairs of --pairs; writes them into --adapter, the folder of the adapter
         that was trained on these pairs (seen.json): the evaluation leaves such references out
"""

import dsd

import argparse
import itertools
import re
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxControlPipeline, FluxPipeline
from tqdm import tqdm

import curate
import evaluate
import generate_grids
import sample
from miniature import exams, models, pretrain, vlm_data, world

NAMES = [*world.IDENTITY, *world.CONTEXT, "pose"]
VALUES = [*vlm_data.VALUES[:10], world.POSE_NAMES]
ATTRIBUTES = {
    "shape": "shape",
    "ears": "ears",
    "colour": "colour",
    "tone": "tone",
    "second": "trim",
    "pattern": "pattern",
    "eyes": "eyes",
}  # of the world -> the VLM's word for it
SURE = 0.9  # probability of each attribute of both panels from which the judge counts as sure of a pair


# ---- the VAE and the judge -------------------------------------------------------------------------------------------
def held_out_panels(count, seed):
    """`count` panels (count, 3, s, s) in [0, 1] of held-out critters in all poses, and their attributes (count, 11)."""
    generator = torch.Generator().manual_seed(seed + 2_000)
    identity = world.identity_of(world.draw_identities(count, generator, held_out=True))
    context, named = world.draw_contexts(count, generator), torch.arange(count) % len(world.POSES)
    pose = world.in_pose(world.draw_poses(count, generator), named)
    return world.render(identity, context, pose, models.PANEL), torch.cat(
        [identity, context, named[:, None]], 1
    )


@torch.inference_mode()
def measure_vae(args):
    vae = AutoencoderKL.from_pretrained(
        args.vae or dsd.MINIATURE / "flux" / "vae", torch_dtype=torch.float32
    )
    images, _ = held_out_panels(args.count, args.seed)
    errors = [
        (vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5 - x)
        .square()
        .mean()
        for x in tqdm(images.split(30), desc="panels")
    ]
    psnr = -10 * torch.stack(errors).mean().log10().item()
    print(f"{psnr:.2f} dB on {args.count} panels")
    return {"panels": args.count, "psnr_db": round(psnr, 2)}


def seen_by(judge, images):
    """What the judge sees in some images: attributes by number (N, 11)."""
    return torch.tensor(
        [
            [
                values.index(word.replace("nothing", ""))
                for values, word in zip(VALUES, row.values())
            ]
            for row in judge(images)
        ]
    )


@torch.inference_mode()
def muddled(images, vae, noise, seed):
    """Panels (N, 3, s, s) in [0, 1], decoded from latents with `noise` of the latents' own deviation added: still of
    known truth, but neither clean nor like what the judge was trained on."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for x in images.split(100):
        z = vae.encode(x * 2 - 1).latent_dist.mode()
        z = z + noise / vae.config.scaling_factor * torch.randn(z.shape, generator=generator)
        parts.append(vae.decode(z).sample.clamp(-1, 1) / 2 + 0.5)
    return torch.cat(parts)


def measure_judge(args):
    judge = exams.Judge(args.judge)
    images, attributes = held_out_panels(args.count, args.seed)
    names = [*NAMES, "all_identity", "all"]
    vae, result = (
        AutoencoderKL.from_pretrained(
            args.vae or dsd.MINIATURE / "flux" / "vae", torch_dtype=torch.float32
        ),
        {},
    )
    for name, noise in {"as rendered": 0, "muddled by 0.3": 0.3, "muddled by 0.5": 0.5}.items():
        shown = muddled(images, vae, noise, args.seed) if noise else images
        right = seen_by(judge, [exams.to_image(x) for x in shown]) == attributes
        shares = [
            *right.float().mean(0),
            right[:, :7].all(1).float().mean(),
            right.all(1).float().mean(),
        ]
        result[name] = dict(zip(names, (round(x.item(), 4) for x in shares)))
        print(f"{name}: " + ", ".join(f"{key} {share:.1%}" for key, share in result[name].items()))
    return {"panels": args.count, **result}


# ---- the teacher -----------------------------------------------------------------------------------------------------
def asked_context(prompt):
    """The context (scene, accessory, light) that a panel's prompt asks for."""
    found = [
        [
            value in prompt if value else not any(v in prompt for v in values if v)
            for value in values
        ]
        for values in world.CONTEXT.values()
    ]
    return [row.index(True) for row in found]


def asked_pose(prompt):
    """The number of the named pose that a panel's prompt asks for."""
    return next((k for k, pose in enumerate(world.POSES) if pose and f" {pose} " in prompt), 0)


def named_identity(prompt):
    """What a panel's prompt names: 7 numbers for "a round horned critter pale red with blue dots and one eye",
    2 for "a round horned critter jumping on the beach"."""
    words = prompt.split()[1:11]
    named = words[:2]
    if words[3] in world.IDENTITY["tone"]:
        tone, colour, _, second, pattern, _, eyes = words[3:]
        named += [colour, tone, second, pattern.replace("trim", "plain"), eyes]
    return [values.index(word) for values, word in zip(world.IDENTITY.values(), named)]


def measure_teacher(args):
    settings = argparse.Namespace(**dsd.folder_settings(args.model)["generate_grids"])
    settings.width = settings.height = settings.panel
    pipe = dsd.load_pipeline(FluxPipeline, args.model)
    families = ["subject", "subject", "relight"]
    grids = [
        generate_grids.grammar_prompt(settings.grammar, families, 10**9 + args.seed * 10**6 + i)
        | {"seed": 10**9 + args.seed * 10**6 + i}
        for i in range(args.count)
    ]
    panels, begun = [], time.time()
    for i in tqdm(range(0, args.count, 20), desc="batches of grids"):
        for image in generate_grids.draw_grids(pipe, grids[i : i + 20], settings):
            panels.append(dsd.cut_grid(image))
    seconds = (time.time() - begun) / args.count
    judge = exams.Judge(args.judge)
    seen = seen_by(judge, [panel for four in panels for panel in four]).view(args.count, 4, -1)
    asked = torch.tensor([[asked_context(p) for p in grid["panel_prompts"]] for grid in grids])
    named = torch.tensor([[named_identity(p) for p in grid["panel_prompts"]] for grid in grids])
    pairs = list(itertools.combinations(range(4), 2))

    def compare(
        seen,
    ):  # which of the seven attributes are equal in each pair of panels: (grids, 6, 7)
        return torch.stack([seen[:, i, :7] == seen[:, j, :7] for i, j in pairs], 1)

    equal = compare(seen)
    share = lambda x: round(x.float().mean().item(), 4)  # noqa: E731
    differing = (~equal).sum(2)
    agree = lambda pairs: (
        {  # noqa: E731; of some pairs, a mask (count, 6)
            n: share(equal[pairs][:, k]) for k, n in enumerate(world.IDENTITY)
        }
        | {
            "all": share(differing[pairs] == 0),
            "all but one": share(differing[pairs] <= 1),
            "three or more differ": share(differing[pairs] > 2),
        }
    )
    result = {
        "grids": args.count,
        "seconds_per_grid": round(seconds, 3),
        "context_right": {
            n: share(seen[..., 7 + k] == asked[..., k]) for k, n in enumerate(world.CONTEXT)
        }
        | {"all": share((seen[..., 7:10] == asked).all(-1))},
        "identity_as_named": {
            n: share(seen[..., k] == named[..., k])
            for k, n in zip(range(named.shape[-1]), world.IDENTITY)
        },
        "pairs_equal": agree(torch.ones_like(differing, dtype=torch.bool)),
    }
    pose = torch.tensor([[asked_pose(p) for p in grid["panel_prompts"]] for grid in grids])
    result["pose_right"] = {"all": share(seen[..., 10] == pose)} | {
        name: share(seen[..., 10][pose == k] == k)
        for k, name in enumerate(world.POSE_NAMES)
        if (pose == k).any()
    }
    moves = [[world.move(row[i], row[j]) for i, j in pairs] for row in pose.tolist()]
    for name in ("same pose", "moved", "turned"):
        mask = torch.tensor([[move == name for move in row] for row in moves])  # (count, 6)
        if mask.any():
            result[f"pairs_equal, {name}"] = {"pairs": int(mask.sum())} | agree(mask)
    if args.vlm:
        some = panels[:170]
        shown = [panel for four in some for panel in four]
        model, cases = (
            curate.load_vlm(args.vlm),
            [(n, i, j) for n in range(len(some)) for i, j in pairs],
        )
        answers = curate.ask(
            *model,
            [[panels[n][i], panels[n][j]] for n, i, j in cases],
            curate.PAIR_QUESTION,
            64,
            200,
        )
        sureness = judge.sureness(shown).view(-1, 4)
        sure = torch.stack([sureness[n, [i, j]].amin() >= SURE for n, i, j in cases])
        result["judge_is_sure"] = share(sure)
        equal_too = compare(seen_by(exams.Judge(args.witness), shown).view(len(some), 4, -1))
        for tolerance in (0, 1):
            said = torch.tensor([curate.parse(a, tolerance)[0] == "yes" for a in answers])
            truth = differing.flatten()[: len(cases)] <= tolerance
            result[f"vlm_tolerance_{tolerance}"] = {
                "pairs": len(cases),
                "agrees": share(said == truth),
                "accepted": share(said),
                "judge_accepts": share(truth),
                "accepted_that_judge_accepts": share(truth[said]) if said.any() else None,
                "agrees_where_judge_is_sure": share((said == truth)[sure]) if sure.any() else None,
                "judge_agrees_with_witness": share(
                    truth == ((~equal_too).sum(2).flatten() <= tolerance)
                ),
            }
    for key, value in result.items():
        print(f"{key}: {value}")
    return result


@torch.inference_mode()
def measure_looking(args):
    """Flow-matching loss on the right panel at noise level 0.97, where its colours are decided."""
    pipe, generator = (
        dsd.load_pipeline(FluxPipeline, args.model),
        torch.Generator().manual_seed(args.seed + 4_000),
    )
    number = world.draw_identities(args.count, generator, held_out=True)
    critter, other = (
        world.identity_of(number),
        world.identity_of(world.draw_namesakes(number, generator, True)),
    )
    context = torch.stack(
        [world.draw_contexts(args.count, generator) for _ in range(2)], 1
    )  # (n, 2, 3)
    named = torch.randint(len(world.POSES), (args.count, 2), generator=generator)
    left, strange, right = (
        world.render(
            who,
            context[:, side],
            world.in_pose(world.draw_poses(args.count, generator), named[:, side]),
            models.PANEL,
        )
        * 2
        - 1
        for who, side in ((critter, 0), (other, 0), (critter, 1))
    )
    captions = [
        world.sheet_caption(critter[i], context[i], (1, 2), poses=named[i].tolist())
        for i in range(args.count)
    ]
    h, w = models.PANEL // models.VAE_FACTOR, 2 * models.PANEL // models.VAE_FACTOR
    sigma, ids, losses = torch.tensor([0.97]), dsd.position_ids(h, w), {}
    moves = [world.move(*pair) for pair in named.tolist()]
    for name, shown, noise in (
        ("as noisy", left, sigma),
        ("clean", left, 0 * sigma),
        ("another", strange, 0 * sigma),
    ):
        draw, parts = torch.Generator().manual_seed(args.seed), []  # the same noise for all three
        for i in tqdm(range(0, args.count, args.batch_size), desc=name):
            some = slice(i, i + args.batch_size)
            x_0 = dsd.encode(pipe.vae, dsd.canvas(shown[some], right[some]))  # (b, N, 64)
            eps = torch.randn(x_0.shape, generator=draw)
            is_left = ids[:, 2:] < w / 4  # (N, 1): tokens are two latent pixels wide
            x = torch.where(
                is_left, dsd.interpolate(x_0, eps, noise), dsd.interpolate(x_0, eps, sigma)
            )
            text = pipe.encode_prompt(
                captions[some], captions[some], max_sequence_length=models.TOKENS[1, 2]
            )[:2]
            v = dsd.run_transformer(pipe.transformer, x, sigma.expand(len(x)), text, ids, 1.0)
            parts.append((v - dsd.velocity(x_0, eps))[:, ~is_left.flatten()].square().mean((1, 2)))
        losses[name] = torch.cat(parts)  # (n,)
    result = {name: round(loss.mean().item(), 4) for name, loss in losses.items()} | {
        f"clean, {move}": round(losses["clean"][[m == move for m in moves]].mean().item(), 4)
        for move in set(moves)
    }
    print(result)
    return {"critters": args.count, **dict(sorted(result.items()))}


# ---- the student -----------------------------------------------------------------------------------------------------
def moved_references(count, seed):
    """{how it stands: references}: `count` held-out critters each, and for each critter a prompt for another scene in
    which it stands. Returns them, the prompts and the identities."""
    generator = torch.Generator().manual_seed(seed + 3_000)
    identity = world.identity_of(world.draw_identities(count, generator, held_out=True))
    shown, asked = (world.draw_contexts(count, generator) for _ in range(2))
    asked[:, 0] = (shown[:, 0] + torch.randint(1, 8, (count,), generator=generator)) % 8
    standing = world.draw_poses(count, generator)
    poses = {"standing": standing}
    for name, x in {
        "8 pixels to the left": -0.5,
        "8 pixels to the right": 0.5,
    }.items():  # a panel is 2 wide
        poses[name] = standing * torch.tensor([1, 1, 0.92, 1]) + torch.tensor([x, 0, 0, 0])
    for k, name in list(enumerate(world.POSE_NAMES))[1:]:
        poses[name] = world.in_pose(standing, torch.full((count,), k))
    references = {
        name: [exams.to_image(x) for x in world.render(identity, shown, pose, models.PANEL)]
        for name, pose in poses.items()
    }
    return references, [world.panel_caption(*row) for row in zip(identity, asked)], identity


def measure_moved(args):
    facts = dsd.adapter_facts(args.adapter)
    pipe = dsd.load_pipeline(
        FluxControlPipeline,
        args.model,
        adapter=args.adapter,
        prompt_tokens=facts["prompt_tokens"],
    )
    options = argparse.Namespace(
        **{"unguided_steps": 2} | dsd.folder_settings(args.model, "sample") | facts
    )
    references, prompts, identity = moved_references(args.count, args.seed)
    judge, result = exams.Judge(args.judge), {}
    for name, images in references.items():
        drawn = []
        for i in tqdm(range(0, args.count, 16), desc=name):
            seeds = range(i, min(i + 16, args.count))
            drawn += sample.draw_pictures(
                pipe, images[i : i + 16], prompts[i : i + 16], seeds, options, facts["frames"]
            )
        kept = (seen_by(judge, drawn)[:, :7] == identity).double()  # (count, 7)
        result[name] = {
            "cp": evaluate.bootstrap(kept.mean(1).tolist(), list(range(args.count))),
            "all kept": kept.all(1).double().mean().item(),
            "main colour": kept[:, 2].mean().item(),
        }
        print(f"{name}: {result[name]}")
    return {"critters": args.count, **result}


def measure_seen(args):
    records = dsd.read_records(
        args.pairs / "metadata.jsonl", "reference_file_name", "target_file_name"
    )
    files = sorted(
        {record[name] for record in records for name in ("reference_file_name", "target_file_name")}
    )
    found = seen_by(exams.Judge(args.judge), [dsd.open_image(args.pairs / file) for file in files])[
        :, :7
    ]
    found = found[
        found[:, 2] != found[:, 4]
    ]  # no critter has one colour twice, though the judge may see it so
    identities = sorted(set(world.identity_number(found).tolist()))
    held_out = world.is_held_out(torch.tensor(identities)).sum().item()
    dsd.write_json(Path(args.adapter) / "seen.json", {"identities": identities})
    print(
        f"{len(identities)} critters in {len(files)} pictures, {held_out} of them of the held-out side"
    )
    return {"pictures": len(files), "identities": len(identities), "held_out": held_out}


# ---- the VLM ---------------------------------------------------------------------------------------------------------
def held_out_change(identity, count, generator):
    """world.change_attributes, drawn again until the result is held out too. A few identities have no held-out
    neighbour at one attribute's distance: after 300 draws two attributes change."""
    changed, tries = world.change_attributes(identity, count, generator), 0
    while (bad := ~world.is_held_out(world.identity_number(changed))).any():
        tries += 1
        number = count[bad] if tries < 300 else count[bad].clamp(min=2)
        changed[bad] = world.change_attributes(identity[bad], number, generator)
    return changed


def held_out_pairs(count, generator):
    """`count` pairs of panels (count, 2, 3, s, s) in uint8 and their attributes (count, 2, 11)."""
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
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
        images = pretrain.through_vae(images.flatten(0, 1), vae).view(images.shape)
    model = curate.load_vlm(args.vlm)
    cases = [[exams.to_image(a / 255), exams.to_image(b / 255)] for a, b in images]
    begun = time.time()
    answers = curate.ask(*model, cases, curate.PAIR_QUESTION, args.batch_size, 200)
    seconds = time.time() - begun
    panels = [[exams.to_image(a / 255)] for a in images[:200, 0]]
    truth = [row[0].tolist() for row in attributes[:200]]
    moves = [world.move(*pair) for pair in attributes[:, :, 10].tolist()]
    captions = curate.ask(*model, panels, curate.DESCRIBE_QUESTION, args.batch_size, 60)
    details = curate.ask(*model, panels, curate.DETAILS_QUESTION, args.batch_size, 60)
    orders = curate.ask(*model, cases[:200], curate.INSTRUCTION_QUESTION, args.batch_size, 60)
    wanted = [vlm_data.instruction(*pair.tolist()) for pair in attributes[:200]]
    kept = 1 - (attributes[:200, 0, :7] != attributes[:200, 1, :7]).sum(1) / 4
    subject = curate.ask(*model, cases[:200], exams.SUBJECT_SCORE_QUESTION, args.batch_size, 200)
    asked = [
        vlm_data.panel_lesson(row, 1.0, generator) for row in attributes[:200, 0].tolist()
    ]  # prompts right in part
    prompt = curate.ask(*model, panels, [question for question, _ in asked], args.batch_size, 100)
    share = lambda said, true: sum(a == b for a, b in zip(said, true)) / len(said)  # noqa: E731
    scores = lambda answers: [exams.parse_score(answer) for answer in answers]  # noqa: E731
    result = verdicts(answers, attributes[:, :, :7]) | {
        "descriptions_exact": share(captions, [vlm_data.caption(t) for t in truth]),
        "details_exact": share(details, [world.details(t[:7]) for t in truth]),
        "instructions_exact": share(orders, wanted),
        "subject_scores_exact": share(scores(subject), kept.tolist()),
        "prompt_scores_exact": share(scores(prompt), scores([answer for _, answer in asked])),
        "pairs_per_second": args.count / seconds,
    }
    for name in ("same pose", "moved", "turned"):
        some = [k for k, move in enumerate(moves) if move == name]
        right = verdicts([answers[k] for k in some], attributes[some, :, :7])
        result[name] = {key: right[key] for key in ("pairs", "right", "right_yes", "right_no")}
    print_verdicts(result)
    return result


def verdicts(answers, identities):
    """Shares of right verdicts, in all and by the attribute that differs. identities (N, 2, 7)."""
    differs = identities[:, 0] != identities[:, 1]  # (N, 7)
    no = torch.tensor([curate.parse(a)[0] == "no" for a in answers])
    yes = torch.tensor([curate.parse(a)[0] == "yes" for a in answers])
    named = torch.tensor(
        [
            [bool(re.search(rf"{word} \S+ \S+ different", a)) for word in ATTRIBUTES.values()]
            for a in answers
        ]
    )  # the line "compare" says: "trim red teal different"
    negative = differs.any(1)
    mean = lambda x: round(x.float().mean().item(), 4) if len(x) else None  # noqa: E731
    table = {}
    for k, name in enumerate(ATTRIBUTES):
        only = differs[:, k] & (differs.sum(1) == 1)
        table[name] = {
            "pairs_differ": int(differs[:, k].sum()),
            "difference_seen": mean(named[differs[:, k], k]),
            "pairs_only": int(only.sum()),
            "verdict_no_only": mean(no[only]),
            "false_alarm": mean(named[~differs[:, k], k]),
        }
    return {
        "pairs": len(answers),
        "right": mean(torch.where(negative, no, yes)),
        "right_yes": mean(yes[~negative]),
        "right_no": mean(no[negative]),
        "unparsable": mean(~(yes | no)),
        "accepted_that_are_same": mean(~negative[yes]),
        "by_attribute": table,
    }


def print_verdicts(result):
    """The table for a reader."""
    print(
        f"right verdicts {result['right']:.1%} of {result['pairs']} pairs; same critter {result['right_yes']:.1%}, "
        f"another {result['right_no']:.1%}; unparsable {result['unparsable']:.1%}"
    )
    print(
        f"{'attribute':>10} {'differs in':>10} {'seen':>6} {'only this':>10} {'verdict no':>10} {'false alarm':>11}"
    )
    for name, row in result["by_attribute"].items():
        seen, no, alarm = (
            "-" if row[k] is None else f"{row[k]:.0%}"
            for k in ("difference_seen", "verdict_no_only", "false_alarm")
        )
        print(
            f"{name:>10} {row['pairs_differ']:>10} {seen:>6} {row['pairs_only']:>10} {no:>10} {alarm:>11}"
        )
    print({name: value for name, value in result.items() if name not in ("by_attribute", "pairs")})


# ---- command line ----------------------------------------------------------------------------------------------------
COMMANDS = {
    "vae": measure_vae,
    "judge": measure_judge,
    "vlm": measure_vlm,
    "teacher": measure_teacher,
    "looking": measure_looking,
    "moved": measure_moved,
    "seen": measure_seen,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument(
        "--vlm", default=str(dsd.MINIATURE / "vlm"), help='"" measures the teacher without it'
    )
    parser.add_argument("--model", default=str(dsd.MINIATURE / "flux"), help="the teacher's folder")
    parser.add_argument("--judge", default=str(dsd.MINIATURE / "judge"))
    parser.add_argument(
        "--witness",
        default=str(dsd.MINIATURE / "witness"),
        help="teacher: a second judge; a VLM cannot "
        "be expected to agree with the first more than this one does",
    )
    parser.add_argument(
        "--adapter",
        default=str(dsd.MINIATURE / "adapter"),
        help="moved, seen: the adapter's folder",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        default=Path("runs/pairs"),
        help="seen: what the adapter was trained on",
    )
    parser.add_argument("--count", type=int, default=600, help="panels, pairs or grids")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--vae", help="the VAE (default: the teacher's); vlm: send the panels through it first"
    )
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
    dsd.run_main(main)
