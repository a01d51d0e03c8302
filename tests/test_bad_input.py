"""What a user gets wrong is answered with exit code 2 and one line that says what to do, never with a traceback, and
harms nothing that is there. What can be used is used correctly."""

import dsd  # first: it silences the libraries' notices

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
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
from PIL import Image
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM

import curate
import finetune
import generate_grids
import sample
from miniature import models

TRACE = Path(tempfile.gettempdir()) / f"unpickled-{os.getpid()}"
BOMB = f"cos\nmkdir\n(S'{TRACE}'\ntR.".encode()  # a pickle: to load it makes this folder


def check(result, words):
    """Code 2, one line with all words (" ... " stands for anything, in any order), no traceback, nothing unpickled."""
    COUNTS["bad inputs"] += 1
    code, _, err = result
    said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert code == 2 and len(said) == 1 and all(word in said[0] for word in words.split(" ... ")), (
        err[-2000:]
    )
    assert "Traceback" not in err and not TRACE.exists()


def save_narrow_adapter(folder, rank=2):
    """An adapter for a smaller model than the miniature."""
    dsd.save_adapter(
        give_random_weights(dsd.add_lora(dsd.widen(random_transformer()), rank)), folder, {}
    )


# ---- refused ---------------------------------------------------------------------------------------------------------
def cut(data):
    return data[: len(data) // 2]


def tensors(change=lambda old: old, **metadata):
    """A change of a safetensors file, from a change of its {name: tensor}."""
    return lambda data: save(change(load(data)), {"format": "pt", **metadata})


ARGS = {
    generate_grids: "--model flux --count 1 --steps 1",
    curate: "--grids grid --vlm vlm",
    finetune: "--model flux --pairs pairs --steps 1 --rank 2",
    sample: "--model flux --image good.png --prompt critter --steps 1 --adapter good",
}
SOUND = {
    "--model": "flux",
    "--grids": "grid",
    "--vlm": "vlm",
    "--pairs": "pairs",
    "--adapter": "good",
    "--image": "good.png",
    "--prompts": "good.png",
    "--out": "empty",
}  # files and folders of the fixture
MODELS, WEIGHTS = (generate_grids, finetune, sample), "transformer/*.safetensors"
ADAPTER, LAYER = dsd.ADAPTER_FILE, "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
GRID = {
    "file": "000000.png",
    "prompt": "p",
    "subject": "s",
    "family": "subject",
    "rows": 2,
    "columns": 2,
}
PAIR = {
    "reference_file_name": "images/000000_0.png",
    "target_file_name": "images/000000_1.png",
    "prompt": "a critter",
}
GARBAGE = b"no JSON\n", b"[" * 100_000, b"\0\1\n"
NAN = tensors(lambda old: {name: tensor * torch.nan for name, tensor in old.items()})
TABLE = [
    # Scripts, option, values that are each refused, words that the line must hold ({} is the value). A value that is no
    # text stands for a file or a folder: a copy of the option's sound one in which these files have another content,
    # are changed by a function, hold other records (a list) or other values of some fields (a dict), or are missing.
    (
        sample,
        "--image good.png",
        [
            cut,
            lambda data: (
                data[:-13] + bytes([data[-13] ^ 4]) + data[-12:]
            ),  # a bit in the checksum of its pixels
            b"",
            b"no image",
            "bomb.png",
            "float.tiff",
            "none.png",
        ],
        "{}: not an image that can be read",
    ),
    (sample, "--image", ["empty"], "no reference picture"),
    (sample, "--prompt", [""], "--prompt: empty"),
    (sample, "--prompt a", [" \n"], "--prompt: empty"),
    (
        generate_grids,
        "--prompts",
        [b"a fox | in the snow | at noon\n"],
        "{}, line 1 ... subject | setting",
    ),
    (generate_grids, "--prompts", [b"\n \n\n"], "{}: there is no prompt"),
    (
        generate_grids,
        "--prompts",
        ["a fox | a | b | c | d\n".encode("utf-16"), b"a f\xf6x | a | b | c | d\n", "good.png"],
        "{} ... UTF-8",
    ),
    (generate_grids, "--prompts", ["none.txt", "empty"], "{}: "),
    (generate_grids, "--prompts prompts.txt --llm", ["x"], "not allowed with"),
    # models
    (MODELS, "--model", ["nowhere", "empty/nowhere", "good.png"], "no model folder {}"),
    *(
        (script, option, ["nowhere"], "no model folder {}")
        for script, option in ((generate_grids, "--llm"), (curate, "--vlm"), (sample, "--enhance"))
    ),
    (
        MODELS,
        "--model",
        [
            {"model_index.json": {"_class_name": "StableDiffusionPipeline"}},
            {"model_index.json": {"_class_name": "FluxKontextPipeline"}},
            {"transformer/config.json": {"in_channels": 384}},
            "chat",
            "empty",
        ],
        "{}: not a FLUX model",
    ),
    (
        generate_grids,
        "--model",
        [
            {"tokenizer_2": None},
            {WEIGHTS: cut},
            {WEIGHTS: BOMB},
            {WEIGHTS: None, "transformer/diffusion_pytorch_model.bin": BOMB},
        ],
        "cannot load {}",
    ),
    (finetune, "--model", [{"transformer": None}, {WEIGHTS: cut}, {WEIGHTS: BOMB}], "{}"),
    (
        (generate_grids, sample),
        "--model",
        [{"vae/*.safetensors": NAN}],
        "not finite ... check the weights",
    ),
    (generate_grids, "--model", [{"dsd.json": b"{"}], "{}/dsd.json: not a JSON file"),
    (
        generate_grids,
        "--model",
        [{"dsd.json": {"generate_grids": {"panel": "many"}}}],
        "--panel ... many",
    ),
    (
        finetune,
        "--model",
        [{"dsd.json": {"finetune": {"batch_size": 0}}}],
        "--batch_size ... at least 1",
    ),
    (
        generate_grids,
        "--model",
        [{"dsd.json": {"generate_grids": value}} for value in ([1], {"panel": [32]})],
        "dsd.json",
    ),
    (generate_grids, "--llm", ["empty", "vlm", "flux"], "--llm {} ... not a chat model"),
    (
        curate,
        "--vlm",
        [
            "empty",
            "flux",
            "chat",
            {"model.safetensors": None},
            {"chat_template.jinja": None},
            {"model.safetensors": BOMB},
        ],
        "cannot load {} as a vision-language model",
    ),
    (sample, "--enhance", ["chat"], "cannot load {} as a vision-language model"),
    # adapters
    (
        sample,
        "--adapter",
        [
            "narrow",
            *(
                {ADAPTER: change}
                for change in (
                    cut,
                    BOMB,
                    tensors(lambda old: old | {LAYER: old[LAYER].repeat(2, 1)}),
                    tensors(
                        lambda old: (
                            old
                            | {
                                name.replace("blocks.0", "blocks.77"): old[name].clone()
                                for name in old
                            }
                        )
                    ),
                )
            ),
        ],
        f"{{}}/{ADAPTER} ... does not fit this model",
    ),
    (
        sample,
        "--adapter",
        [
            {ADAPTER: tensors(lora_adapter_metadata=json.dumps({"dsd": facts}))}
            for facts in ([], {"width": [32]}, {"frames": 3}, {"prompt_tokens": "x"})
        ],
        f"{{}}/{ADAPTER} ... does not fit this model",
    ),
    (sample, "--adapter", [{ADAPTER: NAN}], "not finite"),
    (
        sample,
        "--adapter",
        [{ADAPTER: tensors(lambda old: {name: old[name] for name in old if "embed" not in name})}],
        "ordinary LoRA",
    ),
    (
        sample,
        "--adapter",
        ["empty", "nowhere", {ADAPTER: None, "pytorch_lora_weights.bin": BOMB}],
        "no adapter",
    ),
    # records
    (curate, "--grids", ["empty"], "run generate_grids.py first"),
    (curate, "--grids", [{"grids.jsonl": []}], "no grids"),
    (
        curate,
        "--grids",
        [{"grids.jsonl": data} for data in (*GARBAGE, [{"file": "a.png"}])],
        "{}/grids.jsonl, line 1",
    ),
    (curate, "--grids", [{"000000.png": None}], "{}/000000.png"),
    (curate, "--grids", [{"grids.jsonl": [GRID | {"rows": 10**9}]}], "rows"),
    (curate, "--grids", [{"grids.jsonl": [GRID | {"rows": 1, "columns": 1}]}], "one panel"),
    (finetune, "--pairs", ["empty"], "no pairs in {}; run curate.py first"),
    (finetune, "--pairs", [{"metadata.jsonl": []}], "no pairs"),
    (finetune, "--pairs", [{"metadata.jsonl": [PAIR, PAIR | {"prompt": " "}]}], "empty prompt"),
    (
        finetune,
        "--pairs",
        [
            {"metadata.jsonl": data}
            for data in (*GARBAGE, [{"file_name": "a.png"}], [PAIR | {"prompt": 7}], [[1, 2]])
        ],
        "{}/metadata.jsonl, line 1",
    ),
    (
        finetune,
        "--pairs",
        [{"images/000001_0.png": data} for data in (cut, None)],
        "{}/images/000001_0.png",
    ),
    (finetune, "--pairs", ["odd"], "36 x 36 pixels ... multiples of 8"),
    # numbers and options
    *(
        (script, "", [given], given.split("=")[0])
        for script, options in (
            (
                generate_grids,
                f"--steps=0 --steps=-3 --steps=1.5 --steps=many --count=0 --seed=-1 --seed={10**30} --step=3 "
                "--guidance_scale=nan --guidance_scale=-1 --family=twins --color=red --device=cuda",
            ),
            (
                curate,
                "--batch_size=0 --tolerance=-1 --caption=poem --max_new_tokens=0 --device=cuda",
            ),
            (
                finetune,
                "--rank=0 --shift=0 --learning_rate=-1 --learning_rate=inf --precision=fp8 "
                "--save_every=0 --accumulate=0 --frames=3 --prompt_dropout=2 --device=cuda",
            ),
            (
                sample,
                "--width=0 --seed=-5 --image_guidance=inf --fit=stretch --device=abacus --device=cuda --model",
            ),
        )
        for given in options.split()
    ),
    (generate_grids, "--panel", ["33"], "33 x 33 pixels ... multiples of 8"),
    *((sample, side, ["35"], "35 ... multiples of 8") for side in ("--width", "--height")),
    (finetune, "--frame_weights 0", ["0"], "--frame_weights"),
    # output folders
    *(
        (
            script,
            "--out",
            [{"settings.json": {"step": script.__name__, "seed": 77}, "a.png": b""}],
            "holds another run",
        )
        for script in ARGS
    ),
    (
        generate_grids,
        "--out",
        [{"settings.json": {"step": "sample", "seed": 77}, "a.png": b""}, {"holiday.png": b""}],
        "{} holds another run or other files",
    ),
    (generate_grids, "--out", [{"settings.json": b'{"step": ', "a.png": b""}], "{}/settings.json"),
    (generate_grids, "--out", ["good.png", "good.png/grids", "/proc/grids"], "{}: "),
]
CASES = [
    (script, option, value, words)
    for scripts, option, values, words in TABLE
    for script in (scripts if isinstance(scripts, tuple) else [scripts])
    for value in values
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, flux, vlm, pairs):
    """A folder of things that can be used, and of a few that cannot, to which no test may do any harm."""
    folder = tmp_path_factory.mktemp("sound")
    for name, target in (
        ("flux", flux),
        ("vlm", vlm),
        ("pairs", pairs),
        ("good", dsd.MINIATURE / "adapter"),
    ):
        (folder / name).symlink_to(target)
    (folder / "empty").mkdir()
    critter(7, [1, 0, 0]).save(folder / "good.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 400 million pixels in 50 kilobytes
    Image.new("F", (8, 8), 1e4).save(folder / "float.tiff")
    dsd.write_json(folder / "grid" / "grids.jsonl", [GRID])
    make_image_grid([critter(7, [i, 0, 0]) for i in range(4)], 2, 2).save(
        folder / "grid" / "000000.png"
    )
    shutil.copytree(pairs, folder / "odd")
    for file in (folder / "odd" / "images").iterdir():
        critter(7, [1, 0, 0]).resize((36, 36)).save(file)
    save_narrow_adapter(folder / "narrow")
    tokenizer = models.vlm_tokenizer(["a", "fox"])
    tokenizer.chat_template = models.VLM_TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(folder / "chat")
    return folder


def change_files(path, changes):
    """Change files of the folder `path`, or the file `path` itself, as TABLE describes it."""
    for name, new in changes.items() if isinstance(changes, dict) else [("", changes)]:
        for file in list(path.glob(name)) if "*" in name else [path / name]:
            old = file.read_bytes() if file.is_file() else b"{}"
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            if isinstance(new, (dict, list)):
                dsd.write_json(file, json.loads(old) | new if isinstance(new, dict) else new)
            elif new is not None:
                file.write_bytes(new(old) if callable(new) else new)


def contents(*folders):
    """Every file below some folders, but for locks: {file: its bytes}."""
    return {
        file: file.read_bytes()
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


@pytest.mark.parametrize(
    "script, option, value, words",
    CASES,
    ids=[
        re.sub(" at 0x[^>]*", "", f"{script.__name__} {option} {value}")[:80]
        for script, option, value, _ in CASES
    ],
)
def test_bad_input_is_one_line_and_code_2_and_harms_nothing(
    script, option, value, words, sound, tmp_path, monkeypatch, call
):
    monkeypatch.chdir(sound)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not isinstance(value, str):
        source, copy = sound / SOUND[option.split()[0]], tmp_path / "broken"
        shutil.copytree(source, copy, copy_function=os.symlink) if source.is_dir() else shutil.copy(
            source, copy
        )
        change_files(copy, value)
        value = str(copy)
    before, out = contents(sound, tmp_path), tmp_path / "out"
    check(
        call(script, "--out", out, *ARGS[script].split(), *option.split(), value),
        words.replace("{}", value),
    )
    after = contents(sound, tmp_path)
    for file in after.keys() - before.keys():  # what was planned or encoded may stay
        assert file in (out / "settings.json", out / "grids.jsonl") or file.parent == out / "cache"
    assert {file: after.get(file) for file in before} == before


def test_bad_input_in_a_process_of_its_own(tmp_path):
    check(
        (2, *run_script("finetune.py", cwd=tmp_path, code=2)),
        "no pairs in runs/pairs ... run curate.py first",
    )
    assert not list(tmp_path.iterdir())


def test_a_model_without_defaults_needs_what_it_does_not_bring(sound, tmp_path, monkeypatch, call):
    monkeypatch.chdir(sound)
    model = shutil.copytree("flux", tmp_path / "model", ignore=lambda *_: ["dsd.json"])
    for given, words in (
        ("", "no adapter"),
        ("--adapter good", "--prompt"),
        ("--adapter good --prompt a --width 32 --height 32", "--image"),
    ):
        check(call(sample, "--model", model, *given.split(), "--out", tmp_path / "out"), words)


# ---- permission, a full disk -----------------------------------------------------------------------------------------
def test_what_may_not_be_read_or_written_is_named(call):
    with (
        tempfile.TemporaryDirectory() as public,
        contextlib.ExitStack() as stack,
    ):  # pytest's own is closed to others
        secret, out, new = (Path(public) / name for name in ("secret.png", "out", "new"))
        critter(7, [1, 0, 0]).save(secret)
        out.mkdir()
        for path, rights in ((secret, 0), (out, 0o555), (out.parent, 0o555)):
            path.chmod(rights)
        if os.geteuid() == 0:  # root may do everything: for a moment nobody in particular
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        check(call(lambda: dsd.open_image(secret)), f"{secret} ... Permission denied")
        for out in (out, new):
            check(
                call(lambda: dsd.open_out(argparse.Namespace(out=out), "sample", [])),
                f"{out} ... Permission denied",
            )
        assert {file.name for file in Path(public).rglob("*")} == {"out", "secret.png"}


@contextlib.contextmanager
def room(size):
    """A full disk: no file can grow beyond `size` bytes."""
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
def test_a_full_disk_leaves_the_file_that_was_there_and_nothing_half_written(name, tmp_path, call):
    def write(n=1000):
        WRITERS[name](tmp_path / name, n)

    for older in (False, True):
        if older:
            write(2)
        before = contents(tmp_path)
        with room(len(before.get(tmp_path / name, b"")) // 2 + 10):
            result = call(write)
        check(result, f"{name} ... cannot write ... make room")
        assert contents(tmp_path) == before
    write()  # there is room again
    assert contents(tmp_path) != before


STATE, TRANSCRIPT = "training_state.pt", "transcripts/000000.json"


@pytest.fixture
def start(flux, pairs, sound, monkeypatch):
    """How to start a short training, and a curation whose VLM is of no help: {script: arguments for `call`}."""
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(
        curate, "ask", lambda model, processor, cases, *rest: ["I cannot tell."] * len(cases)
    )
    return {
        curate: [curate, "--grids", sound / "grid"],
        finetune: [
            finetune,
            "--model",
            flux,
            "--pairs",
            pairs,
            "--rank",
            2,
            "--batch_size",
            1,
            "--validation_grids",
            0,
            "--steps",
            2,
        ],
    }


def test_a_script_on_a_full_disk_goes_on_when_there_is_room(start, tmp_path, call):
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert call(*start[finetune], "--out", whole)[0] == 0
    for pattern, name in (
        ("cache/*", "cache"),
        (ADAPTER, ADAPTER),
        (STATE, STATE),
    ):  # in this order
        with room(next(whole.glob(pattern)).stat().st_size - 1):
            result = call(*start[finetune], "--out", full)
        check(result, f"{name} ... make room")
    assert not list(full.rglob("*.part"))
    assert call(*start[finetune], "--out", full)[0] == 0
    assert (full / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


# ---- a run that cannot go on -----------------------------------------------------------------------------------------
def test_no_accepted_pair_says_so_and_keeps_the_answers(start, tmp_path, call):
    check(call(*start[curate], "--out", tmp_path), "none of 6 pairs ... make more or better grids")
    assert {r["answer"] for r in dsd.read_json(tmp_path / "transcripts/000000.json")["pairs"]} == {
        "I cannot tell."
    }
    assert dsd.read_json(tmp_path / "summary.json")["unparsable"] == 6
    check(call(finetune, "--pairs", tmp_path, "--out", tmp_path / "adapter"), "no pairs")


DAMAGE = [  # script, what happens to files that it has written, words
    *((finetune, {STATE: new}, f"{STATE} ... delete") for new in (cut, b"", BOMB)),
    (finetune, {"cache/*": cut}, "cache ... delete"),
    (finetune, {"cache/*": NAN}, "not finite at step 2 ... checkpoint is kept ... --learning_rate"),
    *(
        (curate, {TRANSCRIPT: new}, f"{TRANSCRIPT} ... restore or delete it")
        for new in (b"nonsense", b"[1]", b'{"picture": ')
    ),
    *(
        (curate, {TRANSCRIPT: {"pairs": new}}, f"{TRANSCRIPT} ... correct it or delete it")
        for new in (
            [{}],
            7,
            [{"verdict": "yes"}],
            [{"verdict": "yes", "captions": {"1": "a critter"}}],
        )
    ),
]


@pytest.mark.parametrize("script, changes, words", DAMAGE)
def test_a_run_whose_own_files_are_damaged_stops_and_changes_nothing(
    script, changes, words, start, tmp_path, call
):
    call(*start[script], "--out", tmp_path)
    change_files(tmp_path, changes)
    before = contents(tmp_path)
    check(
        call(*start[script], "--out", tmp_path, *(["--steps", 4] if script is finetune else [])),
        words,
    )
    assert contents(tmp_path) == before


# ---- unusual, and used correctly -------------------------------------------------------------------------------------
RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_colours(mode="RGB"):
    """Red on the left, blue on the right, large enough for lossy formats."""
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    return image.convert(mode)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter clockwise makes it upright
UNUSUAL = {  # file -> picture, how to save it, its colours at the left and at the right
    "grey.png": (two_colours("L"), {}, [(76,) * 3, (29,) * 3]),
    "palette.png": (two_colours("P"), {}, [RED, BLUE]),
    "transparent.png": (Image.new("RGBA", (64, 32)), {}, [(255,) * 3] * 2),
    "CMYK.jpg": (two_colours("CMYK"), {"quality": 100}, [RED, BLUE]),
    "16 bits.png": (Image.new("I;16", (64, 32), 32896), {}, [(128,) * 3] * 2),
    "turned by EXIF.jpg": (
        two_colours().rotate(90, expand=True),
        {"quality": 100, "exif": TURNED},
        [RED, BLUE],
    ),
    "animated.gif": (
        two_colours("P"),
        {"save_all": True, "append_images": [Image.new("P", (64, 32))]},
        [RED, BLUE],
    ),
    "one pixel.png": (Image.new("RGB", (1, 1), RED), {}, [RED, RED]),
    "1x10000.png": (Image.new("RGB", (1, 10_000), BLUE), {}, [BLUE, BLUE]),
    "misnamed.bmp": (two_colours(), {"format": "PNG"}, [RED, BLUE]),
}


@pytest.mark.parametrize("file", UNUSUAL)
def test_unusual_pictures_are_read_as_they_look(file, tmp_path):
    COUNTS["unusual inputs"] += 1
    image, options, colours = UNUSUAL[file]
    image.save(tmp_path / file, **options)
    opened = dsd.open_image(tmp_path / file)
    assert opened.mode == "RGB" and opened.size == (
        image.size[::-1] if "exif" in options else image.size
    )
    for share, colour in zip((1, 3), colours):
        found = opened.getpixel((share * opened.width // 4, opened.height // 2))
        assert all(abs(a - b) <= 3 for a, b in zip(found, colour))
    assert (
        dsd.fit_image(opened, 32, 32).size == dsd.fit_image(opened, 32, 32, "pad").size == (32, 32)
    )


def test_sample_takes_a_folder_of_them_and_unusual_text(tmp_path, sound, monkeypatch, call):
    COUNTS["unusual inputs"] += 2
    monkeypatch.chdir(sound)
    for file, (image, options, _) in UNUSUAL.items():
        image.save(tmp_path / file, **options)
    (tmp_path / "notes.txt").write_text("no picture")
    prompt = "ein Wesen \u2014 \u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u732b \U0001f431"
    code, _, err = call(
        sample,
        *ARGS[sample].split(),
        "--adapter",
        f"good/{ADAPTER}",
        "--prompt",
        prompt,
        "--image",
        tmp_path,
        "--out",
        tmp_path / "out",
    )
    assert code == 0 and "unknown to this model" in err and "\u732b" in err, err
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert json.loads(image.text["dsd"])["prompt"] == prompt
    assert len(list((tmp_path / "out").glob("[0-9]*.png"))) == len(UNUSUAL)


def test_a_prompts_file_with_blank_and_repeated_lines_and_a_byte_order_mark(tmp_path):
    COUNTS["unusual inputs"] += 1
    line, file = (
        "a fox | in the snow | at noon | in a cave | by moonlight",
        tmp_path / "prompts.txt",
    )
    file.write_text(f"\n{line}\n  \n{line}\r\nein Füchslein | a | b | c | d", encoding="utf-8-sig")
    grids = generate_grids.file_prompts(file, generate_grids.GRAMMAR)
    assert [grid["subject"] for grid in grids] == [
        "fox",
        "fox",
        "ein Füchslein",
    ]  # each line has a seed of its own


def test_what_is_listed_twice_counts_once(sound, tmp_path):
    COUNTS["unusual inputs"] += 2
    for file, folder in (("metadata.jsonl", "pairs"), ("grids.jsonl", "grid")):
        (tmp_path / file).write_text(2 * (sound / folder / file).read_text())
    train, held_out = finetune.read_pairs(
        argparse.Namespace(pairs=tmp_path, seed=0, validation_grids=1)
    )
    assert len(train) == 6 and len(held_out) == 2
    assert list(curate.read_grids(argparse.Namespace(grids=tmp_path))) == [0]


def test_own_pairs_of_mixed_sizes_are_resized_to_one(pairs, tmp_path):
    COUNTS["unusual inputs"] += 1
    noise_image(90, 50).save(tmp_path / "a.png")
    args = argparse.Namespace(pairs=tmp_path, width=40, height=32)
    pair = {
        "reference_file_name": "a.png",
        "target_file_name": str(pairs / "images" / "000000_0.png"),
    }
    assert {image.size for image in finetune.open_pair(args, pair)} == {(40, 32)}


def test_prompts_that_are_too_long_and_unknown_words_are_counted_in_one_line_each(pipe, capsys):
    COUNTS["unusual inputs"] += 2
    long = [f"a critter {'red ' * 80}{end}" for end in ("with a hat", "at noon")]
    dsd.warn_of_prompts(pipe, [*long, long[0], "a critter", "a zebra", "a zebra and a yak"])
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and "2 of 5 prompts are longer" in lines[0] and "red with a hat" in lines[0]
    )
    assert "2 words are unknown" in lines[1] and "yak zebra" in lines[1]
    dsd.warn_of_prompts(pipe, ["a round horned critter in space at noon"])
    assert not capsys.readouterr().err
