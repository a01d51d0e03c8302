"""Step 4 (paper section 3.3): zero-shot. A reference and a prompt give the same subject in a new setting.

    python sample.py                                        # the miniature's references and prompts: seconds
    python sample.py --image my_critter.png --prompt "a round horned critter in space at noon"
    python sample.py --image a.png b.png --prompt "..." "..." --seed 0 1 2 --image_guidance 1.5 --text_guidance 2
    python sample.py --model black-forest-labs/FLUX.1-dev --adapter FOLDER --image photo.jpg --prompt "..."

No tuning happens here. Every image is combined with every prompt and every seed. `{name}` in a prompt stands
for the image's file name ("a {name} in space"). An image is cropped at its centre to the panel's proportions and resized
(FLUX: 512x512). Adapters: what finetune.py wrote, or the authors' released folder. Without --adapter: runs/adapter if
finetune.py has made one, else the one shipped with the model.

Writes to --out: a PNG an image, its settings in the PNG's text fields, and `contact_sheet.png`, references on the left.
"""

import argparse
import json
from pathlib import Path

from diffusers import FluxControlPipeline
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import curate
import dsd


def find_adapter(args, shipped):
    """The adapter's folder: as asked, else this project's own run, else the one that the model's folder names."""
    if args.adapter:
        return args.adapter
    own = Path("runs/adapter")
    if (own / dsd.ADAPTER_FILE).exists():
        if json.loads((own / "settings.json").read_text())["model"] == dsd.name_of(args.model):
            return own
    if shipped is None:
        raise dsd.DsdError("no adapter: run finetune.py first, or give --adapter FOLDER")
    return Path(args.model) / shipped


def find_references(args, shipped):
    """The reference files: as asked, else those that the model's folder names."""
    if args.image:
        return args.image
    files = sorted((Path(args.model) / shipped).glob("*.png")) if shipped else []
    if not files:
        raise dsd.DsdError("give a reference: --image FILE")
    return files


def enhance(vlm, references, prompts):
    """Prompts completed with what a vision-language model sees in the reference: {(file, prompt): longer prompt}."""
    model, processor = curate.load_vlm(vlm)
    details = curate.ask(model, processor, [[image] for image in references.values()], curate.DETAILS_QUESTION,
                         batch_size=8, max_new_tokens=40)
    for file, seen in zip(references, details):
        print(f"{file}: {seen}")
    return {(file, p): f"{name_subject(p, file)}, {seen}" for file, seen in zip(references, details) for p in prompts}


def name_subject(prompt, file):
    """`{name}` in a prompt stands for what the reference's file is called: "fluffy owl.png" -> "fluffy owl"."""
    return prompt.replace("{name}", Path(file).stem.replace("_", " "))


def check_length(pipe, prompts):
    """Warn of what FLUX's encoder will not read of a prompt: nothing is cut silently."""
    limit = dsd.prompt_tokens(pipe)
    for prompt in prompts:
        ids = pipe.tokenizer_2(prompt).input_ids
        if len(ids) > limit:
            dropped = pipe.tokenizer_2.decode(ids[limit - 1:-1])
            print(f"warning: the prompt has more than {limit - 1} tokens; not read: \"{dropped}\"")


def draw_batch(pipe, batch, references, settings):
    """Images of a batch of cases (file, prompt, text, seed)."""
    prompts = [case["text"] for case in batch]
    text, null_text = (dsd.encode_prompts(pipe, p) for p in (prompts, [""] * len(prompts)))
    pixels = dsd.to_pixels([references[case["image"]] for case in batch]).to(pipe.device)
    return dsd.sample(pipe, pixels, text, null_text, [case["seed"] for case in batch], settings)


def save(image, path, case, settings):
    """A PNG that carries its own settings (`Image.open(path).text["dsd"]`)."""
    info = PngInfo()
    info.add_itxt("dsd", json.dumps({**case, "image": dsd.name_of(case["image"]), **settings}, ensure_ascii=False))
    image.save(path, pnginfo=info)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", nargs="+", type=Path, help="reference pictures (default: the model's own)")
    add("--prompt", nargs="+", help="what to draw (default: the model's own)")
    add("--adapter", type=Path, help="folder with pytorch_lora_weights.safetensors (default: see above)")
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher: FLUX folder or hub name (default: the miniature)")
    add("--out", type=Path, default="runs/samples", help="where the pictures go (default: %(default)s)")
    add("--image_guidance", type=float, help="s_i: how strongly to follow the reference; 1 costs no extra pass")
    add("--text_guidance", type=float, help="s_t: how strongly to follow the prompt; 1 costs no extra pass")
    add("--guidance_scale", type=float, help="distilled guidance, for models that have it")
    add("--unguided_steps", type=int, help="first steps without image and text guidance")
    add("--steps", type=int, help="Euler steps")
    add("--seed", nargs="+", type=int, default=[0], help="one or more")
    add("--width", type=int, help="of the picture, in pixels")
    add("--height", type=int, help="of the picture, in pixels")
    add("--batch_size", type=int, help="pictures drawn together; changes speed and memory, not the pictures")
    add("--enhance", metavar="VLM", help="vision-language model (folder or hub name) that completes the prompt with the "
                                         "reference's details")
    return parser.parse_args()


def main():
    args = parse_args()
    found = dsd.model_settings(args.model, "sample", args, steps=28, image_guidance=1.0, text_guidance=1.0,
                               guidance_scale=3.5, unguided_steps=2, width=512, height=512, batch_size=1,
                               prompts=None, references=None, shipped_adapter=None)
    shipped = {name: found.pop(name) for name in ("prompts", "references", "shipped_adapter")}
    prompts = args.prompt or shipped["prompts"]
    if not prompts:
        raise dsd.DsdError("give a prompt: --prompt \"...\"")
    if min(found[name] for name in ("steps", "batch_size", "width", "height")) < 1:
        raise dsd.DsdError("--steps, --batch_size, --width and --height must be at least 1")
    references = {str(file): dsd.fit_panel(dsd.open_image(file), found["width"], found["height"])
                  for file in find_references(args, shipped["references"])}
    texts = enhance(args.enhance, references, prompts) if args.enhance else {}
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model)
    unit = 2 * pipe.vae_scale_factor
    if found["width"] % unit or found["height"] % unit:
        raise dsd.DsdError(f"--width and --height must be multiples of {unit} for this model")
    adapter = find_adapter(args, shipped["shipped_adapter"])
    dsd.load_adapter(pipe, adapter)

    names = {"model": dsd.name_of(args.model), "adapter": dsd.name_of(adapter)}
    cases = [{"image": file, "prompt": p, "text": texts.get((file, p)) or name_subject(p, file), "seed": seed, **names}
             for file in references for p in prompts for seed in args.seed]
    check_length(pipe, dict.fromkeys(case["text"] for case in cases))
    args.out.mkdir(parents=True, exist_ok=True)
    size, images = found.pop("batch_size"), []
    for start in tqdm(range(0, len(cases), size), desc="sample"):
        images += draw_batch(pipe, cases[start:start + size], references, found)
    for i, (image, case) in enumerate(zip(images, cases)):
        save(image, args.out / f"{i:04d}.png", case, found)

    per_file = len(cases) // len(references)
    rows = [[(image, "reference")] + [(images[k], f"{cases[k]['text']} (seed {cases[k]['seed']})")
                                      for k in range(r * per_file, (r + 1) * per_file)]
            for r, image in enumerate(references.values())]
    dsd.contact_sheet(rows, args.out / "contact_sheet.png")
    print(f"{len(cases)} pictures in {args.out} with the adapter {names['adapter']}; "
          f"look at {args.out / 'contact_sheet.png'}")


if __name__ == "__main__":
    dsd.run(main)
