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
Started again, the same command asks only about batches that are not complete. To overrule the
curator, change "verdict" in a file of transcripts/ to "yes" or "no" and run the command again. If
the teacher draws gutters between the panels, cut them off with --trim.
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

# ---- the questions -------------------------------------------------------------------------------
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
DETAILS_QUESTION = "Name the colours, markings and eyes of the subject in a few words."
TRUNCATED = "[truncated]"  # ends an answer that was cut short


# ---- asking --------------------------------------------------------------------------------------
def load_vlm(name, quantize="none"):
    """The model and the processor of an image-text-to-text folder or hub name."""
    with dsd.explained(f"cannot load {name} as a vision-language model with a chat template"):
        vlm = dsd.load_language_model(AutoModelForImageTextToText, name, quantize)
        processor = AutoProcessor.from_pretrained(name)
        processor.apply_chat_template(conversation(1, "?"))  # fails without a template
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # every answer starts where its question ends
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if vlm.generation_config.eos_token_id is None:
            vlm.generation_config.eos_token_id = tokenizer.eos_token_id
        if tokenizer.pad_token is None or vlm.generation_config.eos_token_id is None:
            raise ValueError("its tokenizer has no eos_token, which ends an answer")
    return vlm, processor


def conversation(images, question):
    """One user message: places for this many images, then the question."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@torch.inference_mode()
def ask(vlm, processor, cases, questions, batch_size, max_new_tokens):
    """The answers about some cases, which are lists of images; decoding is greedy.

    questions: one for all cases, or a list of one for each. An answer that reached max_new_tokens
    ends with TRUNCATED."""
    if isinstance(questions, str):
        questions = [questions] * len(cases)
    answers = []
    for i in range(0, len(cases), batch_size):
        images, texts = cases[i : i + batch_size], []
        for shown, question in zip(images, questions[i : i + batch_size]):
            messages = conversation(len(shown), question)
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(vlm.device, vlm.dtype)
        tokens = vlm.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0
        )
        tokens = tokens[:, inputs["input_ids"].shape[1] :].cpu()  # (B, length of an answer)
        ended = torch.isin(tokens, torch.tensor(vlm.generation_config.eos_token_id)).any(dim=1)
        for text, whole in zip(processor.batch_decode(tokens, skip_special_tokens=True), ended):
            answers.append(text.strip() if whole else f"{text.strip()} {TRUNCATED}")
    return answers


# ---- understanding the answer --------------------------------------------------------------------
STEPS = ["subject", "image 1", "image 2", "compare", "verdict"]
VERDICTS = {"yes", "no", "unparsable", "truncated", "blank", "copies"}
NUMBER = r"(?:(?:step )?\d[.):] *)?"  # "1. " or "Step 1: "
# "Image 1" or "Image 1 (left)"
NAME = r"(subject|image 1|image 2|compare|comparison|verdict) *(?:\([^)\n]*\) *)?"


def split_steps(text):
    """[(name, what it says), ...] of the steps in a text, each of which begins a line."""
    names, texts = [], []
    for line in text.splitlines():
        line = line.strip(" \t#>•-")  # marks of headings, quotations and lists
        heading = re.match(f"{NUMBER}{NAME}(?::|$)", line, re.IGNORECASE)
        if heading:
            names.append(heading[1].lower().replace("comparison", "compare"))
            texts.append([line[heading.end() :]])
        elif names:
            texts[-1].append(line)
    return [(name, "\n".join(lines).strip()) for name, lines in zip(names, texts)]


def find_steps(answer):
    """{name: what it says} of the five steps, or {} if they are not all there and in order."""
    text = re.sub(r"[*_`]", "", answer).replace("：", ":")  # without marks of emphasis and code
    separator = rf"[\s.;,]+(?={NUMBER}{NAME}:)"
    one_line = re.sub(separator, "\n", text, flags=re.IGNORECASE)  # if steps share a line
    for form in text, one_line:
        steps = split_steps(form)
        if [name for name, _ in steps] == STEPS and all(said for _, said in steps):
            return dict(steps)
    return {}


def differing_parts(comparison):
    """The parts that are called different: "fur same, tail different" -> ["tail different"]."""
    differing = []
    for part in re.split(r"[,.;\n]", comparison):
        differs = re.search(r"\bdiffer|\bin one\b.*\bother\b", part, re.IGNORECASE)
        denied = re.search(r"\b(not|no|nothing)\b|n't\b", part, re.IGNORECASE)
        if differs and not denied:
            differing.append(part.strip())
    return differing


def parse(answer, tolerance=0):
    """(verdict, reason) of an answer: "yes", "no", "truncated", or "unparsable" unless it holds the
    five steps in their order and one yes or no at the end.

    Strict on purpose (our choice): a model that skips a step has not compared, and a verdict before
    the comparison is a guess. With a tolerance, a "no" becomes a "yes" if the comparison names at
    most this many differing parts."""
    if answer.endswith(TRUNCATED):
        return "truncated", "truncated: the answer reached --max_new_tokens"
    steps = find_steps(answer)
    last = steps.get("verdict", "").lower()
    verdict = re.match(r"\W*(yes|no)\b", last)
    # "yes and no", "yes/no" and "yes, no." say nothing; "yes, no differences" does
    both = re.match(r"\W*(yes|no)\W*((or|and)\W*(yes|no)\b|(yes|no)\b(?! \w))", last)
    if not verdict or both:
        return "unparsable", "unparsable: not the five steps with one yes or no at the end"
    if verdict[1] == "yes":
        return "yes", f"yes: {steps['subject']}"
    differing = differing_parts(steps["compare"])
    reason = f"no: {', '.join(differing) or steps['compare']}"
    if 0 < len(differing) <= tolerance:
        return "yes", f"tolerated {reason}"
    return "no", reason


def set_aside(a, b):
    """(verdict, reason) for two panels not worth asking about: one is blank, or both are the same
    picture. Else ("", "")."""
    if min(max(ImageStat.Stat(panel).stddev) for panel in (a, b)) < 2:  # grey levels
        return "blank", "blank: a panel of one colour"
    if max(ImageStat.Stat(ImageChops.difference(a, b)).mean) < 2:
        return "copies", "copies: nearly the same picture twice, which teaches copying"
    return "", ""


# ---- panels --------------------------------------------------------------------------------------
def panel_file(number, panel):
    return f"images/{number:06d}_{panel}.png"


def save_panels(number, grid, args):
    """Cut a grid, save its panels and return them. What --trim takes off is made up by scaling."""
    image = dsd.open_image(args.grids / grid["file"])
    panels = []
    for k, panel in enumerate(dsd.cut_grid(image, grid["rows"], grid["columns"])):
        inner = args.trim, args.trim, panel.width - args.trim, panel.height - args.trim
        panels.append(panel.resize(panel.size, box=inner))
        dsd.save_image(panels[k], args.out / panel_file(number, k))
    return panels


# ---- one batch of grids --------------------------------------------------------------------------
def judge_pairs(grids, panels, model, args):
    """Transcripts of all pairs of some grids. grids: {number: record}; panels: {number: images}.

    The question is symmetric: each two panels are asked about once, and an accepted answer gives
    both orders (our choice)."""
    question = PAIR_QUESTION + args.example
    records = []
    for number, grid in grids.items():
        about = {name: grid[name] for name in ("family", "subject", "prompt")}
        for i, j in itertools.combinations(range(len(panels[number])), 2):
            record = {"grid": number, "panels": [i, j], **about}
            record |= {"captions": {}, "question": question, "answer": ""}
            record["verdict"], record["reason"] = set_aside(panels[number][i], panels[number][j])
            records.append(record)
    asked = [record for record in records if not record["verdict"]]
    cases = [[panels[record["grid"]][k] for k in record["panels"]] for record in asked]
    answers = ask(*model, cases, question, args.batch_size, args.max_new_tokens)
    for record, answer in zip(asked, answers):
        record["answer"] = answer
        record["verdict"], record["reason"] = parse(answer, args.tolerance)
    return records


def caption_pairs(records, panels, model, args):
    """Caption accepted records in place: {target panel: its caption}, one for either order."""
    question, first = INSTRUCTION_QUESTION, 0
    if args.caption == "description":
        question, first = DESCRIBE_QUESTION, 1  # the VLM is shown the target only
    accepted = [r for r in records if r["verdict"] == "yes" and not r["captions"]]
    cases = {}  # (grid, panels shown) -> images
    for record in accepted:
        number = record["grid"]
        for order in itertools.permutations(record["panels"]):
            cases[number, order[first:]] = [panels[number][k] for k in order[first:]]
    keys = sorted(cases)
    answers = ask(*model, [cases[key] for key in keys], question, args.batch_size, 100)
    captions = dict(zip(keys, answers))
    for record in accepted:
        for order in itertools.permutations(record["panels"]):
            caption = captions[record["grid"], order[first:]].removesuffix(TRUNCATED)
            record["captions"][str(order[1])] = " ".join(caption.split())


def transcript(number, grid, args):
    """The saved transcripts of one grid; [] without any, or if they are of another picture."""
    file = args.out / f"transcripts/{number:06d}.json"
    saved = dsd.read_json(file)
    if saved.get("picture") != dsd.digest(args.grids / grid["file"]):
        return []
    for record in saved["pairs"]:
        if record["verdict"] not in VERDICTS:
            raise dsd.DsdError(f'{file}: "verdict" must be "yes" or "no"; correct it')
    return saved["pairs"]


def is_done(number, grid, args):
    """Whether a grid's panels are there, and its pairs have been asked about and captioned."""
    panels = range(grid["rows"] * grid["columns"])
    records = transcript(number, grid, args)
    asked = records and all(r["captions"] for r in records if r["verdict"] == "yes")
    return asked and all((args.out / panel_file(number, k)).exists() for k in panels)


def curate_batch(batch, model, args):
    """Write the panels and the transcripts of a batch {number: grid}.

    Transcripts that are there stay; if one is missing, the whole batch is asked about again, which
    gives the same answers as the first time."""
    panels = {number: save_panels(number, grid, args) for number, grid in batch.items()}
    records = {number: transcript(number, grid, args) for number, grid in batch.items()}
    if not all(records.values()):
        judged = judge_pairs(batch, panels, model, args)
        for number in batch:
            if not records[number]:
                records[number] = [record for record in judged if record["grid"] == number]
    caption_pairs(sum(records.values(), []), panels, model, args)
    for number, grid in batch.items():
        saved = {"picture": dsd.digest(args.grids / grid["file"]), "pairs": records[number]}
        dsd.write_json(args.out / f"transcripts/{number:06d}.json", saved)


# ---- what is written from the transcripts --------------------------------------------------------
def training_pairs(records):
    """The accepted ordered pairs; `datasets` reads fields that end in `_file_name` as images."""
    pairs = []
    for record in records:
        if record["verdict"] == "yes":
            for reference, target in itertools.permutations(record["panels"]):
                pair = {"reference_file_name": panel_file(record["grid"], reference)}
                pair["target_file_name"] = panel_file(record["grid"], target)
                pair["prompt"] = record["captions"][str(target)]
                pair |= {name: record[name] for name in ("subject", "family", "grid")}
                pair |= {"reference_panel": reference, "target_panel": target}
                if pair["prompt"]:
                    pairs.append(pair)
    return pairs


def count_verdicts(records):
    verdicts = collections.Counter(record["verdict"] for record in records)
    counts = {"pairs": len(records), "accept_rate": round(verdicts["yes"] / len(records), 4)}
    return counts | {"yes": 0, "no": 0} | verdicts


def draw_sheet(records, args, name):
    """A contact sheet of at most 24 records: both panels side by side, the reason below."""
    cells = []
    for record in random.Random(0).sample(records, min(24, len(records))):
        files = [args.out / panel_file(record["grid"], k) for k in record["panels"]]
        pair = make_image_grid([dsd.open_image(file) for file in files], 1, 2)
        cells.append((pair, f"grid {record['grid']}: {record['reason'][:200]}"))
    (args.out / name).unlink(missing_ok=True)
    if cells:
        dsd.contact_sheet([cells[i : i + 4] for i in range(0, len(cells), 4)], args.out / name)


def write_results(records, args):
    """Write all but the transcripts and the panels, and say how many pairs were accepted."""
    pairs = training_pairs(records)
    summary = {"training_pairs": len(pairs)} | count_verdicts(records) | {"by_family": {}}
    for family in sorted({record["family"] for record in records}):
        members = [record for record in records if record["family"] == family]
        summary["by_family"][family] = count_verdicts(members)
    dsd.write_json(args.out / "metadata.jsonl", pairs)
    dsd.write_json(args.out / "summary.json", summary)
    draw_sheet([r for r in records if r["verdict"] == "yes"], args, "accepted.png")
    draw_sheet([r for r in records if r["verdict"] != "yes"], args, "rejected.png")
    if not pairs:
        found = f"none of {len(records)} pairs was accepted (see {args.out}/rejected.png)"
        ways = "make more or better grids, or try another --vlm or a higher --tolerance"
        raise dsd.DsdError(f"{found}; {ways}")
    accepted = f"{summary['yes']} of {len(records)} pairs accepted ({summary['accept_rate']:.0%})"
    print(f"{accepted}: {len(pairs)} training pairs in {args.out}")


# ---- command line --------------------------------------------------------------------------------
def parse_args():
    parser = dsd.Parser(__doc__, "runs/pairs")
    add, whole, positive = parser.add_argument, dsd.at_least(0), dsd.at_least(1)
    add("--vlm", default=dsd.MINIATURE / "vlm", help="the curator: folder or hub name of a VLM")
    add("--grids", type=Path, default=Path("runs/grids"), help="what generate_grids.py wrote")
    about = "describe the target, or say how to turn the reference into it"
    add("--caption", choices=["description", "instruction"], default="description", help=about)
    add("--example", default=EXAMPLE, help="a sample answer, which is appended to the question")
    about = "accept a pair if the comparison names at most this many differing parts"
    add("--tolerance", type=whole, default=0, help=about)
    add("--batch_size", type=positive, default=64, help="pairs asked about together")
    add("--max_new_tokens", type=positive, default=400, help="in an answer; else it is truncated")
    add("--trim", type=whole, default=0, help="pixels to cut off at each side of a panel")
    return parser.parse("curate", folder="vlm")


def read_grids(args):
    """The grids of generate_grids.py, {number: record}, if their pictures are all there."""
    file = args.grids / "grids.jsonl"
    if not file.exists():
        raise dsd.DsdError(f"no {file}; run generate_grids.py first, or give --grids")
    grids = dsd.read_records(file, "file", "prompt", "subject", "family")
    missing = [grid["file"] for grid in grids if not (args.grids / grid["file"]).exists()]
    if missing or not grids:
        lack = f"{len(missing)} of {len(grids)} grids are missing, such as {missing[:1]}"
        raise dsd.DsdError(f"{file}: {lack}; run generate_grids.py again")
    return dict(enumerate(grids))


def main():
    args = parse_args()
    grids = read_grids(args)
    lock = dsd.open_out(args, "curate", changeable=["grids", "batch_size"])
    unfinished = {number for number, grid in grids.items() if not is_done(number, grid, args)}
    model = load_vlm(args.vlm, args.quantize) if unfinished else None
    grids_in_batch = max(args.batch_size // 6, 1)  # a 2x2 grid has six pairs
    for batch in dsd.batches(list(grids.items()), grids_in_batch, "curate"):
        if unfinished & dict(batch).keys():
            curate_batch(dict(batch), model, args)
    if PartialState().is_main_process:
        records = []
        for number, grid in grids.items():
            records += transcript(number, grid, args)
        write_results(records, args)
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
