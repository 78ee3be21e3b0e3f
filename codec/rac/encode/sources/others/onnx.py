"""ONNX models: initialisers and constants, in the file itself or in files beside it, through `onnx`."""

from __future__ import annotations

import os
from typing import Any

from rac.encode.sources.arrays import BY_NATIVE
from rac.encode.sources.model import Source, SourceTensor
from rac.encode.sources.others import framed
from rac.errors import MissingDependencyError, SourceError

_EXTERNAL = 1  # of TensorProto.data_location


def read(path: str) -> Source:
    """The initialisers of the main graph, and its constants by the names of their outputs."""
    try:
        import onnx
    except ImportError as e:
        raise MissingDependencyError("ONNX files need `pip install rac-codec[onnx]`", file=path) from e
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as e:  # protobuf's errors, of which there are several
        raise SourceError(f"damaged ONNX file: {e}", file=path) from e
    model = framed.Layout(path, os.path.basename(path))
    layouts: dict[str, framed.Layout] = {}
    out, left = [], []
    for name, t in (*((t.name, t) for t in graph.initializer), *_constants(graph)):
        found = _tensor(onnx, model, layouts, name, t)
        if found is None:
            left.append(f"{name!r} is an initialiser of {onnx.TensorProto.DataType.Name(t.data_type)}")
        else:
            out.append(found)
    if not out:
        raise SourceError("holds no initialiser", file=path)
    return framed.source("onnx", out, [model, *layouts.values()], left)


def _constants(graph: Any) -> list[tuple[str, Any]]:
    nodes = (n for n in graph.node if n.op_type == "Constant" and n.output)
    return [(n.output[0], a.t) for n in nodes for a in n.attribute if a.name == "value" and a.HasField("t")]


def _tensor(
    onnx: Any, model: framed.Layout, layouts: dict[str, framed.Layout], name: str, t: Any
) -> SourceTensor | None:
    """An initialiser; None where this format has no such type."""
    shape = tuple(int(n) for n in t.dims)
    if any(n < 0 for n in shape) or len(shape) > 64:
        raise SourceError(f"damaged ONNX file: initialiser {name!r} has the shape {shape}", file=model.path)
    try:
        dtype = BY_NATIVE.get(onnx.helper.tensor_dtype_to_np_dtype(t.data_type).name)
    except KeyError:
        return None
    if dtype is None:
        return None
    if t.data_location == _EXTERNAL:
        layout, at, length = _external(model, layouts, name, t)
        found = layout.at(name, dtype, shape, at)
        if length is not None and length != found.nbytes:
            what = f"initialiser {name!r} has {length} bytes outside, which is not what {dtype} {list(shape)} needs"
            raise SourceError(f"damaged ONNX file: {what}", file=model.path)
        return found
    try:
        data = t.raw_data or framed.words(onnx.numpy_helper.to_array(t)).tobytes()
        found = model.found(name, dtype, shape, data)
    except (ValueError, TypeError) as e:
        raise SourceError(f"damaged ONNX file: initialiser {name!r}: {e}", file=model.path) from e
    return found


def _external(
    model: framed.Layout, layouts: dict[str, framed.Layout], name: str, t: Any
) -> tuple[framed.Layout, int, int | None]:
    """The file beside the model that a tensor lies in, where, and how many bytes it is said to have."""
    stated = {e.key: e.value for e in t.external_data}
    location, folder = stated.get("location", ""), os.path.dirname(model.path)
    path = os.path.realpath(os.path.join(folder, location))
    # a cache of the Hub has links: model and data lie in one folder all the same
    homes = (os.path.realpath(folder), os.path.dirname(os.path.realpath(model.path)))
    inside = any(path.startswith(home + os.sep) for home in homes)
    if not location or os.path.isabs(location) or not inside or ".." in location.replace("\\", "/").split("/"):
        what = f"the data of initialiser {name!r} are said to lie at {location!r}, outside the model's folder"
        raise SourceError(f"refused: {what}", file=model.path)
    if not os.path.isfile(path):
        raise SourceError(f"its data file {location!r} is missing", file=model.path)
    at, length = stated.get("offset", "0"), stated.get("length", "")
    if not at.isdecimal() or not (length.isdecimal() or not length):
        raise SourceError(f"damaged ONNX file: place of initialiser {name!r}", file=model.path)
    key = os.path.normpath(location).replace(os.sep, "/")
    layout = layouts.setdefault(key, framed.Layout(path, key))
    return layout, int(at), int(length) if length else None
