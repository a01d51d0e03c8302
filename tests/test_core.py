"""dsd.py, the parts without a model: the flow, tokens, losses, guidance, pictures, records."""

import json
import textwrap

import pytest
import torch
from conftest import noise_image
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

import curate
import dsd


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- rectified flow --------------------------------------------------------------------------------------------------
def test_x_sigma_and_v_lead_to_the_noise_and_to_the_picture():
    x_0, eps, sigma = random(3, 5, 64), random(3, 5, 64, seed=1), torch.tensor([.2, .5, .9])
    x_sigma, v, s = dsd.interpolate(x_0, eps, sigma), dsd.velocity(x_0, eps), sigma.view(3, 1, 1)
    torch.testing.assert_close(x_sigma + (1 - s) * v, eps)
    torch.testing.assert_close(x_sigma - s * v, x_0)


def test_sigma_0_is_the_picture_and_sigma_1_the_noise():
    x_0, eps = random(1, 5, 64), random(1, 5, 64, seed=1)
    assert torch.equal(dsd.interpolate(x_0, eps, torch.zeros(1)), x_0)
    assert torch.equal(dsd.interpolate(x_0, eps, torch.ones(1)), eps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampled_sigmas_are_the_schedulers_own_levels(shift):
    sigmas = dsd.sample_sigmas(1000, shift, torch.Generator().manual_seed(5))
    u = torch.rand(1000, generator=torch.Generator().manual_seed(5))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=u.tolist())
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1])  # the last one is the appended zero
    assert 0 <= sigmas.min() and sigmas.max() <= 1


def test_a_larger_shift_moves_sigmas_to_the_noise_and_the_seed_fixes_them():
    plain, shifted, again = (dsd.sample_sigmas(1000, s, torch.Generator().manual_seed(5)) for s in (1.0, 3.0, 3.0))
    assert (shifted > plain)[1:-1].all() and torch.equal(shifted, again)


@pytest.mark.parametrize("weights, wanted", [((1, 1), 2.5), ((1, 0), 1.0), ((0, 1), 4.0), ((1, 3), 3.25)])
def test_loss_weighs_the_two_frames(weights, wanted):
    h, w, v = 4, 16, random(2, 16, 64)
    error = torch.ones(2, 2, 8, 64)  # tokens as rows and columns: the left frame is off by 1, the right one by 2
    error[:, :, 4:] = -2
    loss, first, second = dsd.two_frame_loss(v + error.view(2, 16, 64), v, h, w, weights)
    assert [round(x.item(), 4) for x in (loss, first, second)] == [wanted, 1.0, 4.0]


def test_default_loss_is_the_mean_squared_error_over_the_canvas():
    v_pred, v = random(2, 16, 64), random(2, 16, 64, seed=1)
    torch.testing.assert_close(dsd.two_frame_loss(v_pred, v, 4, 16)[0], torch.nn.functional.mse_loss(v_pred, v))


# ---- tokens ----------------------------------------------------------------------------------------------------------
def test_pack_and_unpack_are_diffusers_own():
    latents = random(2, 16, 4, 12)
    tokens = dsd.pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 4, 12))
    assert torch.equal(dsd.unpack(tokens, 4, 12), FluxPipeline._unpack_latents(tokens, 4 * 8, 12 * 8, 8))


def test_unpack_inverts_pack():
    latents = random(2, 16, 6, 4)
    assert torch.equal(dsd.unpack(dsd.pack(latents), 6, 4), latents)


def test_position_ids_are_diffusers_own():
    assert torch.equal(dsd.position_ids(6, 16), FluxPipeline._prepare_latent_image_ids(1, 3, 8, "cpu", torch.float32))


def test_split_frames_separates_left_from_right():
    latents = torch.ones(2, 16, 6, 8)
    latents[..., 4:] = 2
    left, right = dsd.split_frames(dsd.pack(latents), 6, 8)
    assert left.shape == right.shape == (2, 6, 64)
    assert (left == 1).all() and (right == 2).all()


def test_split_frames_keeps_the_order_of_tokens():
    left, right = random(1, 16, 6, 4), random(1, 16, 6, 4, seed=1)
    frames = dsd.split_frames(dsd.pack(torch.cat([left, right], 3)), 6, 8)
    assert torch.equal(frames[0], dsd.pack(left)) and torch.equal(frames[1], dsd.pack(right))


# ---- guidance --------------------------------------------------------------------------------------------------------
class Recorder:
    """A stand-in for the transformer: an odd function of its inputs that counts the rows it is given."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, condition, text):
        self.rows.append(len(x))
        return torch.sin(x + 2 * condition) + text[0].mean((1, 2)).view(-1, 1, 1) * x + text[1].mean(1).view(-1, 1, 1)


def guidance_case():
    text, null = (random(2, 7, 8), random(2, 4, seed=1)), (random(2, 7, 8, seed=2), random(2, 4, seed=3))
    return random(2, 5, 64, seed=4), random(2, 5, 64, seed=5), text, null


@pytest.mark.parametrize("s_i, s_t, passes", [
    (1, 1, 1), (0, 0, 1), (1, 0, 1), (1, 3, 2), (0, 1, 3), (2, 2, 2), (2, 0, 2), (1.5, 2.5, 3), (2, 1, 3), (.5, .25, 3)])
def test_guided_velocity_is_the_formula_and_runs_only_the_passes_it_needs(s_i, s_t, passes):
    x, condition, text, null = guidance_case()
    model = Recorder()
    v_00, v_i0, v_it = model(x, 0 * condition, null), model(x, condition, null), model(x, condition, text)
    model.rows.clear()
    v = dsd.guided_velocity(model, x, condition, text, null, s_i, s_t)
    torch.testing.assert_close(v, v_00 + s_i * (v_i0 - v_00) + s_t * (v_it - v_i0))
    assert model.rows == [passes * len(x)]  # one batch


def test_text_guidance_works_without_image_guidance():
    """The released pipeline ignores it there."""
    x, condition, text, null = guidance_case()
    plain, guided = (dsd.guided_velocity(Recorder(), x, condition, text, null, 1.0, s_t) for s_t in (1.0, 3.0))
    assert (guided - plain).abs().max() > .1


# ---- grids, canvases, pictures ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, columns", [(2, 2), (1, 3), (3, 2)])
def test_cutting_a_grid_inverts_building_it_and_the_other_way_round(rows, columns):
    panels = [noise_image(6, 4, seed) for seed in range(rows * columns)]
    grid = dsd.build_grid(panels, rows, columns)
    assert grid.size == (6 * columns, 4 * rows)
    cut = dsd.cut_grid(grid, rows, columns)
    assert [p.tobytes() for p in cut] == [p.tobytes() for p in panels]
    assert dsd.build_grid(cut, rows, columns).tobytes() == grid.tobytes()


def test_panels_are_cut_in_reading_order():
    grid = Image.new("RGB", (4, 4), "red")
    grid.paste("blue", (2, 0, 4, 2))
    grid.paste("white", (0, 2, 2, 4))
    assert [p.getpixel((1, 1)) for p in dsd.cut_grid(grid)] == [(255, 0, 0), (0, 0, 255), (255, 255, 255), (255, 0, 0)]


def test_pixels_run_from_minus_one_to_one_and_keep_their_place():
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((2, 0), (255, 0, 255))
    pixels = dsd.to_pixels([image, image])
    assert pixels.shape == (2, 3, 2, 3) and pixels[0, :, 0, 2].tolist() == [1, -1, 1] and pixels[1].sum() == -14


def test_canvas_is_the_reference_beside_the_target_or_black():
    reference, target = random(1, 3, 4, 6), random(1, 3, 4, 6, seed=1)
    assert torch.equal(dsd.canvas(reference, target), torch.cat([reference, target], 3))
    black = dsd.canvas(reference)
    assert torch.equal(black[..., :6], reference) and (black[..., 6:] == -1).all()


def test_fit_panel_crops_at_the_centre():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    panel = dsd.fit_panel(wide, 16, 16)
    assert panel.size == (16, 16)
    assert all(red < 32 and blue > 223 for _, (red, _, blue) in panel.getcolors())


def open_saved(image, path, **options):
    image.save(path, **options)
    opened = dsd.open_image(path)
    assert opened.mode == "RGB"
    return opened


def test_open_image_composes_transparency_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    opened = open_saved(image, tmp_path / "alpha.png")
    assert [opened.getpixel((i, 0)) for i in range(3)] == [(255, 255, 255), (255, 0, 0), (127, 127, 127)]


def test_open_image_reads_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    opened = open_saved(image, tmp_path / "palette.png")
    assert [opened.getpixel((i, 0)) for i in range(2)] == [(10, 20, 30), (200, 100, 50)]
    opened = open_saved(image, tmp_path / "transparent.png", transparency=0)
    assert [opened.getpixel((i, 0)) for i in range(2)] == [(255, 255, 255), (200, 100, 50)]


def test_open_image_reads_grey(tmp_path):
    assert open_saved(Image.new("L", (1, 1), 77), tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("value, wanted", [(65535, 255), (32768, 128), (300, 1), (0, 0)])
def test_open_image_scales_16_bits_to_8(tmp_path, value, wanted):
    image = Image.frombytes("I;16", (1, 1), value.to_bytes(2, "little"))
    assert abs(open_saved(image, tmp_path / "deep.png").getpixel((0, 0))[0] - wanted) <= 1


def test_open_image_applies_the_exif_orientation(tmp_path):
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    opened = open_saved(image, tmp_path / "turned.png", exif=exif)
    assert opened.size == (1, 2) and opened.getpixel((0, 0)) == (255, 0, 0) and opened.getpixel((0, 1)) == (0, 0, 255)


def truncated(path):
    noise_image(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("make", [
    truncated, lambda path: path.write_text("not a picture"), lambda path: path.write_bytes(b""),
    lambda path: path.mkdir(), lambda path: None], ids=["truncated", "text", "empty", "folder", "missing"])
def test_open_image_tells_in_one_line_what_it_cannot_read(tmp_path, make):
    make(tmp_path / "image.png")
    with pytest.raises(dsd.DsdError, match="image.png") as caught:
        dsd.open_image(tmp_path / "image.png")
    assert "\n" not in str(caught.value)


def test_contact_sheet_holds_every_picture_and_its_caption(tmp_path):
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")
    dsd.contact_sheet([[(red, "a caption long enough for several lines of text"), (blue, "short")], [(red, "")]],
                      tmp_path / "sheet.png", side=64)
    sheet = Image.open(tmp_path / "sheet.png")
    counts = dict((colour, n) for n, colour in sheet.getcolors(10_000))
    assert counts[255, 0, 0] == 2 * 64 * 64 and counts[0, 0, 255] == 128 * 64
    del counts[255, 0, 0], counts[0, 0, 255], counts[255, 255, 255]
    assert sum(counts.values()) > 100  # letters


def test_a_label_loses_no_line_of_a_long_caption():
    image, words = Image.new("RGB", (32, 32), "red"), "a round horned critter in the antidisestablishmentarianist snow"
    short, long = dsd.labelled(image, "a round", 64), dsd.labelled(image, words, 64)
    assert short.width == long.width and long.height == short.height + 15 * (len(textwrap.wrap(words, 64 // 6)) - 1)
    last_line = long.crop((0, long.height - 19, long.width, long.height))
    assert last_line.convert("L").getextrema()[0] < 128  # letters


# ---- settings and records --------------------------------------------------------------------------------------------
def test_a_flag_goes_before_the_models_settings_and_these_before_the_default(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "dsd.json").write_text(json.dumps({"finetune": {"rank": 8, "steps": 5}, "sample": {"ema": 1}}))
    flags = type("Flags", (), {})()
    flags.__dict__.update(steps=7, rank=None, ema=None)
    assert dsd.model_settings(tmp_path, "finetune", flags, steps=1, rank=2, ema=3) == {"steps": 7, "rank": 8, "ema": 3}


RECORDS = [{"a": 1, "text": "zwölf\u2028Boxkämpfer\nund \"mehr\""}, {"b": [1, 2.5, None]}]


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "records.jsonl"
    assert dsd.read_records(path) == []
    dsd.append_records(path, RECORDS[:1])
    dsd.append_records(path, RECORDS[1:])
    assert dsd.read_records(path) == RECORDS


@pytest.mark.parametrize("half", [b'{"c": 1', '{"c": "zwölf'.encode()[:-3], b"{"])
def test_a_half_written_last_line_is_dropped_with_a_notice(tmp_path, capsys, half):
    path = tmp_path / "records.jsonl"
    dsd.append_records(path, RECORDS)
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    assert dsd.read_records(path) == RECORDS
    assert "records.jsonl" in capsys.readouterr().err
    assert path.read_bytes() == whole + half  # whoever only reads changes nothing: a writer may be at work
    dsd.append_records(path, RECORDS[:1])
    assert dsd.read_records(path) == [*RECORDS, RECORDS[0]] and capsys.readouterr().err == ""


@pytest.mark.parametrize("garbage", [b"not json\n", b"\xff\xfe\x00\n", b"\n"])
def test_garbage_in_the_middle_is_an_error(tmp_path, garbage):
    path = tmp_path / "records.jsonl"
    dsd.append_records(path, RECORDS[:1])
    path.write_bytes(path.read_bytes() + garbage + b'{"b": 1}\n')
    with pytest.raises(dsd.DsdError, match="records.jsonl"):
        dsd.read_records(path)


def test_run_turns_an_error_into_one_line_and_code_2(capsys):
    def main():
        raise dsd.DsdError("no adapter; train one")
    with pytest.raises(SystemExit) as stop:
        dsd.run(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no adapter; train one\n"


def test_run_says_how_to_go_on_after_ctrl_c(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        dsd.run(main)
    assert stop.value.code == 130 and "same command" in capsys.readouterr().err


def answer_with(differing, verdict):
    parts = ", ".join(f"{name} {'different' if name in differing else 'same'}" for name in ("shape", "colour", "eyes"))
    return f"subject: a critter\nimage 1: blue\nimage 2: blue\ncompare: {parts}\nverdict: {verdict}"


def test_tolerance_accepts_a_no_with_few_differing_parts_and_nothing_else():
    assert curate.parse(answer_with([], "yes"))[0] == "yes"
    assert curate.parse(answer_with(["eyes"], "no"))[0] == "no"
    verdict, reason = curate.parse(answer_with(["eyes"], "no"), tolerance=1)
    assert verdict == "yes" and "tolerated" in reason and "eyes" in reason
    assert curate.parse(answer_with(["eyes", "shape"], "no"), tolerance=1)[0] == "no"
    assert curate.parse(answer_with([], "no"), tolerance=1)[0] == "no"  # a no without a named difference stays a no
    assert curate.parse("verdict: no", tolerance=9)[0] == "unparsable"
