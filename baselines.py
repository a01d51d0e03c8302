"""What DSD is compared with: the methods of evaluate.py's rows, each a function of a batch of cases, and the ablations.

A method draws a picture for each case by a stock diffusers pipeline around the same teacher, with the teacher's own
settings; DSD itself is drawn by sample.py's function. The ablations' adapters are trained by finetune.py's own command.
"""

import dataclasses
import gc
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (FluxControlInpaintPipeline, FluxControlPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline,
                       FluxPipeline)
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from tqdm import tqdm

import dsd
import sample

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class Case:
    """One picture to draw: what the methods are given, and what is true."""
    reference: int  # the number of the reference
    image: Image.Image  # the reference itself
    subject: str  # what prompts call it
    prompt: str
    reference_prompt: str  # what the reference shows, for methods that must be told
    sheet_prompt: str  # both pictures as one image, for in-context inpainting
    class_prompts: list  # other pictures of such a subject, for DreamBooth's prior
    seed: int
    kind: str = "subject"  # or "relight"
    truth: Image.Image | None = None  # the true rendering
    identity: dict = dataclasses.field(default_factory=dict)  # {attribute: value} of the subject
    context: dict = dataclasses.field(default_factory=dict)  # as asked
    shown: dict = dataclasses.field(default_factory=dict)  # the reference's own context


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


# ---- methods: draw(models, cases, **options) -> a list of images -----------------------------------------------------
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
    if subprocess.run([sys.executable, str(HERE / script), *map(str, flags)]).returncode:
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
    steps = ["--steps", args.ablation_steps] if args.ablation_steps else []
    if done.get("pairs") != dsd.file_digest(pairs / "metadata.jsonl") or args.ablation_steps not in (None, done["steps"]):
        run_script("finetune.py", "--model", args.model, "--pairs", pairs, "--out", folder, *flags, *steps)
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


STRENGTHS = [0.5, 0.6, 0.7, 0.8, 0.9]  # of SDEdit
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
    rows += [Row(f"SDEdit {s}", "zero-shot", sdedit, {"strength": s}, quick=s == 0.8) for s in STRENGTHS]
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
