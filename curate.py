"""Step 2 of Diffusion Self-Distillation: a vision-language model keeps the pairs that show one and the same subject.

The grids of step 1 are cut into panels and the panels into ordered pairs (reference, target). A vision-language model
is asked about each pair in a chain of thought (paper, section 3.2 and its appendix): name the common subject, describe
it in each image, compare part by part, then a one-word verdict. The targets of accepted pairs are captioned.

    python curate.py                                   # the miniature: a minute on two CPU cores
    python curate.py --vlm Qwen/Qwen2.5-VL-7B-Instruct --batch_size 8       # the real one, on a GPU of 24 GB or more

Reads runs/grids/grids.jsonl and writes to runs/pairs (--out):
    images/            the panels, `000012_1.png` is panel 1 of grid 12
    metadata.jsonl     one line for each accepted ordered pair; `load_dataset("imagefolder", data_dir=...)` reads it
    transcripts.jsonl  one line for each pair that was asked about: the whole question and answer, verdict and reason
    summary.json       counts and the accept rate, by family
    accepted.png, rejected.png   contact sheets with the reason below each pair: look at both before you train
Stopped and started again, it goes on with the grids that are not in transcripts.jsonl yet.
"""

import argparse
import collections
import itertools
import json
import math
import random
import re
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import dsd

# ---- the questions ---------------------------------------------------------------------------------------------------
PAIR_QUESTION = (
    "Do both images show the identical subject? Ignore place, pose, light and outfit. Answer in five lines. "
    "subject: name it. image 1: describe it in detail. image 2: describe it in detail. "
    "compare: part by part, same or different. verdict: yes or no.")
DESCRIBE_QUESTION = "Describe this image in one line: what it shows, where, in which light, with what outfit."
INSTRUCTION_QUESTION = "Write one instruction that turns the first image into the second."
DETAILS_QUESTION = "Name the colours, markings and eyes of the subject in a few words."
SUBJECT_SCORE_QUESTION = (
    "How well does the second image keep the subject of the first? Answer in five lines. "
    "subject: name it. image 1: describe it. image 2: describe it. compare: part by part. score: 0 to 4.")
PROMPT_SCORE_QUESTION = (
    "How well does the image follow this prompt: {prompt}? Answer in three lines. "
    "image: describe it. compare: part by part. score: 0 to 4.")
QUESTION_FOR = {"description": DESCRIBE_QUESTION, "instruction": INSTRUCTION_QUESTION}


# ---- asking ----------------------------------------------------------------------------------------------------------
def load_vlm(name):
    """Model and processor of an image-text-to-text folder or hub name: bfloat16 on a GPU, float32 on a CPU."""
    path = Path(name)
    if not (path / "config.json").exists() and (path.exists() or name.count("/") != 1 or path.parent.is_dir()):
        raise dsd.DsdError(f"no vision-language model at {name}; --vlm takes a transformers folder or a hub name")
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if dsd.device() == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(name)
        vlm = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True)
        processor.tokenizer.padding_side = "left"  # so that every answer starts where its question ends
        processor.apply_chat_template(conversation(1, "?"), add_generation_prompt=True)
    except Exception as error:  # another kind of model, a missing file, no template: many kinds, one answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise dsd.DsdError(f"cannot load {name} as an image-text-to-text model with a chat template: "
                           f"{reason}") from None
    return vlm.to(dsd.device()).eval(), processor


def conversation(images, question):
    """One user message: so many images, then the question."""
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


@torch.inference_mode()
def ask(vlm, processor, cases, question, batch_size, max_new_tokens):
    """A question, or a list of one for each case, about many cases (lists of images), in batches, greedily: the answers."""
    questions, answers = [question] * len(cases) if isinstance(question, str) else question, []
    for i in range(0, len(cases), batch_size):
        part = cases[i:i + batch_size]
        texts = [processor.apply_chat_template(conversation(len(images), text), add_generation_prompt=True)
                 for images, text in zip(part, questions[i:i + batch_size])]
        inputs = processor(text=texts, images=part, padding=True, return_tensors="pt").to(vlm.device, vlm.dtype)
        tokens = vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # (B, question + answer)
        tokens = tokens[:, inputs["input_ids"].shape[1]:]
        answers += [a.strip() for a in processor.batch_decode(tokens, skip_special_tokens=True)]
    return answers


# ---- understanding the answer ----------------------------------------------------------------------------------------
STEPS = ["subject", "image 1", "image 2", "compare", "verdict"]


def parse(answer, tolerance=0):
    """(verdict, reason) of an answer: "yes", "no", or "unparsable" unless all five steps are there, once, in order.

    * Strict on purpose: a model that skips the steps has not compared, so what it cannot show counts as rejected.
    * With a tolerance, a "no" becomes a "yes" if the comparison names at most so many parts that differ."""
    pattern = r"^(?:\d[.)])?[^\w\n]*(" + "|".join(STEPS) + r")[ *]*:[ *]*(.*)$"  # "2. **image 1:** ..." will do
    found = re.findall(pattern, answer, flags=re.MULTILINE | re.IGNORECASE)
    said = {step.lower(): text.strip() for step, text in found}
    verdict = said.get("verdict", "").strip(" .*!").lower()
    last = answer.strip().lower().rpartition("\n")[2]
    if ([step.lower() for step, _ in found] != STEPS or not all(said.values())
            or verdict not in ("yes", "no") or "verdict" not in last):
        return "unparsable", "unparsable: not the five steps with one yes or no at the end"
    parts = [part.strip() for part in re.split("[,.;]", said["compare"])]
    differing = [part for part in parts if "differ" in part]
    reason = f"{verdict}: " + (said["subject"] if verdict == "yes" else ", ".join(differing) or said["compare"])
    if verdict == "no" and 0 < len(differing) <= tolerance:
        return "yes", f"tolerated {reason}"
    return verdict, reason


# ---- one batch of grids ----------------------------------------------------------------------------------------------
def cut(grid, number, folder, out):
    """The panels of one grid, written as PNG files and returned as images."""
    panels = dsd.cut_grid(dsd.open_image(folder / grid["file"]), grid["rows"], grid["columns"])
    for k, panel in enumerate(panels):
        panel.save(out / panel_file(number, k))
    return panels


def panel_file(number, panel):
    return f"images/{number:06d}_{panel}.png"


def curate(grids, panels, model, args):
    """Transcripts of all pairs of some grids. grids: {number: record}, panels: {number: images}.

    * The question is symmetric: it is asked once for two panels, and an accepted answer gives both orders."""
    asked = [(n, i, j) for n in grids for i, j in itertools.combinations(range(len(panels[n])), 2)]
    answers = ask(*model, [[panels[n][i], panels[n][j]] for n, i, j in asked], PAIR_QUESTION, args.batch_size, 400)
    records = []
    for (n, i, j), answer in zip(asked, answers):
        verdict, reason = parse(answer, args.tolerance)
        records.append({"grid": n, "panels": [i, j], "family": grids[n]["family"], "subject": grids[n]["subject"],
                        "prompt": grids[n]["prompt"], "verdict": verdict, "reason": reason, "vlm": dsd.name_of(args.vlm),
                        "tolerance": args.tolerance, "caption": args.caption, "captions": {},
                        "question": PAIR_QUESTION, "answer": answer})
    accepted = [r for r in records if r["verdict"] == "yes"]
    for (n, i, j), text in caption(accepted, panels, model, args).items():
        next(r for r in accepted if r["grid"] == n and set(r["panels"]) == {i, j})["captions"][str(j)] = text
    return records


def caption(accepted, panels, model, args):
    """What the target of each accepted ordered pair shows, or how the reference becomes it: {(grid, i, j): text}."""
    orders = [(r["grid"], a, b) for r in accepted for a, b in (r["panels"], r["panels"][::-1])]
    if args.caption == "instruction":
        keys, cases = orders, [[panels[n][a], panels[n][b]] for n, a, b in orders]
    else:  # a description looks at the target only: each panel once, however many pairs it is in
        keys = sorted({(n, b) for n, a, b in orders})
        cases = [[panels[n][b]] for n, b in keys]
    answers = ask(*model, cases, QUESTION_FOR[args.caption], args.batch_size, 100)
    texts = {key: " ".join(answer.split()) for key, answer in zip(keys, answers)}
    return {(n, a, b): texts[(n, a, b) if args.caption == "instruction" else (n, b)] for n, a, b in orders}


# ---- what is written from the transcripts ----------------------------------------------------------------------------
def metadata(records):
    """One line for each accepted ordered pair; columns ending in `_file_name` become images in `imagefolder`."""
    for r in (r for r in records if r["verdict"] == "yes"):
        for a, b in (r["panels"], r["panels"][::-1]):
            if r["captions"][str(b)]:
                yield {"reference_file_name": panel_file(r["grid"], a), "target_file_name": panel_file(r["grid"], b),
                       "prompt": r["captions"][str(b)], "subject": r["subject"], "family": r["family"],
                       "grid": r["grid"], "reference_panel": a, "target_panel": b}


def summarise(records, pairs, args):
    """Counts over all pairs and by family."""
    def count(rows):
        verdicts = {v: sum(r["verdict"] == v for r in rows) for v in ("yes", "no", "unparsable")}
        return {"asked": len(rows), "accept_rate": round(verdicts["yes"] / max(len(rows), 1), 4), **verdicts}

    return {"grids": len({r["grid"] for r in records}), "training_pairs": len(pairs), **count(records),
            "by_family": {f: count([r for r in records if r["family"] == f])
                          for f in sorted({r["family"] for r in records})},
            "vlm": dsd.name_of(args.vlm), "caption": args.caption,
            "tolerance": args.tolerance}


def sheet(records, out, name, seed, count=24):
    """A contact sheet of some of the records: both panels side by side, the reason below."""
    some = sorted(random.Random(seed).sample(range(len(records)), min(count, len(records))))
    cells = []
    for r in (records[i] for i in some):
        both = dsd.build_grid([dsd.open_image(out / panel_file(r["grid"], k)) for k in r["panels"]], 1, 2)
        cells.append((both, f"grid {r['grid']}: {r['reason'][:200]}"))
    (out / name).unlink(missing_ok=True)
    if cells:
        dsd.contact_sheet([cells[i:i + 4] for i in range(0, len(cells), 4)], out / name)


# ---- command line ----------------------------------------------------------------------------------------------------
def read_grids(args):
    """The grids {number: record} of --grids, the numbers still to be asked about, and the transcripts of the others."""
    path = args.grids / "grids.jsonl"
    if not path.exists():
        raise dsd.DsdError(f"no {path}; run generate_grids.py first, or say where its output is with --grids")
    grids = dict(list(enumerate(dsd.read_records(path)))[:args.limit])
    for n, grid in grids.items():
        if not isinstance(grid, dict) or not {"file", "prompt", "subject", "family", "rows", "columns"} <= set(grid):
            raise dsd.DsdError(f"{path}, line {n + 1}: not a record of generate_grids.py; make the grids again")
    old = dsd.read_records(args.out / "transcripts.jsonl")
    for r in old:
        if (r["prompt"], r["vlm"], r["caption"], r["tolerance"]) != (
                grids.get(r["grid"], r)["prompt"], dsd.name_of(args.vlm), args.caption, args.tolerance):
            raise dsd.DsdError(f"{args.out} was made from other grids or with another --vlm, --caption or --tolerance; "
                               "delete it or give another --out")
    last = {(r["grid"], *r["panels"]): r for r in old if r["grid"] in grids}  # a torn grid was asked about twice
    asked = collections.Counter(n for n, i, j in last)
    waiting = [n for n, g in grids.items() if asked[n] < math.comb(g["rows"] * g["columns"], 2)]
    return grids, waiting, [r for r in last.values() if r["grid"] not in waiting]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=Path, default=Path("runs/grids"), help="folder that generate_grids.py wrote")
    parser.add_argument("--vlm", default=str(dsd.MINIATURE / "vlm"),
                        help="an image-text-to-text folder or hub name (default: the miniature)")
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--caption", choices=QUESTION_FOR, default="description", help="what the caption tells")
    parser.add_argument("--tolerance", type=int, help="parts that may differ in the VLM's comparison of an accepted pair "
                        "(default: the VLM's dsd.json, else 0: the VLM's own verdict)")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs asked about at once")
    parser.add_argument("--limit", type=int, help="use only so many grids")
    parser.add_argument("--seed", type=int, default=0, help="chooses what the contact sheets show; verdicts are greedy")
    args = parser.parse_args()
    args.tolerance = dsd.model_settings(args.vlm, "curate", args, tolerance=0)["tolerance"]
    if args.batch_size < 1 or (args.limit or 1) < 1:
        raise dsd.DsdError("--batch_size and --limit must be at least 1")
    return args


def main():
    args = parse_arguments()
    grids, waiting, records = read_grids(args)
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    if waiting:
        model = load_vlm(args.vlm)
        bar = tqdm(total=len(grids), initial=len(grids) - len(waiting), desc="curate", unit="grid")
        at_once = max(args.batch_size // 6, 1)  # a 2x2 grid has six pairs
        for part in (waiting[i:i + at_once] for i in range(0, len(waiting), at_once)):
            panels = {n: cut(grids[n], n, args.grids, args.out) for n in part}
            new = curate({n: grids[n] for n in part}, panels, model, args)
            dsd.append_records(args.out / "transcripts.jsonl", new)
            records += new
            bar.update(len(part))
            bar.set_postfix(accepted=f"{sum(r['verdict'] == 'yes' for r in records) / max(len(records), 1):.0%}")
        bar.close()
    pairs = list(metadata(records))
    dsd.write_text(args.out / "metadata.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs))
    summary = summarise(records, pairs, args)
    dsd.write_json(args.out / "summary.json", summary)
    sheet([r for r in records if r["verdict"] == "yes"], args.out, "accepted.png", args.seed)
    sheet([r for r in records if r["verdict"] != "yes"], args.out, "rejected.png", args.seed)
    if not pairs:
        raise dsd.DsdError(f"none of {len(records)} pairs was accepted (see {args.out}/rejected.png and "
                           "transcripts.jsonl); make more or better grids, or try another --vlm")
    print(f"{summary['yes']} of {summary['asked']} pairs accepted ({summary['accept_rate']:.0%}, "
          f"{summary['unparsable']} unparsable): {len(pairs)} training pairs in {args.out}")


if __name__ == "__main__":
    dsd.run(main)
