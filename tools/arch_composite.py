"""Tiny configurations and inputs of models that are made of several: text, vision, sound and what lies between them.

tools/arch_matrix.py takes them through its cells. A configuration is made small by the table of names there, and so is
each one inside it; what a model needs besides stands here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

IMAGE, VIDEO, AUDIO = 290, 291, 292
"""Tokens in whose places a model puts what it sees and hears."""
IDS = torch.arange(24).reshape(1, 24) * 7 % 250 + 3
KINDS = (
    *("aimv2", "altclip", "aya_vision", "blip", "bridgetower", "canine", "chinese_clip", "clip", "clipseg", "deberta"),
    *("dinov2_with_registers", "dinov3_vit", "dpr", "exaone4_5", "flava", "got_ocr2", "groupvit", "internvl"),
    *("jina_embeddings_v3", "layoutlm", "llava", "metaclip_2", "mobilevit", "moonshine", "owlvit", "owlv2", "ovis2"),
    *("paligemma", "pixtral", "siglip", "t5gemma", "tapas", "video_llava", "vilt", "vision-text-dual-encoder"),
    *("visual_bert", "vision-encoder-decoder", "markuplm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    *("qwen3_5", "glm4v", "glm4v_moe", "gemma3", "idefics2", "idefics3", "smolvlm", "blip-2", "instructblip", "mllama"),
    *("llava_next", "llava_onevision", "mistral3", "lfm2_vl", "detr", "table-transformer", "conditional_detr"),
    *("deformable_detr", "swin", "swinv2", "convnext", "resnet", "encodec", "dac", "clap", "vits", "musicgen"),
    *("speecht5", "xlnet", "videomae", "audio-spectrogram-transformer", "yolos", "florence2", "kosmos-2", "sam"),
    *("lxmert", "mimi", "timesformer", "vivit", "xclip", "wav2vec2-bert", "speech_to_text", "siglip2", "qwen2_audio"),
    *("voxtral", "funnel", "luke", "pvt", "focalnet", "fsmt", "fnet", "data2vec-audio", "ibert", "splinter"),
    *("swiftformer", "hyperclovax_vision_v2", "evolla", "clvp", "qwen3_5_moe", "imagegpt", "mobilenet_v2", "sew"),
    *("unispeech", "wav2vec2-conformer", "ijepa", "vit_msn", "vitdet", "convbert", "flaubert", "pegasus_x", "gte"),
)
"""Names of architectures."""
SMALL: dict[str, Any] = {
    **dict.fromkeys(("image_token_id", "image_token_index", "media_placeholder_token_id"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), AUDIO),
    "vision_start_token_id": 293,
    "vision_end_token_id": 294,
    "boi_token_index": 295,
    "eoi_token_index": 296,
    "projection_dim": 128,
    "out_hidden_size": 128,
    "d_ff": 192,
    "num_channels": 3,
}
"""What makes a configuration small beside what arch_matrix.SMALL names."""
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage2"],
}
_DETR = {"backbone_config": _RESNET, "use_timm_backbone": False, "use_pretrained_backbone": False, "num_queries": 8}
_SWIN = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
_ENCODEC = {"num_filters": 8, "hidden_size": 32, "upsampling_ratios": [4, 2], "codebook_size": 64, "codebook_dim": 32}
_VITS = {
    "flow_size": 32,
    "spectrogram_bins": 33,
    "upsample_initial_channel": 32,
    "upsample_rates": [4, 4],
    "upsample_kernel_sizes": [8, 8],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "posterior_encoder_num_wavenet_layers": 2,
    "prior_encoder_num_wavenet_layers": 2,
}
_CLAP_AUDIO = {
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "patch_embeds_hidden_size": 64,
    "hidden_size": 128,
    "spec_size": 64,
    "num_mel_bins": 16,
    "patch_size": 4,
    "window_size": 4,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections]}}


PARTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"vision_config": {"embed_dim": 128, "hidden_size": 128}, "text_config": _mrope(4, 6, 6)},
    "qwen2_5_vl": {"text_config": _mrope(4, 6, 6)},
    "glm4v": {"text_config": _mrope(4, 6, 6)},
    "glm4v_moe": {"text_config": _mrope(2, 3, 3)},
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 256,
            "num_global_layers": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "blip-2": {"image_token_index": IMAGE, "num_query_tokens": 4},
    "instructblip": {"image_token_index": IMAGE, "num_query_tokens": 4},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "kosmos-2": {"latent_query_num": 4},
    "florence2": {
        "vision_config": {
            "embed_dim": [32, 64],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "window_size": 4,
            "projection_dim": 128,
        },
    },
    "sam": {
        "vision_config": {"output_channels": 128, "num_pos_feats": 64},
        "prompt_encoder_config": {"hidden_size": 128, "image_size": 32, "patch_size": 8},
        "mask_decoder_config": {"hidden_size": 128, "mlp_dim": 128, "iou_head_hidden_dim": 128},
    },
    "maskformer-swin": _SWIN,
    "lxmert": {"visual_feat_dim": 64, "l_layers": 1, "x_layers": 1, "r_layers": 1},
    "voxtral": {"audio_token_id": AUDIO, "audio_config": {"intermediate_size": 512}},
    "xclip": {"vision_config": {"mit_hidden_size": 128, "mit_intermediate_size": 192}},
    "funnel": {"block_sizes": [1, 1], "d_model": 128, "n_head": 4, "d_head": 32, "d_inner": 192},
    "luke": {"entity_vocab_size": 32, "entity_emb_size": 64},
    "pvt": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "cvt": {"embed_dim": [16, 32, 64], "depth": [1, 1, 1], "num_heads": [1, 1, 2]},
    "focalnet": {"embed_dim": 32, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "speech_to_text": {"conv_channels": 64},
    "fsmt": {"src_vocab_size": 300, "tgt_vocab_size": 300, "langs": ["en", "de"]},
    "mimi": {
        "num_filters": 8,
        "upsampling_ratios": [4, 2],
        "codebook_size": 64,
        "codebook_dim": 32,
        "vector_quantization_hidden_dimension": 32,
        "upsample_groups": 4,
        "num_quantizers": 4,
    },
    "detr": _DETR,
    "conditional_detr": _DETR,
    "deformable_detr": _DETR,
    "table-transformer": _DETR,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "convnext": {"hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1], "patch_size": 4},
    "resnet": {"embedding_size": 32, "hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1]},
    "encodec": _ENCODEC,
    "dac": {"encoder_hidden_size": 16, "decoder_hidden_size": 64, "downsampling_ratios": [2, 4], "codebook_size": 64},
    "clap": {"audio_config": _CLAP_AUDIO},
    "vits": _VITS,
    "musicgen": {
        "text_encoder": {"model_type": "t5", "vocab_size": 300, "d_model": 128, "d_ff": 192, "num_layers": 2},
        "audio_encoder": {"model_type": "encodec", **_ENCODEC},
        "decoder": {"vocab_size": 64, "hidden_size": 128, "ffn_dim": 192, "num_hidden_layers": 2},
    },
}
"""What an architecture needs besides; a dictionary goes to the configuration of this name inside it."""
CLASSES = {
    "speecht5": "SpeechT5ForTextToSpeech",
    "musicgen": "MusicgenForConditionalGeneration",
    "detr": "DetrForObjectDetection",
    "xlnet": "XLNetLMHeadModel",
}
"""Classes that do more than the plain model of an architecture."""
DTYPES = dict.fromkeys(("xlnet", "deberta", "fnet", "clvp"), torch.float32)
"""Data types other than BF16, where the code of transformers mixes these."""


def kwargs_of(config: Any, table: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that make a configuration like `config`, but small, and those in it too."""
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            found[key] = {"model_type": value.model_type} | kwargs_of(value, table, own.get(key, {}))
        elif key in own:
            found[key] = own[key]
        elif key in table and isinstance(value, int) and not isinstance(value, bool):
            found[key] = table[key]
        elif key == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            found[key] = value | {"mrope_section": [4, 6, 6]}
    return {**{k: v for k, v in own.items() if k not in found}, **found}


def config_of(kind: str, table: Mapping[str, Any]) -> Any:
    """The small configuration of an architecture."""
    make = configuration_auto.CONFIG_MAPPING[kind]
    own = PARTS.get(kind, {})
    try:
        base = make()
    except Exception:
        base = make(**own)
    return make(**kwargs_of(base, {**table, **SMALL}, own))


def class_of(kind: str) -> Any:
    """The class that sees and reads, or the plain model."""
    if kind in CLASSES:
        return getattr(transformers, CLASSES[kind])
    tables = (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, modeling_auto.MODEL_MAPPING_NAMES)
    name = next(t[kind] for t in tables if kind in t)
    return getattr(transformers, name if isinstance(name, str) else name[0])


def ramp(*shape: int) -> torch.Tensor:
    """Numbers from -1 to 1."""
    count = 1
    for n in shape:
        count *= n
    return torch.linspace(-1, 1, count).reshape(shape)


def found_in(config: Any, name: str, default: Any) -> Any:
    """The first value of a name in a configuration or in those inside it."""
    if (value := vars(config).get(name)) is not None:
        return value
    for inner in vars(config).values():
        if isinstance(inner, transformers.PreTrainedConfig) and (got := found_in(inner, name, None)) is not None:
            return got
    return default


def features(model: Any, given: Mapping[str, Any]) -> int:
    """How many tokens an image becomes."""
    with torch.no_grad():
        found = model.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    if isinstance(found, list | tuple):
        found = torch.cat([t.reshape(-1, t.shape[-1]) for t in found])
    return int(found.reshape(-1, found.shape[-1]).shape[0])


def _grid(model: Any) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    width = 3 * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
    return {"pixel_values": ramp(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _tiles(count: int) -> Callable[[Any], dict[str, torch.Tensor]]:
    return lambda _: {"pixel_values": ramp(1, count, 3, 32, 32)}


def _patches(_: Any) -> dict[str, torch.Tensor]:
    mask = torch.ones(1, 16, dtype=torch.long)
    return {"pixel_values": ramp(1, 16, 192), "spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": mask}


HEARD = {"qwen2_audio": 64, "voxtral": 32}
"""How many tokens the sound of `inputs` becomes, by architecture."""
GIVEN: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "idefics2": _tiles(1),
    "idefics3": _tiles(1),
    "smolvlm": _tiles(1),
    "llava_next": lambda _: {"pixel_values": ramp(1, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]])},
    "llava_onevision": lambda _: {"pixel_values": ramp(1, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]])},
    "mistral3": lambda _: {"image_sizes": torch.tensor([[32, 32]])},
    "instructblip": lambda _: {"qformer_input_ids": IDS[:, :8]},
    "clap": lambda _: {"input_features": ramp(1, 1, 64, 16), "is_longer": torch.tensor([[True]])},
    "encodec": lambda _: {"input_values": ramp(1, 1, 4000)},
    "dac": lambda _: {"input_values": ramp(1, 1, 4000)},
    "speecht5": lambda _: {"decoder_input_values": ramp(1, 8, 80)},
    "mimi": lambda _: {"input_values": ramp(1, 1, 4000)},
    "timesformer": _tiles(8),
    "xclip": _tiles(8),
    "vivit": _tiles(32),
    "lxmert": lambda _: {"visual_feats": ramp(1, 4, 64), "visual_pos": ramp(1, 4, 4)},
    "speech_to_text": lambda _: {"input_features": ramp(1, 256, 80)},
    "wav2vec2-bert": lambda _: {"input_features": ramp(1, 256, 160)},
    "siglip2": _patches,
    "kosmos-2": lambda _: {"image_embeds_position_mask": (torch.arange(24)[None] < 4).long()},
    "qwen2_audio": lambda _: {"feature_attention_mask": torch.ones(1, 256, dtype=torch.long)},
    "musicgen": lambda _: {"decoder_input_ids": IDS[:, :8].repeat(4, 1) % 60},
    "videomae": _tiles(16),
    "lfm2_vl": _patches,
    "mllama": lambda _: {
        "pixel_values": ramp(1, 1, 1, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1]]]),
    },
    "audio-spectrogram-transformer": lambda _: {"input_values": ramp(1, 1024, 128)},
}
"""What a forward pass takes in other shapes than `inputs` knows, by architecture."""


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What its forward pass takes, by the names of its arguments."""
    takes, config = inspect.signature(model.forward).parameters, model.config
    out: dict[str, torch.Tensor] = {}
    size = found_in(config, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    if "pixel_values" in takes:
        out["pixel_values"] = ramp(1, found_in(config, "num_channels", 3), size, size)
    if "image_grid_thw" in takes:
        out |= _grid(model)
    if "input_features" in takes:
        out["input_features"] = ramp(1, found_in(config, "num_mel_bins", 80), 256)
    if "input_values" in takes and "input_ids" not in takes:
        out["input_values"] = ramp(1, 4000)
    given = GIVEN.get(config.model_type, lambda _: {})(model)
    out = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in (out | given).items()}
    if "input_ids" in takes:
        out["input_ids"] = ids = _read(model, out)
        if "mm_token_type_ids" in takes and (ids == IMAGE).any():
            out["mm_token_type_ids"] = (ids == IMAGE).long()
        if "token_type_ids" in takes and config.model_type == "gemma3":
            out["token_type_ids"] = (ids == IMAGE).long()
    if "decoder_input_ids" in takes and config.is_encoder_decoder:
        out.setdefault("decoder_input_ids", IDS[:, :8])
    return out


def _read(model: Any, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Token ids, with the places of an image among them where the model wants these."""
    if count := HEARD.get(model.config.model_type, 0):
        return torch.cat([IDS[:, :4], torch.full((1, count), AUDIO), IDS[:, 4:]], 1)
    token = found_in(model.config, "image_token_id", found_in(model.config, "image_token_index", None))
    if "pixel_values" not in seen or token is None or not hasattr(model, "get_image_features"):
        return IDS
    known = inspect.signature(model.get_image_features).parameters
    count = features(model, {k: v for k, v in seen.items() if k in known})
    return torch.cat([IDS[:, :4], torch.full((1, count), token), IDS[:, 4:]], 1)
