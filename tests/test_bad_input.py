"""What a user gets wrong is answered with exit code 2 and one line that says what to do, never with a traceback, and harms
nothing that is there. What can be used is used correctly."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import COUNTS, critter, give_random_weights, noise_image, random_transformer, run_script
from PIL import Image
from safetensors.torch import load_file, save_file

import curate
import dsd
import finetune
import generate_grids
import sample


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/unpickled-by-dsd",)


# ---- a folder of broken things ---------------------------------------------------------------------------------------
def pictures():
    noise = noise_image(64, 64)
    noise.save("truncated.png")
    Path("truncated.png").write_bytes(Path("truncated.png").read_bytes()[:2000])
    noise.save("flipped.png")
    data = bytearray(Path("flipped.png").read_bytes())
    data[3000] ^= 4
    Path("flipped.png").write_bytes(data)
    Path("empty.png").touch()
    Path("text.png").write_text("this is no image")
    Path("folder.png").mkdir()
    Image.new("1", (20_000, 20_000)).save("bomb.png")  # 400 million pixels in 50 kilobytes
    Image.new("F", (8, 8), 1e4).save("float.tiff")
    critter(7, [1, 0, 0]).save("good.png")


def texts():
    Path("prompts.txt").write_text("a fox | in the snow | at noon\n")
    Path("blank.txt").write_text("\n \n\n")
    Path("utf16.txt").write_text("a fox | a | b | c | d\n", encoding="utf-16")
    Path("latin.txt").write_text("a f\u00f6x | a | b | c | d\n", encoding="latin-1")
    Path("control.txt").write_text("a fox | a | b | c | d\na fox | a | \x1b[2Jb | c | d\n")


def models(flux, vlm):
    def copy(name, source=flux, without=None):
        shutil.copytree(source, name, copy_function=lambda a, b: os.symlink(Path(a).resolve(), b),
                        ignore=lambda _, names: {without} & set(names))
        return Path(name)

    def replace(path, data):
        path.unlink()
        path.write_bytes(data)

    Path("empty").mkdir()
    Path("model").mkdir()
    Path("model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for part in ("tokenizer_2", "transformer", "dsd.json"):
        copy(f"no_{part}", without=part)
    for name, data in (("cut", lambda d: d[:5000]), ("pickled", lambda d: pickle.dumps(Bomb()))):
        file = next((copy(name) / "transformer").glob("*.safetensors"))
        replace(file, data(file.read_bytes()))
    file = next((copy("bin") / "transformer").glob("*.safetensors"))
    file.unlink()
    (file.parent / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for name, path, key, value in (("stable", "model_index.json", "_class_name", "StableDiffusionPipeline"),
                                   ("control", "transformer/config.json", "in_channels", 128),
                                   ("many", "dsd.json", "generate_grids", {"steps": "many"}),
                                   ("list", "dsd.json", "generate_grids", [])):
        file = copy(name) / path
        replace(file, json.dumps(json.loads(file.read_text()) | {key: value}).encode())
    replace(copy("no_json") / "dsd.json", b"{")
    copy("no_weights", vlm, "model.safetensors")
    replace(copy("pickled_vlm", vlm) / "model.safetensors", pickle.dumps(Bomb()))


def adapters(flux):
    dsd.save_adapter(give_random_weights(dsd.add_lora(dsd.widen(random_transformer()), 2)), "narrow")
    pipe = dsd.load_pipeline(dsd.FluxControlPipeline, flux)
    dsd.save_adapter(give_random_weights(dsd.add_lora(dsd.widen(pipe.transformer), 2)), "good")
    file = Path("good") / dsd.ADAPTER_FILE
    for name, data in (("cut_adapter", file.read_bytes()[:-100]), ("pickled_adapter", pickle.dumps(Bomb()))):
        Path(name).mkdir()
        (Path(name) / dsd.ADAPTER_FILE).write_bytes(data)
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    Path("flipped_adapter").mkdir()
    (Path("flipped_adapter") / dsd.ADAPTER_FILE).write_bytes(data)
    Path("bin_adapter").mkdir()
    Path("bin_adapter/pytorch_lora_weights.bin").write_bytes(pickle.dumps(Bomb()))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("to_q.lora_A.weight"))
    Path("mixed_ranks").mkdir()
    save_file(tensors | {name: tensors[name].repeat(2, 1)}, Path("mixed_ranks") / dsd.ADAPTER_FILE)
    Path("too_many_layers").mkdir()
    more = {n.replace("transformer_blocks.0", "transformer_blocks.77"): t.clone() for n, t in tensors.items()}
    save_file(more, Path("too_many_layers") / dsd.ADAPTER_FILE)


def records(pairs):
    grid = {"file": "000000.png", "prompt": "p", "subject": "s", "family": "subject", "rows": 2, "columns": 2}
    pair = dsd.read_records(pairs / "metadata.jsonl")[0]
    for name, file, content in (
            ("other", "grids.jsonl", [{"file": "000000.png"}]), ("no_grids", "grids.jsonl", []),
            ("outside_grid", "grids.jsonl", [{**grid, "file": "../good.png"}]),
            ("lost_grid", "grids.jsonl", [grid]), ("huge_grid", "grids.jsonl", [{**grid, "rows": 10**9}]),
            ("small_grid", "grids.jsonl", [{**grid, "file": "good.png", "rows": 8, "columns": 8}]),
            ("no_pairs", "metadata.jsonl", []), ("records", "metadata.jsonl", [{"file_name": "a.png"}]),
            ("outside", "metadata.jsonl", [{**pair, "target_file_name": "../good.png"}]),
            ("absolute", "metadata.jsonl", [{**pair, "reference_file_name": str(Path("good.png").resolve())}]),
            ("wordless", "metadata.jsonl", [pair, {**pair, "prompt": " "}]),
            ("numbers", "metadata.jsonl", [{**pair, "prompt": 7}]), ("lists", "metadata.jsonl", [[1, 2]])):
        shutil.copytree(pairs, name) if file == "metadata.jsonl" else Path(name).mkdir()
        shutil.copy("good.png", name)
        (Path(name) / file).write_text("".join(json.dumps(r) + "\n" for r in content))
    for name, text in (("garbage", "no JSON\n"), ("deep", "[" * 100_000 + "\n"), ("binary", "\x00\x01\n")):
        Path(name).mkdir()
        for file in ("grids.jsonl", "metadata.jsonl"):
            (Path(name) / file).write_text(text)
    for name, change in (("cut_picture", lambda p: p.write_bytes(p.read_bytes()[:100])), ("lost", lambda p: p.unlink()),
                         ("sizes", lambda p: critter(7, [1, 0, 0]).resize((48, 48)).save(p))):
        shutil.copytree(pairs, name)
        change(Path(name) / "images" / "000001_0.png")
    shutil.copytree(pairs, "odd")
    for file in Path("odd/images").iterdir():
        critter(7, [1, 0, 0]).resize((36, 36)).save(file)
    for step in ("generate_grids", "curate", "finetune", "sample"):
        Path(f"{step}_run").mkdir()
        dsd.write_json(f"{step}_run/settings.json", {"step": step, "seed": 77})
        for file in ("000000.png", "0000.png", "log.jsonl", "metadata.jsonl"):
            (Path(f"{step}_run") / file).touch()
    Path("desktop").mkdir()
    Path("desktop/settings.json").write_text('{"editor.fontSize": 12}')
    Path("broken_run").mkdir()
    Path("broken_run/settings.json").write_text('{"step": ')
    Path("file").touch()


@pytest.fixture(scope="module")
def broken(tmp_path_factory, flux, vlm, pairs):
    """A folder of broken things, to which no test may do any further harm."""
    folder, before = tmp_path_factory.mktemp("broken"), Path.cwd()
    os.chdir(folder)
    pictures(), texts(), models(flux, vlm), adapters(flux), records(pairs)
    os.chdir(before)
    return folder


def state(folder):
    """Every file below a folder as it is: {name: (size, time of the last change)}."""
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")
            if not p.is_dir() and p.name != ".lock"}


# ---- refused ---------------------------------------------------------------------------------------------------------
FLUX, VLM, PAIRS, GRIDS = "the FLUX folder", "the VLM folder", "the pairs", "a folder of one grid"  # put in by the test
DRAW = ["--model", FLUX, "--image", "good.png", "--prompt", "a critter", "--steps", 1, "--adapter", "good"]
TRAIN = ["--model", FLUX, "--pairs", PAIRS, "--steps", 1, "--rank", 2]
CASES = [  # script, what is wrong, arguments (later ones count), words that the line must hold
    # pictures
    *((sample, f"picture: {name}", [*DRAW, "--image", "good.png", f"{name}"], [name, "not an image that can be read"])
      for name in ("truncated.png", "flipped.png", "empty.png", "text.png", "folder.png", "bomb.png", "float.tiff",
                   "none.png")),
    (sample, "no picture", ["--model", "no_dsd.json", "--prompt", "a", "--width", 32, "--height", 32], ["--image"]),
    # text
    (sample, "no prompt", ["--model", "no_dsd.json", "--image", "good.png", "--width", 32, "--height", 32], ["--prompt"]),
    (sample, "empty prompt", [*DRAW, "--prompt", ""], ["--prompt: empty"]),
    (sample, "blank prompt", [*DRAW, "--prompt", "a", " \n"], ["--prompt: empty"]),
    (sample, "control character", [*DRAW, "--prompt", "a \x1b[2J critter"], ["control character '\\x1b'"]),
    (sample, "not Unicode", [*DRAW, "--prompt", "a \udcff critter"], ["control character '\\udcff'"]),
    (generate_grids, "missing prompts", ["--model", FLUX, "--prompts", "none.txt"], ["none.txt"]),
    (generate_grids, "prompts of three parts", ["--model", FLUX, "--prompts", "prompts.txt"], ["prompts.txt, line 1"]),
    (generate_grids, "blank prompts", ["--model", FLUX, "--prompts", "blank.txt"], ["blank.txt: no prompt"]),
    (generate_grids, "prompts in UTF-16", ["--model", FLUX, "--prompts", "utf16.txt"], ["utf16.txt", "UTF-8"]),
    (generate_grids, "prompts in Latin-1", ["--model", FLUX, "--prompts", "latin.txt"], ["latin.txt", "UTF-8"]),
    (generate_grids, "prompts with control characters", ["--model", FLUX, "--prompts", "control.txt"],
     ["control.txt, line 2"]),
    (generate_grids, "a picture as prompts", ["--model", FLUX, "--prompts", "good.png"], ["good.png", "UTF-8"]),
    (generate_grids, "a folder as prompts", ["--model", FLUX, "--prompts", "empty"], ["--prompts empty"]),
    # models
    *((script, "missing model", ["--model", "nowhere", *args], ["no FLUX model at nowhere"])
      for script, args in ((generate_grids, []), (finetune, ["--pairs", PAIRS]), (sample, DRAW[2:]))),
    (generate_grids, "missing model in a folder", ["--model", "empty/nowhere"], ["no FLUX model at empty/nowhere"]),
    (generate_grids, "a file as model", ["--model", "good.png"], ["no FLUX model at good.png"]),
    *((script, "VLM as model", ["--model", VLM, *args], ["model_index.json missing"])
      for script, args in ((generate_grids, []), (finetune, ["--pairs", PAIRS]), (sample, DRAW[2:]))),
    (generate_grids, "model without parts", ["--model", "model"], ["cannot load model"]),
    (generate_grids, "model without a tokenizer", ["--model", "no_tokenizer_2"], ["cannot load no_tokenizer_2"]),
    (finetune, "model without its transformer", [*TRAIN, "--model", "no_transformer"], ["cannot load no_transformer"]),
    (generate_grids, "model whose weights are cut", ["--model", "cut"], ["cannot load cut"]),
    (finetune, "model whose weights are cut", [*TRAIN, "--model", "cut"], ["cannot load cut"]),
    (generate_grids, "pickle named safetensors", ["--model", "pickled"], ["cannot load pickled"]),
    (generate_grids, "model in pickle", ["--model", "bin"], ["cannot load bin"]),
    (generate_grids, "another pipeline", ["--model", "stable"], ["stable is a StableDiffusionPipeline"]),
    (finetune, "a Control model", [*TRAIN, "--model", "control"], ["128 channels"]),
    (generate_grids, "broken dsd.json", ["--model", "no_json"], ["dsd.json: not a JSON file"]),
    (generate_grids, "a word for a number", ["--model", "many"], ["--steps many"]),
    (generate_grids, "a list for an object", ["--model", "list"], ["dsd.json", "must be an object"]),
    (generate_grids, "missing LLM", ["--model", FLUX, "--llm", "nowhere"], ["--llm nowhere"]),
    (generate_grids, "VLM as LLM", ["--model", FLUX, "--llm", VLM], ["not a chat model"]),
    (generate_grids, "FLUX as LLM", ["--model", FLUX, "--llm", FLUX], ["not a chat model"]),
    *((curate, f"VLM {name}", ["--grids", GRIDS, "--vlm", name], ["model"])
      for name in ("nowhere", "empty", FLUX, "no_weights", "pickled_vlm")),
    (sample, "missing VLM", [*DRAW, "--enhance", "nowhere"], ["no vision-language model at nowhere"]),
    (sample, "FLUX as VLM", [*DRAW, "--enhance", FLUX], ["no vision-language model"]),
    *((sample, f"adapter: {name}", [*DRAW, "--adapter", name], ["does not fit this model"])
      for name in ("narrow", "mixed_ranks", "cut_adapter", "flipped_adapter", "pickled_adapter", "too_many_layers")),
    *((sample, f"adapter: {name}", [*DRAW, "--adapter", name], ["no adapter"]) for name in ("empty", "nowhere", "bin_adapter")),
    (sample, "no adapter anywhere", ["--model", "no_dsd.json", *DRAW[2:-2], "--width", 32, "--height", 32],
     ["finetune.py first"]),
    # data
    (curate, "no grids", ["--grids", "empty"], ["run generate_grids.py first"]),
    (curate, "empty grids", ["--grids", "no_grids"], ["no grids"]),
    *((curate, f"grids: {name}", ["--grids", name], [f"{name}/grids.jsonl, line 1"])
      for name in ("garbage", "deep", "binary", "other")),
    (curate, "a grid outside its folder", ["--grids", "outside_grid", "--vlm", VLM], ["outside_grid names '../good.png'"]),
    (curate, "a lost grid", ["--grids", "lost_grid", "--vlm", VLM], ["lost_grid/000000.png"]),
    (curate, "a grid of a billion rows", ["--grids", "huge_grid", "--vlm", VLM], ["rows"]),
    (curate, "panels of 4 pixels", ["--grids", "small_grid", "--vlm", VLM], ["(4, 4)"]),
    (finetune, "missing pairs", [*TRAIN, "--pairs", "empty"], ["no pairs in empty; run curate.py first"]),
    (finetune, "no pairs", [*TRAIN, "--pairs", "no_pairs"], ["no pairs in no_pairs"]),
    *((finetune, f"pairs: {name}", [*TRAIN, "--pairs", name], [f"{name}/metadata.jsonl, line 1"])
      for name in ("garbage", "deep", "binary", "records", "numbers", "lists")),
    (finetune, "a pair without words", [*TRAIN, "--pairs", "wordless"], ["wordless/metadata.jsonl, line 2", "empty"]),
    (finetune, "a pair outside its folder", [*TRAIN, "--pairs", "outside"], ["outside names '../good.png'"]),
    (finetune, "a pair elsewhere", [*TRAIN, "--pairs", "absolute"], ["absolute names"]),
    (finetune, "cut picture", [*TRAIN, "--pairs", "cut_picture"], ["cut_picture/images/000001_0.png"]),
    (finetune, "lost picture", [*TRAIN, "--pairs", "lost"], ["lost/images/000001_0.png"]),
    (finetune, "pictures of two sizes", [*TRAIN, "--pairs", "sizes"], ["(48, 48)"]),
    # settings
    *((script, f"{flag} {value}", [*args, flag, value], [flag.removeprefix("--")])
      for script, args, flag, value in (
          *((generate_grids, ["--model", FLUX], flag, value) for flag, value in (
              ("--steps", 0), ("--steps", -3), ("--steps", 1.5), ("--steps", "many"), ("--count", 0), ("--batch_size", -1),
              ("--panel", -32), ("--seed", -1), ("--seed", 10**30), ("--guidance_scale", "nan"),
              ("--family", "twins"))),
          (curate, ["--grids", GRIDS], "--batch_size", 0), (curate, ["--grids", GRIDS], "--limit", -2),
          (curate, ["--grids", GRIDS], "--tolerance", -1), (curate, ["--grids", GRIDS], "--caption", "poem"),
          (finetune, TRAIN, "--steps", 0), (finetune, TRAIN, "--rank", 0), (finetune, TRAIN, "--rank", 10_000),
          (finetune, TRAIN, "--ema", 1), (finetune, TRAIN, "--shift", 0),
          (finetune, TRAIN, "--learning_rate", -1), (finetune, TRAIN, "--learning_rate", "inf"),
          (finetune, TRAIN, "--precision", "fp8"), (finetune, TRAIN, "--save_every", 0), (finetune, TRAIN, "--accumulate", 0),
          (sample, DRAW, "--steps", 0), (sample, DRAW, "--width", 0), (sample, DRAW, "--width", 33),
          (sample, DRAW, "--height", 35), (sample, DRAW, "--seed", -5), (sample, DRAW, "--image_guidance", "inf"),
          (sample, DRAW, "--batch_size", 0))),
    (generate_grids, "panels that do not fit the patches", ["--model", FLUX, "--panel", 33], ["33 pixels", "multiples of"]),
    (finetune, "frame weights of 0", [*TRAIN, "--frame_weights", 0, 0], ["--frame_weights"]),
    (finetune, "pictures that do not fit the patches", [*TRAIN, "--pairs", "odd"], ["36 pixels", "multiples of 8"]),
    (generate_grids, "two sources of prompts", ["--model", FLUX, "--prompts", "prompts.txt", "--llm", "x"], ["not allowed with"]),
    (generate_grids, "unknown option", ["--model", FLUX, "--color", "red"], ["--color"]),
    (generate_grids, "shortened option", ["--model", FLUX, "--step", 3], ["--step"]),
    *((script, "a device that is not there", [*args, "--device", "cuda"], ["no CUDA device"])
      for script, args in ((generate_grids, []), (curate, []), (finetune, TRAIN), (sample, DRAW))),
    (sample, "an unknown device", [*DRAW, "--device", "abacus"], ["abacus"]),
    *((script, f"folder of another run of {script.__name__}", [*args, "--out", f"{script.__name__}_run"],
       ["holds another run"])
      for script, args in ((generate_grids, ["--model", FLUX]), (curate, ["--grids", GRIDS]), (finetune, TRAIN), (sample, DRAW))),
    (generate_grids, "folder of another script", ["--model", FLUX, "--out", "sample_run"], ["not of such a run"]),
    *((generate_grids, f"{name}, to be overwritten", ["--model", FLUX, "--overwrite", "--out", name], ["not of such a run"])
      for name in ("other", "desktop", "broken_run", "sample_run")),
    (generate_grids, "a file as folder", ["--model", FLUX, "--out", "file"], ["file: "]),
    (generate_grids, "a folder in a file", ["--model", FLUX, "--out", "file/grids"], ["file/grids: "]),
    (generate_grids, "a folder that no one can make", ["--model", FLUX, "--out", "/proc/grids"], ["/proc/grids: "]),
]


def check(code, err, words):
    """One line, the words in it, and no traceback."""
    COUNTS["bad inputs"] += 1
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), err[-2000:]
    assert "Traceback" not in err


@pytest.mark.parametrize("script, args, words", [case[:1] + case[2:] for case in CASES],
                         ids=[f"{case[0].__name__}: {case[1]}" for case in CASES])
def test_bad_input_is_one_line_and_code_2_and_harms_nothing(script, args, words, broken, tmp_path, monkeypatch, flux, vlm,
                                                            pairs, one_grid, call):
    monkeypatch.chdir(broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folders, before = {FLUX: flux, VLM: vlm, PAIRS: pairs, GRIDS: one_grid}, state(broken)
    args = ["--out", tmp_path / "out", *(folders.get(arg, arg) for arg in args)]
    code, _, err = call(script, *args)
    check(code, err, words)
    assert state(broken) == before and not Path("/tmp/unpickled-by-dsd").exists()
    wanted = {".lock", "settings.json", "00000000.safetensors"}  # at most, and what was encoded before a model was found cut
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} <= wanted


@pytest.fixture(scope="session")
def one_grid(tmp_path_factory):
    """A folder as generate_grids.py leaves it, with one grid."""
    folder = tmp_path_factory.mktemp("one")
    dsd.build_grid([critter(7, [i, 0, 0]) for i in range(4)]).save(folder / "000000.png")
    dsd.append_records(folder / "grids.jsonl", [{
        "file": "000000.png", "prompt": "p", "subject": "s", "family": "subject", "rows": 2, "columns": 2}])
    return folder


@pytest.mark.parametrize("script, args, words", [
    ("finetune.py", [], "no pairs in runs/pairs"), ("generate_grids.py", ["--model", "nowhere"], "no FLUX model")])
def test_bad_input_in_a_process_of_its_own(script, args, words, tmp_path):
    check(2, run_script(script, *args, cwd=tmp_path, code=2)[1], [words])
    assert not list(tmp_path.iterdir())


# ---- permission, a full disk -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def without_rights():
    """Root may do everything: for a moment nobody in particular."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public():
    """A folder that everyone may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def stopped(main, capsys):
    """The exit code and stderr of a `main` under dsd.run."""
    with pytest.raises(SystemExit) as stop:
        dsd.run(main)
    return stop.value.code, capsys.readouterr().err


def test_a_picture_without_permission(public, capsys):
    critter(7, [1, 0, 0]).save(public / "secret.png")
    dsd.open_image(public / "secret.png")
    (public / "secret.png").chmod(0)
    with without_rights():
        check(*stopped(lambda: dsd.open_image(public / "secret.png"), capsys), ["secret.png", "Permission denied"])


def test_a_read_only_output_folder(public, capsys):
    (public / "out").mkdir(mode=0o755)
    with without_rights():
        for out in ("out", "new"):
            check(*stopped(lambda: dsd.open_out(public / out, {"step": "sample"}, []), capsys), [out, "Permission denied"])
    assert [p.name for p in public.iterdir()] == ["out"] and not list((public / "out").iterdir())


@contextlib.contextmanager
def room(size):
    """A full disk: no file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def writers(folder):
    """Everything that writes a file, by the file's name: {name: a function that writes it, larger with a larger n}."""
    transformer = dsd.add_lora(dsd.widen(random_transformer()), 2)
    parameters = [torch.nn.Parameter(torch.ones(5_000))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].sum().backward()
    optimizer.step()
    return {
        "records.jsonl": lambda n: dsd.append_records(folder / "records.jsonl", [{"n": n, "text": "x" * 40}] * n),
        "whole.jsonl": lambda n: dsd.write_records(folder / "whole.jsonl", [{"n": n}] * n),
        "value.json": lambda n: dsd.write_json(folder / "value.json", list(range(n))),
        "image.png": lambda n: dsd.save_image(noise_image(n, 10), folder / "image.png"),
        "sheet.png": lambda n: dsd.contact_sheet([[(noise_image(n, 10), str(n))]], folder / "sheet.png"),
        dsd.ADAPTER_FILE: lambda n: dsd.save_adapter(transformer, folder, torch.float32 if n > 9 else torch.float16),
        "step.safetensors": lambda n: dsd.save_checkpoint(folder / "step.safetensors", parameters, optimizer, None, n),
    }


@pytest.mark.parametrize("name", list(writers(Path())))
def test_a_full_disk_leaves_the_file_that_was_there_and_nothing_half_written(name, tmp_path, capsys):
    write = writers(tmp_path)[name]
    for before in (None, 2):  # with and without an older file
        if before:
            write(before)
        files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with room(len(files.get(name, b"")) // 2 + 10 if name != "records.jsonl" else len(files.get(name, b"")) + 10):
            code, err = stopped(lambda: write(1000), capsys)
        check(code, err, [name, "cannot write"])
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} in (files, {**files, "records.jsonl": files.get(name, b"")})
    write(1000)  # there is room again
    assert (tmp_path / name).read_bytes() != files[name]


def test_a_script_on_a_full_disk_goes_on_when_there_is_room(broken, flux, tmp_path, monkeypatch, call):
    monkeypatch.chdir(broken)
    run = [generate_grids, "--model", flux, "--count", 20, "--steps", 1, "--batch_size", 1]  # the largest file: the overview
    assert call(*run, "--out", tmp_path / "whole")[0] == 0
    with room((tmp_path / "whole" / "overview.png").stat().st_size - 1):
        check(*call(*run, "--out", tmp_path / "full")[::2], ["overview.png", "make room"])
    assert not list((tmp_path / "full").glob("*.part")) and not (tmp_path / "full" / "overview.png").exists()
    assert call(*run, "--out", tmp_path / "full")[0] == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "full").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


# ---- other runs in the output folder ---------------------------------------------------------------------------------
def test_overwrite_replaces_a_run_and_leaves_what_is_not_its_own(flux, tmp_path, call):
    run = [generate_grids, "--model", flux, "--steps", 1, "--out", tmp_path / "out"]
    assert call(*run, "--count", 3)[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    check(*call(*run, "--count", 2, "--seed", 1)[::2], ["holds another run"])
    assert call(*run, "--count", 2, "--seed", 1, "--overwrite")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", "000000.png", "000001.png", "grids.jsonl", "notes.txt", "overview.png", "settings.json"]
    before = state(tmp_path / "out")
    del before["overview.png"]  # it is made again, from the same pictures
    assert call(*run, "--count", 2, "--seed", 1, "--overwrite")[0] == 0  # the same run: it goes on, nothing is deleted
    assert before.items() <= state(tmp_path / "out").items()


def test_a_run_that_wrote_nothing_yet_is_no_obstacle(flux, tmp_path, call, monkeypatch):
    def fail(*args, **parts):
        raise dsd.DsdError("cannot load it")
    with monkeypatch.context() as patch:
        patch.setattr(dsd, "load_pipeline", fail)
        assert call(generate_grids, "--model", flux, "--count", 1, "--steps", 2, "--out", tmp_path)[0] == 2
    assert call(generate_grids, "--model", flux, "--count", 1, "--steps", 1, "--out", tmp_path)[0] == 0


def test_transcripts_that_cannot_be_read_are_refused_and_kept(one_grid, vlm, tmp_path, call):
    run = [curate, "--grids", one_grid, "--vlm", vlm, "--out", tmp_path]
    call(*run)
    whole = (tmp_path / "transcripts.jsonl").read_text()
    for text, words in (("nonsense\n" + whole, ["transcripts.jsonl, line 1"]),
                        (whole.replace('"verdict"', '"word"'), ["verdict"]),
                        (whole.replace('"prompt": "p"', '"prompt": "q"'), ["of other grids"])):
        (tmp_path / "transcripts.jsonl").write_text(text)
        check(*call(*run)[::2], words)
        assert (tmp_path / "transcripts.jsonl").read_text() == text


def test_no_accepted_pair_says_so_and_what_to_change(one_grid, tmp_path, call, monkeypatch):
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(curate, "ask", lambda model, processor, cases, *rest: ["I cannot tell."] * len(cases))
    check(*call(curate, "--grids", one_grid, "--out", tmp_path)[::2], ["none of 6 pairs", "make more or better grids"])
    assert json.loads((tmp_path / "summary.json").read_text())["unparsable"] == 6  # counted and kept for reading
    assert {r["answer"] for r in dsd.read_records(tmp_path / "transcripts.jsonl")} == {"I cannot tell."}
    check(*call(finetune, "--pairs", tmp_path, "--out", tmp_path / "adapter")[::2], ["no pairs", "curate.py"])


# ---- a loss that is not a number -------------------------------------------------------------------------------------
def test_nan_stops_at_its_sample_and_keeps_the_last_good_checkpoint(flux, pairs, tmp_path, call, monkeypatch):
    run = [finetune, "--model", flux, "--pairs", pairs, "--steps", 20, "--rank", 2, "--batch_size", 1, "--save_every", 1,
           "--out", tmp_path]  # this seed draws pair 3 for the first time at step 8
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", lambda *args: (_ for _ in ()).throw(dsd.DsdError("after the encoding")))
        assert call(*run)[0] == 2
    shard = tmp_path / "cache" / "00000000.safetensors"
    tensors = load_file(shard)
    tensors["x_0"][3, 0, 0] = float("nan")
    save_file(tensors, shard)
    check(*call(*run)[::2], ["not a number at step", dsd.read_records(pairs / "metadata.jsonl")[3]["target_file_name"],
                             "--learning_rate"])
    log, checkpoint = dsd.read_records(tmp_path / "log.jsonl"), load_file(tmp_path / "checkpoint.safetensors")
    assert 0 < len(log) < 20 and checkpoint["step"] == len(log)  # of the last good step
    assert all(tensor.isfinite().all() for tensor in checkpoint.values())
    assert not (tmp_path / dsd.ADAPTER_FILE).exists()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    check(*call(*run)[::2], [f"not a number at step {len(log)}"])  # again at the same sample
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_or_cache_is_refused(flux, pairs, tmp_path, call):
    run = [finetune, "--model", flux, "--pairs", pairs, "--steps", 1, "--rank", 2, "--validate_every", 9, "--out", tmp_path]
    assert call(*run)[0] == 0
    for file in (tmp_path / "checkpoint.safetensors", tmp_path / "cache" / "00000000.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-10])
        check(*call(*run)[::2], [file.name if file.name.startswith("check") else "cache", "delete"])
        file.write_bytes(whole)


# ---- unusual, and used correctly -------------------------------------------------------------------------------------
RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_pixels(mode="RGB"):
    """Red on the left, blue on the right, large enough for lossy formats."""
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    return image.convert(mode)


def with_alpha():
    image = two_pixels("RGBA")
    image.putalpha(0)
    return image


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise makes it upright
    return {"exif": exif}


UNUSUAL = {  # name -> (file, how to save it, its colours at the left and at the right or None, its size)
    "grey": ("a.png", two_pixels("L"), {}, ((76,) * 3, (29,) * 3), (64, 32)),
    "palette": ("a.png", two_pixels("P"), {}, (RED, BLUE), (64, 32)),
    "transparent": ("a.png", with_alpha(), {}, ((255,) * 3, (255,) * 3), (64, 32)),
    "CMYK": ("a.jpg", two_pixels("CMYK"), {"quality": 100}, (RED, BLUE), (64, 32)),
    "16 bits": ("a.png", Image.new("I;16", (64, 32), 32896), {}, ((128,) * 3, (128,) * 3), (64, 32)),
    "EXIF-rotated": ("a.jpg", two_pixels(), {"quality": 100, **turned()}, None, (32, 64)),
    "animated": ("a.gif", two_pixels("P"), {"save_all": True, "append_images": [Image.new("P", (64, 32), 0)]}, (RED, BLUE),
                 (64, 32)),
    "one pixel": ("a.png", Image.new("RGB", (1, 1), RED), {}, (RED, RED), (1, 1)),
    "1x10000": ("a.png", Image.new("RGB", (1, 10_000), BLUE), {}, (BLUE, BLUE), (1, 10_000)),
    "named otherwise": ("a.txt", two_pixels(), {"format": "PNG"}, (RED, BLUE), (64, 32)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_read_as_they_look(name, tmp_path):
    COUNTS["unusual inputs"] += 1
    file, image, options, colours, size = UNUSUAL[name]
    image.save(tmp_path / file, **options)
    opened = dsd.open_image(tmp_path / file)
    assert opened.mode == "RGB" and opened.size == size
    if colours is None:  # upright: red above, blue below
        points, colours = [(16, 8), (16, 56)], (RED, BLUE)
    else:
        points = [(size[0] // 4, size[1] // 2), (3 * size[0] // 4, size[1] // 2)]
    for point, colour in zip(points, colours):
        assert all(abs(a - b) <= 3 for a, b in zip(opened.getpixel(point), colour))
    assert dsd.fit_panel(opened, 32, 32).size == (32, 32)


def test_sample_takes_them_all_and_every_script_takes_unusual_text(flux, tmp_path, monkeypatch, broken, call):
    files = []
    for name, (file, image, options, *_) in UNUSUAL.items():
        files.append(tmp_path / f"{name}{Path(file).suffix}")
        image.save(files[-1], **options)
    code, _, err = call(sample, "--model", flux, "--adapter", broken / "good", "--steps", 1, "--out", tmp_path / "out",
                        "--image", *files, "--prompt", "ein Wesen \u2014 \u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u732b \U0001f431",
                        "--batch_size", 10)
    assert code == 0, err
    assert "does not know" in err and "\u732b" in err  # said, not silently passed over
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert json.loads(image.text["dsd"])["prompt"].endswith("\u732b \U0001f431")
    assert len(list((tmp_path / "out").glob("[0-9]*.png"))) == len(UNUSUAL)


def test_a_prompts_file_with_blank_and_repeated_lines_and_a_byte_order_mark(flux, tmp_path, call):
    COUNTS["unusual inputs"] += 1
    line = "a fox | in the snow | at noon | in a cave | by moonlight"
    (tmp_path / "prompts.txt").write_text(f"\n{line}\n  \n{line}\r\nein Füchslein | a | b | c | d", encoding="utf-8-sig")
    code, _, err = call(generate_grids, "--model", flux, "--steps", 1, "--prompts", tmp_path / "prompts.txt",
                        "--out", tmp_path / "out")
    assert code == 0 and "prompts.txt, line 4: there already" in err
    assert [r["subject"] for r in dsd.read_records(tmp_path / "out" / "grids.jsonl")] == ["a fox", "ein Füchslein"]


def test_what_is_listed_twice_counts_once(pairs, one_grid, tmp_path, capsys):
    COUNTS["unusual inputs"] += 2
    shutil.copytree(pairs, tmp_path / "pairs")
    once = (pairs / "metadata.jsonl").read_text()
    (tmp_path / "pairs" / "metadata.jsonl").write_text(once + once.splitlines(True)[2])
    assert finetune.read_pairs(tmp_path / "pairs") == dsd.read_records(pairs / "metadata.jsonl")
    assert "1 pairs are listed twice" in capsys.readouterr().err
    (tmp_path / "grids.jsonl").write_text(2 * (one_grid / "grids.jsonl").read_text())
    args = type("Args", (), {"grids": tmp_path, "limit": None})
    assert [n for n, _ in curate.read_grids(args)] == [0] and "listed twice" in capsys.readouterr().err


@pytest.mark.parametrize("script", [generate_grids, finetune], ids=["generate_grids", "finetune"])
def test_what_of_a_long_prompt_is_not_read_is_said(script, flux, pairs, tmp_path, call, monkeypatch):
    """sample.py's is in test_scripts.py."""
    COUNTS["unusual inputs"] += 1
    shutil.copytree(pairs, tmp_path / "pairs")
    long = "a critter " + "red " * 80 + "with a hat"
    dsd.append_records(tmp_path / "pairs" / "metadata.jsonl", [dsd.read_records(pairs / "metadata.jsonl")[0] | {"prompt": long}])
    (tmp_path / "prompts.txt").write_text(f"a critter | {long} | in space | in a cave | at noon\n")
    monkeypatch.setattr(finetune, "train", lambda *args: (_ for _ in ()).throw(dsd.DsdError("after the encoding")))
    args = ["--prompts", tmp_path / "prompts.txt"] if script is generate_grids else ["--pairs", tmp_path / "pairs", "--rank", 2]
    _, _, err = call(script, "--model", flux, "--steps", 1, "--out", tmp_path / "out", *args)
    warnings = [line for line in err.splitlines() if "T5" in line and "not read" in line]
    assert len(warnings) == 1 and ("at noon" in warnings[0] if script is generate_grids else "red with a hat" in warnings[0])
