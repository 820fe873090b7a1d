# SPDX-License-Identifier: Apache-2.0
"""`make soak`: the detector over a bag that never ends, watched for an hour: memory, latency, losses.

Example: python -m qdbev_ros.soak --minutes 60 --bag demo/town.mcap --model demo/nano.qdbev --out out/soak
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

from qdbev_ros.bringup import describe
from qdbev_ros.core.errors import ConfigError, QdbevError
from qdbev_ros.core.files import whole_file, write_json, write_text
from qdbev_ros.core.signals import on_stop
from qdbev_ros.core.soak_figures import Sample, around_engine_ms, figures, missed_limits, table
from qdbev_ros.engine.cache import cpu_name
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.presets import load_preset
from qdbev_ros.ros.recording import read_sets
from qdbev_ros.ros.soak_watch import Watch

SAMPLE_S = 5.0
RAMP_S = 15.0  # of which the first third is left out
SHARE = 0.8  # of the highest rate: where no time is to spare, any disturbance loses a set
START_S = 120.0  # patience with the first answer
STOP_S = 60.0


class SoakFailure(Exception):
    """The node did not do what a soak takes."""


def main(words: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(words)
    try:
        return _soak(args)
    except QdbevError as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 2
    except SoakFailure as error:
        print(f"soak: failed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qdbev_ros.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60.0, help="default: %(default)g")
    parser.add_argument("--bag", type=Path, default=Path("demo/town.mcap"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, default=Path("demo/nano.qdbev"), help="default: %(default)s")
    parser.add_argument("--preset", default="nuscenes", help="topics of the bag (default: %(default)s)")
    parser.add_argument("--engine", default="", help="inference engine (default: the node's own choice)")
    parser.add_argument(
        "--rate", type=float, help=f"sets a second (default: {SHARE:.0%}% of what a short run manages)"
    )
    parser.add_argument(
        "--warm-up", type=float, help="minutes before memory is judged (default: 5, or a sixth of the run)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/soak"), help="default: %(default)s")
    return parser


def _soak(args: argparse.Namespace) -> int:
    if not args.minutes > 0 or (args.rate is not None and not args.rate > 0):
        raise ConfigError("--minutes and --rate must be positive")
    warm_up_s = 60 * (min(5.0, args.minutes / 6) if args.warm_up is None else args.warm_up)
    bag_hz = _bag_hz(args.bag, args.preset)
    given = {
        "model": str(args.model), "bag": str(args.bag), "preset": args.preset, "engine": args.engine, "loop": "endless"
    }  # fmt: skip
    _prepare_environment(given)
    stop = _StopRequest()
    rate, highest = args.rate, None
    if rate is None:
        highest = _highest_rate(given, args.preset, stop)
        rate = SHARE * highest
        print(f"highest rate: {highest:.2f} sets/s; {SHARE:.0%} of it from here on", flush=True)
    with _running({**given, "rate": f"{rate / bag_hz:.4f}"}, args.preset) as (watch, process):
        samples = _record(watch, process, 60 * args.minutes, stop, args.out)
        latencies, status = watch.latencies_ms.copy(), watch.status
    if not samples:
        raise SoakFailure("stopped before the first sample")
    result = {
        "rate_hz": round(rate, 3), "highest_rate_hz": highest and round(highest, 3), "interrupted": stop.asked,
        **figures(samples, latencies, warm_up_s), "around_engine_ms": around_engine_ms(status), **_about(args, status)
    }  # fmt: skip
    result["missed"] = missed_limits(result)
    _write(args.out, result, samples)
    print(f"\n{table(result)}\n{args.out}/soak.json, soak.csv, soak.png", flush=True)
    for line in result["missed"]:
        print(f"soak: missed: {line}", file=sys.stderr)
    return 130 if stop.asked else int(bool(result["missed"]))


class _StopRequest:
    """A signal ends the run early; what was measured so far is written."""

    def __init__(self) -> None:
        self.asked = False
        on_stop(self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _bag_hz(bag: Path, preset: str) -> float:
    """Sets a second as the bag was recorded."""
    with BagReader(bag) as reader:
        topics = load_preset(preset)
        reader.require_cameras(topics)
        stamps = [frame.stamp_ns for frame in read_sets(reader, topics)]
    if len(stamps) < 2:
        raise ConfigError(f"bag {bag} has {len(stamps)} whole sets; a soak needs two or more")
    return 1e9 * (len(stamps) - 1) / (stamps[-1] - stamps[0])


def _prepare_environment(given: dict[str, str]) -> None:
    """For this process and all that it starts: the transport's profile, and a graph of its own."""
    bringup = describe(given)
    os.environ.update(bringup.environment)
    os.environ.setdefault("ROS_DOMAIN_ID", str(free_domain()))


@contextmanager
def _running(given: dict[str, str], preset: str) -> Iterator[tuple[Watch, psutil.Process]]:
    """Detector and player, and a watch on them; (the watch, the detector's process). Ends them all."""
    words = [f"{name}:={value}" for name, value in given.items() if value]
    # A session of its own: Ctrl-C in the terminal is for us alone.
    run = subprocess.Popen([sys.executable, "-m", "qdbev_ros.bringup", *words], start_new_session=True)
    watch = Watch(load_preset(preset))
    try:
        yield watch, _detector_of(run, watch)
    finally:
        watch.close()
        run.send_signal(signal.SIGINT)
        try:
            run.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)


def _detector_of(run: subprocess.Popen[bytes], watch: Watch) -> psutil.Process:
    """The detector's process, once it has answered. Raises SoakFailure where it never does."""
    deadline = time.monotonic() + START_S
    while not watch.answered:
        watch.spin(0.5)
        if run.poll() is not None:
            raise SoakFailure(f"the processes ended with exit code {run.returncode}, see above")
        if time.monotonic() > deadline:
            raise SoakFailure(f"no answer within {START_S:.0f} s")
    for process in psutil.Process(run.pid).children():
        if "qdbev_ros.detector_node" in process.cmdline():
            return process
    raise SoakFailure("the detector's process is not to be found")


def _highest_rate(given: dict[str, str], preset: str, stop: _StopRequest) -> float:
    """Sets a second when the next ones always wait already."""
    with _running({**given, "queue_size": "2", "rate": "100"}, preset) as (watch, _):
        watch.spin(RAMP_S / 3)
        before, since = watch.answered, time.monotonic()
        while time.monotonic() - since < RAMP_S * 2 / 3 and not stop.asked:
            watch.spin(0.5)
        answered, seconds = watch.answered - before, time.monotonic() - since
    if stop.asked or not answered:
        raise SoakFailure("stopped" if stop.asked else "the node answered nothing")
    return answered / seconds


def _record(
    watch: Watch, process: psutil.Process, seconds: float, stop: _StopRequest, out: Path
) -> list[Sample]:
    """A sample every SAMPLE_S until the time is over, or a stop; soak.csv grows meanwhile.

    Raises SoakFailure where the node ends.
    """
    start = time.monotonic()
    before, heard, cpu = start, watch.answered, _cpu_s(process)
    samples: list[Sample] = []
    with tqdm(total=round(seconds), unit="s", desc="soak", disable=None) as bar:
        while (now := time.monotonic()) - start < seconds and not stop.asked:
            watch.spin(min(SAMPLE_S, seconds - (now - start)))
            if not process.is_running():
                raise SoakFailure(f"the node ended after {time.monotonic() - start:.0f} s")
            now, used = time.monotonic(), _cpu_s(process)
            new = watch.latencies_ms[heard:]
            p50, p99 = np.percentile(new, (50, 99)) if new else (np.nan, np.nan)
            memory = process.memory_info()
            samples.append(
                Sample(
                    now - start, memory.rss / 1e6, (memory.rss - memory.shared) / 1e6, (used - cpu) / (now - before),
                    watch.sent, watch.answered, watch.lost, float(p50), float(p99), watch.status.get("state", "")
                )
            )  # fmt: skip
            bar.update(round(now - start) - bar.n)
            before, heard, cpu = now, watch.answered, used
            _write_rows(out, samples)
    return samples


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _about(args: argparse.Namespace, status: dict[str, str]) -> dict[str, Any]:
    """What was run on what, and what the node's own diagnostics said at last."""
    return {
        "bag": args.bag.name,
        "model": args.model.name,
        "engine": status.get("engine"),
        "cpu": cpu_name(),
        "machine_cores": os.cpu_count(),
        "cores_used": len(psutil.Process().cpu_affinity()),
        "system": platform.platform(),
        "diagnostics": {key: value for key, value in status.items() if key != "engine"},
    }  # fmt: skip


def _write(out: Path, result: dict[str, Any], samples: list[Sample]) -> None:
    """All files, each at once or not at all."""
    _write_rows(out, samples)
    write_json(out / "soak.json", result)
    try:
        from qdbev_ros.soak_plot import draw
    except ImportError:
        print("soak.png is left out: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    with whole_file(out / "soak.png") as temporary:
        draw(result, samples, temporary)


def _write_rows(out: Path, samples: list[Sample]) -> None:
    rows = "\n".join([Sample.header(), *(sample.row() for sample in samples)]) + "\n"
    write_text(out / "soak.csv", rows)


if __name__ == "__main__":
    sys.exit(main())
