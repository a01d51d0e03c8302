"""What the six lessons share: where things are, how pictures are shown, and a look inside the models.

`import lesson` finds `dsd.py` and the miniature, and moves into an empty temporary folder, so that `runs/...` is the
lesson's own and the repository stays as it is.
"""

import atexit
import importlib
import io
import os
import re
import shlex
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "miniature")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

import torch  # noqa: E402
from diffusers.models.transformers import transformer_flux  # noqa: E402
from IPython.display import Image as Png  # noqa: E402
from IPython.display import Markdown, display  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from PIL import Image  # noqa: E402

import curate  # noqa: E402
import dsd  # noqa: E402
import world  # noqa: E402

_folder = tempfile.TemporaryDirectory(prefix="lesson_")
atexit.register(_folder.cleanup)
os.chdir(_folder.name)

pyplot.rcParams.update({"font.size": 14, "figure.dpi": 75, "axes.titlesize": 15, "image.interpolation": "nearest"})
PARTS = ["shape", "ears", "colour", "tone", "trim", "pattern", "eyes"]  # the VLM's words for a critter


# ---- the scripts -----------------------------------------------------------------------------------------------------
def script(line):
    """`script("curate.py --limit 3")` does what `python curate.py --limit 3` does, without starting Python again."""
    name, *flags = shlex.split(line)
    before, sys.argv = sys.argv, [name, *flags]
    try:
        importlib.import_module(name.removesuffix(".py")).main()
    finally:
        sys.argv = before


# ---- pictures --------------------------------------------------------------------------------------------------------
def picture(image, place=None):
    """Show a picture or a picture file, in 256 colours to stay small; in a `place`, instead of what is there."""
    image = image if isinstance(image, Image.Image) else Image.open(image)
    png = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(png, format="png", optimize=True)
    place.update(Png(png.getvalue())) if place else display(Png(png.getvalue()))


def show(figure, place=None):
    """Show a figure, whatever matplotlib's backend."""
    png = io.BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight")
    pyplot.close(figure)
    picture(Image.open(png), place)


def place():
    """A place for pictures that change while something runs."""
    return display(Markdown("..."), display_id=True)


def gallery(rows, columns=(), labels=(), title="", side=1.7, captions=None, place=None):
    """Rows of images; `columns` are titles above, `labels` stand left of the rows, `captions` below each image."""
    def lines(texts):
        return max((str(text).count("\n") + 1 for text in texts), default=0)

    n, m = len(rows), max(len(row) for row in rows)
    longest = max((len(part) for label in labels for part in label.split("\n")), default=0)
    width = m * (side * rows[0][0].width / rows[0][0].height + 0.05) + 0.14 * longest
    below = sum(0.05 + 0.21 * lines(row) for row in captions or [])
    height = n * (side + 0.05) + below + 0.25 * lines(columns) + 0.35 * bool(title)
    figure, axes = pyplot.subplots(n, m, figsize=(width, height), squeeze=False, layout="constrained")
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
    """(N, 3, H, W) in [0, 1] -> N images."""
    raw = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(one.numpy()) for one in raw]


def decode(pipe, tokens, h, w):
    """Packed latents (B, N, 64) of h x w latent pixels -> B images."""
    latents = dsd.unpack(tokens, h, w) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        return to_images(pipe.vae.decode(latents.to(pipe.vae.dtype)).sample / 2 + 0.5)


# ---- critters whose truth is known -----------------------------------------------------------------------------------
def critter(number, scene="in the meadow", accessory="", light="at noon"):
    """The rendered picture of identity `number`, and its attributes (7,)."""
    context = [values.index(word) for values, word in zip(world.CONTEXT.values(), (scene, accessory, light))]
    identity = world.identity_of([number])
    pixels = world.render(identity, torch.tensor([context]), torch.tensor([[0., .16, 1.16, 0.]]))
    return to_images(pixels)[0], identity[0]


# ---- the vision-language model's comparison --------------------------------------------------------------------------
def same_parts(answer):
    """What the line "compare" says: {"shape": True, "ears": False, ...}. What it does not say counts as different."""
    line = re.search(r"^compare:(.*)$", answer, re.MULTILINE)
    found = dict(re.findall(r"(\w+) [^,]*?(same|different)", line.group(1))) if line else {}
    return {part: found.get(part) == "same" for part in PARTS}


def compare(vlm, pairs):
    """Asks curate.py's question about pairs of images; returns the answers."""
    return curate.ask(*vlm, [list(pair) for pair in pairs], curate.PAIR_QUESTION, 64, 200)


# ---- attention -------------------------------------------------------------------------------------------------------
@contextmanager
def attention_maps():
    """Inside `with attention_maps() as maps:` every attention of a FLUX transformer appends its map to `maps`.

    A map is (B, L, L), the mean over the heads: row = the token that looks, column = the token it looks at, text tokens
    first, each row sums to 1. It is computed a second time, in the open, from the queries and keys that the fused
    attention gets."""
    fused, maps = transformer_flux.dispatch_attention_fn, []

    def recording(query, key, value, attn_mask=None, **rest):  # query, key (B, L, heads, D)
        scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) / query.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        maps.append(scores.softmax(-1).mean(1).detach().cpu())
        return fused(query, key, value, attn_mask=attn_mask, **rest)

    transformer_flux.dispatch_attention_fn = recording
    try:
        yield maps
    finally:
        transformer_flux.dispatch_attention_fn = fused


def heat(axis, image, weights, looking=None):
    """A heat map of `weights` (rows, columns of tokens) over a grey image; `looking` (row, column) gets a frame."""
    weights = weights.float().cpu()
    axis.imshow(image.convert("L"), cmap="gray", vmin=-120, vmax=300)
    shade = axis.imshow(weights, cmap="autumn_r", vmin=0, alpha=0.9 * weights / weights.max(),
                        extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5))
    if looking is not None:
        unit, (row, column) = image.width / weights.shape[1], looking
        corner = column * unit - 0.5, row * unit - 0.5
        axis.add_patch(pyplot.Rectangle(corner, unit, unit, fill=False, color="blue", lw=4))
    axis.set(xticks=[], yticks=[])
    pyplot.gcf().colorbar(pyplot.cm.ScalarMappable(shade.norm, shade.cmap), ax=axis, shrink=0.7, label="attention")
