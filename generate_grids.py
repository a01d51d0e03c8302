"""Step 1 (paper section 3.1): the teacher draws grids that show one subject in four settings.

    python generate_grids.py                                       # the miniature, on a CPU
    python generate_grids.py --model black-forest-labs/FLUX.1-dev  # one CUDA GPU
    python generate_grids.py --prompts my_prompts.txt --count 40
    python generate_grids.py --llm Qwen/Qwen2.5-7B-Instruct        # a chat model invents subjects

The four panels of a grid are one image whose tokens attend to one another, so an unmodified
text-to-image model draws the same subject in all of them. Which panels really agree is the question
of the next step, curate.py. One option makes more of them agree (our choice, not the paper's):
--negative guides away from the prompt of four different subjects, in place of the empty prompt. It
costs nothing beside --true_cfg_scale, but the teacher must know the words.
A model distilled to a few steps (FLUX.1-schnell, --steps 4) serves here only; training ruins it.

Writes to --out: a PNG for each grid, `grids.jsonl` (a line for each grid: file, prompt, subject,
seed, ...) and `overview.png`. Started again after an interruption, the same command draws only what
is missing; with a larger --count it adds grids to those that are there.
"""

import dsd

import argparse
import json
import random
import re
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from diffusers import FluxPipeline


def words(text):
    return text.split(", ")


# The grammar for a model whose folder brings none (FLUX.1). A panel's prompt is one choice from
# each list. An opposite is the prompt of a grid whose panels do not agree, for --negative.
GRAMMAR = {
    "subject": "a grid of 4 images representing the same {subject}: {panels}",
    "relight": "a grid of 4 images representing the same scene, {subject} {scene}, seen from the "
    "same place in different light: {panels}",
    "opposites": {
        "subject": "a grid of 4 images, each representing a different {subject}: {panels}",
        "relight": "a grid of 4 images, each representing a different scene, {subject} {scene}, "
        "seen from a different place in different light: {panels}",
    },
    "panels": ["top left {}", "top right {}", "bottom left {}", "bottom right {}"],
    "nouns": [
        words("small, old, cheerful, fluffy, striped, wooden, glass, clockwork"),
        words(
            "robot, fox, teapot, backpack, dragon, owl, sneaker, cat, toy car, lantern, rabbit, "
            "astronaut doll, guitar, turtle, armchair"
        ),
    ],
    "scenes": words(
        "on a beach, in a snowy forest, on a kitchen table, in a busy street, in a flower meadow, "
        "on a mountain top, in a library, by a camp fire, in a desert, on a boat"
    ),
    "extras": ["", ""]
    + words("seen from the side, in the rain, next to a stack of books, wrapped in a scarf"),
    "lights": words("in morning light, at sunset, by moonlight, under neon signs, by candle light"),
}
CAPTIONS = words(
    "a brown dog asleep on a red sofa, a vintage bicycle leaning on a wall, a chef plating a "
    "dessert, two kites over a windy beach, a porcelain cup with a painted bird, a fire engine "
    "outside a station, an elderly violinist on a bridge, a hiking boot on a mossy stone, "
    "a parrot on a branch"
)
LLM_REQUEST = """Invent one clear subject (a character, an animal or an object) that could star in \
a picture book, and four different settings for it. For inspiration only, some captions of real \
pictures: {captions}
Answer with JSON only. The subject has at most 12 words and names no place; each setting has at \
most 15 words and does not repeat the subject. For example:
{{"subject": "a clockwork owl with copper wings", "settings": ["on a snowy roof at dawn", \
"in a flower market", "beside a campfire by night", "on the deck of a ship"]}}"""
ANSWER_TOKENS = 2000  # room for a model that thinks first; others stop long before
LINE = "subject | setting | setting | setting | setting"  # of a file with prompts


# ---- prompts -------------------------------------------------------------------------------------
def read_grammar(args):
    """The grammar of the model's folder, or the one above."""
    grammar = dsd.folder_settings(args.model, "generate_grids").get("grammar", GRAMMAR)
    if args.negative and args.true_cfg_scale == 1:
        raise dsd.DsdError("--negative needs --true_cfg_scale above 1; or give --no-negative")
    if args.negative and not grammar.get("opposites"):
        raise dsd.DsdError("--negative: this model's grammar has no opposites; give --no-negative")
    return grammar


def grid_prompt(grammar, family, subject, scene, settings):
    """A grid's record from its parts. settings: what the prompt says of each panel, in reading
    order. "opposite" is the prompt for --negative, None if the grammar has none."""
    name = re.sub("^(an?|the) ", "", subject, flags=re.IGNORECASE)
    panels = ", ".join(place.format(text) for place, text in zip(grammar["panels"], settings))
    parts = {"subject": name if family == "subject" else subject, "scene": scene, "panels": panels}
    opposite = grammar.get("opposites", {}).get(family)
    return {
        "prompt": grammar[family].format(**parts),
        "opposite": opposite and opposite.format(**parts),
        "subject": name,
        "family": family,
        "rows": 2,
        "columns": 2,
    }


def grammar_prompt(grammar, families, seed):
    """One random grid of the grammar."""
    draw = random.Random(seed)

    def phrase(*lists):
        return " ".join(filter(None, [draw.choice(grammar[name]) for name in lists]))

    family = draw.choice(families)
    noun = " ".join(draw.choice(words) for words in grammar["nouns"])
    subject = f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
    scene = phrase("scenes", "extras")
    if family == "relight":  # one scene in four lights
        return grid_prompt(grammar, family, subject, scene, draw.sample(grammar["lights"], 4))
    settings = [phrase("scenes", "lights", "extras") for _ in range(4)]
    return grid_prompt(grammar, family, subject, "", settings)


def file_prompts(path, grammar):
    """Grids from a text file with lines "subject | setting | setting | setting | setting"; blank
    lines are skipped. The file is read once, so it may be a pipe."""
    with dsd.explained(f"--prompts {path}: give a UTF-8 text file"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    grids = []
    for number, line in enumerate(lines, 1):
        subject, *settings = [part.strip() for part in line.split("|")]
        if len(settings) == 4 and all([subject, *settings]):
            grids.append(grid_prompt(grammar, "subject", subject, "", settings))
        elif line.strip():
            raise dsd.DsdError(f'{path}, line {number}: wanted "{LINE}"')
    if not grids:
        raise dsd.DsdError(f"--prompts {path}: there is no prompt in it")
    return grids


# ---- prompts by a chat model ---------------------------------------------------------------------
def load_llm(name, quantize):
    """A chat model, as a pipeline of transformers."""
    with dsd.explained(f"--llm {name}: not a chat model that can be loaded"):
        model = dsd.load_language_model(transformers.AutoModelForCausalLM, name, quantize)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}])  # one may be missing
        return transformers.pipeline("text-generation", model, tokenizer=tokenizer)


def ask_llm(chat, seed):
    """The chat model's answer to the request of this seed, which no other answer changes."""
    torch.manual_seed(seed)
    captions = "; ".join(random.Random(seed).sample(CAPTIONS, 3))
    request = [{"role": "user", "content": LLM_REQUEST.format(captions=captions)}]
    how = {"max_new_tokens": ANSWER_TOKENS, "do_sample": True, "temperature": 1.0}
    plain = {"enable_thinking": False}  # templates that know no such choice ignore it
    answers = chat(request, return_full_text=False, tokenizer_encode_kwargs=plain, **how)
    return answers[0]["generated_text"]


def parse_llm(answer):
    """(subject, four settings) of the first JSON object in an answer, or None if it is not usable.
    What a model thinks before </think> is no answer."""
    answer = answer.rpartition("</think>")[2]
    try:
        found, _ = json.JSONDecoder().raw_decode(answer, answer.index("{"))
        subject = found["subject"].strip()
        settings = [setting.strip() for setting in found["settings"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    four = len(settings) == len({setting.lower() for setting in settings}) == 4
    short = all(0 < len(setting.split()) <= 15 for setting in settings)
    usable = four and short and 0 < len(subject.split()) <= 12
    return (subject, settings) if usable else None


def invent_subjects(name, count, out, seed=0, quantize="none"):
    """`count` different subjects with four settings each, a list of (subject, settings).

    Every request shows a few captions of real pictures: without them a chat model comes back to a
    handful of favourites (section 3.1). The answers are kept in the folder `out`/subjects. Several
    processes share the requests in rounds, so that none waits long for another."""
    state, chat, found, asked = PartialState(), None, {}, 0
    while len(found) < count:
        if asked > 20 + 4 * len(found):
            usable = f"only {len(found)} of {asked} answers could be used"
            raise dsd.DsdError(f"--llm {name}: {usable}; take a larger chat model, or --prompts")
        numbers = range(asked, asked + 8 * state.num_processes)
        files = [out / "subjects" / f"{number:06d}.json" for number in numbers]
        for file in files[state.process_index :: state.num_processes]:
            if not file.exists():
                chat = chat or load_llm(name, quantize)
                answer = ask_llm(chat, seed * 1_000_003 + int(file.stem))
                dsd.write_json(file, {"answer": answer})
        state.wait_for_everyone()
        for file in files:
            usable = parse_llm(dsd.read_json(file)["answer"])
            if usable:
                found.setdefault(usable[0].lower(), usable)
        asked += len(files)
    return list(found.values())[:count]


def plan(args, grammar, listed):
    """Every grid of this run in order, a list of records: what to draw, and with which seed.
    listed: the grids of --prompts, which are repeated with other seeds up to --count, or None."""
    if args.llm:
        found = invent_subjects(args.llm, args.count, args.out, args.seed, args.quantize)
        listed = [grid_prompt(grammar, "subject", who, "", settings) for who, settings in found]
    families = ["subject", "subject", "relight"] if args.family == "both" else [args.family]
    grids = []
    for i in range(args.count or len(listed)):
        seed = args.seed * 1_000_003 + i  # no grid of one --seed is a grid of another
        grid = listed[i % len(listed)] if listed else grammar_prompt(grammar, families, seed)
        grids.append({"file": f"{i:06d}.png", **grid, "seed": seed})
    return grids


# ---- drawing -------------------------------------------------------------------------------------
def negative_prompts(grids, args):
    """What text guidance pushes away from."""
    return [grid["opposite"] if args.negative else "" for grid in grids]


def draw_grids(pipe, grids, args):
    """A batch of grids by the stock pipeline, a list of images. Each grid has its own generator, so
    that the batch size changes it by rounding only."""
    generators = [torch.Generator("cpu").manual_seed(grid["seed"]) for grid in grids]
    pixels = pipe(
        [grid["prompt"] for grid in grids],
        negative_prompt=negative_prompts(grids, args),
        true_cfg_scale=args.true_cfg_scale,
        guidance_scale=args.guidance_scale,
        height=grids[0]["rows"] * args.height,
        width=grids[0]["columns"] * args.width,
        num_inference_steps=args.steps,
        max_sequence_length=pipe.tokenizer_2.model_max_length,
        generator=generators,
        output_type="pt",
    ).images
    return dsd.to_images(pixels)


# ---- command line --------------------------------------------------------------------------------
def parse_args():
    parser = dsd.Parser(__doc__, "runs/grids")
    add, at_least = parser.add_argument, dsd.at_least
    whole, real = at_least(1), at_least(0, float)
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add("--count", type=whole, default=100, help="how many grids; with --prompts one for each line")
    text = "subject: four new settings; relight: one scene in four lights; both: two to one"
    add("--family", choices=["both", "subject", "relight"], default="both", help=text)
    listed = parser.add_mutually_exclusive_group()
    listed.add_argument("--prompts", help=f"text file of lines: {LINE}")
    listed.add_argument("--llm", help="chat model (folder or hub name) that invents the prompts")
    add("--batch_size", type=whole, default=1, help="grids drawn together; for speed and memory")
    add("--steps", type=whole, default=28, help="Euler steps of the sampler")
    add("--panel", type=whole, default=512, help="side of a square panel in pixels")
    add("--width", type=whole, help="width of a panel that is not square")
    add("--height", type=whole, help="height of a panel that is not square")
    add("--guidance_scale", type=real, default=3.5, help="distilled guidance, if the model has it")
    add("--true_cfg_scale", type=at_least(1, float), default=1.0, help="prompt guidance; 1 is off")
    add("--negative", action=argparse.BooleanOptionalAction, default=False, help="see above")
    add("--seed", type=at_least(0), default=0, help="random seed of prompts and noise")
    add("--offload", choices=["none", "model"], default="none", help="model: idle parts wait")
    lines = {"count": None} if parser.peek("prompts") else {}  # all lines of the file
    args = parser.parse("generate_grids", **lines)
    args.width, args.height = args.width or args.panel, args.height or args.panel
    return args


def main():
    args = parse_args()
    dsd.check_model(args.model, args.width, args.height)
    grammar = read_grammar(args)
    listed = file_prompts(args.prompts, grammar) if args.prompts else None
    lock = dsd.open_out(
        args,
        "generate_grids",
        changeable=["count", "batch_size", "offload"],
        prompts=listed and dsd.digest(text=json.dumps(listed)),
        grammar=dsd.digest(text=json.dumps(grammar)),
    )
    grids = plan(args, grammar, listed)  # before the pipeline: a chat model needs the memory
    pipe = dsd.load_pipeline(FluxPipeline, args.model, args.quantize, args.offload)
    dsd.warn_of_prompts(pipe, [g["prompt"] for g in grids] + negative_prompts(grids, args))
    if PartialState().is_main_process:
        dsd.write_json(args.out / "grids.jsonl", grids)
    for batch in dsd.batches(grids, args.batch_size, "grids"):
        missing = [not (args.out / grid["file"]).exists() for grid in batch]
        if any(missing):  # with a larger --count a batch may begin with grids that are there
            for grid, image, new in zip(batch, draw_grids(pipe, batch, args), missing):
                if new:
                    dsd.save_image(image, args.out / grid["file"])
    if PartialState().is_main_process:
        overview = args.out / "overview.png"
        cells = [(dsd.open_image(args.out / grid["file"]), grid["subject"]) for grid in grids[:36]]
        dsd.contact_sheet([cells[i : i + 6] for i in range(0, len(cells), 6)], overview)
        print(f"{len(grids)} grids in {args.out}; look at {overview}")
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
