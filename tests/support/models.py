"""Small random models of transformers as folders, and archives of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY, WIDTH, INNER = 256, 128, 160
TEXT = "".join(chr(97 + i * i % 26) + " " * (i % 5 == 0) for i in range(400))


def llama(**other: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | other))


def gpt2(**other: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings | other))


def bert(**other: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    return transformers.BertForMaskedLM(transformers.BertConfig(**settings | other))


def t5(**other: Any) -> Any:
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_ff": INNER,
        "d_kv": 64,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings | other))


def gemma(**other: Any) -> Any:
    """Its embedding is a class of its own, and tied to a plain output layer."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings | other))


KINDS = {
    "llama": llama,
    "llama-untied": lambda: llama(tie_word_embeddings=False),
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False),
    "bert": bert,
    "t5": t5,
    "gemma": gemma,
    "t5-untied": lambda: t5(tie_word_embeddings=False),
}


def tokenizer(begin: bool = False) -> Any:
    """One token for every byte, with `begin` "!" in front of every text, as begin-of-text is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if begin:
        made.post_processor = processors.TemplateProcessing(single="! $0", special_tokens=[("!", alphabet.index("!"))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def write(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Save a model and a tokenizer; returns the model as transformers loads it."""
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return type(model).from_pretrained(folder)


def inputs(model: Any, length: int = 12) -> dict[str, torch.Tensor]:
    """Two sequences of tokens for a forward pass."""
    ids = torch.arange(2 * length).reshape(2, length) * 7 % VOCABULARY
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


def logits(model: Any) -> torch.Tensor:
    """Of `inputs`."""
    with torch.no_grad():
        return model(**inputs(model)).logits
