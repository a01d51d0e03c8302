"""Two other ways to show a reference to the teacher, trained on DSD's pairs: the paper's comparisons in small.

    python miniature/rivals.py ip_adapter --pairs runs/pairs --out runs/ip_adapter
    python miniature/rivals.py controlnet --pairs runs/pairs --out runs/controlnet

ip_adapter  The double blocks also attend to tokens of the reference, by diffusers' own processors (IP-Adapter, Ye et
            al. 2023). The image encoder is the VAE: the miniature's only vision transformer belongs to the model that
            scores.
controlnet  A trained copy of the first blocks sees the reference and adds to what the teacher's blocks compute
            (ControlNet, Zhang et al. 2023; diffusers' FluxControlNetModel).

The teacher stays frozen. Both draw one frame and get the reference as DSD's --frames 1 does, x and condition (B, N, 64)
side by side, so that finetune.py's batches and loss and dsd.py's sampler serve them too. The other options are
finetune.py's. Writes rival.safetensors and log.jsonl to --out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dsd  # noqa: E402; first: it silences the libraries' notices

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from diffusers import FluxControlNetModel, FluxPipeline  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import finetune  # noqa: E402

FILE = "rival.safetensors"


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


def load(kind, transformer, args, folder=None):
    """A rival around a teacher's transformer; with a folder, as it was trained. Its tokens are those of one panel."""
    torch.manual_seed(args.seed)
    rival = RIVALS[kind](transformer, args.width * args.height // 64).to(transformer.device)
    for name, tensor in (load_file(folder / FILE) if folder else {}).items():
        rival.get_parameter(name).data.copy_(tensor)
    return rival


def draw(pipe, cases, args):
    """Pictures for cases of the evaluation, by the sampler that DSD has; args.rival: (kind, folder)."""
    if not isinstance(pipe.transformer, Rival):
        pipe.transformer = load(args.rival[0], pipe.transformer, args, args.rival[1])
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


def train(rival, pairs, null_text, args):
    """finetune.py's loop in its shortest form: no accumulation, no validation, one process. Returns the log."""
    parameters, log = list(rival.trained().values()), []
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in tqdm(range(args.steps), desc="train"):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 64)
        batch = finetune.draw_batch(pairs, null_text, args, generator, PartialState())
        with torch.autocast(rival.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = finetune.batch_losses(rival, batch, args)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = args.learning_rate * finetune.learning_rate_share(
            step, args.steps
        )
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item()})
    return log


def main():
    kind = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if kind not in RIVALS:
        raise dsd.DsdError(f"name a rival first: {' or '.join(RIVALS)}")
    sys.argv += ["--frames", "1"]
    args = finetune.parse_args()
    pairs, held_out = finetune.prepare(args, 1)
    known = dsd.digest(text=str([pair["cache"].stem for pair in pairs]))
    dsd.open_out(args, kind, changeable=["pairs"], pairs_sha256=known)
    pipe = dsd.load_pipeline(FluxPipeline, args.model, dtype=torch.float32)
    pipe.tokenizer_2.model_max_length = (
        args.prompt_tokens or dsd.folder_settings(args.model)["canvas_prompt_tokens"]
    )
    finetune.encode_pairs(pipe, [*pairs, *held_out], args)
    args.latent_size = args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor
    rival = load(kind, pipe.transformer, args)
    log = train(rival.train(), pairs, dsd.encode_prompts(pipe, [""]), args)
    dsd.write_json(args.out / "log.jsonl", log)
    with dsd.writing(args.out / FILE) as part:
        save_file({name: p.detach().cpu() for name, p in rival.trained().items()}, part)
    print(
        f"{sum(p.numel() for p in rival.trained().values()) / 1e6:.2f} million weights trained in {args.steps} steps "
        f"on {len(pairs)} pairs; see {args.out}"
    )


if __name__ == "__main__":
    dsd.run_main(main)
