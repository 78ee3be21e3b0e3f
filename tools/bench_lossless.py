"""Compare lossless codecs on the tensors of safetensors files: size, pack and unpack speed, memory."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lossless_bars

ROWS = ["rac-fast", "rac-fast-coarse", "rac-default", "rac-default-coarse", "rac-max"]
ROWS += ["zipnn", "openzl", "openzl-fast", "pcodec-8", "pcodec-12"]
ROWS += [f"blosc2-{shuffle}-{level}" for shuffle in ("shuffle", "bitshuffle") for level in (5, 9)]
ROWS += ["zstd-3", "zstd-19"]
LABELS = {
    "openzl": "openzl (float deconstruct, lanes, best of FSE/Huffman/store)",
    "openzl-fast": "openzl-fast (BF16 deconstruct or F32 lanes, Huffman)",
}
SINGLE_THREAD = ("openzl", "pcodec")  # their Python APIs have no threads
PACKAGES = ["rac-codec", "zipnn", "openzl", "pcodec", "blosc2", "zstandard", "numpy", "ml_dtypes", "torch"]
THREAD_SETTINGS = [f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA", "RAYON")]
THREAD_SETTINGS += ["BLOSC_NTHREADS"]

# The dtypes of safetensors as numpy sees them: BF16 as its bit pattern, one not listed as bytes.
NUMPY_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2"}
ZIPNN_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}

EPILOG = f"""\
bytes     rac: the whole .rac file. Peers: the sum of the compressed tensors, each packed by itself as a
          loader needs, without names, shapes or an index; that flatters them. %: of the safetensors file.
pack      MB (1e6 bytes of dense data) a second, best of the counted repeats, at 1 thread (1T), 2 (2T), ...
          rac: safetensors file -> .rac file. Peers: arrays -> bytes in memory; that flatters the peers.
unpack    rac: file in the page cache -> numpy arrays, checksums on. Peers: bytes in memory -> arrays.
n/a       the peer has no threads there (openzl, pcodec: none at all; zstd: only when packing).
peak RSS  of the process that did both; "import" was there before any tensor was read (zipnn imports torch).

Each unpack is compared with the safetensors file bit for bit. The exit status is 1 if one differed or failed.

Below the table stand the ratios that the bars of tools/lossless_bars.py are about, for files named after the
three models of the bars (minilm, smollm2, 8b); tools/shaped.py makes the last.

  python tools/bench_lossless.py model.safetensors --threads 1 2
  python tools/bench_lossless.py 8b-shaped.safetensors --threads 1 2 --cpus avx512 avx2 --only rac,zipnn,pcodec-12
  python tools/bench_lossless.py a.safetensors b.safetensors --only rac-max,blosc2     (all blosc2-... rows)

rac-fast cuts strips of whole rows, rac-default fine tiles, rac-...-coarse those of --slices coarse, as rac-max does.

rows: {" ".join(ROWS)}
"""


def read_tensors(path: Path) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Name, dtype and flat array of each tensor of a safetensors file, less the empty ones."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end > begin:  # some peers refuse an empty array
            stored = np.fromfile(path, np.uint8, end - begin, offset=start + begin)
            yield name, entry["dtype"], stored.view(NUMPY_DTYPES.get(entry["dtype"], "u1"))


Pack = Callable[[str, NDArray[Any]], Any]  # dtype, array -> packed
Unpack = Callable[[str, Any], Any]  # dtype, packed -> anything with the buffer interface


def zipnn(threads: int) -> tuple[Pack, Unpack]:
    make = import_module("zipnn").ZipNN
    coders = {dtype: make(bytearray_dtype=name, threads=threads) for dtype, name in ZIPNN_DTYPES.items()}

    def pack(dtype: str, array: NDArray[Any]) -> Any:  # floats only; its own scripts store the rest
        return coders[dtype].compress(array.view("u1").data) if dtype in coders else array.tobytes()

    return pack, lambda dtype, blob: coders[dtype].decompress(blob) if dtype in coders else blob


def openzl(threads: int, speed: str = "best") -> tuple[Pack, Unpack]:
    zl = import_module("openzl.ext")
    graphs, nodes = zl.graphs, zl.nodes

    def compressor(dtype: str) -> Any:
        # Chosen by trial. The generic graphs (Compress, FieldLz) are larger and several times slower on
        # weights; zstd -19 as one more coder to choose from gains under 0.1 % of F32 and packs at 2 MB/s.
        made = zl.Compressor()
        made.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        made.set_parameter(zl.CParam.PermissiveCompression, 1)  # store what a coder refuses
        coder = graphs.Entropy()(made)
        if speed == "best":
            choice = [graph()(made) for graph in (graphs.Fse, graphs.Huffman, graphs.Store)]
            coder = graphs.BruteForce(choice)(made)
        lanes = nodes.TransposeSplit()(made, coder)
        if dtype == "BF16":
            graph = nodes.BFloat16Deconstruct()(made, lanes, coder)
        elif dtype == "F32" and speed == "best":  # the smaller, but it unpacks at half the speed of lanes
            graph = nodes.Float32Deconstruct()(made, lanes, coder)
        elif dtype.startswith("F"):
            graph = nodes.ConvertNumToStructLE()(made, lanes)
        else:
            graph = graphs.Compress()(made)
        made.select_starting_graph(graph)
        return made

    compressors = {dtype: compressor(dtype) for dtype in (*NUMPY_DTYPES, "other")}

    def pack(dtype: str, array: NDArray[Any]) -> Any:
        context = zl.CCtx()
        context.ref_compressor(compressors.get(dtype, compressors["other"]))
        return context.compress([zl.Input(zl.Type.Numeric, array.view(f"u{array.itemsize}"))])

    return pack, lambda _, blob: zl.DCtx().decompress(blob)[0].content.as_nparray()


def pcodec(threads: int, level: str) -> tuple[Pack, Unpack]:
    module = import_module("pcodec")
    config = module.ChunkConfig(compression_level=int(level), enable_8_bit=True)
    pack, unpack = module.standalone.simple_compress, module.standalone.simple_decompress
    return lambda _, array: pack(array, config), lambda _, blob: unpack(blob)


def blosc2(threads: int, shuffle: str, level: str) -> tuple[Pack, Unpack]:
    module = import_module("blosc2")
    options = {"codec": module.Codec.ZSTD, "clevel": int(level), "nthreads": threads}
    options["filters"] = [module.Filter[shuffle.upper()]]
    # compress2 rather than an NDArray: within 0.1 % of its size, and faster. It takes tensors up to 2 GB.
    return (
        lambda _, array: module.compress2(array, typesize=array.itemsize, **options),
        lambda _, blob: module.decompress2(blob, nthreads=threads),
    )


def zstd(threads: int, level: str) -> tuple[Pack, Unpack]:
    module = import_module("zstandard")
    # threads=0 is the plain coder in the calling thread; 1 would be a pool of one worker.
    packer = module.ZstdCompressor(level=int(level), threads=threads if threads > 1 else 0)
    unpacker = module.ZstdDecompressor()
    return lambda _, array: packer.compress(array.view("u1").data), lambda _, blob: unpacker.decompress(blob)


PEERS: dict[str, Any] = {"zipnn": zipnn, "openzl": openzl, "pcodec": pcodec, "blosc2": blosc2, "zstd": zstd}


@dataclass
class Result:
    """One row at one thread count; speeds in MB/s, size and memory in bytes; None: does not apply."""

    file: str
    row: str
    threads: int
    size: int = 0
    pack: float | None = None
    unpack: float | None = None
    peak: int = 0
    imports: int = 0
    error: str = ""


def best(action: Callable[[], float], args: argparse.Namespace) -> float:
    """The least seconds of the counted repeats: one at least, no more once the budget is spent."""
    start = time.perf_counter()
    times = [action(), action()]
    while len(times) <= args.repeat and time.perf_counter() - start < args.budget:
        times.append(action())
    return min(times[1:])  # the first was the warm-up


def measure(path: Path, row: str, threads: int, args: argparse.Namespace, archive: Path) -> Result:
    """Runs in a process of its own, so that memory, threads and caches are this row's alone."""
    result = Result(str(path), row, threads)
    name, *options = row.partition("@")[0].split("-")
    try:
        if name == "rac":
            rac = import_module("rac")
        else:
            pack_one, unpack_one = PEERS[name](threads, *options)
    except ImportError:
        result.error = "not installed"
        return result
    result.imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    packed: dict[str, tuple[str, Any]] = {}

    def pack() -> float:
        packed.clear()  # and the archive: freeing the result of the run before is not packing
        archive.unlink(missing_ok=True)
        # Read afresh each time, before the clock starts: zipnn reorders bits inside its input.
        tensors = [] if name == "rac" else list(read_tensors(path))
        start = time.perf_counter()
        if name == "rac":
            slices = options[1] if options[1:] else None
            rac.pack(path, archive, level=options[0], slices=slices, jobs=threads, force=True)
        for tensor, dtype, array in tensors:
            packed[tensor] = dtype, pack_one(dtype, array)
        return time.perf_counter() - start

    def unpack() -> float:
        start = time.perf_counter()
        if name == "rac":
            dense = rac.load_file(archive, threads=threads)
        else:
            dense = {key: np.frombuffer(unpack_one(*value), np.uint8) for key, value in packed.items()}
        seconds = time.perf_counter() - start
        # Once, before the comparison takes memory of its own.
        result.peak = result.peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for tensor, _, array in read_tensors(path):
            if array.tobytes() != dense[tensor].tobytes():
                raise ValueError(f"{row}: the round trip of {tensor} is not exact")
        return seconds

    dense_mb = sum(array.nbytes for _, _, array in read_tensors(path)) / 1e6
    result.pack = dense_mb / best(pack, args)
    unpack_speed = dense_mb / best(unpack, args)
    result.unpack = None if name == "zstd" and threads > 1 else unpack_speed
    result.size = archive.stat().st_size if name == "rac" else sum(len(blob) for _, blob in packed.values())
    return result


def measure_apart(path: Path, row: str, threads: int, args: argparse.Namespace) -> Result:
    """Call this script again for one measurement. This process stays small: a child inherits its peak RSS."""
    if threads > 1 and row.startswith(SINGLE_THREAD):
        return Result(str(path), row, threads)
    command = [sys.executable, __file__, str(path), "--child", row, "--threads", str(threads)]
    command += ["--repeat", str(args.repeat), "--budget", str(args.budget)]
    environment = os.environ | dict.fromkeys(THREAD_SETTINGS, str(threads))
    if cpu := row.partition("@")[2]:
        environment["RAC_CPU"] = cpu
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if sys.stderr.isatty():
        print(f"{path.name} {row} {threads}T: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if done.returncode:
        return Result(str(path), row, threads, error=f"failed with status {done.returncode}, see stderr")
    return Result(**json.loads(done.stdout.splitlines()[-1]))  # the last line: a codec may print too


def report(results: dict[tuple[Path, str], list[Result]], threads: list[int]) -> Iterator[str]:
    """The table, then that of the bars."""
    heads = ["file", "codec", "bytes", "%", *(f"{what} {n}T" for what in ("pack", "unpack") for n in threads)]
    yield "| " + " | ".join([*heads, "peak RSS MB", "import MB"]) + " |"
    yield "|---|---|" + "---:|" * len(heads)
    for (path, row), group in results.items():
        speeds = [f"{s:.0f}" if s else "n/a" for s in [r.pack for r in group] + [r.unpack for r in group]]
        memory = [f"{max(r.peak for r in group) / 1e6:.0f}", f"{group[0].imports / 1e6:.0f}"]
        percent = f"{100 * group[0].size / path.stat().st_size:.2f}"
        cells = [r.error for r in group if r.error][:1] or [f"{group[0].size}", percent, *speeds, *memory]
        yield "| " + " | ".join([path.name, LABELS.get(row, row), *cells]) + " |"
    yield ""
    yield "| model | of | to | threads | ratio | must | aim | |"
    yield "|---|---|---|---|---:|---:|---:|---|"
    for path, (i, count) in itertools.product({p: 0 for p, _ in results}, enumerate(threads)):
        rows = {row: group[i] for (p, row), group in results.items() if p == path}

        def speed(row: str, what: str, rows: dict[str, Result] = rows) -> float | None:
            return getattr(rows[row], what) if row in rows else None

        yield from lossless_bars.verdicts(str(path), dict.fromkeys(rows), count, speed)


def machine() -> str:
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t :")
    installed = {item.name: item.version for item in metadata.distributions()}
    versions = ", ".join(f"{name} {installed.get(name, 'not installed')}" for name in PACKAGES)
    state = f"load average {os.getloadavg()[0]:.2f}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    return f"{cpu}, {os.cpu_count()} cores, {state}\npython {sys.version.split()[0]}, {versions}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.safetensors")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="thread counts (default: 1)")
    parser.add_argument("--repeat", type=int, default=5, help="counted repeats after a warm-up (default: 5)")
    parser.add_argument("--budget", type=float, default=60, help="begin no repeat after these seconds (60)")
    parser.add_argument("--only", default=",".join(ROWS), metavar="ROW,...", help="measure these rows only")
    parser.add_argument("--cpus", nargs="+", default=[""], help="values of RAC_CPU for the rac rows, each by itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args.files[0], args.child, args.threads[0], args, Path(folder, "packed.rac"))
        print(json.dumps(asdict(result)))
        return 0
    named = [row for row in ROWS if any(f"{row}-".startswith(f"{name}-") for name in args.only.split(","))]
    rows = [f"{row}@{cpu}" if cpu else row for row in named for cpu in (args.cpus if row.startswith("rac") else [""])]
    problems = [f"no such file: {path}" for path in args.files if not path.is_file()]
    if problems or not rows:
        parser.error((problems or [f"--only {args.only} names no row of {' '.join(ROWS)}"])[0])
    facts = machine()
    print(facts)
    results = {
        (path, row): [measure_apart(path, row, threads, args) for threads in args.threads]
        for path, row in itertools.product(args.files, rows)
    }
    print(*report(results, args.threads), sep="\n")
    flat = [result for group in results.values() for result in group]
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "results": [asdict(r) for r in flat]}, indent=1))
    return int(any(result.error.startswith("failed") for result in flat))


if __name__ == "__main__":
    sys.exit(main())
