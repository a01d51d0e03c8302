"""Step 1 (paper section 3.1): the teacher draws grids that show one subject in four settings.

    python generate_grids.py                                       # the miniature: minutes on two CPU cores
    python generate_grids.py --model black-forest-labs/FLUX.1-dev  # one CUDA GPU
    python generate_grids.py --prompts my_prompts.txt --count 40
    python generate_grids.py --llm Qwen/Qwen2.5-7B-Instruct        # a chat model invents the subjects and the settings

The four panels of a grid are one image whose tokens attend to one another, so an unmodified text-to-image model draws
the same subject in all of them. Which panels really agree is the question of the next step, curate.py.

Writes to --out: a PNG for each grid, `grids.jsonl` (a line for each grid: file, prompt, subject, seed, ...) and
`overview.png`. Started again after an interruption, the same command draws only what is missing; with a larger --count
it adds grids to those that are there.
"""

import dsd

import json
import random
import re
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from diffusers import FluxPipeline

# The grammar for a model whose folder brings none (FLUX.1). A panel's prompt is one choice from each list.
GRAMMAR = {
    "subject": "a grid of 4 images representing the same {subject}: {panels}",
    "relight": "a grid of 4 images representing the same scene, {subject} {scene}, seen from the same place in "
    "different light: {panels}",
    "panels": ["top left {}", "top right {}", "bottom left {}", "bottom right {}"],
    "nouns": [
        ["small", "old", "cheerful", "fluffy", "striped", "wooden", "glass", "clockwork"],
        [
            "robot",
            "fox",
            "teapot",
            "backpack",
            "dragon",
            "owl",
            "sneaker",
            "cat",
            "toy car",
            "lantern",
            "rabbit",
            "astronaut doll",
            "guitar",
            "turtle",
            "armchair",
        ],
    ],
    "scenes": [
        "on a beach",
        "in a snowy forest",
        "on a kitchen table",
        "in a busy street",
        "in a flower meadow",
        "on a mountain top",
        "in a library",
        "by a camp fire",
        "in a desert",
        "on a boat",
    ],
    "extras": [
        "",
        "",
        "seen from the side",
        "in the rain",
        "next to a stack of books",
        "wrapped in a scarf",
    ],
    "lights": [
        "in morning light",
        "at sunset",
        "by moonlight",
        "under neon signs",
        "by candle light",
    ],
}
LLM_REQUEST = """Invent one clear subject (a character, an animal or an object) that could star in a picture book, and \
four different settings for it. For inspiration only, some captions of real pictures: {captions}
Answer with JSON only: {{"subject": "...", "settings": ["...", "...", "...", "..."]}}. The subject has at most 12 \
words and names no place; each setting has at most 15 words and does not repeat the subject."""
CAPTIONS = [
    "a brown dog asleep on a red sofa",
    "a vintage bicycle leaning on a wall",
    "a chef plating a dessert",
    "two kites over a windy beach",
    "a porcelain cup with a painted bird",
    "a fire engine outside a station",
    "an elderly violinist on a bridge",
    "a hiking boot on a mossy stone",
    "a parrot on a branch",
]


# ---- prompts ---------------------------------------------------------------------------------------------------------
def grid_prompt(grammar, family, subject, scene, phrases):
    """A grid's record from its parts. phrases: what the prompt says of each of the four panels, in reading order."""
    name = re.sub("^(an?|the) ", "", subject, flags=re.IGNORECASE)
    panels = ", ".join(place.format(phrase) for place, phrase in zip(grammar["panels"], phrases))
    prompt = grammar[family].format(
        subject=name if family == "subject" else subject, scene=scene, panels=panels
    )
    return {
        "prompt": prompt,
        "panel_prompts": [" ".join(filter(None, (subject, scene, p))) for p in phrases],
        "subject": name,
        "family": family,
    }


def grammar_prompt(grammar, families, seed):
    """One random grid of the grammar."""
    draw = random.Random(seed)
    family = draw.choice(families)
    noun = " ".join(draw.choice(words) for words in grammar["nouns"])
    subject = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    scene = " ".join(filter(None, (draw.choice(grammar["scenes"]), draw.choice(grammar["extras"]))))
    if family == "relight":  # one scene in four lights
        return grid_prompt(grammar, family, subject, scene, draw.sample(grammar["lights"], 4))
    phrases = [
        " ".join(filter(None, (draw.choice(grammar[k]) for k in ("scenes", "lights", "extras"))))
        for _ in range(4)
    ]
    return grid_prompt(grammar, family, subject, "", phrases)


def file_prompts(path, grammar):
    """Grids from a text file with lines "subject | setting | setting | setting | setting"; blank lines are skipped."""
    with dsd.explained(f"--prompts {path}: give a UTF-8 text file"):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    if not any(lines):
        raise dsd.DsdError(f"--prompts {path}: there is no prompt in it")
    grids = []
    for number, line in enumerate(lines, 1):
        subject, *phrases = [part.strip() for part in line.split("|")]
        if line and (len(phrases) != 4 or not all([subject, *phrases])):
            raise dsd.DsdError(
                f'{path}, line {number}: wanted "subject | setting | setting | setting | setting"'
            )
        if line:
            grids.append(grid_prompt(grammar, "subject", subject, "", phrases))
    return grids


# ---- prompts by a chat model -----------------------------------------------------------------------------------------
def parse_llm(answer):
    """The subject and four settings in a chat model's answer, or None if it is not usable."""
    try:
        found = json.loads(re.search(r"\{.*\}", answer, re.DOTALL).group())
        subject, phrases = (
            found["subject"].strip(),
            [phrase.strip() for phrase in found["settings"]],
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    good = (
        0 < len(subject.split()) <= 12
        and len(phrases) == 4
        and len({phrase.lower() for phrase in phrases}) == 4
    )
    return (
        (subject, phrases)
        if good and all(0 < len(phrase.split()) <= 15 for phrase in phrases)
        else None
    )


def ask_llm(model, tokenizer, number, seed):
    """The chat model's answer to request `number`. It depends on the number and the seed, not on earlier answers."""
    torch.manual_seed(seed * 1_000_003 + number)
    some = random.Random(seed * 1_000_003 + number).sample(CAPTIONS, 3)
    request = [{"role": "user", "content": LLM_REQUEST.format(captions="; ".join(some))}]
    inputs = tokenizer.apply_chat_template(
        request, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=1.0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def llm_prompts(args, grammar):
    """`args.count` grids of different subjects that a chat model invents. Every answer is kept in --out/subjects.

    The processes share the questions in rounds, so that none waits long for another."""
    state, model, grids, asked = PartialState(), None, {}, 0
    while len(grids) < args.count:
        if asked > 20 + 4 * len(grids):
            raise dsd.DsdError(
                f"--llm {args.llm}: only {len(grids)} of {asked} answers could be used; take a larger "
                "chat model, or --prompts"
            )
        files = [
            args.out / "subjects" / f"{n:06d}.json"
            for n in range(asked, asked + 8 * state.num_processes)
        ]
        for file in files[state.process_index :: state.num_processes]:
            if not file.exists():
                model = model or load_llm(args)
                dsd.write_json(file, {"answer": ask_llm(*model, int(file.stem), args.seed)})
        state.wait_for_everyone()
        for subject, phrases in filter(
            None, (parse_llm(dsd.read_json(file)["answer"]) for file in files)
        ):
            grids.setdefault(subject.lower(), grid_prompt(grammar, "subject", subject, "", phrases))
        asked += len(files)
    return list(grids.values())[: args.count]


def load_llm(args):
    """A chat model and its tokenizer."""
    dsd.check_here(args.llm)
    with dsd.explained(
        f"--llm {args.llm}: not a chat model that can be loaded"
    ):  # or one without a chat template
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.llm)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
        return dsd.load_language_model(
            transformers.AutoModelForCausalLM, args.llm, args.quantize
        ), tokenizer


def plan(args, grammar):
    """Every grid of this run in order, a list of records: what to draw, and with which seed."""
    seed = args.seed * 1_000_003  # far apart: no grid of one --seed is a grid of another
    families = ["subject", "subject", "relight"] if args.family == "both" else [args.family]
    listed = (
        file_prompts(args.prompts, grammar)
        if args.prompts
        else llm_prompts(args, grammar)
        if args.llm
        else None
    )
    return [
        {
            "file": f"{i:06d}.png",
            **(listed[i % len(listed)] if listed else grammar_prompt(grammar, families, seed + i)),
            "seed": seed + i,
            "rows": 2,
            "columns": 2,
        }
        for i in range(args.count or len(listed))
    ]


# ---- drawing ---------------------------------------------------------------------------------------------------------
def draw_grids(pipe, grids, args):
    """A batch of grids by the stock pipeline, each with its own generator: the batch size matters to rounding only."""
    pixels = pipe(
        [grid["prompt"] for grid in grids],
        negative_prompt=[""] * len(grids),
        true_cfg_scale=args.true_cfg_scale,
        guidance_scale=args.guidance_scale,
        width=2 * args.width,
        height=2 * args.height,
        num_inference_steps=args.steps,
        max_sequence_length=pipe.tokenizer_2.model_max_length,
        generator=[torch.Generator("cpu").manual_seed(grid["seed"]) for grid in grids],
        output_type="pt",
    ).images
    return dsd.to_images(pixels)  # (B, 3, 2 height, 2 width)


def parse_args():
    parser = dsd.Parser(__doc__, "runs/grids")
    add = parser.add_argument
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add(
        "--count",
        type=dsd.at_least(1),
        default=100,
        help="how many grids; with --prompts as many as are listed",
    )
    add(
        "--family",
        choices=["both", "subject", "relight"],
        default="both",
        help="subject: four new settings; relight: one scene in four lights; both: two to one",
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument(
        "--prompts", help="text file with lines: subject | setting | setting | setting | setting"
    )
    told.add_argument(
        "--llm", help="chat model (folder or hub name) that invents subjects and settings"
    )
    add(
        "--batch_size",
        type=dsd.at_least(1),
        default=1,
        help="grids drawn together; affects speed and memory",
    )
    add("--steps", type=dsd.at_least(1), default=28, help="Euler steps of the sampler")
    add("--panel", type=dsd.at_least(1), default=512, help="side of a square panel in pixels")
    add("--width", type=dsd.at_least(1), help="width of a panel that is not square")
    add("--height", type=dsd.at_least(1), help="height of a panel that is not square")
    add(
        "--guidance_scale",
        type=dsd.at_least(0, float),
        default=3.5,
        help="distilled guidance, if the model has it",
    )
    add(
        "--true_cfg_scale",
        type=dsd.at_least(1, float),
        default=1.0,
        help="prompt guidance by a second pass; 1 is off",
    )
    add("--seed", type=dsd.at_least(0), default=0, help="random seed of prompts and noise")
    parser.add_large_model_options()
    listed = {"count": None} if parser.peek("prompts") else {}  # all that are listed
    args = parser.parse("generate_grids", **listed)
    args.width, args.height = args.width or args.panel, args.height or args.panel
    return args


def main():
    args = parse_args()
    dsd.check_model(args.model, args.width, args.height)
    grammar = dsd.folder_settings(args.model, "generate_grids").get("grammar", GRAMMAR)
    lock = dsd.open_out(
        args,
        "generate_grids",
        changeable=["count", "batch_size", "offload"],
        prompts=args.prompts and dsd.digest(args.prompts),
        grammar=dsd.digest(text=json.dumps(grammar)),
    )
    grids = plan(args, grammar)  # before the pipeline is loaded: a chat model needs the memory
    if dsd.is_main_process():
        dsd.write_json(args.out / "grids.jsonl", grids)
    pipe = dsd.load_pipeline(FluxPipeline, args.model, args.quantize, args.offload)
    dsd.warn_of_prompts(pipe, [grid["prompt"] for grid in grids])
    for batch in dsd.batches(grids, args.batch_size, "grids"):
        if not all((args.out / grid["file"]).exists() for grid in batch):
            for grid, image in zip(batch, draw_grids(pipe, batch, args)):
                if not (
                    args.out / grid["file"]
                ).exists():  # with a larger --count a batch may begin with old grids
                    dsd.save_image(image, args.out / grid["file"])
    if dsd.is_main_process():
        cells = [(dsd.open_image(args.out / grid["file"]), grid["subject"]) for grid in grids[:36]]
        dsd.contact_sheet(
            [cells[i : i + 6] for i in range(0, len(cells), 6)], args.out / "overview.png"
        )
        print(
            f"{len(grids)} grids in {args.out}, {dsd.memory_in_use()}; look at {args.out / 'overview.png'}"
        )
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
