"""What a user gets wrong is answered with exit code 2 and one line that says what to do, never with
a traceback, and harms nothing that is there. What can be used is used correctly."""

import dsd

import argparse
import contextlib
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import (
    COUNTS,
    critter,
    give_random_weights,
    noise_image,
    random_transformer,
    run_script,
)
from diffusers.utils import make_image_grid
from PIL import Image, ImageCms, PngImagePlugin
from random_models import make_chat_model
from safetensors.torch import load, save

import curate
import finetune
import generate_grids
import sample

MODELS = "generate_grids finetune sample"  # the scripts that have a --model
TRACE = Path(tempfile.gettempdir()) / f"unpickled-{os.getpid()}"
BOMB = f"cos\nmkdir\n(S'{TRACE}'\ntR.".encode()  # a pickle: to load it makes this folder
ADAPTER = dsd.ADAPTER_FILE
LAYER = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
SCRIPTS = {
    "generate_grids": (generate_grids, "--model flux --count 1 --steps 1"),
    "curate": (curate, "--grids grids --vlm vlm"),
    "finetune": (finetune, "--model flux --pairs pairs --steps 1 --rank 2"),
    "sample": (sample, "--model flux --image good.png --prompt a --steps 1 --adapter adapter"),
}


def rows(table):
    """The rows of a table, one for each script that a row names."""
    return [(script, *row[1:]) for row in table for script in row[0].split()]


def records(*records):
    """A file of JSON lines, as bytes."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# ---- what the scripts are given ------------------------------------------------------------------
GRID = {"file": "000000.png", "prompt": "p", "subject": "s", "family": "subject"}
GRID |= {"rows": 2, "columns": 2}


def save_narrow_adapter(folder, rank=2):
    """An adapter for a smaller model than the miniature."""
    student = dsd.add_lora(dsd.widen(random_transformer()), rank)
    dsd.save_adapter(give_random_weights(student), folder, {"edition": 3})


@pytest.fixture(scope="module")
def given(tmp_path_factory, pairs):
    """A folder of things that can be used, and of a few that cannot, to which no test does harm."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("flux", "vlm", "adapter"):
        (folder / name).symlink_to(dsd.MINIATURE / name)
    (folder / "pairs").symlink_to(pairs)
    critter(7, [1, 0, 0]).save(folder / "good.png")
    dsd.write_json(folder / "grids" / "grids.jsonl", [GRID])
    grid = make_image_grid([critter(7, [i, 0, 0]) for i in range(4)], 2, 2)
    grid.save(folder / "grids" / "000000.png")

    (folder / "empty").mkdir()
    (folder / "text.png").write_bytes(b"no image")
    Image.new("F", (8, 8), 1e4).save(folder / "float.tiff")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 400 million pixels in 50 kilobytes
    (folder / "short.txt").write_text("a fox | in the snow | at noon\n")
    (folder / "blank.txt").write_text("\n \n\n")
    (folder / "utf-16.txt").write_text("a fox | a | b | c | d\n", encoding="utf-16")
    save_narrow_adapter(folder / "narrow")
    make_chat_model(folder / "chat", "a red fox")
    shutil.copytree(pairs, folder / "odd")
    for file in (folder / "odd" / "images").iterdir():
        critter(7, [1, 0, 0]).resize((36, 36)).save(file)
    pickled = dsd.MINIATURE / "flux", folder / "pickled model"
    shutil.copytree(*pickled, ignore=shutil.ignore_patterns("diffusion*.safetensors"))
    for part in ("transformer", "vae"):
        (folder / "pickled model" / part / "diffusion_pytorch_model.bin").write_bytes(BOMB)
    (folder / "pickled adapter").mkdir()
    (folder / "pickled adapter" / "pytorch_lora_weights.bin").write_bytes(BOMB)
    dsd.write_json(folder / "other run" / "settings.json", {"step": "sample", "seed": 77})
    (folder / "other run" / "a.png").touch()
    (folder / "unreadable run").mkdir()
    (folder / "unreadable run" / "settings.json").write_bytes(b'{"step": ')
    (folder / "unreadable run" / "a.png").touch()
    (folder / "holiday").mkdir()
    (folder / "holiday" / "holiday.png").touch()
    return folder


def contents(*folders):
    """Every file below some folders, but for locks: {file: its bytes}."""
    files = [file for folder in folders for file in folder.rglob("*")]
    return {file: file.read_bytes() for file in files if file.is_file() and file.name != ".lock"}


@pytest.fixture
def check(refused, given, tmp_path, monkeypatch):
    """check(script, words, *options): it is refused in one line that holds all words, harmlessly.

    words: " ... " stands between them."""
    monkeypatch.chdir(given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def check(script, words, *options):
        module, usual = SCRIPTS[script]
        before, out = contents(given, tmp_path), tmp_path / "out"
        line = refused(module, usual, "--out", out, *options)
        assert all(part in line for part in words.split(" ... ")), line
        assert not TRACE.exists()
        after = contents(given, tmp_path)
        assert {file: after.get(file) for file in before} == before
        for file in after.keys() - before.keys():  # what was planned or encoded may stay
            assert file.parent == out / "cache" or file.name in ("settings.json", "grids.jsonl")

    return check


# ---- refused: commands ---------------------------------------------------------------------------
COMMANDS = [  # scripts, what is changed in their usual command, words that the line must hold
    ("sample", "--image good.png text.png", "text.png: not an image that can be read"),
    ("sample", "--image float.tiff", "float.tiff: not an image that can be read"),
    ("sample", "--image bomb.png", "bomb.png: not an image that can be read"),
    ("sample", "--image none.png", "none.png: not an image that can be read"),
    ("sample", "--image empty", "no reference picture"),
    ("sample", "--prompt ''", "--prompt: empty"),
    ("sample", "--prompt a ' \n'", "--prompt: empty"),
    ("generate_grids", "--prompts short.txt", "short.txt, line 1 ... subject | setting"),
    ("generate_grids", "--prompts blank.txt", "blank.txt: there is no prompt"),
    ("generate_grids", "--prompts utf-16.txt", "utf-16.txt ... UTF-8"),
    ("generate_grids", "--prompts good.png", "good.png ... UTF-8"),
    ("generate_grids", "--prompts none.txt", "none.txt: "),
    ("generate_grids", "--prompts empty", "empty: "),
    ("generate_grids", "--prompts short.txt --llm x", "not allowed with"),
    # models
    (MODELS, "--model nowhere", "no model folder nowhere"),
    (MODELS, "--model good.png", "no model folder good.png"),
    (MODELS, "--model chat", "chat: not a FLUX.1 text-to-image model"),
    (MODELS, "--model empty", "empty: not a FLUX.1 text-to-image model"),
    ("generate_grids", "--model 'pickled model'", "cannot load pickled model"),
    ("generate_grids", "--llm nowhere", "no model folder nowhere"),
    ("generate_grids", "--llm empty", "--llm empty ... not a chat model"),
    ("generate_grids", "--llm vlm", "--llm vlm ... not a chat model"),
    ("curate", "--vlm nowhere", "no model folder nowhere"),
    ("curate", "--vlm empty", "cannot load empty as a vision-language model"),
    ("curate", "--vlm chat", "cannot load chat as a vision-language model"),
    ("sample", "--enhance nowhere", "no model folder nowhere"),
    ("sample", "--enhance chat", "cannot load chat as a vision-language model"),
    ("sample", "--adapter narrow", f"narrow/{ADAPTER} ... does not fit this model"),
    ("sample", "--adapter nowhere", "no adapter"),
    ("sample", "--adapter 'pickled adapter'", "no adapter"),
    ("generate_grids curate finetune sample", "--quantize nf4", "needs a CUDA GPU"),
    # records, sizes
    ("curate", "--grids empty", "run generate_grids.py first"),
    ("finetune", "--pairs empty", "no pairs in empty; run curate.py first"),
    ("finetune", "--pairs odd", "36 x 36 pixels ... multiples of 8"),
    ("generate_grids", "--true_cfg_scale 1", "--negative needs ... --no-negative"),
    ("generate_grids", "--panel 33", "33 x 33 pixels ... multiples of 8"),
    ("sample", "--width 35", "35 ... multiples of 8"),
    ("finetune", "--frame_weights 0 0", "--frame_weights"),
    ("finetune", "--clean_reference --frames 1", "--clean_reference needs two frames"),
    # output folders
    ("generate_grids curate finetune sample", "--out 'other run'", "other run holds another run"),
    ("generate_grids", "--out holiday", "holiday holds another run or other files"),
    ("generate_grids", "--out 'unreadable run'", "unreadable run/settings.json"),
    ("generate_grids", "--out good.png", "good.png: "),
]
VALUES = {  # script -> options with values that are each refused, in a line that names the option
    "generate_grids": "--steps=0 --steps=-3 --steps=1.5 --steps=many --count=0 --seed=-1 --step=3 "
    "--guidance_scale=nan --guidance_scale=-1 "
    "--family=twins --color=red --device=cuda "
    f"--seed={10**30}",
    "curate": "--batch_size=0 --tolerance=-1 --caption=poem --max_new_tokens=0 --device=cuda",
    "finetune": "--rank=0 --shift=0 --learning_rate=-1 --learning_rate=inf --precision=fp8 "
    "--save_every=0 --accumulate=0 --frames=3 --prompt_dropout=2 --device=cuda",
    "sample": "--width=0 --seed=-5 --image_guidance=inf --fit=stretch --device=abacus "
    "--device=cuda --model",
}


@pytest.mark.parametrize("script, options, words", rows(COMMANDS))
def test_a_wrong_command(script, options, words, check):
    check(script, words, options)


@pytest.mark.parametrize("script", VALUES)
def test_a_wrong_value(script, check):
    for option in VALUES[script].split():
        check(script, option.split("=")[0], option)


def test_a_wrong_command_in_a_process_of_its_own(tmp_path):
    _, printed = run_script("finetune.py", cwd=tmp_path, code=2)
    assert printed.startswith("\nerror: no pairs in runs/pairs; run curate.py first")
    assert printed.count("\n") == 2 and not list(tmp_path.iterdir())


def test_a_launchers_variables_without_an_address_are_named(given, monkeypatch):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("SIZE", 2)):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    _, printed = run_script("sample.py", SCRIPTS["sample"][1], cwd=given, code=2)
    assert "RANK, WORLD_SIZE and so on are set: use accelerate launch" in printed
    assert printed.count("\n") == 2


def test_without_a_compiler_nothing_is_encoded(check, tmp_path, monkeypatch):
    def fail(function):
        raise RuntimeError("No working C++ compiler found\nin torch._inductor.config.cpp.cxx")

    monkeypatch.setattr(torch, "compile", fail)
    check("finetune", "--compile needs a C++ compiler ... No working C++ compiler", "--compile")
    assert not (tmp_path / "out").exists()


def test_a_model_without_defaults_needs_what_it_does_not_bring(check, given, tmp_path, refused):
    model = tmp_path / "model"
    shutil.copytree(given / "flux", model, ignore=shutil.ignore_patterns("dsd.json"))
    adapter = "--adapter adapter"
    for options, words in [
        ("", "no adapter"),
        (adapter, "--prompt"),
        (f"{adapter} --prompt a --width 32 --height 32", "--image"),
    ]:
        assert words in refused(sample, options, "--model", model, "--out", tmp_path / "out")


# ---- refused: broken files -----------------------------------------------------------------------
def cut(data):
    return data[: len(data) // 2]


def transcript(*pairs):
    """A function that puts other pairs into a transcript."""
    return lambda data: json.dumps(json.loads(data) | {"pairs": pairs}).encode()


def tensors(change=lambda old: old, **metadata):
    """A function that changes a safetensors file. change: {name: tensor} -> {name: tensor}."""

    def changed(data):
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return save(change(load(data)), header.get("__metadata__", {}) | metadata)

    return changed


def facts(value):
    """A function that puts other facts into an adapter file's metadata."""
    return tensors(lora_adapter_metadata=json.dumps({"dsd": value}))


NOT_FINITE = tensors(lambda old: {name: tensor * torch.nan for name, tensor in old.items()})
WIDER_LAYER = tensors(lambda old: old | {LAYER: old[LAYER].repeat(2, 1)})
ONLY_LORA = tensors(lambda old: {name: old[name] for name in old if "embed" not in name})
PAIR = {"reference_file_name": "images/000000_0.png", "target_file_name": "images/000000_1.png"}
PAIR["prompt"] = "a critter"
FLUX_2 = b'{"_class_name": "Flux2Pipeline"}'
OPTIONS = {"flux": "--model", "good.png": "--image"}  # else a thing's name is its option


def grammar(**changes):
    """The dsd.json of a model with FLUX.1's grammar, but for some parts, and with --negative."""
    options = {"negative": True, "true_cfg_scale": 3, "grammar": generate_grids.GRAMMAR | changes}
    return json.dumps({"generate_grids": options}).encode()


BROKEN = [
    # Scripts, a file of the folder `given`, what it is replaced by in a copy (bytes, a function of
    # the old ones, or None: it is missing), words that the line must hold.
    ("sample", "good.png", cut, "good.png: not an image that can be read"),
    # models
    (MODELS, "flux/model_index.json", FLUX_2, "flux: not a FLUX.1 text-to-image model"),
    ("generate_grids", "flux/tokenizer_2", None, "cannot load ... flux"),
    ("generate_grids", "flux/transformer/*.safetensors", cut, "cannot load ... flux"),
    ("generate_grids", "flux/transformer/*.safetensors", BOMB, "cannot load ... flux"),
    ("finetune", "flux/transformer/*.safetensors", cut, "cannot load ... flux"),
    ("generate_grids sample", "flux/vae/*.safetensors", NOT_FINITE, "not finite ... weights"),
    ("generate_grids", "flux/dsd.json", b"{", "flux/dsd.json: not a JSON file"),
    ("generate_grids", "flux/dsd.json", b'{"generate_grids": {"panel": "a"}}', "--panel ... a"),
    ("generate_grids", "flux/dsd.json", b'{"generate_grids": {"panel": [32]}}', "dsd.json"),
    ("generate_grids", "flux/dsd.json", b'{"generate_grids": [1]}', "flux/dsd.json"),
    ("generate_grids", "flux/dsd.json", grammar(opposites={}), "--negative ... no opposites"),
    ("curate", "vlm/model.safetensors", None, "vlm as a vision-language model"),
    ("curate", "vlm/model.safetensors", BOMB, "vlm as a vision-language model"),
    ("curate", "vlm/chat_template.jinja", None, "vlm as a vision-language model"),
    # adapters
    ("sample", f"adapter/{ADAPTER}", cut, f"{ADAPTER} cannot be read"),
    ("sample", f"adapter/{ADAPTER}", BOMB, f"{ADAPTER} cannot be read"),
    ("sample", f"adapter/{ADAPTER}", WIDER_LAYER, f"{ADAPTER} does not fit this model"),
    ("sample", f"adapter/{ADAPTER}", ONLY_LORA, "ordinary LoRA"),
    ("sample", f"adapter/{ADAPTER}", NOT_FINITE, "a picture is not finite"),
    ("sample", f"adapter/{ADAPTER}", facts([]), f"{ADAPTER} cannot be read"),
    ("sample", f"adapter/{ADAPTER}", facts({}), "trained on edition None"),
    ("sample", f"adapter/{ADAPTER}", facts({"edition": 2}), "trained on edition 2"),
    # records
    ("curate", "grids/grids.jsonl", b"", "0 of 0 grids are in"),
    ("curate", "grids/grids.jsonl", b"no JSON\n", "grids/grids.jsonl, line 1"),
    ("curate", "grids/grids.jsonl", b"[" * 100_000, "grids/grids.jsonl, line 1"),
    ("curate", "grids/grids.jsonl", records({"file": "a.png"}), "grids/grids.jsonl, line 1"),
    ("curate", "grids/000000.png", None, "0 of 1 grids are in"),
    ("finetune", "pairs/metadata.jsonl", b"", "no pairs"),
    ("finetune", "pairs/metadata.jsonl", records({"file": "a.png"}), "metadata.jsonl, line 1"),
    ("finetune", "pairs/metadata.jsonl", records(PAIR | {"prompt": 7}), "metadata.jsonl, line 1"),
    ("finetune", "pairs/metadata.jsonl", records([1, 2]), "pairs/metadata.jsonl, line 1"),
    ("finetune", "pairs/metadata.jsonl", records(PAIR, PAIR | {"prompt": " "}), "empty prompt"),
    ("finetune", "pairs/images/000001_0.png", cut, "pairs/images/000001_0.png"),
    ("finetune", "pairs/images/000001_0.png", None, "pairs/images/000001_0.png"),
    ("finetune", "pairs/metadata.jsonl", "{}\n".encode("utf-16"), "jsonl: give a UTF-8 file"),
]


def replace(file, new):
    """Replace a file as the tables say. A folder can only go missing."""
    if file.is_dir():
        return shutil.rmtree(file)
    data = new(file.read_bytes()) if callable(new) else new
    file.unlink()  # it may be a link to a sound one
    if data is not None:
        file.write_bytes(data)


@pytest.mark.parametrize("script, file, new, words", rows(BROKEN))
def test_a_broken_file(script, file, new, words, check, given, tmp_path):
    whole, _, inside = file.partition("/")
    copy = tmp_path / whole
    if inside:
        shutil.copytree(given / whole, copy, copy_function=os.symlink)
    else:
        shutil.copy(given / whole, copy)
    for broken in copy.glob(inside) if inside else [copy]:
        replace(broken, new)
    check(script, words, OPTIONS.get(whole, f"--{whole}"), copy)


# ---- permission, a full disk ---------------------------------------------------------------------
def test_what_may_not_be_read_or_written_is_named(refused):
    with tempfile.TemporaryDirectory() as public, contextlib.ExitStack() as stack:
        secret, out = Path(public) / "secret.png", Path(public) / "out"
        critter(7, [1, 0, 0]).save(secret)
        out.mkdir()
        secret.chmod(0)
        out.chmod(0o555)
        Path(public).chmod(0o555)
        if os.geteuid() == 0:  # root may do everything: for a moment nobody in particular
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        line = refused(lambda: dsd.open_image(secret))
        assert str(secret) in line and "Permission denied" in line
        for folder in (out, Path(public) / "new"):
            args = argparse.Namespace(out=folder)
            line = refused(lambda args=args: dsd.open_out(args, "sample", []))
            assert str(folder) in line and "Permission denied" in line
        assert {file.name for file in Path(public).rglob("*")} == {"out", "secret.png"}


@contextlib.contextmanager
def room(size):
    """A full disk: no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource", reason="this system cannot limit files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {  # everything that writes a file: larger with a larger n
    "whole.jsonl": lambda path, n: dsd.write_json(path, [{"n": n}] * n),
    "image.png": lambda path, n: dsd.save_image(noise_image(n, 10), path),
    "sheet.png": lambda path, n: dsd.contact_sheet([[(noise_image(n, 10), str(n))]], path),
    ADAPTER: lambda path, n: save_narrow_adapter(path.parent, rank=2 + n // 20),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_the_file_that_was_there(name, older, tmp_path, refused):
    def write(n=1000):
        WRITERS[name](tmp_path / name, n)

    if older:
        write(2)
    before = contents(tmp_path)
    with room(len(before.get(tmp_path / name, b"")) // 2 + 10):
        line = refused(write)
    assert f"cannot write {tmp_path / name}; make room" in line
    assert contents(tmp_path) == before  # nothing half written
    write()  # there is room again
    assert contents(tmp_path) != before


STATE = "training_state.pt"


def start(script, given, pairs, out):
    """The arguments of a short training, and of a curation."""
    if script == "curate":
        return curate, "--grids", given / "grids", "--out", out
    options = "--rank 2 --batch_size 1 --validation_grids 0 --steps 2"
    return finetune, options, "--pairs", pairs, "--out", out


def test_a_script_on_a_full_disk_goes_on_when_there_is_room(given, pairs, tmp_path, run, refused):
    whole, full = tmp_path / "whole", tmp_path / "full"
    run(*start("finetune", given, pairs, whole))
    for pattern in ("cache/*", ADAPTER, STATE):  # in the order of the work
        with room(next(whole.glob(pattern)).stat().st_size - 1):
            line = refused(*start("finetune", given, pairs, full))
        assert pattern.strip("/*") in line and "make room" in line
    assert not list(full.rglob("*.part"))
    run(*start("finetune", given, pairs, full))
    assert (full / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


# ---- a run that cannot go on ---------------------------------------------------------------------
@pytest.fixture
def useless_vlm(monkeypatch):
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(
        curate, "ask", lambda model, processor, cases, *rest: ["I cannot tell."] * len(cases)
    )


def test_no_accepted_pair_says_so_and_keeps_the_answers(given, useless_vlm, tmp_path, run, refused):
    said = run(curate, "--grids", given / "grids", "--out", tmp_path)
    assert "0 of 6 pairs accepted" in said.out
    told = dsd.read_json(tmp_path / "transcripts/000000.json")["pairs"]
    assert {record["answer"] for record in told} == {"I cannot tell."}
    assert dsd.read_json(tmp_path / "summary.json")["unparsable"] == 6
    assert "no pairs" in refused(finetune, "--pairs", tmp_path, "--out", tmp_path / "adapter")


TRANSCRIPT = "transcripts/000000.json"
DAMAGE = [  # script, a file that it has written, what it is replaced by, words
    ("finetune", STATE, cut, f"{STATE} ... delete"),
    ("finetune", STATE, b"", f"{STATE} ... delete"),
    ("finetune", STATE, BOMB, f"{STATE} ... delete"),
    ("finetune", "cache/*", cut, "cache ... delete"),
    ("finetune", "cache/*", NOT_FINITE, "not finite at step 2 ... kept ... --learning_rate"),
    ("curate", TRANSCRIPT, b"nonsense", "000000.json ... restore or delete it"),
    ("curate", TRANSCRIPT, transcript({"verdict": "Ja"}), "000000.json ... correct it"),
]


@pytest.mark.parametrize("script, file, new, words", DAMAGE)
def test_a_run_whose_own_files_are_damaged_stops_and_changes_nothing(
    script, file, new, words, given, pairs, useless_vlm, tmp_path, run, refused
):
    command = start(script, given, pairs, tmp_path)
    run(*command)
    for damaged in tmp_path.glob(file):
        replace(damaged, new)
    before = contents(tmp_path)
    line = refused(*command, "--steps 4" if script == "finetune" else "")
    assert all(part in line for part in words.split(" ... ")), line
    assert contents(tmp_path) == before


# ---- unusual, and used correctly -----------------------------------------------------------------
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def profile(primaries=()):
    """sRGB's colour profile with other primaries (red, green, blue in XYZ)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries):
        entry = data.index(tag) + 4  # in the table of tags: where the tag's data begin
        place = int.from_bytes(data[entry : entry + 4]) + 8
        data[place : place + 12] = struct.pack(">3i", *[round(2**16 * value) for value in xyz])
    return bytes(data)


def two_colours(left=RED, right=BLUE, mode="RGB"):
    """Red on the left, blue on the right, large enough for lossy formats."""
    image = Image.new("RGB", (64, 32), left)
    image.paste(right, (32, 0, 64, 32))
    return image.convert(mode)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter clockwise makes it upright
ANIMATED = {"save_all": True, "append_images": [Image.new("P", (64, 32))]}
DISPLAY_P3 = profile(
    [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)]
)
GREYS = profile().replace(b"RGB XYZ ", b"GRAYXYZ ").replace(b"rTRC", b"kTRC")
ON_ITS_SIDE = two_colours().rotate(90, expand=True)
LONG_TEXT = PngImagePlugin.PngInfo()
LONG_TEXT.add_text("workflow", "x" * 5_000_000, zip=True)
GREY = 128, 128, 128
UNUSUAL = [  # file, picture, how it is saved, its colours at the left and at the right
    ("grey.png", two_colours(mode="L"), {}, (76, 76, 76), (29, 29, 29)),
    ("palette.png", two_colours(mode="P"), {}, RED, BLUE),
    ("transparent.png", Image.new("RGBA", (64, 32)), {}, WHITE, WHITE),
    ("CMYK.jpg", two_colours(mode="CMYK"), {"quality": 100}, RED, BLUE),
    ("turned by EXIF.jpg", ON_ITS_SIDE, {"quality": 100, "exif": TURNED}, RED, BLUE),
    ("animated.gif", two_colours(mode="P"), ANIMATED, RED, BLUE),
    ("one pixel.png", Image.new("RGB", (1, 1), RED), {}, RED, RED),
    ("1x10000.png", Image.new("RGB", (1, 10_000), BLUE), {}, BLUE, BLUE),
    ("misnamed.bmp", two_colours(), {"format": "PNG"}, RED, BLUE),
    ("P3.png", two_colours((234, 51, 35), (0, 0, 245)), {"icc_profile": DISPLAY_P3}, RED, BLUE),
    ("profile of greys.png", two_colours(), {"icc_profile": GREYS}, RED, BLUE),
    ("damaged profile.png", two_colours(), {"icc_profile": DISPLAY_P3[:200]}, RED, BLUE),
    ("5 MB of text.png", two_colours(), {"pnginfo": LONG_TEXT}, RED, BLUE),
    ("16 bits.png", Image.new("I;16", (64, 32), 32896), {}, GREY, GREY),
    ("16 bits, the other end first.tiff", Image.new("I;16B", (64, 32), 32896), {}, GREY, GREY),
    ("a camera's.jfif", two_colours(), {"format": "JPEG", "quality": 100}, RED, BLUE),
]


@pytest.mark.parametrize("file, image, options, left, right", UNUSUAL)
def test_unusual_pictures_are_read_as_they_look(file, image, options, left, right, tmp_path):
    COUNTS["unusual inputs"] += 1
    image.save(tmp_path / file, **options)
    opened = dsd.open_image(tmp_path / file)
    assert opened.mode == "RGB"
    assert opened.size == (image.size[::-1] if "exif" in options else image.size)
    for quarter, colour in ((1, left), (3, right)):
        found = opened.getpixel((quarter * opened.width // 4, opened.height // 2))
        assert all(abs(a - b) <= 3 for a, b in zip(found, colour))
    assert dsd.fit_image(opened, 32, 32).size == (32, 32)
    assert dsd.fit_image(opened, 32, 32, "pad").size == (32, 32)


def test_sample_takes_a_folder_of_them_and_unusual_text(tmp_path, given, monkeypatch, run):
    COUNTS["unusual inputs"] += 2
    monkeypatch.chdir(given)
    for file, image, options, _, _ in UNUSUAL:
        image.save(tmp_path / file, **options)
    (tmp_path / "notes.txt").write_text("no picture")
    prompt = "ein Wesen \u2014 \u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u732b \U0001f431"
    adapter, out = f"--adapter adapter/{ADAPTER}", tmp_path / "out"
    options = [adapter, f"--prompt '{prompt}'", "--image", tmp_path, "--out", out]
    printed = run(sample, SCRIPTS["sample"][1], *options).err
    assert "unknown to this model" in printed and "\u732b" in printed
    with Image.open(out / "0000.png") as image:
        assert json.loads(image.text["dsd"])["prompt"] == prompt
    assert len(list(out.glob("[0-9]*.png"))) == len(UNUSUAL)


def test_a_prompts_file_with_blank_and_repeated_lines_and_a_byte_order_mark(tmp_path):
    COUNTS["unusual inputs"] += 1
    line = "a fox | in the snow | at noon | in a cave | by moonlight"
    text = f"\n{line}\n  \n{line}\r\nein Füchslein | a | b | c | d"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8-sig")
    grids = generate_grids.file_prompts(tmp_path / "prompts.txt", generate_grids.GRAMMAR)
    # a line that is repeated counts again, since each line has a seed of its own
    assert [grid["subject"] for grid in grids] == ["fox", "fox", "ein Füchslein"]


def test_what_is_listed_twice_counts_once(given, tmp_path):
    COUNTS["unusual inputs"] += 1
    (tmp_path / "metadata.jsonl").write_text(2 * (given / "pairs/metadata.jsonl").read_text())
    args = argparse.Namespace(pairs=tmp_path, seed=0, validation_grids=1)
    train, held_out = finetune.read_pairs(args)
    assert len(train) == 6 and len(held_out) == 2


def test_own_pairs_of_mixed_sizes_are_resized_to_one(pairs, tmp_path):
    COUNTS["unusual inputs"] += 1
    noise_image(90, 50).save(tmp_path / "a.png")
    args = argparse.Namespace(pairs=tmp_path, width=40, height=32)
    small = str(pairs / "images" / "000000_0.png")
    images = finetune.open_pair(
        args, PAIR | {"reference_file_name": "a.png", "target_file_name": small}
    )
    assert {image.size for image in images} == {(40, 32)}


def test_long_prompts_and_unknown_words_are_counted_in_one_line_each(pipe, capsys):
    COUNTS["unusual inputs"] += 2
    long = [f"a critter {'red ' * 80}{end}" for end in ("with a hat", "at noon")]
    dsd.warn_of_prompts(pipe, [*long, "a critter", "a zebra", "a zebra and a yak"])
    first, second = capsys.readouterr().err.splitlines()
    assert ": 2" in first and "prompts cut after" in first
    assert "unknown to this model: yak zebra" in second
    dsd.warn_of_prompts(pipe, ["a round horned critter in space at noon"])
    assert not capsys.readouterr().err
