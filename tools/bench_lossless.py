"""Compare lossless codecs on the tensors of safetensors files: size, pack and unpack speed, memory."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LABELS = {
    "rac-fast": "rac, level fast",
    "rac-default": "rac, level default",
    "rac-max": "rac, level max",
    "zipnn": "zipnn, by dtype",
    "openzl": "openzl, exponents split off, best of FSE/Huffman/store per byte lane",
    "openzl-fast": "openzl, byte lanes (BF16: exponents split off), Huffman",
    "pcodec-8": "pcodec, level 8",
    "pcodec-12": "pcodec, level 12",
    "blosc2-shuffle-5": "blosc2, zstd + shuffle, clevel 5",
    "blosc2-shuffle-9": "blosc2, zstd + shuffle, clevel 9",
    "blosc2-bitshuffle-5": "blosc2, zstd + bitshuffle, clevel 5",
    "blosc2-bitshuffle-9": "blosc2, zstd + bitshuffle, clevel 9",
    "zstd-3": "zstd -3",
    "zstd-19": "zstd -19",
}
SINGLE_THREAD = ("openzl", "pcodec")  # no threads in their Python API; zstd has them for packing only
RATIOS = (("unpack", "rac-default", "zipnn"), ("unpack", "rac-max", "pcodec-12"), ("pack", "rac-default", "zipnn"))
VERSIONS = "rac-codec zipnn openzl pcodec blosc2 zstandard numpy ml_dtypes torch".split()
THREAD_VARIABLES = [
    f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA", "RAYON")
] + ["BLOSC_NTHREADS"]

# What numpy calls the safetensors dtypes. BF16 is seen as its bit pattern, and so is any dtype not listed.
NUMPY_DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2",
    "I64": "i8", "I32": "i4", "I16": "i2", "U64": "u8", "U32": "u4", "U16": "u2",
}  # fmt: skip
ZIPNN_DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

EPILOG = """\
what the numbers mean
  bytes      rac: the whole .rac file. Peers: the sum of the compressed tensors, without names, shapes or an
             index, which flatters them. Peers work tensor by tensor, as a loader needs.
  %          of the safetensors file. MB/s: 1e6 bytes of dense data a second, best of the counted repeats.
  pack       rac: safetensors file -> .rac file. Peers: arrays in memory -> bytes in memory (no file: flatters).
  unpack     rac: file in the page cache -> numpy arrays, checksums on. Peers: bytes in memory -> arrays.
  peak RSS   of the process that did both, peers holding the dense source as well; "import" is its share
             before any tensor was read (zipnn imports torch).
  n/a        the peer has no threads there (openzl and pcodec: none; zstd: packing only).

Every unpack is compared with the safetensors file bit for bit. Exit status 1: a codec failed or was not exact.

examples
  bench_lossless.py model.safetensors --threads 1 2
  bench_lossless.py a.safetensors b.safetensors --only rac-default,zipnn --json out.json
  bench_lossless.py model.safetensors --only blosc2 --repeat 1       (all rows whose name starts with blosc2-)

rows: """ + ", ".join(LABELS)


class NotExactError(Exception):
    """A codec gave back other bits than it was given."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in a safetensors file."""

    name: str
    dtype: str
    offset: int
    nbytes: int

    def read(self, path: Path) -> Array:
        """The tensor as a flat numpy array."""
        stored = np.fromfile(path, np.uint8, self.nbytes, offset=self.offset)
        return stored.view(NUMPY_DTYPES.get(self.dtype, "u1"))

    def check(self, path: Path, dense: Array, step: int = 1 << 20) -> None:
        """Compare with the file, piecewise so that checking leaves the peak memory alone."""
        got = np.ascontiguousarray(dense).reshape(-1).view(np.uint8)
        for at in range(0, max(self.nbytes, got.size), step):
            want = np.fromfile(path, np.uint8, max(0, min(step, self.nbytes - at)), offset=self.offset + at)
            if not np.array_equal(want, got[at : at + step]):
                raise NotExactError(self.name)


def read_index(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file. Empty ones are left out: there is nothing to compress."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = [(name, entry["dtype"], *entry["data_offsets"]) for name, entry in header.items()]
    return [Tensor(name, dtype, 8 + length + a, b - a) for name, dtype, a, b in spans if b > a]


@dataclass(frozen=True)
class Peer:
    """A codec of single arrays."""

    pack: Callable[[Tensor, Array], bytes]
    unpack: Callable[[Tensor, bytes], Any]  # anything with the buffer interface
    threaded_unpack: bool = True


def make_peer(row: str, threads: int) -> Peer:
    """The peer of a row; raises ImportError where it is not installed."""
    name, *options = row.split("-")
    maker: Callable[..., Peer] = {
        "zipnn": zipnn_peer, "openzl": openzl_peer, "pcodec": pcodec_peer, "blosc2": blosc2_peer,
        "zstd": zstd_peer,
    }[name]  # fmt: skip
    return maker(threads, *options)


def zipnn_peer(threads: int) -> Peer:
    zipnn = importlib.import_module("zipnn")
    coders = {
        dtype: zipnn.ZipNN(input_format="byte", bytearray_dtype=zipnn_dtype, threads=threads)
        for dtype, zipnn_dtype in ZIPNN_DTYPES.items()
    }

    def pack(tensor: Tensor, array: Array) -> bytes:
        # It takes floats only; like its own safetensors script, store the rest.
        blob: bytes = coders[tensor.dtype].compress(array.data) if tensor.dtype in coders else array.tobytes()
        return blob

    def unpack(tensor: Tensor, blob: bytes) -> Any:
        return coders[tensor.dtype].decompress(blob) if tensor.dtype in coders else bytearray(blob)

    return Peer(pack, unpack)


def openzl_peer(threads: int, speed: str = "best") -> Peer:
    zl = importlib.import_module("openzl.ext")
    deconstruct = {
        "BF16": zl.nodes.BFloat16Deconstruct, "F16": zl.nodes.Float16Deconstruct, "F32": zl.nodes.Float32Deconstruct,
    }  # fmt: skip

    def build(dtype: str) -> Any:
        # Found by trial: the generic graph (Compress, FieldLz) is larger and ten times slower on weights, and
        # adding zstd -19 to the choice of coders gains under 0.1 % of the size at 2 MB/s.
        compressor = zl.Compressor()
        compressor.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        compressor.set_parameter(zl.CParam.PermissiveCompression, 1)  # else a constant lane can be an error
        coder = zl.graphs.Entropy()(compressor)
        if speed == "best":
            coders = [zl.graphs.Fse()(compressor), zl.graphs.Huffman()(compressor), zl.graphs.Store()(compressor)]
            coder = zl.graphs.BruteForce(coders)(compressor)
        lanes = zl.nodes.TransposeSplit()(compressor, coder)
        if dtype not in NUMPY_DTYPES or dtype[0] in "IU":
            graph = zl.graphs.Compress()(compressor)
        elif dtype == "F64" or (speed == "fast" and dtype == "F32"):  # splitting F32 costs unpack speed
            graph = zl.nodes.ConvertNumToStructLE()(compressor, lanes)
        else:
            graph = deconstruct[dtype]()(compressor, lanes, coder)
        compressor.select_starting_graph(graph)
        return compressor

    compressors = {dtype: build(dtype) for dtype in [*NUMPY_DTYPES, "other"]}

    def pack(tensor: Tensor, array: Array) -> bytes:
        context = zl.CCtx()
        context.ref_compressor(compressors.get(tensor.dtype, compressors["other"]))
        blob: bytes = context.compress([zl.Input(zl.Type.Numeric, array.view(f"u{array.itemsize}"))])
        return blob

    return Peer(pack, lambda _, blob: zl.DCtx().decompress(blob)[0].content.as_nparray())


def pcodec_peer(threads: int, level: str) -> Peer:
    pcodec = importlib.import_module("pcodec")
    standalone = importlib.import_module("pcodec.standalone")
    config = pcodec.ChunkConfig(compression_level=int(level), enable_8_bit=True)
    return Peer(
        lambda _, array: bytes(standalone.simple_compress(array, config)),
        lambda _, blob: standalone.simple_decompress(blob),
    )


def blosc2_peer(threads: int, shuffle: str, level: str) -> Peer:
    blosc2 = importlib.import_module("blosc2")
    # compress2 rather than an NDArray: the same size within 0.1 %, and faster. It takes tensors up to 2 GB.
    options = {
        "codec": blosc2.Codec.ZSTD, "clevel": int(level), "filters": [blosc2.Filter[shuffle.upper()]],
        "nthreads": threads,
    }  # fmt: skip
    return Peer(
        lambda _, array: bytes(blosc2.compress2(array, typesize=array.itemsize, **options)),
        lambda _, blob: blosc2.decompress2(blob, nthreads=threads),
    )


def zstd_peer(threads: int, level: str) -> Peer:
    zstandard = importlib.import_module("zstandard")
    # threads=0 is the plain single-threaded coder; 1 would be a pool of one worker.
    packer = zstandard.ZstdCompressor(level=int(level), threads=threads if threads > 1 else 0)
    unpacker = zstandard.ZstdDecompressor()
    return Peer(
        lambda _, array: bytes(packer.compress(array.data.cast("B"))),
        lambda _, blob: unpacker.decompress(blob),
        threaded_unpack=False,
    )
