"""What the lessons share: where things are, how pictures are shown, and a look inside the models.

`import lesson` finds `dsd.py` and the miniature and changes into an empty temporary folder, so that
whatever a lesson draws or trains (`runs/...`) lands there and the repository stays as it is. The
folder is deleted with the kernel.
"""

import atexit
import importlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the lessons need no network

import dsd

import torch
from accelerate import PartialState
from diffusers.models.transformers import transformer_flux
from IPython.display import Image as Png
from IPython.display import Markdown, display
from matplotlib import pyplot
from PIL import Image

import curate
from miniature import world

PartialState(cpu=not torch.cuda.is_available())  # as in the scripts: a CUDA GPU, else the CPU
_folder = tempfile.TemporaryDirectory(prefix="lesson_")
atexit.register(_folder.cleanup)
os.chdir(_folder.name)

pyplot.rcParams.update(
    {"font.size": 14, "figure.dpi": 75, "axes.titlesize": 15, "image.interpolation": "nearest"}
)
ROOT = dsd.MINIATURE.parent
FLUX, VLM, ADAPTER = (dsd.MINIATURE / name for name in ("flux", "vlm", "adapter"))
PARTS = ["shape", "ears", "colour", "trim", "pattern", "eyes"]  # the VLM's words for them


# ---- a lesson's first cell, and its checks -----------------------------------------------------
def start(minutes):
    """Print where and in which number format this lesson computes, and how long its cells take."""
    device = PartialState().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    loaded = str(dsd.weight_dtype()).removeprefix("torch.")
    minutes = f"the cells take about {minutes} min on two CPU cores"
    print(f"device: {name}; models are loaded in {loaded}; {minutes}")


def answered(*answers):
    """Stop a check whose exercise still holds the dots of the blank."""
    assert not any(answer is ... for answer in answers), (
        "your turn: replace the dots in the exercise above"
    )


def returned(**results):
    """Stop a check whose function forgot to return: `returned(euler=what_it_returned)`."""
    for name, result in results.items():
        assert result is not None, f"{name} returns nothing: its last line is `return ...`"


# ---- the scripts -------------------------------------------------------------------------------
@contextmanager
def command_line(line):
    """The script that a command line names, as a module, with `sys.argv` as Python would set it."""
    name, *flags = shlex.split(line)
    before, sys.argv = sys.argv, [name, *flags]
    try:
        yield importlib.import_module(name.removesuffix(".py"))
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # an interrupted script lets go of its folder
        raise
    finally:
        sys.argv = before


def script(line):
    """`script("sample.py --seed 3")` does what `python sample.py --seed 3` does, in here."""
    with command_line(line) as module:
        module.main()


def options(line):
    """The options of a command line as its script sees them, for calling its functions."""
    with command_line(line) as module:
        return module.parse_args()


def transcripts(folder="runs/pairs"):
    """The transcripts that curate.py wrote, one record for each pair that it asked about."""
    files = sorted(Path(folder, "transcripts").glob("*.json"))
    return [
        record for file in files for record in json.loads(file.read_text(encoding="utf-8"))["pairs"]
    ]


# ---- pictures ----------------------------------------------------------------------------------
def picture(image, place=None):
    """Show a picture or a picture file, reduced to 256 colours to stay small.

    It replaces what is shown at `place`, if there is one."""
    image = image if isinstance(image, Image.Image) else Image.open(image)
    png = io.BytesIO()
    small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(png, format="png", optimize=True)
    shown = Png(png.getvalue())
    if place:
        place.update(shown)
    else:
        display(shown)


def show(figure, place=None):
    """Show a figure, whatever matplotlib's backend."""
    png = io.BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight")
    pyplot.close(figure)
    picture(Image.open(png), place)


def place():
    """An output area whose picture can be replaced while a cell runs."""
    return display(Markdown("..."), display_id=True)


def gallery(rows, columns=(), labels=(), title="", side=1.7, captions=None, place=None):
    """Show rows of images: `columns` are the titles above, `labels` stand left of the rows,
    `captions` below images."""

    def lines(texts):
        return max((str(text).count("\n") + 1 for text in texts), default=0)

    n, m = len(rows), max(len(row) for row in rows)
    longest = max((len(part) for label in labels for part in label.split("\n")), default=0)
    width = m * (side * rows[0][0].width / rows[0][0].height + 0.05) + 0.14 * longest
    below = sum(0.05 + 0.21 * lines(row) for row in captions or [])
    height = n * (side + 0.05) + below + 0.25 * lines(columns) + 0.35 * bool(title)
    figure, axes = pyplot.subplots(
        n, m, figsize=(width, height), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            axes[r, c].imshow(image)
            if captions:
                axes[r, c].set_xlabel(captions[r][c], fontsize=12)
    for c, text in enumerate(columns):
        axes[0, c].set_title(text, fontsize=13)
    for r, text in enumerate(labels):
        axes[r, 0].set_ylabel(text, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    show(figure, place)


def to_images(pixels):
    """(N, 3, H, W) in [0, 1], or a little outside -> N images."""
    return dsd.to_images(pixels.detach().float().cpu().clamp(0, 1))


def decode(pipe, tokens, h, w):
    """Packed latents (B, N, 64) of h x w latent pixels -> B images."""
    return to_images(dsd.decode(pipe.vae, tokens, h, w) / 2 + 0.5)


# ---- critters whose truth is known -------------------------------------------------------------
def critter(number, scene="in the meadow", accessory="", light="at noon", pose=""):
    """The rendered picture of identity `number`, and its attributes (6,). No pose: it stands."""
    context = []
    for values, word in zip(world.CONTEXT.values(), (scene, accessory, light)):
        known = ", ".join(filter(None, values))
        assert word in values, f"no {word!r} in this world; choose one of {known}"
        context.append(values.index(word))
    identity = world.identity_of([number])
    middle = torch.tensor([[0.0, 0.16, 1.16, 0.0]])
    stand = world.in_pose(middle, torch.tensor([list(world.POSES).index(pose)]))
    pixels = world.render(identity, torch.tensor([context]), stand)
    return to_images(pixels)[0], identity[0]


# ---- the vision-language model's comparison ----------------------------------------------------
def same_parts(answer):
    """An answer's line "compare" as {"shape": True, "ears": False, ...}; parts that it does not
    mention count as different."""
    line = re.search(r"^compare:(.*)$", answer, re.MULTILINE)
    found = dict(re.findall(r"(\w+) [^,]*?(same|different)", line.group(1))) if line else {}
    return {part: found.get(part) == "same" for part in PARTS}


def compare(vlm, pairs):
    """The answers to curate.py's question about pairs of images."""
    return curate.ask(*vlm, [list(pair) for pair in pairs], curate.PAIR_QUESTION, 64, 200)


# ---- attention ---------------------------------------------------------------------------------
@contextmanager
def attention_maps():
    """Inside `with attention_maps() as maps:` each attention layer of a FLUX transformer appends
    its map to `maps`.

    A map is (B, L, L), the mean over the heads: each row belongs to a query token and sums to 1,
    each column to a key token; text tokens come first. The map is computed from the queries and
    keys beside the fused attention, which does not return one."""
    fused, maps = transformer_flux.dispatch_attention_fn, []

    def recording(query, key, value, attn_mask=None, **rest):  # query, key (B, L, heads, D)
        scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float())
        scores = scores / query.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        maps.append(scores.softmax(-1).mean(1).detach().cpu())
        return fused(query, key, value, attn_mask=attn_mask, **rest)

    transformer_flux.dispatch_attention_fn = recording
    try:
        yield maps
    finally:
        transformer_flux.dispatch_attention_fn = fused


def heat(axis, image, weights, looking=None, top=None):
    """A heat map of `weights` (rows, columns of tokens) over a grey image, with a frame at the
    token `looking`.

    top: the weight that is shown in full red (default: the largest of this map)."""
    weights, top = weights.float().cpu(), float(top or weights.max())
    axis.imshow(image.convert("L"), cmap="gray", vmin=-120, vmax=300)
    shade = axis.imshow(
        weights,
        cmap="autumn_r",
        vmin=0,
        vmax=top,
        alpha=(0.9 * weights / top).clamp(0, 1),
        extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5),
    )
    if looking is not None:
        unit, (row, column) = image.width / weights.shape[1], looking
        corner = column * unit - 0.5, row * unit - 0.5
        axis.add_patch(pyplot.Rectangle(corner, unit, unit, fill=False, color="blue", lw=4))
    axis.set(xticks=[], yticks=[])
    pyplot.gcf().colorbar(
        pyplot.cm.ScalarMappable(shade.norm, shade.cmap), ax=axis, shrink=0.7, label="attention"
    )
