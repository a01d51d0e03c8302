"""What the miniature's VLM learns from: rendered pairs, questions about them, and the true answers.

The questions are those of curate.py and exams.py. A panel's attributes are a row of numbers, one
for each column of world.COLUMN: the identity, then the context, then the pose.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

import curate
from miniature import exams, models, world

POOL = 12_000  # groups of six panels, drawn once: see `draw_pool`
VALUES = [*world.IDENTITY.values(), *world.CONTEXT.values(), list(world.POSES)]  # of each column
PARTS = ["trim" if name == "second" else name for name in world.IDENTITY]  # what the VLM calls them
POSE_WORDS = ["standing", "left", "right", "jumping", "lying", "upside"]  # one a pose, to compare
PROMPTED = {  # what the score of a prompt is about -> its column
    "shape": world.COLUMN["shape"],
    "scene": world.COLUMN["scene"],
    "outfit": world.COLUMN["accessory"],
    "light": world.COLUMN["light"],
    "pose": world.COLUMN["pose"],
}


# ---- panels --------------------------------------------------------------------------------------
def draw_pool(groups, generator, change=world.change_in_training, held_out=False, device="cpu"):
    """Panels for pairs: images (groups, 6, 3, s, s) in uint8 and attributes (groups, 6, columns).

    Of each group panels 0, 1, 2 show one critter: 1 in a free context and pose, 2 as 0 but in
    another light. Panels 3 and 4 show one that differs from it in one or two attributes, 3 exactly
    where and how 0 stands. Panel 5 differs in three."""
    a = world.identity_of(world.draw_identities(groups, generator, held_out))
    b = change(a, torch.randint(1, 3, (groups,), generator=generator), generator)
    c = change(a, torch.full((groups,), 3), generator)
    identity = torch.stack([a, a, a, b, b, c], 1)
    context = world.draw_contexts(groups * 6, generator).view(groups, 6, -1)
    named = torch.randint(len(world.POSES), (groups * 6,), generator=generator)
    pose = world.in_pose(world.draw_poses(groups * 6, generator), named).view(groups, 6, -1)
    named = named.view(groups, 6)

    for k in (2, 3):  # these stand as panel 0 does, in its context
        context[:, k], pose[:, k], named[:, k] = context[:, 0], pose[:, 0], named[:, 0]
    lights = len(world.CONTEXT["light"])
    step = torch.randint(1, lights, (groups,), generator=generator)
    context[:, 2, world.LIGHT] = (context[:, 0, world.LIGHT] + step) % lights

    images = []
    for part in tqdm(range(0, groups, 100), desc="draw panels"):
        rows = [t[part : part + 100].flatten(0, 1).to(device) for t in (identity, context, pose)]
        images.append((world.render(*rows, models.PANEL) * 255).round().byte().cpu())
    attributes = torch.cat([identity, context, named[..., None]], 2)
    return torch.cat(images).unflatten(0, (groups, 6)), attributes


def degrade(images, generator):
    """What a small diffusion model and its VAE do to panels (N, 3, s, s) in [-1, 1].

    Half of them are blurred; all are tinted and noised a little."""
    n = len(images)
    u = torch.rand(n, 6, generator=generator)
    a = 0.22 * (u[:, 0] * 2 - 1).clamp(min=0).view(n, 1, 1, 1)
    for axis, pad in ((3, (1, 1, 0, 0)), (2, (0, 0, 1, 1))):
        size = images.shape[axis]
        wide = F.pad(images, pad, mode="replicate")
        neighbours = wide.narrow(axis, 0, size) + wide.narrow(axis, 2, size)
        images = (1 - 2 * a) * images + a * neighbours
    brightness = 0.06 * (u[:, 1].view(n, 1, 1, 1) - 0.5)
    tint = 0.06 * (u[:, 2:5].view(n, 3, 1, 1) - 0.5)
    images = images * (1 + brightness) + tint
    noise = torch.randn(images.shape, generator=generator)
    return (images + 0.05 * u[:, 5].view(n, 1, 1, 1) ** 2 * noise).clamp(-1, 1)


def warp(images, generator):
    """Panels (N, 3, s, s), moved by up to two pixels as a whole and bent by about one, smoothly."""
    n, size = len(images), images.shape[-1]
    pixel = 2 / size  # grid_sample's unit is half the side
    whole = 2 * pixel * (torch.rand(n, 2, 1, 1, generator=generator) * 2 - 1)
    bend = pixel * (torch.rand(n, 2, 5, 5, generator=generator) * 2 - 1)
    move = whole + F.interpolate(bend, size=(size, size), mode="bicubic", align_corners=False)
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    places = (torch.stack([x, y]) + move).permute(0, 2, 3, 1)  # (N, s, s, 2)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def draw_pairs(attributes, n, generator):
    """Places in the pool (n, 2, 2), (group, panel), of n pairs.

    40 % show one critter, 30 % two that differ in one to three attributes, 30 % are of different
    groups: from these, where most words differ, it learns to compare words at all."""
    group = torch.randint(len(attributes), (n, 1), generator=generator).repeat(1, 2)
    u = torch.rand(n, 3, generator=generator)
    same = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]])[(u[:, 1] * 4).long()]
    other = torch.tensor([[0, 3], [1, 3], [0, 4], [1, 4], [2, 3], [1, 5]])[(u[:, 1] * 6).long()]
    panel = torch.where(u[:, :1] < 0.4, same, other)
    panel = torch.where(u[:, 2:] < 0.5, panel, panel.flip(1))
    far = u[:, 0] > 0.7
    group[far, 1] = torch.randint(len(attributes), (int(far.sum()),), generator=generator)
    return torch.stack([group, panel], 2)


def draw_descriptions(n, generator):
    """Attributes of n imagined pairs, two lists of n rows: any share of them agrees."""
    rows = []
    for _ in range(2):
        identity = world.identity_of(world.draw_identities(n, generator))
        context = world.draw_contexts(n, generator)
        pose = torch.randint(len(world.POSES), (n, 1), generator=generator)
        rows.append(torch.cat([identity, context, pose], 1))
    a, b = rows
    u = torch.rand(a.shape, generator=generator)
    agree = u < 1.3 * torch.rand(n, 1, generator=generator)
    return a.tolist(), torch.where(agree, a, b).tolist()


# ---- questions and answers -----------------------------------------------------------------------
def caption(row):
    """The caption of a panel."""
    identity, context, pose = split(row)
    return world.panel_caption(identity, context, pose=pose)


def split(row):
    """A row of attributes -> identity, context and the pose's number."""
    return row[: world.N_IDENTITY], row[world.N_IDENTITY : -1], row[-1]


def attribute_words(row):
    """{part: word} of an identity; a plain critter has no marks but "trim"."""
    words = [values[number] for values, number in zip(VALUES, split(row)[0])]
    return {part: "trim" if word == "plain" else word for part, word in zip(PARTS, words)}


def describe(row):
    """What curation compares: "round cat-eared vivid blue, red stripes, two eyes"."""
    word = attribute_words(row)
    body = f"{word['shape']} {word['ears']} {word['colour']}"
    eyes = f"{word['eyes']} {'eye' if word['eyes'] == 'one' else 'eyes'}"
    return f"{body}, {word['trim']} {word['pattern']}, {eyes}"


def compare(name, x, y):
    """One part of a comparison: "colour red blue different".

    Both values are said before they are judged. A small model learns that in minutes, and the
    judgement without the values hardly at all."""
    return f"{name} {x} {y} {'same' if x == y else 'different'}"


def comparison(a, b):
    """The chain of thought about two panels, all lines but the last."""
    x, y = attribute_words(a), attribute_words(b)
    parts = ", ".join(compare(part, x[part], y[part]) for part in PARTS)
    images = f"image 1: {describe(a)}\nimage 2: {describe(b)}"
    return f"subject: a {world.noun(a)}\n{images}\ncompare: {parts}\n"


def instruction(a, b):
    """What turns panel a into panel b: the new setting, or the new light if that is all."""
    names = [*world.CONTEXT, "pose"]
    changed = [name for name in names if a[world.COLUMN[name]] != b[world.COLUMN[name]]]
    _, context, pose = split(b)
    if changed == ["light"]:
        return f"keep the scene but show it {world.CONTEXT['light'][context[world.LIGHT]]}"
    return f"show this critter {world.setting(context, pose=pose)}"


def pair_lesson(a, b, kind):
    """Question and answer about two panels; kind in [0, 1) chooses the question."""
    differing = sum(x != y for x, y in zip(split(a)[0], split(b)[0]))
    if kind < 0.7:
        return curate.PAIR_QUESTION, f"{comparison(a, b)}verdict: {'no' if differing else 'yes'}"
    if kind < 0.85:
        return curate.INSTRUCTION_QUESTION, instruction(a, b)
    return exams.SUBJECT_SCORE_QUESTION, f"{comparison(a, b)}score: {max(4 - differing, 0)}"


def panel_lesson(row, kind, generator):
    """Question and answer about one panel; kind in [0, 1) chooses the question."""
    if kind < 0.4:
        return curate.DESCRIBE_QUESTION, caption(row)
    if kind < 0.6:
        return curate.DETAILS_QUESTION, world.details(split(row)[0])
    asked = list(row)  # any share of what the prompt asks for is wrong
    u = torch.rand(len(PROMPTED), generator=generator)
    wrong = u < 0.8 * torch.rand(1, generator=generator)
    for column, change in zip(PROMPTED.values(), wrong):
        if change:
            values = len(VALUES[column])
            step = 1 + int(torch.randint(values - 1, (1,), generator=generator))
            asked[column] = (row[column] + step) % values
    return prompt_lesson(row, asked)


def prompt_lesson(row, other):
    """Question and answer about how well a panel follows a prompt.

    The prompt asks for the shape, context and pose of `other`. Each part that is not as asked costs
    one of four points."""
    asked = list(row)
    for column in PROMPTED.values():
        asked[column] = other[column]
    parts, wrong = [], 0
    for name, column in PROMPTED.items():
        values = [(value or "nothing").split()[-1] for value in VALUES[column]]
        if name == "pose":
            values = POSE_WORDS
        parts.append(compare(name, values[row[column]], values[asked[column]]))
        wrong += row[column] != asked[column]
    answer = f"image: {caption(row)}\ncompare: {', '.join(parts)}\nscore: {max(4 - wrong, 0)}"
    return exams.PROMPT_SCORE_QUESTION.format(prompt=caption(asked)), answer


def vlm_words():
    """Every word that the VLM reads and writes, sorted; the poses' words, which came last, stand
    at the end."""
    texts = []
    for name, text in (vars(curate) | vars(exams)).items():
        if name.endswith("_QUESTION"):
            texts.append(text)
    standing = [[i] * (len(world.COLUMN) - 1) + [0] for i in range(4)]
    for row in standing[:2]:
        texts += [pair_lesson(standing[0], row, kind)[1] for kind in (0, 0.8, 0.9)]
    texts += [prompt_lesson(row, row)[1] for row in standing]
    texts.append(". , : ; ? ! 0 1 2 3 4")
    text = " ".join(texts).lower().replace("{prompt}", " ")
    for mark in ".,:;?!":
        text = text.replace(mark, f" {mark} ")
    words = {*text.split(), *models.world_words()} - {"standing"}
    return sorted(words) + sorted({*POSE_WORDS, *" ".join(world.POSES).split()} - words)


# ---- the losses ----------------------------------------------------------------------------------
class Lessons(torch.nn.Module):
    """The VLM and, beside it, heads that read all attributes off the class token while it learns
    to see."""

    def __init__(self, vlm, processor):
        super().__init__()
        self.vlm, self.tokenizer = vlm, processor.tokenizer
        self.sizes = [len(values) for values in VALUES]
        width = vlm.config.vision_config.hidden_size
        read = torch.nn.Linear(width, sum(self.sizes))
        self.heads = torch.nn.Sequential(torch.nn.LayerNorm(width), read)
        dull = "subject image shape ears colour scene outfit light pose compare verdict score"
        weights = {  # of words in the loss
            f"{dull} a the : , . \n": 0.2,
            "same different": 3.0,
            "one two three": 4.0,  # eyes are slow
            "yes no": 4.0,
        }
        word_weight = torch.ones(vlm.config.text_config.vocab_size)
        for words, weight in weights.items():
            word_weight[self.tokenizer.convert_tokens_to_ids(words.split(" "))] = weight
        self.register_buffer("word_weight", word_weight, persistent=False)

    def see(self, images):
        """Panels (N, 3, s, s) in [-1, 1] -> features (N, 17, width) of the last layer."""
        tower = self.vlm.model.vision_tower
        return tower(pixel_values=images, output_hidden_states=True).hidden_states[-1]

    def attribute_loss(self, features, attributes):
        """Cross entropy of all attributes (N, columns), averaged."""
        logits = self.heads(features[:, 0]).float().split(self.sizes, 1)
        losses = [F.cross_entropy(x, y) for x, y in zip(logits, attributes.T)]
        return sum(losses) / len(self.sizes)

    def pad(self, rows):
        """Lists of token ids -> (n, longest), padded with <pad> = 0."""
        rows = [torch.tensor(row + [self.tokenizer.eos_token_id]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids.to(self.word_weight.device)

    def word_loss(self, ids, wanted, **inputs):
        """Weighted cross entropy of the words ids[wanted], each predicted from those before it."""
        hidden = self.vlm.model.language_model(use_cache=False, **inputs).last_hidden_state
        target, wanted = ids[:, 1:][wanted[:, 1:]], wanted[:, 1:]
        logits = self.vlm.lm_head(hidden[:, :-1][wanted]).float()
        loss = F.cross_entropy(logits, target, reduction="none")
        weight = self.word_weight[target]
        return (loss * weight).sum() / weight.sum()

    def comparing_loss(self, pairs):
        """Of what follows "compare", when both descriptions are given as text, without images."""
        texts = [pair_lesson(a, b, kind)[1] for kind in (0.0, 1.0) for a, b in zip(*pairs)]
        texts += [" ".join(prompt_lesson(a, b)) for a, b in zip(*pairs)]
        ids = self.pad(self.tokenizer(texts).input_ids)
        compare = ids == self.tokenizer.convert_tokens_to_ids("compare")
        last = ids.shape[1] - 1 - compare.int().flip(1).argmax(1)  # the question has the word too
        place = torch.arange(ids.shape[1], device=ids.device)
        return self.word_loss(ids, (place > last[:, None]) & (ids != 0), input_ids=ids)

    def answer_loss(self, features, lessons):
        """Of the answers' words; features (n * images, 17, width), n lessons."""
        n, tokens = len(lessons), len(features) // len(lessons) * features.shape[1]
        image, answer = self.tokenizer.convert_tokens_to_ids(models.VLM_SPECIAL)
        rows, starts = [], []
        for question, reply in lessons:
            asked = [image] * tokens + self.tokenizer(question).input_ids + [answer]
            rows.append(asked + self.tokenizer(reply).input_ids)
            starts.append(len(asked))
        ids = self.pad(rows)
        embeds = self.vlm.get_input_embeddings()(ids)
        seen = self.vlm.model.multi_modal_projector(features).reshape(n, tokens, -1)
        embeds = torch.cat([seen.to(embeds.dtype), embeds[:, tokens:]], 1)
        place = torch.arange(ids.shape[1], device=ids.device)
        wanted = (place >= torch.tensor(starts, device=ids.device)[:, None]) & (ids != 0)
        return self.word_loss(ids, wanted, inputs_embeds=embeds)
