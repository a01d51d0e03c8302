"""Step 1 (paper section 3.1): the teacher draws grids of one subject in four settings.

    python generate_grids.py                                      # the miniature: about 2 minutes on two CPU cores
    python generate_grids.py --model black-forest-labs/FLUX.1-dev # one CUDA GPU
    python generate_grids.py --prompts my_prompts.txt --count 40
    python generate_grids.py --llm Qwen/Qwen2.5-7B-Instruct       # a chat model invents the subjects and the settings

The four panels of a grid are one image: they attend to one another, so an unmodified text-to-image model keeps their
subject alike. Which of them really agree is the next step's question (curate.py).

Writes to --out: a PNG a grid, `grids.jsonl` (a line a grid: file, prompt, panel prompts, subject, family, seed, model,
settings) and `overview.png`. Stopped and started again with the same command, it goes on with the first missing grid.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from diffusers import FluxPipeline
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsd

# The grammar for a model whose folder brings none (FLUX.1). A panel's prompt is one choice from each list of `panel`.
GRAMMAR = {
    "subject": "a grid of 4 images representing the same {subject}: {panels}",
    "relight": "a grid of 4 images representing the same scene, {subject} {scene}, seen from the same place in "
               "different light: {panels}",
    "panels": ["top left {}", "top right {}", "bottom left {}", "bottom right {}"],
    "nouns": [["small", "old", "cheerful", "fluffy", "striped", "wooden", "glass", "clockwork"],
              ["robot", "fox", "teapot", "backpack", "dragon", "owl", "sneaker", "cat", "toy car", "lantern", "rabbit",
               "astronaut doll", "guitar", "turtle", "armchair"]],
    "scenes": ["on a beach", "in a snowy forest", "on a kitchen table", "in a busy street", "in a flower meadow",
               "on a mountain top", "in a library", "by a camp fire", "in a desert", "on a boat"],
    "extras": ["", "", "seen from the side", "in the rain", "next to a stack of books", "wrapped in a scarf"],
    "lights": ["in morning light", "at sunset", "by moonlight", "under neon signs", "by candle light"],
}

LLM_REQUEST = """Invent one clear subject (a character, an animal or an object) that could star in a picture book, and \
four different settings for it. For inspiration only, some captions of real pictures: {references}
Answer with JSON only: {{"subject": "...", "settings": ["...", "...", "...", "..."]}}. The subject has at most 12 words \
and names no place; each setting has at most 15 words and does not repeat the subject."""
REFERENCES = ["a brown dog asleep on a red sofa", "a vintage bicycle leaning against a wall", "a chef plating a dessert",
              "two kites over a windy beach", "a porcelain cup with a painted bird", "a fire engine outside a station",
              "an elderly violinist on a bridge", "a hiking boot on a mossy stone", "a parrot on a branch"]


# ---- prompts ---------------------------------------------------------------------------------------------------------
def grammar_prompts(grammar, families, seed):
    """One random grid of the grammar: {"prompt", "panel_prompts" (4), "subject", "family"}."""
    draw = random.Random(seed)
    family = draw.choice(families)
    noun = " ".join(draw.choice(words) for words in grammar["nouns"])
    subject = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    scene = " ".join(filter(None, (draw.choice(grammar["scenes"]), draw.choice(grammar["extras"]))))
    if family == "relight":
        settings = draw.sample(grammar["lights"], 4)
        prompts = [f"{subject} {scene} {s}" for s in settings]
        return grid_prompt(grammar, "relight", subject, scene, settings, prompts)
    settings = [" ".join(filter(None, (draw.choice(grammar[k]) for k in ("scenes", "lights", "extras")))) for _ in range(4)]
    return grid_prompt(grammar, "subject", noun, "", settings, [f"{subject} {s}" for s in settings])


def grid_prompt(grammar, family, subject, scene, settings, panel_prompts):
    """The whole prompt of a grid from its parts."""
    panels = ", ".join(place.format(s) for place, s in zip(grammar["panels"], settings))
    name = re.sub("^(an?|the) ", "", subject, flags=re.IGNORECASE) if family == "subject" else subject  # "the same fox"
    prompt = grammar[family].format(subject=name, scene=scene, panels=panels)
    return {"prompt": prompt, "panel_prompts": panel_prompts, "subject": subject, "family": family}


def file_prompts(path, grammar):
    """Grids from a file: a line is "subject | setting | setting | setting | setting", blank lines are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise dsd.DsdError(f"--prompts {path}: {error}; give a UTF-8 text file") from None
    grids = []
    for number, line in enumerate(lines, 1):
        parts = [part.strip() for part in line.split("|")]
        if line.strip() and (len(parts) != 5 or not all(parts)):
            raise dsd.DsdError(f"{path}, line {number}: wanted \"subject | setting | setting | setting | setting\"")
        if line.strip():
            grids.append(grid_prompt(grammar, "subject", parts[0], "", parts[1:], [f"{parts[0]} {p}" for p in parts[1:]]))
    if not grids:
        raise dsd.DsdError(f"--prompts {path}: no prompt in it")
    return grids


def parse_llm(answer):
    """The subject and four settings in a chat model's answer, None if it is not usable."""
    try:
        found = json.loads(re.search(r"\{.*\}", answer, re.DOTALL).group())
        subject, settings = found["subject"].strip(), [s.strip() for s in found["settings"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    good = 0 < len(subject.split()) <= 12 and len(settings) == 4 and len({s.lower() for s in settings}) == 4
    return (subject, settings) if good and all(0 < len(s.split()) <= 15 for s in settings) else None


def llm_prompts(name, grammar, count, seed, references=REFERENCES):
    """`count` grids invented by a chat model, one after another; unusable and repeated answers are counted."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype="auto").to(dsd.device())
    except Exception as error:  # no such folder, another kind of model, no chat template: many kinds, one answer
        raise dsd.DsdError(f"--llm {name}: not a chat model that can be loaded: {dsd.one_line(error)}") from None
    grids, subjects, rejected, draw = [], set(), 0, random.Random(seed)
    torch.manual_seed(seed)
    bar = tqdm(total=count, desc="subjects")
    while len(grids) < count:
        request = LLM_REQUEST.format(references="; ".join(draw.sample(references, min(3, len(references)))))
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": request}], add_generation_prompt=True,
                                               return_dict=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=1.0)
        found = parse_llm(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
        if found and found[0].lower() not in subjects:
            subjects.add(found[0].lower())
            grids.append(grid_prompt(grammar, "subject", found[0], "", found[1], [f"{found[0]} {s}" for s in found[1]]))
            bar.update()
        else:
            rejected += 1
            if rejected > 20 + 3 * len(grids):
                raise dsd.DsdError(f"--llm {name}: {rejected} answers could not be used, {len(grids)} could; take "
                                   "a larger chat model, or --prompts")
    print(f"{name}: {len(grids)} subjects, {rejected} answers rejected")
    return grids


def plan(args, settings, grammar):
    """Every grid of this run, in order: what to draw and with which seed."""
    if args.llm and args.prompts:
        raise dsd.DsdError("--llm and --prompts exclude each other; give one of them")
    if args.prompts:
        grids = file_prompts(args.prompts, grammar)
        count = settings["count"] if args.count else len(grids)
        grids = [grids[i % len(grids)] for i in range(count)]
    elif args.llm:
        grids = llm_prompts(args.llm, grammar, settings["count"], args.seed)
    else:
        families = ["subject", "subject", "relight"] if args.family == "both" else [args.family]
        grids = [grammar_prompts(grammar, families, args.seed * 1_000_003 + i) for i in range(settings["count"])]
    common = {"model": dsd.name_of(args.model), "rows": 2, "columns": 2,
              "settings": {k: v for k, v in settings.items() if k not in ("count", "batch_size", "grammar")}}
    return [{"file": f"{i:06d}.png", **grid, "seed": args.seed * 1_000_003 + i, **common} for i, grid in enumerate(grids)]


# ---- drawing ---------------------------------------------------------------------------------------------------------
def draw_grids(pipe, grids, settings):
    """A batch of grids through the stock pipeline. Every grid has its own generator: batches do not change it."""
    return pipe(
        [grid["prompt"] for grid in grids], negative_prompt=[""] * len(grids),
        true_cfg_scale=settings["true_cfg_scale"], guidance_scale=settings["guidance_scale"],
        width=2 * settings["panel"], height=2 * settings["panel"], num_inference_steps=settings["steps"],
        max_sequence_length=dsd.prompt_tokens(pipe),
        generator=[torch.Generator("cpu").manual_seed(grid["seed"]) for grid in grids]).images


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=dsd.MINIATURE / "flux", help="FLUX folder or hub name (default: the miniature)")
    add("--out", type=Path, default="runs/grids", help="where the grids go (default: %(default)s)")
    add("--count", type=int, help="how many grids (default: the model's dsd.json, else 100)")
    add("--family", choices=["both", "subject", "relight"], default="both",
        help="subject: new settings; relight: one scene in other light; both: two to one")
    add("--prompts", help="text file, a line a grid: subject | setting | setting | setting | setting")
    add("--llm", help="chat model (folder or hub name) that invents subjects and settings")
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, help="grids drawn together; changes speed and memory, not the grids")
    add("--steps", type=int, help="Euler steps of the sampler")
    add("--guidance_scale", type=float, help="distilled guidance, for models that have it")
    add("--true_cfg_scale", type=float, help="prompt guidance with a second pass; 1 is off")
    add("--panel", type=int, help="side of a panel in pixels")
    return parser.parse_args()


def main():
    args = parse_args()
    settings = dsd.model_settings(args.model, "generate_grids", args, count=100, batch_size=1, steps=28, panel=512,
                                  guidance_scale=3.5, true_cfg_scale=1.0, grammar=GRAMMAR)
    if min(settings["count"], settings["steps"], settings["batch_size"]) < 1:
        raise dsd.DsdError("--count, --steps and --batch_size must be at least 1")
    grids = plan(args, settings, settings["grammar"])  # before the pipeline: a chat model needs its memory
    done = dsd.read_records(args.out / "grids.jsonl")
    if done != grids[:len(done)]:
        raise dsd.DsdError(f"{args.out} holds grids of another run; give another --out or delete it")
    pipe = dsd.load_pipeline(FluxPipeline, args.model)
    args.out.mkdir(parents=True, exist_ok=True)

    bar, size = tqdm(total=len(grids), initial=len(done), desc="grids"), settings["batch_size"]
    for start in range(len(done) // size * size, len(grids), size):  # the same batches after an interruption
        batch = grids[start:start + size]
        for grid, image in zip(batch, draw_grids(pipe, batch, settings)):
            image.save(args.out / grid["file"])
        new = batch[max(len(done) - start, 0):]
        dsd.append_records(args.out / "grids.jsonl", new)
        bar.update(len(new))
    bar.close()
    cells = [(dsd.open_image(args.out / grid["file"]), grid["subject"]) for grid in grids[:36]]
    dsd.contact_sheet([cells[i:i + 6] for i in range(0, len(cells), 6)], args.out / "overview.png")
    print(f"{len(grids)} grids in {args.out}; look at {args.out / 'overview.png'}")


if __name__ == "__main__":
    dsd.run(main)
