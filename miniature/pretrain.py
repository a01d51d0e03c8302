"""Makes the miniature's models from nothing: `python -m miniature.pretrain all`, or one by one `vae`, then `flux`,
`vlm`, `judge` and `witness`, a second judge.

Each command writes the folder that is committed (miniature/flux, miniature/vlm, miniature/judge, ...) and keeps its
checkpoint, its log and a picture of where it stands in runs/pretrain/NAME. Stopped at any time and started again it
goes on from its last checkpoint. The same command runs on a CPU (hours) and on a CUDA GPU (minutes). Everything is
drawn by world.py, from identities that are not held out.

`all` makes one after the other. With --minutes it stops in time, exports what it has and notes the steps in the model's
folder (training.json). The same command goes on from there, on another machine too if the folders are copied (or
committed): then from the exported weights, with a fresh optimiser.

What each costs on two CPU cores, and how good it gets, is in miniature/README.md.
"""

import dsd

import argparse
import functools
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoTokenizer

from miniature import models, vlm_data, world


# ---- what all have in common -----------------------------------------------------------------------------------------
@functools.cache
def bfloat16_is_faster():
    """Whether this device is clearly faster in bfloat16. A CPU without instructions for it is 100 times slower."""
    if torch.cuda.is_available():
        return dsd.weight_dtype() == torch.bfloat16

    def seconds(dtype):
        matrices = {"a": torch.ones(64, 256, dtype=dtype), "b": torch.ones(256, 1024, dtype=dtype)}
        return Timer("a @ b", globals=matrices).blocked_autorange(min_run_time=0.05).median

    return seconds(torch.float32) > 1.3 * seconds(torch.bfloat16)


def precision_of(run, asked=None):
    """The number format of a run: what is asked for, else what it began with, else what is measured to be faster.

    A measurement may come out otherwise at the next start: so it decides once, and settings.json keeps it."""
    begun = dsd.read_json(run / "settings.json").get("precision")
    return asked or begun or ("bf16" if bfloat16_is_faster() else "no")


def autocast(device, precision):
    """Mixed precision with bfloat16 ("bf16"), or all in float32 ("no")."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def save_checkpoint(out, parameters, optimizer, ema, log, step):
    """Write the log so far and then, as one file, all that the next step depends on."""
    dsd.write_json(out / "log.jsonl", log)
    with dsd.writing(out / "checkpoint.pt") as part:
        torch.save(
            {
                "step": step,
                "parameters": [p.detach() for p in parameters],
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
            },
            part,
        )


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
    return [r for r in dsd.read_records(out / "log.jsonl") if r["step"] < state["step"]], state[
        "step"
    ]


def fit(name, module, loss_of_step, args, picture=None, betas=(0.9, 0.98)):
    """Train `module` until step args.steps with AdamW, or until the time is up, and leave it with its averaged (EMA)
    weights. Returns how many steps it has learned.

    loss_of_step(step, generator) -> loss. All randomness of a step comes from its own generator, so a resumed run
    draws what an uninterrupted one would have drawn."""
    out = Path("runs/pretrain") / name
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=betas, weight_decay=0.01, fused=True
    )
    ema = EMAModel(parameters, decay=args.ema, use_ema_warmup=True, power=0.75, foreach=True)
    log, done = resume(out, parameters, optimizer, ema)
    done = max(done, args.done)
    ema.to(args.device)
    # in bfloat16 on a CPU the plain attention's backward pass is faster than the fused one's at these sizes
    plain = args.device == "cpu" and args.precision == "bf16"
    attention = [SDPBackend.MATH] if plain else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    begun, saved = time.time(), time.time()
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, desc=name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_share(step, args.steps)
        with autocast(args.device, args.precision), sdpa_kernel(attention):
            loss = loss_of_step(step, torch.Generator().manual_seed(args.seed * 1_000_003 + step))
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (loss + norm).isfinite():  # before it reaches the weights
            raise dsd.DsdError(
                f"{name}: the loss is not a number at step {step}; the last checkpoint is kept. Delete "
                f"{out} and try a lower --learning_rate"
            )
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
            if picture:
                ema.store(parameters)
                ema.copy_to(parameters)
                with torch.no_grad():
                    picture(out / "picture.png")
                ema.restore(parameters)
        if last:
            break
    ema.copy_to(parameters)
    module.eval()
    return done


def learning_rate_share(step, steps, warmup=100):
    """Linear warm-up, a plateau, linear decay over the last 40 %."""
    return min(1.0, (step + 1) / warmup, max((steps - step) / (0.4 * steps), 0.0))


def note_steps(folder, steps):
    """Write into a model's folder how many steps it has learned."""
    dsd.write_json(folder / "training.json", {"steps": steps})


def load_averages(name, module):
    """Give `module` the averaged weights of its last checkpoint, to export a run that is not finished."""
    state = read_checkpoint(Path("runs/pretrain") / name)
    if not state:
        raise dsd.DsdError(f"no checkpoint in runs/pretrain/{name}: nothing to export")
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p, average in zip(parameters, state["ema"]["shadow_params"], strict=True):
        p.data.copy_(average)
    print(f"{name}: exporting step {state['step']}")


def export(save, folder):
    """Let save(part) fill a folder aside and move its files to `folder`: whatever happens, none is half a file."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save(part)
    for file in [f for f in part.rglob("*") if f.is_file()]:
        place = folder / file.relative_to(part)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(part)
    print(f"wrote {folder}")


def save_picture(images, columns, path, scale=4):
    """Images (N, 3, h, w) in [0, 1] as one sheet, enlarged without smoothing."""
    n, c, h, w = images.shape
    rows = images[: n // columns * columns].view(-1, columns, c, h, w)
    sheet = rows.permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
    picture = Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().cpu().numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(path)


# ---- the VAE ---------------------------------------------------------------------------------------------------------
def pretrain_vae(args):
    """Reconstruct single panels, two-panel sheets and grids; a whisper of KL keeps the latents tame."""
    vae = (
        AutoencoderKL.from_pretrained(args.start, torch_dtype=torch.float32)
        if args.start
        else models.make_vae()
    )
    vae.to(args.device).encoder.requires_grad_(
        not args.start
    )  # going on: the latents stay those that a teacher knows
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

    def picture(path):
        x = batch(torch.Generator().manual_seed(1), (1, 1))[:16]
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        save_picture(torch.cat([x, y]) / 2 + 0.5, len(x), path)

    steps = fit("vae", vae, loss_of_step, args, picture)
    with torch.no_grad():  # FLUX's convention: (latents - shift) * scale has mean 0 and variance 1
        x = torch.cat([batch(torch.Generator().manual_seed(i), (1, 1)) for i in range(16)])
        z = vae.encode(x).latent_dist.mode()
        psnr = 10 * math.log10(4 / F.mse_loss(vae.decode(z).sample, x).item())
    if not args.start:
        vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    print(
        f"VAE: {psnr:.1f} dB on training identities; latents of mean {z.mean():.3f}, deviation {z.std():.3f}"
    )
    export(vae.half().save_pretrained, args.out / "flux" / "vae")
    note_steps(args.out / "flux" / "vae", steps)


# ---- the teacher -----------------------------------------------------------------------------------------------------
class Pass(torch.nn.Module):
    """run(*tensors) -> tensor: a pass of `module`, which is named so that its parameters are known."""

    def __init__(self, module, run):
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *tensors):
        return self.run(*tensors)


def recorded(module, run):
    """`run`, a pass of `module`, as a CUDA graph: recorded once for each shape of its inputs, then replayed, gradients
    included. In models as small as these a GPU would else mostly wait for the next of thousands of small kernels."""
    graphs = {}

    def replay(*tensors):
        shapes = tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)
        if shapes not in graphs:
            examples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                graphs[shapes] = torch.cuda.make_graphed_callables(
                    Pass(module, run), examples, allow_unused_input=True
                )
        return graphs[shapes](*tensors)

    return replay


def encode_world(vae, layout, count, args):
    """`count` sheets of one layout as packed latents (count, N, 64) in float16, and their captions.

    Drawn and encoded once and kept on disk: each is then seen several times, every time with other noise."""
    path = (
        Path("runs/pretrain/flux")
        / f"latents_{layout[0]}x{layout[1]}_{count}_{args.seed}.safetensors"
    )
    captions_path = path.with_suffix(".json")
    if not captions_path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts, captions = [], []
        n = (512 if args.device == "cuda" else 32) // (
            layout[0] * layout[1]
        )  # at once: as many as suit its caches
        for i in tqdm(range(0, count, n), desc=f"draw and encode {layout[0]}x{layout[1]} sheets"):
            generator = torch.Generator().manual_seed(
                args.seed * 1_000_003_000 + 7_000_003 * sum(layout) + i
            )
            x, c = world.sheets(
                min(n, count - i), generator, layout, models.PANEL, device=args.device
            )
            with torch.no_grad(), autocast(args.device, args.precision):
                z = vae.encode(x * 2 - 1).latent_dist.mode().float()
            parts.append(
                dsd.pack((z - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu()
            )
            captions += c
        with dsd.writing(path) as part:
            save_file({"latents": torch.cat(parts)}, part)
        dsd.write_json(captions_path, captions)  # last: with it the layout is complete
    return load_file(path)["latents"], json.loads(captions_path.read_text())


def pretrain_flux(args):
    """Flow matching on panels, two-panel sheets and grids; the text encoders learn along with the transformer."""
    vae = AutoencoderKL.from_pretrained(
        args.vae or args.out / "flux" / "vae", torch_dtype=torch.float32
    )
    pipe = models.make_flux(vae.to(args.device))
    models.zero_init(pipe.transformer)
    if args.start:
        old = FluxPipeline.from_pretrained(args.start, vae=vae, torch_dtype=torch.float32)
        for part in ("transformer", "text_encoder", "text_encoder_2"):
            models.take_over(
                getattr(pipe, part),
                getattr(old, part),
                models.words_of(pipe.tokenizer_2),
                models.words_of(old.tokenizer_2),
            )
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    t5, part_of_word = (
        pipe.text_encoder_2,
        torch.nn.Linear(pipe.text_encoder_2.config.d_model, 6).to(args.device),
    )
    reader = torch.nn.ModuleList(
        [t5, part_of_word]
    ).train()  # the classifier of its words is for training only
    net = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, reader]).train()
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    if args.export:
        load_averages("flux", net)
        return write_flux(pipe, args)
    side = models.PANEL // models.VAE_FACTOR
    kinds = []  # (latents, CLIP ids, T5 ids, position ids, panel of each token, batch size): a batch has as many tokens
    for layout, share in (((2, 2), 1.0), ((1, 2), 0.5), ((1, 1), 1.0)):
        latents, captions = encode_world(vae, layout, int(args.sheets * share), args)
        clip_ids, t5_ids = tokenize(pipe, captions, models.TOKENS[layout])
        ids = dsd.position_ids(side * layout[0], side * layout[1])
        panel = (ids[:, 1] // (side // 2) * layout[1] + ids[:, 2] // (side // 2)).long()  # (N,)
        per_batch = args.batch_size * (1 if layout == (2, 2) else 2)
        kinds.append(
            (latents.to(args.device), clip_ids, t5_ids, ids.to(args.device), panel, per_batch)
        )
    null_clip, null_t5 = tokenize(pipe, [""], models.TOKENS[2, 2])

    def encode_text(ids):
        return t5(ids)[0]

    def pool_text(ids):
        return pipe.text_encoder(ids).pooler_output

    def predict(x, sigma, text, pooled, ids, text_ids):
        return pipe.transformer(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=ids,
            txt_ids=text_ids,
        ).sample

    if args.graphs:
        encode_text, pool_text = recorded(t5, encode_text), recorded(pipe.text_encoder, pool_text)
        predict = recorded(pipe.transformer, predict)

    def reading(step, generator):
        t5_ids = kinds[0][2][torch.randint(len(kinds[0][2]), (32,), generator=generator)].to(
            args.device
        )
        return F.cross_entropy(
            part_of_word(t5(t5_ids)[0]).float().mT, parts_of(t5_ids, pipe.tokenizer_2)
        )

    schedule = [
        0,
        1,
        0,
        2,
        0,
        1,
    ]  # of six batches three are grids, two two-panel sheets, one single panels

    def loss_of_step(step, generator):
        latents, clip_ids, t5_ids, ids, panel, n = kinds[schedule[step % len(schedule)]]
        index = torch.randint(len(latents), (n,), generator=generator)
        drop = torch.rand(n, 1, generator=generator) < 0.1  # for guidance: the empty prompt
        clip_ids = torch.where(drop, null_clip, clip_ids[index]).to(args.device)
        t5_ids = torch.where(drop, null_t5[:, : t5_ids.shape[1]], t5_ids[index]).to(args.device)
        parts = parts_of(t5_ids, pipe.tokenizer_2)
        x_0 = latents[index.to(args.device)].float()
        noise = torch.Generator(args.device).manual_seed(
            int(torch.randint(2**62, (), generator=generator))
        )
        eps = torch.randn(x_0.shape, generator=noise, device=args.device)
        sigma = dsd.sample_sigmas(n, models.SHIFT, generator)
        ahead = torch.zeros(
            x_0.shape[:2], dtype=torch.bool
        )  # (n, N): tokens of panels that have less noise
        if args.ahead and (panels := panel.max().item() + 1) > 1:
            one = torch.randint(panels, (n, 1), generator=generator)
            ahead = (panel == one) & (torch.rand(n, 1, generator=generator) < args.ahead)
        less = sigma * torch.rand(n, generator=generator)
        sigma, less, ahead = (x.to(args.device) for x in (sigma, less, ahead[..., None]))
        text = encode_text(t5_ids)
        v = predict(
            torch.where(ahead, dsd.interpolate(x_0, eps, less), dsd.interpolate(x_0, eps, sigma)),
            sigma,
            text,
            pool_text(clip_ids),
            ids,
            torch.zeros(text.shape[1], 3, device=text.device),
        )
        error = (v.float() - dsd.velocity(x_0, eps))[~ahead.squeeze(2)].square().mean()
        return error + 0.1 * F.cross_entropy(part_of_word(text).float().mT, parts)

    @torch.compiler.set_stance("force_eager")
    def picture(path):
        prompts = world.sheets(12, torch.Generator().manual_seed(2))[1]
        side = models.PANEL * 2
        images = pipe(
            prompts,
            negative_prompt=[""] * 12,
            true_cfg_scale=2.0,
            height=side,
            width=side,
            num_inference_steps=20,
            max_sequence_length=models.PROMPT_TOKENS,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images.float()
        save_picture(images, 6, path, scale=3)

    if args.word_steps:
        words = argparse.Namespace(**vars(args) | {"steps": args.word_steps})
        if fit("flux_words", reader, reading, words) < args.word_steps:
            return  # out of time; its checkpoint is kept
    steps = fit("flux", net.train(), loss_of_step, args, picture)
    write_flux(pipe, args)
    note_steps(args.out / "flux", steps)


def tokenize(pipe, captions, length):
    """Token ids of both encoders, padded as FluxPipeline pads them: (n, 77) and (n, length)."""
    return [
        t(
            captions, padding="max_length", truncation=True, max_length=n, return_tensors="pt"
        ).input_ids
        for t, n in ((pipe.tokenizer, pipe.tokenizer.model_max_length), (pipe.tokenizer_2, length))
    ]


def parts_of(t5_ids, tokenizer):
    """The part of the caption that each token (n, length) stands in: 0 the opening and the subject, 1-4 what is said of
    that panel, 5 what follows "with" before any panel is spoken of; -100 padding.

    FLUX gives all text tokens one position, so word order must come from the text encoder. A real T5 has learned it
    from much text; this one is asked, before and while the transformer learns, which part each word is in."""
    word = dict(
        zip(["with", *world.ORDINALS], tokenizer.convert_tokens_to_ids(["with", *world.ORDINALS]))
    )
    panel = torch.isin(
        t5_ids, torch.tensor([word[o] for o in world.ORDINALS], device=t5_ids.device)
    ).cumsum(1)
    followed = (t5_ids == word["with"]).cumsum(1) > 0
    return torch.where((panel == 0) & followed, 5, panel).masked_fill(
        t5_ids == tokenizer.pad_token_id, -100
    )


def write_flux(pipe, args):
    """The FLUX folder in float16, with dsd.json beside the models; without the VAE if --vae names another folder's."""

    def save(part):
        pipe.to(dtype=torch.float16).save_pretrained(part)
        if args.vae:
            shutil.rmtree(part / "vae")
        for config in part.glob(
            "text_encoder*/config.json"
        ):  # so that stock lines load all parts as float32
            dsd.write_json(config, dsd.read_json(config) | {"dtype": "float32"})

    export(save, args.out / "flux")
    dsd.write_json(args.out / "flux" / "dsd.json", models.flux_settings())


def draw_references(args, count=8):
    """miniature/references: held-out critters at noon in the meadow, in all poses. A file's name says what a prompt may
    call the critter."""
    generator = torch.Generator().manual_seed(args.seed)
    identity = world.identity_of(world.draw_identities(count, generator, held_out=True))
    pose = world.in_pose(world.draw_poses(count, generator), torch.arange(count) % len(world.POSES))
    images = world.render(identity, torch.tensor([[6, 0, 0]] * count), pose, models.PANEL)
    (args.out / "references").mkdir(exist_ok=True)
    for row, image in zip(identity, images):
        save_picture(image[None], 1, args.out / "references" / f"{world.noun(row)}.png", scale=1)


# ---- the VLM ---------------------------------------------------------------------------------------------------------
def pool_of_panels(args):
    """The training pool, drawn once and kept in runs/pretrain/vlm. A quarter of it has gone through the VAE, as every
    panel that curation will see has."""
    path = Path("runs/pretrain/vlm") / f"panels_{vlm_data.POOL}_{args.seed}_vae.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        vae = AutoencoderKL.from_pretrained(
            args.out / "flux" / "vae", torch_dtype=torch.float32
        ).to(args.device)
        generator = torch.Generator().manual_seed(args.seed + 77)
        images, attributes = vlm_data.draw_pool(vlm_data.POOL, generator, device=args.device)
        quarter = images[: vlm_data.POOL // 4]
        images[: len(quarter)] = through_vae(quarter.flatten(0, 1), vae, args.precision).view(
            quarter.shape
        )
        with dsd.writing(path) as part:
            save_file({"images": images, "attributes": attributes}, part)
    pool = load_file(path)
    return pool["images"], pool["attributes"]


@torch.no_grad()
def through_vae(images, vae, precision="no"):
    """Panels (N, 3, s, s) in uint8, encoded and decoded."""
    parts = []
    for x in tqdm(images.split(32), desc="through the VAE"):
        with autocast(vae.device.type, precision):
            y = vae.decode(vae.encode(x.to(vae.device) / 127.5 - 1).latent_dist.mode()).sample
        parts.append(((y.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts)


def pretrain_vlm(args):
    """First the vision tower learns to see (all attributes of single panels), then the language model to compare two
    descriptions, from text alone; then the whole learns to answer. In one go the same takes many times as long."""
    images, attributes = pool_of_panels(args)
    vlm, processor = models.make_vlm(vlm_data.vlm_words())
    if args.start:
        old = type(vlm).from_pretrained(args.start, dtype=torch.float32)
        words = models.words_of(AutoTokenizer.from_pretrained(args.start))
        models.take_over(vlm, old, models.words_of(processor.tokenizer), words)
    net = vlm_data.Lessons(vlm, processor).to(args.device).train()
    n = args.batch_size // 4

    def panels(group, panel, generator):
        return vlm_data.degrade(images[group, panel].float() / 127.5 - 1, generator).to(args.device)

    def seeing(step, generator):
        group = torch.randint(len(images), (args.batch_size,), generator=generator)
        panel = torch.randint(6, (args.batch_size,), generator=generator)
        return net.attribute_loss(
            net.see(panels(group, panel, generator)), attributes[group, panel].to(args.device)
        )

    def comparing(step, generator):
        return net.comparing_loss(vlm_data.draw_descriptions(args.batch_size // 2, generator))

    def answering(step, generator):
        pairs = vlm_data.draw_pairs(attributes, n, generator).view(n * 2, 2)
        single = torch.stack(
            [
                torch.randint(len(images), (n,), generator=generator),
                torch.randint(6, (n,), generator=generator),
            ],
            1,
        )
        group, panel = torch.cat([pairs, single]).unbind(1)
        rows, kind = attributes[group, panel], torch.rand(2, n, generator=generator)
        features = net.see(panels(group, panel, generator))
        told = rows.tolist()
        about_pairs = [
            vlm_data.pair_lesson(told[2 * i], told[2 * i + 1], kind[0, i]) for i in range(n)
        ]
        about_panels = [
            vlm_data.panel_lesson(told[2 * n + i], kind[1, i], generator) for i in range(n)
        ]
        return (
            net.answer_loss(features[: 2 * n], about_pairs)
            + 0.5 * net.answer_loss(features[2 * n :], about_panels)
            + 0.5 * net.attribute_loss(features, rows.to(args.device))
            + 0.5 * net.comparing_loss(vlm_data.draw_descriptions(n // 2, generator))
        )

    def picture(path):
        write_vlm(vlm, processor, path.parent / "vlm")

    sight = torch.nn.ModuleList([vlm.model.vision_tower, net.heads])
    for name, module, loss, steps in (
        ("vlm_sight", sight, seeing, args.sight_steps),
        ("vlm_words", vlm.model.language_model, comparing, args.word_steps),
    ):
        if (
            steps
            and fit(name, module, loss, argparse.Namespace(**vars(args) | {"steps": steps})) < steps
        ):
            return  # out of time; its checkpoint is kept
    steps = fit("vlm", net.train(), answering, args, picture)
    write_vlm(vlm, processor, args.out / "vlm")
    note_steps(args.out / "vlm", steps)


def write_vlm(vlm, processor, folder):
    """The VLM's folder in float16, the weights in training untouched."""
    halves = {k: v.half() for k, v in vlm.state_dict().items()}
    export(
        lambda part: (
            vlm.save_pretrained(part, state_dict=halves),
            processor.save_pretrained(part),
        ),
        folder,
    )
    dsd.write_json(
        folder / "dsd.json", {"curate": {"example": ""}}
    )  # it has learned the form, and knows few words


# ---- the judge -------------------------------------------------------------------------------------------------------
def pretrain_judge(args, name="judge", make=models.make_judge):
    """Name all eleven attributes of freshly drawn panels, half of them bent, blurred, tinted or noised a little.

    It sees renderings only and shares no weights with the models that it judges."""
    judge = make()
    if args.start:
        old = type(judge).from_pretrained(args.start, dtype=torch.float32)
        models.take_over(judge, old, models.labels_of(judge), models.labels_of(old))
    judge.to(args.device).train()
    sizes = [len(values) for values in vlm_data.VALUES]

    def loss_of_step(step, generator):
        n = args.batch_size
        identity = world.identity_of(world.draw_identities(n, generator))
        context = world.draw_contexts(n, generator)
        pose, named = (
            world.draw_poses(n, generator),
            torch.randint(len(world.POSES), (n,), generator=generator),
        )
        pose = world.in_pose(pose, named)
        x = world.render(identity, context, pose, models.PANEL) * 2 - 1
        clean = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        x = torch.where(clean, x, vlm_data.degrade(vlm_data.warp(x, generator), generator))
        logits = judge(pixel_values=x.to(args.device)).logits.float().split(sizes, 1)
        wanted = torch.cat([identity, context, named[:, None]], 1).to(args.device)
        return sum(F.cross_entropy(row, value) for row, value in zip(logits, wanted.T))

    steps = fit(name, judge, loss_of_step, args)
    export(judge.half().save_pretrained, args.out / name)
    note_steps(args.out / name, steps)


def pretrain_witness(args):
    """A second judge, of another architecture and from other seeds, whose marks stand beside the first's."""
    args.seed += 1_000_003
    pretrain_judge(args, "witness", models.make_witness)


# ---- all of them -----------------------------------------------------------------------------------------------------
def pretrain_all(args):
    """Each model with the settings of ALL, until it is done or the time is up."""
    for name, settings in ALL.items():
        folder = args.out / {"vae": "flux/vae"}.get(name, name)
        note = folder / "training.json"
        done = dsd.read_json(note)["steps"] if note.exists() else 0
        if name == "references" or done < settings["steps"]:
            own = argparse.Namespace(**vars(args) | {"model": name} | settings)
            if (
                done and not (Path("runs/pretrain") / name / "checkpoint.pt").exists()
            ):  # from the exported weights
                own.start, own.done = folder, done
            run(own)
            if time.time() > args.deadline:
                return print(
                    f"the time is up in the training of {name}; the same command goes on from here"
                )
    print("all models are made")


# ---- command line ----------------------------------------------------------------------------------------------------
COMMANDS = {
    "vae": (pretrain_vae, dict(steps=8000, batch_size=12, learning_rate=2e-3)),
    "flux": (pretrain_flux, dict(steps=10400, batch_size=16, learning_rate=2e-3)),
    "references": (draw_references, {}),
    "judge": (pretrain_judge, dict(steps=4000, batch_size=64, learning_rate=2e-3)),
    "witness": (pretrain_witness, dict(steps=10_000, batch_size=64, learning_rate=1.5e-3)),
    "vlm": (pretrain_vlm, dict(steps=2400, batch_size=64, learning_rate=1e-3)),
    "all": (pretrain_all, {}),
}
ALL = {  # what `all` does, in this order
    "vae": dict(steps=8700),
    "flux": dict(steps=44_000, batch_size=8, learning_rate=1.5e-3, ahead=0.5, sheets=12_000),
    "references": {},
    "judge": dict(steps=10_000),
    "witness": dict(steps=10_000),
    "vlm": dict(steps=4000),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=COMMANDS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument(
        "--vae",
        help="flux: the folder of its VAE, which is then not written (default: OUT/flux/vae)",
    )
    parser.add_argument(
        "--sheets", type=int, default=32_000, help="flux: how many grids to draw and encode"
    )
    parser.add_argument(
        "--ahead",
        type=float,
        default=0.0,
        help="flux: in this share of the sheets one panel has less "
        "noise than the others and is left out of the loss: they learn to look at it",
    )
    parser.add_argument(
        "--start",
        help="a folder of such a model to go on from (default: from nothing); of the VAE "
        "only the decoder goes on",
    )
    parser.add_argument(
        "--sight_steps",
        type=int,
        help="vlm: steps of the vision tower by itself, first (default: 3000, or 0 with --start)",
    )
    parser.add_argument(
        "--word_steps",
        type=int,
        help="vlm, flux: steps of the language model by itself, next "
        "(default: 600, or 0 with --start)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="flux: compile the blocks (it takes a minute; then a step costs a third less)",
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="flux, on a CUDA GPU: replay the passes as CUDA graphs (a step costs half or a third)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=dsd.MINIATURE,
        help="where the models' folders go (default: this folder)",
    )
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision",
        choices=["bf16", "no"],
        help="bf16: mixed precision; no: all in float32 (default: the faster one, measured once)",
    )
    parser.add_argument("--save_minutes", type=float, default=3.0)
    parser.add_argument(
        "--export", action="store_true", help="flux: write the folder from the last checkpoint, now"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after so many, and export what there is",
    )
    args = parser.parse_args()
    args.done, args.device = 0, "cuda" if torch.cuda.is_available() else "cpu"
    args.deadline = time.time() + args.minutes * 60
    if args.threads:
        torch.set_num_threads(args.threads)
    run(args)


def run(args):
    """One of COMMANDS, with its defaults for what is not given."""
    train, defaults = COMMANDS[args.model]
    first = (
        dict(sight_steps=0, word_steps=0) if args.start else dict(sight_steps=3000, word_steps=600)
    )
    for key, value in (defaults | first if args.model != "all" else {}).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    torch.manual_seed(args.seed)
    if not args.export and args.model not in (
        "references",
        "all",
    ):  # an export may read beside the run that writes
        out = Path("runs/pretrain") / args.model
        args.precision = precision_of(out, args.precision)
        names = (
            "model",
            "seed",
            "batch_size",
            "learning_rate",
            "ema",
            "ahead",
            "sheets",
            "precision",
        )
        decisive = {name: getattr(args, name) for name in names}
        folder = argparse.Namespace(out=out, **decisive)
        dsd.open_out(folder, "pretrain", changeable=[])
    train(args)


if __name__ == "__main__":
    dsd.run_main(main)
