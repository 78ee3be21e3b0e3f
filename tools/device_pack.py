"""A calibrated pack on the CPU and on a device, side by side: seconds of each part, bytes, and how good each file is.

  python tools/device_pack.py MODEL_FOLDER TEXT --device cuda --bits 3

Prints a table for docs/gpu.md. The device that is named must be there: nothing is measured on another in its place.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import rac
from rac.encode.options import DEVICES
from rac.linalg.device import check


def packed(folder: str, text: str, device: str, args: argparse.Namespace, out: Path) -> list[str]:
    """A row: device, seconds until the calibration is done and until the end, bytes, bits, mean signal to noise."""
    start, calibrated = time.perf_counter(), 0.0

    def note(what: str, done: int, of: int) -> None:
        nonlocal calibrated
        if what.startswith("looking") and not calibrated:
            calibrated = time.perf_counter() - start

    how = {"bits": args.bits, "calibrate": text, "tokens": args.tokens, "effort": args.effort}
    done = rac.pack(folder, out, device=device, note=note, force=True, **how)
    took = time.perf_counter() - start
    snr = sum(f.snr for f in done.fidelity) / len(done.fidelity)
    numbers = (f"{calibrated:.1f}", f"{took:.1f}", f"{done.stored:,}", f"{done.quantised_bits:.3f}", f"{snr:.2f}")
    return [device, *numbers, f"{_peak(device) / 1e9:.2f}"]


def _peak(device: str) -> float:
    """Bytes of a CUDA device at most; not known of others."""
    if device != "cuda":
        return float("nan")
    import torch

    return float(torch.cuda.max_memory_allocated())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Hugging Face folder of a causal language model")
    parser.add_argument("text", help="a text file to calibrate on")
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="compared with the CPU; default: cuda")
    parser.add_argument("--bits", type=float, default=3.0, help="default: 3")
    parser.add_argument("--tokens", type=int, default=40960, help="default: 40960")
    parser.add_argument("--effort", choices=("fast", "default", "max"), default="default", help="default: default")
    args = parser.parse_args()
    check(args.device)
    print("| device | calibration and recipe, s | all, s | bytes | bits | mean SNR, dB | device memory, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for device in dict.fromkeys(("cpu", args.device)):
            row = packed(args.folder, args.text, device, args, Path(folder) / f"{device}.rac")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
