"""Answers as public vision-language models of different families write them, complete and incomplete, and what
curate.parse makes of them. The texts are our own; what is real about them is their form."""

import types

import curate  # first of all: it imports dsd

import pytest
import torch
from transformers import BatchFeature

COMPLETE = {  # style -> (verdict, answer)
    "the question's own form": ("yes",
        "subject: a fox\nimage 1: a red fox\nimage 2: a red fox\ncompare: fur same, eyes same\nverdict: yes"),
    "LLaVA: sentences": ("no",
        "Subject: The subject is a robot.\nImage 1: The robot is small and blue.\nImage 2: The robot is small and "
        "green.\nCompare: The body is the same, but the color is different.\nVerdict: No."),
    "LLaVA-NeXT: one paragraph a step": ("yes",
        "Subject: A red fox.\n\nImage 1: The fox sits on a beach. It has white paws.\n\nImage 2: The fox stands in "
        "snow.\nIts paws are white.\n\nCompare: Ears, paws and tail are the same.\n\nVerdict: Yes."),
    "Qwen2.5-VL: bold heads, bullets": ("yes",
        "**Subject:** Teapot\n\n**Image 1:** A green teapot with a chipped lid.\n**Image 2:** A green teapot with a "
        "chipped lid.\n\n**Compare:**\n- Body: Same\n- Lid: Same\n\n**Verdict:** Yes"),
    "Qwen2-VL: numbered": ("no",
        "1. Subject: owl\n2. Image 1: a brown owl\n3. Image 2: a white owl\n4. Compare: feathers differ\n5. Verdict: "
        "no"),
    "Qwen3-VL: heads in quotation marks of code": ("yes",
        "`subject`: owl\n`image 1`: a brown owl\n`image 2`: a brown owl\n`compare`: same eyes\n`verdict`: yes"),
    "InternVL: headings on their own line": ("yes",
        "### Subject\nA toy car\n\n### Image 1\nA yellow toy car\n\n### Image 2\nA yellow toy car\n\n### Compare\n"
        "Wheels: same\nRoof: same\n\n### Verdict\nYes"),
    "InternVL: wide colons": ("no",
        "Subject：cat\nImage 1：a grey cat\nImage 2：a black cat\nCompare：the fur differs\nVerdict：No"),
    "Gemma 3: a preface, bullets within bullets": ("yes",
        "Okay, let's look at both images.\n\n*   **subject:** A lantern\n*   **image 1:** A brass lantern\n*   "
        "**image 2:** A brass lantern\n*   **compare:**\n    *   **Handle:** Same\n    *   **Glass:** Same\n\n*   "
        "**verdict:** yes"),
    "Pixtral: numbered and bold": ("no",
        "1. **Subject**: A dragon\n2. **Image 1**: Green, two horns\n3. **Image 2**: Green, one horn\n4. "
        "**Compare**: Horns: different\n5. **Verdict**: No"),
    "Idefics: five steps in one line": ("yes",
        "Subject: fox. Image 1: red fox. Image 2: red fox. Compare: fur same, tail same. Verdict: yes."),
    "SmolVLM: one line and a courtesy": ("yes",
        "subject: fox, image 1: red, image 2: red, compare: same, verdict: yes\n\nI hope this helps."),
    "MiniCPM-V: steps with names": ("no",
        "Step 1: Subject: armchair\nStep 2: Image 1: leather\nStep 3: Image 2: velvet\nStep 4: Compare: the cover is "
        "different\nStep 5: Verdict: No, another armchair"),
    "DeepSeek-VL: sides in brackets": ("yes",
        "Subject: rabbit\nImage 1 (left): a white rabbit\nImage 2 (right): a white rabbit\nCompare: ears, eyes: "
        "same\nVerdict: yes"),
    "Llama 3.2 Vision: bold and brackets": ("yes",
        "**Subject**: turtle\n**Image 1** (left): old\n**Image 2** (right): old\n**Compare**: shell: same\n"
        "**Verdict: Yes**"),
    "Molmo: a reason after the verdict": ("yes",
        "subject: guitar\nimage 1: red\nimage 2: red\ncompare: neck same\nverdict: Yes, no differences were found."),
    "Phi-3.5 Vision: Comparison": ("no",
        "Subject: sneaker\nImage 1: white sole\nImage 2: black sole\nComparison: The soles differ.\nVerdict: No\n\n"
        "Reason: the soles have other colors."),
    "GPT: headings, a rule, a courtesy": ("no",
        "## 1. Subject\nA striped cat\n\n## 2. Image 1\nFive stripes\n\n## 3. Image 2\nSpots\n\n## 4. Compare\n- "
        "Eyes: same\n- Coat: **different**\n\n---\n\n## 5. Verdict\n**No** — the coat is another one.\n\nLet me know "
        "if you need more!"),
    "GPT: a code fence": ("yes",
        "```text\nsubject: fox\nimage 1: red\nimage 2: red\ncompare: same, same\nverdict: yes\n```"),
    "Claude: a quotation": ("yes",
        "> **Subject:** fox\n> **Image 1:** red\n> **Image 2:** red\n> **Compare:** same\n> **Verdict:** yes"),
    "GLM-4V: points": ("no",
        "• Subject: fox\n• Image 1: red\n• Image 2: grey\n• Compare: fur is different\n• Verdict: NO!"),
    "Kosmos: underlined": ("yes",
        "__Subject__: fox\n__Image 1__: red\n__Image 2__: red\n__Compare__: same\n__Verdict__: _yes_"),
    "images are named in the comparison": ("no",
        "subject: fox\nimage 1: red\nimage 2: grey\ncompare: Image 1 shows red fur and\nimage 2 shows grey fur: "
        "different\nverdict: no"),
}
FOX = ["subject: fox", "image 1: red", "image 2: red", "compare: same", "verdict: yes"]
INCOMPLETE = {
    "nothing": "", "babble": "They look alike to me.", "only the verdict": "yes",
    "a refusal": "I'm sorry, I can't compare animals.",
    **{f"no {step}": "\n".join(FOX[:k] + FOX[k + 1:]) for k, step in enumerate(curate.STEPS)},
    **{f"empty {step}": "\n".join([*FOX[:k], f"{step}:", *FOX[k + 1:]]) for k, step in enumerate(curate.STEPS)},
    "images exchanged": "\n".join([FOX[0], FOX[2], FOX[1], *FOX[3:]]),
    "the verdict first": "\n".join([FOX[4], *FOX[:4]]),
    "the verdict before the comparison": "\n".join([*FOX[:3], FOX[4], FOX[3]]),
    "a verdict before and after": "\n".join([FOX[4], *FOX]), "two verdicts": "\n".join([*FOX, "verdict: no"]),
    "the chain twice": "\n".join([*FOX, *FOX]), "other names": "\n".join(FOX).replace("image 1", "first image"),
    **{f"verdict: {words}": "\n".join([*FOX[:4], f"verdict: {words}"]) for words in (
        "yes and no", "yes or no", "yes/no", "Yes, no.", "no yes", "maybe", "not the same", "same", "probably yes")},
    "JSON": '{"subject": "fox", "verdict": "yes"}',
}


@pytest.mark.parametrize("style", COMPLETE)
def test_complete_answers_are_understood_in_any_style(style):
    verdict, answer = COMPLETE[style]
    found, reason = curate.parse(answer)
    assert found == verdict and reason.startswith(f"{verdict}: ") and "unparsable" not in reason


@pytest.mark.parametrize("fault", INCOMPLETE)
def test_incomplete_answers_are_unparsable(fault):
    assert curate.parse(INCOMPLETE[fault])[0] == curate.parse(INCOMPLETE[fault], 9)[0] == "unparsable"


@pytest.mark.parametrize("style", COMPLETE)
def test_an_answer_that_was_cut_is_counted_as_truncated(style):
    """The generation says so; a cut answer without that mark is unparsable as long as the verdict is missing."""
    answer = COMPLETE[style][1]
    assert curate.parse(f"{answer} {curate.TRUNCATED}")[0] == "truncated"
    cut = answer[:answer.lower().rindex("verdict")]
    assert all(curate.parse(cut[:n])[0] == "unparsable" for n in range(0, len(cut), 7))


@pytest.mark.parametrize("comparison, differing", [
    ("fur same, eyes differ", 1), ("- Fur: Different\n- Eyes: Same\n- Tail: differs", 2),
    ("fur does not differ, eyes differ", 1), ("Nothing differs; the fur doesn't differ", 0),
    ("red in one and blue in the other", 1), ("no difference. Ears: different", 1)])
def test_tolerance_counts_the_parts_that_differ(comparison, differing):
    answer = "\n".join([*FOX[:3], f"compare: {comparison}", "verdict: no"])
    verdicts = [curate.parse(answer, tolerance)[0] for tolerance in range(4)]
    assert verdicts == ["yes" if 0 < differing <= tolerance else "no" for tolerance in range(4)]


# ---- asking ----------------------------------------------------------------------------------------------------------
class TwoAnswers:
    """A model and a processor in one: two answers of two tokens, of which the first one ends."""
    device, dtype, generation_config = "cpu", torch.float32, types.SimpleNamespace(eos_token_id=[1, 2])

    def __call__(self, **given):
        return BatchFeature({"input_ids": torch.tensor([[5, 5], [5, 5]])})

    def apply_chat_template(self, conversation, **options):
        return "a question"

    def generate(self, **given):
        self.given = given
        return torch.tensor([[5, 5, 7, 2], [5, 5, 7, 7]])

    def batch_decode(self, tokens, **options):
        return [str(row.tolist()) for row in tokens]


def test_answers_are_greedy_without_a_penalty_and_truncated_ones_say_so():
    """Qwen2.5-VL's own repetition penalty of 1.05 would act on "same, same, yes"."""
    both = TwoAnswers()
    answers = curate.ask(both, both, [["image"], ["image"]], "Same?", batch_size=2, max_new_tokens=2)
    assert answers == ["[7, 2]", f"[7, 7] {curate.TRUNCATED}"]
    assert both.given["repetition_penalty"] == 1.0 and both.given["do_sample"] is False


def test_the_question_shows_an_answer_in_the_wanted_form_unless_the_models_folder_has_none(monkeypatch, tmp_path):
    found = []
    for vlm in ([], ["--vlm", str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["curate.py", *vlm])
        found.append(curate.parse_args().example)
    assert found == ["", curate.EXAMPLE]
    assert curate.parse(curate.EXAMPLE.partition(":\n")[2]) == ("no", "no: tail different")
