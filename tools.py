"""What every script needs and no paper mentions: options, errors, processes, files and pictures.

`dsd` brings all of it, so that a script imports one module."""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import sys
import textwrap
import warnings
from pathlib import Path

import numpy
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import SafetensorError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

warnings.simplefilter("ignore", Image.DecompressionBombWarning)
Image.MAX_IMAGE_PIXELS = 2**27  # an error above twice as many; a camera has 200 million
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; node editors write whole graphs into their PNGs


# ---- options -----------------------------------------------------------------------------------
class DsdError(Exception):
    """A user's mistake: one line that says what is wrong and what to do."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of a script's docstring, and names an option's default if any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Plain argparse, with what all scripts share."""

    def __init__(self, doc, out):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        self.add_argument("--out", type=Path, default=Path(out), help="folder for the results")
        self.add_argument("--device", choices=devices, default=devices[-1], help="where to compute")

    def error(self, message):
        raise DsdError(f"{message}; --help explains the options")

    def add_large_model_options(self, offload=True):
        text = "nf4: weights of 4 bits; needs bitsandbytes and a CUDA GPU"
        self.add_argument("--quantize", choices=["none", "nf4"], default="none", help=text)
        if offload:
            text = "what waits in main memory: whole models, or (slower, smaller) single layers"
            ways = ["none", "model", "sequential"]
            self.add_argument("--offload", choices=ways, default="none", help=text)

    def peek(self, name):
        """The value of --name on the command line, on which the defaults of others depend."""
        words = [part for word in sys.argv for part in word.split("=", 1)]
        value = self.get_default(name)
        for word, following in itertools.pairwise([*words, None]):
            value = following if word == f"--{name}" else value
        return value

    def parse(self, script, folder="model", **more):
        """The options. Defaults, the strongest last: those in the code, those for this script in
        the dsd.json of --model (or of another option that names a folder), and `more`."""
        defaults = folder_settings(self.peek(folder), script) | more
        for action in self._actions:  # checked as if they were typed
            if action.dest in defaults:
                value = defaults[action.dest]
                with explained(f"--{action.dest} {value}, in dsd.json or the adapter"):
                    typed = action.type and not action.nargs and value is not None
                    action.default = action.type(value) if typed else value
        args = self.parse_args()
        large = getattr(args, "quantize", "none"), getattr(args, "offload", "none")
        if args.device == "cpu" and large != ("none", "none"):
            raise DsdError("--quantize and --offload need a CUDA GPU")
        if large == ("nf4", "sequential"):
            raise DsdError("--quantize nf4 goes with --offload model, but not with sequential")
        if "nf4" in large and not importlib.util.find_spec("bitsandbytes"):
            raise DsdError("--quantize nf4: pip install -c requirements.txt bitsandbytes")
        with explained("RANK, WORLD_SIZE and so on are set: use accelerate launch, or unset them"):
            PartialState(cpu=args.device == "cpu")  # PartialState() reports this device from now on
        return args


def folder_settings(model, script=None):
    """What a model's folder says in its dsd.json, {} if it says nothing: all, or for one script."""
    file = Path(model or "") / "dsd.json"
    settings = read_json(file) if model else {}
    with explained(f'{file}: "{script}" must hold values of options; restore the folder'):
        return dict(settings.get(script, {})) if script else settings


def at_least(low, number=int):
    """A type for argparse: a number from `low` up, and below 2**31, which keeps out infinity."""

    def check(text):
        if not low <= number(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low} and below 2**31")
        return number(text)

    check.__name__ = {int: "whole number", float: "number"}[number]  # for argparse's message
    return check


# ---- errors, processes, files ------------------------------------------------------------------
def run_main(main):
    """Run a script's main; a user's mistake becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a name shows its code
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from what is saved")
    except DsdError as error:
        line = str(error)
    except OSError as error:  # no permission, a file where a folder should be, a full disk
        line = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:  # torch's allocators raise RuntimeError
        known = "out of memory" in str(error) or "can't allocate memory" in str(error)
        if not known and not isinstance(error, MemoryError):
            raise
        line = "out of memory; take a smaller --batch_size or picture, --quantize nf4, --offload, "
        line += f"or, in training, --gradient_checkpointing ({error})"
    print("\nerror: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def explained(message, *errors):
    """Turn any error inside, or one of `errors`, into a DsdError with this message."""
    caught = errors or Exception  # damaged files raise all kinds of errors
    try:
        yield
    except DsdError:
        raise
    except caught as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DsdError(f"{message} ({reason})") from error


def is_main_process():
    """Whether this process prints and writes what belongs to all of them (several GPUs)."""
    return PartialState().is_main_process


def batches(items, size, name):
    """This process's batches of some items, with a progress bar; waits for the others at the end.
    What is done already does not change the batches: a resumed run computes the same ones."""
    state = PartialState()
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    mine = parts[state.process_index :: state.num_processes]
    yield from tqdm(mine, name, unit="batch", disable=not state.is_main_process)
    state.wait_for_everyone()


def open_out(args, script, changeable, **more):
    """Make the folder --out for one run and lock it. Returns the lock: the caller holds it.

    A run is identified by its options, except the `changeable` ones, which may differ from one
    start to the next, and by `more`. They are kept in settings.json: the same run goes on, and
    another one is refused, like a folder in use. Of several processes the main one does this."""
    lock, file = FileLock(args.out / ".lock"), args.out / "settings.json"
    run = {"step": script, **vars(args), **more}
    run = {name: run[name] for name in run if name not in ("out", "device", *changeable)}
    for name in {"model", "vlm", "llm", "adapter"} & run.keys():
        run[name] = run[name] and name_of(run[name])
    run = json.loads(json.dumps(run))  # in the file's form: tuples become lists
    with PartialState().main_process_first():  # nobody writes before the folder is accepted
        if not is_main_process():
            return lock
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise DsdError(f"{args.out} is in use by another process; give another --out") from None
        except OSError as error:  # some file systems have no locks
            raise DsdError(f"cannot lock {lock.lock_file} ({error}); give another --out") from None
        before = read_json(file)
        own = (".lock", file.name, f"{file.name}.part")
        found = [path.name for path in args.out.iterdir() if path.name not in own]
        if found and before != run:
            if before:
                name = [name for name in before | run if before.get(name) != run.get(name)][0]
                found = [f"its {name} was {str(before.get(name))[:60]}"]
            what = f"holds another run or other files ({min(found)})"
            raise DsdError(f"{args.out} {what}; delete it or give another --out")
        write_json(file, run)
    return lock


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as part:` fill the file `part`, which then replaces `path`: so that it is
    whole or absent."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    full = OSError, SafetensorError, RuntimeError  # the last is torch.save's
    try:
        with explained(f"cannot write {path}; make room or give another --out", *full):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file; in a file named *.jsonl each item of a list gets a line of its own."""
    items, indent = (value, None) if Path(path).suffix == ".jsonl" else ([value], 2)
    lines = [json.dumps(item, indent=indent, ensure_ascii=False) + "\n" for item in items]
    with writing(path) as part:
        part.write_bytes("".join(lines).encode(errors="backslashreplace"))


def read_json(path):
    """The object in a JSON file, {} if there is no file."""
    with explained(f"{path}: not a JSON file of this project; restore or delete it"):
        return dict(json.loads(Path(path).read_bytes())) if Path(path).exists() else {}


def read_records(path, *texts):
    """The objects in a file of JSON lines. texts: the fields that each must have, as text."""
    with explained(f"{path}: give a UTF-8 file", UnicodeError):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        with explained(f"{path}, line {number}: not a record; correct it or make it again"):
            if line.strip():
                records.append(dict(json.loads(line)))
                if not all(isinstance(records[-1][name], str) for name in texts):
                    raise ValueError(f"it needs {' and '.join(texts)}, as text")
    return records


def name_of(path):
    """How records name a model or a file: from this project or the working folder on if inside one
    of them, else in full; what is not here (but on the hub) as it is given."""
    whole = Path(path).resolve()
    for root in (ROOT, Path.cwd()):
        if whole.exists() and whole.is_relative_to(root):
            return whole.relative_to(root).as_posix()
    return (whole if whole.exists() else Path(path)).as_posix()


def digest(*files, text=""):
    """The first 16 hexadecimal digits of the SHA-256 of some files' contents, and of a text."""
    parts = [hashlib.sha256(Path(file).read_bytes()).digest() for file in files]
    parts.append(text.encode(errors="backslashreplace"))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


# ---- pictures ----------------------------------------------------------------------------------
def open_image(path):
    """A picture file as RGB: turned as EXIF says, transparency on white, 16 bits scaled to 8, the
    colours of its ICC profile as sRGB's."""
    with explained(f"{path}: not an image that can be read; give a PNG or JPEG file"):
        with Image.open(path) as image:
            image.verify()  # a PNG's checksums; it closes the file
        with Image.open(path) as image:
            profile = image.info.get("icc_profile")
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel")
            if image.mode.startswith("I;16"):
                image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != "CMYK":
                image = image.convert("RGB")
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # none, damaged, of other modes
                given = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, given, srgb, outputMode="RGB")
            return image.convert("RGB")


def fit_image(image, width, height, fit="crop"):
    """An image resized (bicubic: released code), cropped, or (fit="pad") with white added."""
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.BICUBIC, color="white")
    return ImageOps.fit(image, (width, height), Image.BICUBIC)


def save_image(image, path, **options):
    with writing(path) as part:
        image.save(part, format="PNG", **options)


def contact_sheet(rows, path, side=128):
    """Save rows of (image, caption) as one labelled picture; small images are enlarged."""
    widths = [side * image.width // image.height for row in rows for image, _ in row]
    width = max(60, *widths)  # room for a word; a letter is about 6 x 15 pixels
    cells = [[(image, textwrap.wrap(text, width // 6)) for image, text in row] for row in rows]
    heights = [side + 10 + 15 * max(len(lines) for _, lines in row) for row in cells]
    columns = max(len(row) for row in cells)
    sheet = Image.new("RGB", ((width + 6) * columns, sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for r, row in enumerate(cells):
        for c, (image, lines) in enumerate(row):
            x, y = (width + 6) * c + 6, sum(heights[:r]) + 6
            size = max(side * image.width // image.height, 1), side
            way = Image.NEAREST if image.height < side else Image.LANCZOS
            sheet.paste(image.resize(size, way), (x, y))
            draw.text((x, y + side), "\n".join(lines), fill="black", font=font)
    save_image(sheet, path)
