"""Exams: the cases that methods are given, and the marks that a judge and a vision-language model
(VLM) give.

Used by evaluate.py and measure.py, and by nothing that generates data or trains: what is examined
never saw the held-out critters, and no other step uses the judge.
"""

import dsd

import dataclasses
import re
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoModelForImageClassification

import curate
import sample
from miniature import world

SUBJECT_SCORE_QUESTION = (
    "How well does the second image keep the subject of the first? Answer in five lines. "
    "subject: name it. image 1: describe it. image 2: describe it. "
    "compare: part by part. score: 0 to 4."
)
PROMPT_SCORE_QUESTION = (
    "How well does the image follow this prompt: {prompt}? Answer in three lines. "
    "image: describe it. compare: part by part. score: 0 to 4."
)
END = ' in a few words, then end with a line "score: N", N from 0 to 4.'
SCALE = "1: a little. 2: in part. 3: all but a detail. 4: entirely. Say why" + END
SUBJECT_CRITERIA = (
    "The first image shows a reference subject, the second was generated from it. How well does "
    "the second image keep that subject? Compare the shape (outline, proportions, parts), the "
    "colours (hue, brightness, where they are), the texture and fine markings and, for people and "
    "animals, the face. Ignore place, pose and light. 0: another subject. 1: the same kind only. "
    "2: alike, with clear differences. 3: the same but for small things. 4: the very same. "
    "Compare" + END
)
PROMPT_CRITERIA = (
    'An image was generated from this prompt: "{prompt}". How well does it follow? Is what the '
    "prompt names there, is each detail right, is nothing missing, are place, action and style as "
    "asked? 0: not at all. " + SCALE
)
COPY_CRITERIA = (
    'The second image was generated from the first and from this prompt: "{prompt}". How well does '
    "the second image follow the prompt? What it merely copies from the first (background, pose, "
    "light, framing) does not count as following. 0: not at all, or a copy. " + SCALE
)
WORLD_QUESTIONS = {  # score: is the reference shown as well, and the question
    "vlm_cp": (True, SUBJECT_SCORE_QUESTION),
    "vlm_pf": (False, PROMPT_SCORE_QUESTION),
}
FOLDER_QUESTIONS = {
    "vlm_cp": (True, SUBJECT_CRITERIA),
    "vlm_pf": (False, PROMPT_CRITERIA),
    "vlm_pf_new": (True, COPY_CRITERIA),
}


# ---- the cases -----------------------------------------------------------------------------------
@dataclasses.dataclass
class Case:
    """One picture to draw: what the methods are given, and what is true."""

    reference: int  # the number of the reference
    image: Image.Image  # the reference itself
    subject: str  # what prompts call it
    prompt: str
    sheet_prompt: str  # both pictures as one image, for in-context inpainting
    seed: int
    reference_prompt: str = ""  # what the reference shows, for methods that must be told
    class_prompts: list = dataclasses.field(default_factory=list)  # of others, DreamBooth's prior
    kind: str = "subject"  # or "relight"
    move: str = "same pose"  # from the reference to what is asked; or "moved", "turned"
    truth: Image.Image | None = None  # the true rendering
    identity: dict = dataclasses.field(default_factory=dict)  # {attribute: value} of the subject
    context: dict = dataclasses.field(default_factory=dict)  # as asked, the pose included
    shown: dict = dataclasses.field(default_factory=dict)  # the reference's own context


def words(attributes, numbers):
    """{attribute: value} by number; the empty accessory is called "nothing", as the judge does."""
    pairs = zip(attributes.items(), numbers)
    return {name: values[int(number)] or "nothing" for (name, values), number in pairs}


def to_image(pixels):
    """(3, h, w) in [0, 1] -> an RGB image."""
    return dsd.to_images(pixels[None])[0]


def context_words(context, pose):
    """A context and the number of a named pose in words."""
    return words(world.CONTEXT, context) | {"pose": world.POSE_NAMES[pose]}


def render(identity, context, pose, named, size):
    """A panel as an image: identity (N_IDENTITY,), context (3,), pose (4,), pose by number."""
    stand = world.in_pose(pose[None], torch.tensor([named]))
    return to_image(world.render(identity[None], context[None], stand, size)[0])


def seen_identities(adapter):
    """The identities in the pairs that an adapter was trained on, by number: seen.json in its
    folder (measure.py writes it), or none."""
    file = Path(adapter or "") / "seen.json"
    return set(dsd.read_json(file)["identities"]) if file.exists() else set()


def world_cases(numbers, prompts, seed, size, seen=()):
    """Held-out references by number: for each, `prompts` cases in other scenes and one of the same
    scene relit, in any of the six poses.

    A reference depends on its number and the seed alone: more references never change the first
    ones. References whose identity was `seen` in training (the teacher may draw any by itself) are
    left out, which is said."""
    cases = []
    for number in numbers:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        index = world.draw_identities(1, draw, held_out=True)
        if index.item() in seen:
            print(f"reference {number} is left out: its critter is in the adapter's training pairs")
        else:
            cases += reference_cases(number, world.identity_of(index)[0], prompts, seed, size, draw)
    return cases


def reference_cases(number, identity, prompts, seed, size, draw):
    """The cases of one reference; draw: its generator."""
    shown, pose = world.draw_contexts(1, draw)[0], world.draw_poses(1, draw)[0]
    asked = world.draw_contexts(64, draw)
    asked = asked[asked[:, world.SCENE] != shown[world.SCENE]]  # accessory and light as they fall
    if prompts > len(asked):
        has = f"reference {number} has only {len(asked)} new contexts"
        raise dsd.DsdError(f"--prompts {prompts}: {has}")
    lights = len(world.CONTEXT["light"])
    relit = shown.clone()
    step = torch.randint(1, lights, (1,), generator=draw)[0]
    relit[world.LIGHT] = (shown[world.LIGHT] + step) % lights
    mixed = (seed * 1_000_003 + number + 1) * 2654435761  # first draws of such seeds are alike
    poses = torch.Generator().manual_seed(mixed % 2**63)
    named = torch.randint(len(world.POSES), (72,), generator=poses).tolist()
    at = named[63]  # the reference's own
    others = zip(world.draw_contexts(8, draw), named[64:])

    case = Case(
        reference=number,
        image=render(identity, shown, pose, at, size),
        subject=world.noun(identity),
        prompt="",
        sheet_prompt="",
        seed=0,
        reference_prompt=world.panel_caption(identity, shown, pose=at),
        class_prompts=[world.panel_caption(identity, c, pose=k) for c, k in others],
        identity=words(world.IDENTITY, identity),
        shown=context_words(shown, at),
    )
    cases = []
    for k, context in enumerate([*asked[:prompts], relit]):
        relight = k == prompts
        there, to = (pose, at) if relight else (world.draw_poses(1, draw)[0], named[k])
        sheet = world.sheet_caption(identity, [shown, context], (1, 2), relight, poses=(at, to))
        new = dataclasses.replace(
            case,
            prompt=world.panel_caption(identity, context, pose=to),
            sheet_prompt=sheet,
            seed=(seed * 1_000_003 + number) * 64 + k,
            kind="relight" if relight else "subject",
            move=world.move(at, to),
            truth=render(identity, context, there, to, size),
            context=context_words(context, to),
        )
        cases.append(new)
    return cases


def folder_cases(args):
    """The cases of --folder, without what systems and editors add (`._00.jpg`, `__MACOSX/`)."""
    folder, files = args.folder / "images", []
    for file in sorted(folder.rglob("*")):
        foreign = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        if sample.is_picture(file) and not foreign:
            files.append(file)
    if not files:
        raise dsd.DsdError(f"no pictures below {folder}; --folder wants DreamBench++'s layout")
    cases, owner = [], {}
    for number, file in enumerate(files[: args.count]):
        place = args.folder / "captions" / file.relative_to(folder)
        caption = place.with_suffix(".txt")
        subject, *prompts = read_caption(caption, args.contexts or 1)
        if owner.setdefault(caption, file) != file:
            both = f"{owner[caption]} and {file.name}"
            print(f"warning: {both} share the caption {caption}", file=sys.stderr)
        image = dsd.fit_image(dsd.open_image(file), args.width, args.height)
        opening = f"two images of the identical {subject} side by side: left a {subject}, right"
        for k, prompt in enumerate(prompts[: args.contexts]):
            seed = (args.seed * 1_000_003 + number) * 64 + k
            cases.append(Case(number, image, subject, prompt, f"{opening} {prompt}", seed))
    return cases


def read_caption(file, least):
    """The lines of a caption that are not empty: the subject's name, then at least so many
    prompts."""
    with dsd.explained(f"{file}: not a text file in UTF-8"):
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line for line in lines if line]
    if len(lines) <= least:
        raise dsd.DsdError(f"{file}: wanted the subject's name and then at least {least} prompts")
    return lines


# ---- the judge's marks ---------------------------------------------------------------------------
class Judge:
    """An image classifier whose labels read "attribute: value": the verdict is the best label of
    each attribute."""

    def __init__(self, folder):
        if not (Path(folder) / "config.json").exists():
            wanted = "--judge takes a folder of a transformers image classifier"
            raise dsd.DsdError(f"no judge at {folder}; {wanted}")
        how = {"dtype": torch.float32, "use_safetensors": True}
        with dsd.explained(f"cannot load the judge {folder}"):  # a cut file, another kind of model
            model = AutoModelForImageClassification.from_pretrained(folder, **how)
        self.model, self.labels = model.to(PartialState().device).eval(), {}
        for number, label in sorted(model.config.id2label.items()):
            attribute, _, value = label.partition(": ")
            self.labels.setdefault(attribute, []).append((number, value))
        missing = {*world.IDENTITY, *world.CONTEXT, "pose"} - set(self.labels)
        if missing:
            wanted = f'has no labels "attribute: value" for {sorted(missing)}'
            raise dsd.DsdError(f"the judge {folder} {wanted}")

    @torch.inference_mode()
    def logits(self, images):
        """Of some images (B, labels)."""
        parts = []
        for i in range(0, len(images), 100):
            pixels = dsd.to_pixels(images[i : i + 100]).to(self.model.device)
            parts.append(self.model(pixel_values=pixels).logits.cpu())
        return torch.cat(parts)

    def __call__(self, images):
        """What it sees in each of some images: {attribute: value}."""
        logits, seen = self.logits(images), [{} for _ in images]
        for name, labels in self.labels.items():
            best = logits[:, [number for number, _ in labels]].argmax(1)  # (B,)
            for one, k in zip(seen, best.tolist()):
                one[name] = labels[k][1]
        return seen


def marks(case, seen):
    """The judge's scores of one picture, 0 to 1; `seen` is what it sees, {attribute: value}."""
    kept = {name: seen[name] == value for name, value in case.identity.items()}
    followed = {name: seen[name] == value for name, value in case.context.items()}
    new = [followed[name] for name, value in case.context.items() if value != case.shown[name]]
    cp = sum(kept.values()) / len(kept)
    pf = sum(followed.values()) / len(followed)
    pf_new = sum(new) / len(new)
    return {
        "cp": cp,
        "all_kept": float(all(kept.values())),
        "pf": pf,
        "cp_pf": cp * pf,
        "pf_new": pf_new,
        "cp_pf_new": cp * pf_new,
        f"cp_{case.move}": cp,
        f"cp_pf_{case.move}": cp * pf,
        **{f"{name}_as_wanted": float(right) for name, right in (kept | followed).items()},
    }


def pose_kept(image, truth):
    """Pose and layout, whatever the light: the correlation of the luminances of two images,
    negative ones counted as 0.

    Each is normalised to mean 0 and norm 1, so a uniform change of brightness or contrast costs
    nothing. Compared with the true relit rendering, itself has 1, the same critter in another light
    about 0.93, and in another pose 0.55."""

    def normalised(image):
        grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).double()
        grey = grey - grey.mean()
        return grey / grey.norm().clamp(min=1e-6)

    return round(max(float((normalised(image) * normalised(truth)).sum()), 0.0), 6)


# ---- the VLM's marks, and all together -----------------------------------------------------------
HEADING = r"(?<![a-z])(?:score|rating)[^a-z\d(]*(?:\([^)\n]*\))?[^a-z\d]*(?:is|of)?[^a-z\d]*"
POINTS = r"([0-4])(?:\.0+)?(?![.\d]*\d)"


def parse_score(answer):
    """The last "score: N" of an answer as N / 4; None if there is none from 0 to 4."""
    found = re.findall(HEADING + POINTS, answer, re.IGNORECASE)
    return int(found[-1]) / 4 if found else None


def vlm_scores(vlm, questions, cases, images):
    """The VLM's scores and answers, a record for each picture. One that it did not give is None."""
    records = [{"answers": {}} for _ in cases]
    for name, (with_reference, question) in questions.items():
        shown = [[image] for image in images]
        if with_reference:
            shown = [[case.image, image] for case, image in zip(cases, images)]
        asked = [question.replace("{prompt}", case.prompt) for case in cases]
        answers = curate.ask(*vlm, shown, asked, len(cases), 400)
        for record, answer in zip(records, answers):
            record["answers"][name], record[name] = answer, parse_score(answer)
    for record in records:
        for name in [name for name in record if name.startswith("vlm_pf")]:
            cp, pf = record["vlm_cp"], record[name]
            product = None if cp is None or pf is None else cp * pf
            record[name.replace("_pf", "_cp_pf")] = product
    return records


def score(judge, witness, vlm, cases, images):
    """All scores of some pictures, one record for each.

    witness: a second judge or None, whose marks stand beside the first's; "judges_agree" is the
    share of attributes of which both say the same."""
    questions = WORLD_QUESTIONS if judge else FOLDER_QUESTIONS
    records = vlm_scores(vlm, questions, cases, images)
    for record, case, image, seen in zip(records, cases, images, judge(images) if judge else []):
        record |= marks(case, seen) | {"seen": seen}
        if case.kind == "relight":
            record["pose"] = pose_kept(image, case.truth)
    for record, case, seen in zip(records, cases, witness(images) if witness else []):
        second = marks(case, seen)
        record |= {f"witness_{name}": second[name] for name in ("cp", "pf", "cp_pf")}
        same = [record["seen"].get(name) == value for name, value in seen.items()]
        record["judges_agree"] = sum(same) / len(same)
    return records
