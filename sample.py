"""Step 4 (paper section 3.3): zero-shot sampling. A reference and a prompt give the same subject in a new setting.

    python sample.py                                         # the miniature's own references and prompts: seconds
    python sample.py --image my_critter.png --prompt "a round horned critter in space at noon"
    python sample.py --image a.png b.png --prompt "..." "..." --seed 0 1 2 --image_guidance 1.5 --text_guidance 2
    python sample.py --model black-forest-labs/FLUX.1-dev --adapter FOLDER --image photo.jpg --prompt "..."

Nothing is tuned here. Every image is combined with every prompt and every seed. `{name}` in a prompt stands for the
image's file name ("a {name} in space"). Images are cropped at the centre, or padded (--fit), to the right proportions.
Adapters: what finetune.py wrote, or the authors' released folder. Without --adapter: the one in runs/adapter, finished
or not, else the one shipped with the model. An adapter sets its own picture size and guidance; flags override them.

Writes to --out: a PNG for each picture, with its settings in the PNG's text fields, and `contact_sheet.png` with the
references on the left. Started again, the same command draws only what is missing.
"""

import dsd

import itertools
import json
from pathlib import Path

from accelerate import PartialState
from diffusers import FluxControlPipeline
from PIL.PngImagePlugin import PngInfo

import curate

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


# ---- references and prompts ------------------------------------------------------------------------------------------
def find_adapter(model):
    """The adapter for a model: this project's own run, else the one shipped with the model."""
    own = Path("runs/adapter")
    if (own / dsd.ADAPTER_FILE).exists():
        if dsd.read_json(own / "settings.json").get("model") == dsd.name_of(model):
            return own
    shipped = dsd.folder_settings(model, "sample").get("shipped_adapter")
    return Path(model) / shipped if shipped else None


def find_references(args):
    """The reference pictures, {file: image of the size that is drawn}. A folder stands for the pictures in it."""
    own = dsd.folder_settings(args.model, "sample").get("references")
    given = args.image or ([Path(args.model) / own] if own else [])
    files = []
    for path in given:
        inside = [
            file
            for file in sorted(path.glob("*"))
            if file.suffix.lower() in SUFFIXES and file.name[0] != "."
        ]
        files += inside if path.is_dir() else [path]
    if not files:
        raise dsd.DsdError("no reference picture: give --image FILE")
    return {
        file.as_posix(): dsd.fit_image(dsd.open_image(file), args.width, args.height, args.fit)
        for file in files
    }


def enhance(args, references):
    """What a vision-language model sees in each reference, {file: details}, to complete the prompts (R)."""
    path, model = args.out / "details.json", None
    seen = dsd.read_json(path)
    for file in references:
        if file not in seen:
            model = model or curate.load_vlm(args.enhance, args.quantize)
            (answer,) = curate.ask(
                *model,
                [[references[file]]],
                curate.DETAILS_QUESTION,
                batch_size=1,
                max_new_tokens=40,
            )
            seen[file] = answer.removesuffix(curate.TRUNCATED).strip()
            dsd.write_json(path, seen)
        print(f"{file}: {seen[file]}")
    return seen


# ---- drawing ---------------------------------------------------------------------------------------------------------
def draw_pictures(pipe, images, prompts, seeds, args, frames=2):
    """Draw B pictures: the subject of each reference image as its prompt says.

    frames: 2, or what the adapter's facts say."""
    text, null_text = dsd.encode_prompts(pipe, prompts), dsd.encode_prompts(pipe, [""])
    return dsd.sample_edit(
        pipe,
        dsd.to_pixels(images),
        text,
        null_text,
        seeds,
        args.steps,
        args.image_guidance,
        args.text_guidance,
        args.guidance_scale,
        args.unguided_steps,
        frames,
    )


def save_with_settings(image, path, case, args):
    """A PNG that carries its own settings: `json.loads(Image.open(path).text["dsd"])`."""
    options = {
        name: getattr(args, name)
        for name in (
            "steps",
            "image_guidance",
            "text_guidance",
            "guidance_scale",
            "unguided_steps",
            "fit",
            "quantize",
        )
    }
    names = {"image": case["image"], "model": args.model, "adapter": args.adapter}
    told = {**case, **options, **{key: dsd.name_of(value) for key, value in names.items()}}
    info = PngInfo()
    info.add_itxt(
        "dsd", json.dumps(told, ensure_ascii=False).encode(errors="backslashreplace").decode()
    )
    dsd.save_image(image, path, pnginfo=info)


def add_drawing_options(parser):
    """What decides how a picture is drawn; evaluate.py has these options as well."""
    add, amount = parser.add_argument, dsd.at_least(0, float)
    add("--width", type=dsd.at_least(1), default=512, help="width of the picture in pixels")
    add("--height", type=dsd.at_least(1), default=512, help="height of the picture in pixels")
    add("--steps", type=dsd.at_least(1), default=28, help="Euler steps")
    add(
        "--image_guidance",
        type=amount,
        default=1.0,
        help="s_i: how strongly to follow the reference; 1 is off",
    )
    add(
        "--text_guidance",
        type=amount,
        default=1.0,
        help="s_t: how strongly to follow the prompt; 1 is off",
    )
    add(
        "--guidance_scale",
        type=amount,
        default=3.5,
        help="distilled guidance, for models that have it",
    )
    add(
        "--unguided_steps",
        type=dsd.at_least(0),
        default=2,
        help="first steps without image and text guidance",
    )
    add(
        "--batch_size",
        type=dsd.at_least(1),
        default=1,
        help="pictures drawn together; affects speed and memory",
    )
    parser.add_large_model_options()


def parse_args():
    parser = dsd.Parser(__doc__, "runs/samples")
    add = parser.add_argument
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: a FLUX folder or hub name")
    add(
        "--adapter",
        type=Path,
        help="folder with pytorch_lora_weights.safetensors, that file, or hub name (see above)",
    )
    add(
        "--image",
        nargs="+",
        type=Path,
        help="reference pictures or folders of them (default: the model's own)",
    )
    add("--prompt", nargs="+", help="what to draw (default: the model's own)")
    add(
        "--enhance",
        metavar="VLM",
        help="a vision-language model completes the prompts with the references' details",
    )
    add(
        "--fit",
        choices=["crop", "pad"],
        default="crop",
        help="references of other proportions: crop, or add white",
    )
    add(
        "--seed",
        type=dsd.at_least(0),
        nargs="+",
        default=[0],
        help="seeds of the noise; each gives a picture",
    )
    add_drawing_options(parser)
    adapter = parser.peek("adapter") or find_adapter(parser.peek("model"))
    facts = dsd.adapter_facts(adapter) if adapter else {}
    wanted = "width", "height", "guidance_scale", "image_guidance", "text_guidance"
    own = {name: facts[name] for name in wanted if name in facts}
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
        image={file: dsd.digest(file) for file in references},
    )
    with PartialState().main_process_first():  # the others find what the --enhance model saw
        details = enhance(args, references) if args.enhance else {}
    pipe = dsd.load_pipeline(
        FluxControlPipeline,
        args.model,
        args.quantize,
        args.offload,
        args.adapter,
        facts["prompt_tokens"],
    )
    cases = [
        {
            "image": file,
            "prompt": prompt,
            "seed": seed,
            "text": ", ".join(
                filter(
                    None,
                    (
                        prompt.replace("{name}", Path(file).stem.replace("_", " ")),
                        details.get(file),
                    ),
                )
            ),
        }
        for file, prompt, seed in itertools.product(references, args.prompt, args.seed)
    ]
    paths = [args.out / f"{i:04d}.png" for i in range(len(cases))]
    dsd.warn_of_prompts(pipe, [case["text"] for case in cases])
    for batch in dsd.batches(list(zip(cases, paths)), args.batch_size, "sample"):
        if not all(path.exists() for _, path in batch):
            images, texts, seeds = zip(
                *[(references[c["image"]], c["text"], c["seed"]) for c, _ in batch]
            )
            drawn = draw_pictures(pipe, images, texts, seeds, args, facts["frames"])
            for image, (case, path) in zip(drawn, batch):
                save_with_settings(image, path, case, args)
    if dsd.is_main_process():
        rows = [
            [(image, "reference")]
            + [
                (dsd.open_image(path), case["text"])
                for path, case in zip(paths, cases)
                if case["image"] == file
            ]
            for file, image in references.items()
        ]
        dsd.contact_sheet(rows, args.out / "contact_sheet.png")
        print(
            f"{len(cases)} pictures in {args.out} with the adapter {dsd.name_of(args.adapter)}, "
            f"{dsd.memory_in_use()}; look at {args.out / 'contact_sheet.png'}"
        )
    lock.release()


if __name__ == "__main__":
    dsd.run_main(main)
