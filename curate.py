"""Step 2 (paper section 3.2): a vision-language model keeps the pairs that show the same subject.

The grids of step 1 are cut into panels. A vision-language model (VLM) is asked about each two of
them in a chain of thought: name the common subject, describe it in each image, compare part by
part, then give a one-word verdict. The targets of accepted pairs are captioned.

    python curate.py                                                   # the miniature, on any CPU
    python curate.py --vlm Qwen/Qwen2.5-VL-7B-Instruct --batch_size 8  # a GPU of 24 GB or more

Reads runs/grids/grids.jsonl and writes to runs/pairs (--out):
    images/            the panels: `000012_1.png` is panel 1 of grid 12
    metadata.jsonl     the accepted ordered pairs, for load_dataset("imagefolder", data_dir=...)
    transcripts/       for each grid: question, answer, verdict and reason of its six pairs
    summary.json       counts and the accept rate, by family
    accepted.png, rejected.png   contact sheets with the reasons: look at both before you train
Started again, the same command goes on. To overrule the curator, change "verdict" in a file of
transcripts/ to "yes" or "no" and run the command again.
"""

import dsd

import collections
import itertools
import random
import re
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid
from PIL import ImageChops, ImageStat
from transformers import AutoModelForImageTextToText, AutoProcessor

# ---- asking --------------------------------------------------------------------------------------
PAIR_QUESTION = (
    "Do both images show the identical subject? Ignore place, pose, light and outfit. Answer in "
    "five lines. subject: name it. image 1: describe it in detail. image 2: describe it in detail. "
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
CAPTION_QUESTIONS = {"description": DESCRIBE_QUESTION, "instruction": INSTRUCTION_QUESTION}
DETAILS_QUESTION = "Name the colours, markings and eyes of the subject in a few words."
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}  # Qwen2.5-VL has a penalty of its own


def load_vlm(name, quantize="none"):
    """The model and the processor of an image-text-to-text folder or hub name."""
    with dsd.explained(f"cannot load {name} as a vision-language model with a chat template"):
        vlm = dsd.load_language_model(AutoModelForImageTextToText, name, quantize)
        processor = AutoProcessor.from_pretrained(name)
        processor.apply_chat_template(conversation(1, "?"))  # fails without a template
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # every answer starts where its question ends
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return vlm, processor


def conversation(images, question):
    """One user message: places for this many images, then the question."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@torch.inference_mode()
def ask(vlm, processor, cases, questions, batch_size, max_new_tokens):
    """The VLM's answers about some cases, lists of images. questions: one for all, or for each."""
    if isinstance(questions, str):
        questions = [questions] * len(cases)
    texts = []
    for images, question in zip(cases, questions):
        messages = conversation(len(images), question)
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
    answers = []
    for i in range(0, len(cases), batch_size):
        batch = {"text": texts[i : i + batch_size], "images": cases[i : i + batch_size]}
        inputs = processor(**batch, padding=True, return_tensors="pt")
        inputs = inputs.to(vlm.device, vlm.dtype)
        tokens = vlm.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]  # (B, length of an answer)
        for answer in processor.batch_decode(tokens, skip_special_tokens=True):
            answers.append(answer.strip())
    return answers


# ---- understanding the answer --------------------------------------------------------------------
STEPS = ["subject", "image 1", "image 2", "compare", "verdict"]
VERDICTS = {"yes", "no", "unparsable", "blank", "copies"}
HEADING = (
    r"(?:(?:step )?\d[.):] *)?"  # "2. " or "Step 2: "
    r"(subject|image 1|image 2|compare|comparison|verdict) *"
    r"(?:\([^)\n]*\) *)?"  # "(left)"
    r"(?::|$)"  # a colon or the end of the line
)


def find_steps(answer):
    """{name: what it says} of the five steps, or {} if they are not all there and in order."""
    text = re.sub(r"[*_`#>•]", "", answer).replace("：", ":")  # without marks of layout
    line, sentence = r"^[\s-]*", r"(?:^|[\s.;,]+)"  # where a step begins
    for beginning in line, sentence:
        pieces = re.split(beginning + HEADING, text, flags=re.IGNORECASE | re.MULTILINE)
        names = [name.lower().replace("comparison", "compare") for name in pieces[1::2]]
        contents = [content.strip() for content in pieces[2::2]]
        if names == STEPS and all(contents):
            return dict(zip(names, contents))
    return {}


def differing_parts(comparison):
    """The parts that are called different: "fur same, tail different" -> ["tail different"]."""
    differing = []
    for part in re.split(r"[,.;\n]", comparison):
        differs = re.search(r"\bdiffer|\bin one\b.*\bother\b", part, re.IGNORECASE)
        denied = re.search(r"\b(not|no|nothing)\b|n't\b", part, re.IGNORECASE)
        if differs and not denied:
            differing.append(part.strip(" -"))
    return differing


def parse(answer, tolerance=0):
    """(verdict, reason) of an answer; the verdict is "yes", "no" or "unparsable".

    Strict on purpose (our choice): a model that skips a step has not compared, and a verdict before
    the comparison is a guess. With a tolerance, a "no" becomes a "yes" if the comparison names at
    most this many differing parts."""
    steps = find_steps(answer)
    words = re.findall(r"\w+", steps.get("verdict", "").lower())[:3]
    # "yes/no" and "yes or no" say nothing; "yes, no differences" does
    undecided = {"yes", "no"} <= set(words) <= {"yes", "no", "or", "and"}
    if undecided or words[:1] not in (["yes"], ["no"]):
        return "unparsable", "unparsable: not the five steps with one yes or no at the end"
    if words[0] == "yes":
        return "yes", f"yes: {steps['subject']}"
    differing = differing_parts(steps["compare"])
    reason = f"no: {', '.join(differing) or steps['compare']}"
    if 0 < len(differing) <= tolerance:
        return "yes", f"tolerated {reason}"
    return "no", reason


def set_aside(a, b):
    """(verdict, reason) for two panels that are not worth asking about, else ("", "")."""
    contrast_a, contrast_b = (max(ImageStat.Stat(panel).stddev) for panel in (a, b))
    if min(contrast_a, contrast_b) < 2:  # grey levels
        return "blank", "blank: a panel of one colour"
    if max(ImageStat.Stat(ImageChops.difference(a, b)).mean) < 2:
        return "copies", "copies: nearly the same picture twice, which teaches copying"
    return "", ""


# ---- one batch of grids --------------------------------------------------------------------------
def panel_file(number, panel):
    return f"images/{number:06d}_{panel}.png"


def open_panels(number, panels, args):
    return [dsd.open_image(args.out / panel_file(number, panel)) for panel in panels]


def save_panels(number, grid, args):
    """Cut a grid and save its panels. What --trim takes off is made up by scaling."""
    image = dsd.open_image(args.grids / grid["file"])
    for k, panel in enumerate(dsd.cut_grid(image, grid["rows"], grid["columns"])):
        inner = args.trim, args.trim, panel.width - args.trim, panel.height - args.trim
        dsd.save_image(panel.resize(panel.size, box=inner), args.out / panel_file(number, k))


def judge_pairs(batch, model, args):
    """A record of each pair in a batch {number: grid}, whose panels are saved.

    The question is symmetric: each two panels are asked about once, and an accepted answer gives
    both orders (our choice)."""
    question = PAIR_QUESTION + args.example
    records = []
    for number, grid in batch.items():
        about = {name: grid[name] for name in ("family", "subject", "prompt")}
        for pair in itertools.combinations(range(grid["rows"] * grid["columns"]), 2):
            record = {"grid": number, "panels": list(pair), **about, "captions": {}}
            record |= {"question": question, "answer": ""}
            record["verdict"], record["reason"] = set_aside(*open_panels(number, pair, args))
            records.append(record)
    asked = [record for record in records if not record["verdict"]]
    cases = [open_panels(record["grid"], record["panels"], args) for record in asked]
    answers = ask(*model, cases, question, args.batch_size, args.max_new_tokens)
    for record, answer in zip(asked, answers):
        record["answer"] = answer
        record["verdict"], record["reason"] = parse(answer, args.tolerance)
    return records


def caption_pairs(batch, records, model, args):
    """Give each record its captions, {target panel: caption}; rejected ones may be overruled."""
    shown = 1 if args.caption == "description" else 2  # the target, or the reference and the target
    keys = []  # (number of the grid, *panels that the VLM is shown)
    for number, grid in batch.items():
        panels = range(grid["rows"] * grid["columns"])
        keys += [(number, *order) for order in itertools.permutations(panels, shown)]
    cases = [open_panels(number, panels, args) for number, *panels in keys]
    answers = ask(*model, cases, CAPTION_QUESTIONS[args.caption], args.batch_size, 100)
    captions = dict(zip(keys, answers))
    for record in records:
        for order in itertools.permutations(record["panels"]):
            caption = captions[(record["grid"], *order[-shown:])]
            record["captions"][str(order[1])] = " ".join(caption.split())


def read_transcript(number, grid, args):
    """The saved records of a grid's pairs; [] without any, or if they are of another picture."""
    file = args.out / f"transcripts/{number:06d}.json"
    saved = dsd.read_json(file)
    if saved.get("picture") != dsd.digest(args.grids / grid["file"]):
        return []
    if {record["verdict"] for record in saved["pairs"]} - VERDICTS:
        raise dsd.DsdError(f'{file}: "verdict" must be "yes" or "no"; correct it')
    return saved["pairs"]


def curate_batch(batch, model, args):
    """Write the panels and the transcripts of a batch {number: grid}; saved transcripts stay.

    The whole batch is asked about, so that the answers are those of a run without a stop."""
    for number, grid in batch.items():
        save_panels(number, grid, args)
    records = judge_pairs(batch, model, args)
    caption_pairs(batch, records, model, args)
    for number, grid in batch.items():
        if not read_transcript(number, grid, args):
            pairs = [record for record in records if record["grid"] == number]
            saved = {"picture": dsd.digest(args.grids / grid["file"]), "pairs": pairs}
            dsd.write_json(args.out / f"transcripts/{number:06d}.json", saved)


# ---- what is written from the transcripts --------------------------------------------------------
def training_pairs(accepted):
    """The ordered pairs of accepted records; `datasets` reads fields in `_file_name` as images."""
    pairs = []
    for record in accepted:
        for reference, target in itertools.permutations(record["panels"]):
            pair = {"reference_file_name": panel_file(record["grid"], reference)}
            pair["target_file_name"] = panel_file(record["grid"], target)
            pair["prompt"] = record["captions"][str(target)]
            pair |= {name: record[name] for name in ("subject", "family", "grid")}
            if pair["prompt"]:  # a VLM may say nothing
                pairs.append(pair)
    return pairs


def count_verdicts(records):
    verdicts = collections.Counter(record["verdict"] for record in records)
    counts = {"pairs": len(records), "accept_rate": round(verdicts["yes"] / len(records), 4)}
    return counts | {"yes": 0, "no": 0} | verdicts


def draw_sheet(records, path, args):
    """A contact sheet of at most 24 records: both panels side by side, the reason below."""
    cells = []
    for record in random.Random(0).sample(records, min(24, len(records))):
        panels = open_panels(record["grid"], record["panels"], args)
        caption = f"grid {record['grid']}: {record['reason'][:200]}"
        cells.append((make_image_grid(panels, 1, 2), caption))
    if cells:
        dsd.contact_sheet([cells[i : i + 4] for i in range(0, len(cells), 4)], path)


def write_results(records, args):
    """Write all but the transcripts and the panels, and say how many pairs were accepted."""
    accepted = [record for record in records if record["verdict"] == "yes"]
    rejected = [record for record in records if record["verdict"] != "yes"]
    pairs = training_pairs(accepted)
    summary = {"training_pairs": len(pairs)} | count_verdicts(records) | {"by_family": {}}
    for family in sorted({record["family"] for record in records}):
        members = [record for record in records if record["family"] == family]
        summary["by_family"][family] = count_verdicts(members)
    dsd.write_json(args.out / "metadata.jsonl", pairs)
    dsd.write_json(args.out / "summary.json", summary)
    draw_sheet(accepted, args.out / "accepted.png", args)
    draw_sheet(rejected, args.out / "rejected.png", args)
    share = f"{len(accepted)} of {len(records)} pairs accepted ({summary['accept_rate']:.0%})"
    print(f"{share}: {len(pairs)} training pairs in {args.out}; look at accepted.png, rejected.png")


# ---- command line --------------------------------------------------------------------------------
def parse_args():
    parser = dsd.Parser(__doc__, "runs/pairs")
    add, whole, positive = parser.add_argument, dsd.at_least(0), dsd.at_least(1)
    add("--vlm", default=dsd.MINIATURE / "vlm", help="the curator: folder or hub name of a VLM")
    add("--grids", type=Path, default=Path("runs/grids"), help="what generate_grids.py wrote")
    add("--caption", choices=CAPTION_QUESTIONS, default="description", help="a pair's prompt")
    add("--example", default=EXAMPLE, help="a sample answer, which is appended to the question")
    add("--tolerance", type=whole, default=0, help="how many parts of an accepted pair may differ")
    add("--batch_size", type=positive, default=64, help="pairs asked about together")
    add("--max_new_tokens", type=positive, default=400, help="in an answer at most")
    add("--trim", type=whole, default=0, help="pixels to cut off each side of a panel: gutters")
    return parser.parse("curate", folder="vlm")


def read_grids(args):
    """The grids of generate_grids.py, {number: record}, if their pictures are all there."""
    file = args.grids / "grids.jsonl"
    grids = dsd.read_records(file, "file", "prompt", "subject", "family") if file.exists() else []
    drawn = [grid for grid in grids if (args.grids / grid["file"]).exists()]
    if not grids or len(drawn) < len(grids):
        found = f"{len(drawn)} of {len(grids)} grids are in {args.grids}"
        raise dsd.DsdError(f"{found}; run generate_grids.py first, or give --grids")
    return dict(enumerate(grids))


def main():
    args = parse_args()
    grids = read_grids(args)
    lock = dsd.open_out(args, "curate", changeable=["grids", "batch_size"])
    model = None
    grids_in_batch = max(args.batch_size // 6, 1)  # a 2x2 grid has six pairs
    for batch in dsd.batches(list(grids.items()), grids_in_batch, "curate"):
        if not all(read_transcript(number, grid, args) for number, grid in batch):
            model = model or load_vlm(args.vlm, args.quantize)
            curate_batch(dict(batch), model, args)
    if PartialState().is_main_process:
        records = []
        for number, grid in grids.items():
            records += read_transcript(number, grid, args)
        write_results(records, args)
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
