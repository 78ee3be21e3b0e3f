"""Folders of tiny models that read pictures and sounds, with their processors."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import calibrate_bar
from support.models import tokenizer

SMALL = calibrate_bar.Sizes(width=128, layers=1, image=32, small=True)
PICTURES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def write(kind: str, folder: Path) -> Any:
    """Save a model with its processor; returns it."""
    torch.manual_seed(0)
    model = llava() if kind == "llava" else calibrate_bar.MODELS[kind](SMALL)[0]
    model.save_pretrained(folder)
    words = tokenizer()
    words.pad_token, words.model_max_length = "!", 32
    if kind == "vit":
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    elif kind == "whisper":
        processor = transformers.WhisperFeatureExtractor(chunk_length=2)
    elif kind == "clip":
        processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**PICTURES), words)
    else:
        words.add_special_tokens({"additional_special_tokens": ["<image>"]})
        how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor = transformers.LlavaProcessor(transformers.CLIPImageProcessor(**PICTURES), words, **how)
    processor.save_pretrained(folder)
    return model


def llava() -> Any:
    tower = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=8, **tower),
        text_config=transformers.LlamaConfig(vocab_size=300, max_position_embeddings=64, **tower),
        image_token_index=256,
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config)


def media(folder: Path) -> None:
    """Three pictures in images/, two sounds in audio/, and pairs.jsonl."""
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    lines = []
    for name in ("images", "audio"):
        (folder / name).mkdir()
    for i, field in enumerate(calibrate_bar.fields(3, 3, 40, g)):
        pixels = (field * 50 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        lines.append(json.dumps({"image": f"images/{i}.png", "text": f"picture {i}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    for i, x in enumerate(calibrate_bar.sounds(2, 8000, g)):
        write_wav(folder / f"audio/{i}.wav", x[:, None] / np.abs(x).max(), 22050)


def write_wav(path: Path, x: np.ndarray, rate: int, width: int = 2) -> None:
    """Samples (n, channels) in -1..1 as integers of `width` bytes."""
    whole = (x * (2.0 ** (8 * width - 1) - 1)).round().astype("<i4")
    data = (whole + 128).astype(np.uint8) if width == 1 else whole[..., None].view(np.uint8)[..., :width]
    with wave.open(str(path), "wb") as f:
        f.setnchannels(x.shape[1])
        f.setsampwidth(width)
        f.setframerate(rate)
        f.writeframes(np.ascontiguousarray(data).tobytes())
