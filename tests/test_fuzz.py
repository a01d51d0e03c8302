"""Random damage to pictures, adapters and records: each file is used correctly or refused by the project's own error.

The damage is drawn from fixed seeds. PNG carries checksums, so what is accepted must show the very pixels. An adapter
has none: what is accepted must be finite weights of the right shapes. An accepted record has the right fields."""

import dsd  # first: see its head

import argparse
import copy
import json
import random

import pytest
import torch
from conftest import COUNTS, critter, give_random_weights, random_transformer
from diffusers import FluxControlPipeline
from peft import get_peft_model_state_dict

import curate
import finetune


def damage(data, draw):
    """`data` with one to three injuries: a flipped bit, bytes changed, cut off, taken out, repeated, zeroed, put in."""
    for _ in range(draw.randint(1, 3)):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        near = min(b, a + draw.choice([1, 8, 64]))
        data = draw.choice([
            data[:a] + bytes(c ^ 1 << draw.randrange(8) for c in data[a:a + 1]) + data[a + 1:],
            data[:a] + draw.randbytes(near - a) + data[near:], data[:a], data[:a] + data[near:], data[:b] + data[a:],
            data[:a] + bytes(near - a) + data[near:], data[:a] + draw.randbytes(draw.randint(1, 20)) + data[a:]])
    return data


def bend(records, draw):
    """JSON lines of `records`, damaged in their bytes, or with a field missing or of another value."""
    records = copy.deepcopy(records)
    if draw.random() < .3:
        return damage("".join(json.dumps(record) + "\n" for record in records).encode(), draw)
    record = draw.choice(records)
    name = draw.choice(sorted(record))
    record[name] = draw.choice([None, True, -1, 7.5, 10**40, float("nan"), "", "x.png", "\0", "\ud800", [], {"a": 1}])
    if draw.random() < .2:
        del record[name]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def refused(load, *args):
    """What a loader returns, None if it refuses its input in one line; any other exception is a failure."""
    COUNTS["random corruptions"] += 1
    try:
        return load(*args)
    except dsd.DsdError as error:
        assert len(str(error).splitlines()) == 1
        return None


@pytest.mark.parametrize("mode, suffix", [(mode, "png") for mode in ("RGB", "P", "RGBA", "L")] + [
    ("RGB", suffix) for suffix in ("jpg", "gif", "webp", "tiff", "bmp")])
def test_damaged_pictures_are_refused_or_opened(mode, suffix, tmp_path):
    draw, file, accepted = random.Random(mode + suffix), tmp_path / f"picture.{suffix}", 0
    critter(7, [1, 0, 0]).convert(mode).save(file)
    sound, data = dsd.open_image(file), file.read_bytes()
    for _ in range(60):
        file.write_bytes(damage(data, draw))
        image = refused(dsd.open_image, file)
        accepted += image is not None
        assert image is None or image.mode == "RGB"
        assert image is None or suffix != "png" or (image.size == sound.size and image.tobytes() == sound.tobytes())
    assert accepted < 40 or suffix != "png"


def test_damaged_adapters_are_refused_or_loaded_as_finite_weights_of_the_right_shapes(tmp_path):
    draw, transformer, accepted = random.Random(1), random_transformer(), 0
    student = give_random_weights(dsd.add_lora(dsd.widen(copy.deepcopy(transformer)), 2))
    dsd.save_adapter(student, tmp_path, {"frames": 2})
    wanted, data = get_peft_model_state_dict(student), (tmp_path / dsd.ADAPTER_FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")  # its small first part says what the rest is

    def load():
        pipe = FluxControlPipeline(None, None, None, None, None, None, copy.deepcopy(transformer))
        dsd.load_adapter(pipe, tmp_path)
        return get_peft_model_state_dict(pipe.transformer)

    for i in range(100):
        damaged = damage(data, draw) if i % 2 else damage(data[:header], draw) + data[header:]
        (tmp_path / dsd.ADAPTER_FILE).write_bytes(damaged)
        found = refused(load)
        accepted += found is not None
        assert found is None or all(t.isfinite().all() and t.shape == wanted[name].shape for name, t in found.items())
    assert 0 < accepted < 60


def test_damaged_records_are_refused_or_have_the_right_fields(tmp_path):
    draw = random.Random(2)
    args = argparse.Namespace(grids=tmp_path, pairs=tmp_path, limit=None, seed=0, validation_grids=1)
    grids = [{"file": f"{i}.png", "prompt": "a grid", "subject": "a fox", "family": "subject", "rows": 2, "columns": 2}
             for i in range(3)]
    pairs = [{"reference_file_name": "a.png", "target_file_name": f"{i}.png", "prompt": "a fox", "grid": i}
             for i in range(4)]
    for _ in range(300):
        (tmp_path / "grids.jsonl").write_bytes(bend(grids, draw))
        (tmp_path / "metadata.jsonl").write_bytes(bend(pairs, draw))
        for grid in (refused(curate.read_grids, args) or {}).values():
            assert 1 <= grid["rows"] <= 8 and 1 <= grid["columns"] <= 8
            assert all(isinstance(grid[name], str) for name in ("file", "prompt", "subject", "family"))
        for pair in [pair for part in refused(finetune.read_pairs, args) or [] for pair in part]:
            assert isinstance(pair["reference_file_name"], str) and isinstance(pair["target_file_name"], str)
            assert pair["prompt"].strip()
