"""Step 4 (section 3.3): zero-shot sampling. A reference and a prompt give a subject a new setting.

    python sample.py                              # the miniature's own references: seconds
    python sample.py --image my_critter.png --prompt "a round horned critter in space at noon"
    python sample.py --image a.png b.png --prompt "..." "..." --seed 0 1 --image_guidance 1.5
    python sample.py --model black-forest-labs/FLUX.1-dev --adapter FOLDER --image photo.jpg \\
        --prompt "..."

Nothing is tuned here. Every image is combined with every prompt and every seed. `{name}` in a
prompt stands for the image's file name ("a {name} in space"). Images are cropped at the centre, or
padded (--fit), to the right proportions. Adapters: what finetune.py wrote, or the authors' released
folder. Without --adapter: the one in runs/adapter, finished or not, else the one shipped with the
model. An adapter sets its own picture size and guidance; flags override them.

Writes to --out: a PNG for each picture, with its settings in the PNG's text fields (--animate: also
a GIF of both frames after each step), and `contact_sheet.png` with the references on the left.
Started again, the same command draws only what is missing.
"""

import dsd

import itertools
import json
from pathlib import Path

from accelerate import PartialState
from diffusers import FluxControlPipeline
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import curate

SETTINGS = "steps", "image_guidance", "text_guidance", "guidance_scale", "unguided_steps"
OF_ADAPTERS = "width", "height", "guidance_scale", "image_guidance", "text_guidance"


# ---- references and prompts --------------------------------------------------------------------
def find_adapter(model):
    """The adapter for a model: this project's own run, else the one shipped with it, else None."""
    own, shipped = Path("runs/adapter"), dsd.folder_settings(model, "sample").get("shipped_adapter")
    trained_for = dsd.read_json(own / "settings.json").get("model")
    if (own / dsd.ADAPTER_FILE).exists() and trained_for == dsd.name_of(model):
        return own
    return Path(model) / shipped if shipped else None


def is_picture(file):
    """Whether a file has the ending of a picture that Pillow reads; hidden files are none."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    return kind in Image.OPEN and file.name[0] != "."


def find_references(args):
    """The reference pictures, {file: image of the size that is drawn}. A folder: those in it."""
    own = dsd.folder_settings(args.model, "sample").get("references")
    files = []
    for path in args.image or ([Path(args.model) / own] if own else []):
        files += filter(is_picture, sorted(path.glob("*"))) if path.is_dir() else [path]
    if not files:
        raise dsd.DsdError("no reference picture: give --image FILE")
    images = {}
    for file in files:
        image = dsd.open_image(file)
        images[file.as_posix()] = dsd.fit_image(image, args.width, args.height, args.fit)
    return images


def enhance(args, references):
    """What a vision-language model sees in each reference, {file: details}, to complete the prompts
    (released code). Of several processes the first asks, and the others read its answers."""
    path, model = args.out / "details.json", None
    with PartialState().main_process_first():
        seen = dsd.read_json(path)
        for file, image in references.items():
            if file not in seen:
                model = model or curate.load_vlm(args.enhance, args.quantize)
                question = [[image]], curate.DETAILS_QUESTION
                (answer,) = curate.ask(*model, *question, batch_size=1, max_new_tokens=40)
                seen[file] = answer
                dsd.write_json(path, seen)
            print(f"{file}: {seen[file]}")
    return seen


def all_cases(args, files, details):
    """What to draw, a list of records: every image with every prompt and every seed."""
    cases = []
    for file, prompt, seed in itertools.product(files, args.prompt, args.seed):
        text = prompt.replace("{name}", Path(file).stem.replace("_", " "))
        if details.get(file):
            text = f"{text}, {details[file]}"
        text = text.encode(errors="replace").decode()  # of a file's name that is not UTF-8
        cases.append({"image": file, "prompt": prompt, "seed": seed, "text": text})
    return cases


# ---- drawing -----------------------------------------------------------------------------------
def draw_pictures(pipe, images, prompts, seeds, args, facts, canvases=None):
    """Draw B pictures: the subject of each reference image as its prompt says.

    facts: of the adapter, "frames" and "clean_reference" (which is not the paper's way). canvases:
    see `dsd.sample_edit`."""
    way = facts["frames"], facts["clean_reference"], canvases
    text, null_text = dsd.encode_prompts(pipe, prompts), dsd.encode_prompts(pipe, [""])
    settings = [getattr(args, name) for name in SETTINGS]
    return dsd.sample_edit(pipe, dsd.to_pixels(images), text, null_text, seeds, *settings, *way)


def save_with_settings(image, path, case, args):
    """A PNG that carries its own settings: `json.loads(Image.open(path).text["dsd"])`."""
    about = case | {name: getattr(args, name) for name in (*SETTINGS, "fit", "quantize")}
    about["image"] = dsd.name_of(case["image"])
    about["model"] = dsd.name_of(args.model)
    about["adapter"] = dsd.name_of(args.adapter)
    text = json.dumps(about, ensure_ascii=False)
    info = PngInfo()
    info.add_itxt("dsd", text.encode(errors="backslashreplace").decode())
    dsd.save_image(image, path, pnginfo=info)


def save_animation(canvases, path):
    """A GIF of one picture being drawn: its canvas after each step, enlarged if it is small."""
    scale = max(1, 128 // canvases[0].height)
    first, *others = [ImageOps.scale(image, scale, Image.NEAREST) for image in canvases]
    shown = [100] * len(others) + [2000]  # milliseconds
    with dsd.writing(path) as part:
        first.save(part, "GIF", append_images=others, duration=shown, save_all=True, loop=0)


def draw_sheet(references, cases, paths, path):
    """The contact sheet: a row for each reference."""
    rows = {file: [(image, "reference")] for file, image in references.items()}
    for case, picture in zip(cases, paths):
        rows[case["image"]].append((dsd.open_image(picture), case["text"]))
    dsd.contact_sheet(list(rows.values()), path)


# ---- command line ------------------------------------------------------------------------------
def add_drawing_options(parser):
    """What decides how a picture is drawn; evaluate.py has these options as well."""
    add, amount, positive = parser.add_argument, dsd.at_least(0, float), dsd.at_least(1)
    add("--width", type=positive, default=512, help="width of the picture in pixels")
    add("--height", type=positive, default=512, help="height of the picture in pixels")
    add("--steps", type=positive, default=28, help="Euler steps")
    add("--image_guidance", type=amount, default=1.0, help="s_i, towards the reference; 1 is off")
    add("--text_guidance", type=amount, default=1.0, help="s_t, towards the prompt; 1 is off")
    add("--guidance_scale", type=amount, default=3.5, help="distilled, for models that have it")
    add("--unguided_steps", type=dsd.at_least(0), default=2, help="first steps without s_i and s_t")
    add("--batch_size", type=positive, default=1, help="drawn together; affects speed and memory")
    add("--offload", choices=["none", "model"], default="none", help="model: idle parts wait")


def parse_args():
    parser = dsd.Parser(__doc__, "runs/samples")
    add = parser.add_argument
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add("--adapter", type=Path, help=f"folder with {dsd.ADAPTER_FILE}, or that file")
    add("--image", nargs="+", type=Path, help="pictures or folders (default: the model's own)")
    add("--prompt", nargs="+", help="what to draw (default: the model's own)")
    text = "this model completes prompts with the references' details"
    add("--enhance", metavar="VLM", help=text)
    text = "other proportions: crop, or add white"
    add("--fit", choices=["crop", "pad"], default="crop", help=text)
    text = "of the noise; each draws once"
    add("--seed", type=dsd.at_least(0), nargs="+", default=[0], help=text)
    add("--animate", action="store_true", help="also a GIF of each picture: both frames, each step")
    add_drawing_options(parser)
    adapter = parser.peek("adapter") or find_adapter(parser.peek("model"))
    facts = dsd.adapter_facts(adapter) if adapter else {}
    own = {name: facts[name] for name in OF_ADAPTERS if name in facts}
    args = parser.parse("sample", adapter=adapter, **own)
    if not adapter:
        raise dsd.DsdError("no adapter: run finetune.py first, or give --adapter FOLDER")
    args.prompt = args.prompt or dsd.folder_settings(args.model, "sample").get("prompts")
    if not args.prompt or not all(prompt.strip() for prompt in args.prompt):
        raise dsd.DsdError("--prompt: empty; say what to draw")
    return args


def main():
    args = parse_args()
    dsd.check_model(args.model, args.width, args.height)
    references, facts = find_references(args), dsd.adapter_facts(args.adapter)
    lock = dsd.open_out(
        args,
        "sample",
        changeable=["batch_size", "offload"],
        adapter_sha256=dsd.digest(dsd.adapter_file(args.adapter)),
        image=[(dsd.name_of(file), dsd.digest(file)) for file in references],
    )
    details = enhance(args, references) if args.enhance else {}
    cases = all_cases(args, references, details)
    paths = [args.out / f"{i:04d}.png" for i in range(len(cases))]
    how = args.quantize, args.offload, args.adapter, facts["prompt_tokens"]
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, *how)
    dsd.warn_of_prompts(pipe, [case["text"] for case in cases])
    for batch in dsd.batches(list(zip(cases, paths)), args.batch_size, "sample"):
        if all(path.exists() for _, path in batch):
            continue
        images = [references[case["image"]] for case, _ in batch]
        texts = [case["text"] for case, _ in batch]
        seeds = [case["seed"] for case, _ in batch]
        canvases = [] if args.animate else None
        drawn = draw_pictures(pipe, images, texts, seeds, args, facts, canvases)
        if args.animate:
            for (_, path), steps in zip(batch, zip(*canvases)):
                save_animation(steps, path.with_suffix(".gif"))
        for (case, path), image in zip(batch, drawn):
            save_with_settings(image, path, case, args)
    if PartialState().is_main_process:
        sheet = args.out / "contact_sheet.png"
        draw_sheet(references, cases, paths, sheet)
        name = dsd.name_of(args.adapter)
        print(f"{len(cases)} pictures in {args.out} with the adapter {name}; look at {sheet}")
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
