"""Step 2 of Diffusion Self-Distillation: a vision-language model keeps the pairs that show one and the same subject.

The grids of step 1 are cut into panels and the panels into ordered pairs (reference, target). A vision-language model
is asked about each pair in a chain of thought (paper, section 3.2 and its appendix): name the common subject, describe
it in each image, compare part by part, then a one-word verdict. The targets of accepted pairs are captioned.

    python curate.py                                   # the miniature: half a minute on two CPU cores, under 1 GB
    python curate.py --vlm Qwen/Qwen2.5-VL-7B-Instruct --batch_size 8       # the real one, on a GPU of 24 GB or more

Reads runs/grids/grids.jsonl and writes to runs/pairs (--out):
    images/            the panels, `000012_1.png` is panel 1 of grid 12
    metadata.jsonl     one line for each accepted ordered pair; `load_dataset("imagefolder", data_dir=...)` reads it
    transcripts.jsonl  one line for each pair that was asked about: the whole question and answer, verdict and reason
    summary.json       counts and the accept rate, by family
    accepted.png, rejected.png   contact sheets with the reason below each pair: look at both before you train
Stopped and started again with the same command, it goes on with the first batch of grids that is not in
transcripts.jsonl; grids added since are asked about too.
"""

import array
import collections
import itertools
import math
import random
import re
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
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
FILES = ["images/*", "metadata.jsonl", "transcripts.jsonl", "summary.json", "accepted.png", "rejected.png",
         "*.part"]  # what this script writes


# ---- asking ----------------------------------------------------------------------------------------------------------
def load_vlm(name, quantize="none"):
    """Model and processor of an image-text-to-text folder or hub name: bfloat16 on a GPU, float32 on a CPU."""
    path = Path(name)
    if not (path / "config.json").exists() and not dsd.on_hub(name):
        raise dsd.DsdError(f"no vision-language model at {name}; give a transformers folder or a hub name")
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if dsd.device() == "cuda" else torch.float32
    with dsd.explained(f"cannot load {name} as an image-text-to-text model with a chat template"):
        processor = AutoProcessor.from_pretrained(name)
        vlm = dsd.language_model(AutoModelForImageTextToText, name, quantize, dtype)
        processor.tokenizer.padding_side = "left"  # so that every answer starts where its question ends
        processor.apply_chat_template(conversation(1, "?"), add_generation_prompt=True)  # is there one?
    return vlm, processor


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
    panels = dsd.cut_grid(dsd.open_image(dsd.inside(folder, grid["file"])), grid["rows"], grid["columns"])
    if min(panels[0].size) < 8:
        raise dsd.DsdError(f"{folder / grid['file']}: panels of {panels[0].size} pixels; too small to be seen")
    for k, panel in enumerate(panels):
        dsd.save_image(panel, out / panel_file(number, k))
    return panels


def panel_file(number, panel):
    return f"images/{number:06d}_{panel}.png"


def pairs_of(grids):
    """All pairs of panels (grid, i, j) of some grids {number: record}."""
    return [(n, i, j) for n, grid in grids.items()
            for i, j in itertools.combinations(range(grid["rows"] * grid["columns"]), 2)]


def curate(grids, panels, model, args):
    """Transcripts of all pairs of some grids. grids: {number: record}, panels: {number: images}.

    * The question is symmetric: it is asked once for two panels, and an accepted answer gives both orders."""
    asked = pairs_of(grids)
    answers = ask(*model, [[panels[n][i], panels[n][j]] for n, i, j in asked], PAIR_QUESTION, args.batch_size, 400)
    records = []
    for (n, i, j), answer in zip(asked, answers):
        verdict, reason = parse(answer, args.tolerance)
        records.append({"grid": n, "panels": [i, j], "family": grids[n]["family"], "subject": grids[n]["subject"],
                        "prompt": grids[n]["prompt"], "verdict": verdict, "reason": reason, "captions": {},
                        "question": PAIR_QUESTION, "answer": answer})
    caption([r for r in records if r["verdict"] == "yes"], panels, model, args)
    return records


def orders(record):
    """The two training pairs in a pair of panels: (reference, target), both ways round."""
    i, j = record["panels"]
    return (i, j), (j, i)


def caption(accepted, panels, model, args):
    """Write into accepted records what each target shows, or how the reference becomes it: {target: text}."""
    def shown(reference, target):  # a description looks at the target only
        return (reference, target) if args.caption == "instruction" else (target,)

    cases = sorted({(r["grid"], shown(*order)) for r in accepted for order in orders(r)})  # each once
    answers = ask(*model, [[panels[n][k] for k in seen] for n, seen in cases], QUESTION_FOR[args.caption],
                  args.batch_size, 100)
    texts = {case: " ".join(answer.split()) for case, answer in zip(cases, answers)}
    for r in accepted:
        r["captions"] = {str(b): texts[r["grid"], shown(a, b)] for a, b in orders(r)}


# ---- what is written from the transcripts ----------------------------------------------------------------------------
def metadata(records):
    """One line for each accepted ordered pair; columns ending in `_file_name` become images in `imagefolder`."""
    for r in records:
        for a, b in orders(r):
            if r["verdict"] == "yes" and r["captions"].get(str(b)):
                yield {"reference_file_name": panel_file(r["grid"], a), "target_file_name": panel_file(r["grid"], b),
                       "prompt": r["captions"][str(b)], "subject": r["subject"], "family": r["family"],
                       "grid": r["grid"], "reference_panel": a, "target_panel": b}


def summarise(records, pairs, args):
    """Counts over all pairs and by family."""
    seen = collections.Counter((r["family"], r["verdict"]) for r in records)
    families = sorted({family for family, _ in seen})

    def count(*families):
        verdicts = {v: sum(seen[f, v] for f in families) for v in ("yes", "no", "unparsable")}
        asked = sum(verdicts.values())
        return {"asked": asked, "accept_rate": round(verdicts["yes"] / max(asked, 1), 4), **verdicts}

    return {"grids": sum(1 for _ in itertools.groupby(r["grid"] for r in records)), "training_pairs": len(pairs),
            **count(*families), "by_family": {family: count(family) for family in families},
            "vlm": dsd.name_of(args.vlm), "caption": args.caption, "tolerance": args.tolerance}


def sheet(records, accepted, out, name, seed, count=24):
    """A contact sheet of some of the accepted or of the other records: both panels side by side, the reason below."""
    numbers = array.array("Q", (i for i, r in enumerate(records) if (r["verdict"] == "yes") == accepted))
    some = sorted(random.Random(seed).sample(numbers, min(count, len(numbers))))
    cells = []
    for r in (records[i] for i in some):
        both = dsd.build_grid([dsd.open_image(out / panel_file(r["grid"], k)) for k in r["panels"]], 1, 2)
        cells.append((both, f"grid {r['grid']}: {r['reason'][:200]}"))
    (out / name).unlink(missing_ok=True)
    if cells:
        dsd.contact_sheet([cells[i:i + 4] for i in range(0, len(cells), 4)], out / name)


# ---- command line ----------------------------------------------------------------------------------------------------
def read_grids(args):
    """The grids of --grids, (line's number from 0, record) each; one listed twice counts once."""
    path = args.grids / "grids.jsonl"
    if not path.exists():
        raise dsd.DsdError(f"no {path}; run generate_grids.py first, or say where its output is with --grids")
    records = dsd.read_records(path, file=str, prompt=str, subject=str, family=str, rows=int, columns=int)[:args.limit]
    numbers = dsd.distinct(records, "grids", "file")
    if not numbers or not all(1 <= grid["rows"] <= 8 and 1 <= grid["columns"] <= 8 for grid in records):
        raise dsd.DsdError(f"{path}: no grids, or not of 1 to 8 rows and columns; run generate_grids.py again")
    return dsd.Lazy(len(numbers), lambda i: (numbers[i], records[numbers[i]]))


def read_transcripts(path, batches):
    """The batches of grids still to be asked about, and the transcripts of those before them.

    Those of a batch that is not whole are taken out of the file: it is asked about again as if for the first time."""
    old = dsd.read_records(path, grid=int, panels=list, prompt=str, family=str, subject=str, verdict=str, reason=str,
                           captions=dict)
    whole = end = 0
    words = all(isinstance(text, str) for r in old for text in r["captions"].values())
    for batch in batches:
        wanted = [(n, [i, j], batch[n]["prompt"]) for n, i, j in pairs_of(batch)]
        found = [(r["grid"], r["panels"], r["prompt"]) for r in old[end:end + len(wanted)]]
        if wanted[:len(found)] != found or not words:
            raise dsd.DsdError(f"{path} is of other grids; restore it, give another --out, or delete its folder")
        if len(found) < len(wanted):
            break
        whole, end = whole + 1, end + len(wanted)
    if whole < len(batches) and end < len(old):
        dsd.write_records(path, old[:end])
    return batches[whole:], old[:end]


def parse_args():
    parser = dsd.Parser(__doc__, "runs/pairs", "vlm", "quantize")
    add, setting = parser.add_argument, parser.setting
    add("--grids", type=Path, default="runs/grids", help="what generate_grids.py wrote (default: %(default)s)")
    add("--caption", choices=QUESTION_FOR, default="description", help="what the caption tells")
    setting("tolerance", 0, "parts that may differ in the comparison of an accepted pair; 0: the VLM's own verdict")
    setting("batch_size", 64, "pairs asked about at once")
    setting("limit", 10**9, "use only so many grids")
    setting("seed", 0, "chooses what the contact sheets show; verdicts are greedy")
    args = parser.parse_args()
    vars(args).update(dsd.model_settings(args.vlm, "curate", args, **parser.defaults))
    return args


def main():
    args = parse_args()
    dsd.check_machine(args, language=args.vlm)
    grids, source, path = read_grids(args), args.grids / "settings.json", args.out / "transcripts.jsonl"
    state = dsd.processes()
    main, each = state.is_main_process, state.num_processes
    at_once = max(args.batch_size // 6, 1)  # a 2x2 grid has six pairs
    batches = dsd.Lazy(math.ceil(len(grids) / at_once), lambda i: dict(grids[i * at_once:(i + 1) * at_once]))
    with state.main_process_first():
        dsd.open_out(args.out, {
            "step": "curate", "vlm": dsd.name_of(args.vlm), "caption": args.caption, "tolerance": args.tolerance,
            "quantize": args.quantize, "grids": dsd.read_json(source) if source.exists() else None},
            FILES, args.overwrite)
        waiting, records = read_transcripts(path, batches)
    count, model = len(records), load_vlm(args.vlm, args.quantize) if waiting else None
    for start in tqdm(range(0, len(waiting), each), desc="curate", unit="batch", disable=not main):
        batch = dict(*waiting[start:start + each][state.process_index:state.process_index + 1])  # one for each process
        panels = {n: cut(grid, n, args.grids, args.out) for n, grid in batch.items()}
        new = gather_object(curate(batch, panels, model, args))  # of all processes, in the order of their batches
        if main:
            dsd.append_records(path, new)
            count += len(new)
    if not main:
        return
    records = dsd.read_records(path)[:count]
    dsd.write_records(args.out / "metadata.jsonl", metadata(records))
    pairs = dsd.read_records(args.out / "metadata.jsonl")
    summary = summarise(records, pairs, args)
    dsd.write_json(args.out / "summary.json", summary)
    sheet(records, True, args.out, "accepted.png", args.seed)
    sheet(records, False, args.out, "rejected.png", args.seed)
    if not pairs:
        raise dsd.DsdError(f"none of {len(records)} pairs was accepted (see {args.out}/rejected.png and "
                           "transcripts.jsonl); make more or better grids, try another --vlm or a higher --tolerance")
    print(f"{summary['yes']} of {summary['asked']} pairs accepted ({summary['accept_rate']:.0%}, "
          f"{summary['unparsable']} unparsable): {len(pairs)} training pairs in {args.out}; peak memory "
          f"{dsd.peak_memory():.1f} GB")


if __name__ == "__main__":
    dsd.run(main)
