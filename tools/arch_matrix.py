"""Every architecture of transformers, tiny and random, through what RAC does with a model folder.

    python tools/arch_matrix.py                     all of them, a table row each
    python tools/arch_matrix.py llama mamba -v      these, and what was said
    python tools/arch_matrix.py --write             the same, and write what was found into docs/architectures.csv
    python tools/arch_matrix.py --cells dense,hf    only these columns, also with --write
    python tools/arch_matrix.py --summary           no run: the tables of docs/compatibility.md; --write puts them there

Columns: `lossless` packs, verifies and unpacks, and compares files; `dense` loads with `rac.load_model` and compares
the output with that of the original, bit for bit; `compressed` the same with layers that stay compressed; `bits` packs
at 4 bits from the weights alone and loads; `calibrated` packs at 4 bits on a text; `hf` writes a folder for
from_pretrained, loads it, and compares. A cell is "ok", or "-" with the line that RAC refuses with; anything else (a
traceback, other numbers) is an error. Exits with 1 where a cell is another than docs/architectures.csv says.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import io
import logging
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers.models.auto import configuration_auto, modeling_auto

import arch_composite
import arch_table
import rac
import rac.runtime
from rac.cli import main as rac_main

CELLS = arch_table.CELLS
VOCABULARY = 300
WIDTH, INNER, LAYERS, HEADS = 128, 192, 2, 4
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size", "emb_dim"),
        WIDTH,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "hidden_dim"), INNER
    ),
    **dict.fromkeys(
        ("ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "v_head_dim", "qk_nope_head_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "type_vocab_size": 2,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
"""What makes a configuration small, by the names that configurations use."""
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "recurrent_gemma": {"lru_width": WIDTH, "block_types": ["recurrent", "attention"]},
    "qwen3_next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
"""What an architecture needs besides, to be small or to run."""
OTHERS = [
    *("albert", "deberta-v2", "distilbert", "mpnet", "t5", "mt5", "umt5", "longt5", "led", "esm", "funnel"),
    *("squeezebert", "mobilebert", "nystromformer", "luke", "longformer", "xmod", "modernbert", "nomic_bert"),
    *("eurobert", "vit", "deit", "beit", "dinov2", "wav2vec2", "hubert", "wavlm", "whisper", "segformer"),
    *("dpt", "vit_mae", "switch_transformers", "m2m_100"),
]
"""Encoders, encoder-decoders, vision and audio models."""
TEXT = " ".join(f"{a} {b} is {a * b}." for a in range(1, 24) for b in range(a, 24))


class Wrong(Exception):
    """Other numbers than those of the original."""


def shrink(config: Any, given: dict[str, Any]) -> Any:
    """Make a configuration, and those in it, small in place."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value, given)
        elif key in given and (not isinstance(value, bool)) and isinstance(value, int | list):
            with contextlib.suppress(Exception):
                setattr(config, key, given[key])
    return config


def config_of(kind: str) -> Any:
    """A small configuration."""
    make = configuration_auto.CONFIG_MAPPING[kind]
    given = SMALL | OVERRIDES.get(kind, {})
    known = vars(make())
    keys = {k: v for k, v in given.items() if k in known and not isinstance(known[k], transformers.PreTrainedConfig)}
    try:
        config = make(**keys)
    except Exception:
        config = make()
    return shrink(config, given)


def class_of(kind: str) -> Any:
    """The causal language model of an architecture, or its plain model."""
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or modeling_auto.MODEL_MAPPING_NAMES[kind]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def model_of(kind: str) -> Any:
    """A tiny model with outlier columns, in BF16, or the type that it runs in."""
    composite = kind in arch_composite.KINDS
    config = arch_composite.config_of(kind, SMALL) if composite else config_of(kind)
    cls = arch_composite.class_of(kind) if composite else class_of(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > 6e6:
        raise RuntimeError(f"{size} weights are too many")
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if composite and (p.ndim == 2 or "gate" in name) and not p.any():
                p.normal_(std=0.1)  # else nothing of what it multiplies is seen in the output
            if p.ndim == 2 and min(p.shape) > 8:
                p[:, [3, p.shape[1] // 2]] *= 6
    return model.to(arch_composite.DTYPES.get(kind, torch.bfloat16))


def tokenizer() -> Any:
    """One token for every byte, behind three special ones."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(token_models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What its forward pass takes."""
    if model.config.model_type in arch_composite.KINDS:
        return arch_composite.inputs(model)
    ids = torch.arange(24).reshape(1, 24) * 7 % 250 + 3
    main, config = getattr(model, "main_input_name", "input_ids"), model.config
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", 32)
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).to(model.dtype)
    found: dict[str, torch.Tensor] = {}
    if main == "pixel_values":
        found["pixel_values"] = (
            image if size == 32 else torch.nn.functional.interpolate(image.float(), (size, size)).to(model.dtype)
        )
    elif main in ("input_features", "input_values"):
        mel = getattr(config, "num_mel_bins", 80)
        found[main] = (
            torch.linspace(-1, 1, mel * 256).reshape(1, mel, 256).to(model.dtype)
            if main == "input_features"
            else torch.linspace(-1, 1, 4000).reshape(1, -1).to(model.dtype)
        )
    else:
        found["input_ids"] = ids
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids[:, :8]
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """All float tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return []


def output(model: Any) -> list[torch.Tensor]:
    """What a model says of its inputs."""
    for p in model.parameters() if model.config.model_type in arch_composite.DTYPES else ():
        p.data = p.data.clone()  # the last bit of a product in float32 depends on where in memory its factors begin
    torch.manual_seed(0)
    with torch.no_grad():
        try:
            found = model(**inputs(model), use_cache=False)
        except TypeError:
            found = model(**inputs(model))
    return tensors(found if not hasattr(found, "to_tuple") else found.to_tuple())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Wrong unless all numbers are equal."""
    if len(a) != len(b) or any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(a, b, strict=True)):
        raise Wrong("another output")


def finite(found: list[torch.Tensor]) -> None:
    """Wrong where an output is no number."""
    if not found or not all(t.isfinite().all() for t in found):
        raise Wrong("the output is not finite")


class Partly(Exception):
    """Done, but for a part that has a word of its own."""


class Refused(Exception):
    """A command that ended with one line."""


def command(*args: str) -> str:
    """Run `rac`; what it printed."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        status = rac_main(list(args))
    if status:
        raise Refused(wrong.getvalue().strip() or f"exit code {status}")
    return said.getvalue() + wrong.getvalue()


class Case:
    """One architecture in a folder."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder, self.source, self.archive = folder, folder / "model", folder / "m.rac"
        self.model = model_of(kind)
        self.model.save_pretrained(self.source)
        tokenizer().save_pretrained(self.source)
        self.model = type(self.model).from_pretrained(self.source, dtype=self.model.dtype).eval()
        self.expected = output(self.model)

    def lossless(self) -> None:
        """Every file comes back."""
        command("pack", str(self.source), "-o", str(self.archive), "--force")
        command("verify", str(self.archive), "--against", str(self.source))
        back = self.folder / "back"
        command("unpack", str(self.archive), "-o", str(back))
        names = sorted(str(p.relative_to(self.source)) for p in self.source.rglob("*") if p.is_file())
        _, mismatch, errors = filecmp.cmpfiles(self.source, back, names, shallow=False)
        if mismatch or errors:
            raise Wrong(f"{(mismatch + errors)[0]} is another file")

    def dense(self) -> None:
        """The model loads as transformers loads it."""
        same(self.expected, output(rac.load_model(self.archive, resident="dense")))

    def compressed(self) -> None:
        """The same numbers from layers that stay compressed."""
        same(self.expected, output(rac.load_model(self.archive, resident="compressed")))

    def bits(self) -> None:
        """4 bits from the weights alone."""
        lossy = str(self.folder / "4.rac")
        command(
            "pack", str(self.source), "-o", lossy, "--bits", "4", "--calibrate", "none", "--force", "--effort", "fast"
        )
        finite(output(rac.load_model(lossy, resident="dense")))

    def calibrated(self) -> None:
        """4 bits on a text."""
        (self.folder / "text.txt").write_text(TEXT)
        lossy, text = str(self.folder / "4c.rac"), str(self.folder / "text.txt")
        said = command(
            *("pack", str(self.source), "-o", lossy, "--bits", "4", "--calibrate", text, "--tokens", "1024"),
            *("--cache", "none", "--force", "--effort", "fast"),
        )
        finite(output(rac.load_model(lossy, resident="dense")))
        if parts := re.findall(r"text does not reach: ([^:]*):", said):
            raise Partly("text does not reach: " + ", ".join(sorted(parts)))

    def hf(self) -> None:
        """A folder for from_pretrained."""
        out = self.folder / "hf"
        command("pack", str(self.archive), "-o", str(out), "--format", "hf", "--force")
        same(self.expected, output(type(self.model).from_pretrained(out, dtype=self.model.dtype).eval()))


def run(what: Callable[[], None], verbose: bool) -> str:
    """What became of a cell."""
    try:
        what()
    except (Refused, rac.RacError) as e:
        line = str(e).splitlines()
        return f"- {line[-1]}" if len(line) == 1 and "Traceback" not in str(e) else f"ERROR {line[-1]}"
    except Partly as e:
        return str(e)
    except Wrong as e:
        return f"WRONG {e}"
    except Exception as e:
        if verbose:
            traceback.print_exc()
        return f"ERROR {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return "ok"


def kinds() -> list[str]:
    """Names of architectures, as transformers has them: all causal language models, OTHERS, and those of several."""
    causal = [*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    others = (k for k in OTHERS if k in modeling_auto.MODEL_MAPPING_NAMES)
    return [*dict.fromkeys([*causal, *others, *arch_composite.KINDS])]


def row(kind: str, verbose: bool, cells: Sequence[str] = CELLS) -> dict[str, str] | None:
    """Cells of an architecture; None where no tiny model of it runs here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            case = Case(kind, Path(folder))
        except Exception as e:
            if verbose:
                traceback.print_exc()
            print(f"{kind}: not made: {type(e).__name__}: {str(e).splitlines()[:1]}", file=sys.stderr)
            return None
        if "lossless" not in cells:  # the others read the archive that it makes
            command("pack", str(case.source), "-o", str(case.archive))
        found = {cell: run(getattr(case, cell), verbose) for cell in cells}
        return {"architecture": kind} | {c: v.replace(folder, "").replace("- rac: ", "- ") for c, v in found.items()}


def main() -> int:
    """Print the table; 1 where a cell is not as stated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types of transformers (default: all that can be made)")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every Nth of them, from the Kth on")
    parser.add_argument("--cells", default=",".join(CELLS), help="columns, with commas between them (default: all)")
    parser.add_argument("--write", action="store_true", help="write what was found into docs/architectures.csv")
    parser.add_argument("--summary", action="store_true", help="print the tables of docs/compatibility.md, run nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="print tracebacks")
    args = parser.parse_args()
    if args.summary:
        print(arch_table.summary(arch_table.stated()), end="")
        if args.write:
            arch_table.write_page()
        return 0
    cells = [c for c in CELLS if c in args.cells.split(",")]
    if unknown := set(args.cells.split(",")) - set(CELLS):
        parser.error(f"--cells: no column {sorted(unknown)[0]!r}; there are {', '.join(CELLS)}")
    quiet()
    k, n = map(int, args.part.split("/"))
    found, start = {}, time.time()
    for kind in (args.kinds or kinds())[k - 1 :: n]:
        if (made := row(kind, args.verbose, cells)) is None:
            continue
        found[kind] = made
        print(f"{kind:<24} " + " | ".join(made[c][:60] for c in cells), flush=True)
    whole = sum(all(made[c] == "ok" for c in cells) for made in found.values())
    print(f"{len(found)} architectures, {whole} of them ok in all of these cells, {time.time() - start:.0f} s")
    known = arch_table.stated()  # now: another part may have written in the meantime
    merged = {kind: known.get(kind, dict.fromkeys(CELLS, "")) | made for kind, made in found.items()}
    if args.write:
        arch_table.write(known | merged)
        return 0
    wrong = [kind for kind in found if merged[kind] != known.get(kind)]
    print("not as stated: " + (", ".join(wrong) or "none"))
    return int(bool(wrong))


def quiet() -> None:
    """No warnings, logs or progress of the libraries, and no network."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"


if __name__ == "__main__":
    sys.exit(main())
