"""Exams of this world: held-out references in new contexts, the judge that sees what is in a picture, and its marks.

Used by evaluate.py and measure.py, and by nothing that makes or trains: evaluation shares no model and no data with what
it judges.
"""

import dataclasses
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageClassification

import dsd
from miniature import world


@dataclasses.dataclass
class Case:
    """One picture to draw: what the methods are given, and what is true."""
    reference: int  # the number of the reference
    image: Image.Image  # the reference itself
    subject: str  # what prompts call it
    prompt: str
    reference_prompt: str  # what the reference shows, for methods that must be told
    sheet_prompt: str  # both pictures as one image, for in-context inpainting
    class_prompts: list  # other pictures of such a subject, for DreamBooth's prior
    seed: int
    kind: str = "subject"  # or "relight"
    truth: Image.Image | None = None  # the true rendering
    identity: dict = dataclasses.field(default_factory=dict)  # {attribute: value} of the subject
    context: dict = dataclasses.field(default_factory=dict)  # as asked
    shown: dict = dataclasses.field(default_factory=dict)  # the reference's own context


class Judge:
    """An image classifier whose labels read "attribute: value": the verdict is the best label of each attribute."""

    def __init__(self, folder):
        if not (Path(folder) / "config.json").exists():
            raise dsd.DsdError(f"no judge at {folder}; --judge takes a folder of a transformers image classifier")
        try:
            model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        except Exception as error:  # a cut file, another kind of model: many kinds, one answer
            raise dsd.DsdError(f"cannot load the judge {folder}: {dsd.one_line(error)}") from None
        self.model, self.labels = model.to(dsd.device()).eval(), {}
        for number, label in sorted(model.config.id2label.items()):
            attribute, _, value = label.partition(": ")
            self.labels.setdefault(attribute, []).append((number, value))
        if missing := {*world.IDENTITY, *world.CONTEXT} - set(self.labels):
            raise dsd.DsdError(f"the judge {folder} has no labels \"attribute: value\" for {sorted(missing)}")

    @torch.inference_mode()
    def logits(self, images):
        """Of some images (B, labels)."""
        parts = [dsd.to_pixels(images[i:i + 100]).to(self.model.device) for i in range(0, len(images), 100)]
        return torch.cat([self.model(pixel_values=part).logits.cpu() for part in parts])

    def __call__(self, images):
        """What it sees in each of some images: {attribute: value}."""
        return [{name: block[int(row[[k for k, _ in block]].argmax())][1] for name, block in self.labels.items()}
                for row in self.logits(images)]

    def sureness(self, images):
        """How sure it is of the whole identity (B,): the least of the probabilities of what it sees, 0 to 1."""
        logits = self.logits(images)
        best = [logits[:, [k for k, _ in self.labels[name]]].softmax(1).amax(1) for name in world.IDENTITY]  # (B,) each
        return torch.stack(best).amin(0)


def marks(case, seen):
    """The judge's scores of one picture; `seen` is what it sees, {attribute: value}. All in 0..1."""
    kept = [seen[name] == value for name, value in case.identity.items()]
    followed = {name: seen[name] == value for name, value in case.context.items()}
    new = [followed[name] for name, value in case.context.items() if value != case.shown[name]]
    cp, pf, pf_new = sum(kept) / len(kept), sum(followed.values()) / len(followed), sum(new) / len(new)
    return {"cp": cp, "all_kept": float(all(kept)), "pf": pf, "cp_pf": cp * pf, "pf_new": pf_new, "cp_pf_new": cp * pf_new,
            **{f"{name}_as_wanted": float(seen[name] == value) for name, value in (case.identity | case.context).items()}}


def pose_kept(image, truth):
    """Pose and layout, whatever the light: the correlation of the luminances of two images, negative ones counted as 0.

    Each is normalised to mean 0 and norm 1, so a uniform change of brightness or contrast costs nothing. Against the true
    relit rendering: 1 for itself; about 0.93 for the same critter in another light, 0.55 in another pose."""
    a, b = (torch.frombuffer(bytearray(i.convert("L").tobytes()), dtype=torch.uint8).double() for i in (image, truth))
    a, b = ((x - x.mean()) / (x - x.mean()).norm().clamp(min=1e-6) for x in (a, b))
    return round(max(float((a * b).sum()), 0.0), 6)


def words(attributes, numbers):
    """{attribute: value} for values by number; the empty accessory is called "nothing", as the judge does."""
    return {name: values[int(k)] or "nothing" for (name, values), k in zip(attributes.items(), numbers)}


def render(identity, context, pose, size):
    """One rendered panel as an image; identity (7,), context (3,), pose (4,)."""
    return to_image(world.render(identity[None], context[None], pose[None], size)[0])


def to_image(pixels):
    """(3, h, w) in [0, 1] -> an RGB image."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def world_cases(numbers, prompts, seed, size):
    """Held-out references by number: for each, `prompts` cases in other scenes and one of the same scene relit.

    A reference depends on its number and the seed alone: more references never change the first ones."""
    cases = []
    for number in numbers:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        identity = world.identity_of(world.draw_identities(1, draw, held_out=True))[0]
        shown, pose = world.draw_contexts(1, draw)[0], world.draw_poses(1, draw)[0]
        asked = world.draw_contexts(64, draw)
        asked = asked[asked[:, 0] != shown[0]][:prompts]  # another scene; accessory and light as they fall
        relit = shown.clone()
        relit[2] = (shown[2] + torch.randint(1, 4, (1,), generator=draw)[0]) % 4
        classes = [world.panel_caption(identity, c) for c in world.draw_contexts(8, draw)]
        image = render(identity, shown, pose, size)
        for k, (context, relight) in enumerate([*((c, False) for c in asked), (relit, True)]):
            there = pose if relight else world.draw_poses(1, draw)[0]
            cases.append(Case(
                number, image, world.noun(identity), world.panel_caption(identity, context),
                world.panel_caption(identity, shown), world.sheet_caption(identity, [shown, context], (1, 2), relight),
                classes, (seed * 1_000_003 + number) * 64 + k, "relight" if relight else "subject",
                render(identity, context, there, size), words(world.IDENTITY, identity), words(world.CONTEXT, context),
                words(world.CONTEXT, shown)))
    return cases
