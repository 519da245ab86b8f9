"""Converts checkpoints of the authors' code to models of this library. `vlv.hub.convert` writes them.

The authors' stage 1 is a state dict with `model.` (Florence-2), `language_proj.`, `query_embed`, `text_encoder.`,
`unet.` and `vae.`; their stage 2 is one with `VLV_model.` (the same without UNet and autoencoder), `mlp.` and
`qwen2_model.`. Neither holds a configuration, so the configurations of the pretrained parts are read, and sizes come
from the weights. Every weight is used, or listed with the reason why it is not needed. A weight that is missing,
unknown or of another shape is an error.

Weights stay on disk until they are written, one by one (`torch.load(mmap=True)`).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPTextConfig,
    Florence2Config,
    Florence2Model,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from .diffusion_decoder import StableDiffusionDecoder
from .diffusion_decoder.components import load_components
from .files import read_json
from .modeling_vlv import FLORENCE_TASK_PROMPT_IDS, VLVConfig, VLVModel
from .modeling_vlv_captioner import VLVForConditionalGeneration
from .original_checkpoint import read_weights
from .processing_vlv import VLVImageProcessor
from .processing_vlv_captioner import VLVProcessor
from .tokenizer import load_tokenizer

IMAGE_SIZE = 384  # pixels: the authors' default of --image_size
MAX_NEW_TOKENS = 300  # the authors' Caption_inference.py
TASK_PROMPT = "Describe with a paragraph what is shown in the image."  # Florence-2's for <MORE_DETAILED_CAPTION>
DROPPED = {  # patterns of weights that VLV does not use, and why
    r"(^|\.)model\.(language_model\.)?lm_head\.weight$": "the language-model head of Florence-2 is never used",
    r"^(language_model\.)?lm_head\.weight$": "the language-model head of Florence-2 is never used",
    r"final_logits_bias$": "the language-model head of Florence-2 is never used",
    r"\.position_ids$": "the numbers 0, 1, 2, ..., which the model computes",
    r"\.rotary_emb\.inv_freq$": "constants, which the model computes",
}
TO_ORIGINAL = (  # weight names of transformers' Florence-2 to those of Microsoft's code
    (r"^(vision_tower\.convs\.\d+)\.conv\.", r"\1.proj."),
    (r"\.(spatial|channel)_block\.conv([12])\.", r".\1_block.conv\2.fn.dw."),
    (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
    (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
    (r"\.(window|channel)_attn\.(qkv|proj)\.", r".\1_attn.fn.\2."),
    (r"_block\.norm2\.", "_block.ffn.norm."),
    (r"_block\.ffn\.(fc[12])\.", r"_block.ffn.fn.net.\1."),
    (r"^multi_modal_projector\.image_projection\.weight$", "image_projection"),
    (r"^multi_modal_projector\.image_proj_norm\.", "image_proj_norm."),
    (r"^multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
    (r"^multi_modal_projector\.visual_temporal_embed\.", "visual_temporal_embed."),
    (r"^language_model\.", "language_model.model."),
)


@dataclass
class ConvertedCheckpoints:
    """Models with the weights of the authors' checkpoints.

    Attributes:
        parts: Arguments of `vlv.hub.export`, such as `captioner` and `diffusion_model`.
        dropped: Name of each weight that was left out, with the reason.
    """

    parts: dict[str, Any]
    dropped: dict[str, str]


def convert_checkpoints(
    *,
    stage1: str | os.PathLike | None = None,
    stage2: str | os.PathLike | None = None,
    stable_diffusion: str | os.PathLike | None = None,
    florence: str | os.PathLike | None = None,
    language_model: str | os.PathLike | None = None,
    image_size: int | None = None,
) -> ConvertedCheckpoints:
    """Builds the models of a stage-1 checkpoint, a stage-2 checkpoint, or both.

    Arguments and errors are those of `vlv.hub.convert`. At least one of `stage1` and `stage2` must be given.
    """
    florence = existing_folder(florence, "florence", "the Florence-2 folder is needed (--florence)")
    stable_diffusion = existing_folder(
        stable_diffusion, "stable-diffusion", "the Stable Diffusion folder is needed (--stable-diffusion)"
    )
    if stage2 is not None:
        language_model_folder = existing_folder(
            language_model,
            "language-model",
            "a stage-2 checkpoint needs the language model's folder (--language-model)",
        )
    read_json(stable_diffusion / "text_encoder" / "config.json", "hidden_size")
    read_json(stable_diffusion / "scheduler" / "scheduler_config.json", "beta_schedule")
    read_json(stable_diffusion / "tokenizer" / "tokenizer_config.json")
    image_size = _image_size(stable_diffusion, image_size)
    image_processor = build_image_processor(florence, image_size)
    dropped: dict[str, str] = {}
    parts: dict[str, Any] = {"image_processor": image_processor}
    if stage1 is not None:
        weights, name = read_weights(stage1, ("pytorch_model.bin", "checkpoint_*.pt")), str(stage1)
        config = build_config(weights, "", florence, stable_diffusion)
        parts["encoder"] = _load_weights(VLVModel, config, encoder_names, weights, name)
        unet, vae = _empty_unet_and_vae(stable_diffusion)
        scheduler = diffusers.DDPMScheduler.from_pretrained(
            stable_diffusion, subfolder="scheduler"
        )  # the authors' sampler
        parts["diffusion_model"] = {
            "unet": _load_weights(unet, None, lambda key: ["unet." + key], weights, name),
            "vae": _load_weights(vae, None, lambda key: ["vae." + key], weights, name),
            "scheduler": scheduler,
            "tokenizer": load_tokenizer(stable_diffusion / "tokenizer"),
        }
        dropped |= _dropped_weights(weights, name)
    else:
        parts["diffusion_model"] = load_components(stable_diffusion, StableDiffusionDecoder)
        parts["diffusion_model"]["scheduler"] = diffusers.DDPMScheduler.from_config(
            parts["diffusion_model"]["scheduler"].config
        )
    if stage2 is not None:
        weights, name = read_weights(stage2, ("model.pt", "pytorch_model.bin")), str(stage2)
        config = build_config(weights, "VLV_model.", florence, stable_diffusion, language_model_folder)
        captioner = _load_weights(VLVForConditionalGeneration, config, captioner_names, weights, name)
        if (language_model_folder / "generation_config.json").is_file():
            read_json(language_model_folder / "generation_config.json")
            captioner.generation_config = GenerationConfig.from_pretrained(language_model_folder)
        captioner.generation_config.max_new_tokens = MAX_NEW_TOKENS
        dropped |= _dropped_weights(weights, name)
        stage2_folder = Path(stage2) if Path(stage2).is_dir() else Path(stage2).parent
        has_tokenizer = (stage2_folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(stage2_folder if has_tokenizer else language_model_folder)
        processor = VLVProcessor(image_processor, tokenizer, image_seq_length=captioner.config.num_query_tokens)
        captioner.config.image_token_id = processor.image_token_id
        parts |= {"captioner": captioner, "processor": processor}
    return ConvertedCheckpoints(parts, dropped)


def convert_florence(florence: Path) -> tuple[Florence2Model, dict[str, str]]:
    """Converts a Florence-2 with Microsoft's or transformers' weight names to transformers' model.

    Returns:
        The model, and the name of each weight that was left out, with the reason.
    """
    weights = read_weights(florence, ("model.safetensors", "pytorch_model.bin"))
    config = build_florence_config(florence, {name: tuple(t.shape) for name, t in weights.items()}, "")
    model = _load_weights(Florence2Model, config, _florence_names(""), weights, str(florence))
    return model, _dropped_weights(weights, str(florence))


# --- names -----------------------------------------------------------------------------------------------------------


def original_florence_name(name: str) -> str:
    """The name in Microsoft's code of a weight of `Florence2Model`."""
    for pattern, replacement in TO_ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def _florence_names(prefix: str) -> Callable[[str], list[str]]:
    """Possible names of a weight of `Florence2Model`: Microsoft's first, then transformers'."""
    return lambda key: [prefix + original_florence_name(key), prefix + key, f"{prefix}model.{key}"]


def encoder_names(key: str) -> list[str]:
    """Possible names of a weight of `VLVModel` in stage 1."""
    part, _, rest = key.partition(".")
    if part == "image_encoder":
        return _florence_names("model.")(rest)
    if part == "text_encoder":
        return [f"text_encoder.text_model.{rest}", key]
    return [key.replace("query_tokens", "query_embed").replace("projector.linear_1", "language_proj.0")
            .replace("projector.linear_2", "language_proj.2")]  # fmt: skip


def captioner_names(key: str) -> list[str]:
    """Possible names of a weight of `VLVForConditionalGeneration` in stage 2."""
    part, _, rest = key.partition(".")
    if part == "model":
        return ["VLV_model." + name for name in encoder_names(rest)]
    if part == "language_model":
        return ["qwen2_model." + rest]
    return [
        key.replace("language_projection.linear_1", "mlp.layers.0").replace(
            "language_projection.linear_2", "mlp.layers.2"
        )
    ]


# --- weights ---------------------------------------------------------------------------------------------------------


def _load_weights(
    model: Any, config: Any, names: Callable[[str], list[str]], weights: dict[str, torch.Tensor], source: str
) -> Any:
    """A model with the weights of a checkpoint. Weights that are used are removed from `weights`.

    Args:
        model: A model on the meta device, or a model class with its `config`.
        names: Possible names in the checkpoint of a weight of the model.
        source: The checkpoint, for error messages.

    Raises:
        ValueError: If a weight is missing or of another shape, or if weights that the model ties differ.
    """
    if config is not None:
        with torch.device("meta"):
            model = model(config)
    expected: dict[str, torch.Tensor] = model.state_dict()
    found: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    missing: list[str] = []
    for key, target in expected.items():
        candidates = names(key)
        name = next((n for n in candidates if n in weights), None)
        if name is None:
            if key not in ties:
                missing.append(f"{candidates[0]} {tuple(target.shape)}")
            continue
        tensor = weights.pop(name)
        shape = tuple(tensor.shape)
        if name.endswith("image_projection"):  # a bare matrix (vision, d_model), applied as x @ P
            tensor, shape = tensor.T, shape[::-1]
        if shape != tuple(target.shape):
            raise ValueError(
                f"{source}: {name} has the shape {tuple(tensor.shape)}, expected {tuple(target.shape)}; do the "
                "given folders belong to another model?"
            )
        found[key] = tensor
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights: {', '.join(missing[:5])}{', ...' if missing[5:] else ''}; is it "
            "the right kind of checkpoint, and complete?"
        )
    for alias, key in ties.items():
        if alias in found and not torch.equal(found[alias], found[key]):
            raise ValueError(
                f"{source}: {names(alias)[0]} and {names(key)[0]} are one weight in this model, but differ here"
            )
        found[alias] = found[key]
    model.load_state_dict(found, strict=True, assign=True)
    return model.eval()


def _dropped_weights(weights: dict[str, torch.Tensor], source: str) -> dict[str, str]:
    """The reason for each unused weight. Raises `ValueError` for a weight that `DROPPED` does not list."""
    reasons, unknown = {}, []
    for name in weights:
        reason = next((why for pattern, why in DROPPED.items() if re.search(pattern, name)), None)
        if reason is None:
            unknown.append(f"{name} {tuple(weights[name].shape)}")
        else:
            reasons[name] = reason
    if unknown:
        raise ValueError(
            f"{source} holds {len(unknown)} unknown weights: {', '.join(unknown[:5])}"
            f"{', ...' if unknown[5:] else ''}; was it trained with the models in the given folders?"
        )
    return reasons


def _empty_unet_and_vae(stable_diffusion: Path) -> tuple[nn.Module, nn.Module]:
    """UNet and autoencoder on the meta device, without weights."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(
            diffusers.UNet2DConditionModel.load_config(stable_diffusion, subfolder="unet", local_files_only=True)
        )
        vae = diffusers.AutoencoderKL.from_config(
            diffusers.AutoencoderKL.load_config(stable_diffusion, subfolder="vae", local_files_only=True)
        )
    return unet, vae


# --- configurations --------------------------------------------------------------------------------------------------


def build_config(
    weights: dict[str, torch.Tensor],
    prefix: str,
    florence: Path,
    stable_diffusion: Path,
    language_model: Path | None = None,
) -> VLVConfig:
    """The configuration of a checkpoint, from those of its pretrained parts and the sizes of its weights.

    Args:
        prefix: What precedes stage 1's weight names: `"VLV_model."` in stage 2, else nothing.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    queries = shapes.get(prefix + "query_embed")
    if queries is None:
        kind, other, option = ("stage 2", "", "--stage1") if prefix else ("stage 1", "VLV_model.", "--stage2")
        hint = f"; it looks like the other stage's; pass it as {option}" if other + "query_embed" in shapes else ""
        raise ValueError(
            f"there is no {prefix}query_embed among its weights ({', '.join(list(shapes)[:3])}, ...): this is not a "
            f"{kind} checkpoint of the authors' code{hint}"
        )
    if len(queries) != 3:
        raise ValueError(f"{prefix}query_embed has the shape {queries}, expected (1, query tokens, width)")
    image_encoder_config = build_florence_config(florence, shapes, prefix + "model.")
    text_encoder_config = CLIPTextConfig.from_pretrained(stable_diffusion, subfolder="text_encoder")
    text_config = None
    if language_model is not None:
        read_json(language_model / "config.json", "model_type")
        text_config = AutoConfig.from_pretrained(language_model, trust_remote_code=False)
        if type(text_config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(
                f"{language_model} holds a model of type {text_config.model_type!r}; expected a causal language model "
                "such as Qwen2"
            )
        if embedding_shape := shapes.get("qwen2_model.model.embed_tokens.weight"):
            text_config.vocab_size = embedding_shape[0]
    return VLVConfig(
        image_encoder_config=image_encoder_config,
        text_encoder_config=text_encoder_config,
        text_config=text_config,
        num_query_tokens=queries[1],
        task_prompt_ids=task_prompt_ids(florence, image_encoder_config.text_config.vocab_size),
    )


def build_florence_config(folder: Path, shapes: dict[str, tuple[int, ...]], prefix: str) -> Florence2Config:
    """Florence-2's configuration, from a folder in Microsoft's or transformers' format.

    The sizes of vocabulary and position tables come from the weights: Florence-2 has 1024 or 4096 positions.

    Args:
        shapes: Shape of each weight, by name.
        prefix: What precedes Florence-2's names among them.
    """
    values = read_json(folder / "config.json", "vision_config", "text_config")
    vision, text = dict(values.get("vision_config") or {}), dict(values.get("text_config") or {})
    if "dim_embed" in vision:
        _check_vision(vision, folder)
        vision["embed_dim"] = vision.pop("dim_embed")
        vision.pop("model_type", None)
        for name in ("visual_temporal_embedding", "image_pos_embed", "image_feature_source", "enable_checkpoint"):
            vision.pop(name, None)
        text = {key: text[key] for key in BART_FIELDS if key in text}
        text["decoder_start_token_id"] = text.get("decoder_start_token_id", text.get("eos_token_id", 2))

    def rows(*names: str) -> int | None:
        return next((shapes[prefix + name][0] for name in names if prefix + name in shapes), None)

    text["model_type"] = "bart"
    inner = ("language_model.model.", "language_model.", "model.language_model.")
    sizes = {
        "vocab_size": rows(*(name + "shared.weight" for name in inner)),
        "max_position_embeddings": rows(*(name + "encoder.embed_positions.weight" for name in inner)),
    }
    if sizes["max_position_embeddings"] is not None:
        sizes["max_position_embeddings"] -= 2  # BART never uses the first two rows
    text |= {key: size for key, size in sizes.items() if size is not None}
    projector = ("", "multi_modal_projector.", "model.multi_modal_projector.")
    sizes = {
        "max_position_embeddings": rows(*(p + n for p in projector for n in POSITION_TABLES)),
        "max_temporal_embeddings": rows(*(p + "visual_temporal_embed.pos_idx_to_embed" for p in projector)),
    }
    vision |= {key: size for key, size in sizes.items() if size is not None}
    return Florence2Config(vision_config=vision, text_config=text)


BART_FIELDS = (
    "vocab_size",
    "activation_dropout",
    "activation_function",
    "attention_dropout",
    "bos_token_id",
    "d_model",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "decoder_layerdrop",
    "decoder_layers",
    "decoder_start_token_id",
    "dropout",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layerdrop",
    "encoder_layers",
    "eos_token_id",
    "init_std",
    "max_position_embeddings",
    "pad_token_id",
    "scale_embedding",
)
POSITION_TABLES = ("image_pos_embed.row_embeddings.weight", "image_position_embed.row_embeddings.weight")


def _check_vision(vision: dict[str, Any], folder: Path) -> None:
    """Raises `ValueError` for settings of Microsoft's Florence-2 that transformers' Florence-2 does not support."""
    asked = {
        "image_feature_source": (vision.get("image_feature_source"), ["spatial_avg_pool", "temporal_avg_pool"]),
        "visual_temporal_embedding": ((vision.get("visual_temporal_embedding") or {}).get("type"), "COSINE"),
        "image_pos_embed": ((vision.get("image_pos_embed") or {}).get("type"), "learned_abs_2d"),
    }
    for name, (value, known) in asked.items():
        if value != known:
            raise ValueError(
                f"{folder / 'config.json'}: vision_config.{name} is {value!r}; only {known!r} is supported"
            )


def task_prompt_ids(florence: Path, vocab_size: int) -> list[int]:
    """The ids of Florence-2's task prompt, with begin and end tokens, by the tokenizer in its folder.

    Raises:
        FileNotFoundError: If there is no tokenizer, and it is not Florence-2's own vocabulary, whose ids are known.
    """
    if (florence / "tokenizer.json").is_file():
        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(florence / "tokenizer.json"))(TASK_PROMPT).input_ids
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ValueError(f"{florence / 'tokenizer.json'} could not be read; is it complete? {error}") from error
    if vocab_size >= 51289:  # Florence-2's own, base and large
        return FLORENCE_TASK_PROMPT_IDS
    return load_tokenizer(florence)(TASK_PROMPT).input_ids


def build_image_processor(florence: Path, image_size: int) -> VLVImageProcessor:
    """The authors' preprocessing: a crop to a square of `image_size` pixels, then Florence-2's preprocessor."""
    values = read_json(florence / "preprocessor_config.json", "size", "image_mean", "image_std")
    settings = {key: values[key] for key in ("size", "image_mean", "image_std", "resample") if key in values}
    return VLVImageProcessor(pre_crop_size=image_size, **settings)


def _image_size(stable_diffusion: Path, asked: int | None) -> int:
    unet = read_json(stable_diffusion / "unet" / "config.json")
    vae = read_json(stable_diffusion / "vae" / "config.json", "block_out_channels")
    scale = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels on a side per latent
    if asked is not None:
        if asked % scale:
            raise ValueError(f"the image size (--image-size) is {asked}, which is not divisible by {scale}")
        return asked
    size = unet.get("sample_size") or 64
    return min(IMAGE_SIZE, (size if isinstance(size, int) else size[0]) * scale)


def existing_folder(path: str | os.PathLike | None, option: str, hint: str) -> Path:
    """A folder that was passed as the option `--option`.

    Raises:
        ValueError: If `path` is None. The message is `hint`.
        FileNotFoundError: If there is no such folder.
    """
    if path is None:
        raise ValueError(hint)
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"--{option} {folder}: there is no such folder")
    return folder
