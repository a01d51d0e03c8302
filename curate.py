"""Step 2 (paper section 3.2): a vision-language model keeps the pairs that show the same subject.

The grids of step 1 are cut into panels, without gutters where a model drew them. A vision-language
model (VLM) is asked about each two panels in a chain of thought: name the common subject, describe
it in each image, compare part by part, then give a one-word verdict. The targets of accepted pairs
are captioned.

    python curate.py                                                   # the miniature, on any CPU
    python curate.py --vlm Qwen/Qwen2.5-VL-7B-Instruct --batch_size 8  # a GPU of 24 GB or more

Reads runs/grids/grids.jsonl and writes to runs/pairs (--out):
    images/            the panels: `000012_1.png` is panel 1 of grid 12
    metadata.jsonl     the accepted ordered pairs, for load_dataset("imagefolder", data_dir=...)
    transcripts/       for each grid: question, answer, verdict and reason of its six pairs
    summary.json       counts and the accept rate, by family
    accepted.png, rejected.png   contact sheets with the reasons: look at both before you train
Started again, the same command asks only about batches that are not complete. To overrule the
curator, change "verdict" in a file of transcripts/ to "yes" or "no" and run the command again.
"""

import dsd

import collections
import itertools
import random
import re
from pathlib import Path

import numpy
import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid
from PIL import Image, ImageChops, ImageStat
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


# ---- asking --------------------------------------------------------------------------------------
def load_vlm(name, quantize="none"):
    """The model and the processor of an image-text-to-text folder or hub name."""
    with dsd.explained(f"cannot load {name} as a vision-language model with a chat template"):
        vlm = dsd.load_language_model(AutoModelForImageTextToText, name, quantize)
        processor = AutoProcessor.from_pretrained(name)
        processor.apply_chat_template(conversation(1, "?"))  # fails without a template
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # every answer starts where its question ends
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
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
TRUNCATED = "[truncated]"
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


def gutter_depth(lines, colour):
    """How far a gutter of a colour reaches into the lines (n, pixels, 3) beside a seam; 0: nowhere.

    A gutter fills its lines and ends sharply. A plain background does not end here, or not sharply:
    where the subject's tip is."""
    share = (abs(lines.astype(int) - colour).max(axis=2) < 16).mean(axis=1)  # (n,) in this colour
    whole, end = int((share < 0.98).argmax()), int((share < 0.7).argmax())  # 0: none
    return end if 0 < whole <= end <= whole + 1 else 0


def without_gutters(lines, parts):
    """A grid's lines (n, pixels, 3) without the gutters that many models draw between the panels,
    and without a frame of their colour.

    Where a gutter covers a part of a panel, mirrored lines take its place: the scale stays."""
    if parts == 1:
        return lines
    side = len(lines) // parts
    reach = side // 8 + 1
    starts, ends = [], []
    for seam in range(side, side * parts, side):
        colour = numpy.median(lines[seam - 1 : seam + 1], axis=(0, 1))  # (3,), of both panels
        before = gutter_depth(lines[seam - reach : seam][::-1], colour)
        after = gutter_depth(lines[seam : seam + reach], colour)
        if before == 0 or after == 0:
            return lines
        ends.append(seam - before)
        starts.append(seam + after)
    starts.insert(0, gutter_depth(lines[:reach], colour))
    ends.append(len(lines) - gutter_depth(lines[-reach:][::-1], colour))
    whole = side - side % 8
    panels = []
    for k, (start, end) in enumerate(zip(starts, ends)):
        lost = max(whole - (end - start), 0)
        first = min(start - k * side, lost)  # of the lost lines, those before the panel
        padding = (first, lost - first), (0, 0), (0, 0)
        panels.append(numpy.pad(lines[start:end], padding, mode="reflect")[:whole])
    return numpy.concatenate(panels)


def cut_panels(image, rows, columns):
    """The panels of a grid, in reading order, without gutters."""
    pixels = without_gutters(numpy.asarray(image), rows)  # (H, W, 3)
    pixels = without_gutters(pixels.swapaxes(0, 1), columns).swapaxes(0, 1)
    return dsd.cut_grid(Image.fromarray(pixels), rows, columns)


def save_panels(number, grid, args):
    """Cut a grid, save its panels and return them."""
    panels = cut_panels(dsd.open_image(args.grids / grid["file"]), grid["rows"], grid["columns"])
    for k, panel in enumerate(panels):
        dsd.save_image(panel, args.out / panel_file(number, k))
    return panels


# ---- one batch of grids --------------------------------------------------------------------------
def judge_pairs(grids, panels, model, args):
    """Transcripts of all pairs of some grids. grids: {number: record}; panels: {number: images}.

    The question is symmetric: each two panels are asked about once, and an accepted answer gives
    both orders (our choice)."""
    question = PAIR_QUESTION + args.example
    records, asked, cases = [], [], []
    for number, grid in grids.items():
        for i, j in itertools.combinations(range(len(panels[number])), 2):
            pair = [panels[number][i], panels[number][j]]
            record = {"grid": number, "panels": [i, j]}
            record |= {name: grid[name] for name in ("family", "subject", "prompt")}
            record |= {"captions": {}, "question": question, "answer": ""}
            record["verdict"], record["reason"] = set_aside(*pair)
            records.append(record)
            if not record["verdict"]:
                asked.append(record)
                cases.append(pair)
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
    if not saved or saved.get("picture") != dsd.digest(args.grids / grid["file"]):
        return []
    with dsd.explained(f"{file}: not a transcript; correct it or delete it"):
        for record in saved["pairs"]:
            if record["verdict"] not in VERDICTS:
                raise ValueError(f'"verdict" must be "yes" or "no", not {record["verdict"]!r}')
            missing = {"captions", "panels", "reason", "family", "subject"} - set(record)
            if missing or not isinstance(record["captions"], dict):
                raise ValueError("a pair without captions, panels, reason, family or subject")
        return saved["pairs"]


def is_done(number, grid, args):
    """Whether all pairs of a grid have been asked about, and the accepted ones captioned."""
    records = transcript(number, grid, args)
    return bool(records) and all(r["captions"] for r in records if r["verdict"] == "yes")


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
    return counts | {"yes": verdicts["yes"], "no": verdicts["no"]} | verdicts


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
        raise dsd.DsdError(
            f"none of {len(records)} pairs was accepted (see {args.out}/rejected.png and "
            "transcripts/); make more or better grids, or try another --vlm or a higher --tolerance"
        )
    rate = f"{summary['accept_rate']:.0%}"
    print(
        f"{summary['yes']} of {len(records)} pairs accepted ({rate}; the verdicts are in "
        f"summary.json): {len(pairs)} training pairs in {args.out}"
    )


# ---- command line --------------------------------------------------------------------------------
def parse_args():
    parser = dsd.Parser(__doc__, "runs/pairs")
    add, whole = parser.add_argument, dsd.at_least(1)
    about = "the curator: an image-text-to-text folder or hub name"
    add("--vlm", default=dsd.MINIATURE / "vlm", help=about)
    add("--grids", type=Path, default=Path("runs/grids"), help="what generate_grids.py wrote")
    about = "describe the target, or say how to turn the reference into it"
    add("--caption", choices=["description", "instruction"], default="description", help=about)
    add("--example", default=EXAMPLE, help="a sample answer, which is appended to the question")
    about = "accept a pair if the comparison names at most this many differing parts"
    add("--tolerance", type=dsd.at_least(0), default=0, help=about)
    add("--batch_size", type=whole, default=64, help="pairs in a batch; affects speed and memory")
    about = "longest answer; longer ones count as truncated"
    add("--max_new_tokens", type=whole, default=400, help=about)
    return parser.parse("curate", folder="vlm")


def read_grids(args):
    """The grids of generate_grids.py, {number: record}; one that is listed twice counts once."""
    file, again = args.grids / "grids.jsonl", "run generate_grids.py again"
    if not file.exists():
        raise dsd.DsdError(f"no {file}; run generate_grids.py first, or give --grids")
    records = dsd.read_records(file, "file", "prompt", "subject", "family")
    grids = list({record["file"]: record for record in records}.values())
    if not grids:
        raise dsd.DsdError(f"{file}: no grids; {again}")
    for grid in grids:
        sides = [grid.get("rows"), grid.get("columns")]
        if sides == [1, 1] or any(side not in range(1, 9) for side in sides):
            raise dsd.DsdError(f"{file}: 1 to 8 rows and columns, more than one panel; {again}")
    return dict(enumerate(grids))


def check_grids_exist(grids, args):
    """Refuse an unfinished run of generate_grids.py before a model is loaded."""
    files = [args.grids / grid["file"] for grid in grids.values()]
    missing = [file for file in files if not file.exists()]
    if missing:
        raise dsd.DsdError(
            f"{len(missing)} of {len(grids)} grids are missing, such as {missing[0]}; run "
            "generate_grids.py again"
        )


def main():
    args = parse_args()
    grids = read_grids(args)
    check_grids_exist(grids, args)
    lock = dsd.open_out(args, "curate", changeable=["grids", "batch_size"])
    unfinished = {number for number, grid in grids.items() if not is_done(number, grid, args)}
    model = load_vlm(args.vlm, args.quantize) if unfinished else None
    grids_in_batch = max(args.batch_size // 6, 1)  # a 2x2 grid has six pairs
    for batch in dsd.batches(list(grids.items()), grids_in_batch, "curate"):
        if unfinished & dict(batch).keys():
            curate_batch(dict(batch), model, args)
        for number, grid in batch:
            panels = [panel_file(number, k) for k in range(grid["rows"] * grid["columns"])]
            if not all((args.out / panel).exists() for panel in panels):  # deleted since
                save_panels(number, grid, args)
    if PartialState().is_main_process:
        records = []
        for number, grid in grids.items():
            records += transcript(number, grid, args)
        write_results(records, args)
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
