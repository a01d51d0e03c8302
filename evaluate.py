"""Does it work? Concept preservation (CP) and prompt following (PF) of every method on the same cases (paper section 4).

    python evaluate.py                                  # quick: the main rows on 64 cases, minutes on two CPU cores
    python evaluate.py --full                           # all rows on 300 cases, the ablations trained: a night
    python evaluate.py --full --rows zero-shot DSD      # only rows whose name or group contains one of these words
    python evaluate.py --folder dreambench_plus/data --vlm Qwen/Qwen2.5-VL-7B-Instruct \\
        --model black-forest-labs/FLUX.1-dev --adapter FOLDER            # real pictures: one CUDA GPU

The miniature's cases: critters held out of every training, rendered by the world, in new contexts. Their truth is known,
so a judge (an image classifier that no other step uses) can say of each attribute whether it is right:
    CP      share of the identity's seven attributes that are kept; "all kept": share of pictures that keep all seven
    PF      share of scene, accessory and light that are as asked; "de-biased": of those that differ from the
            reference's, so that copying the reference counts nothing
    CPxPF   the product for each picture, then averaged
    pose    relighting only: correlation of luminance with the true relit rendering, 0 to 1 (see scores.py)
A vision-language model scores CP and PF too, 0 to 4 each as in DreamBench++, divided by 4. A folder in DreamBench++'s
layout (images/**/NN.jpg, captions/**/NN.txt: the subject's name, then a prompt a line) has the VLM's scores only.
Intervals are 95 % bootstrap intervals over references. Memory with the miniature: under 1 GB.

Writes to --out: table.md, scores.json (every score), scatter.png, contact_sheet.png; rows/NAME/ with each row's pictures
and its scores.jsonl (with the VLM's answers); ablations/NAME/, trained by finetune.py. Stopped and started again, it goes
on: nothing is drawn or scored twice. A quick run's pictures are the first of the full run's.
"""

import hashlib
import json
import time
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from tqdm import tqdm

import baselines
import curate
import dsd
import scores
from miniature import world

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

SEARCH, SEARCH_COUNT = 100_000, 8  # number of the first reference for searching settings; the table never shows them
FILES = ["[0-9]*.png", "scores.jsonl", "seconds.jsonl", "*.part"]  # what a row's folder holds


# ---- cases -----------------------------------------------------------------------------------------------------------
def words(attributes, numbers):
    """{attribute: value} for values by number; the empty accessory is called "nothing", as the judge does."""
    return {name: values[int(k)] or "nothing" for (name, values), k in zip(attributes.items(), numbers)}


def render(identity, context, pose, size):
    """One rendered panel as an image; identity (7,), context (3,), pose (4,)."""
    pixels = world.render(identity[None], context[None], pose[None], size)[0]
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def world_cases(numbers, prompts, seed, size):
    """Held-out references by number: for each, `prompts` cases in other scenes and one of the same scene relit.

    A reference depends on its number and the seed alone: more references never change the first ones."""
    cases = []
    for number in numbers:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        identity = world.identity_of(world.draw_identities(1, draw, held_out=True))[0]
        shown, pose = world.draw_contexts(1, draw)[0], world.draw_poses(1, draw)[0]
        asked = world.draw_contexts(64, draw)
        asked = asked[asked[:, 0] != shown[0]][:prompts]  # another scene; accessory and light as they fall
        relit = shown.clone()
        relit[2] = (shown[2] + torch.randint(1, 4, (1,), generator=draw)[0]) % 4
        classes = [world.panel_caption(identity, c) for c in world.draw_contexts(8, draw)]
        image = render(identity, shown, pose, size)
        for k, (context, relight) in enumerate([*((c, False) for c in asked), (relit, True)]):
            there = pose if relight else world.draw_poses(1, draw)[0]
            cases.append(baselines.Case(
                number, image, world.noun(identity), world.panel_caption(identity, context),
                world.panel_caption(identity, shown), world.sheet_caption(identity, [shown, context], (1, 2), relight),
                classes, (seed * 1_000_003 + number) * 64 + k, "relight" if relight else "subject",
                render(identity, context, there, size), words(world.IDENTITY, identity), words(world.CONTEXT, context),
                words(world.CONTEXT, shown)))
    return cases


def folder_cases(folder, limit, seed, size):
    """The cases of a folder in DreamBench++'s layout: images/**/NN.jpg and captions/**/NN.txt of the same path."""
    files = sorted(p for p in (folder / "images").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise dsd.DsdError(f"no pictures below {folder / 'images'}; --folder takes DreamBench++'s images/ and captions/")
    cases = []
    for number, file in enumerate(files[:limit]):
        path = (folder / "captions" / file.relative_to(folder / "images")).with_suffix(".txt")
        try:
            subject, *prompts = filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
        except (OSError, ValueError) as error:
            raise dsd.DsdError(f"{path}: wanted the subject's name and then a prompt a line ({error})") from None
        image = dsd.fit_panel(dsd.open_image(file), *size)
        for k, prompt in enumerate(prompts):
            sheet = f"two images of the identical {subject} side by side: left a {subject}, right {prompt}"
            cases.append(baselines.Case(number, image, subject, prompt, f"a {subject}", sheet, [f"a {subject}"] * 4,
                              (seed * 1_000_003 + number) * 64 + k))
    return cases


# ---- drawing and scoring one row, resumably --------------------------------------------------------------------------
def fingerprint(path):
    """What tells one model folder from another: names, sizes and beginnings of its weights. A hub name is its own."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*.safetensors")):
        with open(file, "rb") as data:
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}".encode() + data.read(2**20))
    return {"name": dsd.name_of(path), "sha256": digest.hexdigest()}


def batches(cases, size, tuned):
    """Ranges of cases that are drawn together: `size` at a time, or all of one reference."""
    starts = [i for i, c in enumerate(cases) if (i == 0 or c.reference != cases[i - 1].reference if tuned else i % size == 0)]
    return zip(starts, [*starts[1:], len(cases)])


def run_row(row, cases, models, scorer, common):
    """Draw and score what is missing of a row; returns its records, one a case. `scorer`: judge, VLM, questions."""
    out, size = models.args.out / "rows" / row.folder, models.settings["batch_size"]
    options = {k: fingerprint(v) if k == "adapter" else v for k, v in row.options.items()}
    dsd.open_out(out, {"step": "evaluate", "row": row.name, "options": options, **common}, FILES, models.args.overwrite)
    records = list(dsd.read_records(out / "scores.jsonl"))
    bar = tqdm(total=len(cases), initial=min(len(records), len(cases)), desc=row.name)
    for start, end in batches(cases, size, row.tuned):
        if end <= len(records):
            continue
        begun, batch = time.time(), cases[start:end]
        images = row.draw(models, batch, **row.options)
        seconds, first = time.time() - begun, max(len(records) - start, 0)
        for k, image in enumerate(images[first:], start + first):
            dsd.save_image(image, out / f"{k:04d}.png")
        new = scores.score(*scorer, batch[first:], images[first:])
        new = [{"case": k, "reference": cases[k].reference, "kind": cases[k].kind, "prompt": cases[k].prompt, **record}
               for k, record in enumerate(new, start + first)]
        dsd.append_records(out / "seconds.jsonl", [{"start": start, "cases": len(batch), "seconds": seconds}])
        dsd.append_records(out / "scores.jsonl", new)
        records += new
        bar.update(len(new))
    bar.close()
    return records[:len(cases)]


# ---- what a reader sees ----------------------------------------------------------------------------------------------
COLUMNS = [("CP", "cp"), ("all kept", "all_kept"), ("PF", "pf"), ("CPxPF", "cp_pf"), ("de-biased CPxPF", "cp_pf_new"),
           ("VLM CP", "vlm_cp"), ("VLM PF", "vlm_pf"), ("VLM CPxPF", "vlm_cp_pf"), ("VLM de-biased", "vlm_cp_pf_new")]
RELIGHT_COLUMNS = [("identity (CP)", "cp"), ("scene kept", "scene_as_wanted"), ("pose kept", "pose"),
                   ("light as asked", "light_as_wanted")]


def cell(value):
    """"0.63 (0.60 to 0.66)" of [mean, low, high]."""
    return "" if value is None else f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def markdown(rows, results, kind, columns):
    """A table of the rows that have cases of this kind; columns without a value are left out."""
    some = [(row, results[row.name]) for row in rows if kind in results[row.name]]
    columns = [(head, key) for head, key in columns if any(r[kind].get(key) for _, r in some)]
    lines = ["| " + " | ".join(["method", "cases", *(head for head, _ in columns)]) + " |", "|---" * (len(columns) + 2) + "|"]
    for row, r in some:
        values = [cell(r[kind].get(key)) for _, key in columns]
        lines.append("| " + " | ".join([row.name, str(r[kind]["n"]), *values]) + " |")
    return "\n".join(lines)


def write_table(rows, results, times, out, command):
    """table.md: prompts in new contexts, relighting, the searched settings, and how long each row took."""
    shown, search = [r for r in rows if r.group != "search"], [r for r in rows if r.group == "search"]
    parts = [f"Made by `{command}`. Means with 95 % bootstrap intervals over references.",
             markdown(shown, results, "subject", [*COLUMNS, ("DSD minus this row, CPxPF", "dsd_minus")])]
    if any("relight" in results[row.name] for row in shown):
        parts += ["Relighting (the same scene and pose in another light):",
                  markdown(shown, results, "relight", RELIGHT_COLUMNS)]
    if search:
        parts += ["DreamBooth-LoRA's settings, searched on other references:", markdown(search, results, "subject", COLUMNS)]
    parts += [f"Seconds to draw one picture, tuning included: {', '.join(times[row.name] for row in rows)}."]
    odd = {row.name: sum(kind["unscored"] for kind in results[row.name].values()) for row in rows}
    if any(odd.values()):
        parts += ["Answers of the VLM without a score, left out: " + ", ".join(f"{k} {n}" for k, n in odd.items()) + "."]
    dsd.write_text(out / "table.md", "\n\n".join(parts) + "\n")


def draw_scatter(rows, results, path, keys):
    """CP against PF with their intervals, a number a row; grey lines join points of the same product."""
    figure, axes = pyplot.subplots(figsize=(8.5, 5.5))
    pf = torch.linspace(0.02, 1, 100)
    for product in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        axes.plot(pf, product / pf, color="0.9", linewidth=1, zorder=0)
    colours = {group: f"C{k}" for k, group in enumerate(dict.fromkeys(row.group for row in rows))}
    for number, row in enumerate(rows, 1):
        (y, y_low, y_high), (x, x_low, x_high) = (results[row.name]["subject"][key] for key in keys)
        axes.errorbar(x, y, [[y - y_low], [y_high - y]], [[x - x_low], [x_high - x]], fmt="o", markersize=4,
                      color=colours[row.group], elinewidth=0.8, label=f"{number} {row.name}")
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=8)
    axes.set(xlabel="prompt following (PF)", ylabel="concept preservation (CP)", xlim=(0, 1.02), ylim=(0, 1.02))
    if rows:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    with dsd.writing(path) as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def draw_sheet(rows, records, cases, out):
    """contact_sheet.png: eight cases of different references, then the pictures of each row."""
    stride = len(cases) // len({c.reference for c in cases}) + 1  # the next prompt of the next reference
    columns = range(0, len(cases), stride)[:8]
    sheet = [[(cases[k].image, f"reference; {cases[k].prompt}") for k in columns]]
    for row in rows:
        sheet.append([(dsd.open_image(out / "rows" / row.folder / f"{k:04d}.png"), row.name)
                      for k in columns if k < len(records[row.name])])
    dsd.contact_sheet(sheet, out / "contact_sheet.png")


def timing(row, cases, out):
    """In words: the seconds a case took to draw; of a tuned row the minutes a reference too."""
    last = {r["start"]: r for r in dsd.read_records(out / "rows" / row.folder / "seconds.jsonl")}.values()
    seconds = sum(r["seconds"] for r in last) / sum(r["cases"] for r in last)
    minutes = seconds / 60 * len(cases) / len({c.reference for c in cases})
    return f"{row.name} {seconds:.2f}" + (f" ({minutes:.2f} minutes a reference)" if row.tuned else "")


# ---- command line ----------------------------------------------------------------------------------------------------
def parse_args():
    parser = dsd.Parser(__doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="all rows; also searches settings and trains the ablations")
    add("--rows", nargs="+", metavar="WORD", help="only rows whose name or group contains one of these words")
    add("--references", type=int, help="how many (default: 16, with --full 75)")
    add("--prompts", type=int, default=4, help="new contexts for each reference, beside one of other light (default: 4)")
    add("--tuned_references", type=int, help="how many of them DreamBooth-LoRA is tuned to (default: all)")
    add("--folder", type=Path, help="a folder in DreamBench++'s layout, instead of the world's references")
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: FLUX folder or hub name (default: the miniature)")
    add("--adapter", type=Path, help="what DSD uses (default: the one shipped with the model)")
    add("--judge", default=dsd.MINIATURE / "judge", help="image classifier folder (default: the miniature's)")
    add("--vlm", default=str(dsd.MINIATURE / "vlm"), help="vision-language model, the second judge")
    add("--pairs", type=Path, default="runs/pairs", help="what curate.py wrote; the ablations learn from it")
    add("--grids", type=Path, default="runs/grids", help="what generate_grids.py wrote; for the ablation without curation")
    add("--ablation_steps", type=int, help="training steps of every ablation (default: finetune.py's)")
    add("--steps", type=int, help="Euler steps of every method")
    add("--seed", type=int, default=0, help="of references, prompts and noise")
    add("--out", type=Path, default="runs/evaluate", help="default: %(default)s")
    return parser.parse_args()


def choose_rows(args, adapter):
    """The rows of this run."""
    rows = [row for row in baselines.all_rows(adapter) if (args.full or row.quick) and not (row.world and args.folder)]
    if args.rows:
        known = rows
        rows = [r for r in rows if any(word.lower() in f"{r.name} {r.group}".lower() for word in args.rows)]
        if any(r.best_of for r in rows):
            rows = [r for r in known if r in rows or r.group in {row.best_of for row in rows}]
    if not rows:
        raise dsd.DsdError(f"no row is called {' or '.join(args.rows)}; without --full there are fewer rows")
    return rows


def main():
    args = parse_args()
    for name in ("references", "prompts", "tuned_references", "ablation_steps"):
        dsd.check_setting(name, 1 if getattr(args, name) is None else getattr(args, name), 1)
    settings = {**dsd.model_settings(args.model, "sample", args, steps=28, image_guidance=1.0, text_guidance=1.0,
                                     guidance_scale=3.5, unguided_steps=2, width=512, height=512, batch_size=1,
                                     shipped_adapter=""),
                **dsd.model_settings(args.model, "generate_grids", args, true_cfg_scale=1.0),
                **dsd.model_settings(args.model, "finetune", args, shift=3.0),
                **dsd.model_settings(args.model, "evaluate", args, panel_prompt_tokens=512, sheet_prompt_tokens=512)}
    shipped = settings.pop("shipped_adapter")
    adapter = args.adapter or (Path(args.model) / shipped if shipped else None)
    rows = choose_rows(args, adapter)
    baselines.check_ablations(rows, args)
    if adapter is None and any(row.options.get("adapter", 0) is None for row in rows):
        raise dsd.DsdError("this model ships no adapter; give --adapter FOLDER")
    size = settings["width"], settings["height"]
    count = args.references or (75 if args.full else 16)
    cases = (folder_cases(args.folder, args.references, args.seed, size) if args.folder else
             world_cases(range(count), args.prompts, args.seed, size[0]))
    others = ([c for c in cases if c.reference < SEARCH_COUNT] if args.folder else
              world_cases(range(SEARCH, SEARCH + SEARCH_COUNT), args.prompts, args.seed, size[0]))
    judge = None if args.folder else scores.Judge(args.judge)
    scorer = judge, curate.load_vlm(args.vlm), scores.FOLDER_QUESTIONS if args.folder else scores.WORLD_QUESTIONS
    common = {"model": fingerprint(args.model), "judge": judge and fingerprint(args.judge), "vlm": fingerprint(args.vlm),
              "folder": args.folder and str(args.folder), "prompts": args.prompts, "seed": args.seed, "settings": settings}
    evaluate(args, rows, cases, others, baselines.Models(args, settings), scorer, common)


def evaluate(args, rows, cases, others, models, scorer, common):
    """All rows one after another; after each, what is known so far is written."""
    tuned = [c for c in cases if args.tuned_references is None or c.reference < args.tuned_references]
    headline, records, results, times, done = "vlm_cp_pf" if args.folder else "cp_pf", {}, {}, {}, []
    for row in rows:
        if row.ablation:
            row.options["adapter"] = baselines.train_ablation(row.ablation, args)
        if row.best_of:
            row.options = max((r for r in done if r.group == row.best_of),
                              key=lambda r: (results[r.name]["subject"][headline] or [0])[0]).options
        own = others if row.group == "search" else tuned if row.tuned else cases
        records[row.name] = run_row(row, own, models, scorer, common)
        results[row.name], times[row.name] = scores.summarise(records[row.name]), timing(row, own, args.out)
        done.append(row)
        for other in done:
            if "DSD" in records and other.group != "search":
                results[other.name]["subject"]["dsd_minus"] = scores.difference(records["DSD"], records[other.name], headline)
        report(args, done, cases, records, results, times, common)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    print(f"{len(rows)} rows in {args.out}; look at {args.out / 'contact_sheet.png'} and {args.out / 'scatter.png'}")


def report(args, rows, cases, records, results, times, common):
    """Write table.md, scores.json, scatter.png and contact_sheet.png of the rows so far."""
    shown, keys = [row for row in rows if row.group != "search"], ("vlm_cp", "vlm_pf") if args.folder else ("cp", "pf")
    command = f"evaluate.py{' --full' * args.full} --references {len({c.reference for c in cases})}"
    write_table(rows, results, times, args.out, command)
    every = {name: {k: [r.get(k) for r in some] for k in some[-1] if k not in ("answers", "seen")}
             for name, some in records.items()}
    dsd.write_text(args.out / "scores.json", json.dumps(
        {"common": common, "rows": {name: {**result, "cases": every[name]} for name, result in results.items()}}) + "\n")
    draw_scatter([row for row in shown if all(results[row.name]["subject"].get(k) for k in keys)], results,
                 args.out / "scatter.png", keys)
    draw_sheet(shown, records, cases, args.out)


if __name__ == "__main__":
    dsd.run(main)
