"""The miniature's world: its identities, its held-out tenth, its pictures and its words."""

import dsd

import itertools
import json
import re
import shutil

import pytest
import torch

import generate_grids
from miniature import measure, models, pretrain, vlm_data, world

ALL = torch.arange(world.N_IDENTITIES)
SIZES = [len(values) for values in world.IDENTITY.values()]
POSE = torch.tensor([[0.0, 0.16, 1.16, 0.0]])
NOUNS = {world.noun(pair): pair for pair in itertools.product(*map(range, SIZES[: world.NAMED]))}
CONTEXTS = list(itertools.product(*(range(len(values)) for values in world.CONTEXT.values())))
N = world.N_IDENTITY


def row(**words):
    """The attributes of a panel by number: those of the words, the others' first values."""
    named = dict(zip(world.COLUMN, vlm_data.VALUES))
    return [named[name].index(words.get(name, named[name][0])) for name in world.COLUMN]


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def numbers(identity):
    """Identity rows -> their numbers; every row must be one of the world's."""
    number = world.identity_number(identity)
    assert torch.equal(world.identity_of(number), identity)
    return number


# ---- identities ----------------------------------------------------------------------------------
def test_at_least_40_000_identities_are_numbered_and_in_range():
    identity = world.identity_of(ALL)
    assert world.N_IDENTITIES >= 40_000 and torch.equal(numbers(identity), ALL)
    assert (identity >= 0).all() and (identity < torch.tensor(SIZES)).all()
    assert (identity[:, world.COLUMN["colour"]] != identity[:, world.COLUMN["second"]]).all()
    for number in (-1, world.N_IDENTITIES):
        with pytest.raises(ValueError, match=str(world.N_IDENTITIES)):
            world.identity_of([0, number])


@pytest.mark.parametrize("held_out, share, different", [(False, 0.9, 4000), (True, 0.1, 1000)])
def test_each_side_of_the_world_has_its_share_and_every_value_and_is_drawn_from_alone(
    held_out, share, different, g
):
    side = ALL[world.is_held_out(ALL) == held_out]
    assert len(side) / len(ALL) == pytest.approx(share, abs=0.01)
    assert [len(column.unique()) for column in world.identity_of(side).T] == SIZES
    index = world.draw_identities(5000, g, held_out)
    assert len(index) == 5000 and torch.isin(index, side).all() and len(index.unique()) > different


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "change, held_out", [(world.change_attributes, True), (world.change_in_training, False)]
)
def test_changed_identities_differ_as_asked_and_in_training_none_is_held_out(
    change, held_out, count, g
):
    identity = world.identity_of(world.draw_identities(2000, g))
    other = change(identity, torch.full((2000,), count), g)
    assert ((other != identity).sum(1) == count).all()
    assert world.is_held_out(numbers(other)).any() == held_out


# ---- sheets --------------------------------------------------------------------------------------
@pytest.fixture
def drawn(monkeypatch):
    """What `sheets` gives to `render` and gets back: a list of (identity, context, pose, noise)."""
    seen = []

    def render(identity, context, pose, size):
        noise = torch.rand(len(identity), 3, size, size)
        seen.append((identity, context, pose, noise))
        return noise

    monkeypatch.setattr(world, "render", render)
    return seen


@pytest.mark.parametrize("layout", [(2, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize("held_out, slips", [(False, 0.1), (True, 0.01)])
def test_sheets_show_one_side_slip_in_both_ways_and_never_name_details(
    drawn, layout, held_out, slips, g
):
    unrelated, slips = (0, 0) if layout == (1, 1) else (world.UNRELATED, slips)
    _, captions = world.sheets(4000, g, layout, held_out=held_out)
    assert (world.is_held_out(numbers(drawn[0][0])) == held_out).all()
    identity = drawn[0][0].view(4000, -1, N)
    assert all(world.noun(row[0]) in caption for row, caption in zip(identity, captions))
    assert (identity[..., : world.NAMED] == identity[:, :1, : world.NAMED]).all()
    pairs = identity[:, :, None] != identity[:, None]
    differing = pairs.sum(3).flatten(1).amax(1)  # (4000,), attributes of the worst pair
    # a few unrelated critters differ in one or two
    assert abs((differing > 2).float().mean() - unrelated) < 0.04
    assert abs(((differing > 0) & (differing <= 2)).float().mean() - slips) < 0.04
    named = torch.tensor([" eye" in caption for caption in captions]).float().mean()
    assert abs(named - (world.DETAILED if layout == (1, 1) else 0)) < 0.03


def test_relight_sheets_keep_all_but_the_light_and_tell_it_once(drawn, g):
    _, captions = world.sheets(1000, g)
    relight = torch.tensor(["scene, a" in caption for caption in captions])
    _, context, pose, _ = (part.view(1000, 4, -1) for part in drawn[0])
    assert 0.2 < relight.float().mean() < 0.4
    scene, accessory, light = context.unbind(2)  # (1000, 4) each
    for same in (scene, accessory, *pose.unbind(2)):
        assert (same[relight] == same[relight, :1]).all()
    assert (light[relight].sort(1).values == torch.arange(4)).all()
    assert (scene[~relight] != scene[~relight, :1]).any(1).float().mean() > 0.9
    # to a side, or smaller: not standing
    moved = ((pose[..., 0].abs() > 0.2) | (pose[..., 2] < 1.05)).sum(1)
    any_pose = "|".join(filter(None, world.POSES))
    told = [len(re.findall(any_pose, caption)) for caption in captions]
    assert told == torch.where(relight, moved > 0, moved).tolist()


def test_panels_stand_in_reading_order_and_a_seed_gives_the_same_ones(drawn, g):
    images, _ = world.sheets(3, g, (2, 2), 16)
    panels = drawn[0][3].view(3, 4, 3, 16, 16)
    for k, (row, column) in enumerate(itertools.product((0, 16), (0, 16))):
        assert torch.equal(images[:, :, row : row + 16, column : column + 16], panels[:, k])
    world.sheets(3, g.manual_seed(0), (2, 2), 16)
    assert all(map(torch.equal, drawn[0][:3], drawn[1][:3]))


# ---- pictures ------------------------------------------------------------------------------------
def test_pictures_are_within_0_and_1_and_depend_neither_on_chance_nor_on_their_batch(g):
    identity = world.identity_of(world.draw_identities(70, g))
    rows = identity, world.draw_contexts(70, g), world.draw_poses(70, g)
    images = world.render(*rows, 32)
    assert images.shape == (70, 3, 32, 32) and images.std() > 0.1
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, world.render(*rows, 32))
    one = world.render(*(part[35:36] for part in rows), 32)
    torch.testing.assert_close(images[35:36], one)


@pytest.mark.parametrize("name", [*world.IDENTITY, *world.CONTEXT])
def test_every_value_of_an_attribute_looks_different(name):
    n = len(vlm_data.VALUES[world.COLUMN[name]])
    difference, pixels = (0.1, 6) if name in world.IDENTITY else (0.05, 20)
    pattern = world.IDENTITY["pattern"][1]
    usual = row(ears="cat-eared", second="pink", pattern=pattern, eyes="two")
    rows = torch.tensor([usual]).repeat(n, 1)
    rows[:, world.COLUMN[name]] = torch.arange(n)
    images = world.render(rows[:, :N], rows[:, N:-1], POSE.repeat(n, 1), 32)
    for a, b in itertools.combinations(range(n), 2):
        assert (images[a] - images[b]).abs().amax(0).gt(difference).sum() >= pixels, (a, b)


LOOKS = {  # pose: how far from standing (rows, columns), whether it is wide, and turned
    "": ([0, 0], False, False),
    "on the left": ([0, -5], False, False),
    "on the right": ([0, 5], False, False),
    "jumping": ([-5, 0], False, False),
    "lying down": (None, True, False),
    "upside down": (None, False, True),
}


@pytest.mark.parametrize("pose", LOOKS)
def test_a_critter_is_where_its_pose_says(pose):
    def body_and_eyes(pose):
        """The places of pixels that depend on a tall critter's colour, and on its eyes' number."""
        stand = world.in_pose(POSE, torch.tensor([list(world.POSES).index(pose)])).repeat(3, 1)
        critters = [{}, {"colour": "blue"}, {"eyes": "three"}]
        rows = torch.tensor([row(shape="tall", second="pink", **words) for words in critters])
        plain, blue, three = world.render(rows[:, :N], rows[:, N:-1], stand, 32)
        return [(image - plain).abs().amax(0).gt(0.1).nonzero().float() for image in (blue, three)]

    (place, wide, turned), (body, eyes) = LOOKS[pose], body_and_eyes(pose)
    if place:
        standing, _ = body_and_eyes("")
        assert abs(body.mean(0) - standing.mean(0) - torch.tensor(place)).amax() < 1
    height, width = body.amax(0) - body.amin(0)
    assert (width > height) == wide
    assert (eyes.mean(0)[0] > body.mean(0)[0] + 0.5) == turned


def test_warp_moves_a_spot_by_one_to_three_pixels_and_differently_in_every_panel(g):
    line = torch.arange(32.0)
    spot = torch.exp(-((line[:, None] - 16) ** 2 + (line - 16) ** 2) / 8).expand(64, 3, 32, 32)
    moved = vlm_data.warp(spot, g)
    mass = moved[:, 0] / moved[:, 0].sum((1, 2), keepdim=True)
    across, down = (mass.sum(1) * line).sum(1), (mass.sum(2) * line).sum(1)
    place = torch.stack([across, down], 1) - 16  # (64, 2), pixels
    assert place.abs().amax() < 3.2 and place.abs().amax(1).mean() > 1
    assert place.unique(dim=0).shape == (64, 2)
    assert torch.equal(moved, vlm_data.warp(spot, g.manual_seed(0)))
    grey = torch.full((2, 3, 32, 32), 0.3)  # of a border no other colour comes in
    assert torch.allclose(vlm_data.warp(grey, g), grey, atol=1e-6)


# ---- words ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizers():
    lengths = models.PROMPT_TOKENS, 77
    return [models.word_tokenizer(models.flux_words(), length) for length in lengths]


def check_tokens(tokenizers, texts):
    """Both tokenizers know every word of the texts and read them whole."""
    for tokenizer in tokenizers:
        for ids, text in zip(tokenizer(texts).input_ids, texts):
            assert tokenizer.unk_token_id not in ids, text
            assert len(ids) <= tokenizer.model_max_length, text


def test_captions_and_sample_prompts_are_read_whole_and_no_word_but_zebra_is_unknown(
    tokenizers, drawn, g
):
    critter = row(shape="triangular", ears="bunny-eared")
    words = [[len(value.split()) for value in values] for values in world.CONTEXT.values()]
    longest = [counts.index(max(counts)) for counts in words]
    aside = [list(world.POSES).index("on the right")] * 4
    texts = []
    for relight, wording in itertools.product((False, True), (0, 1)):
        texts.append(world.sheet_caption(critter, [longest] * 4, (2, 2), relight, wording, aside))
    for layout, length in models.TOKENS.items():
        captions = world.sheets(1000, g, layout, 4)[1]
        assert max(map(len, tokenizers[0](captions).input_ids)) <= length
        texts += captions
    for identity, context in zip(world.identity_of(ALL[::400]), CONTEXTS):
        texts.append(world.panel_caption(identity, context, True))
    for prompt in dsd.folder_settings(dsd.MINIATURE / "flux", "sample")["prompts"]:
        texts += [prompt.replace("{name}", noun) for noun in NOUNS]
    check_tokens(tokenizers, texts)
    assert tokenizers[0].unk_token_id in tokenizers[0]("a zebra").input_ids


@pytest.mark.parametrize("family", ["subject", "relight"])
def test_prompts_of_generate_grids_are_those_the_teacher_was_trained_on(tokenizers, family):
    grammar = dsd.folder_settings(dsd.MINIATURE / "flux", "generate_grids")["grammar"]
    texts, relight = [], family == "relight"
    for seed in range(200):
        grid = generate_grids.grammar_prompt(grammar, [family], seed)
        asked = measure.asked_for(grid["prompt"])
        contexts = [[panel[name] for name in world.CONTEXT] for panel in asked]
        poses, identity = [panel["pose"] for panel in asked], NOUNS[grid["subject"]]
        caption = world.sheet_caption(identity, contexts, relight=relight, poses=poses)
        assert grid["prompt"] == caption and grid["family"] == family
        assert all(panel["shape"] == identity[0] for panel in asked)
        assert all(panel["ears"] == identity[1] for panel in asked)
        if relight:
            scenes, accessories, lights = (set(column) for column in zip(*contexts))
            assert len(lights) == 4
            assert len(scenes) == len(accessories) == len(set(poses)) == 1
        texts.append(caption)
    assert len(set(texts)) > 150
    check_tokens(tokenizers, texts)


def test_variety_is_how_many_values_are_shown_and_how_alike_different_grids_are():
    critters = torch.zeros(2, 4, N, dtype=torch.long)
    critters[1, :, world.COLUMN["colour"]] = 3
    found = measure.variety(critters)
    assert found["values"] == dict.fromkeys(world.IDENTITY, 1.0) | {"colour": 2.0}
    assert found["equal"] == round(5 / 6, 4)


# ---- how the models are made ---------------------------------------------------------------------
def test_all_models_are_made_in_legs_and_a_leg_goes_on_from_exported_weights(
    tmp_path, monkeypatch, run
):
    def leg(minutes):
        run(pretrain, f"all --minutes {minutes} --out", tmp_path / "made")
        shutil.rmtree(tmp_path / "runs")  # a new machine
        notes = (tmp_path / "made").rglob("training.json")
        return {file.parent.name: json.loads(file.read_text())["steps"] for file in notes}

    def fit(name, module, loss, args, picture=None):  # without a picture
        return whole_fit(name, module, loss, args)

    whole_fit, few = pretrain.fit, {"steps": 2, "batch_size": 8, "sheets": 8}
    few |= {"sight_steps": 1, "word_steps": 1}
    tiny = {name: settings | few for name, settings in pretrain.ALL.items()}
    tiny["vae"] = {"steps": 1, "batch_size": 12}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlm_data, "POOL", 4)
    monkeypatch.setattr(pretrain, "fit", fit)
    monkeypatch.setattr(pretrain, "ALL", tiny)
    assert leg(0) == {"vae": 1}
    assert leg(0) == {"vae": 1, "flux": 1}
    assert leg(10) == {"vae": 1, "flux": 2, "judge": 2, "witness": 2, "vlm": 2}
    assert len(list((tmp_path / "made" / "references").iterdir())) == 8


def test_a_run_goes_on_in_the_number_format_it_began_with(tmp_path, run, refused, monkeypatch):
    def judge(name, options="", start=run):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        said = start(pretrain, "judge --steps 2 --batch_size 4", options, "--out", folder)
        return said if start is refused else (folder / "judge/model.safetensors").read_bytes()

    whole = judge("whole", "--precision bf16")
    judge("parts", "--precision bf16 --minutes 0")
    assert judge("parts") == whole
    float32 = judge("float32")
    assert float32 != whole and float32 == judge("asked", "--precision no")
    assert "its precision was bf16" in judge("whole", "--precision no", start=refused)


def test_panels_for_pairs_stand_in_all_poses_and_the_relit_one_as_its_partner(drawn, g):
    _, rows = vlm_data.draw_pool(200, g)  # (200, 6, columns)
    identity, pose = rows[..., :N], rows[..., -1]
    assert pose.unique().tolist() == list(range(len(world.POSES)))
    assert (pose[:, 0] != pose[:, 1]).float().mean() > 0.7
    assert (pose[:, 2] == pose[:, 0]).all() and (rows[:, 3, N:] == rows[:, 0, N:]).all()
    differing = (identity != identity[:, :1]).sum(2)  # from panel 0, (200, 6)
    assert (differing[:, :3] == 0).all() and (differing[:, 5] == 3).all()
    assert differing[:, 3].unique().tolist() == [1, 2]


MOON = {"light": "by moonlight"}
TURNED = {"pose": "upside down"}
PLAIN = {"scene": "in the snow", "accessory": "", "light": "at noon", "pose": ""}
ORDERS = [  # what changes, the order to change it, the score of a picture that changed so unasked
    (MOON, "keep the scene but show it by moonlight", 3),
    ({"pose": ""}, "show this critter on the beach at sunset with a hat", 3),
    (MOON | TURNED, "show this critter upside down on the beach by moonlight with a hat", 2),
    (PLAIN | {"shape": "square"}, "show this critter in the snow at noon", 0),
]


@pytest.mark.parametrize("changes, order, score", ORDERS)
def test_the_vlm_s_lessons_know_poses(changes, order, score):
    words = {"ears": "horned", "scene": "on the beach", "accessory": "with a hat"}
    words |= {"second": "orange", "light": "at sunset", "pose": "jumping"}
    a, other = row(**words), row(**words | changes)
    assert vlm_data.instruction(a, other) == order
    question, answer = vlm_data.prompt_lesson(a, other)
    assert "critter jumping on the beach" in answer and answer.endswith(f"score: {score}")
    assert answer.count(" different") == len(changes) and vlm_data.caption(other) in question
    known = models.vlm_tokenizer(vlm_data.vlm_words())
    assert known.unk_token_id not in known(f"{question} {answer} {order}").input_ids
