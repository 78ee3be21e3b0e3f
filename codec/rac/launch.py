"""Starts the ranks of a pack: as processes here, as tasks of Ray, or by a script for a job array of Slurm.

    python -m rac.launch local --workers 4 model/ -o model.rac --bits 3 --work /tmp/job
    python -m rac.launch ray --workers 64 model/ -o model.rac --bits 3 --work s3://bucket/job
    python -m rac.launch slurm --workers 64 model/ -o model.rac --bits 3 --work /shared/job > job.sh && sbatch job.sh

What follows the launcher's own options are arguments of `rac pack`, with --work. All that a launcher does is to run
that command with --world and --rank, again where a process was killed, and then with --finish (docs/cluster.md).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from rac.cli import main as command
from rac.errors import MissingDependencyError, OutputError, RacError

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=rac
#SBATCH --array=0-{last}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{notice}
{more}# Two minutes before the time is up Slurm sends USR1: this task is queued again, and goes on where it was.
requeue() {{ scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; kill "$rank"; }}
trap requeue USR1
{pack} --world {world} --rank "$SLURM_ARRAY_TASK_ID" &
rank=$!
wait "$rank" || exit
[ "$SLURM_ARRAY_TASK_ID" != 0 ] || {pack} --finish
"""
PAUSE = 0.05  # seconds between two looks at the processes
STARTS = 4  # times that a cluster of Ray is begun
NOTICE = 120  # seconds before the end of its time in which a task is told


def _parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    out = argparse.ArgumentParser("python -m rac.launch", description=__doc__, formatter_class=about)
    kinds = out.add_subparsers(dest="kind", required=True, metavar="local|ray|slurm")
    for kind in ("local", "ray", "slurm"):
        p = kinds.add_parser(kind, formatter_class=about, allow_abbrev=False)
        p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="how many ranks")
        if kind != "slurm":
            p.add_argument("--retries", type=int, default=3, help="times that a rank which was killed is run again")
        if kind == "ray":
            p.add_argument("--address", help="of the cluster (default: RAY_ADDRESS, else one on this machine)")
            p.add_argument("--cpus", type=float, default=1.0, help="cores of one rank")
        if kind == "slurm":
            p.add_argument("--sbatch", action="append", default=[], help="a line of options, such as --time=4:00:00")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run a launcher; returns the exit code. Errors are one line on standard error."""
    args, pack = _parser().parse_known_args(argv)
    try:
        if args.workers < 1:
            raise ValueError("--workers must be at least 1")
        if wrong := [o for o in ("--world", "--rank", "--finish") if o in pack]:
            raise ValueError(f"{wrong[0]} is the launcher's to give")
        if not any(o == "--work" or o.startswith("--work=") for o in pack):
            raise ValueError("the ranks need a folder: give --work")
        return {"local": local, "ray": ray, "slurm": slurm}[args.kind](args, pack)
    except (RacError, ValueError) as e:
        sys.stderr.write(f"rac.launch: {e}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _stopped(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _rank(pack: Sequence[str], world: int, rank: int) -> list[str]:
    return ["pack", *pack, "--world", str(world), "--rank", str(rank)]


def local(args: argparse.Namespace, pack: list[str]) -> int:
    """Ranks as processes of this machine, which share its cores."""
    if not any(o in ("-j", "--jobs") or o.startswith("--jobs=") for o in pack):
        pack = [*pack, "--jobs", str(max(1, (os.cpu_count() or 1) // args.workers))]

    def start(rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "rac.cli", *_rank(pack, args.workers, rank)])

    running = {rank: start(rank) for rank in range(args.workers)}
    left, codes = dict.fromkeys(running, args.retries), list[int]()
    try:
        while running:
            ended = next(((rank, code) for rank, p in running.items() if (code := p.poll()) is not None), None)
            if ended is None:
                time.sleep(PAUSE)
                continue
            rank, code = ended
            del running[rank]
            if (number := _killed(code)) and left[rank]:
                left[rank] -= 1
                sys.stderr.write(f"rac.launch: rank {rank} was killed by signal {number}, and is run again\n")
                running[rank] = start(rank)
            else:
                codes.append(code)
    except BaseException:
        for process in running.values():
            process.terminate()
        raise
    return _finish(pack, codes)


def _killed(code: int) -> int:
    """The signal that has ended a rank, 0 for none; 128 more than its number where `rac` has ended by itself."""
    return -code if code < 0 else code - 128 if code > 128 and code != 130 else 0


def _finish(pack: Sequence[str], codes: Sequence[int]) -> int:
    """Write the file; where no rank has come to its end, what they have said stands."""
    return command(["pack", *pack, "--finish"]) if 0 in codes else max(2, *codes)


def ray(args: argparse.Namespace, pack: list[str]) -> int:
    """Ranks as tasks of Ray, without actors: a task whose worker dies is run again by Ray."""
    try:
        import ray
    except ImportError as e:
        raise MissingDependencyError(f"this launcher needs Ray: pip install ray ({e})") from e
    begun = not ray.is_initialized()
    if begun:
        _started(ray, args.address)
    try:
        task: Any = ray.remote(num_cpus=args.cpus, max_retries=args.retries)(_task)
        jobs = [task.remote(_rank(pack, args.workers, rank)) for rank in range(args.workers)]
        codes = [_code(ray, job) for job in jobs]
    finally:
        if begun:
            ray.shutdown()
    return _finish(pack, codes)


def _started(ray: Any, address: str | None) -> None:
    """Begin a cluster, or join the one at an address; OutputError where it does not come up."""
    for attempt in range(1 if address else STARTS):  # Ray gives its processes 30 s, on a busy machine too few
        try:
            ray.init(address=address, log_to_driver=False)
            return
        except Exception as e:  # whatever Ray raises
            ray.shutdown()
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            sys.stderr.write(f"rac.launch: Ray did not start (attempt {attempt + 1}): {why}\n")
    raise OutputError("Ray does not start here, or cannot be reached", file=address)


def _task(argv: list[str]) -> int:
    """What a worker of Ray runs."""
    return command(argv)


def _code(ray: Any, job: Any) -> int:
    """The exit code of a rank; that of a worker that died too often is not 0: others do what it has left."""
    try:
        return int(ray.get(job))
    except ray.exceptions.RayError as e:
        sys.stderr.write(f"rac.launch: a rank was given up: {str(e).splitlines()[0]}\n")
        return 2


def slurm(args: argparse.Namespace, pack: list[str]) -> int:
    """The script of a job array, on standard output; its first task writes the file when it has done its share."""
    run = shlex.join([sys.executable, "-m", "rac.cli", "pack", *pack])
    more = "".join(f"#SBATCH {line}\n" for line in args.sbatch)
    last = args.workers - 1
    sys.stdout.write(SCRIPT.format(last=last, world=args.workers, pack=run, more=more, notice=NOTICE))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)  # as Ctrl-C does, it stops the ranks too
    sys.exit(main())
