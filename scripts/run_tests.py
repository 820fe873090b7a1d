# SPDX-License-Identifier: Apache-2.0
"""run_tests.py [PYTEST ARGUMENTS]: runs every lane of tests by itself and ends with one line of counts.

A lane is a folder below tests/. Each has a pytest of its own: a crash of one (DDS, CUDA) leaves the others alone, and
torch stays out of the lanes that must do without. What failed runs once more, by itself: machines that are shared with
others now and then make a test too late. What passes then is counted, and named as unsteady.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANES = {
    "unit": [],
    "train": ["-n", "auto"],  # seconds of CPU per test: worth more than one process
    "ros": [],  # one graph at a time: two would share topics and the CPU that the timing needs
    "gpu": [],
}
NO_TESTS = 5  # pytest's exit code when nothing was collected


@dataclass(frozen=True)
class LaneResult:
    """What came of one lane; `reasons` counts why tests were skipped, `failures` has a line for each that failed,
    `unsteady` one for each that passed at the second try."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    reasons: Counter[str]
    failures: tuple[str, ...] = ()
    unsteady: tuple[str, ...] = ()
    crashed: bool = False  # pytest itself ended badly

    def line(self) -> str:
        """One line of the summary."""
        if not self.passed + self.failed + self.skipped:
            return f"{self.name:6} no tests"
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        why = "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
        return f"{self.name:6} {counts} in {self.seconds:.0f} s" + (f" (skipped: {why})" if why else "")


def read_report(name: str, report: Path, exit_code: int, seconds: float) -> LaneResult:
    """Counts from a JUnit report. Without one, or with an exit code that it doesn't explain, something failed."""
    passed = failed = skipped = 0
    reasons: Counter[str] = Counter()
    failures: list[str] = []
    crashed = False
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            skip = case.find("skipped")
            problems = [*case.findall("failure"), *case.findall("error")]
            if problems:
                failed += 1
                message = " ".join((problems[0].get("message") or "").split())
                failures.append(f"{case.get('classname')}::{case.get('name')}: {message[:300]}")
            elif skip is not None:
                skipped += 1
                reasons[skip.get("message") or "no reason given"] += 1
            else:
                passed += 1
    if exit_code not in (0, NO_TESTS) and not failed:
        failed = 1
        failures.append(f"{name}: pytest ended with exit code {exit_code}")
        crashed = True
    return LaneResult(name, passed, failed, skipped, seconds, reasons, tuple(failures), crashed=crashed)


def run_lane(name: str, arguments: list[str]) -> LaneResult:
    """Runs pytest over tests/NAME with its output on the terminal, and what failed once more."""
    print(f"\n=== {name}", flush=True)
    first = _run_pytest(name, [*LANES[name], *arguments])
    if not first.failures or first.crashed:
        return first
    print(f"\n=== {name}: what failed, once more", flush=True)
    again = _run_pytest(name, ["--last-failed", "--last-failed-no-failures", "none", *arguments])
    if again.passed + again.failed != first.failed:
        return first
    still = {line.split(": ")[0] for line in again.failures}
    return replace(
        again,
        passed=first.passed + again.passed,
        skipped=first.skipped,
        seconds=first.seconds + again.seconds,
        reasons=first.reasons,
        unsteady=tuple(line for line in first.failures if line.split(": ")[0] not in still),
    )


def _run_pytest(name: str, arguments: list[str]) -> LaneResult:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/{name}", "-q", "-rs", f"--junitxml={report}"]
        started = time.monotonic()
        done = subprocess.run([*command, *arguments], cwd=ROOT, check=False)
        return read_report(name, report, done.returncode, time.monotonic() - started)


def main() -> int:
    """Runs all lanes; 1 if any test failed."""
    # Threads of torch and OpenCV on top of one process per core only get into each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lanes = [name for name in LANES if (ROOT / "tests" / name).is_dir()]
    results = [run_lane(name, sys.argv[1:]) for name in lanes]
    print("\n=== lanes")
    for result in results:
        print(result.line())
        for kind, lines in (("FAILED", result.failures), ("unsteady", result.unsteady)):
            for line in lines:
                print(f"  {kind} {line}")
    passed, failed, skipped = (
        sum(getattr(r, key) for r in results) for key in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
