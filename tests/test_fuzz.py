"""Random damage to pictures, adapters and records: each file is used correctly or refused by the
project's own error.

The damage is drawn from fixed seeds. An accepted adapter has weights of the right shapes, an
accepted record the right fields."""

import dsd

import argparse
import copy
import json
import random

import pytest
from conftest import COUNTS, critter, give_random_weights, random_transformer
from diffusers import FluxControlPipeline
from peft import get_peft_model_state_dict

import curate
import finetune


def injure(data, draw):
    """`data` with one injury: what is between two places is changed, cut, repeated or zeroed."""
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    near = min(b, a + draw.choice([1, 8, 64]))
    flipped = bytes(c ^ 1 << draw.randrange(8) for c in data[a : a + 1])
    injuries = [
        data[:a] + flipped + data[a + 1 :],
        data[:a] + draw.randbytes(near - a) + data[near:],
        data[:a],
        data[:a] + data[near:],
        data[:b] + data[a:],
        data[:a] + bytes(near - a) + data[near:],
        data[:a] + draw.randbytes(draw.randint(1, 20)) + data[a:],
    ]
    return draw.choice(injuries)


def damage(data, draw):
    """`data` with one to three injuries."""
    for _ in range(draw.randint(1, 3)):
        data = injure(data, draw)
    return data


WRONG_VALUES = [None, True, -1, 7.5, 10**40, float("nan"), "", "x", "\0", "\ud800", [], {"a": 1}]


def bend(records, draw):
    """JSON lines of `records`, damaged in their bytes, or with a wrong or a missing field."""
    records = [dict(record) for record in records]
    in_bytes = draw.random() < 0.3
    if not in_bytes:
        record = draw.choice(records)
        name = draw.choice(sorted(record))
        record[name] = draw.choice(WRONG_VALUES)
        if draw.random() < 0.2:
            del record[name]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    return damage(data, draw) if in_bytes else data


def used(load, argument, file, data):
    """What a loader makes of a file of this content, None if it refuses it in one line."""
    COUNTS["random corruptions"] += 1
    file.write_bytes(data)
    try:
        return load(argument)
    except dsd.DsdError as error:
        assert len(str(error).splitlines()) == 1
        return None


PICTURES = "RGB.png P.png RGBA.png L.png RGB.jpg RGB.gif RGB.webp RGB.tiff RGB.bmp"


@pytest.mark.parametrize("name", PICTURES.split())
def test_damaged_pictures_are_refused_or_opened(name, tmp_path):
    draw, file = random.Random(name), tmp_path / name
    critter(7, [1, 0, 0]).convert(file.stem).save(file)
    data = file.read_bytes()
    images = [used(dsd.open_image, file, file, damage(data, draw)) for _ in range(60)]
    assert all(image.mode == "RGB" for image in images if image)


def test_damaged_adapters_are_refused_or_loaded_as_finite_weights_of_the_right_shapes(tmp_path):
    draw, transformer, file = random.Random(1), random_transformer(), tmp_path / dsd.ADAPTER_FILE
    student = give_random_weights(dsd.add_lora(dsd.widen(copy.deepcopy(transformer)), 2))
    dsd.save_adapter(student, tmp_path, {"frames": 2})
    wanted, data, accepted = get_peft_model_state_dict(student), file.read_bytes(), 0
    header = 8 + int.from_bytes(data[:8], "little")  # its small first part says what the rest is

    def load(folder):
        pipe = FluxControlPipeline(None, None, None, None, None, None, copy.deepcopy(transformer))
        dsd.load_adapter(pipe, folder)
        return pipe

    for i in range(100):
        damaged = damage(data, draw) if i % 2 else damage(data[:header], draw) + data[header:]
        pipe = used(load, tmp_path, file, damaged)
        if pipe:
            accepted += 1
            for name, tensor in get_peft_model_state_dict(pipe.transformer).items():
                assert tensor.isfinite().all() and tensor.shape == wanted[name].shape
    assert 0 < accepted < 60


def test_damaged_records_are_refused_or_have_the_right_fields(tmp_path):
    draw = random.Random(2)
    args = argparse.Namespace(grids=tmp_path, pairs=tmp_path, seed=0, validation_grids=1)
    grid = {"prompt": "a grid", "subject": "a fox", "family": "subject", "rows": 2, "columns": 2}
    grids = [grid | {"file": f"{i}.png"} for i in range(3)]
    for grid in grids:
        (tmp_path / grid["file"]).touch()
    pair = {"reference_file_name": "a.png", "prompt": "a fox"}
    pairs = [pair | {"target_file_name": f"{i}.png", "grid": i} for i in range(4)]
    for _ in range(300):
        found = used(curate.read_grids, args, tmp_path / "grids.jsonl", bend(grids, draw))
        for grid in (found or {}).values():
            for name in ("file", "prompt", "subject", "family"):
                assert isinstance(grid[name], str)
        found = used(finetune.read_pairs, args, tmp_path / "metadata.jsonl", bend(pairs, draw))
        train, held_out = found or ([], [])
        for pair in [*train, *held_out]:
            for name in ("reference_file_name", "target_file_name"):
                assert isinstance(pair[name], str)
            assert pair["prompt"].strip()
