"""Large models on the machine at hand: fewer bits a weight, weights that wait in main memory, several processes.

Every script takes --quantize (bitsandbytes, through diffusers' and transformers' own configurations) and can be started
by `accelerate launch`; generate_grids.py and sample.py take --offload too. What the machine lacks is said in one line
before anything is downloaded.
"""

import functools
import importlib.util
import os
import re
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from diffusers import PipelineQuantizationConfig

import dsd

BYTES = {"none": 2, "int8": 1, "nf4": .516}  # a weight on a GPU; nf4: 4 bits, and 8 bits for each block of 64
FLUX_1 = {"transformer": 11.9e9, "text encoders": 4.9e9}  # parameters
WORKING = 3.0  # * GB beside the weights: activations at 1024x1024, the VAE, CUDA itself


def add_flags(parser, offload=False):
    """--quantize, and --offload where the script can."""
    parser.add_argument("--quantize", choices=BYTES, default="none", help="weights of 8 or 4 bits; needs bitsandbytes")
    if offload:
        parser.add_argument("--offload", choices=["none", "model", "group", "sequential"], default="none", help="weights "
                            "wait in main memory: whole models at a time, groups of layers, single layers (slowest)")


# ---- what the machine has --------------------------------------------------------------------------------------------
def check(args, flux=(), language=None):
    """Refuse what this machine cannot do. flux: the parts of args.model that share a GPU; language: another model."""
    cuda, offload = dsd.device() == "cuda", getattr(args, "offload", "none")
    if (args.quantize, offload) != ("none", "none") and not cuda:
        raise dsd.DsdError("--quantize and --offload need a CUDA GPU, which this machine does not have")
    if args.quantize != "none" and not importlib.util.find_spec("bitsandbytes"):
        raise dsd.DsdError(f"--quantize {args.quantize} needs bitsandbytes: pip install bitsandbytes")
    if args.quantize != "none" and offload in ("group", "sequential"):
        raise dsd.DsdError(f"--quantize {args.quantize} goes with --offload model or none")
    gb = [parameters * (BYTES[args.quantize] if cuda else 4) / 1e9 for parameters in flux_parameters(args, flux)]
    check_memory(getattr(args, "model", None), {"none": sum(gb), "model": max(gb, default=0)}.get(offload, 0), cuda)
    if language and (size := re.search(r"(\d+(?:\.\d+)?)b\b", Path(language).name.lower())) and dsd.on_hub(language):
        check_memory(language, float(size[1]) * (BYTES[args.quantize] if cuda else 4), cuda)


def flux_parameters(args, parts):
    """How many parameters each part has; of a folder none is too many, since its owner has seen it."""
    return [FLUX_1[part] for part in parts if dsd.on_hub(args.model)]


def check_memory(name, gb, cuda):
    """Refuse a model of so many GB of weights if the GPU, or without one main memory, is smaller."""
    if cuda:
        has, place = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9, "the GPU"
        advice = "try --quantize nf4, or --offload model where there is that option"
    else:
        has, place = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, "this machine without a CUDA GPU"
        advice = "run it on a CUDA GPU, or leave the option out to use the miniature"
    if gb and gb + WORKING > has:
        raise dsd.DsdError(f"{name} needs about {gb + WORKING:.0f} GB and {place} has {has:.0f} GB; {advice}")


# ---- quantisation ----------------------------------------------------------------------------------------------------
def bits(library, kind, **more):
    """The configuration of `library` (diffusers or transformers) for nf4 or int8 weights, None for "none"."""
    if kind == "none":
        return None
    how = {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16}
    return library.BitsAndBytesConfig(**how, **more)


def quantized(kind, *parts):
    """What load_pipeline takes to quantise these parts. The embedder stays as it is: it gets wider."""
    configs = {"transformer": (diffusers, {"llm_int8_skip_modules": ["x_embedder"]}), "text_encoder_2": (transformers, {})}
    mapping = {part: bits(configs[part][0], kind, **configs[part][1]) for part in parts}
    return {} if kind == "none" else {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def fit(args, *parts):
    """What load_pipeline takes to load a pipeline as --quantize and --offload say; parts: those that it has."""
    return {"place": functools.partial(place, offload=getattr(args, "offload", "none")),
            **quantized(args.quantize, *(parts or ("transformer", "text_encoder_2")))}


def language_model(cls, name, kind, dtype):
    """A transformers model on the device."""
    return cls.from_pretrained(name, dtype=dtype, use_safetensors=True, device_map=dsd.device(),
                               quantization_config=bits(transformers, kind)).eval()


def adamw(kind):
    """AdamW; beside quantised weights its moments have 8 bits too."""
    if kind == "none":
        return torch.optim.AdamW
    import bitsandbytes  # only where it is needed: not every machine has it
    return bitsandbytes.optim.AdamW8bit


# ---- offloading ------------------------------------------------------------------------------------------------------
def place(pipe, offload):
    """Put a pipeline on the device, or have its weights fetched when they are needed."""
    if offload == "none":
        return pipe.to(dsd.device())
    if offload == "group":
        pipe.enable_group_offload(torch.device(dsd.device()), offload_type="leaf_level", use_stream=True)
    else:
        {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}[offload]()
    return pipe


# ---- several processes -----------------------------------------------------------------------------------------------
def processes():
    """Which process this is, of how many (accelerate's PartialState): one of one, unless `accelerate launch` started it."""
    return PartialState(cpu=dsd.device() == "cpu")
