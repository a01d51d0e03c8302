"""What curate.py makes of answers as public vision-language models of several families write them,
and of the grids it is given. The texts are our own; what is real about them is their form."""

import argparse
from unittest.mock import Mock

import pytest
import torch
from conftest import critter, difference
from diffusers.utils import make_image_grid
from transformers import BatchFeature

import curate

FOX = ["subject: fox", "image 1: red", "image 2: red", "compare: same", "verdict: yes"]


def fox(*order):
    """An answer with these of the five steps, in this order."""
    return "\n".join(FOX[k] for k in order)


WHOLE = fox(0, 1, 2, 3, 4)
YES = {  # who writes so: an answer of this form
    "our question": WHOLE,
    "LLaVA-NeXT": "Subject: A fox.\n\nImage 1: It sits on a beach. It has paws.\n\nImage 2: The "
    "fox is in snow.\nIts paws are white.\n\nCompare: Ears, paws are the same.\n\nVerdict: Yes.",
    "Qwen2.5-VL": "**Subject:** Teapot\n\n**Image 1:** A cut lid.\n**Image 2:** A cut lid.\n\n"
    "**Compare:**\n- Body: Same\n- Lid: Same\n\n**Verdict:** Yes",
    "Qwen3-VL": "`subject`: owl\n`image 1`: grey\n`image 2`: grey\n`compare`: same\n`verdict`: yes",
    "InternVL, headings": "### Subject\nA toy car\n\n### Image 1\nYellow\n\n### Image 2\nYellow\n\n"
    "### Compare\nWheels: same\nRoof: same\n\n### Verdict\nYes",
    "Gemma 3": "Okay, let's look at both.\n\n*   **subject:** Lamp\n*   **image 1:** Brass\n"
    "*   **image 2:** Brass\n*   **compare:**\n    *   **Handle:** Same\n    *   **Top:** Same\n\n"
    "*   **verdict:** yes",
    "Idefics": "Subject: fox. Image 1: red. Image 2: red. Compare: fur, tail: same. Verdict: yes.",
    "SmolVLM": WHOLE.replace("\n", ", ") + "\n\nI hope this helps.",
    "DeepSeek-VL": "Subject: owl\nImage 1 (left): grey\nImage 2 (right): grey\nCompare: eyes: same"
    "\nVerdict: yes",
    "Llama 3.2 Vision": "**Subject**: turtle\n**Image 1** (left): old\n**Image 2** (right): old\n"
    "**Compare**: shell: same\n**Verdict: Yes**",
    "Molmo": WHOLE.replace("yes", "Yes, no differences were found."),
    "GPT, a code fence": f"```text\n{WHOLE}\n```",
    "Claude": "> **Subject:** fox\n> **Image 1:** red\n> **Image 2:** red\n> **Compare:** same\n"
    "> **Verdict:** yes",
    "Kosmos": "__Subject__: fox\n__Image 1__: red\n__Image 2__: red\n__Compare__: same\n"
    "__Verdict__: _yes_",
}
NO = {
    "LLaVA": "Subject: The subject is a robot.\nImage 1: The robot is blue.\nImage 2: The robot is "
    "green.\nCompare: The body is the same, but the color is different.\nVerdict: No.",
    "Qwen2-VL": "1. Subject: owl\n2. Image 1: grey\n3. Image 2: red\n4. Compare: feathers differ\n"
    "5. Verdict: no",
    "InternVL, wide colons": "Subject：cat\nImage 1：grey\nImage 2：red\nCompare：the fur differs\n"
    "Verdict：No",
    "Pixtral": "1. **Subject**: A dragon\n2. **Image 1**: Two horns\n3. **Image 2**: One horn\n"
    "4. **Compare**: Horns: different\n5. **Verdict**: No",
    "MiniCPM-V": "Step 1: Subject: chair\nStep 2: Image 1: leather\nStep 3: Image 2: velvet\n"
    "Step 4: Compare: the cover is different\nStep 5: Verdict: No, another chair",
    "Phi-3.5 Vision": "Subject: shoe\nImage 1: red sole\nImage 2: blue sole\nComparison: The soles "
    "differ.\nVerdict: No\n\nReason: the soles have other colors.",
    "GPT, headings": "## 1. Subject\nA cat\n\n## 2. Image 1\nStripes\n\n## 3. Image 2\nSpots\n\n"
    "## 4. Compare\n- Eyes: same\n- Coat: **different**\n\n---\n\n## 5. Verdict\n"
    "**No** — the coat is another one.\n\nLet me know if you need more!",
    "GLM-4V": "• Subject: fox\n• Image 1: red\n• Image 2: grey\n• Compare: fur is different\n"
    "• Verdict: NO!",
    "images named": "subject: fox\nimage 1: red\nimage 2: grey\ncompare: Image 1 shows red and\n"
    "image 2 shows grey fur: different\nverdict: no",
}
COMPLETE = [("yes", answer) for answer in YES.values()] + [("no", answer) for answer in NO.values()]
INCOMPLETE = {
    "nothing": "",
    "only the verdict": "yes",
    "a refusal": "I'm sorry, I can't compare animals.",
    "JSON": '{"subject": "fox", "verdict": "yes"}',
    "no subject": fox(1, 2, 3, 4),
    "no image 2": fox(0, 1, 3, 4),
    "no comparison": fox(0, 1, 2, 4),
    "no verdict": fox(0, 1, 2, 3),
    "empty subject": WHOLE.replace("fox", ""),
    "empty image 2": WHOLE.replace("2: red", "2:"),
    "empty comparison": WHOLE.replace("same", ""),
    "empty verdict": WHOLE.replace("yes", ""),
    "other names": WHOLE.replace("image 1", "first image"),
    "images exchanged": fox(0, 2, 1, 3, 4),
    "the verdict first": fox(4, 0, 1, 2, 3),
    "a verdict before and after": fox(4, 0, 1, 2, 3, 4),
    "the chain twice": fox(0, 1, 2, 3, 4, 0, 1, 2, 3, 4),
    "two verdicts": WHOLE + "\nverdict: no",
    "yes and no": WHOLE.replace("yes", "yes and no"),
    "yes/no": WHOLE.replace("yes", "yes/no"),
    "maybe": WHOLE.replace("yes", "maybe"),
    "not the same": WHOLE.replace("yes", "not the same"),
    "probably yes": WHOLE.replace("yes", "probably yes"),
}


@pytest.mark.parametrize("verdict, answer", COMPLETE, ids=[*YES, *NO])
def test_complete_answers_are_understood_and_cut_ones_are_not(verdict, answer):
    found, reason = curate.parse(answer)
    assert found == verdict and reason.startswith(f"{verdict}: ") and "unparsable" not in reason
    cut = answer[: answer.lower().rindex("verdict")]
    assert all(curate.parse(cut[:n])[0] == "unparsable" for n in range(0, len(cut), 7))


@pytest.mark.parametrize("answer", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_answers_are_unparsable(answer):
    assert curate.parse(answer)[0] == curate.parse(answer, 9)[0] == "unparsable"


COMPARISONS = [  # and how many parts they say differ
    ("fur same, eyes differ", 1),
    ("- Fur: Different\n- Eyes: Same\n- Tail: differs", 2),
    ("fur does not differ, eyes differ", 1),
    ("Nothing differs; the fur doesn't differ", 0),
    ("red in one and blue in the other", 1),
    ("no difference. Ears: different", 1),
]


@pytest.mark.parametrize("comparison, differing", COMPARISONS)
def test_tolerance_counts_the_parts_that_differ(comparison, differing):
    answer = "\n".join([*FOX[:3], f"compare: {comparison}", "verdict: no"])
    verdicts = [curate.parse(answer, tolerance)[0] for tolerance in range(4)]
    assert verdicts == ["yes" if 0 < differing <= tolerance else "no" for tolerance in range(4)]


# ---- asking --------------------------------------------------------------------------------------
def test_answers_are_greedy_without_a_penalty():
    """Qwen2.5-VL's own repetition penalty of 1.05 would act on "same, same, yes"."""
    processor = Mock(return_value=BatchFeature({"input_ids": torch.tensor([[5, 5], [5, 5]])}))
    processor.batch_decode = lambda tokens, **options: [str(row.tolist()) for row in tokens]
    model = Mock(device="cpu", dtype=torch.float32)
    model.generate.return_value = torch.tensor([[5, 5, 7, 2], [5, 5, 7, 7]])
    cases = [["image"], ["image"]]
    answers = curate.ask(model, processor, cases, "Same?", batch_size=2, max_new_tokens=2)
    assert answers == ["[7, 2]", "[7, 7]"]
    options = model.generate.call_args.kwargs
    assert options["repetition_penalty"] == 1.0 and options["do_sample"] is False


def test_the_question_shows_an_answer_in_the_wanted_form_unless_the_models_folder_has_none(
    monkeypatch, tmp_path
):
    for options, example in (([], ""), (["--vlm", str(tmp_path)], curate.EXAMPLE)):
        monkeypatch.setattr("sys.argv", ["curate.py", *options])
        assert curate.parse_args().example == example
    assert curate.parse(curate.EXAMPLE.partition(":\n")[2]) == ("no", "no: tail different")


# ---- panels --------------------------------------------------------------------------------------
def test_panels_are_cut_from_a_grid_and_trimmed_in_their_size(tmp_path):
    panels = [critter(7, [scene, 0, light]) for scene, light in ((0, 0), (3, 1), (5, 2), (7, 3))]
    make_image_grid(panels, 2, 2).save(tmp_path / "grid.png")
    grid = {"file": "grid.png", "rows": 2, "columns": 2}
    for trim in (0, 3):
        args = argparse.Namespace(grids=tmp_path, out=tmp_path, trim=trim)
        curate.save_panels(0, grid, args)
        saved = curate.open_panels(0, range(4), args)
        box = trim, trim, 32 - trim, 32 - trim
        wanted = [panel.resize((32, 32), box=box) for panel in panels]
        assert difference(saved, wanted) == 0
