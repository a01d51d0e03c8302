"""What a user gets wrong is answered with exit code 2 and one line that says what to do, never with a traceback, and
harms nothing that is there. What can be used is used correctly."""

import dsd  # first: see its head

import argparse
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
from diffusers import FluxControlPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import curate
import finetune
import generate_grids
import models
import sample


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/unpickled-by-dsd",)


# ---- a folder of broken things ---------------------------------------------------------------------------------------
def make_pictures():
    critter(7, [1, 0, 0]).save("good.png")
    data = bytearray(Path("good.png").read_bytes())
    Path("truncated.png").write_bytes(data[:len(data) // 2])
    data[len(data) // 2] ^= 4
    Path("flipped.png").write_bytes(data)
    Path("empty.png").touch()
    Path("text.png").write_text("this is no image")
    Image.new("1", (20_000, 20_000)).save("bomb.png")  # 400 million pixels in 50 kilobytes
    Image.new("F", (8, 8), 1e4).save("float.tiff")


def make_texts():
    Path("prompts.txt").write_text("a fox | in the snow | at noon\n")
    Path("blank.txt").write_text("\n \n\n")
    Path("utf16.txt").write_text("a fox | a | b | c | d\n", encoding="utf-16")
    Path("latin.txt").write_text("a f\u00f6x | a | b | c | d\n", encoding="latin-1")


def make_models(flux, vlm):
    def copy(name, source=flux, without=None):
        shutil.copytree(source, name, copy_function=lambda a, b: os.symlink(Path(a).resolve(), b),
                        ignore=lambda _, names: {without} & set(names))
        return Path(name)

    def replace(path, data):
        path.unlink()
        path.write_bytes(data)

    Path("empty").mkdir()
    for part in ("tokenizer_2", "transformer", "dsd.json"):
        copy(f"no_{part}", without=part)
    for name, data in (("cut", lambda d: d[:5000]), ("pickled", lambda d: pickle.dumps(Bomb()))):
        file = next((copy(name) / "transformer").glob("*.safetensors"))
        replace(file, data(file.read_bytes()))
    file = next((copy("bin") / "transformer").glob("*.safetensors"))
    file.unlink()
    (file.parent / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for name, path, key, value in (("stable", "model_index.json", "_class_name", "StableDiffusionPipeline"),
                                   ("kontext", "model_index.json", "_class_name", "FluxKontextPipeline"),
                                   ("fill", "transformer/config.json", "in_channels", 384),
                                   ("many", "dsd.json", "generate_grids", {"panel": "many"}),
                                   ("nested", "dsd.json", "generate_grids", {"panel": [32]}),
                                   ("list", "dsd.json", "generate_grids", [1])):
        file = copy(name) / path
        replace(file, json.dumps(json.loads(file.read_text()) | {key: value}).encode())
    replace(copy("no_json") / "dsd.json", b"{")
    file = next((copy("nan") / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    file.unlink()
    save_file(tensors | {"decoder.conv_out.bias": torch.full((3,), torch.nan)}, file, {"format": "pt"})
    copy("no_weights", vlm, "model.safetensors")
    copy("no_template", vlm, "chat_template.jinja")
    replace(copy("pickled_vlm", vlm) / "model.safetensors", pickle.dumps(Bomb()))
    tokenizer = models.vlm_tokenizer(["a", "fox"])
    tokenizer.chat_template = models.VLM_TEMPLATE
    tokenizer.save_pretrained("chat")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=1)).save_pretrained("chat")


def make_adapters(flux):
    dsd.save_adapter(give_random_weights(dsd.add_lora(dsd.widen(random_transformer()), 2)), "narrow", {})
    student = dsd.load_pipeline(FluxControlPipeline, flux).transformer
    dsd.save_adapter(give_random_weights(dsd.add_lora(dsd.widen(student), 2)), "good", {})
    file = Path("good") / dsd.ADAPTER_FILE
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("to_q.lora_A.weight"))
    for folder, change in (
            ("mixed_ranks", {name: tensors[name].repeat(2, 1)}), ("not_finite", {name: tensors[name] * torch.nan}),
            ("too_many_layers", {n.replace("blocks.0", "blocks.77"): t.clone() for n, t in tensors.items()})):
        Path(folder).mkdir()
        save_file(tensors | change, Path(folder) / dsd.ADAPTER_FILE)
    for k, facts in enumerate(([], {"width": [32]}, {"frames": 3}, {"prompt_tokens": "x"})):
        Path(f"facts_{k}").mkdir()
        save_file(tensors, Path(f"facts_{k}") / dsd.ADAPTER_FILE, {"lora_adapter_metadata": json.dumps({"dsd": facts})})
    Path("ordinary").mkdir()
    save_file({n: t for n, t in tensors.items() if "x_embedder" not in n}, Path("ordinary") / dsd.ADAPTER_FILE)
    for folder, data in (("cut_adapter", file.read_bytes()[:-100]), ("pickled_adapter", pickle.dumps(Bomb()))):
        Path(folder).mkdir()
        (Path(folder) / dsd.ADAPTER_FILE).write_bytes(data)
    Path("bin_adapter").mkdir()
    Path("bin_adapter/pytorch_lora_weights.bin").write_bytes(pickle.dumps(Bomb()))


def make_records(pairs):
    grid = {"file": "000000.png", "prompt": "p", "subject": "s", "family": "subject", "rows": 2, "columns": 2}
    pair = dsd.read_records(pairs / "metadata.jsonl")[0]
    for name, file, content in (
            ("other", "grids.jsonl", [{"file": "000000.png"}]), ("no_grids", "grids.jsonl", []),
            ("lost_grid", "grids.jsonl", [grid]), ("huge_grid", "grids.jsonl", [{**grid, "rows": 10**9}]),
            ("lone_panel", "grids.jsonl", [{**grid, "file": "good.png", "rows": 1, "columns": 1}]),
            ("no_pairs", "metadata.jsonl", []), ("records", "metadata.jsonl", [{"file_name": "a.png"}]),
            ("wordless", "metadata.jsonl", [pair, {**pair, "prompt": " "}]), ("lists", "metadata.jsonl", [[1, 2]]),
            ("numbers", "metadata.jsonl", [{**pair, "prompt": 7}])):
        shutil.copytree(pairs, name) if file == "metadata.jsonl" else Path(name).mkdir()
        (Path(name) / file).write_text("".join(json.dumps(r) + "\n" for r in content))
    for name, text in (("garbage", "no JSON\n"), ("deep", "[" * 100_000 + "\n"), ("binary", "\x00\x01\n")):
        Path(name).mkdir()
        for file in ("grids.jsonl", "metadata.jsonl"):
            (Path(name) / file).write_text(text)
    for name in ("cut_picture", "lost", "odd"):
        shutil.copytree(pairs, name)
    Path("cut_picture/images/000001_0.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    Path("lost/images/000001_0.png").unlink()
    for file in Path("odd/images").iterdir():
        critter(7, [1, 0, 0]).resize((36, 36)).save(file)


def make_folders():
    for step in ("generate_grids", "curate", "finetune", "sample"):
        dsd.write_json(f"{step}_run/settings.json", {"step": step, "seed": 77})
        Path(f"{step}_run/something.png").touch()
    Path("desktop").mkdir()
    Path("desktop/holiday.png").touch()
    dsd.write_json("broken_run/000000.png", {})
    Path("broken_run/settings.json").write_text('{"step": ')
    Path("file").touch()


@pytest.fixture(scope="module")
def broken(tmp_path_factory, flux, vlm, pairs):
    """A folder of broken things, to which no test may do any further harm."""
    folder, before = tmp_path_factory.mktemp("broken"), Path.cwd()
    os.chdir(folder)
    make_pictures(), make_texts(), make_models(flux, vlm), make_adapters(flux), make_records(pairs), make_folders()
    os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def one_grid(tmp_path_factory):
    """A folder as generate_grids.py leaves it, with one grid."""
    folder = tmp_path_factory.mktemp("one")
    make_image_grid([critter(7, [i, 0, 0]) for i in range(4)], 2, 2).save(folder / "000000.png")
    dsd.write_json(folder / "grids.jsonl", [{
        "file": "000000.png", "prompt": "p", "subject": "s", "family": "subject", "rows": 2, "columns": 2}])
    return folder


def files_in(folder):
    """Every file below a folder as it is: {name: (size, time of the last change)}."""
    return {p.relative_to(folder).as_posix(): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")
            if not p.is_dir() and p.name != ".lock"}


# ---- refused ---------------------------------------------------------------------------------------------------------
FLUX, VLM, PAIRS, GRIDS = "the FLUX folder", "the VLM folder", "the pairs", "a folder of one grid"  # put in by the test
GRID = ["--model", FLUX, "--count", 1, "--steps", 1]
CURATE = ["--grids", GRIDS, "--vlm", VLM]
TRAIN = ["--model", FLUX, "--pairs", PAIRS, "--steps", 1, "--rank", 2]
DRAW = ["--model", FLUX, "--image", "good.png", "--prompt", "a critter", "--steps", 1, "--adapter", "good"]
ARGS = {generate_grids: GRID, curate: CURATE, finetune: TRAIN, sample: DRAW}
CASES = [  # script, arguments after those above, words that the line must hold
    # pictures and texts
    *((sample, ["--image", "good.png", name], [f"{name}: not an image that can be read"]) for name in (
        "truncated.png", "flipped.png", "empty.png", "text.png", "bomb.png", "float.tiff", "none.png")),
    (sample, ["--image", "empty"], ["no reference picture"]), (sample, ["--prompt", ""], ["--prompt: empty"]),
    (sample, ["--prompt", "a", " \n"], ["--prompt: empty"]),
    (generate_grids, ["--prompts", "prompts.txt"], ["prompts.txt, line 1", "subject | setting"]),
    (generate_grids, ["--prompts", "blank.txt"], ["blank.txt: there is no prompt"]),
    *((generate_grids, ["--prompts", name], [name, "UTF-8"]) for name in ("utf16.txt", "latin.txt", "good.png")),
    *((generate_grids, ["--prompts", name], [f"{name}: "]) for name in ("none.txt", "empty")),
    (generate_grids, ["--prompts", "prompts.txt", "--llm", "x"], ["not allowed with"]),
    # models
    *((script, ["--model", name], [f"no model folder {name}"])
      for script in (generate_grids, finetune, sample) for name in ("nowhere", "empty/nowhere", "good.png")),
    *((script, ["--model", name], [f"{name}: not a FLUX model"])
      for script in (generate_grids, finetune, sample) for name in ("stable", "kontext", "fill", "chat", "empty")),
    *((generate_grids, ["--model", name], [f"cannot load {name}"])
      for name in ("no_tokenizer_2", "cut", "pickled", "bin")),
    *((finetune, ["--model", name], [name]) for name in ("no_transformer", "cut", "pickled")),
    *((script, ["--model", "nan"], ["not finite", "check the weights"]) for script in (generate_grids, sample)),
    (generate_grids, ["--model", "no_json"], ["no_json/dsd.json: not a JSON file"]),
    (generate_grids, ["--model", "many"], ["--panel", "many"]), (generate_grids, ["--model", "list"], ["dsd.json"]),
    (generate_grids, ["--model", "nested"], ["dsd.json"]),
    *((generate_grids, ["--llm", name], [f"--llm {name}", "not a chat model"]) for name in ("empty", VLM, FLUX)),
    (curate, ["--vlm", "nowhere"], ["no model folder nowhere"]), (generate_grids, ["--llm", "nowhere"], ["nowhere"]),
    *((curate, ["--vlm", name], [f"cannot load {name} as a vision-language model"])
      for name in ("empty", FLUX, "no_weights", "no_template", "pickled_vlm", "chat")),
    (sample, ["--enhance", "nowhere"], ["no model folder nowhere"]),
    (sample, ["--enhance", "chat"], ["cannot load chat as a vision-language model"]),
    # adapters
    *((sample, ["--adapter", name], [f"{name}/{dsd.ADAPTER_FILE}", "does not fit this model"])
      for name in ("narrow", "mixed_ranks", "cut_adapter", "pickled_adapter", "too_many_layers", "facts_0", "facts_1",
                   "facts_2", "facts_3")),
    (sample, ["--adapter", "not_finite"], ["not finite"]), (sample, ["--adapter", "ordinary"], ["ordinary LoRA"]),
    *((sample, ["--adapter", name], ["no adapter"]) for name in ("empty", "nowhere", "bin_adapter")),
    # records
    (curate, ["--grids", "empty"], ["run generate_grids.py first"]), (curate, ["--grids", "no_grids"], ["no grids"]),
    *((curate, ["--grids", name], [f"{name}/grids.jsonl, line 1"]) for name in ("garbage", "deep", "binary", "other")),
    (curate, ["--grids", "lost_grid"], ["lost_grid/000000.png"]), (curate, ["--grids", "huge_grid"], ["rows"]),
    (curate, ["--grids", "lone_panel"], ["one panel"]),
    (finetune, ["--pairs", "empty"], ["no pairs in empty; run curate.py first"]),
    (finetune, ["--pairs", "no_pairs"], ["no pairs"]), (finetune, ["--pairs", "wordless"], ["empty prompt"]),
    *((finetune, ["--pairs", name], [f"{name}/metadata.jsonl, line 1"])
      for name in ("garbage", "deep", "binary", "records", "numbers", "lists")),
    *((finetune, ["--pairs", name], [f"{name}/images/000001_0.png"]) for name in ("cut_picture", "lost")),
    (finetune, ["--pairs", "odd"], ["36 x 36 pixels", "multiples of 8"]),
    # numbers and options
    *((script, [flag, value], [flag]) for script, flag, values in (
        (generate_grids, "--steps", [0, -3, 1.5, "many"]), (generate_grids, "--count", [0]),
        (generate_grids, "--seed", [-1, 10**30]), (generate_grids, "--guidance_scale", ["nan", -1]),
        (generate_grids, "--family", ["twins"]), (generate_grids, "--color", ["red"]), (generate_grids, "--step", [3]),
        (curate, "--batch_size", [0]), (curate, "--tolerance", [-1]), (curate, "--caption", ["poem"]),
        (curate, "--max_new_tokens", [0]), (finetune, "--rank", [0, 10_000]), (finetune, "--shift", [0]),
        (finetune, "--learning_rate", [-1, "inf"]), (finetune, "--precision", ["fp8"]), (finetune, "--save_every", [0]),
        (finetune, "--accumulate", [0]), (finetune, "--frames", [3]), (sample, "--width", [0]),
        (sample, "--seed", [-5]), (sample, "--image_guidance", ["inf"]), (sample, "--device", ["abacus"]), 
        (sample, "--fit", ["stretch"]), (finetune, "--prompt_dropout", [2])) for value in values),
    (generate_grids, ["--panel", 33], ["33 x 33 pixels", "multiples of 8"]), (sample, ["--model"], ["--model"]),
    *((sample, [side, 35], ["35", "multiples of 8"]) for side in ("--width", "--height")),
    (finetune, ["--frame_weights", 0, 0], ["--frame_weights"]),
    *((script, ["--device", "cuda"], ["--device", "cuda"]) for script in ARGS),
    # output folders
    *((script, ["--out", f"{script.__name__}_run"], ["holds another run"]) for script in ARGS),
    *((generate_grids, ["--out", name], [f"{name} holds another run or other files"])
      for name in ("sample_run", "desktop")),
    (generate_grids, ["--out", "broken_run"], ["broken_run/settings.json"]),
    *((generate_grids, ["--out", name], [f"{name}: "]) for name in ("file", "file/grids", "/proc/grids")),
]


def check(code, err, words):
    """One line, the words in it, and no traceback."""
    COUNTS["bad inputs"] += 1
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), err[-2000:]
    assert "Traceback" not in err


@pytest.mark.parametrize("script, args, words", CASES,
                         ids=[f"{script.__name__} {' '.join(map(str, args))}" for script, args, _ in CASES])
def test_bad_input_is_one_line_and_code_2_and_harms_nothing(script, args, words, broken, tmp_path, monkeypatch, flux,
                                                            vlm, pairs, one_grid, call):
    monkeypatch.chdir(broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folders, before = {FLUX: flux, VLM: vlm, PAIRS: pairs, GRIDS: one_grid}, files_in(broken)
    given = [folders.get(arg, arg) for arg in ["--out", tmp_path / "out", *ARGS[script], *args]]
    for name, folder in folders.items():
        words = [word.replace(name, str(folder)) for word in words]
    check(*call(script, *given)[::2], words)
    assert files_in(broken) == before and not Path("/tmp/unpickled-by-dsd").exists()
    left = {name for name in files_in(tmp_path) if not name.startswith("out/cache/")}  # what was encoded may stay
    assert left <= {"out/settings.json", "out/grids.jsonl"}


def test_bad_input_in_a_process_of_its_own(tmp_path):
    check(2, run_script("finetune.py", cwd=tmp_path, code=2)[1], ["no pairs in runs/pairs", "run curate.py first"])
    assert not list(tmp_path.iterdir())


def test_a_model_without_defaults_needs_what_it_does_not_bring(broken, tmp_path, monkeypatch, call):
    monkeypatch.chdir(broken)
    for given, words in (([], "no adapter"), (["--adapter", "good"], "--prompt"),
                         (["--adapter", "good", "--prompt", "a", "--width", 32, "--height", 32], "--image")):
        check(*call(sample, "--model", "no_dsd.json", *given, "--out", tmp_path)[::2], [words])


# ---- permission, a full disk -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def without_rights():
    """Root may do everything: for a moment nobody in particular."""
    root = os.geteuid() == 0
    os.seteuid(65534) if root else None
    try:
        yield
    finally:
        os.seteuid(0) if root else None


@pytest.fixture
def public():
    """A folder that everyone may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def stopped(main, capsys):
    """The exit code and stderr of a `main` under dsd.run_main."""
    with pytest.raises(SystemExit) as stop:
        dsd.run_main(main)
    return stop.value.code, capsys.readouterr().err


def test_what_may_not_be_read_or_written_is_named(public, capsys):
    critter(7, [1, 0, 0]).save(public / "secret.png")
    (public / "secret.png").chmod(0)
    (public / "out").mkdir(mode=0o755)
    with without_rights():
        check(*stopped(lambda: dsd.open_image(public / "secret.png"), capsys), ["secret.png", "Permission denied"])
        for out in ("out", "new"):
            args = argparse.Namespace(out=public / out)
            check(*stopped(lambda: dsd.open_out(args, "sample", []), capsys), [out, "Permission denied"])
    assert {p.name for p in public.iterdir()} == {"out", "secret.png"} and not list((public / "out").iterdir())


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
    """Everything that writes a file: {its name: a function that writes it, larger with a larger n}."""
    student = dsd.add_lora(dsd.widen(random_transformer()), 2)

    def write_state(n):
        with dsd.writing(folder / "state.pt") as part:
            torch.save({"parameters": [torch.zeros(100 * n)]}, part)

    return {"whole.jsonl": lambda n: dsd.write_json(folder / "whole.jsonl", [{"n": n}] * n),
            "image.png": lambda n: dsd.save_image(noise_image(n, 10), folder / "image.png"),
            "sheet.png": lambda n: dsd.contact_sheet([[(noise_image(n, 10), str(n))]], folder / "sheet.png"),
            dsd.ADAPTER_FILE: lambda n: dsd.save_adapter(student, folder, {}, [torch.float16, torch.float32][n > 9]),
            "state.pt": write_state}


@pytest.mark.parametrize("name", list(writers(Path())))
def test_a_full_disk_leaves_the_file_that_was_there_and_nothing_half_written(name, tmp_path, capsys):
    write = writers(tmp_path)[name]
    for before in (None, 2):  # with and without an older file
        write(before) if before else None
        files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with room(len(files.get(name, b"")) // 2 + 10):
            code, err = stopped(lambda: write(1000), capsys)
        check(code, err, [name, "cannot write", "make room"])
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    write(1000)  # there is room again
    assert (tmp_path / name).read_bytes() != files[name]


@pytest.fixture
def run(flux, pairs):
    """A short training."""
    return [finetune, "--model", flux, "--pairs", pairs, "--rank", 2, "--batch_size", 1, "--validation_grids", 0]


def test_a_script_on_a_full_disk_goes_on_when_there_is_room(run, tmp_path, call):
    run += ["--steps", 2]
    assert call(*run, "--out", tmp_path / "whole")[0] == 0
    cached = next((tmp_path / "whole" / "cache").iterdir())
    with room(cached.stat().st_size - 1):  # while encoding
        check(*call(*run, "--out", tmp_path / "full")[::2], [cached.parent.name, "make room"])
    with room((tmp_path / "whole" / "checkpoint" / dsd.ADAPTER_FILE).stat().st_size - 1):  # while saving
        check(*call(*run, "--out", tmp_path / "full")[::2], ["checkpoint", "make room"])
    assert not list((tmp_path / "full").rglob("*.part"))
    assert call(*run, "--out", tmp_path / "full")[0] == 0
    assert (tmp_path / "full" / dsd.ADAPTER_FILE).read_bytes() == (tmp_path / "whole" / dsd.ADAPTER_FILE).read_bytes()


# ---- a run that cannot go on -----------------------------------------------------------------------------------------
def test_no_accepted_pair_says_so_and_a_transcript_that_cannot_be_read_is_kept(one_grid, tmp_path, call, monkeypatch):
    monkeypatch.setattr(curate, "load_vlm", lambda *args: (None, None))
    monkeypatch.setattr(curate, "ask", lambda model, processor, cases, *rest: ["I cannot tell."] * len(cases))
    run = [curate, "--grids", one_grid, "--out", tmp_path / "pairs"]
    check(*call(*run)[::2], ["none of 6 pairs", "make more or better grids"])
    file = tmp_path / "pairs" / "transcripts" / "000000.json"
    assert {r["answer"] for r in dsd.read_json(file)["pairs"]} == {"I cannot tell."}  # kept for reading
    assert dsd.read_json(tmp_path / "pairs" / "summary.json")["unparsable"] == 6
    check(*call(finetune, "--pairs", tmp_path / "pairs", "--out", tmp_path / "adapter")[::2], ["no pairs"])
    fields_missing = [json.dumps(dsd.read_json(file) | {"pairs": pairs}) for pairs in ([{}], 7)]
    for text in ("nonsense", "[1]", '{"picture": ', *fields_missing):
        file.write_text(text)
        check(*call(*run)[::2], ["transcripts/000000.json",
                                 "correct it or delete it" if text in fields_missing else "restore or delete it"])
        assert file.read_text() == text


def test_nan_stops_at_its_step_and_keeps_the_checkpoint(run, tmp_path, call):
    run += ["--out", tmp_path]
    assert call(*run, "--steps", 2)[0] == 0
    files = [*(tmp_path / "checkpoint").iterdir(), tmp_path / "log.jsonl", tmp_path / dsd.ADAPTER_FILE]
    kept = {file: file.read_bytes() for file in files}
    for file in (tmp_path / "cache").iterdir():
        tensors = load_file(file)
        save_file(tensors | {"x_0": tensors["x_0"] * torch.nan}, file)
    for _ in range(2):
        check(*call(*run, "--steps", 4)[::2], ["not finite at step 2", "checkpoint is kept", "--learning_rate"])
        assert all(file.read_bytes() == data for file, data in kept.items())


def test_a_damaged_checkpoint_or_cache_is_refused_and_nothing_in_it_is_run(run, tmp_path, call):
    run += ["--out", tmp_path]
    assert call(*run, "--steps", 1)[0] == 0
    checkpoint = tmp_path / "checkpoint" / "training_state.pt"
    whole = checkpoint.read_bytes()
    for data in (whole[:-10], b"", pickle.dumps(Bomb())):
        checkpoint.write_bytes(data)
        check(*call(*run, "--steps", 9)[::2], [checkpoint.name, "delete"])
    checkpoint.write_bytes(whole)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    check(*call(*run, "--steps", 9)[::2], ["cache", "delete"])
    assert not Path("/tmp/unpickled-by-dsd").exists()


# ---- unusual, and used correctly -------------------------------------------------------------------------------------
RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_colours(mode="RGB"):
    """Red on the left, blue on the right, large enough for lossy formats."""
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    return image.convert(mode)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter clockwise makes it upright
UNUSUAL = {  # name -> (file, picture, how to save it, its colours at the left and at the right)
    "grey": ("a.png", two_colours("L"), {}, [(76,) * 3, (29,) * 3]),
    "palette": ("a.png", two_colours("P"), {}, [RED, BLUE]),
    "transparent": ("a.png", Image.new("RGBA", (64, 32)), {}, [(255,) * 3] * 2),
    "CMYK": ("a.jpg", two_colours("CMYK"), {"quality": 100}, [RED, BLUE]),
    "16 bits": ("a.png", Image.new("I;16", (64, 32), 32896), {}, [(128,) * 3] * 2),
    "turned by EXIF": ("a.jpg", two_colours().rotate(90, expand=True), {"quality": 100, "exif": TURNED}, [RED, BLUE]),
    "animated": ("a.gif", two_colours("P"), {"save_all": True, "append_images": [Image.new("P", (64, 32))]},
                 [RED, BLUE]),
    "one pixel": ("a.png", Image.new("RGB", (1, 1), RED), {}, [RED, RED]),
    "1x10000": ("a.png", Image.new("RGB", (1, 10_000), BLUE), {}, [BLUE, BLUE]),
    "misnamed": ("a.bmp", two_colours(), {"format": "PNG"}, [RED, BLUE])}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_read_as_they_look(name, tmp_path):
    COUNTS["unusual inputs"] += 1
    file, image, options, colours = UNUSUAL[name]
    image.save(tmp_path / file, **options)
    opened = dsd.open_image(tmp_path / file)
    assert opened.mode == "RGB" and opened.size == (image.size[::-1] if "exif" in options else image.size)
    for share, colour in zip((1, 3), colours):
        found = opened.getpixel((share * opened.width // 4, opened.height // 2))
        assert all(abs(a - b) <= 3 for a, b in zip(found, colour))
    assert dsd.fit_image(opened, 32, 32).size == dsd.fit_image(opened, 32, 32, "pad").size == (32, 32)


def test_sample_takes_a_folder_of_them_and_unusual_text(flux, tmp_path, broken, call):
    COUNTS["unusual inputs"] += 2
    (tmp_path / "pictures").mkdir()
    for name, (file, image, options, _) in UNUSUAL.items():
        image.save(tmp_path / "pictures" / f"{name}{Path(file).suffix}", **options)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    prompt = "ein Wesen \u2014 \u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u732b \U0001f431"
    code, _, err = call(sample, "--model", flux, "--adapter", broken / "good" / dsd.ADAPTER_FILE, "--steps", 1,
                        "--prompt", prompt, "--image", tmp_path / "pictures", "--out", tmp_path / "out")
    assert code == 0 and "unknown to this model" in err and "\u732b" in err, err
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert json.loads(image.text["dsd"])["prompt"] == prompt
    assert len(list((tmp_path / "out").glob("[0-9]*.png"))) == len(UNUSUAL)


def test_a_prompts_file_with_blank_and_repeated_lines_and_a_byte_order_mark(tmp_path):
    COUNTS["unusual inputs"] += 1
    line, file = "a fox | in the snow | at noon | in a cave | by moonlight", tmp_path / "prompts.txt"
    file.write_text(f"\n{line}\n  \n{line}\r\nein Füchslein | a | b | c | d", encoding="utf-8-sig")
    grids = generate_grids.file_prompts(file, generate_grids.GRAMMAR)
    assert [grid["subject"] for grid in grids] == ["fox", "fox", "ein Füchslein"]  # each line has a seed of its own


def test_what_is_listed_twice_counts_once(pairs, one_grid, tmp_path):
    COUNTS["unusual inputs"] += 2
    for file, folder in (("metadata.jsonl", pairs), ("grids.jsonl", one_grid)):
        (tmp_path / file).write_text(2 * (folder / file).read_text())
    train, held_out = finetune.read_pairs(argparse.Namespace(pairs=tmp_path, seed=0, validation_grids=1))
    assert len(train) == 6 and len(held_out) == 2
    assert list(curate.read_grids(argparse.Namespace(grids=tmp_path, limit=None))) == [0]


def test_own_pairs_of_mixed_sizes_are_resized_to_one(pairs, tmp_path):
    COUNTS["unusual inputs"] += 1
    noise_image(90, 50).save(tmp_path / "a.png")
    args = argparse.Namespace(pairs=tmp_path, width=40, height=32)
    pair = {"reference_file_name": "a.png", "target_file_name": str(pairs / "images" / "000000_0.png")}
    assert {image.size for image in finetune.open_pair(args, pair)} == {(40, 32)}


def test_prompts_that_are_too_long_and_unknown_words_are_counted_in_one_line_each(pipe, capsys):
    COUNTS["unusual inputs"] += 2
    long = [f"a critter {'red ' * 80}{end}" for end in ("with a hat", "at noon")]
    dsd.warn_of_prompts(pipe, [*long, long[0], "a critter", "a zebra", "a zebra and a yak"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "2 of 5 prompts are longer" in lines[0] and "red with a hat" in lines[0]
    assert "2 words are unknown" in lines[1] and "yak zebra" in lines[1]
    dsd.warn_of_prompts(pipe, ["a round horned critter in space at noon"])
    assert not capsys.readouterr().err
