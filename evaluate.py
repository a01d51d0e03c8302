"""Does it work? Concept preservation (CP) and prompt following (PF) of several methods on the same cases (section 4).

    python evaluate.py                                     # the miniature: six rows on 80 cases, minutes on two cores
    python evaluate.py --rows DSD --adapter runs/adapter   # only some rows, by their names or groups
    python evaluate.py --folder dreambench_plus/data --vlm Qwen/Qwen2.5-VL-7B-Instruct \\
        --model black-forest-labs/FLUX.1-dev --adapter FOLDER             # real pictures: one CUDA GPU

The cases are critters held out of every training, rendered in new contexts. The truth is known, so a judge (an image
classifier that no other step uses) can say of each attribute whether it is right:
    CP      share of the identity's seven attributes that are kept; "all kept": share of pictures that keep all seven
    PF      share of scene, accessory, light and pose that are as asked; "de-biased": only of those that differ from
            the reference's, so that a copy of the reference scores nothing
    CPxPF   the product for each picture, then averaged; also by what is asked of the pose: the reference's own, moved
            to another place, or turned
--witness adds the CP and CPxPF of a second judge. A vision-language model scores CP and PF as well, 0 to 4 as in
DreamBench++, divided by 4. A folder in DreamBench++'s layout (images/**/NN.jpg and captions/**/NN.txt: the subject's
name, then one prompt a line) has only these scores.

Writes to --out: table.md, scatter.png, contact_sheet.png, scores.json, and in rows/NAME/ a PNG and a JSON file (scores
and answers) for each picture. Started again, the same command makes only what is missing; --rows, --strengths and
--references may change in between. miniature/ablations.py makes the long table, with tuned methods and ablations.
"""

import dsd

import argparse
import collections
import sys
from pathlib import Path

import torch
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


# ---- the rows --------------------------------------------------------------------------------------------------------
# One line of the table: draw(pipe, cases, args) -> images, with a pipeline of this class and options of its own.
# `train` is called before the first picture is drawn, and returns further options.
Row = collections.namedtuple(
    "Row", "name group draw pipeline options train", defaults=[None, {}, dict]
)


def teacher(pipe, cases, args, prompts=None, frames=1, **more):
    """Pictures by a stock pipeline with the teacher's settings; every case has a generator of its own."""
    tokens = min(
        args.prompt_tokens[frames - 1], pipe.tokenizer_2.model_max_length
    )  # as many as it was trained with
    return dsd.to_images(
        pipe(
            prompts or [case.prompt for case in cases],
            negative_prompt=[""] * len(cases),
            width=frames * args.width,
            height=args.height,
            num_inference_steps=args.steps,
            true_cfg_scale=args.true_cfg_scale,
            guidance_scale=args.guidance_scale,
            max_sequence_length=tokens,
            output_type="pt",
            generator=[torch.Generator("cpu").manual_seed(case.seed) for case in cases],
            **more,
        ).images
    )


def sdedit(pipe, cases, args):
    """SDEdit (Meng et al. 2022): the reference gets noise of some strength, and the teacher goes on from there."""
    return teacher(pipe, cases, args, image=[case.image for case in cases], strength=args.strength)


def two_frames(cases):
    """(reference | black) for each case, and the mask of the right frame, which is to be drawn."""
    black, white = (Image.new("RGB", cases[0].image.size, colour) for colour in ("black", "white"))
    mask = make_image_grid([black, white], 1, 2).convert("L")
    return [make_image_grid([case.image, black], 1, 2) for case in cases], mask


def inpainting(pipe, cases, args, **more):
    """In-context inpainting: the unmodified teacher fills the right frame; the prompt says what both frames show."""
    canvases, mask = two_frames(cases)
    drawn = teacher(
        pipe,
        cases,
        args,
        [case.sheet_prompt for case in cases],
        frames=2,
        image=canvases,
        mask_image=mask,
        strength=1.0,
        **more,
    )
    return [dsd.cut_grid(image, 1, 2)[1] for image in drawn]


def zero_shot(pipe, cases, args):
    """This project's method, by sample.py's own function, with the frames and distilled guidance of its training."""
    facts = {"guidance_scale": args.guidance_scale} | dsd.adapter_facts(args.adapter)
    own = argparse.Namespace(**vars(args) | {"guidance_scale": facts["guidance_scale"]})
    images, prompts, seeds = zip(*[(case.image, case.prompt, case.seed) for case in cases])
    return sample.draw_pictures(pipe, images, prompts, seeds, own, facts["frames"])


def all_rows(args):
    """The rows of this script, in the table's order."""
    truth = (
        []
        if args.folder
        else [Row("true rendering", "bounds", lambda pipe, cases, args: [c.truth for c in cases])]
    )
    return [
        Row(
            "prompt alone", "bounds", teacher, FluxPipeline
        ),  # a floor: the teacher never sees the reference
        Row("reference copied", "bounds", lambda pipe, cases, args: [c.image for c in cases]),
        *truth,
        *[
            Row(f"SDEdit {s}", "zero-shot", sdedit, FluxImg2ImgPipeline, {"strength": s})
            for s in args.strengths
        ],
        Row("in-context inpainting", "zero-shot", inpainting, FluxInpaintPipeline),
        Row("DSD", "DSD", zero_shot, FluxControlPipeline),
    ]


# ---- drawing and scoring ---------------------------------------------------------------------------------------------
def load(row, args):
    """The pipeline of a row and its options."""
    args = argparse.Namespace(**vars(args) | row.train())
    adapter = args.adapter if row.pipeline is FluxControlPipeline else None
    tokens = dsd.adapter_facts(adapter)["prompt_tokens"] if adapter else None
    return row.pipeline and dsd.load_pipeline(
        row.pipeline, args.model, args.quantize, args.offload, adapter, tokens
    ), args


def run_row(row, cases, args):
    """Draw and score what is missing of a row, and return its records. Several processes share the batches."""
    args, loaded = argparse.Namespace(**vars(args) | row.options), None
    all_files = [args.out / "rows" / row.name / f"{k:04d}.png" for k in range(len(cases))]
    for batch in dsd.batches(list(zip(cases, all_files)), args.batch_size, row.name):
        some, files = zip(*batch)
        if all(file.with_suffix(".json").exists() for file in files):
            continue
        if not all(file.exists() for file in files):
            pipe, options = loaded = loaded or load(row, args)
            for image, file in zip(row.draw(pipe, some, options), files):
                if (
                    not file.exists()
                ):  # with more --references a batch may begin with pictures that are there
                    dsd.save_image(image, file)
        records = exams.score(*args.scorer, some, [dsd.open_image(file) for file in files])
        for case, file, record in zip(some, files, records):
            about = {"reference": case.reference, "kind": case.kind, "prompt": case.prompt}
            dsd.write_json(file.with_suffix(".json"), about | record)
    return [dsd.read_json(file.with_suffix(".json")) for file in all_files]


# ---- means and intervals ---------------------------------------------------------------------------------------------
def bootstrap(values, references, resamples=2000):
    """[mean, low, high]: the mean of the values that are not None and its 95 % bootstrap interval; None without values.

    References are resampled, not pictures, since the pictures of one reference are not independent."""
    known = [(r, v) for r, v in zip(references, values) if v is not None]
    if not known:
        return None
    numbers, place = torch.tensor([r for r, _ in known]).unique(return_inverse=True)
    sums = torch.zeros(
        len(numbers), 2, dtype=torch.float64
    )  # of the values of each reference, and how many they are
    sums.index_add_(0, place, torch.tensor([(v, 1) for _, v in known], dtype=torch.float64))
    draws = torch.randint(
        len(numbers), (resamples, len(numbers)), generator=torch.Generator().manual_seed(0)
    )
    totals = sums[draws].sum(1)  # (resamples, 2)
    ends = (totals[:, 0] / totals[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(x), 4) for x in (sums[:, 0].sum() / sums[:, 1].sum(), *ends)]


def summarise(records, ours=(), headline="cp_pf"):
    """{"subject": {score: [mean, low, high]}, "relight": ...}, and counts. "dsd_minus" is by how much DSD is better in
    the score `headline` on the same cases, `ours` being its records."""
    for record, own in zip(records, ours):
        pair = own.get(headline), record.get(headline)
        record["dsd_minus"] = None if None in pair else pair[0] - pair[1]
    result = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        some = [record for record in records if record["kind"] == kind]
        names = sorted(
            {name for r in some for name, value in r.items() if isinstance(value, float | None)}
        )
        unscored = sum(
            exams.parse_score(answer) is None for r in some for answer in r["answers"].values()
        )
        result[kind] = {
            "n": len(some),
            "unscored": unscored,
            **{
                name: bootstrap([r.get(name) for r in some], [r["reference"] for r in some])
                for name in names
            },
        }
    return result


# ---- what a reader sees ----------------------------------------------------------------------------------------------
def markdown(results, kind):
    """A table of the rows that have cases of this kind; columns without a value are left out."""
    results = {name: result[kind] for name, result in results.items() if kind in result}
    columns = {
        head: key
        for head, key in COLUMNS[kind].items()
        if any(r.get(key) for r in results.values())
    }
    rows = [["method", "cases", *columns], ["---"] * (len(columns) + 2)]
    rows += [
        [name, str(r["n"])]
        + [
            "{:.2f} ({:.2f} to {:.2f})".format(*r[key]) if r.get(key) else ""
            for key in columns.values()
        ]
        for name, r in results.items()
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_scatter(results, keys, path):
    """Left: CP against PF; grey lines join points of the same product. Right: this product for each row, over all cases
    and by what is asked of the pose. Bars are 95 % intervals. keys: the names of CP, PF and the product."""
    left, right = (
        figure := Figure(figsize=(13, 2 + 0.35 * len(results)), layout="constrained")
    ).subplots(1, 2)
    x = torch.linspace(0.02, 1, 100)
    for product in torch.arange(0.1, 1, 0.1):
        left.plot(x, product / x, color="0.9", zorder=0)

    def bar(result, key):  # a mean, and how far its interval reaches below and above it
        mean, low, high = result["subject"].get(key) or [float("nan")] * 3
        return mean, [[mean - low], [high - mean]]

    for k, result in enumerate(results.values()):
        (cp, cp_ends), (pf, pf_ends) = bar(result, keys[0]), bar(result, keys[1])
        left.errorbar(pf, cp, cp_ends, pf_ends, color=f"C{k % 10}", fmt="osD^v"[k // 10 % 5])
        for j, (case, mark) in enumerate(
            {"": "ko", "_same pose": "C0s", "_moved": "C1D", "_turned": "C2^"}.items()
        ):
            mean, ends = bar(result, keys[2] + case)
            right.errorbar(
                mean,
                k + 0.2 * j - 0.3,
                xerr=ends,
                fmt=mark,
                markersize=4,
                label=case[1:] or "all cases",
            )
    right.legend(handles=right.containers[:4], loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    left.set(
        xlabel="prompt following (PF)",
        ylabel="concept preservation (CP)",
        xlim=(0, 1.02),
        ylim=(0, 1.05),
    )
    right.set(xlabel="CP x PF", xlim=(0, 1.02), ylim=(len(results), -1))
    right.set_yticks(range(len(results)), results)
    for k, label in enumerate(right.get_yticklabels()):  # the colours of the left half
        label.set_color(f"C{k % 10}")
    with dsd.writing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def report(records, cases, args):
    """Write table.md, scores.json, scatter.png and contact_sheet.png of {row's name: records}."""
    keys = ("vlm_cp", "vlm_pf", "vlm_cp_pf") if args.folder else ("cp", "pf", "cp_pf")
    results = {
        name: summarise(some, records.get("DSD", []), keys[2]) for name, some in records.items()
    }
    parts = [
        f"Made by `{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`. Means with 95 % bootstrap intervals over "
        "references.",
        markdown(results, "subject"),
    ]
    if not args.folder:
        parts += [
            "Relighting (the same scene and pose in another light):",
            markdown(results, "relight"),
        ]
    unscored = {
        name: sum(kind["unscored"] for kind in result.values()) for name, result in results.items()
    }
    if any(unscored.values()):
        parts += [f"Answers of the VLM without a score, which are left out: {unscored}"]
    with dsd.writing(args.out / "table.md") as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    dsd.write_json(args.out / "scores.json", results)
    draw_scatter(results, keys, args.out / "scatter.png")
    columns = range(0, len(cases), len(cases) // len({case.reference for case in cases}) + 1)[
        :8
    ]  # other references
    dsd.contact_sheet(
        [[(cases[k].image, f"reference; {cases[k].prompt}") for k in columns]]
        + [
            [
                (dsd.open_image(args.out / "rows" / name / f"{k:04d}.png"), name)
                for k in columns
                if k < len(some)
            ]
            for name, some in records.items()
        ],
        args.out / "contact_sheet.png",
    )


# ---- command line ----------------------------------------------------------------------------------------------------
def parse_args(parser):
    """Add this script's options to a parser and parse. The model's folder and the adapter bring defaults."""
    add = parser.add_argument
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add("--adapter", type=Path, help="what DSD uses; if not given, the one shipped with the model")
    add(
        "--vlm",
        default=dsd.MINIATURE / "vlm",
        help="gives scores: an image-text-to-text folder or hub name",
    )
    add(
        "--judge",
        type=Path,
        default=dsd.MINIATURE / "judge",
        help="gives scores: the folder of an image classifier",
    )
    add(
        "--witness",
        type=Path,
        help="a second judge of another architecture, whose marks stand beside the first's",
    )
    add(
        "--rows",
        nargs="+",
        metavar="NAME",
        help="only the rows, and groups of rows, of these names",
    )
    add(
        "--references",
        dest="count",
        type=dsd.at_least(1),
        help="how many; if not given, 16 or the whole folder",
    )
    add(
        "--prompts",
        dest="contexts",
        type=dsd.at_least(1),
        help="new contexts for each reference (beside one in "
        "another light), or with --folder its first so many prompts; if not given, 4 or all of them",
    )
    add(
        "--folder",
        type=Path,
        help="a folder in DreamBench++'s layout, in place of the miniature's cases",
    )
    add(
        "--strengths",
        type=float,
        choices=[k / 10 for k in range(1, 11)],
        nargs="+",
        default=[0.5],
        metavar="S",
        help="of SDEdit: 0.1, 0.2, ..., 1.0",
    )
    add("--seed", type=dsd.at_least(0), default=0, help="of references, prompts and noise")
    sample.add_drawing_options(parser)
    model = parser.peek("model")
    folder = dsd.folder_settings(model)
    adapter, shipped = parser.peek("adapter"), folder.get("sample", {}).get("shipped_adapter")
    if not adapter and shipped:
        adapter = Path(model) / shipped
    facts = dsd.adapter_facts(adapter) if adapter else {}
    names = {"width", "height", "image_guidance", "text_guidance"} & set(facts)
    args = parser.parse("sample", **{name: facts[name] for name in names})
    args.adapter, args.true_cfg_scale = (
        adapter and Path(adapter),
        folder.get("generate_grids", {}).get("true_cfg_scale", 1.0),
    )
    args.contexts = args.contexts or (None if args.folder else 4)
    args.prompt_tokens = [
        folder.get("evaluate", {}).get(f"{kind}_prompt_tokens", 512) for kind in ("panel", "sheet")
    ]
    return args


def choose_rows(rows, args):
    """The rows that --rows asks for."""
    known = {name.lower() for row in rows for name in (row.name, row.group)}
    names = {name.lower() for name in args.rows or known}
    if names - known:
        raise dsd.DsdError(
            f"no row or group is called {min(names - known)}; there are: {', '.join(sorted(known))}"
        )
    chosen = [row for row in rows if {row.name.lower(), row.group.lower()} & names]
    if not args.adapter and any(row.pipeline is FluxControlPipeline for row in chosen):
        raise dsd.DsdError("this model ships no adapter; give --adapter FOLDER")
    return chosen


def evaluate(rows, args, **more):
    """Draw and score the rows; after each one, report what is known so far. more: what else decides the results."""
    dsd.check_model(args.model, args.width, args.height)
    cases = (
        exams.folder_cases(args)
        if args.folder
        else exams.world_cases(
            range(args.count or 16),
            args.contexts,
            args.seed,
            args.width,
            exams.seen_identities(args.adapter),
        )
    )
    folders = filter(None, (args.model, args.vlm, args.judge, args.witness))
    weights = [
        file
        for folder in folders
        for file in Path(folder).rglob("*.safetensors")
        if file.stat().st_size < 2**28
    ]  # all of the miniature; a large model is known by its name alone
    lock = dsd.open_out(
        args,
        "evaluate",
        changeable=["rows", "count", "strengths", "batch_size", "offload", "compile"],
        weights=dsd.digest(*sorted(weights)),
        folder=args.folder and dsd.name_of(args.folder),
        judge=dsd.name_of(args.judge),
        witness=args.witness and dsd.name_of(args.witness),
        **more,
        adapter_sha256=args.adapter and dsd.digest(dsd.adapter_file(args.adapter)),
    )
    both = [
        exams.Judge(folder) if folder and not args.folder else None
        for folder in (args.judge, args.witness)
    ]
    args.scorer, records = (*both, curate.load_vlm(args.vlm, args.quantize)), {}
    for row in rows:
        new = not (args.out / "rows" / row.name).exists()
        records[row.name] = run_row(row, cases, args)
        if dsd.is_main_process() and (new or row is rows[-1]):
            report(records, cases, args)
    lock.release()
    if dsd.is_main_process():
        print((args.out / "table.md").read_text(encoding="utf-8"))
        print(
            f"{len(rows)} rows in {args.out}; look at {args.out}/contact_sheet.png and {args.out}/scatter.png"
        )


def main():
    args = parse_args(dsd.Parser(__doc__, "runs/evaluate"))
    evaluate(choose_rows(all_rows(args), args), args)


if __name__ == "__main__":
    dsd.run_main(main)
