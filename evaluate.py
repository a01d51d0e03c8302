"""Does it work? Concept preservation (CP) and prompt following (PF) of every method on the same cases (paper section 4).

    python evaluate.py                                  # quick: the main rows on 64 cases, minutes on two CPU cores
    python evaluate.py --full --compile                 # all rows on 300 cases, ablations trained: 4 to 5 hours of one core
    python evaluate.py --full --rows zero-shot DSD      # only these: a row's whole name, or a word in names or groups
    python evaluate.py --folder dreambench_plus/data --vlm Qwen/Qwen2.5-VL-7B-Instruct \\
        --model black-forest-labs/FLUX.1-dev --adapter FOLDER            # real pictures: one CUDA GPU

The miniature's cases: critters held out of every training, rendered by the world, in new contexts. Their truth is known,
so a judge (an image classifier that no other step uses) can say of each attribute whether it is right:
    CP      share of the identity's seven attributes that are kept; "all kept": share of pictures that keep all seven
    PF      share of scene, accessory and light that are as asked; "de-biased": of those that differ from the
            reference's, so that copying the reference counts nothing
    CPxPF   the product for each picture, then averaged
    pose    relighting only: correlation of luminance with the true relit rendering, 0 to 1 (miniature/exams.py)
A vision-language model scores CP and PF too, 0 to 4 each as in DreamBench++, divided by 4. A folder in DreamBench++'s
layout (images/**/NN.jpg, captions/**/NN.txt: the subject's name, then a prompt a line) has the VLM's scores only.
Intervals are 95 % bootstrap intervals over references. Memory with the miniature: under 1 GB.

Writes to --out: table.md, scores.json (every score), scatter.png, contact_sheet.png; rows/NAME/ with each row's pictures
and its scores.jsonl (with the VLM's answers); ablations/NAME/, trained by finetune.py. Stopped and started again, it goes
on: nothing is drawn or scored twice. A quick run's pictures are the first of the full run's.
"""

import dataclasses
import gc
import hashlib
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (FluxControlInpaintPipeline, FluxControlPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline,
                       FluxPipeline)
from diffusers.training_utils import cast_training_params
from matplotlib.figure import Figure
from peft import LoraConfig
from PIL import Image
from tqdm import tqdm

import curate
import dsd
import sample
from miniature import exams

SEARCH, SEARCH_COUNT = 100_000, 8  # number of the first reference for searching settings; the table never shows them
FILES = ["[0-9]*.png", "scores.jsonl", "seconds.jsonl", "*.part"]  # what a row's folder holds
SUBJECT_CRITERIA = """The first image shows a reference subject, the second was generated from it. How well does the second \
image keep that subject? Compare the shape (outline, proportions, parts), the colours (hue, brightness, where they are), \
the texture and fine markings and, for people and animals, the face. Ignore place, pose and light. 0: another subject. \
1: the same kind only. 2: alike, with clear differences. 3: the same but for small things. 4: the very same. \
Compare in a few words, then end with a line "score: N", N from 0 to 4."""
PROMPT_CRITERIA = """An image was generated from this prompt: "{prompt}". How well does it follow? Is what the prompt names \
there, is each detail right, is nothing missing, are place, action and style as asked? 0: not at all. 1: a little. \
2: in part. 3: all but a detail. 4: entirely. Say why in a few words, then end with a line "score: N", N from 0 to 4."""
COPY_CRITERIA = """The second image was generated from the first and from this prompt: "{prompt}". How well does the second \
image follow the prompt? What it merely copies from the first (background, pose, light, framing) does not count as \
following. 0: not at all, or a copy. 1: a little. 2: in part. 3: all but a detail. 4: entirely. Say why in a few words, then \
end with a line "score: N", N from 0 to 4."""
WORLD_QUESTIONS = {"vlm_cp": (True, curate.SUBJECT_SCORE_QUESTION),  # score -> is the reference shown too, the question
                   "vlm_pf": (False, curate.PROMPT_SCORE_QUESTION)}
FOLDER_QUESTIONS = {"vlm_cp": (True, SUBJECT_CRITERIA), "vlm_pf": (False, PROMPT_CRITERIA),
                    "vlm_pf_new": (True, COPY_CRITERIA)}


# ---- cases -----------------------------------------------------------------------------------------------------------
def folder_cases(folder, limit, seed, size):
    """The cases of a folder in DreamBench++'s layout: images/**/NN.jpg and captions/**/NN.txt of the same path."""
    files = sorted(p for p in (folder / "images").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise dsd.DsdError(f"no pictures below {folder / 'images'}; --folder takes DreamBench++'s images/ and captions/")
    cases = []
    for number, file in enumerate(files[:limit]):
        path = (folder / "captions" / file.relative_to(folder / "images")).with_suffix(".txt")
        with dsd.explained(f"{path}: wanted the subject's name and then a prompt a line"):
            subject, *prompts = filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
        image = dsd.fit_panel(dsd.open_image(file), *size)
        for k, prompt in enumerate(prompts):
            sheet = f"two images of the identical {subject} side by side: left a {subject}, right {prompt}"
            cases.append(exams.Case(number, image, subject, prompt, f"a {subject}", sheet, [f"a {subject}"] * 4,
                                    (seed * 1_000_003 + number) * 64 + k))
    return cases


# ---- the methods: draw(models, cases, **options) -> a list of images --------------------------------------------------
class Models:
    """Loads what a row needs; only the last pipeline is kept."""

    def __init__(self, args, settings):
        self.args, self.settings, self.key, self.pipe = args, settings, None, None

    def load(self, cls, adapter=None):
        """A stock pipeline of class `cls` around the teacher, or around the teacher with an adapter."""
        if self.key != adapter or self.pipe is None:
            self.pipe = None
            gc.collect()
            self.pipe = dsd.load_pipeline(FluxControlPipeline if adapter else FluxPipeline, self.args.model)
            if adapter:
                dsd.load_adapter(self.pipe, adapter)
            self.key = adapter
        pipe = cls(**{name: part for name, part in self.pipe.components.items() if name in cls.__init__.__annotations__})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def tokens(self, pipe, frames=1):
        """How many T5 tokens a prompt gets: as many as the teacher was trained with for pictures of so many frames."""
        return min(self.settings["panel_prompt_tokens" if frames == 1 else "sheet_prompt_tokens"], dsd.prompt_tokens(pipe))

    def call(self, pipe, prompts, cases, frames=1, **more):
        """The stock pipeline with the teacher's settings; every case has a generator of its own."""
        s = self.settings
        return pipe(prompts, width=frames * s["width"], height=s["height"], num_inference_steps=s["steps"],
                    guidance_scale=s["guidance_scale"], max_sequence_length=self.tokens(pipe, frames),
                    generator=[torch.Generator("cpu").manual_seed(c.seed) for c in cases], **more).images

    def draw(self, pipe, cases, prompts=None, **more):
        """As `call`, with the teacher's prompt guidance in a second pass."""
        return self.call(pipe, prompts or [c.prompt for c in cases], cases, negative_prompt=[""] * len(cases),
                         true_cfg_scale=self.settings["true_cfg_scale"], **more)


def copy_reference(models, cases):
    """What CP alone would reward."""
    return [c.image for c in cases]


def true_rendering(models, cases):
    """The ceiling: what the judge says of perfect pictures."""
    return [c.truth for c in cases]


def prompt_alone(models, cases):
    """The floor: the teacher never sees the reference."""
    return models.draw(models.load(FluxPipeline), cases)


def sdedit(models, cases, strength):
    """SDEdit (Meng et al. 2022): noise on the reference up to `strength`, then the teacher draws on."""
    return models.draw(models.load(FluxImg2ImgPipeline), cases, image=[c.image for c in cases], strength=strength)


def two_frames(cases):
    """(reference | black) for each case, and the mask of the right frame, which is to be drawn."""
    black, white = (Image.new("RGB", cases[0].image.size, colour) for colour in ("black", "white"))
    return [dsd.build_grid([c.image, black], 1, 2) for c in cases], dsd.build_grid([black, white], 1, 2).convert("L")


def inpainting(models, cases):
    """In-context inpainting: the untouched teacher fills the right frame; a sheet's prompt tells it what both show."""
    canvases, mask = two_frames(cases)
    drawn = models.draw(models.load(FluxInpaintPipeline), cases, [c.sheet_prompt for c in cases], frames=2,
                        image=canvases, mask_image=mask, strength=1.0)
    return [dsd.cut_grid(image, 1, 2)[1] for image in drawn]


def dsd_row(models, cases, adapter, **guidance):
    """This project's method, by sample.py's own function."""
    batch = [{"text": c.prompt, "image": c.reference, "seed": c.seed} for c in cases]
    return sample.draw_batch(models.load(FluxControlPipeline, adapter), batch, {c.reference: c.image for c in cases},
                             models.settings | guidance)


def held_frame(models, cases, adapter):
    """The same model, but frame 1 is held on the noised reference at each step (stock Control inpainting)."""
    canvases, mask = two_frames(cases)
    pipe = models.load(FluxControlInpaintPipeline, adapter)
    drawn = models.call(pipe, [c.prompt for c in cases], cases, frames=2, image=canvases, mask_image=mask,
                        control_image=canvases, strength=1.0)
    return [dsd.cut_grid(image, 1, 2)[1] for image in drawn]


def single_frame(models, cases, adapter):
    """Input-channel concatenation: one frame, the reference in its condition channels (stock Control sampling)."""
    pipe = models.load(FluxControlPipeline, adapter)
    return models.call(pipe, [c.prompt for c in cases], cases, control_image=[c.image for c in cases])


def named(text, subject):
    """A prompt with DreamBooth's rare word before the subject: "a kitten in space" -> "a sks kitten in space"."""
    found = re.sub(re.escape(subject), lambda m: f"sks {m.group()}", text, flags=re.IGNORECASE)
    return found if found != text else f"sks {subject}, {text}"


def dreambooth(models, cases, steps, learning_rate, rank=16):
    """DreamBooth-LoRA (Ruiz et al. 2023): the teacher tuned to one reference, called "sks", then asked for it.

    Half of each batch of 8 is the reference, half the teacher's own pictures of such a subject (the prior).
    `cases` are those of one reference."""
    case, pipe = cases[0], models.load(FluxPipeline)
    transformer, s = pipe.transformer, models.settings
    prior = models.draw(pipe, [dataclasses.replace(case, seed=case.seed + 63 - k) for k in range(len(case.class_prompts))],
                        case.class_prompts)
    x = dsd.encode(pipe.vae, dsd.to_pixels([case.image, *prior])).to(transformer.dtype)  # (1 + P, N, 64)
    prompts = [named(case.reference_prompt, case.subject), *case.class_prompts]
    with torch.no_grad():
        embeds, pooled = pipe.encode_prompt(prompts, prompts, max_sequence_length=models.tokens(pipe))[:2]
    ids = dsd.position_ids(s["height"] // pipe.vae_scale_factor, s["width"] // pipe.vae_scale_factor).to(x.device)
    torch.manual_seed(case.seed)  # of the LoRA's first weights
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    try:
        cast_training_params(transformer, torch.float32)
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        optimizer, draw = torch.optim.AdamW(parameters, lr=learning_rate), torch.Generator().manual_seed(case.seed)
        for _ in tqdm(range(steps), desc=f"dreambooth {case.reference}", leave=False):
            rows = torch.cat([torch.zeros(4), torch.randint(1, len(x), (4,), generator=draw)]).long().to(x.device)
            sigma = dsd.sample_sigmas(8, s["shift"], draw).to(x.device)
            eps = torch.randn(x[rows].shape, generator=draw).to(x)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                v = dsd.run_transformer(transformer, dsd.interpolate(x[rows], eps, sigma), sigma,
                                        (embeds[rows], pooled[rows]), ids, s["guidance_scale"])
            (v.float() - dsd.velocity(x[rows], eps).float()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return models.draw(pipe, cases, [named(c.prompt, c.subject) for c in cases])
    finally:
        transformer.delete_adapters("default")


# ---- ablations: finetune.py and curate.py by their own command lines -------------------------------------------------
def run_script(script, *flags):
    """One of this project's scripts in a process of its own, its output shown."""
    flags += ("--device", dsd.Parser.device) if dsd.Parser.device else ()
    print(f"--- {script} {' '.join(map(str, flags))}", flush=True)
    if subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *map(str, flags)]).returncode:
        raise dsd.DsdError(f"{script} stopped (see above); the same command goes on from here")


def pairs_for(which, args):
    """The folder with an ablation's pairs: the curated ones, fewer of them, or pairs that nobody curated."""
    if which == "curated":
        return args.pairs
    source, count = args.pairs, len(dsd.read_records(args.pairs / "metadata.jsonl"))
    if which in ("uncurated", "as many"):  # with a tolerance of all parts every comparison is a yes
        source = args.out / "ablations" / "uncurated_pairs"
        if not (source / "summary.json").exists():
            run_script("curate.py", "--grids", args.grids, "--vlm", args.vlm, "--tolerance", 99, "--out", source)
        if which == "uncurated":
            return source
    records = dsd.read_records(source / "metadata.jsonl")
    count = min(len(records), {"as many": count, "half": count // 2, "quarter": count // 4}[which])
    if which == "as many":  # any pairs at all; fewer curated ones come from fewer grids
        records = [records[k] for k in sorted(random.Random(args.seed).sample(range(len(records)), count))]
    folder = args.out / "ablations" / f"pairs_{which.replace(' ', '_')}"
    for file in (r[side] for r in records[:count] for side in ("reference_file_name", "target_file_name")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, folder / file)
    dsd.write_records(folder / "metadata.jsonl", records[:count])
    return folder


def check_ablations(rows, args):
    """Refuse ablations without what they learn from, before hours are spent on other rows."""
    needed = {ABLATIONS[row.ablation][0] for row in rows if row.ablation}
    uncurated = needed & {"uncurated", "as many"}
    for file, used in ((args.pairs / "metadata.jsonl", needed), (args.grids / "grids.jsonl", uncurated)):
        if used and not file.exists():
            raise dsd.DsdError(f"no {file}, which the ablations learn from; run generate_grids.py and curate.py first, say "
                               "where their output is with --grids and --pairs, or leave these rows out with --rows")


def train_ablation(name, args):
    """The adapter of an ablation, trained by finetune.py unless it is there."""
    which, flags = ABLATIONS[name]
    folder, pairs = args.out / "ablations" / name.replace(" ", "_").replace(",", ""), pairs_for(which, args)
    done = dsd.read_json(folder / "settings.json") if (folder / "summary.json").exists() else {}
    if done.get("pairs") != dsd.file_digest(pairs / "metadata.jsonl") or args.ablation_steps not in (None, done["steps"]):
        if args.compile:
            flags = [*flags, "--compile"]
        if args.ablation_steps:
            flags = [*flags, "--steps", args.ablation_steps]
        run_script("finetune.py", "--model", args.model, "--pairs", pairs, "--out", folder, *flags)
    return folder


# ---- rows ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Row:
    """One line of the table."""
    name: str
    group: str
    draw: Callable
    options: dict = dataclasses.field(default_factory=dict)
    quick: bool = False  # drawn without --full too
    world: bool = False  # needs the truth
    tuned: bool = False  # tuned on each reference: its cases are drawn together, of the first references only
    ablation: str = ""  # its adapter is trained first
    best_of: str = ""  # takes the options of the best row of that group

    @property
    def folder(self):
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


STRENGTHS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # of SDEdit
GUIDANCE = [(1.0, 1.0), (1.5, 1.0), (1.0, 1.5), (1.5, 1.5), (2.0, 1.5), (1.5, 2.0), (2.0, 2.0)]  # image, text
LEARNING_RATES, TUNING_STEPS = [5e-4, 2e-3], [50, 100, 200, 400]  # of DreamBooth-LoRA
ABLATIONS = {  # name -> the pairs it learns from, finetune.py's flags
    "nothing left out": ("curated", []),
    "no curation, as many pairs": ("as many", []),
    "no curation, all pairs": ("uncurated", []),
    "no identity frame in the loss": ("curated", ["--frame_weights", 0, 1]),
    "single frame": ("curated", ["--frames", 1]),
    "only condition columns": ("curated", ["--lora_lr_factor", 0]),
    "only LoRA": ("curated", ["--condition_lr_factor", 0]),
    "half of the pairs": ("half", []),
    "a quarter of the pairs": ("quarter", []),
    "LoRA rank 4": ("curated", ["--rank", 4]),
    "LoRA rank 16": ("curated", ["--rank", 16]),
    "LoRA rank 64": ("curated", ["--rank", 64]),
}


def all_rows(adapter):
    """Every row, in the table's order."""
    rows = [Row("prompt alone", "bounds", prompt_alone, quick=True),
            Row("reference copied", "bounds", copy_reference, quick=True),
            Row("true rendering", "bounds", true_rendering, quick=True, world=True)]
    rows += [Row(f"SDEdit {s}", "zero-shot", sdedit, {"strength": s}, quick=s == 0.5) for s in STRENGTHS]
    rows += [Row("in-context inpainting", "zero-shot", inpainting, quick=True)]
    rows += [Row(f"search: DreamBooth {steps} steps {rate}", "search", dreambooth,
                 {"steps": steps, "learning_rate": rate}, tuned=True)
             for rate in LEARNING_RATES for steps in TUNING_STEPS]
    rows += [Row("DreamBooth-LoRA", "tuning", dreambooth, tuned=True, best_of="search"),
             Row("DSD", "DSD", dsd_row, {"adapter": adapter}, quick=True)]
    rows += [Row(f"DSD, guidance {i} {t}", "guidance", dsd_row,
                 {"adapter": adapter, "image_guidance": i, "text_guidance": t})
             for i, t in GUIDANCE]
    rows += [Row("DSD, frame 1 held", "sampling", held_frame, {"adapter": adapter})]
    for name in ABLATIONS:
        draw = single_frame if name == "single frame" else dsd_row
        rows.append(Row(f"ablation: {name}", "ablation", draw, ablation=name))
    return [*rows, Row("ablation: only LoRA, frame 1 held", "ablation", held_frame, ablation="only LoRA")]


# ---- the vision-language model, in DreamBench++'s manner -------------------------------------------------------------
def parse_score(answer):
    """The last "score: N" of an answer as N / 4, None if there is none from 0 to 4."""
    found = re.findall(r"score\W*([0-4])(?![\d.]*\d)", answer, flags=re.IGNORECASE)
    return int(found[-1]) / 4 if found else None


def vlm_scores(vlm, cases, images, questions):
    """The VLM's scores in 0..1 and whole answers; an answer without a score scores None and is left out of means."""
    records = [{"answers": {}} for _ in cases]
    for name, (with_reference, question) in questions.items():
        shown = [[c.image, image] if with_reference else [image] for c, image in zip(cases, images)]
        asked = [question.replace("{prompt}", c.prompt) for c in cases]
        for record, answer in zip(records, curate.ask(*vlm, shown, asked, len(cases), 200)):
            record["answers"][name], record[name] = answer, parse_score(answer)
    for record in records:
        for name in [n for n in record if n.startswith("vlm_pf")]:
            pair = record["vlm_cp"], record[name]
            record[name.replace("_pf", "_cp_pf")] = None if None in pair else pair[0] * pair[1]
    return records


def score(judge, vlm, questions, cases, images):
    """Every score of some pictures, a record each."""
    records = vlm_scores(vlm, cases, images, questions)
    if judge:
        for record, case, image, seen in zip(records, cases, images, judge(images)):
            record |= exams.marks(case, seen) | {"seen": seen}
            if case.kind == "relight":
                record["pose"] = exams.pose_kept(image, case.truth)
    return records


# ---- means and intervals ---------------------------------------------------------------------------------------------
def bootstrap(values, references, resamples=2000):
    """[mean, low, high]: the mean of the values that are not None and its 95 % bootstrap interval.

    Resampled are references, not pictures: the pictures of one reference are not independent. None without values."""
    known = [(r, v) for r, v in zip(references, values) if v is not None]
    if not known:
        return None
    place = {r: k for k, r in enumerate(sorted({r for r, _ in known}))}
    sums = torch.zeros(len(place), 2, dtype=torch.float64)
    for r, v in known:
        sums[place[r]] += torch.tensor([v, 1.0], dtype=torch.float64)
    draws = torch.randint(len(place), (resamples, len(place)), generator=torch.Generator().manual_seed(0))
    totals = sums[draws].sum(1)  # (resamples, 2)
    ends = (totals[:, 0] / totals[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(x), 4) for x in (sums[:, 0].sum() / sums[:, 1].sum(), *ends)]


def summarise(records):
    """Means with intervals of every score: {"subject": {score: [mean, low, high]}, "relight": ...}, and the counts."""
    result = {}
    for kind in dict.fromkeys(r["kind"] for r in records):
        some = [r for r in records if r["kind"] == kind]
        names = sorted({k for r in some for k, v in r.items() if isinstance(v, float | None)})
        result[kind] = {"n": len(some), "unscored": sum(parse_score(a) is None for r in some for a in r["answers"].values()),
                        **{name: bootstrap([r.get(name) for r in some], [r["reference"] for r in some]) for name in names}}
    return result


def difference(records, others, name):
    """The mean of `name` in `records` minus that in `others` on their common cases, with its interval."""
    both = [(a, b) for a, b in zip(records, others) if a["kind"] == "subject" and None not in (a.get(name), b.get(name))]
    return bootstrap([a[name] - b[name] for a, b in both], [a["reference"] for a, _ in both])


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
        new = score(*scorer, batch[first:], images[first:])
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
    """Left: CP against PF; grey lines join points of the same product. Right: the product, row by row. With intervals.

    `keys`: under which names `results` has CP, PF and their product."""
    figure = Figure(figsize=(13, max(4.5, 0.6 + 0.2 * len(rows))), layout="constrained")
    axes, bars = figure.subplots(1, 2)
    pf = torch.linspace(0.02, 1, 100)
    for product in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        axes.plot(pf, product / pf, color="0.9", linewidth=1, zorder=0)
    colours = {group: f"C{k}" for k, group in enumerate(dict.fromkeys(row.group for row in rows))}
    labels = []  # (CP, PF, name)
    for number, row in enumerate(rows):
        style = {"fmt": "o", "markersize": 4, "elinewidth": 0.8, "color": colours[row.group]}
        (y, y_low, y_high), (x, x_low, x_high), (mean, low, high) = (results[row.name]["subject"][key] for key in keys)
        axes.errorbar(x, y, [[y - y_low], [y_high - y]], [[x - x_low], [x_high - x]], **style)
        if row.group in ("bounds", "zero-shot", "tuning", "DSD"):  # variants of DSD lie near it: see the right side
            labels.append((y, x, row.name))
        bars.errorbar(mean, number, xerr=[[mean - low], [high - mean]], **style)
    height = float("inf")  # of the name above
    for y, x, name in sorted(labels, reverse=True):
        height = min(y, height - 0.025)  # names of nearly equal rows stand below one another
        axes.annotate(name, (x, height), textcoords="offset points", xytext=(-6, 0), fontsize=7, va="center",
                      ha="right" if x > 0.5 else "left")
    axes.set(xlabel="prompt following (PF)", ylabel="concept preservation (CP)", xlim=(0, 1.02), ylim=(0, 1.05))
    bars.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    bars.set(xlabel="CPxPF", xlim=(0, 1.02), ylim=(len(rows) - 0.5, -0.5))
    bars.grid(axis="x", color="0.9")
    with dsd.writing(path) as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight")


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
    parser = dsd.Parser(__doc__, "runs/evaluate", "model", "vlm")
    add = parser.add_argument
    add("--full", action="store_true", help="all rows; also searches settings and trains the ablations")
    add("--rows", nargs="+", metavar="WORD", help="only rows of these names, or whose name or group contains one of these words")
    add("--references", type=int, help="how many (default: 16, with --full 75)")
    add("--prompts", type=int, default=4, help="new contexts for each reference, beside one of other light (default: 4)")
    add("--tuned_references", type=int, help="how many of them DreamBooth-LoRA is tuned to (default: all)")
    add("--folder", type=Path, help="a folder in DreamBench++'s layout, instead of the world's references")
    add("--adapter", type=Path, help="what DSD uses (default: the one shipped with the model)")
    add("--judge", default=dsd.MINIATURE / "judge", help="image classifier folder (default: the miniature's)")
    add("--pairs", type=Path, default="runs/pairs", help="what curate.py wrote; the ablations learn from it")
    add("--grids", type=Path, default="runs/grids", help="what generate_grids.py wrote; for the ablation without curation")
    add("--ablation_steps", type=int, help="training steps of every ablation (default: finetune.py's)")
    add("--compile", action="store_true", help="compile the blocks while ablations train: a minute each, then faster steps")
    add("--steps", type=int, help="Euler steps of every method")
    add("--seed", type=int, default=0, help="of references, prompts and noise")
    return parser.parse_args()


def choose_rows(args, adapter):
    """The rows of this run."""
    rows = [row for row in all_rows(adapter) if (args.full or row.quick) and not (row.world and args.folder)]
    if args.rows:
        known, names = rows, {r.name.lower() for r in rows}

        def meant(row, word):  # a row's whole name means that row alone, else all that contain the word
            return word == row.name.lower() if word in names else word in f"{row.name} {row.group}".lower()
        rows = [r for r in rows if any(meant(r, word.lower()) for word in args.rows)]
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
    check_ablations(rows, args)
    if adapter is None and any(row.options.get("adapter", 0) is None for row in rows):
        raise dsd.DsdError("this model ships no adapter; give --adapter FOLDER")
    size = settings["width"], settings["height"]
    count = args.references or (75 if args.full else 16)
    cases = (folder_cases(args.folder, args.references, args.seed, size) if args.folder else
             exams.world_cases(range(count), args.prompts, args.seed, size[0]))
    others = ([c for c in cases if c.reference < SEARCH_COUNT] if args.folder else
              exams.world_cases(range(SEARCH, SEARCH + SEARCH_COUNT), args.prompts, args.seed, size[0]))
    judge = None if args.folder else exams.Judge(args.judge)
    scorer = judge, curate.load_vlm(args.vlm), FOLDER_QUESTIONS if args.folder else WORLD_QUESTIONS
    common = {"model": fingerprint(args.model), "judge": judge and fingerprint(args.judge), "vlm": fingerprint(args.vlm),
              "folder": args.folder and str(args.folder), "prompts": args.prompts, "seed": args.seed, "settings": settings}
    evaluate(args, rows, cases, others, Models(args, settings), scorer, common)


def evaluate(args, rows, cases, others, models, scorer, common):
    """All rows one after another; after each, what is known so far is written."""
    tuned = [c for c in cases if args.tuned_references is None or c.reference < args.tuned_references]
    headline, records, results, times, done = "vlm_cp_pf" if args.folder else "cp_pf", {}, {}, {}, []
    for row in rows:
        if row.ablation:
            row.options["adapter"] = train_ablation(row.ablation, args)
        if row.best_of:
            row.options = max((r for r in done if r.group == row.best_of),
                              key=lambda r: (results[r.name]["subject"][headline] or [0])[0]).options
        own = others if row.group == "search" else tuned if row.tuned else cases
        records[row.name] = run_row(row, own, models, scorer, common)
        results[row.name], times[row.name] = summarise(records[row.name]), timing(row, own, args.out)
        done.append(row)
        for other in done:
            if "DSD" in records and other.group != "search":
                results[other.name]["subject"]["dsd_minus"] = difference(records["DSD"], records[other.name], headline)
        report(args, done, cases, records, results, times, common)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    print(f"{len(rows)} rows in {args.out}; look at {args.out / 'contact_sheet.png'} and {args.out / 'scatter.png'}")


def report(args, rows, cases, records, results, times, common):
    """Write table.md, scores.json, scatter.png and contact_sheet.png of the rows so far."""
    shown = [row for row in rows if row.group != "search"]
    keys = ("vlm_cp", "vlm_pf", "vlm_cp_pf") if args.folder else ("cp", "pf", "cp_pf")
    write_table(rows, results, times, args.out, shlex.join(["evaluate.py", *sys.argv[1:]]))
    every = {name: {k: [r.get(k) for r in some] for k in some[-1] if k not in ("answers", "seen")}
             for name, some in records.items()}
    dsd.write_text(args.out / "scores.json", json.dumps(
        {"common": common, "rows": {name: {**result, "cases": every[name]} for name, result in results.items()}}) + "\n")
    draw_scatter([row for row in shown if all(results[row.name]["subject"].get(k) for k in keys)], results,
                 args.out / "scatter.png", keys)
    draw_sheet(shown, records, cases, args.out)


if __name__ == "__main__":
    dsd.run(main)
