"""A chat model invents subjects and settings for grids: the paper's way, `generate_grids.py --llm`.

It is shown a few captions of real pictures with every request: without them a chat model comes back
to a handful of favourites. Every answer is kept in a file, so that a run that was interrupted asks
only what is missing.
"""

import dsd

import json
import random
import re

import torch
import transformers
from accelerate import PartialState

REQUEST = """Invent one clear subject (a character, an animal or an object) that could star in a \
picture book, and four different settings for it. For inspiration only, some captions of real \
pictures: {captions}
Answer with JSON only. The subject has at most 12 words and names no place; each setting has at \
most 15 words and does not repeat the subject. For example:
{{"subject": "a clockwork owl with copper wings", "settings": ["on a snowy roof at dawn", \
"in a flower market", "beside a campfire by night", "on the deck of a ship"]}}"""
CAPTIONS = [
    "a brown dog asleep on a red sofa",
    "a vintage bicycle leaning on a wall",
    "a chef plating a dessert",
    "two kites over a windy beach",
    "a porcelain cup with a painted bird",
    "a fire engine outside a station",
    "an elderly violinist on a bridge",
    "a hiking boot on a mossy stone",
    "a parrot on a branch",
]
ANSWER_TOKENS = 2000  # room for a model that thinks first; others stop long before


def load(name, quantize):
    """A chat model and its tokenizer."""
    dsd.check_here(name)
    with dsd.explained(f"--llm {name}: not a chat model that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}])  # one may be missing
        kind = transformers.AutoModelForCausalLM
        return dsd.load_language_model(kind, name, quantize), tokenizer


def ask(model, tokenizer, seed):
    """The chat model's answer to the request of this seed, which no other answer changes."""
    torch.manual_seed(seed)
    captions = "; ".join(random.Random(seed).sample(CAPTIONS, 3))
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": REQUEST.format(captions=captions)}],
        enable_thinking=False,  # templates that know no such choice ignore it
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=True, temperature=1.0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def parse(answer):
    """(subject, four settings) of an answer, or None if it is not usable.

    What a model thinks before </think> is no answer. Of the rest, the first JSON object that fits
    counts, whatever stands around it."""
    answer = answer.rpartition("</think>")[2]
    for brace in re.finditer("{", answer):
        try:
            found, _ = json.JSONDecoder().raw_decode(answer, brace.start())
            subject = found["subject"].strip()
            settings = [setting.strip() for setting in found["settings"]]
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            continue
        four = len(settings) == len({setting.lower() for setting in settings}) == 4
        short = all(0 < len(setting.split()) <= 15 for setting in settings)
        if four and short and 0 < len(subject.split()) <= 12:
            return subject, settings
    return None


def invent(name, count, out, seed=0, quantize="none"):
    """`count` different subjects with four settings each, a list of (subject, settings).

    The answers are kept in the folder `out`/subjects. Several processes share the requests in
    rounds, so that none waits long for another."""
    state, model, found, asked = PartialState(), None, {}, 0
    while len(found) < count:
        if asked > 20 + 4 * len(found):
            raise dsd.DsdError(
                f"--llm {name}: only {len(found)} of {asked} answers could be used; take a larger "
                "chat model, or --prompts"
            )
        numbers = range(asked, asked + 8 * state.num_processes)
        files = [out / "subjects" / f"{number:06d}.json" for number in numbers]
        for file in files[state.process_index :: state.num_processes]:
            if not file.exists():
                model = model or load(name, quantize)
                answer = ask(*model, seed * 1_000_003 + int(file.stem))
                dsd.write_json(file, {"answer": answer})
        state.wait_for_everyone()
        for file in files:
            usable = parse(dsd.read_json(file)["answer"])
            if usable:
                found.setdefault(usable[0].lower(), usable)
        asked += len(files)
    return list(found.values())[:count]
