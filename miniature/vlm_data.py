"""What the miniature's VLM learns from: rendered pairs, the questions of curate.py about them, and the true answers."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

import curate
from miniature import exams, models, world

POOL = 12_000  # groups of six panels, drawn once: see `draw_pool`
VALUES = [
    *world.IDENTITY.values(),
    *world.CONTEXT.values(),
    list(world.POSES),
]  # of the eleven attributes, in the
# order of the columns
POSE_WORDS = [
    "standing",
    "left",
    "right",
    "jumping",
    "lying",
    "upside",
]  # one word a pose, for comparing them


def draw_pool(groups, generator, change=world.change_in_training, held_out=False, device="cpu"):
    """Panels for pairs: images (groups, 6, 3, s, s) in uint8 and their eleven attributes (groups, 6, 11).

    Of each group panels 0, 1, 2 show one critter: 1 in a free context and pose, 2 as 0 but in another light. Panels
    3 and 4 show one that differs from it in one or two attributes, 3 exactly where and how 0 stands. Panel 5 differs in
    three."""
    a = world.identity_of(world.draw_identities(groups, generator, held_out))
    b = change(a, torch.randint(1, 3, (groups,), generator=generator), generator)
    c = change(a, torch.full((groups,), 3), generator)
    identity = torch.stack([a, a, a, b, b, c], 1)
    context = world.draw_contexts(groups * 6, generator).view(groups, 6, 3)
    named = torch.randint(len(world.POSES), (groups * 6,), generator=generator)
    pose = world.in_pose(world.draw_poses(groups * 6, generator), named).view(groups, 6, 4)
    named = named.view(groups, 6)
    context[:, 2, :2], context[:, 3] = context[:, 0, :2], context[:, 0]
    for k in (2, 3):
        pose[:, k], named[:, k] = pose[:, 0], named[:, 0]
    context[:, 2, 2] = (context[:, 0, 2] + torch.randint(1, 4, (groups,), generator=generator)) % 4
    images = []
    for part in tqdm(range(0, groups, 100), desc="draw panels"):
        rows = [t[part : part + 100].flatten(0, 1).to(device) for t in (identity, context, pose)]
        images.append((world.render(*rows, models.PANEL) * 255).round().byte().cpu())
    return torch.cat(images).unflatten(0, (groups, 6)), torch.cat(
        [identity, context, named[..., None]], 2
    )


def degrade(images, generator):
    """What a small diffusion model and its VAE do to panels (N, 3, s, s) in [-1, 1]: blur, tint, noise."""
    n = len(images)
    u = torch.rand(n, 6, generator=generator)
    a = 0.22 * (u[:, 0] * 2 - 1).clamp(min=0).view(n, 1, 1, 1)  # half of them are not blurred
    for roll, pad in ((3, (1, 1, 0, 0)), (2, (0, 0, 1, 1))):
        wide, size = F.pad(images, pad, mode="replicate"), images.shape[roll]
        images = (1 - 2 * a) * images + a * (
            wide.narrow(roll, 0, size) + wide.narrow(roll, 2, size)
        )
    images = images * (1 + 0.06 * (u[:, 1].view(n, 1, 1, 1) - 0.5)) + 0.06 * (
        u[:, 2:5].view(n, 3, 1, 1) - 0.5
    )
    noise = torch.randn(images.shape, generator=generator)
    return (images + 0.05 * u[:, 5].view(n, 1, 1, 1) ** 2 * noise).clamp(-1, 1)


def warp(images, generator):
    """Panels (N, 3, s, s) moved by up to two pixels as a whole and bent by about one more, smoothly."""
    n, size = len(images), images.shape[-1]
    whole = (
        4 / size * (torch.rand(n, 2, 1, 1, generator=generator) * 2 - 1)
    )  # grid_sample's unit is half the side
    bend = 2 / size * (torch.rand(n, 2, 5, 5, generator=generator) * 2 - 1)
    move = whole + F.interpolate(bend, size=(size, size), mode="bicubic", align_corners=False)
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x, y]) + move
    return F.grid_sample(
        images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )


def attribute_words(row):
    """The words for an identity's seven attributes; a plain critter has no marks but "trim". `row`: eleven numbers."""
    words = [values[i] for values, i in zip(VALUES[:7], row)]
    return [*words[:5], "trim" if words[5] == "plain" else words[5], words[6]]


def describe(row):
    """What curation compares, in words: "round cat-eared vivid blue, red stripes, two eyes". `row`: eleven numbers."""
    shape, ears, colour, tone, second, marks, eyes = attribute_words(row)
    return f"{shape} {ears} {tone} {colour}, {second} {marks}, {eyes} {'eye' if eyes == 'one' else 'eyes'}"


def comparison(a, b):
    """The chain of thought about two panels, all lines but the last.

    The line "compare" says both values before it judges them: "ears horned horned same, colour red blue different".
    A small model learns that in minutes, and the judgement without the values hardly at all."""
    names, x, y = (
        ["shape", "ears", "colour", "tone", "trim", "pattern", "eyes"],
        attribute_words(a),
        attribute_words(b),
    )
    parts = ", ".join(
        f"{name} {u} {v} {'same' if u == v else 'different'}" for name, u, v in zip(names, x, y)
    )
    return f"subject: a {world.noun(a)}\nimage 1: {describe(a)}\nimage 2: {describe(b)}\ncompare: {parts}\n"


def instruction(a, b):
    """What turns panel a into panel b: the new setting, or the new light if nothing else changes."""
    if (a[7], a[8], a[10]) == (b[7], b[8], b[10]) and a[9] != b[9]:
        return f"keep the scene but show it {VALUES[9][b[9]]}"
    return f"show this critter {world.setting(b[7:10], pose=b[10])}"


def pair_lesson(a, b, kind):
    """Question and answer about panels a and b (eleven numbers each); kind in [0, 1) chooses the question."""
    differing = sum(x != y for x, y in zip(a[:7], b[:7]))
    if kind < 0.7:
        return curate.PAIR_QUESTION, comparison(a, b) + f"verdict: {'no' if differing else 'yes'}"
    if kind < 0.85:
        return curate.INSTRUCTION_QUESTION, instruction(a, b)
    return exams.SUBJECT_SCORE_QUESTION, comparison(a, b) + f"score: {max(4 - differing, 0)}"


def panel_lesson(a, kind, generator):
    """Question and answer about one panel a (eleven numbers)."""
    if kind < 0.4:
        return curate.DESCRIBE_QUESTION, caption(a)
    if kind < 0.6:
        return curate.DETAILS_QUESTION, world.details(a[:7])
    asked, wrong = (
        list(a),
        torch.rand(len(PROMPTED), generator=generator) < 0.8 * torch.rand(1, generator=generator),
    )
    for column, change in zip(PROMPTED.values(), wrong):
        if change:
            asked[column] = (
                a[column]
                + 1
                + int(torch.randint(len(VALUES[column]) - 1, (1,), generator=generator))
            ) % len(VALUES[column])
    return prompt_lesson(a, asked)


PROMPTED = {
    "shape": 0,
    "scene": 7,
    "outfit": 8,
    "light": 9,
    "pose": 10,
}  # what the prompt score is about -> its column


def caption(row):
    """The caption of a panel of eleven attributes."""
    return world.panel_caption(row[:7], row[7:10], pose=row[10])


def prompt_lesson(a, b):
    """Question and answer about how well panel a follows a prompt that asks for the shape, context and pose of b. Each
    part that is not as asked costs one of four points."""
    asked = [*b[:1], *a[1:7], *b[7:]]
    parts, wrong = [], 0
    for name, column in PROMPTED.items():
        values = (
            POSE_WORDS
            if name == "pose"
            else [(value or "nothing").split()[-1] for value in VALUES[column]]
        )
        x, y = (values[row[column]] for row in (a, asked))
        parts.append(f"{name} {x} {y} {'same' if x == y else 'different'}")
        wrong += x != y
    answer = f"image: {caption(a)}\ncompare: {', '.join(parts)}\nscore: {max(4 - wrong, 0)}"
    prompt = caption(asked)
    return exams.PROMPT_SCORE_QUESTION.format(prompt=prompt), answer


def vlm_words():
    """Every word that the VLM reads and writes, sorted; the words of poses, which came last, stand at the end."""
    questions = " ".join(
        v for file in (curate, exams) for k, v in vars(file).items() if k.endswith("_QUESTION")
    )
    standing = [[i] * 10 + [0] for i in range(4)]
    answers = " ".join(
        pair_lesson(standing[0], row, k)[1] for row in standing[:2] for k in (0, 0.8, 0.9)
    )
    answers += (
        " " + " ".join(prompt_lesson(row, row)[1] for row in standing) + " . , : ; ? ! 0 1 2 3 4"
    )
    text = f"{questions} {answers}".lower().replace("{prompt}", " ")
    for mark in ".,:;?!":
        text = text.replace(mark, f" {mark} ")
    words = {*text.split(), *models.world_words()} - {"standing"}
    return sorted(words) + sorted({*POSE_WORDS, *" ".join(world.POSES).split()} - words)


class Lessons(torch.nn.Module):
    """The VLM and, beside it, linear heads that read all attributes off the class token while it learns to see."""

    def __init__(self, vlm, processor):
        super().__init__()
        self.vlm, self.tokenizer, self.sizes = vlm, processor.tokenizer, [len(v) for v in VALUES]
        width = vlm.config.vision_config.hidden_size
        self.heads = torch.nn.Sequential(
            torch.nn.LayerNorm(width), torch.nn.Linear(width, sum(self.sizes))
        )
        weight = torch.ones(
            vlm.config.text_config.vocab_size
        )  # of a word in the loss: the dull ones count little
        dull = "subject image shape ears colour tone scene outfit light pose compare verdict score a the : , . \n"
        for words, w in (
            (dull, 0.2),
            ("same different", 3.0),
            ("one two three", 4.0),
            ("yes no", 4.0),
        ):  # eyes are slow
            weight[self.tokenizer.convert_tokens_to_ids(words.split(" "))] = w
        self.register_buffer("word_weight", weight, persistent=False)

    def see(self, images):
        """Panels (N, 3, s, s) in [-1, 1] -> features (N, 17, width) of the vision tower's last layer."""
        return self.vlm.model.vision_tower(
            pixel_values=images, output_hidden_states=True
        ).hidden_states[-1]

    def attribute_loss(self, features, attributes):
        """Cross entropy of the eleven attributes, averaged."""
        logits = self.heads(features[:, 0]).float().split(self.sizes, 1)
        return sum(F.cross_entropy(x, y) for x, y in zip(logits, attributes.T)) / len(self.sizes)

    def comparing_loss(self, pairs):
        """Cross entropy of what follows "compare" when both descriptions are given as text; no image is needed."""
        texts = [pair_lesson(a, b, kind)[1] for kind in (0.0, 1.0) for a, b in zip(*pairs)]
        texts += [" ".join(prompt_lesson(a, b)) for a, b in zip(*pairs)]
        rows = [
            torch.tensor(ids + [self.tokenizer.eos_token_id])
            for ids in self.tokenizer(texts).input_ids
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(
            self.word_weight.device
        )  # padded by <pad> = 0
        compare = ids == self.tokenizer.convert_tokens_to_ids("compare")
        start = (
            ids.shape[1] - 1 - compare.int().flip(1).argmax(1)
        )  # its last place: the question has the word as well
        wanted = (torch.arange(ids.shape[1], device=ids.device) > start[:, None]) & (ids != 0)
        hidden = self.vlm.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        target = ids[:, 1:][wanted[:, 1:]]
        loss = F.cross_entropy(
            self.vlm.lm_head(hidden[:, :-1][wanted[:, 1:]]).float(), target, reduction="none"
        )
        weight = self.word_weight[target]
        return (loss * weight).sum() / weight.sum()

    def answer_loss(self, features, lessons):
        """Weighted cross entropy of the answers' words; features (n * images, 17, width), n lessons."""
        n, tokens = len(lessons), len(features) // len(lessons) * features.shape[1]
        image, answer = self.tokenizer.convert_tokens_to_ids(models.VLM_SPECIAL)
        rows, starts = [], []
        for question, reply in lessons:
            asked = [image] * tokens + self.tokenizer(question).input_ids + [answer]
            rows.append(
                torch.tensor(
                    asked + self.tokenizer(reply).input_ids + [self.tokenizer.eos_token_id]
                )
            )
            starts.append(len(asked))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(
            features.device
        )  # padded by <pad> = 0
        embeds = self.vlm.get_input_embeddings()(ids)
        seen = self.vlm.model.multi_modal_projector(features).reshape(n, tokens, -1)
        embeds = torch.cat([seen.to(embeds.dtype), embeds[:, tokens:]], 1)
        hidden = self.vlm.model.language_model(
            inputs_embeds=embeds, use_cache=False
        ).last_hidden_state
        place = torch.arange(ids.shape[1])[None]
        wanted = (place >= torch.tensor(starts)[:, None]) & (
            place < torch.tensor([len(r) for r in rows])[:, None]
        )
        wanted = wanted[:, 1:].to(ids.device)
        target = ids[:, 1:][wanted]
        loss = F.cross_entropy(
            self.vlm.lm_head(hidden[:, :-1][wanted]).float(), target, reduction="none"
        )
        weight = self.word_weight[target]
        return (loss * weight).sum() / weight.sum()


def draw_descriptions(n, generator):
    """Attributes of n imagined pairs, two lists of rows of eleven numbers: any share of them agrees."""
    a, b = (
        torch.cat(
            [
                world.identity_of(world.draw_identities(n, generator)),
                world.draw_contexts(n, generator),
                torch.randint(len(world.POSES), (n, 1), generator=generator),
            ],
            1,
        )
        for _ in range(2)
    )
    agree = torch.rand(n, 11, generator=generator) < 1.3 * torch.rand(n, 1, generator=generator)
    return a.tolist(), torch.where(agree, a, b).tolist()


def draw_pairs(attributes, n, generator):
    """Places in the pool (n, 2, 2) (group, panel) of n pairs: 40 % one critter, 30 % two that differ in one to three
    attributes, 30 % of different groups: from these, where most words differ, it learns to compare words at all."""
    group = torch.randint(len(attributes), (n, 1), generator=generator).repeat(1, 2)
    u = torch.rand(n, 3, generator=generator)
    same = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]])[(u[:, 1] * 4).long()]
    other = torch.tensor([[0, 3], [1, 3], [0, 4], [1, 4], [2, 3], [1, 5]])[(u[:, 1] * 6).long()]
    panel = torch.where(u[:, :1] < 0.4, same, other)
    panel = torch.where(u[:, 2:] < 0.5, panel, panel.flip(1))
    far = u[:, 0] > 0.7
    group[far, 1] = torch.randint(len(attributes), (int(far.sum()),), generator=generator)
    return torch.stack([group, panel], 2)
