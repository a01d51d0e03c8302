"""Step 1 (paper section 3.1): the teacher draws grids of one subject in four settings.

    python generate_grids.py                                      # the miniature: 2 minutes on two CPU cores, under 1 GB
    python generate_grids.py --model black-forest-labs/FLUX.1-dev # one CUDA GPU
    python generate_grids.py --prompts my_prompts.txt --count 40
    python generate_grids.py --llm Qwen/Qwen2.5-7B-Instruct       # a chat model invents the subjects and the settings

The four panels of a grid are one image: they attend to one another, so an unmodified text-to-image model keeps their
subject alike. Which of them really agree is the next step's question (curate.py).

Writes to --out: a PNG a grid, `grids.jsonl` (a line a grid: file, prompt, panel prompts, subject, family, seed, model,
settings), `overview.png`, and with --llm every answer of the chat model, `subjects.jsonl`. Stopped and started again
with the same command, it goes on with the first missing batch; with a larger --count it adds to what is there.
"""

import hashlib
import itertools
import json
import random
import re
import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsd

FILES = ["[0-9]*[0-9].png", "overview.png", "grids.jsonl", "subjects.jsonl", "*.part"]  # what this script writes

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
    with dsd.explained(f"--prompts {path}: give a UTF-8 text file"), open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    grids = {}
    for number, line in enumerate(lines, 1):
        if line in grids:
            print(f"{path}, line {number}: there already, left out", file=sys.stderr)
        elif line:
            subject, *settings = parts = [part.strip() for part in dsd.check_text(line, f"{path}, line {number}").split("|")]
            if len(parts) != 5 or not all(parts):
                raise dsd.DsdError(f"{path}, line {number}: wanted \"subject | setting | setting | setting | setting\"")
            grids[line] = grid_prompt(grammar, "subject", subject, "", settings, [f"{subject} {s}" for s in settings])
    if not grids:
        raise dsd.DsdError(f"--prompts {path}: no prompt in it")
    return list(grids.values())


def parse_llm(answer):
    """The subject and four settings in a chat model's answer, None if it is not usable."""
    try:
        found = json.loads(re.search(r"\{.*\}", answer, re.DOTALL).group())
        subject, settings = found["subject"].strip(), [s.strip() for s in found["settings"]]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    good = 0 < len(subject.split()) <= 12 and len(settings) == 4 and len({s.lower() for s in settings}) == 4
    return (subject, settings) if good and all(0 < len(s.split()) <= 15 for s in settings) else None


def ask_llm(name, path, seed, quantize="none", references=REFERENCES):
    """Yield a chat model's answers without end: first those that `path` holds, then new ones, which are added there."""
    old = dsd.read_records(path, answer=str)
    yield from (record["answer"] for record in old)
    with dsd.explained(f"--llm {name}: not a chat model that can be loaded"):  # or none at all, or without a template
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
        model = dsd.language_model(AutoModelForCausalLM, name, quantize, "auto")
    for attempt in itertools.count(len(old)):
        torch.manual_seed(seed * 1_000_003 + attempt)  # an answer depends on its number, not on how often we stopped
        some = random.Random(seed * 1_000_003 + attempt).sample(references, min(3, len(references)))
        request = [{"role": "user", "content": LLM_REQUEST.format(references="; ".join(some))}]
        inputs = tokenizer.apply_chat_template(request, add_generation_prompt=True, return_dict=True,
                                               return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=1.0)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        dsd.append_records(path, [{"answer": answer}])
        yield answer


def llm_prompts(name, answers, grammar, count):
    """`count` grids from a chat model's answers; unusable and repeated ones are counted."""
    grids, rejected, bar = {}, 0, tqdm(total=count, desc="subjects")
    while len(grids) < count:
        found = parse_llm(next(answers))
        if found and found[0].lower() not in grids:
            subject, settings = found
            grids[subject.lower()] = grid_prompt(grammar, "subject", subject, "", settings,
                                                 [f"{subject} {s}" for s in settings])
            bar.update()
            continue
        rejected += 1
        if rejected > 20 + 3 * len(grids):
            raise dsd.DsdError(f"--llm {name}: {rejected} answers could not be used, {len(grids)} could; take "
                               "a larger chat model, or --prompts")
    print(f"{name}: {len(grids)} subjects, {rejected} answers rejected")
    return list(grids.values())


def plan(args, settings, listed):
    """Every grid of this run, in order: what to draw and with which seed. `listed`: the grids of --prompts, or None."""
    seed, grammar, count = settings["seed"] * 1_000_003, settings["grammar"], settings["count"]
    families = ["subject", "subject", "relight"] if args.family == "both" else [args.family]
    if args.llm:
        answers = ask_llm(args.llm, args.out / "subjects.jsonl", settings["seed"], args.quantize)
        listed = llm_prompts(args.llm, answers, grammar, count)
    if listed and not args.count:
        count = len(listed)
    common = {"model": dsd.name_of(args.model), "rows": 2, "columns": 2, "settings": {
        name: settings[name] for name in ("steps", "panel", "width", "height", "guidance_scale", "true_cfg_scale")}}

    def grid(i):
        drawn = listed[i % len(listed)] if listed else grammar_prompts(grammar, families, seed + i)
        return {"file": f"{i:06d}.png", **drawn, "seed": seed + i, **common}
    return dsd.Lazy(count, grid)


# ---- drawing ---------------------------------------------------------------------------------------------------------
def draw_grids(pipe, grids, settings):
    """A batch of grids through the stock pipeline. Every grid has its own generator: batches do not change it."""
    width, height = (2 * settings.get(side, settings["panel"]) for side in ("width", "height"))
    return pipe(
        [grid["prompt"] for grid in grids], negative_prompt=[""] * len(grids),
        true_cfg_scale=settings["true_cfg_scale"], guidance_scale=settings["guidance_scale"],
        width=width, height=height, num_inference_steps=settings["steps"],
        max_sequence_length=dsd.prompt_tokens(pipe),
        generator=[torch.Generator("cpu").manual_seed(grid["seed"]) for grid in grids]).images


def parse_args():
    parser = dsd.Parser(__doc__, "runs/grids", "model", "quantize", "offload")
    add, setting, source = parser.add_argument, parser.setting, parser.add_mutually_exclusive_group().add_argument
    setting("count", 100, "how many grids")
    add("--family", choices=["both", "subject", "relight"], default="both",
        help="subject: new settings; relight: one scene in other light; both: two to one")
    source("--prompts", help="text file, a line a grid: subject | setting | setting | setting | setting")
    source("--llm", help="chat model (folder or hub name) that invents subjects and settings")
    setting("batch_size", 1, "grids drawn together; changes speed and memory, not the grids")
    setting("steps", 28, "Euler steps of the sampler")
    setting("panel", 512, "side of a panel in pixels")
    setting("guidance_scale", 3.5, "distilled guidance, for models that have it")
    setting("true_cfg_scale", 1.0, "prompt guidance with a second pass; 1 is off")
    setting("seed", 0, "of prompts and noise")
    add("--width", type=int, help="of a panel that is not square")
    add("--height", type=int, help="of a panel that is not square")
    args = parser.parse_args()
    settings = dsd.model_settings(args.model, "generate_grids", args, **parser.defaults, grammar=GRAMMAR)
    sides = dict.fromkeys(["width", "height"], settings["panel"])
    settings |= dsd.model_settings(args.model, "generate_grids", args, **sides)
    return args, settings


def main():
    args, settings = parse_args()
    dsd.check_machine(args, ["transformer", "text encoders"], args.llm)
    dsd.check_model(args.model, width=settings["width"], height=settings["height"])
    listed = file_prompts(args.prompts, settings["grammar"]) if args.prompts else None
    state = dsd.processes()
    with state.main_process_first():  # the others find the folder made, and a chat model's answers in it
        dsd.open_out(args.out, {
            "step": "generate_grids", "model": dsd.name_of(args.model), "family": args.family, "llm": args.llm,
            "quantize": args.quantize, "prompts": args.prompts and dsd.file_digest(args.prompts),
            **{name: value for name, value in settings.items() if name not in ("count", "batch_size")},
            "grammar": hashlib.sha256(json.dumps(settings["grammar"]).encode()).hexdigest()[:16]},  # it may be long
            FILES, args.overwrite)
        grids = plan(args, settings, listed)  # before the pipeline: a chat model needs its memory
    done = dsd.read_records(args.out / "grids.jsonl")
    if done[:len(grids)] != grids[:len(done)]:
        raise dsd.DsdError(f"{args.out}/grids.jsonl does not say what this command draws; restore it or delete {args.out}")
    pipe = dsd.load_pipeline(FluxPipeline, args.model, args.quantize, args.offload)
    if state.is_main_process:
        dsd.warn_of_prompts(pipe, (grid["prompt"] for grid in grids))

    size, main = settings["batch_size"], state.is_main_process
    together = size * state.num_processes  # each process draws one of these batches, the same after an interruption
    for start in tqdm(range(0, len(grids), together), desc="grids", unit="batch", disable=not main):
        first = start + size * state.process_index
        batch = grids[first:first + size]
        if batch and (first + len(batch) > len(done) or not all((args.out / g["file"]).exists() for g in batch)):
            for grid, image in zip(batch, draw_grids(pipe, batch, settings)):
                dsd.save_image(image, args.out / grid["file"])
        state.wait_for_everyone()
        if main and (new := grids[max(len(done), start):start + together]):
            dsd.append_records(args.out / "grids.jsonl", new)
    if not main:
        return
    cells = [(dsd.open_image(args.out / grid["file"]), grid["subject"]) for grid in grids[:36]]
    dsd.contact_sheet([cells[i:i + 6] for i in range(0, len(cells), 6)], args.out / "overview.png")
    print(f"{len(grids)} grids in {args.out}, peak memory {dsd.peak_memory():.1f} GB; look at {args.out / 'overview.png'}")


if __name__ == "__main__":
    dsd.run(main)
