"""A pipeline of diffusers on prompts: each of its components on what it was given while the pipeline ran."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers

from rac.calibrate.inputs import Inputs
from rac.calibrate.layers import Layers
from rac.calibrate.module import gather
from rac.calibrate.text import SEED, Note
from rac.errors import SourceError
from rac.models.predictions import quiet

PROMPTS = 16  # that are used at most
STEPS = 8  # of the scheduler for each
CALLS = 48  # of a component that it is calibrated on: a sample where there were more
_METHODS = ("forward", "decode", "encode")
_WRONG = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)


@dataclass
class _Calls:
    """A sample of the calls of a component."""

    module: Any
    seen: int = 0
    kept: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def add(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], random: torch.Generator) -> None:
        """Keep the call, or leave it, all with the same chance."""
        self.seen += 1
        at = len(self.kept)
        if at == CALLS and (at := int(torch.randint(self.seen, (1,), generator=random))) >= CALLS:
            return
        self.kept[at : at + 1] = [(method, _copied(args), _copied(kwargs))]


def _copied(value: Any) -> Any:
    """The value with tensors of its own: a pipeline may overwrite what it has given."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


def components(path: str, inputs: Inputs, note: Note) -> list[Layers]:
    """What each component makes of what the pipeline in a folder gives it, by the names of its parameters.

    A VAE decodes what the pipeline made, and encodes that again. SourceError where the pipeline does not run on
    prompts alone.
    """
    try:
        with _quiet():
            pipe: Any = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except Exception as e:  # diffusers raises whatever a missing or broken file makes of it
        what = " ".join(str(e).split())[:200]
        raise SourceError(f"no pipeline that diffusers can load: {what}", file=path) from e
    pipe.set_progress_bar_config(disable=True)
    modules = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    calls = {name: _Calls(m) for name, m in modules.items()}
    try:
        with _quiet():
            _run(pipe, inputs.items[:PROMPTS], calls, note)
    except _WRONG as e:
        what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        why = f"{type(pipe).__name__} does not run on prompts alone ({what}); rac.calibrate(pipe.unet, batches) and"
        raise SourceError(f"{why} --calibration do", file=path) from e
    out, loss = [], "output" if inputs.backward else None
    for name, one in calls.items():
        if one.kept and any(p.dim() > 1 for p in one.module.parameters()):
            tell = functools.partial(_tell, note, name, len(one.kept))
            layers, remarks = gather(one.module, one.kept, forward=_again, loss=loss, note=tell)
            for remark in remarks:
                if remark.startswith("no backward"):  # what is not reached is said of the tensors
                    note(f"{name}: {remark}", 0, 0)
            out.append(layers)
    return out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = diffusers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with quiet(transformers):
            yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()


def _tell(note: Note, name: str, of: int, _: str, done: int, __: int) -> None:
    note(f"calibrating {name}", done, of)


def _run(pipe: Any, prompts: Sequence[str], calls: Mapping[str, _Calls], note: Note) -> None:
    takes = inspect.signature(pipe.__call__).parameters
    random = torch.Generator().manual_seed(SEED)
    with contextlib.ExitStack() as stack:
        for one in calls.values():
            stack.enter_context(_watched(one, random))
        for i, prompt in enumerate(prompts):
            given = {"prompt": prompt, "num_inference_steps": STEPS, "output_type": "pt"}
            given["generator"] = torch.Generator().manual_seed(SEED + i)
            made = pipe(**{k: v for k, v in given.items() if k in takes})
            vae: Any = getattr(pipe, "vae", None)
            images = getattr(made, "images", None)
            if hasattr(vae, "encode") and isinstance(images, torch.Tensor):
                with torch.no_grad():
                    vae.encode(2 * images.to(vae.dtype) - 1)
            note("running the pipeline", i + 1, len(prompts))


@contextlib.contextmanager
def _watched(one: _Calls, random: torch.Generator) -> Iterator[None]:
    """The component's calls are kept; a VAE is called by its methods."""
    own: Any = one.module
    inside = [False]

    def called(method: str, run: Any, *args: Any, **kwargs: Any) -> Any:
        if inside[0]:
            return run(*args, **kwargs)
        one.add(method, args, {k: v for k, v in kwargs.items() if not isinstance(v, torch.Generator)}, random)
        inside[0] = True
        try:
            return run(*args, **kwargs)
        finally:
            inside[0] = False

    found = [m for m in _METHODS if callable(getattr(own, m, None))]
    before = {m: own.__dict__[m] for m in found if m in own.__dict__}
    for method in found:
        own.__dict__[method] = functools.partial(called, method, getattr(own, method))
    try:
        yield
    finally:
        for method in found:
            del own.__dict__[method]
        own.__dict__.update(before)


def _again(module: Any, call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Any:
    """A call once more, what it makes as tensors."""
    method, args, kwargs = call
    out = module(*args, **kwargs) if method == "forward" else getattr(module, method)(*args, **kwargs)
    spread = getattr(out, "latent_dist", None)
    return out if spread is None else spread.mean
