"""Command line: what an archive holds, one line per tensor, or one line of error."""

import argparse
import json
import sys

import xxhash

from .archive import RandomAccess, Tensor, decode
from .errors import RacError
from .selftest import self_test


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="decoder", description="Decode and verify a RAC archive.")
    parser.add_argument("file", nargs="?", metavar="FILE.rac")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--tensor", metavar="NAME", help="read this tensor only, through the index")
    parser.add_argument("--self-test", action="store_true", help="run the worked examples of the text")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")
    if options.self_test:
        self_test()
        print("ok")
        return 0
    if options.file is None:
        parser.error("FILE.rac is needed")
    try:
        if options.tensor is not None:
            with RandomAccess(options.file) as archive:
                result = {"tensors": [_tensor(options.tensor, archive.tensor(options.tensor))]}
        else:
            result = _archive(options.file)
    except (RacError, OSError, KeyError) as error:
        message = str(error).replace("\n", " ")
        print(f"{type(error).__name__}: {message}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for entry in result["tensors"]:
            name = str(entry["name"])
            shown = name if name.isprintable() else json.dumps(name)
            print(shown, entry["dtype"], json.dumps(entry["shape"]), entry["xxh3_128"], sep="\t")
    return 0


def _tensor(name: str, tensor: Tensor) -> dict[str, object]:
    dtype, shape, dense = tensor
    return {"name": name, "dtype": dtype, "shape": list(shape), "xxh3_128": xxhash.xxh3_128_hexdigest(dense)}


def _archive(path: str) -> dict[str, list[dict[str, object]]]:
    archive = decode(path)
    result: dict[str, object] = {
        "digest": archive.digest.hex(),
        "metadata": archive.metadata,
        "shard": list(archive.header.shard),
        "attachments": [
            {"name": name, "size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
            for name, content in archive.attachments.items()
        ],
        "tensors": [_tensor(name, tensor) for name, tensor in archive.tensors.items()],
    }
    return result  # type: ignore[return-value]
