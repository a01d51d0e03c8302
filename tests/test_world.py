"""The miniature's world: its identities, its held-out tenth, its pictures and its words."""

import itertools
import json
import re
import shutil
import sys

import lessons
import models
import pretrain
import pytest
import torch
import world

import generate_grids

ALL = torch.arange(world.N_IDENTITIES)
SIZES = [len(values) for values in world.IDENTITY.values()]
POSE = torch.tensor([[0., .16, 1.16, 0.]])


def words(identity):
    """Identity rows -> their numbers as a set of tuples."""
    return set(map(tuple, identity.tolist()))


# ---- identities ------------------------------------------------------------------------------------------------------
def test_at_least_50_000_identities_all_different_and_in_range():
    identity = world.identity_of(ALL)
    assert world.N_IDENTITIES >= 50_000 and len(words(identity)) == world.N_IDENTITIES
    assert (identity >= 0).all() and (identity < torch.tensor(SIZES)).all()
    assert (identity[:, 2] != identity[:, 4]).all()  # main and second colour


@pytest.mark.parametrize("number", [-1, world.N_IDENTITIES, 10**9])
def test_identity_number_outside_the_world_raises(number):
    with pytest.raises(ValueError, match=str(world.N_IDENTITIES)):
        world.identity_of([0, number])


def values(held_out):
    """How many values of each attribute one side of the world has."""
    return [len(column.unique()) for column in world.identity_of(ALL[world.is_held_out(ALL) == held_out]).T]


def test_about_a_tenth_is_held_out_and_the_rest_has_every_value_of_every_attribute():
    assert .09 < world.is_held_out(ALL).float().mean() < .11
    assert values(held_out=False) == SIZES


def test_held_out_identities_have_every_value_of_every_attribute():
    assert values(held_out=True) == SIZES


@pytest.mark.parametrize("held_out", [False, True])
def test_drawn_identities_are_of_the_side_asked_for(held_out):
    index = world.draw_identities(5000, torch.Generator().manual_seed(0), held_out)
    assert len(index) == 5000 and (world.is_held_out(index) == held_out).all()
    assert len(index.unique()) > (1000 if held_out else 4000)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_change_attributes_makes_valid_identities_that_differ_as_asked(count):
    g = torch.Generator().manual_seed(0)
    identity = world.identity_of(world.draw_identities(2000, g))
    other = world.change_attributes(identity, torch.full((2000,), count), g)
    differing = (other != identity).sum(1)
    assert (differing == count).all()
    assert words(other) <= words(world.identity_of(ALL))


# ---- sheets ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def drawn(monkeypatch):
    """What `sheets` gives to `render`: a list of (identity, context, pose); the pictures are plain noise."""
    seen = []

    def render(identity, context, pose, size):
        seen.append((identity, context, pose))
        return torch.rand(len(identity), 3, size, size)
    monkeypatch.setattr(world, "render", render)
    return seen


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("layout", [(2, 2), (1, 2), (1, 1)])
def test_sheets_show_only_critters_of_the_side_asked_for(drawn, layout, held_out):
    world.sheets(4000, torch.Generator().manual_seed(0), layout, held_out=held_out)
    assert words(drawn[0][0]) <= words(world.identity_of(ALL[world.is_held_out(ALL) == held_out]))


def test_identity_number_inverts_identity_of():
    assert torch.equal(world.identity_number(world.identity_of(ALL)), ALL)


def test_changes_for_training_never_make_a_held_out_identity():
    g = torch.Generator().manual_seed(0)
    identity = world.identity_of(world.draw_identities(3000, g))
    changed = world.change_in_training(identity, torch.randint(1, 4, (3000,), generator=g), g)
    assert not world.is_held_out(world.identity_number(changed)).any()
    assert (changed != identity).any(1).float().mean() > .99


def test_relight_sheets_keep_scene_accessory_and_pose_and_change_only_the_light(drawn):
    _, captions = world.sheets(400, torch.Generator().manual_seed(0))
    relight = torch.tensor(["scene, a" in caption for caption in captions])
    _, context, pose = (part.view(400, 4, -1) for part in drawn[0])
    assert .2 < relight.float().mean() < .4
    assert (context[relight, :, :2] == context[relight, :1, :2]).all() and (pose[relight] == pose[relight, :1]).all()
    assert (context[relight, :, 2].sort(1).values == torch.arange(4)).all()
    assert (context[~relight, :, 0] != context[~relight, :1, 0]).any(1).float().mean() > .9


@pytest.mark.parametrize("layout, unrelated, slips", [((2, 2), 1 / 3, .1), ((1, 2), 1 / 3, .1), ((1, 1), 0, 0)])
def test_sheets_slip_in_both_ways_and_never_name_details(drawn, layout, unrelated, slips):
    _, captions = world.sheets(4000, torch.Generator().manual_seed(0), layout)
    identity = drawn[0][0].view(4000, -1, 7)
    assert all(world.noun(row[0]) in caption for row, caption in zip(identity, captions))
    assert words(drawn[0][0]) <= words(world.identity_of(ALL[~world.is_held_out(ALL)]))
    assert (identity[:, :, :2] == identity[:, :1, :2]).all()
    differing = (identity[:, :, None] != identity[:, None]).sum(3).flatten(1).amax(1)  # attributes of the worst pair
    assert abs((differing > 2).float().mean() - unrelated) < .04  # a few unrelated critters differ in one or two
    assert abs(((differing > 0) & (differing <= 2)).float().mean() - slips) < .04
    named = torch.tensor([" eye" in caption for caption in captions]).float().mean()
    assert abs(named - world.DETAILED * (layout == (1, 1))) < .03


def test_a_relight_sheet_has_one_named_pose_told_once_and_the_others_one_for_each_panel(drawn):
    _, captions = world.sheets(1000, torch.Generator().manual_seed(0))
    for caption, pose in zip(captions, drawn[0][2].view(1000, 4, 4)):
        told = re.findall("|".join(filter(None, world.POSES)), caption)
        moved = ((pose[:, 0].abs() > .2) | (pose[:, 2] < 1.05)).sum()  # to a side, or smaller: not standing
        assert len(told) == (moved > 0 if "scene, a" in caption else moved), caption


def test_panels_stand_in_reading_order():
    images, captions = world.sheets(3, torch.Generator().manual_seed(0), (2, 2), 16)
    seen = []
    render, world.render = world.render, lambda *rows: seen.append(rows) or render(*rows)
    try:
        again, _ = world.sheets(3, torch.Generator().manual_seed(0), (2, 2), 16)
    finally:
        world.render = render
    panels = world.render(*seen[0]).view(3, 4, 3, 16, 16)
    assert torch.equal(images, again)
    for k, (row, column) in enumerate(itertools.product((0, 16), (0, 16))):
        assert torch.equal(images[:, :, row:row + 16, column:column + 16], panels[:, k])


# ---- pictures --------------------------------------------------------------------------------------------------------
def test_render_is_deterministic_and_within_0_and_1():
    g = torch.Generator().manual_seed(0)
    rows = world.identity_of(world.draw_identities(70, g)), world.draw_contexts(70, g), world.draw_poses(70, g)
    images = world.render(*rows, 32)
    assert images.shape == (70, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert images.std() > .1
    assert torch.equal(images, world.render(*rows, 32))


def test_a_panel_does_not_depend_on_its_batch():
    g = torch.Generator().manual_seed(0)
    rows = world.identity_of(world.draw_identities(40, g)), world.draw_contexts(40, g), world.draw_poses(40, g)
    alone = world.render(*(part[35:36] for part in rows), 32)
    torch.testing.assert_close(world.render(*rows, 32)[35:36], alone)


@pytest.mark.parametrize("column", range(len(SIZES)), ids=world.IDENTITY)
def test_every_value_of_an_identity_attribute_looks_different(column):
    identity = torch.tensor([[0, 1, 0, 0, 7, 1, 1]]).repeat(SIZES[column], 1)
    identity[:, column] = torch.arange(SIZES[column])
    n = len(identity)
    images = world.render(identity, torch.zeros(n, 3, dtype=torch.long), POSE.repeat(n, 1), 32)
    for a, b in itertools.combinations(range(n), 2):
        assert (images[a] - images[b]).abs().amax(0).gt(.1).sum() >= 6, (a, b)  # pixels


@pytest.mark.parametrize("column", range(3), ids=world.CONTEXT)
def test_every_value_of_the_context_looks_different(column):
    n = len(list(world.CONTEXT.values())[column])
    context = torch.zeros(n, 3, dtype=torch.long)
    context[:, column] = torch.arange(n)
    images = world.render(torch.tensor([[0, 1, 0, 0, 7, 1, 1]]).repeat(n, 1), context, POSE.repeat(n, 1), 32)
    for a, b in itertools.combinations(range(n), 2):
        assert (images[a] - images[b]).abs().amax(0).gt(.05).sum() >= 20, (a, b)


@pytest.mark.parametrize("pose, right, down, wide", [
    ("", 0, 0, False), ("on the left", -5, 0, False), ("on the right", 5, 0, False), ("jumping", 0, -5, False),
    ("lying down", 0, 0, True), ("upside down", 0, 0, False)])
def test_a_critter_is_where_its_pose_says(pose, right, down, wide):
    def eyes_and_body(pose):  # the pixels that depend on a tall critter's main colour, and on its number of eyes
        stand = world.in_pose(POSE, torch.tensor([list(world.POSES).index(pose)])).repeat(3, 1)
        identity = torch.tensor([[2, 0, 0, 0, 7, 0, 0], [2, 0, 5, 0, 7, 0, 0], [2, 0, 0, 0, 7, 0, 2]])
        images = world.render(identity, torch.zeros(3, 3, dtype=torch.long), stand, 32)
        body, eyes = ((image - images[0]).abs().amax(0).gt(.1).nonzero().float() for image in images[1:])
        return body.mean(0), eyes.mean(0), body.amax(0) - body.amin(0)
    body, eyes, size = eyes_and_body(pose)
    standing = eyes_and_body("")[0]
    if pose in ("", "on the left", "on the right", "jumping"):
        assert abs(body - standing - torch.tensor([down, right])).amax() < 1, body - standing
    assert (size[1] > size[0]) == wide
    assert (eyes[0] > body[0] + .5) == (pose == "upside down")


def test_warp_moves_a_spot_by_one_to_three_pixels_and_differently_in_every_panel():
    line = torch.arange(32.)
    spot = torch.exp(-((line[:, None] - 16)**2 + (line - 16)**2) / 8).expand(64, 3, 32, 32)
    moved = lessons.warp(spot, torch.Generator().manual_seed(0))
    mass = moved[:, 0] / moved[:, 0].sum((1, 2), keepdim=True)
    place = torch.stack([(mass.sum(1) * line).sum(1), (mass.sum(2) * line).sum(1)], 1) - 16  # (64, 2), pixels
    assert place.abs().amax() < 3.2 and place.abs().amax(1).mean() > 1 and place.unique(dim=0).shape == (64, 2)
    assert torch.equal(moved, lessons.warp(spot, torch.Generator().manual_seed(0)))
    grey = torch.full((2, 3, 32, 32), .3)  # of a border no other colour comes in
    assert torch.allclose(lessons.warp(grey, torch.Generator().manual_seed(1)), grey, atol=1e-6)


# ---- words -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizers():
    return [models.word_tokenizer(models.flux_words(), length) for length in (models.PROMPT_TOKENS, 77)]


def check_tokens(tokenizers, texts):
    for tokenizer in tokenizers:
        for ids, text in zip(tokenizer(texts).input_ids, texts):
            assert tokenizer.unk_token_id not in ids, text
            assert len(ids) <= tokenizer.model_max_length, text


def test_longest_and_random_captions_are_read_whole_and_without_unknown_words(tokenizers, drawn):
    longest = [v.index(max(v, key=lambda words: len(words.split()))) for v in world.CONTEXT.values()]
    everything = list(itertools.product(range(8), range(4), range(4)))
    texts = [world.sheet_caption([4, 2, 0, 0, 1, 0, 0], [longest] * 4, (2, 2), relight, wording, (2, 2, 2, 2))
             for relight in (False, True) for wording in (0, 1)]
    for layout, length in models.TOKENS.items():
        captions = world.sheets(3000, torch.Generator().manual_seed(1), layout, 4)[1]
        assert max(map(len, tokenizers[0](captions).input_ids)) <= length
        texts += captions
    texts += [world.panel_caption(*pair, True) for pair in zip(world.identity_of(ALL[::500]), everything)]
    check_tokens(tokenizers, texts)


@pytest.mark.parametrize("pose, text", [
    (0, "on the beach at sunset with a hat"), (1, "on the left on the beach at sunset with a hat"),
    (3, "jumping on the beach at sunset with a hat"), (5, "upside down on the beach at sunset with a hat")])
def test_the_pose_is_told_first(pose, text):
    row, context = [0, 3, 0, 0, 1, 0, 0], [1, 1, 1]
    assert world.setting(context, pose=pose) == text
    assert world.panel_caption(row, context, pose=pose) == f"a round horned critter {text}"
    sheet = world.sheet_caption(row, [[0, 0, 0], context], (1, 2), poses=(0, pose))
    assert sheet.endswith(f"round horned critter: first in the snow at noon, second {text}")
    sheet = world.sheet_caption(row, [context] * 2, (1, 2), relight=True, poses=(pose, pose))
    assert f"a round horned critter {text.replace('at sunset ', '')}: first at sunset, second at sunset" in sheet


def test_tokenizer_does_not_know_other_words(tokenizers):
    assert tokenizers[0].unk_token_id in tokenizers[0]("a zebra").input_ids


SETTINGS = {world.setting(context, pose=pose): (context, pose)
            for *context, pose in itertools.product(range(8), range(4), range(4), range(6))}
LIGHTS = world.CONTEXT["light"]
NOUNS = {world.noun([shape, ears]): [shape, ears] for shape in range(6) for ears in range(5)}


@pytest.mark.parametrize("family", ["subject", "relight"])
def test_prompts_of_generate_grids_are_those_the_teacher_was_trained_on(tokenizers, family):
    grammar = models.flux_settings()["generate_grids"]["grammar"]
    texts = []
    for seed in range(200):
        grid = generate_grids.grammar_prompt(grammar, [family], seed)
        noun = grid["subject"].removeprefix("a ")
        places = [" ".join(prompt.split(f"{noun} ")[1].split()) for prompt in grid["panel_prompts"]]
        if family == "relight":  # "in the snow with a hat at noon": the light is last
            lights = [next(i for i, light in enumerate(LIGHTS) if place.endswith(light)) for place in places]
            scene = {world.setting((s, a, 0), light=False, pose=p): (s, a, p)
                     for s in range(8) for a in range(4) for p in range(6)}
            (s, a, p), = {scene[place.removesuffix(f" {LIGHTS[i]}")] for place, i in zip(places, lights)}
            contexts, poses = [(s, a, i) for i in lights], [p] * 4
            assert len(set(lights)) == 4
        else:
            contexts, poses = zip(*(SETTINGS[place] for place in places))
        assert grid["prompt"] == world.sheet_caption(NOUNS[noun], contexts, relight=family == "relight", poses=poses)
        assert grid["family"] == family
        texts += [grid["prompt"], *grid["panel_prompts"]]
    assert len(set(texts)) > 500
    check_tokens(tokenizers, texts)


def test_sample_prompts_of_the_miniature_are_words_the_teacher_knows(tokenizers):
    prompts = models.flux_settings()["sample"]["prompts"]
    check_tokens(tokenizers, [p.replace("{name}", noun) for p in prompts for noun in NOUNS])


# ---- one command for all models --------------------------------------------------------------------------------------
def test_all_models_are_made_in_legs_and_a_leg_goes_on_from_exported_weights(tmp_path, monkeypatch):
    def leg(minutes):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "all", "--out", str(tmp_path / "made"), "--minutes", minutes])
        pretrain.main()
        notes = {file.parent.name: json.loads(file.read_text())["steps"]
                 for file in (tmp_path / "made").rglob("training.json")}
        shutil.rmtree(tmp_path / "runs")  # a new machine
        return notes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lessons, "POOL", 4)
    fit = pretrain.fit
    monkeypatch.setattr(pretrain, "fit", lambda name, module, loss, args, picture=None: fit(name, module, loss, args))
    tiny = {"batch_size": 8, "sight_steps": 1, "word_steps": 1, "sheets": 8}
    monkeypatch.setattr(pretrain, "ALL", {name: settings | tiny | {"steps": 2}
                                          for name, settings in pretrain.ALL.items()})
    monkeypatch.setitem(pretrain.ALL, "vae", {"steps": 1, "batch_size": 12})
    assert leg("0") == {"vae": 1}
    assert leg("0") == {"vae": 1, "flux": 1}
    assert leg("10") == {"vae": 1, "flux": 2, "judge": 2, "witness": 2, "vlm": 2}
    assert len(list((tmp_path / "made" / "references").iterdir())) == 8


# ---- what the VLM learns ---------------------------------------------------------------------------------------------
def test_panels_for_pairs_stand_in_all_poses_and_the_relit_one_as_its_partner():
    _, rows = lessons.draw_pool(200, torch.Generator().manual_seed(0))  # (200, 6, 11)
    identity, pose = rows[..., :7], rows[..., 10]
    assert pose.unique().tolist() == list(range(len(world.POSES))) and (pose[:, 0] != pose[:, 1]).float().mean() > .7
    assert (pose[:, 2] == pose[:, 0]).all() and (rows[:, 3, 7:] == rows[:, 0, 7:]).all()
    differing = (identity != identity[:, :1]).sum(2)  # from panel 0, (200, 6)
    assert (differing[:, :3] == 0).all() and (differing[:, 5] == 3).all()
    assert differing[:, 3].unique().tolist() == [1, 2]


ROW = [0, 3, 0, 0, 1, 0, 0, 1, 1, 1, 3]  # a round horned critter jumping on the beach at sunset with a hat


@pytest.mark.parametrize("changes, order, score", [
    ({9: 2}, "keep the scene but show it by moonlight", 3),
    ({10: 0}, "show this critter on the beach at sunset with a hat", 3),
    ({9: 2, 10: 5}, "show this critter upside down on the beach by moonlight with a hat", 2),
    ({0: 1, 7: 0, 8: 0, 9: 0, 10: 0}, "show this critter in the snow at noon", 0)])
def test_the_vlm_s_lessons_know_poses(changes, order, score):
    other = [changes.get(column, value) for column, value in enumerate(ROW)]
    assert lessons.instruction(ROW, other) == order
    question, answer = lessons.prompt_lesson(ROW, other)
    assert "critter jumping on the beach" in answer and answer.endswith(f"score: {score}")
    assert answer.count(" different") == len(changes) and lessons.caption(other) in question
    known = models.vlm_tokenizer(lessons.vlm_words())
    assert known.unk_token_id not in known(f"{question} {answer} {order}").input_ids
