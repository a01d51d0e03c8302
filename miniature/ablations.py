"""The miniature's long table: evaluate.py's rows, tuning on each reference, rivals, ablations.

    python -m miniature.ablations --compile        # all rows on 300 new contexts: hours of a core
    python -m miniature.ablations --rows ablation  # only some rows, by their names or groups

An ablation is trained by finetune.py at the miniature's settings, but for what its name says, on
the pairs of curate.py (--pairs); "DSD, nothing left out" is the row to compare it with. For "no
negative prompt" twice as many grids are drawn as --grids holds, guided against the empty prompt in
place of the opposite: the row learns from the first half of them, or from as many pairs as --pairs
holds (if there are so many).

Two rivals learn from the same pairs, as many steps: the paper's comparisons in small. The teacher
stays frozen. Both draw one frame and get the reference as DSD's --frames 1 does, x and condition
(B, N, 64) side by side, so that finetune.py's batches and loss and dsd.py's sampler serve them too.
One by itself, with finetune.py's options:

    python -m miniature.ablations ip_adapter --pairs runs/pairs --out runs/ip_adapter

ip_adapter  The double blocks also attend to tokens of the reference, by diffusers' own processors
            (IP-Adapter, Ye et al. 2023). The image encoder is the VAE: the miniature's only vision
            transformer belongs to the model that scores.
controlnet  A trained copy of the first blocks sees the reference and adds to what the teacher's
            blocks compute (ControlNet, Zhang et al. 2023; diffusers' FluxControlNetModel).

Writes to --out what evaluate.py writes, and ablations/NAME/, the output of finetune.py. Started
again, it goes on.
"""

import dsd

import dataclasses
import functools
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import FluxControlNetModel, FluxControlPipeline, FluxInpaintPipeline, FluxPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import evaluate
import finetune
import sample

RIVAL_FILE = "rival.safetensors"
STRENGTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # of SDEdit
TUNING = {50: 5e-4, 200: 5e-4}  # of DreamBooth-LoRA: steps -> learning rate, the best tried: LOG.md
ABLATIONS = {  # name -> the pairs it learns from, finetune.py's flags
    "nothing left out": ("curated", []),
    "no curation, as many pairs": ("by lot", []),
    "no negative prompt, as many grids": ("as many grids", []),
    "no negative prompt, as many pairs": ("as many pairs", []),
    "no identity frame in the loss": ("curated", ["--frame_weights", 0, 1]),
    "both frames weigh the same": ("curated", ["--frame_weights", 1, 1]),
    "clean reference tokens (not the paper's)": ("curated", ["--clean_reference"]),
    "single frame": ("curated", ["--frames", 1]),
    "half of the pairs": ("half", []),
    "a quarter of the pairs": ("quarter", []),
    "LoRA rank 4": ("curated", ["--rank", 4]),
    "LoRA rank 64": ("curated", ["--rank", 64]),
}


# ---- ablations: finetune.py and curate.py by their own command lines -----------------------------
def run_script(script, *flags):
    """Run a script of this project, or one of its modules, in a process of its own."""
    print(f"--- {script} {' '.join(map(str, flags))}", flush=True)
    program = [dsd.MINIATURE.parent / script] if script.endswith(".py") else ["-m", script]
    if subprocess.run([sys.executable, *map(str, [*program, *flags])]).returncode:
        raise dsd.DsdError(f"{script} stopped (see above); the same command goes on from here")


def pairs_for(which, args):
    """The folder with an ablation's pairs. Their pictures stay where they are."""
    if which == "curated":
        return args.pairs
    source, work = args.pairs, args.out / "ablations"
    count = len(dsd.read_records(source / "metadata.jsonl"))
    if which == "by lot":  # with this tolerance every comparison is accepted
        source = work / "uncurated_pairs"
        run_curation(args.grids, source, args, "--tolerance", 99)
    if which in ("as many grids", "as many pairs"):
        source, grids = work / "pairs_without_negative", work / "grids_without_negative"
        n = len(dsd.read_records(args.grids / "grids.jsonl"))
        how = "--model", args.model, "--device", args.device, "--count", 2 * n, "--out", grids
        run_script("generate_grids.py", *how, "--no-negative")
        run_curation(grids, source, args)
    records = dsd.read_records(source / "metadata.jsonl")
    if which == "by lot":  # any pairs at all; the first ones come from fewer grids
        random.Random(args.seed).shuffle(records)
    if which == "as many grids":
        records = [record for record in records if record["grid"] < n]
    else:
        records = records[: {"half": count // 2, "quarter": count // 4}.get(which, count)]
    for record in records:
        for side in finetune.FILES:
            record[side] = (source / record[side]).resolve().as_posix()
    folder = work / f"pairs_{which.replace(' ', '_')}"
    dsd.write_json(folder / "metadata.jsonl", records)
    return folder


def run_curation(grids, pairs, args, *flags):
    places = "--grids", grids, "--out", pairs, "--device", args.device
    run_script("curate.py", "--vlm", args.vlm, *places, *flags)


def training_flags(args):
    """What all trainings have in common."""
    flags = ["--model", args.model, "--device", args.device]
    if args.ablation_steps:
        flags += ["--steps", args.ablation_steps]
    return [*flags, "--compile"] if args.compile else flags


def folder_of(name, args):
    """Where an ablation's adapter, or a rival, is."""
    return args.out / "ablations" / name.replace(" ", "_").replace(",", "")


def train(name, args):
    """Train an ablation by finetune.py."""
    which, flags = ABLATIONS[name]
    places = "--pairs", pairs_for(which, args), "--out", folder_of(name, args)
    run_script("finetune.py", *places, *training_flags(args), *flags)


def train_rival(kind, args):
    """Train a rival on the curated pairs."""
    folder = folder_of(kind, args)
    if not (folder / RIVAL_FILE).exists():
        places = "--pairs", args.pairs, "--out", folder
        run_script("miniature.ablations", kind, *places, *training_flags(args))


def clean_reference(pipe, cases, args):
    """In-context inpainting, but the reference has no noise at any step. The miniature's teacher
    can use that: it was pretrained with panels that have less noise than the others (pretrain.py
    --ahead). Ordinary teachers were not."""
    x_0 = dsd.encode(pipe.vae, dsd.to_pixels(evaluate.two_frames(cases)[0]))  # (B, N, 64)
    height, width = args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor
    clean = dsd.unpack(x_0, height, 2 * width)  # (B, 16, h, 2 w)
    generators = [torch.Generator().manual_seed(case.seed) for case in cases]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=own) for own in generators])
    latents = torch.cat([clean[..., :width], noise.to(clean)[..., width:]], dim=3)
    # after a step the pipeline puts the reference, with the noise of that step, into the left frame
    pipe.scheduler.scale_noise = lambda sample, *_: sample
    return evaluate.inpainting(pipe, cases, args, latents=latents)


# ---- rivals: two other ways to show a reference to the teacher -----------------------------------
class Rival(ModelMixin):
    """The frozen teacher with something trained beside it, called as the two-frame model is."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer.requires_grad_(False)
        self.config = transformer.config
        self.width = self.config.num_attention_heads * self.config.attention_head_dim

    def trained(self):
        """{name: parameter} of what is learned."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class IPAdapter(Rival):
    def __init__(self, transformer, tokens):
        super().__init__(transformer)
        text_width = self.config.joint_attention_dim
        self.project = torch.nn.Linear(64, text_width)
        self.places = torch.nn.Parameter(torch.zeros(tokens, text_width))
        self.norm = torch.nn.LayerNorm(text_width)
        processors = transformer.attn_processors
        for name in processors:
            if name.startswith("transformer_blocks"):  # the double ones, as diffusers' loader does
                processors[name] = FluxIPAdapterAttnProcessor(self.width, text_width)
                for layer in processors[name].to_v_ip:  # so that at first it is the teacher
                    torch.nn.init.zeros_(layer.weight)
                    torch.nn.init.zeros_(layer.bias)
        transformer.set_attn_processor(processors)
        transformer.encoder_hid_proj = lambda tokens: [tokens]  # they are projected below

    def forward(self, hidden_states, **inputs):
        x, reference = hidden_states.chunk(2, dim=2)  # (B, N, 64) each
        tokens = self.norm(self.project(reference) + self.places)  # (B, N, text_width)
        inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": tokens}
        return self.transformer(hidden_states=x, **inputs)


class ControlNet(Rival):
    def __init__(self, transformer, tokens, double=1, single=2):
        super().__init__(transformer)
        heads = self.config.attention_head_dim, self.config.num_attention_heads
        copy = FluxControlNetModel.from_transformer
        self.copied = copy(transformer, double, single, *heads)

    def forward(self, hidden_states, **inputs):
        x, reference = hidden_states.chunk(2, dim=2)  # (B, N, 64) each
        copied = {"controlnet_cond": reference, "return_dict": False, **inputs}
        blocks, single_blocks = self.copied(hidden_states=x, **copied)
        inputs["controlnet_block_samples"] = blocks
        inputs["controlnet_single_block_samples"] = single_blocks
        return self.transformer(hidden_states=x, **inputs)


RIVALS = {"ip_adapter": IPAdapter, "controlnet": ControlNet}


def load_rival(kind, transformer, args, folder=None):
    """A rival around a teacher's transformer; with a folder, as it was trained. Its tokens are
    those of one panel."""
    torch.manual_seed(args.seed)
    rival = RIVALS[kind](transformer, args.width * args.height // 64).to(transformer.device)
    for name, tensor in (load_file(folder / RIVAL_FILE) if folder else {}).items():
        rival.get_parameter(name).data.copy_(tensor)
    return rival


def draw_rival(pipe, cases, args, kind, folder):
    """Pictures for cases, by the sampler that DSD has, with the rival in this folder."""
    if not isinstance(pipe.transformer, Rival):
        pipe.transformer = load_rival(kind, pipe.transformer, args, folder)
        pipe.tokenizer_2.model_max_length = evaluate.prompt_tokens(args.model, "panel")
    images, prompts = [case.image for case in cases], [case.prompt for case in cases]
    seeds = [case.seed for case in cases]
    one_frame = {"frames": 1, "clean_reference": False}
    return sample.draw_pictures(pipe, images, prompts, seeds, args, one_frame)


def fit_rival(rival, pairs, null_text, size, args):
    """finetune.py's loop in its shortest form: no accumulation, no validation, one process."""
    parameters = list(rival.trained().values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in tqdm(range(args.steps), desc="train"):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 64)
        batch = finetune.draw_batch(pairs, null_text, args, generator, PartialState())
        with torch.autocast(rival.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = finetune.batch_losses(rival, batch, size, args)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        share = finetune.learning_rate_share(step, args.steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()


def rival_main():
    """`python -m miniature.ablations ip_adapter --pairs ...`: train one rival."""
    kind = sys.argv.pop(1)
    sys.argv += ["--frames", "1"]
    args = finetune.parse_args()
    pairs, held_out = finetune.prepare(args, 1)
    known = dsd.digest(text=str([pair["cache"].stem for pair in pairs]))
    lock = dsd.open_out(args, kind, changeable=["pairs", "compile"], pairs_sha256=known)
    how = {"prompt_tokens": args.prompt_tokens, "dtype": torch.float32}
    pipe = dsd.load_pipeline(FluxPipeline, args.model, **how)
    finetune.encode_pairs(pipe, [*pairs, *held_out], args)
    rival = load_rival(kind, pipe.transformer, args)
    size = finetune.canvas_size(pipe, args)
    fit_rival(rival.train(), pairs, dsd.encode_prompts(pipe, [""]), size, args)
    weights = {name: p.detach().cpu() for name, p in rival.trained().items()}
    with dsd.writing(args.out / RIVAL_FILE) as part:
        save_file(weights, part)
    print(f"trained on {len(pairs)} pairs; see {args.out}")
    lock.release()


# ---- DreamBooth-LoRA -----------------------------------------------------------------------------
def with_rare_word(text, subject):
    """A prompt with DreamBooth's rare word before the subject: "a sks kitten in space"."""
    found = re.sub(re.escape(subject), lambda m: f"sks {m.group()}", text, flags=re.IGNORECASE)
    return found if found != text else f"sks {subject}, {text}"


def tune(pipe, x, text, args, seed, steps, learning_rate):
    """Train the LoRA in place. x (1 + P, N, 64) and text, a row each: the reference, then pictures
    of the prior. Half of each batch of 8 is the reference, half the prior."""
    transformer, (embeds, pooled) = pipe.transformer, text
    factor, shift = pipe.vae_scale_factor, dsd.folder_settings(args.model, "finetune")["shift"]
    ids = dsd.position_ids(args.height // factor, args.width // factor).to(x.device)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="tune", leave=False):
        prior = torch.randint(1, len(x), (4,), generator=generator)
        rows = torch.cat([torch.zeros(4, dtype=torch.long), prior]).to(x.device)
        sigma = dsd.sample_sigmas(8, shift, generator).to(x.device)
        x_0 = x[rows]
        eps = torch.randn(x_0.shape, generator=generator).to(x)
        x_sigma, some = dsd.interpolate(x_0, eps, sigma), (embeds[rows], pooled[rows])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            v = dsd.run_transformer(transformer, x_sigma, sigma, some, ids, args.guidance_scale)
        (v.float() - dsd.velocity(x_0, eps).float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def dreambooth(pipe, cases, args, steps, learning_rate, rank=16):
    """DreamBooth-LoRA (Ruiz et al. 2023): the teacher is tuned to one reference, called "sks", and
    then asked for it. The prior is the teacher's own pictures of such subjects. `cases` are those
    of one reference."""
    case, transformer, classes = cases[0], pipe.transformer, cases[0].class_prompts
    others = [dataclasses.replace(case, seed=case.seed + 63 - k) for k in range(len(classes))]
    prior = evaluate.teacher(pipe, others, args, classes)
    x = dsd.encode(pipe.vae, dsd.to_pixels([case.image, *prior]))  # (1 + P, N, 64)
    prompts = [with_rare_word(case.reference_prompt, case.subject), *classes]
    limit = evaluate.prompt_tokens(args.model, "panel")
    with torch.no_grad():
        text = pipe.encode_prompt(prompts, prompts, max_sequence_length=limit)[:2]
    torch.manual_seed(case.seed)  # of the LoRA's first weights
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    try:
        cast_training_params(transformer, torch.float32)
        tune(pipe, x.to(transformer.dtype), text, args, case.seed, steps, learning_rate)
        prompts = [with_rare_word(case.prompt, case.subject) for case in cases]
        return evaluate.teacher(pipe, cases, args, prompts)
    finally:
        transformer.delete_adapters("default")


# ---- the table -----------------------------------------------------------------------------------
def all_rows(args):
    """Every row, in the table's order."""
    *rows, own = evaluate.all_rows(args)
    name = "in-context, clean reference"
    rows.append(evaluate.Row(name, "sampling", clean_reference, FluxInpaintPipeline))
    for steps, rate in TUNING.items():  # the cases of one reference are one batch
        name = f"DreamBooth-LoRA, {steps} steps"
        draw = functools.partial(dreambooth, steps=steps, learning_rate=rate)
        options = {"batch_size": args.contexts + 1}
        rows.append(evaluate.Row(name, "tuning", draw, FluxPipeline, options))
    rows.append(own)
    for kind, name in {"ip_adapter": "like IP-Adapter", "controlnet": "like ControlNet"}.items():
        name = f"{name}, trained on the same pairs"
        draw = functools.partial(draw_rival, kind=kind, folder=folder_of(kind, args))
        training = functools.partial(train_rival, kind, args)
        rows.append(evaluate.Row(name, "rival", draw, FluxPipeline, train=training))
    for name in ABLATIONS:
        options, training = {"adapter": folder_of(name, args)}, functools.partial(train, name, args)
        row = f"DSD, {name}", "ablation", evaluate.zero_shot, FluxControlPipeline
        rows.append(evaluate.Row(*row, options, training))
    return rows


def check_sources(rows, args):
    """Refuse ablations without the data that they learn from, before hours are spent on others."""
    names = [row.name.removeprefix("DSD, ") for row in rows if row.group in ("ablation", "rival")]
    needed = {ABLATIONS.get(name, ["curated"])[0] for name in names}
    files = {args.pairs / "metadata.jsonl": needed}
    files[args.grids / "grids.jsonl"] = needed & {"by lot", "as many grids", "as many pairs"}
    for file, used in files.items():
        if used and not file.exists():
            ways = "give --grids and --pairs, or leave the ablations that need it out with --rows"
            raise dsd.DsdError(f"no {file}; {ways}")


def main():
    parser = dsd.Parser(__doc__, "runs/ablations")
    add = parser.add_argument
    add("--pairs", type=Path, default=Path("runs/pairs"), help="what curate.py wrote")
    add("--grids", type=Path, default=Path("runs/grids"), help="what generate_grids.py wrote")
    add("--ablation_steps", type=dsd.at_least(1), help="of each training; if not given, as usual")
    add("--compile", action="store_true", help="compile in training: a minute, then faster steps")
    args = evaluate.parse_args(parser, count=75, strengths=STRENGTHS)
    if args.folder or PartialState().num_processes > 1:
        words = "this table is for the miniature and one process"
        raise dsd.DsdError(f"{words}; evaluate.py takes --folder and several")
    rows = evaluate.choose_rows(all_rows(args), args)
    check_sources(rows, args)
    sources = {"pairs": args.pairs / "metadata.jsonl", "grids": args.grids / "grids.jsonl"}
    known = {name: file.exists() and dsd.digest(file) for name, file in sources.items()}
    evaluate.evaluate(rows, args, **known)


if __name__ == "__main__":
    dsd.run_main(rival_main if len(sys.argv) > 1 and sys.argv[1] in RIVALS else main)
