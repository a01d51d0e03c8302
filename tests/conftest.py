"""What the tests share: a model folder, pairs to train on, and ways to run the scripts."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dsd  # first: it silences the libraries' notices

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import FluxControlPipeline, FluxTransformer2DModel
from PIL import Image

import curate
from miniature import world

COUNTS = collections.Counter()  # what was tried, for the README
TIMEOUT = 1800  # seconds; no measure of speed: it only ends what hangs


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.write_line(
            "tried: " + ", ".join(f"{n} {what}" for what, n in sorted(COUNTS.items()))
        )


# ---- models and data -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def flux():
    return ROOT / "miniature" / "flux"


@pytest.fixture(scope="session")
def vlm():
    return ROOT / "miniature" / "vlm"


@pytest.fixture
def pipe(flux):
    """A FluxControlPipeline of the model folder, fresh for each test, since adapters change it."""
    return dsd.load_pipeline(FluxControlPipeline, flux)


def random_transformer(seed=0, guidance_embeds=False, heads=2):
    """A transformer of random weights that fits the miniature's text encoders; 64 channels, not widened."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )


def random_inputs(batch=2, h=4, w=8, seed=1):
    """x, condition (B, N, 64), sigma (B,), text (embeds, pooled), position ids of a canvas of h x w latent pixels."""
    g = torch.Generator().manual_seed(seed)
    x, condition = torch.randn(2, batch, h * w // 4, 64, generator=g)
    text = torch.randn(batch, 7, 128, generator=g), torch.randn(batch, 64, generator=g)
    return x, condition, torch.rand(batch, generator=g), text, dsd.position_ids(h, w)


@torch.no_grad()
def predict(transformer, tokens, sigma, text, ids, guidance_scale=3.5):
    """The velocity that a transformer predicts, without gradients."""
    return dsd.run_transformer(transformer, tokens, sigma, text, ids, guidance_scale)


def give_random_weights(transformer, scale=0.05, seed=3):
    """Stand in for training: all trainable LoRA weights of a transformer take random values."""
    g = torch.Generator().manual_seed(seed)
    for p in transformer.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) * scale
    return transformer


def noise_image(width, height, seed=0):
    raw = torch.randint(
        256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(raw.numpy())


def critter(identity, context, pose=(0.0, 0.16, 1.16, 0.0)):
    """One rendered panel as an image: identity is a number, context three numbers."""
    pixels = world.render(
        world.identity_of([identity]), torch.tensor([context]), torch.tensor([pose]), 32
    )
    return dsd.to_images(pixels)[0]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder as curate.py writes it: 8 ordered pairs of critters from 4 grids, each subject in two settings."""
    folder, records = tmp_path_factory.mktemp("pairs"), []
    (folder / "images").mkdir()
    for grid in range(4):
        contexts = {0: (grid, 0, 0), 1: (7 - grid, 2, 3)}
        for panel, context in contexts.items():
            critter(1234 + grid, context).save(folder / curate.panel_file(grid, panel))
        (identity,) = world.identity_of([1234 + grid])
        captions = {
            str(panel): world.panel_caption(identity, context)
            for panel, context in contexts.items()
        }
        records.append(
            {
                "grid": grid,
                "panels": [0, 1],
                "subject": "critter",
                "family": "subject",
                "verdict": "yes",
                "captions": captions,
            }
        )
    dsd.write_json(folder / "metadata.jsonl", curate.training_pairs(records))
    return folder


# ---- running the scripts ---------------------------------------------------------------------------------------------
def run_script(script, *args, cwd, code=0):
    """A script in a process of its own, or with a name like miniature.pretrain a module; its exit code must be `code`.

    Returns (stdout, stderr)."""
    program = [ROOT / script] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [sys.executable, *map(str, [*program, *args])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module or its main, *args): run it in this process, which saves seconds -> (exit code, out, err)."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        code = 0
        try:
            dsd.run_main(getattr(module, "main", module))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A picture of another size than the model's panels."""
    path = tmp_path_factory.mktemp("reference") / "round horned critter.png"
    critter(4321, [1, 0, 0]).resize((90, 64)).save(path)
    return path


@pytest.fixture(scope="session")
def commands(flux, vlm, pairs, reference):
    """The four steps at tiny settings: {script: its arguments}. The training is on rendered pairs."""
    return {
        "generate_grids": ["--model", flux, "--count", 6, "--steps", 4, "--batch_size", 2],
        "curate": ["--vlm", vlm, "--tolerance", 9, "--batch_size", 12],
        "finetune": [
            "--model",
            flux,
            "--pairs",
            pairs,
            "--steps",
            6,
            "--rank",
            4,
            "--batch_size",
            2,
            "--save_every",
            4,
            "--validate_every",
            3,
            "--precision",
            "no",
        ],
        "sample": [
            "--model",
            flux,
            "--image",
            reference,
            "--steps",
            3,
            "--batch_size",
            2,
            "--seed",
            0,
            1,
            "--prompt",
            "a {name} in space at noon",
            "a critter in a cave",
        ],
    }


@pytest.fixture(scope="session")
def chain(commands, tmp_path_factory):
    """A folder in which the four steps have run, and what they printed: (folder, {script: (stdout, stderr)})."""
    folder = tmp_path_factory.mktemp("chain")
    return folder, {
        script: run_script(f"{script}.py", *args, cwd=folder) for script, args in commands.items()
    }


def pictures(folder):
    """The PNG files of a folder: {name: bytes}."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def written(folder):
    """What scripts wrote below a folder: {name: bytes}, without the locks; of measured times only that they exist."""

    def content(path):
        if path.name == "training_state.pt":  # the same objects have more than one pickle
            return torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.numpy().tobytes(), torch.load(path)
            )
        if path.name == "table.md":  # of evaluate.py: it names the command, and so the folder
            return None
        return re.sub(rb'"seconds": ([^[,]+|\[[^]]*\])', b"", path.read_bytes())

    return {
        path.relative_to(folder).as_posix(): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
