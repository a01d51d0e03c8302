"""What the tests share: pairs to train on, small models, and ways to run the scripts."""

import collections
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import dsd

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from PIL import Image
from random_models import TRANSFORMER, make_flux

import curate
from miniature import world

ROOT = Path(__file__).resolve().parent.parent
COUNTS = collections.Counter()  # what was tried, for the README
TIMEOUT = 1800  # seconds; it only ends what hangs


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        tried = [f"{number} {what}" for what, number in sorted(COUNTS.items())]
        terminalreporter.write_line("tried: " + ", ".join(tried))


# ---- models and data -----------------------------------------------------------------------------
@pytest.fixture(scope="session")
def flux():
    return dsd.MINIATURE / "flux"


@pytest.fixture(scope="session")
def vlm():
    return dsd.MINIATURE / "vlm"


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    """A small model of FLUX.1-dev's classes and settings."""
    return make_flux(tmp_path_factory.mktemp("dev") / "FLUX.1-dev")


@pytest.fixture(scope="session")
def schnell(tmp_path_factory):
    return make_flux(tmp_path_factory.mktemp("schnell") / "FLUX.1-schnell", guidance_embeds=False)


@pytest.fixture
def pipe(flux):
    """The miniature, fresh for each test, since adapters change it."""
    return dsd.load_pipeline(FluxControlPipeline, flux, prompt_tokens=24)


def random_transformer(seed=0, guidance_embeds=False, heads=2):
    """A transformer of random weights that fits the miniature's text encoders, not widened."""
    torch.manual_seed(seed)
    size = TRANSFORMER | {"num_attention_heads": heads, "joint_attention_dim": 128}
    return FluxTransformer2DModel(guidance_embeds=guidance_embeds, **size)


def random_inputs(batch=2, h=4, w=8, seed=1):
    """x, condition (B, N, 64), sigma (B,), text and position ids for a random transformer.

    The canvas has h x w latent pixels; text is embeddings (B, 7, 128) and pooled ones (B, 64)."""
    generator = torch.Generator().manual_seed(seed)
    x, condition = torch.randn(2, batch, h * w // 4, 64, generator=generator)
    embeds = torch.randn(batch, 7, 128, generator=generator)
    pooled = torch.randn(batch, 64, generator=generator)
    sigma = torch.rand(batch, generator=generator)
    return x, condition, sigma, (embeds, pooled), dsd.position_ids(h, w)


@torch.no_grad()
def predict(transformer, tokens, sigma, text, ids, guidance_scale=3.5):
    """The velocity that a transformer predicts, without gradients."""
    return dsd.run_transformer(transformer, tokens, sigma, text, ids, guidance_scale)


def give_random_weights(transformer, scale=0.05, seed=3):
    """Stand in for training: all trainable weights of a transformer take random values."""
    generator = torch.Generator().manual_seed(seed)
    for p in transformer.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * scale
    return transformer


def noise_image(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def critter(identity, context):
    """One rendered panel as an image: identity is a number, context three numbers."""
    pose = torch.tensor([[0.0, 0.16, 1.16, 0.0]])
    identity = world.identity_of([identity])
    return dsd.to_images(world.render(identity, torch.tensor([context]), pose, 32))[0]


def difference(a, b):
    """The largest difference of two images, or of two lists of images, in grey levels."""
    a = a if isinstance(a, list) else [a]
    b = b if isinstance(b, list) else [b]
    return (dsd.to_pixels(a) - dsd.to_pixels(b)).abs().max().item() * 127.5


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder as curate.py writes it: 8 ordered pairs from 4 grids, each subject in 2 settings."""
    folder, records = tmp_path_factory.mktemp("pairs"), []
    (folder / "images").mkdir()
    for grid in range(4):
        contexts = [(grid, 0, 0), (7 - grid, 2, 3)]
        (identity,) = world.identity_of([1234 + grid])
        for panel, context in enumerate(contexts):
            critter(1234 + grid, context).save(folder / curate.panel_file(grid, panel))
            records.append(
                {
                    "reference_file_name": curate.panel_file(grid, 1 - panel),
                    "target_file_name": curate.panel_file(grid, panel),
                    "prompt": world.panel_caption(identity, context),
                    "grid": grid,
                }
            )
    dsd.write_json(folder / "metadata.jsonl", records)
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A picture of another size than the model's panels."""
    path = tmp_path_factory.mktemp("reference") / "round horned critter.png"
    critter(4321, [1, 0, 0]).resize((90, 64)).save(path)
    return path


# ---- running the scripts -------------------------------------------------------------------------
def words(*args):
    """A command line as a list: a text is split as a shell splits it, paths and numbers are not."""
    line = [shlex.split(arg) if isinstance(arg, str) else [str(arg)] for arg in args]
    return sum(line, [])


def run_script(script, *args, cwd, code=0):
    """A script in a process of its own, or a module like miniature.pretrain: (stdout, stderr)."""
    program = [ROOT / script] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [sys.executable, *program, *words(*args)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module or its main, *args, code=0): call a script here, which saves seconds of imports.

    It must end with this exit code. Returns what it printed: .out and .err."""

    def run(script, *args, code=0):
        monkeypatch.setattr(sys, "argv", [script.__name__, *words(*args)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        ended = 0
        try:
            dsd.run_main(getattr(script, "main", script))
        except SystemExit as stop:
            ended = stop.code
        printed = capsys.readouterr()
        assert ended == code, printed.err[-3000:]
        return printed

    return run


@pytest.fixture
def refused(run):
    """refused(module, *args): a script must end with code 2 and one line, which is returned."""

    def refused(*args):
        COUNTS["bad inputs"] += 1
        printed = run(*args, code=2).err
        lines = [line for line in re.split("[\r\n]", printed) if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in printed, printed[-3000:]
        return lines[0]

    return refused


@pytest.fixture(scope="session")
def commands(pairs, reference):
    """The four steps at tiny settings: {script: its arguments}. It trains on rendered pairs."""
    prompts = "'a {name} in space at noon' 'a critter in a cave'"
    training = "--steps 6 --rank 4 --batch_size 2 --save_every 4 --validate_every 3 --precision no"
    return {
        "generate_grids": ["--count 6 --steps 4 --batch_size 2"],
        "curate": ["--tolerance 9 --batch_size 12"],
        "finetune": [training, "--pairs", pairs],
        "sample": [f"--steps 3 --batch_size 2 --seed 0 1 --prompt {prompts} --image", reference],
    }


@pytest.fixture(scope="session")
def chain(commands, tmp_path_factory):
    """The four steps, run in processes of their own: (folder, {script: (stdout, stderr)})."""
    folder, printed = tmp_path_factory.mktemp("chain"), {}
    for script, args in commands.items():
        printed[script] = run_script(f"{script}.py", *args, cwd=folder)
    return folder, printed


def pictures(folder):
    """The PNG files of a folder: {name: bytes}."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def written(folder):
    """What scripts wrote below a folder: {name: bytes}, without locks and measured times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == "training_state.pt":  # the same objects have more than one pickle
            state = torch.load(path)
            tensor_bytes = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.numpy().tobytes(), state
            )
            found[name] = tensor_bytes
        elif path.name == "table.md":  # of evaluate.py: it names the command, and so the folder
            found[name] = None
        elif path.is_file() and path.name != ".lock":
            found[name] = re.sub(rb'"seconds": ([^[,]+|\[[^]]*\])', b"", path.read_bytes())
    return found
