"""Draws the pictures of the pages: `python -m miniature.figures world`, `result`, `agreement`.

world      a critter in all scenes, in lights, with accessories, in poses; and other critters
result     references, what prompts alone give, and the same prompts with the reference
agreement  grids from the same noise, without and with agreement guidance; the judge frames panels
           whose critter is not that of most panels

Each writes miniature/pictures/NAME.png, or into --out.
"""

import dsd

import argparse
import textwrap
from pathlib import Path

import torch
from diffusers import FluxControlPipeline, FluxPipeline
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import evaluate
import generate_grids
import sample
from miniature import exams, models, world

SETTINGS = ["jumping in the snow at noon", "in the city at noon with a hat"]
SETTINGS += ["upside down on the beach at noon"]


def show(figure, cells, image, title="", left=""):
    """One picture in a part of a figure, with a title above it and a word to its left."""
    axes = figure.add_subplot(cells)
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(left, fontsize=9)
    return axes


def save(figure, args):
    with dsd.writing(args.out / f"{args.figure}.png") as part:
        figure.savefig(part, format="png", dpi=90, bbox_inches="tight")


def draw_world(args):
    """Two rows of one critter, a row of others."""
    generator = torch.Generator().manual_seed(args.seed)
    critter, *others = world.identity_of(world.draw_identities(9, generator, held_out=True))
    scenes, poses = len(world.CONTEXT["scene"]), len(world.POSES)
    figure = Figure(figsize=(12, 5))
    grid = figure.add_gridspec(3, scenes, wspace=0.05, hspace=0.35)
    still = world.draw_poses(1, generator)[0]
    for k in range(scenes):
        name = world.CONTEXT["scene"][k].split()[-1]
        picture = exams.render(critter, torch.tensor([k, 0, 0]), still, 0, models.PANEL)
        show(figure, grid[0, k], picture, name)
        context = torch.tensor([6, k % 4, k // 2])
        picture = exams.render(critter, context, still, k % poses, models.PANEL)
        words = exams.context_words(context, k % poses)
        show(figure, grid[1, k], picture, f"{words['pose']},\n{words['light']}")
        picture = exams.render(others[k], torch.tensor([6, 0, 0]), still, 0, models.PANEL)
        show(figure, grid[2, k], picture)
    save(figure, args)


def draw_result(args):
    """References | what the prompts alone give | what the prompts give with the reference."""
    files = sorted((dsd.MINIATURE / "references").glob("*.png"))
    files = [files[k] for k in args.chosen]
    cases = []
    for file in files:
        for seed, setting in enumerate(SETTINGS):
            picture = {"image": dsd.open_image(file), "subject": file.stem, "sheet_prompt": ""}
            prompt = f"a {file.stem} {setting}"
            cases.append(exams.Case(0, prompt=prompt, seed=args.seed + seed, **picture))
    pipe = dsd.load_pipeline(FluxPipeline, args.model)
    alone = evaluate.teacher(pipe, cases, args)
    pipe = dsd.load_pipeline(FluxControlPipeline, args.model, adapter=args.adapter)
    edited = evaluate.zero_shot(pipe, cases, args)
    n = len(SETTINGS)
    figure = Figure(figsize=(13, 1.75 * len(files)))
    widths = [1, 0.25, *[1] * n, 0.25, *[1] * n]
    spaces = {"width_ratios": widths, "wspace": 0.06, "hspace": 0.1}
    grid = figure.add_gridspec(len(files), len(widths), **spaces)
    for row in range(len(files)):
        top = row == 0
        show(figure, grid[row, 0], cases[row * n].image, "reference" if top else "")
        for k, setting in enumerate(SETTINGS):
            title = textwrap.fill(setting.replace(" at noon", ""), 16) if top else ""
            show(figure, grid[row, 2 + k], alone[row * n + k], title)
            show(figure, grid[row, 3 + n + k], edited[row * n + k], title)
    for x, text in ((0.37, "prompt alone"), (0.75, "prompt and reference")):
        figure.text(x, 0.985, text, ha="center", fontsize=13, weight="bold")
    save(figure, args)


def draw_agreement(args):
    """The first grids of generate_grids.py's default run, each from one noise."""
    settings = argparse.Namespace(**dsd.folder_settings(args.model, "generate_grids"))
    settings.width = settings.height = settings.panel
    grids = []
    for seed in range(args.seed, args.seed + 6):
        grids.append(generate_grids.grammar_prompt(settings.grammar, ["subject"], seed))
        grids[-1]["seed"] = seed
    pipe = dsd.load_pipeline(FluxPipeline, args.model)
    judge = exams.Judge(dsd.MINIATURE / "judge")
    figure = Figure(figsize=(13, 4.7))
    cells = figure.add_gridspec(2, len(grids), wspace=0.08, hspace=0.08)
    for row, (strength, name) in enumerate(((0.0, "without"), (settings.agreement, "with"))):
        settings.agreement = strength
        for k, image in enumerate(generate_grids.draw_grids(pipe, grids, settings)):
            found = judge(dsd.cut_grid(image))
            seen = [list(words.values())[: world.N_IDENTITY] for words in found]
            most = max(seen, key=seen.count)
            axes = show(figure, cells[row, k], image, left=name if k == 0 else "")
            for panel in [number for number in range(4) if seen[number] != most]:
                corner = (panel % 2 * args.width, panel // 2 * args.height)
                size = args.width - 1, args.height - 1
                axes.add_patch(Rectangle(corner, *size, fill=False, color="red", linewidth=2))
    save(figure, args)


FIGURES = {"world": draw_world, "result": draw_result, "agreement": draw_agreement}


def main():
    parser = dsd.Parser(__doc__, dsd.MINIATURE / "pictures")
    add = parser.add_argument
    add("figure", choices=FIGURES)
    add("--model", default=dsd.MINIATURE / "flux", help="the teacher")
    add("--adapter", type=Path, default=dsd.MINIATURE / "adapter", help="result: DSD")
    about = "result: numbers of the pictures in miniature/references, in the order of their names"
    add("--chosen", type=int, nargs="+", default=[0, 2, 5, 7], help=about)
    add("--seed", type=int, default=0, help="of critters and noise")
    sample.add_drawing_options(parser)
    args = parser.parse("sample")
    with torch.inference_mode():
        FIGURES[args.figure](args)


if __name__ == "__main__":
    dsd.run_main(main)
