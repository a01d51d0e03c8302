"""Step 2 (paper section 3.2): a vision-language model keeps the pairs that show one and the same subject.

The grids of step 1 are cut into panels, and the panels are paired. A vision-language model (VLM) is asked about each
pair in a chain of thought: name the common subject, describe it in each image, compare part by part, then give a
one-word verdict. The targets of accepted pairs are captioned.

    python curate.py                                                   # the miniature: seconds to minutes on a CPU
    python curate.py --vlm Qwen/Qwen2.5-VL-7B-Instruct --batch_size 8  # a real VLM on a GPU of 24 GB or more

Reads runs/grids/grids.jsonl and writes to runs/pairs (--out):
    images/            the panels: `000012_1.png` is panel 1 of grid 12
    metadata.jsonl     a line for each accepted ordered pair; `load_dataset("imagefolder", data_dir=...)` reads it
    transcripts/       a file for each grid: question, answer, verdict and reason of its six pairs
    summary.json       counts and the accept rate, by family
    accepted.png, rejected.png   contact sheets with the reason below each pair: look at both before you train
Started again after an interruption, the same command asks only about batches that are not complete. To overrule the
curator, change "verdict" in a file of transcripts/ to "yes" or "no" and run the same command again.
"""

import dsd

import collections
import itertools
import random
import re
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import ImageChops, ImageStat
from transformers import AutoModelForImageTextToText, AutoProcessor

# ---- the questions ---------------------------------------------------------------------------------------------------
PAIR_QUESTION = (
    "Do both images show the identical subject? Ignore place, pose, light and outfit. Answer in five lines. "
    "subject: name it. image 1: describe it in detail. image 2: describe it in detail. "
    "compare: part by part, same or different. verdict: yes or no."
)
EXAMPLE = """ For example:
subject: a fox
image 1: a red fox with a white tail
image 2: a red fox with a black tail
compare: fur same, ears same, tail different
verdict: no"""
DESCRIBE_QUESTION = (
    "Describe this image in one line: what it shows, where, in which light, with what outfit."
)
INSTRUCTION_QUESTION = "Write one instruction that turns the first image into the second."
DETAILS_QUESTION = "Name the colours, markings and eyes of the subject in a few words."


# ---- asking ----------------------------------------------------------------------------------------------------------
def load_vlm(name, quantize="none"):
    """The model and the processor of an image-text-to-text folder or hub name."""
    dsd.check_here(name)
    with dsd.explained(f"cannot load {name} as a vision-language model with a chat template"):
        processor = AutoProcessor.from_pretrained(name)
        vlm = dsd.load_language_model(AutoModelForImageTextToText, name, quantize)
        processor.tokenizer.padding_side = (
            "left"  # so that every answer starts where its question ends
        )
        processor.apply_chat_template(
            conversation(1, "?"), add_generation_prompt=True
        )  # is there one?
    return vlm, processor


def conversation(images, question):
    """One user message: places for this many images, then the question."""
    return [
        {
            "role": "user",
            "content": [{"type": "image"}] * images + [{"type": "text", "text": question}],
        }
    ]


@torch.inference_mode()
def ask(vlm, processor, cases, question, batch_size, max_new_tokens):
    """Ask a question (or a list of one for each case) about cases, which are lists of images; decoding is greedy.

    Returns the answers. One that reached max_new_tokens ends with TRUNCATED."""
    questions, answers = [question] * len(cases) if isinstance(question, str) else question, []
    for i in range(0, len(cases), batch_size):
        part = cases[i : i + batch_size]
        texts = [
            processor.apply_chat_template(
                conversation(len(images), text), add_generation_prompt=True
            )
            for images, text in zip(part, questions[i : i + batch_size])
        ]
        inputs = processor(text=texts, images=part, padding=True, return_tensors="pt").to(
            vlm.device, vlm.dtype
        )
        tokens = vlm.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0
        )
        tokens = tokens[:, inputs["input_ids"].shape[1] :]  # (B, answer)
        ended = torch.isin(
            tokens, torch.tensor(vlm.generation_config.eos_token_id, device=tokens.device)
        ).any(1)
        answers += [
            text.strip() if end else f"{text.strip()} {TRUNCATED}"
            for text, end in zip(processor.batch_decode(tokens, skip_special_tokens=True), ended)
        ]
    return answers


# ---- understanding the answer ----------------------------------------------------------------------------------------
STEPS = ["subject", "image 1", "image 2", "compare", "verdict"]
TRUNCATED = "[truncated]"
VERDICTS = {"yes", "no", "unparsable", "truncated", "blank", "copies"}
# A step's heading as chat models write it, such as "**Step 3. Image 2** (detail):", and a verdict of one word.
HEAD = r"[\s>#*_`\-•]*(?:(?:step )?\d[.):])?[\s*_`]*({})[ *_`]*(?:\([^)\n]*\)[ *_]*)?(?:[:：][ *_]*|$)".format(
    "|".join([*STEPS, "comparison"])
)
WORD = (
    r"(?i)\W*(yes|no)\b(?!\W*(?:(?:or|and)\W*(?:yes|no)\b|(?:yes|no)\b(?! \w)))"  # not "yes, no."
)


def parse(answer, tolerance=0):
    """(verdict, reason) of an answer: "yes", "no", "truncated", or "unparsable" unless the five steps stand in order.

    * Strict on purpose: a model that skips a step has not compared, and a verdict before the comparison is a guess.
    What a step says may span lines and carry marks of lists and headings. With a tolerance, a "no" becomes a "yes" if
    the comparison names at most this many differing parts."""
    if answer.endswith(TRUNCATED):
        return "truncated", "truncated: the answer reached --max_new_tokens"
    for start in "^", r"(?:^|(?<=[\s.;,]))":  # a line for each step, else several in one line
        _, *found = re.split(f"(?im){start}{HEAD}", answer)
        steps = [step.lower().replace("comparison", "compare") for step in found[::2]]
        if steps == STEPS:
            break
    said = [text.strip(" \n*_`") for text in found[1::2]]
    word = re.match(WORD, said[-1]) if said else None
    if steps != STEPS or not all(said) or not word:
        return "unparsable", "unparsable: not the five steps with one yes or no at the end"
    verdict, parts = word[1].lower(), [part.strip(" -*") for part in re.split(r"[,.;\n]", said[3])]
    differing = [
        part
        for part in parts
        if re.search(r"(?i)\bdiffer|\bin one\b.*\bother\b", part)
        and not re.search(r"(?i)\b(not|no|nothing)\b|n't\b", part)
    ]
    reason = f"{verdict}: {said[0] if verdict == 'yes' else ', '.join(differing) or said[3]}"
    if verdict == "no" and 0 < len(differing) <= tolerance:
        return "yes", f"tolerated {reason}"
    return verdict, reason


def set_aside(a, b):
    """Verdict and reason for a pair not worth asking about: a blank panel, or two copies of a picture. Else None."""
    if min(max(ImageStat.Stat(panel).stddev) for panel in (a, b)) < 2:  # grey levels
        return "blank", "blank: a panel of one colour"
    if max(ImageStat.Stat(ImageChops.difference(a, b)).mean) < 2:
        return "copies", "copies: nearly the same picture twice, which teaches copying"
    return None


# ---- one batch of grids ----------------------------------------------------------------------------------------------
def panel_file(number, panel):
    return f"images/{number:06d}_{panel}.png"


def judge_pairs(grids, panels, model, args):
    """Transcripts of all pairs of some grids. grids: {number: record}; panels: {number: images}.

    * The question is symmetric: each two panels are asked about once, and an accepted answer gives both orders."""
    records = [
        {
            "grid": n,
            "panels": [i, j],
            "family": grid["family"],
            "subject": grid["subject"],
            "prompt": grid["prompt"],
            "captions": {},
            "question": PAIR_QUESTION + args.example,
            "answer": "",
        }
        for n, grid in grids.items()
        for i, j in itertools.combinations(range(len(panels[n])), 2)
    ]
    for r in records:
        r["verdict"], r["reason"] = set_aside(*[panels[r["grid"]][k] for k in r["panels"]]) or (
            "",
            "",
        )
    asked = [r for r in records if not r["verdict"]]
    cases = [[panels[r["grid"]][k] for k in r["panels"]] for r in asked]
    for r, answer in zip(
        asked,
        ask(*model, cases, PAIR_QUESTION + args.example, args.batch_size, args.max_new_tokens),
    ):
        r["answer"], (r["verdict"], r["reason"]) = answer, parse(answer, args.tolerance)
    return records


def caption_pairs(records, panels, model, args):
    """Caption accepted records in place: {target: its description, or how to turn the reference into it}."""

    def shown(a, b):  # a description needs the target only
        return (a, b) if args.caption == "instruction" else (b,)

    accepted = [r for r in records if r["verdict"] == "yes" and not r["captions"]]
    cases = sorted(
        {(r["grid"], shown(a, b)) for r in accepted for a, b in itertools.permutations(r["panels"])}
    )
    question = {"description": DESCRIBE_QUESTION, "instruction": INSTRUCTION_QUESTION}[args.caption]
    answers = ask(
        *model, [[panels[n][k] for k in seen] for n, seen in cases], question, args.batch_size, 100
    )
    texts = {
        case: " ".join(answer.removesuffix(TRUNCATED).split())
        for case, answer in zip(cases, answers)
    }
    for r in accepted:
        r["captions"] = {
            str(b): texts[r["grid"], shown(a, b)] for a, b in itertools.permutations(r["panels"])
        }


def transcript(number, grid, args):
    """The saved transcripts of one grid, or [] if there are none or they belong to another picture."""
    file = args.out / f"transcripts/{number:06d}.json"
    found = dsd.read_json(file)
    if not found or found.get("picture") != dsd.digest(args.grids / grid["file"]):
        return []
    with dsd.explained(f"{file}: not a transcript; correct it or delete it"):
        for r in found["pairs"]:
            if r["verdict"] not in VERDICTS:
                raise ValueError(f'"verdict" must be "yes" or "no", not {r["verdict"]!r}')
            if type(r["captions"]) is not dict or not {
                "panels",
                "reason",
                "family",
                "subject",
            } <= set(r):
                raise ValueError("a pair without captions, panels, reason, family or subject")
        return found["pairs"]


def is_done(number, grid, args):
    """Whether all pairs of a grid have been asked about, and the accepted ones captioned."""
    records = transcript(number, grid, args)
    return bool(records) and all(r["captions"] for r in records if r["verdict"] == "yes")


def curate_batch(batch, model, args):
    """Write the panels and the transcripts of a batch {number: grid}, asking about the pairs if one has none yet."""
    panels = {
        n: dsd.cut_grid(dsd.open_image(args.grids / grid["file"]), grid["rows"], grid["columns"])
        for n, grid in batch.items()
    }
    for n, k in ((n, k) for n in batch for k in range(len(panels[n]))):
        dsd.save_image(panels[n][k], args.out / panel_file(n, k))
    old = {n: transcript(n, grid, args) for n, grid in batch.items()}
    new = (
        [] if all(old.values()) else judge_pairs(batch, panels, model, args)
    )  # whole batches give the same answers
    records = {n: old[n] or [r for r in new if r["grid"] == n] for n in batch}
    caption_pairs([r for n in batch for r in records[n]], panels, model, args)
    for n, grid in batch.items():
        dsd.write_json(
            args.out / f"transcripts/{n:06d}.json",
            {"picture": dsd.digest(args.grids / grid["file"]), "pairs": records[n]},
        )


# ---- what is written from the transcripts ----------------------------------------------------------------------------
def training_pairs(records):
    """The accepted ordered pairs. Fields that end in `_file_name` become images in a `datasets` imagefolder."""
    return [
        {
            "reference_file_name": panel_file(r["grid"], a),
            "target_file_name": panel_file(r["grid"], b),
            "prompt": r["captions"][str(b)],
            "subject": r["subject"],
            "family": r["family"],
            "grid": r["grid"],
            "reference_panel": a,
            "target_panel": b,
        }
        for r in records
        if r["verdict"] == "yes"
        for a, b in itertools.permutations(r["panels"])
        if r["captions"][str(b)]
    ]


def summarise(records, pairs):
    """Counts of the verdicts, over all pairs and by family."""

    def count(records):
        verdicts = collections.Counter(r["verdict"] for r in records)
        return {
            "pairs": len(records),
            "accept_rate": round(verdicts["yes"] / len(records), 4),
            "yes": verdicts["yes"],
            "no": verdicts["no"],
            **verdicts,
        }

    families = sorted({r["family"] for r in records})
    return {
        "training_pairs": len(pairs),
        **count(records),
        "by_family": {
            family: count([r for r in records if r["family"] == family]) for family in families
        },
    }


def draw_sheet(records, args, name, count=24):
    """A contact sheet of some records: both panels side by side, the reason below."""
    cells = [
        (
            make_image_grid(
                [dsd.open_image(args.out / panel_file(r["grid"], k)) for k in r["panels"]], 1, 2
            ),
            f"grid {r['grid']}: {r['reason'][:200]}",
        )
        for r in random.Random(0).sample(records, min(count, len(records)))
    ]
    (args.out / name).unlink(missing_ok=True)
    if cells:
        dsd.contact_sheet([cells[i : i + 4] for i in range(0, len(cells), 4)], args.out / name)


def parse_args():
    parser = dsd.Parser(__doc__, "runs/pairs")
    add = parser.add_argument
    add(
        "--vlm",
        default=dsd.MINIATURE / "vlm",
        help="the curator: an image-text-to-text folder or hub name",
    )
    add("--grids", type=Path, default=Path("runs/grids"), help="what generate_grids.py wrote")
    add(
        "--caption",
        choices=["description", "instruction"],
        default="description",
        help="describe the target, or say how to turn the reference into it",
    )
    add("--example", default=EXAMPLE, help="a sample answer, which is appended to the question")
    add(
        "--tolerance",
        type=dsd.at_least(0),
        default=0,
        help="accept a pair if the comparison names at most this many "
        "differing parts; 0 keeps the VLM's own verdict",
    )
    add(
        "--batch_size",
        type=dsd.at_least(1),
        default=64,
        help="pairs in a batch; affects speed and memory",
    )
    add(
        "--max_new_tokens",
        type=dsd.at_least(1),
        default=400,
        help="longest answer; longer ones count as truncated",
    )
    parser.add_large_model_options(offload=False)
    return parser.parse("curate", folder="vlm")


def read_grids(args):
    """The grids that generate_grids.py recorded: {number: record}. One that is listed twice counts once."""
    if not (args.grids / "grids.jsonl").exists():
        raise dsd.DsdError(
            f"no {args.grids / 'grids.jsonl'}; run generate_grids.py first, or give --grids"
        )
    records = dsd.read_records(args.grids / "grids.jsonl", "file", "prompt", "subject", "family")
    grids = dict(enumerate(list({record["file"]: record for record in records}.values())))
    sizes = [(grid.get("rows"), grid.get("columns")) for grid in grids.values()]
    if (
        not sizes
        or (1, 1) in sizes
        or not all(side in range(1, 9) for size in sizes for side in size)
    ):
        raise dsd.DsdError(
            f"{args.grids}/grids.jsonl: no grids, or not all of 1 to 8 rows and columns and more than "
            "one panel; run generate_grids.py again"
        )
    return grids


def main():
    args = parse_args()
    grids = read_grids(args)
    lock = dsd.open_out(args, "curate", changeable=["grids", "batch_size"])
    missing = {n for n, grid in grids.items() if not is_done(n, grid, args)}
    model = load_vlm(args.vlm, args.quantize) if missing else None
    for batch in dsd.batches(
        list(grids.items()), max(args.batch_size // 6, 1), "curate"
    ):  # a 2x2 grid has six pairs
        if missing & dict(batch).keys():
            curate_batch(dict(batch), model, args)
    if not dsd.is_main_process():
        return
    records = [r for n, grid in grids.items() for r in transcript(n, grid, args)]
    pairs = training_pairs(records)
    summary = summarise(records, pairs)
    dsd.write_json(args.out / "metadata.jsonl", pairs)
    dsd.write_json(args.out / "summary.json", summary)
    draw_sheet([r for r in records if r["verdict"] == "yes"], args, "accepted.png")
    draw_sheet([r for r in records if r["verdict"] != "yes"], args, "rejected.png")
    if not pairs:
        raise dsd.DsdError(
            f"none of {len(records)} pairs was accepted (see {args.out}/rejected.png and transcripts/); "
            "make more or better grids, or try another --vlm or a higher --tolerance"
        )
    print(
        f"{summary['yes']} of {summary['pairs']} pairs accepted ({summary['accept_rate']:.0%}; the verdicts are in "
        f"summary.json): {len(pairs)} training pairs in {args.out}"
    )
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
