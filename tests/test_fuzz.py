"""Random damage to pictures, adapters and records: each file is used correctly or refused by the project's own error.

The damage is drawn from fixed seeds. Correctly means: a damaged picture or adapter that is accepted holds the very pixels or
weights of the sound one (both carry checksums). A record has no checksum, since a user may edit it: what is accepted must be
whole records of the right kind that name files inside their folder."""

import argparse
import contextlib
import copy
import json
import random

import pytest
import torch
from conftest import COUNTS, critter, give_random_weights, noise_image, random_transformer
from test_model import stock_pipe

import curate
import dsd
import finetune


def damage(data, draw):
    """`data` with one flipped bit, or one to three injuries: bytes changed, cut off, taken out, repeated, put in, set to zero."""
    if draw.random() < .5:
        place = draw.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1:]
    for _ in range(draw.randint(1, 3)):
        a, b = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
        near = min(b, a + draw.choice([1, 1, 2, 8, 64]))
        data = draw.choice([
            lambda: data[:a] + bytes(draw.randrange(256) for _ in data[a:near]) + data[near:],
            lambda: data[:a] + bytes(c ^ 1 << draw.randrange(8) for c in data[a:near]) + data[near:],
            lambda: data[:a],
            lambda: data[:a] + data[near:],
            lambda: data[:b] + data[a:],
            lambda: data[:a] + bytes(near - a) + data[near:],
            lambda: data[:a] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 20))) + data[a:],
        ])()
    return data


def bend(records, draw):
    """JSON lines of `records`, in one of which a random value, at any depth, is another one or missing."""
    records = copy.deepcopy(records)
    place, key = draw.choice([(part, key) for record in records for part in parts(record) for key in part])
    if draw.random() < .2:
        del place[key]
    else:
        place[key] = draw.choice([None, True, -1, 0, 7.5, 10**40, float("nan"), float("inf"), "", " ", "../x.png", "\0", "\ud800",
                                  "/etc/hostname", [], [[]], {}, {"a": 1}, ["x", "y"], "x" * 5000])
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parts(value):
    """A dictionary and all dictionaries in it."""
    return [value, *(inner for v in value.values() if isinstance(v, dict) for inner in parts(v))]


def injure(records, draw):
    """JSON lines of `records`, wrong in their values or in their bytes."""
    if draw.random() < .5:
        return bend(records, draw)
    return damage("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(), draw)


def refused(load, *args):
    """What a loader returns, None if it refuses its input in one line; any other exception is a failure."""
    COUNTS["random corruptions"] += 1
    try:
        return load(*args)
    except dsd.DsdError as error:
        assert 0 < len(str(error).splitlines()) < 2
        return None


@pytest.mark.parametrize("kind", ["RGB", "P", "RGBA", "L"])
def test_damaged_pictures_are_refused_or_hold_the_same_pixels(tmp_path, kind):
    draw, accepted = random.Random(kind), 0
    critter(7, [1, 0, 0]).convert(kind).save(tmp_path / "sound.png")  # in noise every flipped bit breaks the compression
    sound, data = dsd.open_image(tmp_path / "sound.png"), (tmp_path / "sound.png").read_bytes()
    for _ in range(100):
        (tmp_path / "damaged.png").write_bytes(damage(data, draw))
        image = refused(dsd.open_image, tmp_path / "damaged.png")
        accepted += image is not None
        assert image is None or (image.size == sound.size and image.tobytes() == sound.tobytes())
    assert accepted < 50


@pytest.mark.parametrize("suffix", ["jpg", "gif", "webp", "tiff", "bmp"])
def test_damaged_pictures_without_a_checksum_are_refused_or_opened(tmp_path, suffix):
    """Nothing in such a file tells a changed pixel from a right one."""
    draw = random.Random(suffix)
    noise_image(24, 16).save(tmp_path / f"sound.{suffix}", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    data = (tmp_path / f"sound.{suffix}").read_bytes()
    for _ in range(40):
        (tmp_path / f"damaged.{suffix}").write_bytes(damage(data, draw))
        image = refused(dsd.open_image, tmp_path / f"damaged.{suffix}")
        assert image is None or image.mode == "RGB"


def test_damaged_adapters_are_refused_or_hold_the_same_weights(tmp_path):
    draw, transformer, accepted = random.Random(1), random_transformer(), 0
    student = give_random_weights(dsd.add_lora(dsd.widen(copy.deepcopy(transformer)), 2))
    dsd.save_adapter(student, tmp_path)
    wanted, data = dsd.lora_state(student), (tmp_path / dsd.ADAPTER_FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")  # its small first part says what the rest is

    def load():
        pipe = stock_pipe(copy.deepcopy(transformer))
        dsd.load_adapter(pipe, tmp_path)
        assert set(pipe.transformer.x_embedder.scaling.values()) == {1.0}
        return dsd.lora_state(pipe.transformer)

    for i in range(160):
        damaged = damage(data, draw) if i % 2 else damage(data[:header], draw) + data[header:]
        (tmp_path / dsd.ADAPTER_FILE).write_bytes(damaged)
        found = refused(load)
        accepted += found is not None
        assert found is None or (found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted))
    assert accepted < 80


GRID = {"file": "000000.png", "prompt": "a grid", "subject": "a critter", "family": "subject", "rows": 2, "columns": 2}
PAIR = {"reference_file_name": "images/a.png", "target_file_name": "images/b.png", "prompt": "a zwölf critter"}
ASKED = [{"grid": 0, "panels": [i, j], "prompt": "a grid", "family": "subject", "subject": "a critter", "verdict": "yes",
          "reason": "yes", "captions": {str(i): "this", str(j): "that"}}
         for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]


def test_damaged_pairs_are_refused_or_name_pictures_inside_their_folder(tmp_path):
    draw = random.Random(2)
    records = [{**PAIR, "prompt": f"zwölf critters, {i}"} for i in range(4)]
    for _ in range(200):
        (tmp_path / "metadata.jsonl").write_bytes(injure(records, draw))
        for pair in refused(finetune.read_pairs, tmp_path) or []:
            assert isinstance(pair["prompt"], str) and pair["prompt"].strip()
            for side in ("reference_file_name", "target_file_name"):
                with contextlib.suppress(dsd.DsdError):
                    assert dsd.inside(tmp_path, pair[side]).resolve().is_relative_to(tmp_path.resolve())


def test_damaged_grids_and_transcripts_are_refused_or_make_whole_pairs(tmp_path):
    draw, args = random.Random(3), argparse.Namespace(grids=tmp_path, limit=None)
    for _ in range(150):
        (tmp_path / "grids.jsonl").write_bytes(injure([{**GRID, "file": f"{i:06d}.png"} for i in range(3)], draw))
        for _, grid in refused(curate.read_grids, args) or []:
            assert 1 <= grid["rows"] <= 8 and 1 <= grid["columns"] <= 8
            assert all(isinstance(grid[name], str) for name in ("file", "prompt", "subject", "family"))
        (tmp_path / "transcripts.jsonl").write_bytes(injure(ASKED, draw))
        waiting, records = refused(curate.read_transcripts, tmp_path / "transcripts.jsonl", [{0: GRID}]) or ([], [])
        assert not records or (waiting == [] and [r["panels"] for r in records[:6]] == [r["panels"] for r in ASKED])
        assert all(isinstance(pair["prompt"], str) for pair in curate.metadata(records))


def test_damaged_settings_are_refused_or_of_the_right_kind(tmp_path):
    draw = random.Random(4)
    defaults = {"steps": 20, "shift": 3.0, "precision": "no", "frame_weights": [1.0, 1.0], "gradient_checkpointing": False}
    for _ in range(150):
        (tmp_path / "dsd.json").write_bytes(injure([{"finetune": defaults}], draw))
        found = refused(lambda: dsd.model_settings(tmp_path, "finetune", argparse.Namespace(), **defaults))
        for name, value in (found or {}).items():
            assert isinstance(value, (int, float) if name == "shift" else type(defaults[name]))
            assert name not in ("steps", "shift") or 0 <= value < float("inf")
