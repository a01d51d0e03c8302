"""Does it work? Concept preservation (CP) and prompt following (PF) of several methods (section 4).

    python evaluate.py                                    # the miniature: six rows on 80 cases
    python evaluate.py --rows DSD --adapter runs/adapter  # some rows, by their names or groups
    python evaluate.py --folder dreambench_plus/data --vlm Qwen/Qwen2.5-VL-7B-Instruct \\
        --model black-forest-labs/FLUX.1-dev --adapter FOLDER    # real pictures: one CUDA GPU

The cases are critters held out of every training, rendered in new contexts. The truth is known, so
a judge (an image classifier that no other step uses) can say of each attribute whether it is right:
    CP      share of the identity's attributes that are kept; "all kept": of pictures that keep all
    PF      share of scene, accessory, light and pose that are as asked; "de-biased": only of those
            that differ from the reference's, so that a copy of the reference scores nothing
    CPxPF   the product for each picture, then averaged; also by what is asked of the pose: the
            reference's own, moved to another place, or turned
--witness adds the CP and CPxPF of a second judge. A vision-language model scores CP and PF as well,
0 to 4 as in DreamBench++, divided by 4. A folder in DreamBench++'s layout (images/**/NN.jpg and
captions/**/NN.txt: the subject's name, then one prompt a line) has only these scores.

Writes to --out: table.md, scatter.png, contact_sheet.png, scores.json, and in rows/NAME/ a PNG and
a JSON file (scores and answers) for each picture. Started again, it makes only what is missing;
--rows, --strengths and --references may change. miniature/ablations.py makes the long table.
"""

import dsd

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import FluxControlPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from PIL import Image

import curate
import sample
from miniature import exams

COLUMNS = {  # of the two tables: heading -> score
    "subject": {
        "CP": "cp",
        "all kept": "all_kept",
        "PF": "pf",
        "CPxPF": "cp_pf",
        "de-biased CPxPF": "cp_pf_new",
        "VLM CP": "vlm_cp",
        "VLM PF": "vlm_pf",
        "VLM CPxPF": "vlm_cp_pf",
        "VLM de-biased": "vlm_cp_pf_new",
        "CPxPF, same pose": "cp_pf_same pose",
        "CPxPF, moved": "cp_pf_moved",
        "CPxPF, turned": "cp_pf_turned",
        "witness's CP": "witness_cp",
        "witness's CPxPF": "witness_cp_pf",
        "judges agree": "judges_agree",
        "DSD minus this row, CPxPF": "dsd_minus",
    },
    "relight": {
        "identity (CP)": "cp",
        "scene kept": "scene_as_wanted",
        "pose kept": "pose",
        "light as asked": "light_as_wanted",
    },
}


# ---- the rows ------------------------------------------------------------------------------------
@dataclasses.dataclass
class Row:
    """One line of the table."""

    name: str
    group: str
    draw: Callable  # (pipe, cases, args) -> images
    pipeline: type | None = None  # the class of pipe
    options: dict = dataclasses.field(default_factory=dict)  # those that differ in this row
    train: Callable | None = None  # called before the first picture is drawn


def prompt_tokens(model, kind):
    """How many tokens of a prompt the teacher was trained with; kind: "panel" or "sheet"."""
    return dsd.folder_settings(model, "evaluate").get(f"{kind}_prompt_tokens", 512)


def prompt_guidance(model):
    """The scale of the prompt guidance (by a second pass) in the rows of the untrained teacher."""
    return dsd.folder_settings(model, "evaluate").get("true_cfg_scale", 1.0)


def teacher(pipe, cases, args, prompts=None, frames=1, **more):
    """Pictures by a stock pipeline with the teacher's settings; every case has its generator."""
    limit = prompt_tokens(args.model, "panel" if frames == 1 else "sheet")
    pixels = pipe(
        prompts or [case.prompt for case in cases],
        negative_prompt=[""] * len(cases),
        width=frames * args.width,
        height=args.height,
        num_inference_steps=args.steps,
        true_cfg_scale=prompt_guidance(args.model),
        guidance_scale=args.guidance_scale,
        max_sequence_length=min(limit, pipe.tokenizer_2.model_max_length),
        output_type="pt",
        generator=[torch.Generator("cpu").manual_seed(case.seed) for case in cases],
        **more,
    ).images
    return dsd.to_images(pixels)


def sdedit(pipe, cases, args, strength):
    """SDEdit (Meng et al. 2022): the teacher goes on from the reference with some noise."""
    return teacher(pipe, cases, args, image=[case.image for case in cases], strength=strength)


def two_frames(cases):
    """(reference | black) for each case, and the mask of the right frame, which is to be drawn."""
    size = cases[0].image.size
    black, white = Image.new("RGB", size, "black"), Image.new("RGB", size, "white")
    mask = make_image_grid([black, white], 1, 2).convert("L")
    return [make_image_grid([case.image, black], 1, 2) for case in cases], mask


def inpainting(pipe, cases, args, **more):
    """In-context inpainting: the unmodified teacher fills the right frame of two."""
    canvases, mask = two_frames(cases)
    prompts = [case.sheet_prompt for case in cases]  # what both frames show
    more = {"image": canvases, "mask_image": mask, "strength": 1.0, **more}
    drawn = teacher(pipe, cases, args, prompts, frames=2, **more)
    return [dsd.cut_grid(image, 1, 2)[1] for image in drawn]


def zero_shot(pipe, cases, args):
    """This project's method, by sample.py's own function, as the adapter was trained."""
    facts = {"guidance_scale": args.guidance_scale} | dsd.adapter_facts(args.adapter)
    args = argparse.Namespace(**vars(args) | {"guidance_scale": facts["guidance_scale"]})
    images = [case.image for case in cases]
    prompts = [case.prompt for case in cases]
    seeds = [case.seed for case in cases]
    return sample.draw_pictures(pipe, images, prompts, seeds, args, facts)


def held_by_cases(name):
    """A way to draw without a model: the cases hold the picture."""
    return lambda pipe, cases, args: [getattr(case, name) for case in cases]


def all_rows(args):
    """The rows of this script, in the table's order."""
    rows = [  # the first is a floor: the teacher never sees the reference
        Row("prompt alone", "bounds", teacher, FluxPipeline),
        Row("reference copied", "bounds", held_by_cases("image")),
    ]
    if not args.folder:
        rows.append(Row("true rendering", "bounds", held_by_cases("truth")))
    for strength in args.strengths:
        draw = functools.partial(sdedit, strength=strength)
        rows.append(Row(f"SDEdit {strength}", "zero-shot", draw, FluxImg2ImgPipeline))
    rows.append(Row("in-context inpainting", "zero-shot", inpainting, FluxInpaintPipeline))
    rows.append(Row("DSD", "DSD", zero_shot, FluxControlPipeline))
    return rows


# ---- drawing and scoring -------------------------------------------------------------------------
def load_scorers(args):
    """score(cases, images) -> records, by one or two judges, if the truth is known, and a VLM."""
    judge = None if args.folder else exams.Judge(args.judge)
    witness = exams.Judge(args.witness) if args.witness and not args.folder else None
    vlm = curate.load_vlm(args.vlm, args.quantize)
    return functools.partial(exams.score, judge, witness, vlm)


def load(row, args):
    """The pipeline of a row, or None, after the row's training."""
    if row.train:
        row.train()
    if row.pipeline is None:
        return None
    how = {"quantize": args.quantize, "offload": args.offload}
    if row.pipeline is FluxControlPipeline:
        how["adapter"] = args.adapter
        how["prompt_tokens"] = dsd.adapter_facts(args.adapter)["prompt_tokens"]
    return dsd.load_pipeline(row.pipeline, args.model, **how)


def run_row(row, cases, score, args):
    """Draw and score what is missing of a row, and return its records, one for each case."""
    args = argparse.Namespace(**vars(args) | row.options)
    pictures = [args.out / "rows" / row.name / f"{k:04d}.png" for k in range(len(cases))]
    pipe = None
    for batch in dsd.batches(list(zip(cases, pictures)), args.batch_size, row.name):
        members, files = zip(*batch)
        if all(file.with_suffix(".json").exists() for file in files):
            continue
        if not all(file.exists() for file in files):
            pipe = pipe or load(row, args)
            for image, file in zip(row.draw(pipe, members, args), files):
                if not file.exists():  # with more --references a batch may begin with old pictures
                    dsd.save_image(image, file)
        images = [dsd.open_image(file) for file in files]
        for case, file, scores in zip(members, files, score(members, images)):
            about = {"reference": case.reference, "kind": case.kind, "prompt": case.prompt}
            dsd.write_json(file.with_suffix(".json"), about | scores)
    return [dsd.read_json(file.with_suffix(".json")) for file in pictures]


# ---- means and intervals -------------------------------------------------------------------------
def bootstrap(values, references, resamples=2000):
    """[mean, low, high] with a 95 % interval, of the values that are not None; None without values.

    References are resampled, not pictures: the pictures of one reference are not independent."""
    groups = {}  # reference -> its values
    for reference, value in zip(references, values):
        if value is not None:
            groups.setdefault(reference, []).append(value)
    if not groups:
        return None
    ordered = [groups[reference] for reference in sorted(groups)]
    sums = torch.tensor([sum(group) for group in ordered], dtype=torch.float64)
    counts = torch.tensor([len(group) for group in ordered], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(ordered), (resamples, len(ordered)), generator=generator)
    means = sums[draws].sum(1) / counts[draws].sum(1)  # (resamples,)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    mean = sums.sum() / counts.sum()
    return [round(float(number), 4) for number in (mean, low, high)]


def summarise(records, ours=(), headline="cp_pf"):
    """{"subject": {score: [mean, low, high]}, "relight": ...}, and counts, of one row.

    "dsd_minus" is by how much DSD is better in the score `headline` on the same cases; ours: DSD's
    records."""
    for record, own in zip(records, ours):
        if own.get(headline) is None or record.get(headline) is None:
            record["dsd_minus"] = None
        else:
            record["dsd_minus"] = own[headline] - record[headline]
    summary = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        members = [record for record in records if record["kind"] == kind]
        names, unscored = set(), 0
        for record in members:
            names |= {name for name in record if isinstance(record[name], float | None)}
            answers = record["answers"].values()
            unscored += sum(exams.parse_score(answer) is None for answer in answers)
        references = [record["reference"] for record in members]
        summary[kind] = {"n": len(members), "unscored": unscored}
        for name in sorted(names):
            values = [record.get(name) for record in members]
            summary[kind][name] = bootstrap(values, references)
    return summary


# ---- what a reader sees --------------------------------------------------------------------------
def markdown(summaries, kind):
    """A table of the rows that have cases of this kind; columns without a value are left out."""
    scores = {name: summary[kind] for name, summary in summaries.items() if kind in summary}
    columns = {}
    for heading, score in COLUMNS[kind].items():
        if any(of_row.get(score) for of_row in scores.values()):
            columns[heading] = score
    lines = [["method", "cases", *columns], ["---"] * (len(columns) + 2)]
    for name, of_row in scores.items():
        cells = [name, str(of_row["n"])]
        for score in columns.values():
            mean = of_row.get(score)
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*mean) if mean else "")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def error_bar(summary, score):
    """A mean, and how far its interval reaches below and above it."""
    mean, low, high = summary["subject"].get(score) or [float("nan")] * 3
    return mean, [[mean - low], [high - mean]]


def draw_scatter(summaries, keys, path):
    """Left: CP against PF; grey lines join points of the same product. Right: this product for each
    row, over all cases and by what is asked of the pose. Bars are 95 % intervals.

    keys: the names of CP, PF and the product."""
    figure = Figure(figsize=(13, 2 + 0.35 * len(summaries)), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = torch.linspace(0.02, 1, 100)
    for product in torch.arange(0.1, 1, 0.1):
        left.plot(x, product / x, color="0.9", zorder=0)
    marks = {"": "ko", "_same pose": "C0s", "_moved": "C1D", "_turned": "C2^"}
    for k, summary in enumerate(summaries.values()):
        cp, cp_ends = error_bar(summary, keys[0])
        pf, pf_ends = error_bar(summary, keys[1])
        left.errorbar(pf, cp, cp_ends, pf_ends, color=f"C{k % 10}", fmt="osD^v"[k // 10 % 5])
        for j, (case, mark) in enumerate(marks.items()):
            mean, ends = error_bar(summary, keys[2] + case)
            how = {"fmt": mark, "markersize": 4, "label": case[1:] or "all cases"}
            right.errorbar(mean, k + 0.2 * j - 0.3, xerr=ends, **how)
    right.legend(handles=right.containers[:4], loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    left.set(xlabel="prompt following (PF)", ylabel="concept preservation (CP)")
    left.set(xlim=(0, 1.02), ylim=(0, 1.05))
    right.set(xlabel="CP x PF", xlim=(0, 1.02), ylim=(len(summaries), -1))
    right.set_yticks(range(len(summaries)), summaries)
    for k, label in enumerate(right.get_yticklabels()):  # the colours of the left half
        label.set_color(f"C{k % 10}")
    with dsd.writing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def draw_sheet(records, cases, args):
    """The contact sheet: a line for each row, with cases of up to eight references."""
    cases_of_one = len(cases) // len({case.reference for case in cases})
    columns = range(0, len(cases), cases_of_one + 1)[:8]
    sheet = [[(cases[k].image, f"reference; {cases[k].prompt}") for k in columns]]
    for name in records:
        folder = args.out / "rows" / name
        sheet.append([(dsd.open_image(folder / f"{k:04d}.png"), name) for k in columns])
    dsd.contact_sheet(sheet, args.out / "contact_sheet.png")


def report(records, cases, args):
    """Write table.md, scores.json, scatter.png and contact_sheet.png of {row's name: records}."""
    keys = ("vlm_cp", "vlm_pf", "vlm_cp_pf") if args.folder else ("cp", "pf", "cp_pf")
    ours, summaries = records.get("DSD", []), {}
    for name, of_row in records.items():
        summaries[name] = summarise(of_row, ours, keys[2])
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    parts = [f"Made by `{command}`. Means with 95 % bootstrap intervals over references."]
    parts.append(markdown(summaries, "subject"))
    if not args.folder:
        parts.append("Relighting (the same scene and pose in another light):")
        parts.append(markdown(summaries, "relight"))
    unscored = sum(kind["unscored"] for row in summaries.values() for kind in row.values())
    if unscored:
        parts.append(f"Answers of the VLM without a score, which are left out: {unscored}")
    with dsd.writing(args.out / "table.md") as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    dsd.write_json(args.out / "scores.json", summaries)
    draw_scatter(summaries, keys, args.out / "scatter.png")
    draw_sheet(records, cases, args)


# ---- command line --------------------------------------------------------------------------------
def parse_args(parser, **defaults):
    """Add this script's options to a parser and parse. `defaults` are a caller's; the model's
    folder and the adapter bring more."""
    add, count = parser.add_argument, dsd.at_least(1)
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add("--adapter", type=Path, help="what DSD uses; if not given, the one shipped with the model")
    add("--vlm", default=dsd.MINIATURE / "vlm", help="gives scores: folder or hub name of a VLM")
    add("--judge", type=Path, default=dsd.MINIATURE / "judge", help="gives scores: a classifier")
    add("--witness", type=Path, help="a second judge, of another architecture")
    add("--rows", nargs="+", metavar="NAME", help="only these rows, and groups of rows")
    add("--folder", type=Path, help="DreamBench++'s layout, in place of the miniature's cases")
    add("--references", dest="count", type=count, help="how many; if not given, 16 or all")
    about = "how many for each reference, beside another light; of a folder all, if not given"
    contexts = None if parser.peek("folder") else 4
    add("--prompts", dest="contexts", type=count, default=contexts, help=about)
    tenths = {"type": float, "choices": [k / 10 for k in range(1, 11)], "metavar": "S"}
    add("--strengths", nargs="+", default=[0.5], help="of SDEdit: 0.1, 0.2, ..., 1.0", **tenths)
    add("--seed", type=dsd.at_least(0), default=0, help="of references, prompts and noise")
    sample.add_drawing_options(parser)
    model, adapter = parser.peek("model"), parser.peek("adapter")
    shipped = dsd.folder_settings(model, "sample").get("shipped_adapter")
    if not adapter and shipped:
        adapter = Path(model) / shipped
    facts = dsd.adapter_facts(adapter) if adapter else {}
    own = {"width", "height", "image_guidance", "text_guidance"} & facts.keys()
    defaults |= {name: facts[name] for name in own}
    return parser.parse("sample", adapter=adapter, **defaults)


def choose_rows(rows, args):
    """The rows that --rows asks for."""
    known = {row.name.lower() for row in rows} | {row.group.lower() for row in rows}
    wanted = {name.lower() for name in args.rows or known}
    if wanted - known:
        unknown, listed = min(wanted - known), ", ".join(sorted(known))
        raise dsd.DsdError(f"no row or group is called {unknown}; there are: {listed}")
    chosen = [row for row in rows if {row.name.lower(), row.group.lower()} & wanted]
    if not args.adapter and any(row.pipeline is FluxControlPipeline for row in chosen):
        raise dsd.DsdError("this model ships no adapter; give --adapter FOLDER")
    return chosen


def all_cases(args):
    if args.folder:
        return exams.folder_cases(args)
    seen = exams.seen_identities(args.adapter)
    numbers = range(args.count or 16)
    return exams.world_cases(numbers, args.contexts, args.seed, args.width, seen)


def weights_digest(args):
    """Of all weights of the miniature; a large model is known by its name alone."""
    files = []
    for folder in filter(None, (args.model, args.vlm, args.judge, args.witness)):
        files += Path(folder).rglob("*.safetensors")
    return dsd.digest(*[file for file in sorted(files) if file.stat().st_size < 2**28])


def evaluate(rows, args, **more):
    """Draw and score the rows; after each one, report what is known so far.

    more: what else decides the results."""
    dsd.check_model(args.model, args.width, args.height)
    cases = all_cases(args)
    lock = dsd.open_out(
        args,
        "evaluate",
        changeable=["rows", "count", "strengths", "batch_size", "offload", "compile"],
        weights=weights_digest(args),
        adapter_sha256=args.adapter and dsd.digest(dsd.adapter_file(args.adapter)),
        true_cfg_scale=prompt_guidance(args.model),
        prompt_tokens=[prompt_tokens(args.model, kind) for kind in ("panel", "sheet")],
        **more,
    )
    score, records = load_scorers(args), {}
    for row in rows:
        new = not (args.out / "rows" / row.name).exists()
        records[row.name] = run_row(row, cases, score, args)
        if PartialState().is_main_process and (new or row is rows[-1]):
            report(records, cases, args)
    lock.release()
    if PartialState().is_main_process:
        print((args.out / "table.md").read_text(encoding="utf-8"))
        pictures = f"{args.out}/contact_sheet.png and {args.out}/scatter.png"
        print(f"{len(rows)} rows in {args.out}; look at {pictures}")


def main():
    args = parse_args(dsd.Parser(__doc__, "runs/evaluate"))
    evaluate(choose_rows(all_rows(args), args), args)


if __name__ == "__main__":
    dsd.run_main(main)
