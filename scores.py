"""What evaluate.py measures: the judge's and the VLM's scores of a picture, and how sure their means are."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

import curate
import dsd
from miniature import world

SUBJECT_CRITERIA = """The first image shows a reference subject, the second was generated from it. How well does the second \
image keep that subject? Compare the shape (outline, proportions, parts), the colours (hue, brightness, where they are), \
the texture and fine markings and, for people and animals, the face. Ignore place, pose and light. 0: another subject. \
1: the same kind only. 2: alike, with clear differences. 3: the same but for small things. 4: the very same. \
Compare in a few words, then end with a line "score: N", N from 0 to 4."""
PROMPT_CRITERIA = """An image was generated from this prompt: "{prompt}". How well does it follow? Is what the prompt names \
there, is each detail right, is nothing missing, are place, action and style as asked? 0: not at all. 1: a little. \
2: in part. 3: all but a detail. 4: entirely. Say why in a few words, then end with a line "score: N", N from 0 to 4."""
COPY_CRITERIA = """The second image was generated from the first and from this prompt: "{prompt}". How well does the second \
image follow the prompt? What it merely copies from the first (background, pose, light, framing) does not count as \
following. 0: not at all, or a copy. 1: a little. 2: in part. 3: all but a detail. 4: entirely. Say why in a few words, then \
end with a line "score: N", N from 0 to 4."""
WORLD_QUESTIONS = {"vlm_cp": (True, curate.SUBJECT_SCORE_QUESTION),  # score -> is the reference shown too, the question
                   "vlm_pf": (False, curate.PROMPT_SCORE_QUESTION)}
FOLDER_QUESTIONS = {"vlm_cp": (True, SUBJECT_CRITERIA), "vlm_pf": (False, PROMPT_CRITERIA),
                    "vlm_pf_new": (True, COPY_CRITERIA)}


# ---- the judge, who knows the truth ----------------------------------------------------------------------------------
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
    def __call__(self, images):
        """What it sees in each of some images: {attribute: value}."""
        logits = self.model(pixel_values=dsd.to_pixels(images).to(self.model.device)).logits.cpu()  # (B, labels)
        return [{name: block[int(row[[k for k, _ in block]].argmax())][1] for name, block in self.labels.items()}
                for row in logits]


def world_scores(case, seen):
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


# ---- the vision-language model, in DreamBench++'s manner -------------------------------------------------------------
def parse_score(answer):
    """The last "score: N" of an answer as N / 4, None if there is none from 0 to 4."""
    found = re.findall(r"score\W*([0-4])(?![\d.]*\d)", answer, flags=re.IGNORECASE)
    return int(found[-1]) / 4 if found else None


def vlm_scores(vlm, cases, images, questions):
    """The VLM's scores in 0..1 and whole answers; an answer without a score scores None and is left out of means."""
    records = [{"answers": {}} for _ in cases]
    for name, (with_reference, question) in questions.items():
        shown = [[c.image, image] if with_reference else [image] for c, image in zip(cases, images)]
        asked = [question.replace("{prompt}", c.prompt) for c in cases]
        for record, answer in zip(records, curate.ask(*vlm, shown, asked, len(cases), 200)):
            record["answers"][name], record[name] = answer, parse_score(answer)
    for record in records:
        for name in [n for n in record if n.startswith("vlm_pf")]:
            pair = record["vlm_cp"], record[name]
            record[name.replace("_pf", "_cp_pf")] = None if None in pair else pair[0] * pair[1]
    return records


def score(judge, vlm, questions, cases, images):
    """Every score of some pictures, a record each."""
    records = vlm_scores(vlm, cases, images, questions)
    if judge:
        for record, case, image, seen in zip(records, cases, images, judge(images)):
            record |= world_scores(case, seen) | {"seen": seen}
            if case.kind == "relight":
                record["pose"] = pose_kept(image, case.truth)
    return records


# ---- means and intervals ---------------------------------------------------------------------------------------------
def bootstrap(values, references, resamples=2000):
    """[mean, low, high]: the mean of the values that are not None and its 95 % bootstrap interval.

    Resampled are references, not pictures: the pictures of one reference are not independent. None without values."""
    known = [(r, v) for r, v in zip(references, values) if v is not None]
    if not known:
        return None
    place = {r: k for k, r in enumerate(sorted({r for r, _ in known}))}
    sums = torch.zeros(len(place), 2, dtype=torch.float64)
    for r, v in known:
        sums[place[r]] += torch.tensor([v, 1.0], dtype=torch.float64)
    draws = torch.randint(len(place), (resamples, len(place)), generator=torch.Generator().manual_seed(0))
    totals = sums[draws].sum(1)  # (resamples, 2)
    ends = (totals[:, 0] / totals[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(x), 4) for x in (sums[:, 0].sum() / sums[:, 1].sum(), *ends)]


def summarise(records):
    """Means with intervals of every score: {"subject": {score: [mean, low, high]}, "relight": ...}, and the counts."""
    result = {}
    for kind in dict.fromkeys(r["kind"] for r in records):
        some = [r for r in records if r["kind"] == kind]
        names = sorted({k for r in some for k, v in r.items() if isinstance(v, float | None)})
        result[kind] = {"n": len(some), "unscored": sum(parse_score(a) is None for r in some for a in r["answers"].values()),
                        **{name: bootstrap([r.get(name) for r in some], [r["reference"] for r in some]) for name in names}}
    return result


def difference(records, others, name):
    """The mean of `name` in `records` minus that in `others` on their common cases, with its interval."""
    both = [(a, b) for a, b in zip(records, others) if a["kind"] == "subject" and None not in (a.get(name), b.get(name))]
    return bootstrap([a[name] - b[name] for a, b in both], [a["reference"] for a, _ in both])
