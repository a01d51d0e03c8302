"""Step 4 (paper section 3.3): zero-shot. A reference and a prompt give the same subject in a new setting.

    python sample.py                                        # the miniature's references and prompts: seconds, under 1 GB
    python sample.py --image my_critter.png --prompt "a round horned critter in space at noon"
    python sample.py --image a.png b.png --prompt "..." "..." --seed 0 1 2 --image_guidance 1.5 --text_guidance 2
    python sample.py --model black-forest-labs/FLUX.1-dev --adapter FOLDER --image photo.jpg --prompt "..."

No tuning happens here. Every image is combined with every prompt and every seed. `{name}` in a prompt stands
for the image's file name ("a {name} in space"). An image is cropped at its centre to the panel's proportions and resized
(FLUX: 512x512). Adapters: what finetune.py wrote, or the authors' released folder. Without --adapter: runs/adapter if
finetune.py has made one, else the one shipped with the model.

Writes to --out: a PNG an image, its settings in the PNG's text fields, `contact_sheet.png`, references on the left, and
with --enhance what the VLM saw, `details.jsonl`. Stopped and started again with the same command, it goes on with the
first missing batch.
"""

import json
from pathlib import Path

from diffusers import FluxControlPipeline
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import curate
import dsd

FILES = ["[0-9]*[0-9].png", "contact_sheet.png", "details.jsonl", "*.part"]  # what this script writes


def find_adapter(args, shipped):
    """The adapter's folder: as asked, else this project's own run, else the one that the model's folder names."""
    if args.adapter:
        return args.adapter
    own = Path("runs/adapter")
    if (own / dsd.ADAPTER_FILE).exists() and (own / "settings.json").exists():
        if dsd.read_json(own / "settings.json").get("model") == dsd.name_of(args.model):
            return own
    if not shipped:
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


def enhance(vlm, references, prompts, path, quantize="none"):
    """Prompts completed with what a vision-language model sees in each reference: {(file, prompt): longer prompt}.

    What it sees is kept in `path`, so that a run that goes on does not look again."""
    seen = {record["image"]: record["details"] for record in dsd.read_records(path, image=str, details=str)}
    waiting = [file for file in references if file not in seen]
    model = curate.load_vlm(vlm, quantize) if waiting else None
    for file in waiting:
        seen[file], = curate.ask(*model, [[references[file]]], curate.DETAILS_QUESTION, batch_size=1, max_new_tokens=40)
        dsd.append_records(path, [{"image": file, "details": seen[file]}])
    for file in references:
        print(f"{file}: {seen[file]}")
    return {(file, p): f"{name_subject(p, file)}, {seen[file]}" for file in references for p in prompts}


def name_subject(prompt, file):
    """`{name}` in a prompt stands for what the reference's file is called: "fluffy owl.png" -> "fluffy owl"."""
    return prompt.replace("{name}", Path(file).stem.replace("_", " "))


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
    dsd.save_image(image, path, pnginfo=info)


def parse_args():
    parser = dsd.Parser(__doc__, "runs/samples", "model", "quantize", "offload")
    add, setting = parser.add_argument, parser.setting
    add("--image", nargs="+", type=Path, help="reference pictures (default: the model's own)")
    add("--prompt", nargs="+", help="what to draw (default: the model's own)")
    add("--adapter", type=Path, help="folder with pytorch_lora_weights.safetensors (default: see above)")
    setting("steps", 28, "Euler steps")
    setting("image_guidance", 1.0, "s_i: how strongly to follow the reference; 1 costs no extra pass")
    setting("text_guidance", 1.0, "s_t: how strongly to follow the prompt; 1 costs no extra pass")
    setting("guidance_scale", 3.5, "distilled guidance, for models that have it")
    setting("unguided_steps", 2, "first steps without image and text guidance")
    setting("width", 512, "of the picture, in pixels")
    setting("height", 512, "of the picture, in pixels")
    setting("batch_size", 1, "pictures drawn together; changes speed and memory, not the pictures")
    setting("seed", [0], "one or more", nargs="+")
    add("--enhance", metavar="VLM", help="vision-language model (folder or hub name) that completes the prompt with the "
                                         "reference's details")
    args = parser.parse_args()
    settings = dsd.model_settings(args.model, "sample", args, **parser.defaults)
    shipped = dsd.model_settings(args.model, "sample", args, prompts=[""], references="", shipped_adapter="")
    return args, settings, shipped


def main():
    args, settings, shipped = parse_args()
    dsd.check_machine(args, ["transformer", "text encoders"], args.enhance)
    dsd.check_model(args.model, width=settings["width"], height=settings["height"])
    prompts = [dsd.check_text(prompt, "--prompt") for prompt in args.prompt or shipped["prompts"]]
    references = {str(file): dsd.fit_panel(dsd.open_image(file), settings["width"], settings["height"])
                  for file in find_references(args, shipped["references"])}
    adapter, size, seeds = find_adapter(args, shipped["shipped_adapter"]), settings.pop("batch_size"), settings.pop("seed")
    names = {"model": dsd.name_of(args.model), "adapter": dsd.name_of(adapter)}
    state = dsd.processes()
    with state.main_process_first():  # the others find the folder made, and what a --enhance model saw in it
        dsd.open_out(args.out, {
            "step": "sample", **names, "adapter_sha256": dsd.file_digest(dsd.adapter_file(adapter)), "prompts": prompts,
            "images": {file: dsd.file_digest(file) for file in references}, "seeds": seeds, "enhance": args.enhance,
            "quantize": args.quantize, **settings}, FILES, args.overwrite)
        texts = enhance(args.enhance, references, prompts, args.out / "details.jsonl", args.quantize) if args.enhance else {}
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, args.quantize, args.offload)
    dsd.load_adapter(pipe, adapter)
    cases = [{"image": file, "prompt": p, "text": texts.get((file, p)) or name_subject(p, file), "seed": seed, **names}
             for file in references for p in prompts for seed in seeds]
    if state.is_main_process:
        dsd.warn_of_prompts(pipe, [case["text"] for case in cases])

    paths = [args.out / f"{i:04d}.png" for i in range(len(cases))]
    parts = [slice(i, i + size) for i in range(0, len(cases), size)][state.process_index::state.num_processes]
    for part in tqdm(parts, desc="sample", unit="batch", disable=not state.is_main_process):
        if not all(path.exists() for path in paths[part]):  # the same batches after an interruption
            for image, path, case in zip(draw_batch(pipe, cases[part], references, settings), paths[part], cases[part]):
                save(image, path, case, settings)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    rows = [[(image, "reference")] + [(dsd.open_image(path), f"{case['text']} (seed {case['seed']})")
                                      for path, case in zip(paths, cases) if case["image"] == file]
            for file, image in references.items()]
    dsd.contact_sheet(rows, args.out / "contact_sheet.png")
    print(f"{len(cases)} pictures in {args.out} with the adapter {names['adapter']}, peak memory {dsd.peak_memory():.1f} GB; "
          f"look at {args.out / 'contact_sheet.png'}")


if __name__ == "__main__":
    dsd.run(main)
