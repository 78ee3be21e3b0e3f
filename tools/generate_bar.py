"""The bars of `rac generate` on a CPU: tokens per second of one archive dense, as codes and compressed, and of peers.

    rac pack SMOLLM2 -o 3bit.rac --bits 3 --calibrate none --no-embeddings
    python -m venv llama && llama/bin/pip install llama-cpp-python
    python tools/generate_bar.py --gguf F16.gguf --quantised Q4_K.gguf --llama llama/bin/python
    python tools/generate_bar.py 3bit.rac --folder SMOLLM2 --quantised Q4_K.gguf --llama llama/bin/python --kl TEXT

Every model runs in a process of its own, all of them in turns; a process loads, writes a few tokens, and then as
many as asked for, three times or for some seconds. The median of all is what counts, and only ratios within a run
mean anything. `--through` names a command that runs each process, where the machine must be made quiet for it. With
`--kl` follow the KL divergences of dense BF16 and of codes to the dense model in float32, as they run, in windows of
the text; `--only` with no names leaves these alone. Exit code 1 where a bar that must hold does not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPT = "The history of the printing press begins"
KINDS = {
    "transformers, BF16": ("folder", "bfloat16"),
    "transformers, F32": ("folder", "float32"),
    "dense, BF16": ("dense", "bfloat16"),
    "dense, F32": ("dense", "float32"),
    "codes": ("codes", "float32"),
    "compressed": ("compressed", "bfloat16"),
    "llama.cpp, Q4_K": ("llama", ""),
}
REPEATS, ENOUGH = 3, 4.0
MOST = 1e-4
"""KL divergence of codes, at most."""


def model_of(path: str, how: str, dtype: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, how it runs): of a folder by transformers, of an archive as `rac generate` has it."""
    import torch
    import transformers

    if how == "folder":
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return model, transformers.AutoTokenizer.from_pretrained(path), "as it is"
    import rac
    from rac.runtime.running import run_as

    model = rac.load_model(path, how, dtype=getattr(torch, dtype))
    return model, rac.load_tokenizer(path), run_as(model, how, torch.bfloat16)


def writer(path: str, how: str, dtype: str, threads: int) -> tuple[Callable[[int], Any], str]:
    """A function that writes so many tokens, and how the model runs."""
    if how == "llama":
        llama_cpp = importlib.import_module("llama_cpp")
        llama = llama_cpp.Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=256, verbose=False)
        given = llama.tokenize(PROMPT.encode())

        def write(n: int) -> None:
            for _ in zip(range(n), llama.generate(given, top_k=1, temp=0.0), strict=False):
                pass

        return write, f"llama_cpp {llama_cpp.__version__}"
    if how == "compressed":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(threads)
    model, tokenizer, said = model_of(path, how, dtype)
    ids = tokenizer(PROMPT, return_tensors="pt")
    settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return lambda n: model.generate(**ids, min_new_tokens=n, max_new_tokens=n, **settings), said


def child(path: str, how: str, dtype: str, tokens: int, threads: int) -> dict[str, Any]:
    """Seconds of each time that this process writes so many tokens, the reading of the prompt left out."""
    write, said = writer(path, how, dtype, threads)
    write(4)
    times = []
    for _ in range(REPEATS):
        seconds = []
        for n in (1, 1 + tokens):
            start = time.perf_counter()
            write(n)
            seconds.append(time.perf_counter() - start)
        times.append(seconds[1] - seconds[0])
        if sum(times) > ENOUGH:
            break
    return {"seconds": times, "said": said}


def measure(args: argparse.Namespace, kind: str) -> dict[str, Any] | None:
    """`child` in a process of its own; None where it has no file."""
    how, dtype = KINDS[kind]
    path = {"folder": args.folder, "llama": args.quantised}.get(how, args.archive)
    if not path or (args.only is not None and kind not in args.only):
        return None
    python = args.llama if how == "llama" else sys.executable
    call = json.dumps([path, how, dtype, args.tokens, args.threads])
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    command = [*shlex.split(args.through), python, "-W", "ignore", __file__, "--child", call]
    for _ in range(3):  # what makes the machine quiet may stop a process that takes too long
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode == 0:
            return dict(json.loads(done.stdout.splitlines()[-1]))
    raise SystemExit(f"{kind}: {done.returncode}")


def bars(speed: dict[str, float], divergences: dict[str, float]) -> bool:
    """Print the bars that can be told; whether those that must hold do."""
    dense = max((speed[k] for k in ("dense, BF16", "dense, F32", *list(KINDS)[:2]) if k in speed), default=0.0)
    rows = [
        ("codes to the best dense one", "codes", dense, 1.0, True),
        ("codes to dense F32 of transformers", "codes", speed.get("transformers, F32"), 1.5, False),
        ("codes to dense F32", "codes", speed.get("dense, F32"), 1.5, False),
        ("codes to llama.cpp's Q4_K", "codes", speed.get("llama.cpp, Q4_K"), 0.7, False),
        ("compressed to dense BF16 of transformers", "compressed", speed.get("transformers, BF16"), 0.25, True),
        ("compressed to dense BF16", "compressed", speed.get("dense, BF16"), 0.25, False),
    ]
    good = True
    for what, kind, other, least, must in rows:
        if other and kind in speed:
            ratio = speed[kind] / other
            kept = "met" if ratio >= least else "missed"
            print(f"| {what} | {ratio:.2f} | {'must' if must else 'aim'} {least} | {kept} |")
            good &= ratio >= least or not must
    for kind, found in divergences.items():
        must = kind == "codes"
        kept = ("met" if found <= MOST else "missed") if must else ""
        print(f"| KL of {kind} to dense F32 | {found:.1e} | {f'must {MOST}' if must else ''} | {kept} |")
        good &= found <= MOST or not must
    return good


def divergence(path: str, text: str, tokens: int) -> dict[str, float]:
    """Mean KL divergence, in nats, of dense BF16 and of codes to dense F32, in windows of 128 tokens.

    A window is read token by token, as it is written; by dense F32 at once.
    """
    import torch

    import rac
    from rac.runtime.running import run_as

    tokenizer = rac.load_tokenizer(path)
    with open(text, encoding="utf-8") as f:
        ids = tokenizer(f.read(20 * tokens), return_tensors="pt").input_ids[0, : tokens // 128 * 128].view(-1, 128)

    def logs(resident: str, dtype: Any, stepped: bool = True) -> Any:
        model = rac.load_model(path, resident, dtype=dtype)
        if stepped:
            run_as(model, resident, torch.bfloat16)
        with torch.no_grad():
            found = [_stepped(model, w) if stepped else model(w[None]).logits for w in ids]
        return torch.log_softmax(torch.cat(found).double(), -1)

    want, out = logs("dense", torch.float32, stepped=False), {}
    for name, resident, dtype in (("dense, BF16", "dense", torch.bfloat16), ("codes", "codes", torch.float32)):
        found = logs(resident, dtype)
        out[name] = float((want.exp() * (want - found)).sum(-1).mean())
    return out


def _stepped(model: Any, window: Any) -> Any:
    """(1, tokens, vocabulary) logits of a window that is read token by token."""
    import torch
    import transformers

    cache, out = transformers.DynamicCache(config=model.config), []
    for i in range(len(window)):
        out.append(model(window[None, i : i + 1], cache=cache, use_cache=True).logits)
    return torch.cat(out, 1)


def quantise(llama: str, source: str, target: str) -> None:
    """Make a Q4_K_M of a GGUF file by llama.cpp, which is asked to quantise again what is quantised."""
    code = (
        "import sys, llama_cpp as l; p = l.llama_model_quantize_default_params()\n"
        "p.ftype, p.allow_requantize = 15, True\n"
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    subprocess.run([llama, "-c", code, source, target], check=True)


def main() -> int:
    """Run; 1 where a bar that must hold does not."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("archive", nargs="?")
    p.add_argument("--folder", help="the same model for transformers")
    p.add_argument("--llama", default=sys.executable, help="a Python with llama-cpp-python")
    p.add_argument("--gguf", help="make --quantised of this file, and end")
    p.add_argument("--quantised", help="the same model for llama.cpp")
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", nargs="*", help="of the rows of the table")
    p.add_argument("--through", default="", help="a command that runs each process")
    p.add_argument("--kl", metavar="TEXT", help="and divergences, on 256 tokens of a text")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(child(*json.loads(args.child))))
        return 0
    if args.gguf:
        quantise(args.llama, args.gguf, args.quantised)
        return 0
    times: dict[str, list[float]] = {}
    said: dict[str, str] = {}
    for _ in range(args.rounds):
        for kind in KINDS:
            if found := measure(args, kind):
                times.setdefault(kind, []).extend(found["seconds"])
                said[kind] = found["said"]
                print(kind, [round(args.tokens / t, 1) for t in found["seconds"]], file=sys.stderr, flush=True)
    speed = {kind: args.tokens / statistics.median(seconds) for kind, seconds in times.items()}
    print(f"| {args.threads} threads, {args.tokens} tokens | tokens per second | how |\n| --- | ---: | --- |")
    for kind, rate in speed.items():
        print(f"| {kind} | {rate:.1f} | {said[kind]} |")
    return 0 if bars(speed, divergence(args.archive, args.kl, 256) if args.kl else {}) else 1


if __name__ == "__main__":
    sys.exit(main())
