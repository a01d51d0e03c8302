"""Makes the miniature's models from nothing: `python -m miniature.pretrain all`, or one by one
`vae`, then `flux`, `references`, `vlm`, `judge` and `witness`, a second judge.

Each command writes the folder that is committed (miniature/flux, miniature/vlm, ...) and keeps its
checkpoint and its log in runs/pretrain/NAME. Stopped at any time and started again it goes on from
its last checkpoint. The same command runs on a CPU (hours) and on a CUDA GPU (minutes). Everything
is drawn by world.py, from identities that are not held out.

`all` makes one after the other. With --minutes it stops in time, exports what it has and notes the
steps in the model's folder (training.json). The same command goes on from there, on another machine
too if the folders are copied (or committed): then from the exported weights, with a fresh
optimiser. What each costs, and how good it gets, is in miniature/README.md and LOG.md.
"""

import dsd

import argparse
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from miniature import exams, models, vlm_data, world

RUNS = Path("runs/pretrain")


# ---- what all have in common ---------------------------------------------------------------------
def precision_of(run, asked=None):
    """The number format of a run: what is asked for, else what it began with, else as dsd.py."""
    begun = dsd.read_json(run / "settings.json").get("precision")
    return asked or begun or ("bf16" if dsd.weight_dtype() == torch.bfloat16 else "no")


def autocast(device, precision):
    """Mixed precision with bfloat16 ("bf16"), or all in float32 ("no")."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def save_checkpoint(out, parameters, optimizer, ema, log, step):
    """Write the log so far and then, as one file, all that the next step depends on."""
    dsd.write_json(out / "log.jsonl", log)
    state = {
        "step": step,
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
    }
    with dsd.writing(out / "checkpoint.pt") as part:
        torch.save(state, part)


def read_checkpoint(out):
    """The last checkpoint in a folder, or None."""
    file = out / "checkpoint.pt"
    with dsd.explained(f"{file}: not a checkpoint of this script; delete it to start again"):
        return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


def resume(out, parameters, optimizer, ema):
    """Restore the last checkpoint. Returns the log and the number of the next step."""
    state = read_checkpoint(out)
    if not state:
        return [], 0
    with dsd.explained(f"{out / 'checkpoint.pt'}: of another model; delete it to start again"):
        for p, saved in zip(parameters, state["parameters"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
    log = dsd.read_records(out / "log.jsonl")
    return [record for record in log if record["step"] < state["step"]], state["step"]


def fit(name, module, loss_of_step, args, betas=(0.9, 0.98)):
    """Train `module` until step args.steps with AdamW, or until the time is up, and leave it with
    its averaged (EMA) weights. Returns how many steps it has learned.

    loss_of_step(step, generator) -> loss. All randomness of a step comes from its own generator, so
    a resumed run draws what an uninterrupted one would have drawn."""
    out = RUNS / name
    parameters = [p for p in module.parameters() if p.requires_grad]
    settings = {"lr": args.learning_rate, "betas": betas, "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(parameters, **settings)
    ema = EMAModel(parameters, decay=args.ema, use_ema_warmup=True, power=0.75, foreach=True)
    log, done = resume(out, parameters, optimizer, ema)
    done = max(done, args.done)
    ema.to(args.device)
    # in bfloat16 on a CPU plain attention's backward pass is faster than the fused one's here
    plain = args.device == "cpu" and args.precision == "bf16"
    attention = [SDPBackend.MATH] if plain else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    begun = saved = time.time()
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, desc=name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_share(step, args.steps)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        with autocast(args.device, args.precision), sdpa_kernel(attention):
            loss = loss_of_step(step, generator)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (loss + norm).isfinite():  # before it reaches the weights
            kept = f"the last checkpoint is kept. Delete {out} and try a lower --learning_rate"
            raise dsd.DsdError(f"{name}: the loss is not a number at step {step}; {kept}")
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        done, last = step + 1, step + 1 == args.steps or time.time() > args.deadline
        if step % 20 == 0 or last:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            log.append({"step": step, "loss": loss.item(), "seconds": time.time() - begun})
        if time.time() - saved > args.save_minutes * 60 or last:
            save_checkpoint(out, parameters, optimizer, ema, log, done)
            saved = time.time()
        if last:
            break
    ema.copy_to(parameters)
    module.eval()
    return done


def learning_rate_share(step, steps, warmup=100):
    """Linear warm-up, a plateau, linear decay over the last 40 %."""
    return min(1.0, (step + 1) / warmup, max((steps - step) / (0.4 * steps), 0.0))


def export(save, folder, steps):
    """Let save(part) fill a folder aside and move its files to `folder`, so that none is ever half
    a file; training.json says how many steps the model has learned."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save(part)
    for file in [f for f in part.rglob("*") if f.is_file()]:
        place = folder / file.relative_to(part)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(part)
    dsd.write_json(folder / "training.json", {"steps": steps})
    print(f"wrote {folder}")


# ---- the VAE -------------------------------------------------------------------------------------
def load_vae(folder):
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)


def pretrain_vae(args):
    """Reconstruct panels, two-panel sheets and grids; a little KL keeps the latents small."""
    vae = load_vae(args.start) if args.start else models.make_vae()
    vae.to(args.device)
    vae.encoder.requires_grad_(not args.start)  # going on, the latents stay those a teacher knows
    layouts = [(1, 1), (1, 2), (2, 2)]

    def batch(generator, layout):
        n = args.batch_size // (layout[0] * layout[1])
        return world.sheets(n, generator, layout, models.PANEL)[0].to(args.device) * 2 - 1

    def loss_of_step(step, generator):
        x = batch(generator, layouts[step % 3])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 2e-5 * kl

    steps = fit("vae", vae, loss_of_step, args)
    if not args.start:  # FLUX's convention: (latents - shift) * scale has mean 0 and variance 1
        with torch.no_grad():
            x = torch.cat([batch(torch.Generator().manual_seed(i), (1, 1)) for i in range(16)])
            z = vae.encode(x).latent_dist.mode()
        vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    export(vae.half().save_pretrained, args.out / "flux" / "vae", steps)


# ---- the teacher ---------------------------------------------------------------------------------
LAYOUTS = [((2, 2), 1.0), ((1, 2), 0.5), ((1, 1), 1.0)]  # rows, columns; how many of --sheets
SCHEDULE = [0, 1, 0, 2, 0, 1]  # of six batches three are grids, two two-panel sheets, one panels


@dataclasses.dataclass
class Sheets:
    """Encoded sheets of one layout."""

    latents: torch.Tensor  # (count, N, 64) in float16
    clip_ids: torch.Tensor  # (count, 77)
    t5_ids: torch.Tensor  # (count, length)
    ids: torch.Tensor  # positions of the tokens (N, 3)
    panel: torch.Tensor  # the panel that each token is in (N,)
    batch_size: int  # so many sheets have as many tokens as --batch_size grids


def load_sheets(pipe, layout, count, args):
    """`count` sheets of one layout, drawn and encoded once and kept on disk: each is then seen
    several times, every time with other noise."""
    rows, columns = layout
    latents, captions = encode_sheets(pipe.vae, layout, count, args)
    side = models.PANEL // models.VAE_FACTOR
    ids = dsd.position_ids(side * rows, side * columns)
    panel = (ids[:, 1] // (side // 2) * columns + ids[:, 2] // (side // 2)).long()
    return Sheets(
        latents.to(args.device),
        *tokenize(pipe, captions, models.TOKENS[layout]),
        ids.to(args.device),
        panel,
        args.batch_size * (1 if layout == (2, 2) else 2),
    )


def encode_sheets(vae, layout, count, args):
    """Packed latents (count, N, 64) in float16 of `count` sheets, and their captions."""
    rows, columns = layout
    path = RUNS / "flux" / f"latents_{rows}x{columns}_{count}_{args.seed}.safetensors"
    captions_path = path.with_suffix(".json")
    if not captions_path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts, captions = [], []
        n = (512 if args.device == "cuda" else 32) // (rows * columns)  # as many as suit its caches
        for i in tqdm(range(0, count, n), desc=f"draw and encode {rows}x{columns} sheets"):
            seed = args.seed * 1_000_003_000 + 7_000_003 * (rows + columns) + i
            generator = torch.Generator().manual_seed(seed)
            some = min(n, count - i)
            x, c = world.sheets(some, generator, layout, models.PANEL, device=args.device)
            with torch.no_grad(), autocast(args.device, args.precision):
                z = vae.encode(x * 2 - 1).latent_dist.mode().float()
            z = (z - vae.config.shift_factor) * vae.config.scaling_factor
            parts.append(dsd.pack(z).half().cpu())
            captions += c
        with dsd.writing(path) as part:
            save_file({"latents": torch.cat(parts)}, part)
        dsd.write_json(captions_path, captions)  # last: with it the layout is complete
    return load_file(path)["latents"], json.loads(captions_path.read_text())


def tokenize(pipe, captions, length):
    """Token ids of both encoders, padded as FluxPipeline pads them: (n, 77) and (n, length)."""
    clip, t5 = pipe.tokenizer, pipe.tokenizer_2
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip_ids = clip(captions, max_length=clip.model_max_length, **how).input_ids
    return clip_ids, t5(captions, max_length=length, **how).input_ids


def parts_of(t5_ids, tokenizer):
    """The part of the caption that each token (n, length) stands in: 0 the opening and the subject,
    1-4 what is said of that panel, 5 what follows "with" before any panel is spoken of; -100
    padding.

    FLUX gives all text tokens one position, so word order must come from the text encoder. A real
    T5 has learned it from much text; this one is asked, before and while the transformer learns,
    which part each word is in."""
    ordinals = torch.tensor(tokenizer.convert_tokens_to_ids(world.ORDINALS), device=t5_ids.device)
    panel = torch.isin(t5_ids, ordinals).cumsum(1)
    followed = (t5_ids == tokenizer.convert_tokens_to_ids("with")).cumsum(1) > 0
    parts = torch.where((panel == 0) & followed, 5, panel)
    return parts.masked_fill(t5_ids == tokenizer.pad_token_id, -100)


class Teacher(torch.nn.Module):
    """What is trained of a FluxPipeline, with a classifier of the T5's words that is for training
    only."""

    def __init__(self, pipe, device):
        super().__init__()
        self.transformer, self.clip = pipe.transformer, pipe.text_encoder
        part_of_word = torch.nn.Linear(pipe.text_encoder_2.config.d_model, 6)
        self.reader = torch.nn.ModuleList([pipe.text_encoder_2, part_of_word]).to(device)
        self.tokenizer = pipe.tokenizer_2
        self.null = None  # token ids of the empty prompt, as `tokenize` gives them

    def read(self, t5_ids):
        """The T5's embeddings (n, length, width), and how wrongly it places each word."""
        t5, part_of_word = self.reader
        text = t5(t5_ids)[0]
        parts = parts_of(t5_ids, self.tokenizer)
        return text, F.cross_entropy(part_of_word(text).float().mT, parts)

    def loss(self, sheets, args, generator):
        """Flow matching on a batch of sheets, in part with one panel ahead of the others, and a
        tenth of the reading loss."""
        n, device = sheets.batch_size, args.device
        index = torch.randint(len(sheets.latents), (n,), generator=generator)
        drop = torch.rand(n, 1, generator=generator) < 0.1  # for guidance: the empty prompt
        null_clip, null_t5 = self.null
        null_t5 = null_t5[:, : sheets.t5_ids.shape[1]]
        clip_ids = torch.where(drop, null_clip, sheets.clip_ids[index]).to(device)
        t5_ids = torch.where(drop, null_t5, sheets.t5_ids[index]).to(device)
        x_0 = sheets.latents[index.to(device)].float()  # (n, N, 64)
        seed = int(torch.randint(2**62, (), generator=generator))
        own = torch.Generator(device).manual_seed(seed)
        eps = torch.randn(x_0.shape, generator=own, device=device)
        sigma = dsd.sample_sigmas(n, models.SHIFT, generator)
        ahead = draw_ahead(sheets.panel, n, args.ahead, generator).to(device)  # (n, N)
        less = (sigma * (1 + torch.rand(n, generator=generator)) / 2).to(device)
        sigma = sigma.to(device)

        x_sigma = dsd.interpolate(x_0, eps, sigma)
        x_less = dsd.interpolate(x_0, eps, less)
        text, reading = self.read(t5_ids)
        v = self.transformer(
            hidden_states=torch.where(ahead[..., None], x_less, x_sigma),
            timestep=sigma,
            encoder_hidden_states=text,
            pooled_projections=self.clip(clip_ids).pooler_output,
            img_ids=sheets.ids,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
        ).sample
        error = (v.float() - dsd.velocity(x_0, eps))[~ahead].square().mean()
        return error + 0.1 * reading


def draw_ahead(panel, n, share, generator):
    """Which tokens (n, N) have less noise than the others and are left out of the loss: in a share
    of the sheets those of one panel. The other panels learn to look at it. It never has less than
    half of their noise: FLUX has not seen a clean panel beside noisy ones either."""
    panels = panel.max().item() + 1
    if not share or panels == 1:
        return torch.zeros(n, len(panel), dtype=torch.bool)
    one = torch.randint(panels, (n, 1), generator=generator)
    return (panel == one) & (torch.rand(n, 1, generator=generator) < share)


def pretrain_flux(args):
    """Flow matching on panels, two-panel sheets and grids; the text encoders learn along with the
    transformer."""
    pipe = models.make_flux(load_vae(args.out / "flux" / "vae").to(args.device))
    models.zero_init(pipe.transformer)
    if args.start:
        old = FluxPipeline.from_pretrained(args.start, vae=pipe.vae, torch_dtype=torch.float32)
        for part in ("transformer", "text_encoder", "text_encoder_2"):
            getattr(pipe, part).load_state_dict(getattr(old, part).state_dict())
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    teacher = Teacher(pipe, args.device).train()
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    kinds = [load_sheets(pipe, layout, int(args.sheets * n), args) for layout, n in LAYOUTS]
    teacher.null = tokenize(pipe, [""], models.PROMPT_TOKENS)

    def reading(step, generator):
        t5_ids = kinds[0].t5_ids
        index = torch.randint(len(t5_ids), (32,), generator=generator)
        return teacher.read(t5_ids[index].to(args.device))[1]

    def loss_of_step(step, generator):
        return teacher.loss(kinds[SCHEDULE[step % len(SCHEDULE)]], args, generator)

    if args.word_steps:
        words = argparse.Namespace(**vars(args) | {"steps": args.word_steps})
        if fit("flux_words", teacher.reader, reading, words) < args.word_steps:
            return  # out of time; its checkpoint is kept
    steps = fit("flux", teacher.train(), loss_of_step, args)
    write_flux(pipe, args, steps)


def write_flux(pipe, args, steps):
    """The FLUX folder in float16, with dsd.json beside the models."""

    def save(part):
        pipe.to(dtype=torch.float16).save_pretrained(part)
        for config in part.glob("text_encoder*/config.json"):  # stock lines then load float32
            dsd.write_json(config, dsd.read_json(config) | {"dtype": "float32"})
        shutil.copy(dsd.MINIATURE / "flux" / "dsd.json", part)  # settings and grammar of prompts

    export(save, args.out / "flux", steps)


def draw_references(args, count=8):
    """miniature/references: held-out critters at noon in the meadow, in all poses. A file's name
    says what a prompt may call the critter."""
    generator = torch.Generator().manual_seed(args.seed)
    names = []
    while len(set(names)) < count:  # no two of one name: a file would replace another
        identity = world.identity_of(world.draw_identities(count, generator, held_out=True))
        names = [world.noun(row) for row in identity]
    pose = world.in_pose(world.draw_poses(count, generator), torch.arange(count) % len(world.POSES))
    meadow = world.CONTEXT["scene"].index("in the meadow")
    images = world.render(identity, torch.tensor([[meadow, 0, 0]] * count), pose, models.PANEL)
    for row, image in zip(identity, images):
        dsd.save_image(exams.to_image(image), args.out / "references" / f"{world.noun(row)}.png")


# ---- the VLM -------------------------------------------------------------------------------------
@dataclasses.dataclass
class Pool:
    """Panels that the VLM learns from; see vlm_data.draw_pool."""

    images: torch.Tensor  # (groups, 6, 3, s, s) in uint8
    attributes: torch.Tensor  # (groups, 6, columns)
    device: str

    def panels(self, group, panel, generator):
        """Panels (N, 3, s, s) in [-1, 1] by their places, blurred, tinted and noised a little."""
        images = self.images[group, panel].float() / 127.5 - 1
        return vlm_data.degrade(images, generator).to(self.device)


def load_pool(args):
    """The training pool, drawn once and kept in runs/pretrain/vlm. A quarter of it has gone through
    the VAE, as every panel that curation will see has."""
    path = RUNS / "vlm" / f"panels_{vlm_data.POOL}_{args.seed}_vae.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        vae = load_vae(args.out / "flux" / "vae").to(args.device)
        generator = torch.Generator().manual_seed(args.seed + 77)
        images, attributes = vlm_data.draw_pool(vlm_data.POOL, generator, device=args.device)
        quarter = images[: vlm_data.POOL // 4]
        decoded = through_vae(quarter.flatten(0, 1), vae, args.precision)
        images[: len(quarter)] = decoded.view(quarter.shape)
        with dsd.writing(path) as part:
            save_file({"images": images, "attributes": attributes}, part)
    return Pool(**load_file(path), device=args.device)


@torch.no_grad()
def through_vae(images, vae, precision="no"):
    """Panels (N, 3, s, s) in uint8, encoded and decoded."""
    parts = []
    for x in tqdm(images.split(32), desc="through the VAE"):
        with autocast(vae.device.type, precision):
            y = vae.decode(vae.encode(x.to(vae.device) / 127.5 - 1).latent_dist.mode()).sample
        parts.append(((y.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts)


def answering_loss(net, pool, n, generator):
    """Of the answers about n pairs and n single panels, and of what comes before an answer: to see,
    and to compare."""
    pairs = vlm_data.draw_pairs(pool.attributes, n, generator).view(n * 2, 2)
    single = [torch.randint(k, (n,), generator=generator) for k in (len(pool.images), 6)]
    group, panel = torch.cat([pairs, torch.stack(single, 1)]).unbind(1)
    attributes = pool.attributes[group, panel]
    kind = torch.rand(2, n, generator=generator)
    features = net.see(pool.panels(group, panel, generator))
    rows = attributes.tolist()
    a, b, alone = rows[: 2 * n : 2], rows[1 : 2 * n : 2], rows[2 * n :]
    about_pairs = [vlm_data.pair_lesson(*both) for both in zip(a, b, kind[0])]
    about_panels = [vlm_data.panel_lesson(row, k, generator) for row, k in zip(alone, kind[1])]
    return (
        net.answer_loss(features[: 2 * n], about_pairs)
        + 0.5 * net.answer_loss(features[2 * n :], about_panels)
        + 0.5 * net.attribute_loss(features, attributes.to(pool.device))
        + 0.5 * net.comparing_loss(vlm_data.draw_descriptions(n // 2, generator))
    )


def pretrain_vlm(args):
    """First the vision tower learns to see (all attributes of single panels), then the language
    model to compare two descriptions, from text alone; then the whole learns to answer. In one go
    the same takes many times as long."""
    pool = load_pool(args)
    vlm, processor = models.make_vlm(vlm_data.vlm_words())
    if args.start:
        old = type(vlm).from_pretrained(args.start, dtype=torch.float32)
        vlm.load_state_dict(old.state_dict())
    net = vlm_data.Lessons(vlm, processor).to(args.device).train()

    def seeing(step, generator):
        group = torch.randint(len(pool.images), (args.batch_size,), generator=generator)
        panel = torch.randint(6, (args.batch_size,), generator=generator)
        features = net.see(pool.panels(group, panel, generator))
        return net.attribute_loss(features, pool.attributes[group, panel].to(args.device))

    def comparing(step, generator):
        return net.comparing_loss(vlm_data.draw_descriptions(args.batch_size // 2, generator))

    def answering(step, generator):
        return answering_loss(net, pool, args.batch_size // 4, generator)

    sight = torch.nn.ModuleList([vlm.model.vision_tower, net.heads])
    for name, module, loss, steps in (
        ("vlm_sight", sight, seeing, args.sight_steps),
        ("vlm_words", vlm.model.language_model, comparing, args.word_steps),
    ):
        own = argparse.Namespace(**vars(args) | {"steps": steps})
        if steps and fit(name, module, loss, own) < steps:
            return  # out of time; its checkpoint is kept
    steps = fit("vlm", net.train(), answering, args)
    write_vlm(vlm, processor, args.out / "vlm", steps)


def write_vlm(vlm, processor, folder, steps):
    """The VLM's folder, in float16; stock lines load it as float32."""

    def save(part):
        weights = {name: weight.half() for name, weight in vlm.state_dict().items()}
        vlm.save_pretrained(part, state_dict=weights)
        processor.save_pretrained(part)
        settings = {"example": ""}  # it has learned the form of the answer, and knows few words
        dsd.write_json(part / "dsd.json", {"curate": settings})

    export(save, folder, steps)


# ---- the judge -----------------------------------------------------------------------------------
def pretrain_judge(args, name="judge", make=models.make_judge):
    """Name all attributes of freshly drawn panels, half of them bent, blurred, tinted or noised. It
    sees renderings only and shares no weights with the models that it judges."""
    judge = make()
    if args.start:
        judge = type(judge).from_pretrained(args.start, dtype=torch.float32)
    judge.to(args.device).train()
    sizes = [len(values) for values in vlm_data.VALUES]

    def loss_of_step(step, generator):
        n = args.batch_size
        identity = world.identity_of(world.draw_identities(n, generator))
        context, pose = world.draw_contexts(n, generator), world.draw_poses(n, generator)
        named = torch.randint(len(world.POSES), (n,), generator=generator)
        panels = world.render(identity, context, world.in_pose(pose, named), models.PANEL)
        x = panels * 2 - 1
        clean = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        x = torch.where(clean, x, vlm_data.degrade(vlm_data.warp(x, generator), generator))
        logits = judge(pixel_values=x.to(args.device)).logits.float().split(sizes, 1)
        wanted = torch.cat([identity, context, named[:, None]], 1).to(args.device)
        return sum(F.cross_entropy(row, value) for row, value in zip(logits, wanted.T))

    steps = fit(name, judge, loss_of_step, args)
    export(judge.half().save_pretrained, args.out / name, steps)


def pretrain_witness(args):
    """A second judge, of another architecture and from other seeds."""
    args.seed += 1_000_003
    pretrain_judge(args, "witness", models.make_witness)


# ---- all of them ---------------------------------------------------------------------------------
FLUX = {"steps": 44_000, "batch_size": 8, "learning_rate": 1.5e-3, "ahead": 0.5, "sheets": 12_000}
ALL = {  # what `all` does, in this order
    "vae": {"steps": 8700},
    "flux": FLUX,
    "references": {},
    "judge": {"steps": 10_000},
    "witness": {"steps": 10_000},
    "vlm": {"steps": 4000},
}


def pretrain_all(args):
    """Each model with the settings of ALL, until it is done or the time is up."""
    for name, settings in ALL.items():
        folder = args.out / ("flux/vae" if name == "vae" else name)
        done = dsd.read_json(folder / "training.json").get("steps", 0)
        if name != "references" and done >= settings["steps"]:
            continue
        own = argparse.Namespace(**vars(args) | {"model": name} | settings)
        if done and not (RUNS / name / "checkpoint.pt").exists():  # from the exported weights
            own.start, own.done = folder, done
        run(own)
        if time.time() > args.deadline:
            print(f"the time is up in the training of {name}; the same command goes on from here")
            return
    print("all models are made")


# ---- command line --------------------------------------------------------------------------------
COMMANDS = {
    "vae": (pretrain_vae, {"steps": 8000, "batch_size": 12, "learning_rate": 2e-3}),
    "flux": (pretrain_flux, {"steps": 10400, "batch_size": 16, "learning_rate": 2e-3}),
    "references": (draw_references, {}),
    "judge": (pretrain_judge, {"steps": 4000, "batch_size": 64, "learning_rate": 2e-3}),
    "witness": (pretrain_witness, {"steps": 10_000, "batch_size": 64, "learning_rate": 1.5e-3}),
    "vlm": (pretrain_vlm, {"steps": 2400, "batch_size": 64, "learning_rate": 1e-3}),
    "all": (pretrain_all, {}),
}
DECISIVE = "model", "seed", "batch_size", "learning_rate", "ema", "ahead", "sheets", "precision"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=dsd.HelpFormatter)
    add = parser.add_argument
    add("model", choices=COMMANDS)
    add("--steps", type=int, help="if not given, the model's own, see COMMANDS; so the next two")
    add("--batch_size", type=int, help="panels or grids a step")
    add("--learning_rate", type=float, help="at its highest")
    add("--sheets", type=int, default=32_000, help="flux: how many grids to draw and encode")
    ahead = "in this share of the sheets one panel has less noise than the others, which look at it"
    add("--ahead", type=float, default=0.0, help=f"flux: {ahead}")
    start = "a folder of such a model to go on from; of the VAE only the decoder goes on"
    add("--start", help=f"{start}; if not given, from nothing")
    alone = "by itself, first; if not given, {}, or 0 with --start"
    add("--done", type=int, default=0, help="steps of --steps that --start has learned already")
    add("--sight_steps", type=int, help=f"vlm: steps of the vision tower {alone.format(3000)}")
    words = f"vlm, flux: steps of the language model {alone.format(600)}"
    add("--word_steps", type=int, help=words)
    add("--compile", action="store_true", help="flux: compile the blocks (a step costs less)")
    add("--out", type=Path, default=dsd.MINIATURE, help="folder of the models' folders")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device, help="where to compute")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights")
    add("--seed", type=int, default=0, help="of weights, data and noise")
    add("--precision", choices=["bf16", "no"], help="as in finetune.py; a begun run keeps its own")
    add("--save_minutes", type=float, default=3.0, help="between checkpoints")
    text = "stop after so many, and export what there is"
    add("--minutes", type=float, default=math.inf, help=text)
    args = parser.parse_args()
    args.deadline = time.time() + 60 * args.minutes
    return args


def run(args):
    """One of COMMANDS, with its defaults for what is not given."""
    train, defaults = COMMANDS[args.model]
    alone = {"sight_steps": 0, "word_steps": 0}
    if not args.start:
        alone = {"sight_steps": 3000, "word_steps": 600}
    for key, value in (defaults | alone).items() if args.model != "all" else ():
        if getattr(args, key) is None:
            setattr(args, key, value)
    torch.manual_seed(args.seed)
    if args.model in ("references", "all"):
        return train(args)
    out = RUNS / args.model
    args.precision = precision_of(out, args.precision)
    decisive = {name: getattr(args, name) for name in DECISIVE}
    lock = dsd.open_out(argparse.Namespace(out=out, **decisive), "pretrain", changeable=[])
    train(args)
    lock.release()


def main():
    run(parse_args())


if __name__ == "__main__":
    dsd.run_main(main)
