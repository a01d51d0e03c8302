"""dsd.py, the parts without a model: the flow, tokens, guidance, pictures, options, files."""

import dsd

import argparse
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, noise_image
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- flow, tokens, guidance ----------------------------------------------------------------------
def test_x_sigma_and_v_lead_to_the_noise_and_to_the_picture():
    x_0, eps, sigma = random(3, 5, 64), random(3, 5, 64, seed=1), torch.tensor([0.2, 0.5, 0.9])
    x_sigma, v, s = dsd.interpolate(x_0, eps, sigma), dsd.velocity(x_0, eps), sigma.view(3, 1, 1)
    torch.testing.assert_close(x_sigma + (1 - s) * v, eps)
    torch.testing.assert_close(x_sigma - s * v, x_0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampled_sigmas_are_the_schedulers_own_levels(shift):
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(5))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=uniform.tolist())
    sigmas = dsd.sample_sigmas(1000, shift, torch.Generator().manual_seed(5))
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1])  # the last one is the appended zero


@pytest.mark.parametrize("weights, wanted", [([], 2.5), ([(1, 0)], 1), ([(1, 3)], 3.25)])
def test_the_loss_weighs_the_two_frames_and_is_else_the_mean_squared_error(weights, wanted):
    v = random(2, 16, 64)
    error = torch.ones(2, 2, 8, 64)  # tokens as rows and columns of a canvas of 4 x 16
    error[:, :, 4:] = -2  # the left frame is off by 1, the right one by 2
    losses = dsd.two_frame_loss(v + error.view(2, 16, 64), v, 4, 16, *weights)
    assert [round(x.item(), 4) for x in losses] == [wanted, 1, 4]


def test_tokens_and_position_ids_are_diffusers_own_and_a_canvas_is_split_into_its_frames():
    left, right = random(2, 16, 6, 4), random(2, 16, 6, 4, seed=1)
    latents = dsd.canvas(left, right)
    tokens = dsd.pack(latents)
    assert torch.equal(latents, torch.cat([left, right], 3))
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 8))
    assert torch.equal(dsd.unpack(tokens, 6, 8), latents)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 8, "cpu", torch.float32)
    assert torch.equal(dsd.position_ids(6, 16), ids)
    first, second = dsd.split_frames(tokens, 6, 8)
    assert torch.equal(first, dsd.pack(left)) and torch.equal(second, dsd.pack(right))


GUIDANCE = [  # s_i, s_t, passes
    (1, 1, 1),
    (0, 0, 1),
    (1, 0, 1),
    (1, 3, 2),  # text guidance alone, which the released pipeline ignores
    (2, 2, 2),
    (2, 0, 2),
    (1.5, 2.5, 3),
]


@pytest.mark.parametrize("s_i, s_t, passes", GUIDANCE)
def test_guided_velocity_is_the_formula_and_runs_only_the_passes_it_needs(s_i, s_t, passes):
    calls = []

    def model(x, condition, text):  # stands in for the transformer: some function of its inputs
        calls.append(len(x))
        embeds, pooled = text
        words = embeds.mean((1, 2)).view(-1, 1, 1) * x + pooled.mean(1).view(-1, 1, 1)
        return torch.sin(x + 2 * condition) + words

    text, null = (random(2, 7, 8), random(2, 4, seed=1)), (random(2, 7, 8, seed=2), random(2, 4))
    x, condition = random(2, 5, 64, seed=4), random(2, 5, 64, seed=5)
    v_00 = model(x, 0 * condition, null)
    v_i0 = model(x, condition, null)
    v_it = model(x, condition, text)
    calls.clear()
    v = dsd.guided_velocity(model, x, condition, text, null, s_i, s_t)
    torch.testing.assert_close(v, v_00 + s_i * (v_i0 - v_00) + s_t * (v_it - v_i0))
    assert calls == [len(x)] * passes


# ---- grids and pictures --------------------------------------------------------------------------
@pytest.mark.parametrize("rows, columns", [(2, 2), (1, 3), (3, 2)])
def test_cutting_a_grid_gives_its_panels_in_reading_order(rows, columns):
    panels = [noise_image(6, 4, seed) for seed in range(rows * columns)]
    assert dsd.cut_grid(make_image_grid(panels, rows, columns), rows, columns) == panels


def test_pixels_run_from_minus_one_to_one_and_keep_their_place():
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((2, 0), (255, 0, 255))
    pixels = dsd.to_pixels([image, image])
    assert pixels.shape == (2, 3, 2, 3)
    assert pixels[0, :, 0, 2].tolist() == [1, -1, 1] and pixels[1].sum() == -14
    assert pixels.is_contiguous()  # a VAE's error is 1,000 times larger on channels-last tensors
    assert dsd.to_images(pixels / 2 + 0.5) == [image, image]


def test_other_proportions_are_cropped_at_the_centre_or_padded_with_white_as_the_authors_do():
    image = noise_image(40, 30)
    assert dsd.fit_image(image, 18, 18) == ImageOps.fit(image, (18, 18), Image.BICUBIC)
    padded = ImageOps.pad(image, (18, 18), Image.BICUBIC, "white")
    assert dsd.fit_image(image, 18, 18, "pad") == padded


def test_a_contact_sheet_holds_every_picture_and_no_line_of_a_caption_is_lost(tmp_path):
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")
    narrow, heights = Image.new("RGB", (1, 90), "white"), []
    for caption in ("short", "a caption long enough for several lines of text"):
        rows = [[(red, caption), (blue, "short")], [(red, ""), (narrow, "")]]
        dsd.contact_sheet(rows, tmp_path / "a.png", side=64)
        sheet = Image.open(tmp_path / "a.png")
        heights.append(sheet.height)
        counts = {colour: n for n, colour in sheet.getcolors(10_000)}
        assert counts.pop((255, 0, 0)) == 2 * 64 * 64 and counts.pop((0, 0, 255)) == 128 * 64
        assert counts.pop((255, 255, 255)) and sum(counts.values()) > 50  # letters
    assert heights[1] == heights[0] + 2 * 15  # three lines of 21 letters


# ---- options, errors, files ----------------------------------------------------------------------
RANKS = [  # what is typed, the folder's dsd.json, what the adapter says, the rank
    ("", {}, {}, 2),
    ("", {"finetune": {"rank": 8}}, {}, 8),
    ("", {"sample": {"rank": 8}}, {}, 2),
    ("", {"finetune": {"rank": "8"}}, {"rank": 4}, 4),
    ("--rank 3", {"finetune": {"rank": 8}}, {"rank": 4}, 3),
]


@pytest.mark.parametrize("flags, folder, more, rank", RANKS)
def test_flags_go_before_the_models_folder_and_that_before_defaults(
    flags, folder, more, rank, monkeypatch, tmp_path
):
    dsd.write_json(tmp_path / "dsd.json", folder)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    parser = dsd.Parser("", "out")
    parser.add_argument("--model", default=tmp_path)
    parser.add_argument("--rank", type=int, default=2)
    assert parser.parse("finetune", **more).rank == rank


ERRORS = [  # an error, the exit code, what is said
    (dsd.DsdError("no adapter;\ntrain one"), 2, "error: no adapter; train one"),
    (PermissionError(13, "Permission denied", "a.png"), 2, "error: a.png: Permission denied"),
    (
        torch.OutOfMemoryError("9 GB"),
        2,
        "error: out of memory; try --batch_size 1, --gradient_checkpointing, --quantize nf4, "
        "--offload model or smaller pictures (9 GB)",
    ),
    (KeyboardInterrupt(), "\nstopped; the same command goes on from what is saved", ""),
]


@pytest.mark.parametrize("error, code, said", ERRORS)
def test_run_main_turns_an_error_into_one_line_and_an_exit_code(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        dsd.run_main(main)
    assert stop.value.code == code and capsys.readouterr().err.strip() == said


def test_libraries_print_no_notices_and_a_console_shows_the_codes_of_letters_it_lacks():
    code = "import dsd; dsd.run_main(lambda: print('\\u732b.png'))"
    command, console = [sys.executable, "-c", code], os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=console, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\\u732b.png\n", "")


def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(tmp_path):
    (tmp_path / "diffusers.py").write_text("raise KeyboardInterrupt")
    command, path = [sys.executable, ROOT / "sample.py"], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=path, capture_output=True)
    assert done.returncode != 0 and done.stderr == b""


def test_records_come_back_as_they_were_written(tmp_path):
    file, text = tmp_path / "some" / "records.jsonl", 'zwölf\u2028Boxkämpfer\nund "mehr"'
    records = [{"a": 1, "text": text}, {"text": "", "b": [1, 2.5, None]}]
    dsd.write_json(file, records)
    assert dsd.read_records(file, "text") == records and file.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n", b'{"text": 7}\n', b'{"text": "a'])
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(dsd.DsdError, match="^[^\n]*records.jsonl, line 2: [^\n]*$"):
        dsd.read_records(tmp_path / "records.jsonl", "text")


def test_records_are_utf_8_and_blank_lines_count_for_nothing(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('\n{"text": "\u00e9"}\r\n \n', encoding="utf-8-sig")
    assert dsd.read_records(file, "text") == [{"text": "\u00e9"}]
    file.write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(dsd.DsdError, match="records.jsonl: give a UTF-8 file"):
        dsd.read_records(file, "text")


def test_a_file_is_whole_or_as_it_was_before(tmp_path):
    file = tmp_path / "file.json"
    dsd.write_json(file, {"old": 1})
    with pytest.raises(dsd.DsdError), dsd.writing(file) as part:
        part.write_text("half")
        raise OSError(28, "No space left")
    assert dsd.read_json(file) == {"old": 1} and list(tmp_path.iterdir()) == [file]


def test_an_output_folder_is_for_one_run_once_something_is_written(tmp_path):
    def begin(steps, count=3):
        args = argparse.Namespace(out=tmp_path, device="cpu", steps=steps, count=count)
        lock = dsd.open_out(args, "sample", changeable=["count"], image="a")
        lock.release()

    begin(steps=2)
    begin(steps=3)
    dsd.write_json(tmp_path / "result.json", {})
    begin(steps=3, count=4)
    with pytest.raises(dsd.DsdError, match="another run or other files .its steps was 3."):
        begin(steps=2)


def test_a_model_named_in_another_way_is_the_same_run(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model", "model/", "./model", "../" + tmp_path.name + "/model"):
        model = f"{tmp_path}/{name}"
        args = argparse.Namespace(out=tmp_path / "out", model=model, enhance=model)
        dsd.open_out(args, "sample", changeable=[]).release()
        dsd.write_json(tmp_path / "out" / "result.json", {})


def test_records_name_models_the_same_way_from_every_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for folder, path, name in [
        (tmp_path, dsd.MINIATURE / "flux", "miniature/flux"),
        (tmp_path, "owner/model", "owner/model"),
        (tmp_path, "model", "model"),
        (tmp_path, "model/../model", "model"),
        (tmp_path, tmp_path / "model", "model"),
        (dsd.MINIATURE, "flux", "miniature/flux"),
    ]:
        monkeypatch.chdir(folder)
        assert dsd.name_of(path) == name
