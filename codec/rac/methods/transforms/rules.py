"""Where the parts of an architecture are that a transform must know: one literal table, and a model's own parts.

What is not in the table is not transformed. A model of the table must consist of exactly the parts that its rules name:
a transform that misses one would change what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rac.errors import TransformError
from rac.linalg.transform import Transform


@dataclass(frozen=True, slots=True)
class Rules:
    """Paths of modules in a layer of an architecture, a decoder that adds attention and MLP to a residual stream."""

    attention_norm: str = "input_layernorm"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """The last rows of the last one are the values: all of them, or those behind queries and keys."""
    attention_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The last rows of the last one are what the gate multiplies."""
    mlp_out: str = "mlp.down_proj"
    of_heads: tuple[str, ...] = ()
    """Norms of queries and keys, which no transform touches."""
    behind: tuple[str, ...] = ()
    """Norms between an output projection and the residual stream: their gains stand in its coordinates."""
    unit: float = 0.0
    """The gain of a norm is this and its weight."""


_OF_HEADS = ("self_attn.q_norm", "self_attn.k_norm")
_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
RULES = {
    "llama": Rules(),
    "mistral": Rules(),
    "qwen2": Rules(),
    "qwen3": Rules(of_heads=_OF_HEADS),
    "smollm3": Rules(),
    "gemma": Rules(unit=1.0),
    "gemma2": Rules(mlp_norm="pre_feedforward_layernorm", behind=_BEHIND, unit=1.0),
    "gemma3_text": Rules(mlp_norm="pre_feedforward_layernorm", of_heads=_OF_HEADS, behind=_BEHIND, unit=1.0),
    "phi3": Rules(attention_in=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
}
"""By `model_type`. All have `model.embed_tokens`, `model.layers`, `model.norm` and `lm_head`."""
INSTEAD = "the aligned recipe (the default) takes any model, rtn and gptq those whose layers are stored (out, in)"


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a linear layer."""

    layer: Any
    start: int

    @property
    def weight(self) -> Any:
        """A view (rows, in)."""
        return self.layer.weight.data[self.start :]

    @property
    def bias(self) -> Any:
        """A view (rows,), or None."""
        return None if self.layer.bias is None else self.layer.bias.data[self.start :]


@dataclass(frozen=True, slots=True)
class Layer:
    """The parts of one layer; of a norm and of a linear layer the modules."""

    name: str
    attention_norm: Any
    attention_in: tuple[Any, ...]
    value: Rows
    attention_out: Any
    mlp_norm: Any
    mlp_in: tuple[Any, ...]
    up: Rows
    mlp_out: Any


@dataclass(slots=True)
class Parts:
    """A model that is being transformed, in place, and what has been done to it."""

    model: Any
    rules: Rules
    embedding: Any
    layers: list[Layer]
    norm: Any
    head: Any
    heads: int
    kv_heads: int
    head_dim: int
    online: dict[str, Transform] = field(default_factory=dict)
    """What layers do to their inputs, by the names of their weights; the model does it, too."""
    notes: list[str] = field(default_factory=list)
    """What was done, for people."""
    about: dict[str, Any] = field(default_factory=dict)
    """What was done, for the provenance of a file (`settings` of `pack_source`): "transforms", names of functions with
    what they were given, and whatever a method adds."""
    deviation: float | None = None
    """Largest difference of logits from the original model's, over the largest logit; None: not measured since the last
    transform (`require_same`)."""

    def did(self, what: str, note: str = "") -> None:
        """Take down that something was done, and for people what."""
        self.deviation = None
        self.about.setdefault("transforms", []).append(what)
        if note:
            self.notes.append(note)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.embedding.weight.shape[1])

    @property
    def inner(self) -> int:
        """Inputs of the second half of an MLP."""
        return int(self.layers[0].mlp_out.in_features)

    def gain(self, norm: Any) -> Any:
        """(n,) float64, what a norm multiplies by."""
        return norm.weight.data.double() + self.rules.unit

    def set_gain(self, norm: Any, gain: Any) -> None:
        """Let a norm multiply by `gain` (n,)."""
        norm.weight.data.copy_(gain - self.rules.unit)


def parts(model: Any) -> Parts:
    """The parts of a causal language model of transformers, in float32 or float64.

    TransformError, which says what is lacking and what works instead, where there are no rules for its architecture, or
    it is not what they say.
    """
    config = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    rules = RULES.get(kind)
    if rules is None or not hasattr(model, "lm_head"):
        raise TransformError(f"no rules for the architecture {kind!r}: {_lacking(model)}; {INSTEAD}")
    if narrow := [n for n, p in model.named_parameters() if str(p.dtype) not in ("torch.float32", "torch.float64")]:
        raise TransformError(f"transforms need a model in float32; {narrow[0]!r} is not")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    ends = ("model.embed_tokens", "model.norm", "lm_head")
    known = set(ends)
    try:
        embedding, norm, head = map(model.get_submodule, ends)
        every = range(len(model.model.layers))
        layers = [_layer(model, f"model.layers.{i}", rules, kv_heads * width, known) for i in every]
    except AttributeError as e:
        raise TransformError(f"{kind!r} is not what its rules say: {e}; {INSTEAD}") from e
    if strange := [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in known]:
        raise TransformError(f"the rules of {kind!r} do not know {strange[0]!r}; {INSTEAD}")
    for layer in layers:
        if (layer.attention_out.in_features, len(layer.value.weight)) != (heads * width, kv_heads * width):
            raise TransformError(f"{layer.name}: values and output projection are not of {heads} heads")
    if not layers:
        raise TransformError("the model has no layers")
    return Parts(model, rules, embedding, layers, norm, head, heads, kv_heads, width)


def _lacking(model: Any) -> str:
    """Why rules could not be as simple as those of the table."""
    kinds = {type(m).__name__ for m in model.modules()}
    why = {
        "LayerNorm subtracts a mean and adds a bias, which a rotation does not keep": r".*LayerNorm",
        "weights of Conv1D are stored (in, out)": "Conv1D",
        "experts share their norm": r".*(Experts|SparseMoe).*",
    }
    found = [text for text, kind in why.items() if any(re.fullmatch(kind, k) for k in kinds)]
    return "; ".join(found) or "nobody has said where its norms and projections are"


def _layer(model: Any, name: str, rules: Rules, values: int, known: set[str]) -> Layer:
    """One layer, whose values are so many; the names of its modules are added to `known`."""

    def take(path: str, what: str, fits: Callable[[Any], bool]) -> Any:
        module = model.get_submodule(f"{name}.{path}")
        if not fits(module):
            raise TransformError(f"{name}.{path} is a {type(module).__name__}, no {what}; {INSTEAD}")
        known.add(f"{name}.{path}")
        return module

    def linear(path: str) -> Any:
        return take(path, "linear layer", lambda m: type(m).__name__ == "Linear")

    def norm(path: str) -> Any:
        plain = "RMSNorm without a bias"
        return take(path, plain, lambda m: type(m).__name__.endswith("RMSNorm") and getattr(m, "bias", None) is None)

    for path in (*rules.of_heads, *rules.behind):
        norm(path)
    into, mlp = tuple(map(linear, rules.attention_in)), tuple(map(linear, rules.mlp_in))
    out, down = linear(rules.attention_out), linear(rules.mlp_out)
    value = Rows(into[-1], into[-1].out_features - values)
    up = Rows(mlp[-1], mlp[-1].out_features - down.in_features)
    return Layer(name, norm(rules.attention_norm), into, value, out, norm(rules.mlp_norm), mlp, up, down)
