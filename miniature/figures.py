"""Draws the pictures of the pages: `python -m miniature.figures world`, `result`, `agreement`.

world      a critter in all scenes, in lights, with accessories, in poses; and other critters
result     references, what prompts alone give, and the same prompts with the reference
agreement  grids from the same noise, guided in three ways: against the empty prompt, beside that by
           agreement guidance, and against the opposite (generate_grids.py --negative). The judge
           frames panels whose critter is not that of most panels

Each writes miniature/pictures/NAME.png, or into --out.
"""

import dsd

import argparse
import math
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

SETTINGS = ["lying down in the snow at noon", "in the city at noon with a hat"]
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
    for x, text in ((0.37, "prompt alone (names shape and ears)"), (0.75, "prompt and reference")):
        figure.text(x, 0.985, text, ha="center", fontsize=13, weight="bold")
    save(figure, args)


# ---- three ways to guide a grid ------------------------------------------------------------------
def agreement_velocity(v_joint, v_null, v_alone, a, b):
    """v = v_joint + a (v_joint - v_null) + b (v_joint - v_alone): all (B, N, 64).

    The first term is classifier-free guidance against the empty prompt, a = true_cfg_scale - 1. The
    second is agreement guidance (ours, not the paper's). The panels of a grid agree because they
    attend to one another. In v_alone they cannot, since each is an image of its own with its own
    prompt. So it is classifier-free guidance too, with "the other panels" as the condition."""
    return v_joint + a * (v_joint - v_null) + b * (v_joint - v_alone)


def panel_prompts(grid):
    """A prompt for each panel of a grid of the family "subject", from the grid's own prompt."""
    _, panels = grid["prompt"].split(": ")
    settings = [panel.split(" ", 1)[1] for panel in panels.split(", ")]  # without "first"
    return [f"a {grid['subject']} {setting}" for setting in settings]


def cut_tokens(x):
    """Tokens (B, N, 64) of 2x2 square panels -> each panel as an image, (4 B, N / 4, 64)."""
    n = math.isqrt(x.shape[1]) // 2  # a panel is n x n tokens
    x = x.unflatten(1, (2, n, 2, n)).transpose(2, 3)  # (B, 2, 2, n, n, 64)
    return x.flatten(3, 4).flatten(0, 2)


def join_tokens(panels):
    """The inverse of `cut_tokens`."""
    n = math.isqrt(panels.shape[1])
    x = panels.unflatten(1, (n, n)).unflatten(0, (-1, 2, 2))  # (B, 2, 2, n, n, 64)
    return x.transpose(2, 3).flatten(1, 4)


@torch.no_grad()
def draw_agreeing_grids(pipe, grids, args, b=1.0):
    """Grids as generate_grids.py draws them, with agreement guidance of strength b: three passes
    for each step, where the stock pipeline has two."""
    side = args.panel // pipe.vae_scale_factor  # of a panel, in latent pixels
    alone = [prompt for grid in grids for prompt in panel_prompts(grid)]
    text = dsd.encode_prompts(pipe, [grid["prompt"] for grid in grids])
    null_text = dsd.encode_prompts(pipe, [""] * len(grids))
    alone_text = dsd.encode_prompts(pipe, alone, models.TOKENS[1, 1])
    generators = [torch.Generator().manual_seed(grid["seed"]) for grid in grids]
    size = 2 * args.panel, 2 * args.panel
    shape = len(grids), pipe.vae.config.latent_channels, *size
    x, _ = pipe.prepare_latents(*shape, text[0].dtype, text[0].device, generators)

    def predict(x, sigma, text, side):
        ids = dsd.position_ids(side, side).to(x)
        return dsd.run_transformer(
            pipe.transformer, x, sigma.expand(len(x)), text, ids, args.guidance_scale
        )

    for t in dsd.start_schedule(pipe, args.steps, tokens=x.shape[1]):  # t = 1000 sigma
        sigma = t.to(x.dtype) / 1000
        v_joint = predict(x, sigma, text, 2 * side)
        v_null = predict(x, sigma, null_text, 2 * side)
        v_alone = join_tokens(predict(cut_tokens(x), sigma, alone_text, side))
        v = agreement_velocity(v_joint, v_null, v_alone, args.true_cfg_scale - 1, b)
        x = pipe.scheduler.step(v, t, x, return_dict=False)[0]  # Euler: x + (sigma_next - sigma) v
    return dsd.decode_images(pipe, x, 2 * side, 2 * side)


def frame_odd_panels(axes, image, judge):
    """Red frames around the panels whose critter is not that of most panels."""
    panels = dsd.cut_grid(image)
    width, height = panels[0].size
    seen = [list(words.values())[: world.N_IDENTITY] for words in judge(panels)]
    most = max(seen, key=seen.count)
    for k, identity in enumerate(seen):
        if identity != most:
            corner = k % 2 * width, k // 2 * height
            frame = {"fill": False, "color": "red", "linewidth": 2}
            axes.add_patch(Rectangle(corner, width - 1, height - 1, **frame))


def draw_agreement(args, count=6):
    """The first grids of generate_grids.py's family "subject", each from one noise three times."""
    settings = argparse.Namespace(**dsd.folder_settings(args.model, "generate_grids"))
    settings.width = settings.height = settings.panel
    grids = []
    for seed in range(args.seed, args.seed + count):
        grid = generate_grids.grammar_prompt(settings.grammar, ["subject"], seed)
        grids.append(grid | {"seed": seed})
    pipe = dsd.load_pipeline(FluxPipeline, args.model)
    rows = {}
    settings.negative = False
    rows["against the\nempty prompt"] = generate_grids.draw_grids(pipe, grids, settings)
    rows["and against the\npanels alone"] = draw_agreeing_grids(pipe, grids, settings)
    settings.negative = True
    rows["against the\nopposite"] = generate_grids.draw_grids(pipe, grids, settings)
    judge = exams.Judge(dsd.MINIATURE / "judge")
    figure = Figure(figsize=(13, 6.7))
    cells = figure.add_gridspec(len(rows), count, wspace=0.08, hspace=0.08)
    for row, (name, images) in enumerate(rows.items()):
        for k, image in enumerate(images):
            axes = show(figure, cells[row, k], image, left=name if k == 0 else "")
            frame_odd_panels(axes, image, judge)
    save(figure, args)


# ---- command line --------------------------------------------------------------------------------
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
