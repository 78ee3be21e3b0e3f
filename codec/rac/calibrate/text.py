"""The tokens to calibrate on: of a text, or written by the model itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.folder import Folder
from rac.errors import SourceError
from rac.models.predictions import around, split

LEAST = 128  # tokens of the shortest sequence that is made of a text that is shorter than a sequence should be
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tekken.json",
    "sentencepiece.bpe.model",
)
"""Files that a folder with a tokenizer has one of."""
Note = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is (0: what is said is not progress)."""
SEED = 0  # seed of the text that a model writes, and of labels
PIECE = 256  # tokens that a model writes in one go: longer texts cost more for each token, and stray further
_CACHE_BYTES = 1 << 31  # memory for the keys and values of the sequences that are written at once
_KEPT = ("cache", "past_key_values", "cache_params")
"""What models, and versions of transformers, call the keys and values of the tokens so far."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text, and how its tokenizer makes sequences."""

    ids: NDArray[np.int64]  # (n,) without what is put in front
    longest: int  # the longest sequence that the tokenizer makes
    around: tuple[list[int], list[int]]  # ids that it puts in front of each, and behind it

    @property
    def front(self) -> list[int]:
        """What it puts in front of a text behind which it puts nothing."""
        return [] if self.around[1] else self.around[0]

    def beside(self, causal: bool) -> tuple[list[int], list[int]]:
        """What comes before and behind each sequence of a model: of a causal one nothing does that ends a text."""
        return (self.front, []) if causal else self.around


def text_ids(path: str, text: str, tokens: int) -> Tokens:
    """The first `tokens` token ids of the text, by the tokenizer in folder `path`; SourceError where that fails."""
    import transformers

    without = "`--calibrate none` works without a tokenizer"
    if not any(os.path.exists(os.path.join(path, name)) for name in TOKENIZERS):
        raise SourceError(f"no tokenizer.json there (nor {', '.join(TOKENIZERS[1:])}); {without}", file=path)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # whatever a damaged file makes of it
        if "trust_remote_code" in str(e):
            raise SourceError(
                f"the tokenizer needs code of its own, which is not run here; {without}", file=path
            ) from e
        raise SourceError(f"the tokenizer cannot be loaded: {e}; {without}", file=path) from e
    ids: list[int] = []
    try:
        beside = around(tokenizer)
        for part in (text[: 32 * tokens], text):  # no need to read a long text to its end
            ids = tokenizer(part, add_special_tokens=False, verbose=False).input_ids[:tokens]
            if len(ids) == tokens or len(part) == len(text):
                break
    except Exception as e:  # the library of tokenizers has no other
        raise SourceError(f"the tokenizer cannot take the text: {e}; {without}", file=path) from e
    return Tokens(np.asarray(ids, np.int64), int(min(tokenizer.model_max_length, 1 << 40)), beside)


def sequences(
    ids: NDArray[np.int64], tokens: int, context: int, front: Sequence[int] = (), behind: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Whole sequences (count, context), each with `front` and `behind` around its ids; a shorter one of a short text.

    SourceError where that is too short.
    """
    context = min(context, tokens)
    if len(ids) < (least := min(LEAST, context)):
        raise SourceError(f"the calibration text has {len(ids)} tokens, at least {least} are needed")
    context = min(context, len(front) + len(ids) + len(behind))
    return split(ids, context, front, behind)[: max(1, tokens // context)]


def self_text_ids(model: Any, tokens: int, context: int, folder: Folder, note: Note) -> NDArray[np.int64]:
    """Token ids (count, context) that a causal language model has drawn from its own predictions, at temperature 1.

    A sequence is several pieces; each begins with the begin-of-text token, or the end-of-text or padding one where
    there is none, and an end of text inside it is followed by whatever the model writes next. Finished batches are kept
    in the folder. Leaving out unlikely tokens makes a text that reads better and a worse calibration: see
    docs/experiments.md.
    """
    import torch

    config = model.config.get_text_config()
    first = next((t for t in (config.bos_token_id, config.eos_token_id, config.pad_token_id) if t is not None), None)
    if first is None:
        raise SourceError("the model has no begin-of-text, end-of-text or padding token to begin its own text with")
    context = min(context, tokens)
    pieces = -(-context // PIECE)
    piece = -(-context // pieces)
    count = tokens // context * pieces
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * piece * config.num_hidden_layers * heads * width * model.dtype.itemsize
    batch = max(1, min(count, _CACHE_BYTES // each))
    parts = []
    for number, start in enumerate(range(0, count, batch)):
        name, rows = f"own-{number:03}.npy", min(batch, count - start)
        if name not in folder:
            generator = torch.Generator().manual_seed(SEED + number)
            ids = torch.full((rows, piece), first[0] if isinstance(first, list) else first, dtype=torch.int64)
            kept: dict[str, Any] = {}
            with torch.no_grad():
                for i in range(1, piece):
                    out = model(input_ids=ids[:, i - 1 : i] if kept else ids[:, :i], use_cache=True, **kept)
                    kept = next(({k: out[k]} for k in _KEPT if k in out), {})
                    chances = torch.softmax(out.logits[:, -1].float(), -1)
                    ids[:, i] = draw(chances, torch.rand(rows, 1, generator=generator))
                    if i % 16 == 0:
                        note("writing its own text", start * piece + rows * i, count * piece)
            folder.put(name, ids.numpy())
            folder.commit()
        parts.append(folder.array(name))
        note("writing its own text", (start + rows) * piece, count * piece)
    return np.concatenate(parts).reshape(-1, pieces * piece)[:, :context]


def draw(probabilities: Any, at: Any) -> Any:
    """One index of each row of probabilities (rows, n), at `at` (rows, 1); much faster than torch.multinomial."""
    return (probabilities.cumsum(-1) < at).sum(-1).clamp_(max=probabilities.shape[-1] - 1)
