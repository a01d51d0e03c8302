"""The miniature's long table: the rows of evaluate.py, guidance, tuning on each reference (DreamBooth) and ablations.

    python -m miniature.ablations --compile         # all rows on 300 new contexts: hours of one core
    python -m miniature.ablations --rows ablation   # only some rows, by their names or groups

An ablation is trained by finetune.py at the miniature's settings, but for what its name says, on the pairs of
curate.py (--pairs); "DSD, nothing left out" is the row to compare it with. DreamBooth-LoRA takes the best of eight
settings, which are searched on other references; search/ has the table of that search.

Two rivals are trained on the same pairs, as many steps: the paper's comparisons in small. The teacher stays frozen.
Both draw one frame and get the reference as DSD's --frames 1 does, x and condition (B, N, 64) side by side, so that
finetune.py's batches and loss and dsd.py's sampler serve them too. One by itself, with finetune.py's options:

    python -m miniature.ablations ip_adapter --pairs runs/pairs --out runs/ip_adapter

ip_adapter  The double blocks also attend to tokens of the reference, by diffusers' own processors (IP-Adapter, Ye et
            al. 2023). The image encoder is the VAE: the miniature's only vision transformer belongs to the model that
            scores.
controlnet  A trained copy of the first blocks sees the reference and adds to what the teacher's blocks compute
            (ControlNet, Zhang et al. 2023; diffusers' FluxControlNetModel).

Writes to --out what evaluate.py writes, and ablations/NAME/, the output of finetune.py. Started again, it goes on.
"""

import dsd

import argparse
import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import (
    FluxControlInpaintPipeline,
    FluxControlNetModel,
    FluxInpaintPipeline,
    FluxPipeline,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import evaluate
import finetune
from miniature import exams, world

RIVAL_FILE = "rival.safetensors"
SEARCH = range(
    100_000, 100_008
)  # numbers of the references for the search; the table never shows them
STRENGTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # of SDEdit
GUIDANCE = [
    (1.0, 1.0),
    (1.5, 1.0),
    (1.0, 1.5),
    (1.5, 1.5),
    (2.0, 1.5),
    (1.5, 2.0),
    (2.0, 2.0),
]  # image, text
LEARNING_RATES, TUNING_STEPS = [5e-4, 2e-3], [50, 100, 200, 400]  # of DreamBooth-LoRA
ABLATIONS = {  # name -> the pairs it learns from, finetune.py's flags
    "nothing left out": ("curated", []),
    "no curation, as many pairs": ("as many", []),
    "no curation, all pairs": ("uncurated", []),
    "no identity frame in the loss": ("curated", ["--frame_weights", 0, 1]),
    "both frames weigh the same": ("curated", ["--frame_weights", 1, 1]),
    "single frame": ("curated", ["--frames", 1]),
    "captions without pose words": ("no poses", []),
    "only condition columns": ("curated", ["--lora_lr_factor", 0]),
    "only LoRA": ("curated", ["--condition_lr_factor", 0]),
    "half of the pairs": ("half", []),
    "a quarter of the pairs": ("quarter", []),
    "LoRA rank 4": ("curated", ["--rank", 4]),
    "LoRA rank 64": ("curated", ["--rank", 64]),
}


# ---- ablations: finetune.py and curate.py by their own command lines -------------------------------------------------
def run_script(script, *flags):
    """Run one of this project's scripts in a process of its own, its output shown."""
    print(f"--- {script} {' '.join(map(str, flags))}", flush=True)
    in_package = script.startswith("miniature.")
    where = ["-m", script] if in_package else [dsd.MINIATURE.parent / script]
    if subprocess.run([sys.executable, *where, *map(str, flags)]).returncode:
        raise dsd.DsdError(f"{script} stopped (see above); the same command goes on from here")


def pairs_for(which, args):
    """The folder with an ablation's pairs: the curated ones, a part of them, or pairs that nobody curated."""
    if which == "curated":
        return args.pairs
    source, count = args.pairs, len(dsd.read_records(args.pairs / "metadata.jsonl"))
    if which in ("uncurated", "as many"):  # with this tolerance every comparison is accepted
        source = args.out / "ablations" / "uncurated_pairs"
        run_script(
            "curate.py",
            "--grids",
            args.grids,
            "--vlm",
            args.vlm,
            "--tolerance",
            99,
            "--out",
            source,
            "--device",
            args.device,
        )
        if which == "uncurated":
            return source
    records = dsd.read_records(source / "metadata.jsonl")
    if which == "as many":  # any pairs at all; fewer curated ones come from fewer grids
        some = random.Random(args.seed).sample(range(len(records)), min(count, len(records)))
        records = [records[k] for k in sorted(some)]
    records = records[: {"half": count // 2, "quarter": count // 4}.get(which, count)]
    for record in records:
        if which == "no poses":
            record["prompt"] = re.sub(
                f" ({'|'.join(filter(None, world.POSES))})(?= )", "", record["prompt"]
            )
        for side in ("reference_file_name", "target_file_name"):
            record[side] = (source / record[side]).resolve().as_posix()
    folder = args.out / "ablations" / f"pairs_{which.replace(' ', '_')}"
    dsd.write_json(folder / "metadata.jsonl", records)
    return folder


def train(name, args):
    """Train an ablation by finetune.py. Returns the option that a row needs: its adapter."""
    which, flags = ABLATIONS[name]
    folder = args.out / "ablations" / name.replace(" ", "_").replace(",", "")
    flags = [*flags, "--compile"] if args.compile else flags
    flags = [*flags, "--steps", args.ablation_steps] if args.ablation_steps else flags
    run_script(
        "finetune.py",
        "--model",
        args.model,
        "--pairs",
        pairs_for(which, args),
        "--out",
        folder,
        "--device",
        args.device,
        *flags,
    )
    return {"adapter": folder}


def train_rival(kind, args):
    """Train a rival on the curated pairs, as many steps as DSD. Returns the option that its row needs."""
    folder = args.out / "ablations" / kind
    if not (folder / RIVAL_FILE).exists():
        steps = ["--steps", args.ablation_steps] if args.ablation_steps else []
        run_script(
            "miniature.ablations",
            kind,
            "--model",
            args.model,
            "--pairs",
            args.pairs,
            "--out",
            folder,
            "--device",
            args.device,
            *steps,
        )
    return {"rival": (kind, folder)}


def held_frame(pipe, cases, args):
    """DSD, but frame 1 is held on the noised reference at each step (stock Control inpainting)."""
    canvases, mask = evaluate.two_frames(cases)
    pipe = FluxControlInpaintPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe(
        [case.prompt for case in cases],
        image=canvases,
        mask_image=mask,
        control_image=canvases,
        strength=1.0,
        width=2 * args.width,
        height=args.height,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        max_sequence_length=pipe.tokenizer_2.model_max_length,
        output_type="pt",
        generator=[torch.Generator("cpu").manual_seed(case.seed) for case in cases],
    ).images
    return [dsd.cut_grid(image, 1, 2)[1] for image in dsd.to_images(pixels)]


def clean_reference(pipe, cases, args):
    """In-context inpainting, but the reference has no noise at any step. The miniature's teacher can use that: it was
    pretrained with panels that have less noise than the others (pretrain.py --ahead). Ordinary teachers were not."""
    x_0 = dsd.encode(pipe.vae, dsd.to_pixels(evaluate.two_frames(cases)[0]))  # (B, N, 64)
    x = dsd.unpack(
        x_0, args.height // pipe.vae_scale_factor, 2 * args.width // pipe.vae_scale_factor
    )  # (B, 16, h, w)
    noise = [
        torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(case.seed))
        for case in cases
    ]
    latents = torch.cat(
        [x.chunk(2, dim=3)[0], torch.stack(noise).to(x).chunk(2, dim=3)[1]], dim=3
    )  # clean | noise
    pipe.scheduler.scale_noise = lambda sample, *_: (
        sample
    )  # what the pipeline puts into the left frame after a step
    return evaluate.inpainting(pipe, cases, args, latents=latents)


# ---- rivals: two other ways to show a reference to the teacher, trained on DSD's pairs -------------------------------
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
        self.project = torch.nn.Linear(64, self.config.joint_attention_dim)
        self.places = torch.nn.Parameter(torch.zeros(tokens, self.config.joint_attention_dim))
        self.norm = torch.nn.LayerNorm(self.config.joint_attention_dim)
        processors = transformer.attn_processors
        for name in processors:
            if name.startswith(
                "transformer_blocks"
            ):  # the double ones, as diffusers' loader has it
                processors[name] = FluxIPAdapterAttnProcessor(
                    self.width, self.config.joint_attention_dim
                )
                for layer in processors[name].to_v_ip:  # so that at first it is the teacher
                    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        transformer.set_attn_processor(processors)
        transformer.encoder_hid_proj = lambda tokens: [tokens]  # they are projected below

    def forward(self, hidden_states, **inputs):
        x, reference = hidden_states.chunk(2, dim=2)  # (B, N, 64) each
        tokens = self.norm(self.project(reference) + self.places)  # (B, N, joint_attention_dim)
        return self.transformer(
            hidden_states=x, joint_attention_kwargs={"ip_adapter_image_embeds": tokens}, **inputs
        )


class ControlNet(Rival):
    def __init__(self, transformer, tokens, double=1, single=2):
        super().__init__(transformer)
        self.copied = FluxControlNetModel.from_transformer(
            transformer,
            double,
            single,
            self.config.attention_head_dim,
            self.config.num_attention_heads,
        )

    def forward(self, hidden_states, **inputs):
        x, reference = hidden_states.chunk(2, dim=2)  # (B, N, 64) each
        blocks, single_blocks = self.copied(
            hidden_states=x, controlnet_cond=reference, return_dict=False, **inputs
        )
        return self.transformer(
            hidden_states=x,
            controlnet_block_samples=blocks,
            controlnet_single_block_samples=single_blocks,
            **inputs,
        )


RIVALS = {"ip_adapter": IPAdapter, "controlnet": ControlNet}


def load_rival(kind, transformer, args, folder=None):
    """A rival around a teacher's transformer; with a folder, as it was trained. Its tokens are those of one panel."""
    torch.manual_seed(args.seed)
    rival = RIVALS[kind](transformer, args.width * args.height // 64).to(transformer.device)
    for name, tensor in (load_file(folder / RIVAL_FILE) if folder else {}).items():
        rival.get_parameter(name).data.copy_(tensor)
    return rival


def draw_rival(pipe, cases, args):
    """Pictures for cases of the evaluation, by the sampler that DSD has; args.rival: (kind, folder)."""
    if not isinstance(pipe.transformer, Rival):
        pipe.transformer = load_rival(args.rival[0], pipe.transformer, args, args.rival[1])
        pipe.tokenizer_2.model_max_length = args.prompt_tokens[0]
    text, null_text = (
        dsd.encode_prompts(pipe, prompts) for prompts in ([case.prompt for case in cases], [""])
    )
    return dsd.sample_edit(
        pipe,
        dsd.to_pixels([case.image for case in cases]),
        text,
        null_text,
        [case.seed for case in cases],
        args.steps,
        args.image_guidance,
        args.text_guidance,
        args.guidance_scale,
        args.unguided_steps,
        frames=1,
    )


def fit_rival(rival, pairs, null_text, size, args):
    """finetune.py's loop in its shortest form: no accumulation, no validation, one process. Returns the log."""
    parameters, log = list(rival.trained().values()), []
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in tqdm(range(args.steps), desc="train"):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 64)
        batch = finetune.draw_batch(pairs, null_text, args, generator, PartialState())
        with torch.autocast(rival.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = finetune.batch_losses(rival, batch, size, args)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = args.learning_rate * finetune.learning_rate_share(
            step, args.steps
        )
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item()})
    return log


def rival_main():
    """`python -m miniature.ablations ip_adapter --pairs ...`: train one rival, with finetune.py's options."""
    kind = sys.argv.pop(1)
    sys.argv += ["--frames", "1"]
    args = finetune.parse_args()
    pairs, held_out = finetune.prepare(args, 1)
    known = dsd.digest(text=str([pair["cache"].stem for pair in pairs]))
    lock = dsd.open_out(args, kind, changeable=["pairs"], pairs_sha256=known)
    pipe = dsd.load_pipeline(
        FluxPipeline, args.model, prompt_tokens=args.prompt_tokens, dtype=torch.float32
    )
    finetune.encode_pairs(pipe, [*pairs, *held_out], args)
    rival = load_rival(kind, pipe.transformer, args)
    size = finetune.canvas_size(pipe, args)
    log = fit_rival(rival.train(), pairs, dsd.encode_prompts(pipe, [""]), size, args)
    dsd.write_json(args.out / "log.jsonl", log)
    with dsd.writing(args.out / RIVAL_FILE) as part:
        save_file({name: p.detach().cpu() for name, p in rival.trained().items()}, part)
    print(
        f"{sum(p.numel() for p in rival.trained().values()) / 1e6:.2f} million weights trained in {args.steps} steps "
        f"on {len(pairs)} pairs; see {args.out}"
    )
    lock.release()


# ---- DreamBooth-LoRA -------------------------------------------------------------------------------------------------
def named(text, subject):
    """A prompt with DreamBooth's rare word before the subject: "a kitten in space" -> "a sks kitten in space"."""
    found = re.sub(re.escape(subject), lambda m: f"sks {m.group()}", text, flags=re.IGNORECASE)
    return found if found != text else f"sks {subject}, {text}"


def tune(pipe, x, text, args, seed):
    """Train the LoRA in place. x (1 + P, N, 64) and text, a row each: the reference, then pictures of the prior.

    Half of each batch of 8 is the reference, half the prior."""
    transformer, (embeds, pooled) = pipe.transformer, text
    ids = dsd.position_ids(
        args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor
    ).to(x.device)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer, generator = (
        torch.optim.AdamW(parameters, lr=args.learning_rate),
        torch.Generator().manual_seed(seed),
    )
    for _ in tqdm(range(args.tuning_steps), desc="tune", leave=False):
        rows = (
            torch.cat([torch.zeros(4), torch.randint(1, len(x), (4,), generator=generator)])
            .long()
            .to(x.device)
        )
        sigma = dsd.sample_sigmas(8, args.shift, generator).to(x.device)
        eps = torch.randn(x[rows].shape, generator=generator).to(x)
        x_sigma, text_rows = dsd.interpolate(x[rows], eps, sigma), (embeds[rows], pooled[rows])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            v = dsd.run_transformer(
                transformer, x_sigma, sigma, text_rows, ids, args.guidance_scale
            )
        (v.float() - dsd.velocity(x[rows], eps).float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def dreambooth(pipe, cases, args, rank=16):
    """DreamBooth-LoRA (Ruiz et al. 2023): the teacher is tuned to one reference, called "sks", and then asked for it.

    The prior is the teacher's own pictures of such subjects. `cases` are those of one reference."""
    case, transformer = cases[0], pipe.transformer
    seeds = [
        dataclasses.replace(case, seed=case.seed + 63 - k) for k in range(len(case.class_prompts))
    ]
    prior = evaluate.teacher(pipe, seeds, args, case.class_prompts)
    x = dsd.encode(pipe.vae, dsd.to_pixels([case.image, *prior])).to(
        transformer.dtype
    )  # (1 + P, N, 64)
    prompts = [named(case.reference_prompt, case.subject), *case.class_prompts]
    with torch.no_grad():
        text = pipe.encode_prompt(prompts, prompts, max_sequence_length=args.prompt_tokens[0])[:2]
    torch.manual_seed(case.seed)  # of the LoRA's first weights
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    try:
        cast_training_params(transformer, torch.float32)
        tune(pipe, x, text, args, case.seed)
        return evaluate.teacher(
            pipe, cases, args, [named(case.prompt, case.subject) for case in cases]
        )
    finally:
        transformer.delete_adapters("default")


def dreambooth_row(name, args, options, train=dict):
    """A row of DreamBooth-LoRA: the cases of one reference are one batch."""
    return evaluate.Row(
        name,
        "tuning",
        dreambooth,
        FluxPipeline,
        {"batch_size": args.contexts + 1, **options},
        train,
    )


def search(args):
    """DreamBooth-LoRA's best settings on other references, as options. search/ has the table."""
    cases = exams.world_cases(SEARCH, args.contexts, args.seed, args.width)
    args, records = argparse.Namespace(**vars(args) | {"out": args.out / "search"}), {}
    settings = {
        f"DreamBooth-LoRA, {steps} steps at {rate}": {"tuning_steps": steps, "learning_rate": rate}
        for rate in LEARNING_RATES
        for steps in TUNING_STEPS
    }
    for name, options in settings.items():
        records[name] = evaluate.run_row(dreambooth_row(name, args, options), cases, args)
    evaluate.report(records, cases, args)
    return settings[
        max(records, key=lambda name: evaluate.summarise(records[name])["subject"]["cp_pf"][0])
    ]


# ---- the table -------------------------------------------------------------------------------------------------------
def all_rows(args):
    """Every row, in the table's order."""
    *rows, dsd_row = evaluate.all_rows(args)
    rows += [
        evaluate.Row(
            "in-context, clean reference", "sampling", clean_reference, FluxInpaintPipeline
        ),
        dreambooth_row("DreamBooth-LoRA", args, {}, lambda: search(args)),
        dsd_row,
    ]
    rows += [
        dsd_row._replace(
            name=f"DSD, guidance {i} {t}",
            group="guidance",
            options={"image_guidance": i, "text_guidance": t},
        )
        for i, t in GUIDANCE
    ]
    rows += [
        evaluate.Row(
            f"{name}, trained on the same pairs",
            "rival",
            draw_rival,
            FluxPipeline,
            train=lambda kind=kind: train_rival(kind, args),
        )
        for kind, name in (("ip_adapter", "like IP-Adapter"), ("controlnet", "like ControlNet"))
    ]
    rows += [dsd_row._replace(name="DSD, frame 1 held", group="sampling", draw=held_frame)]
    rows += [
        dsd_row._replace(
            name=f"DSD, {name}", group="ablation", train=lambda name=name: train(name, args)
        )
        for name in ABLATIONS
    ]
    return [
        *rows,
        dsd_row._replace(
            name="DSD, only LoRA, frame 1 held",
            group="ablation",
            draw=held_frame,
            train=lambda: train("only LoRA", args),
        ),
    ]


def check_sources(rows, args):
    """Refuse ablations without the data that they learn from, before hours are spent on other rows."""
    names = [row.name.removeprefix("DSD, ") for row in rows if row.group in ("ablation", "rival")]
    needed = {ABLATIONS.get(name, ["curated"])[0] for name in names}
    for file, used in (
        (args.pairs / "metadata.jsonl", needed),
        (args.grids / "grids.jsonl", needed & {"uncurated", "as many"}),
    ):
        if used and not file.exists():
            raise dsd.DsdError(
                f"no {file}, which the ablations need; run generate_grids.py and curate.py first, name "
                "their output with --grids and --pairs, or leave these rows out with --rows"
            )


def main():
    parser = dsd.Parser(__doc__, "runs/ablations")
    add = parser.add_argument
    add(
        "--pairs",
        type=Path,
        default=Path("runs/pairs"),
        help="what curate.py wrote, for the ablations",
    )
    add(
        "--grids",
        type=Path,
        default=Path("runs/grids"),
        help="what generate_grids.py wrote, without curation",
    )
    add(
        "--ablation_steps",
        type=dsd.at_least(1),
        help="of each training (default: finetune.py's own)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile while training: it takes a minute, then steps are faster",
    )
    parser.set_defaults(count=75, strengths=STRENGTHS)
    args = evaluate.parse_args(parser)
    if args.folder or PartialState().num_processes > 1:
        raise dsd.DsdError(
            "this table is for the miniature and one process; evaluate.py takes --folder and several"
        )
    args.shift = (
        dsd.folder_settings(args.model).get("finetune", {}).get("shift", 3.0)
    )  # of DreamBooth's noise levels
    rows = evaluate.choose_rows(all_rows(args), args)
    check_sources(rows, args)
    sources = {"pairs": args.pairs / "metadata.jsonl", "grids": args.grids / "grids.jsonl"}
    evaluate.evaluate(
        rows, args, **{name: file.exists() and dsd.digest(file) for name, file in sources.items()}
    )


if __name__ == "__main__":
    dsd.run_main(rival_main if sys.argv[1:2] and sys.argv[1] in RIVALS else main)
