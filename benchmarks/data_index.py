# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the data index on tables as large as nuScenes' trainval.

Writes the tables of one scene over and over with new tokens into a temporary folder (about 2.5 GB for the default, gone
afterwards; sweeps included, pictures not), and measures in processes of their own: building the index, opening it,
workers that read random frames at the same time, and, on a tenth of the scenes, opening with nuscenes-devkit.

example: python benchmarks/data_index.py --json out/data_index.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qdbev_ros.core.files import write_json

VERSION = "v1.0-trainval"
SWEEPS = 10  # readings between two key frames of a channel: 77 records a sample in all, as in nuScenes
SHARED = ("category", "attribute", "visibility", "sensor", "log", "map")
PER_SCENE = (
    "scene",
    "sample",
    "sample_data",
    "ego_pose",
    "calibrated_sensor",
    "instance",
    "sample_annotation",
)
MARK, NAME = "@@@@@@@@", "scene-@@@@"  # stand for what differs between the copies of the scene

BUILD = """
from qdbev_train.data.index import open_index
open_index(Path(sys.argv[1]), "v1.0-trainval")
"""
OPEN = """
from qdbev_train.data.tables import load_scenes
begin, cpu = time.monotonic(), time.process_time()
scenes = load_scenes(Path(sys.argv[1]), "v1.0-trainval")
times = {"seconds": time.monotonic() - begin, "seconds_cpu": time.process_time() - cpu}
print(json.dumps(times | {"samples": sum(map(len, scenes.values()))}))
"""
WORKER = """
from qdbev_train.data.tables import all_frames, load_scenes
frames = all_frames(load_scenes(Path(sys.argv[1]), "v1.0-trainval"))
memory = lambda: {k: int(v.split()[0]) / 1e3 for k, v in
                  (l.split(":") for l in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])}
before = memory()
rng = np.random.default_rng(os.getpid())
begin = time.process_time()
for row in rng.integers(len(frames), size=2000):
    frames[int(row)]
seconds = time.process_time() - begin
print("done", flush=True)
sys.stdin.readline()  # until all have read: what they share is told apart from what each has for itself
after = memory()
print(json.dumps({"cpu_ms_per_frame": seconds / 2, "rss_MB": after["Rss"], "pss_MB": after["Pss"],
                  "own_MB": after["Private_Dirty"], "own_before_MB": before["Private_Dirty"]}))
"""
DEVKIT = """
from nuscenes import NuScenes
begin, cpu = time.monotonic(), time.process_time()
NuScenes("v1.0-trainval", sys.argv[1], verbose=False)
print(json.dumps({"seconds": time.monotonic() - begin, "seconds_cpu": time.process_time() - cpu}))
"""
IMPORTS = "import json, os, sys, time\nfrom pathlib import Path\nimport numpy as np\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=Path("demo/town"), help="data set with one scene")
    parser.add_argument("--version", default="v1.0-mini", help="its tables (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=34149, help="at least so many (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    if not (args.source / args.version / "scene.json").is_file():
        parser.error(f"{args.source / args.version}: no tables here")
    scene = {
        name: json.loads((args.source / args.version / f"{name}.json").read_bytes()) for name in PER_SCENE
    }
    shared = {name: (args.source / args.version / f"{name}.json").read_bytes() for name in SHARED}
    copies = -(-args.samples // len(scene["sample"]))
    with tempfile.TemporaryDirectory() as folder:
        full, tenth = Path(folder) / "full", Path(folder) / "tenth"
        tables = write_tables(args.source, full, scene, shared, copies)
        write_tables(args.source, tenth, scene, shared, copies // 10)
        numbers: dict[str, Any] = {
            "tables": tables,
            "build": measure(BUILD, full),
            "open": measure(OPEN, full),
        }
        for count in (1, 2, 4):
            numbers[f"workers_{count}"] = workers(full, count)
        numbers["devkit_on_a_tenth"] = measure(DEVKIT, tenth)
        numbers["build_of_a_tenth"] = measure(BUILD, tenth)
        numbers["index_MB"] = megabytes(full / VERSION / "qdbev_index")
    print(json.dumps(numbers, indent=2))
    if args.json:
        write_json(args.json, numbers)


def write_tables(
    source: Path, root: Path, scene: dict[str, list[Any]], shared: dict[str, bytes], copies: int
) -> dict[str, Any]:
    """Tables with the scene `copies` times, a field a line as nuScenes' own; returns their sizes in records and MB."""
    folder = root / VERSION
    folder.mkdir(parents=True)
    shutil.copytree(source / "maps", root / "maps")  # the devkit wants them
    (root / "can_bus").mkdir()
    can_bus = (source / "can_bus" / f"{scene['scene'][0]['name']}_pose.json").resolve()
    for copy in range(copies):
        (root / "can_bus" / f"scene-{copy:04d}_pose.json").symlink_to(can_bus)
    for name, content in shared.items():
        (folder / f"{name}.json").write_bytes(content)
    template = template_of(scene)
    for name, records in template.items():
        text = json.dumps(records, indent=0)[1:-1].strip()
        with (folder / f"{name}.json").open("w") as file:
            for copy in tqdm(range(copies), desc=f"write {name}", leave=False, disable=None):
                file.write(",\n" if copy else "[\n")
                file.write(text.replace(MARK, f"{copy:08x}").replace(NAME, f"scene-{copy:04d}"))
            file.write("\n]\n")
    counts = {name: len(records) * copies for name, records in template.items()}
    return {"records": counts, "MB": megabytes(folder)}


def template_of(scene: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The scene's records with MARK at the start of every token of theirs and NAME for the scene's name, and sweeps."""
    name = scene["scene"][0]["name"]
    own = {record["token"] for records in scene.values() for record in records}

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(v) for key, v in value.items()}
        if isinstance(value, str):
            return MARK + value[8:] if value in own else value.replace(name, NAME)
        return value

    template = {table: [marked(record) for record in records] for table, records in scene.items()}
    poses = {pose["token"]: pose for pose in template["ego_pose"]}
    for reading in list(template["sample_data"]):
        for sweep in range(SWEEPS):
            token = f"{reading['token'][:28]}{sweep:04x}"
            link = {"token": token, "ego_pose_token": token}
            template["sample_data"].append(reading | link | {"is_key_frame": False})
            template["ego_pose"].append(poses[reading["ego_pose_token"]] | {"token": token})
    return template


def measure(code: str, root: Path) -> dict[str, Any]:
    """Runs `code` in a process of its own: what it prints, with its time and peak memory."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS + code, str(root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("a measurement failed")
    result: dict[str, Any] = json.loads(printed) if printed else {}
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": time.monotonic() - begin, "cpu_s": cpu, "peak_MB": usage.ru_maxrss / 1e3} | result


def workers(root: Path, count: int) -> list[dict[str, float]]:
    """`count` processes that read random frames; each one's memory when all are done."""
    command = [sys.executable, "-c", IMPORTS + WORKER, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    for process in processes:
        process.stdout.readline()
    time.sleep(0.2)
    return [json.loads(process.communicate("\n")[0]) for process in processes]


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
