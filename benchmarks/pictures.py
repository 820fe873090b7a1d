# SPDX-License-Identifier: Apache-2.0
"""What six 1600x900 pictures cost before they are normalised: JPEGs, and raw ones in two ways. All take turns.

Example: python -m benchmarks.pictures --variants nano tiny --turns 40
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from qdbev_ros.core.encodings import raw_picture
from qdbev_ros.core.files import write_json
from qdbev_ros.core.made_drive import HEIGHT, WIDTH, made_frame
from qdbev_ros.core.preprocess import decode_picture, resize_picture, shrink_raw
from qdbev_ros.core.variant import ImageSpec, load_variant

WAYS = ("JPEG", "raw rgb8, converted, then in one step", "raw rgb8, as the node")


def ways(image: ImageSpec, jpegs: Sequence[bytes]) -> dict[str, list[Callable[[], object]]]:
    """Way -> the work of each picture of a set."""
    full = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR) for jpeg in jpegs]
    raws = [cv2.cvtColor(picture, cv2.COLOR_BGR2RGB).tobytes() for picture in full]

    def jpeg(data: bytes) -> object:
        return resize_picture(decode_picture(data, WIDTH, HEIGHT, image), image)

    def converted(data: bytes) -> object:
        pixels = np.frombuffer(data, np.uint8).reshape(HEIGHT, WIDTH, 3)
        return resize_picture(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), image)  # type: ignore[arg-type]

    def as_the_node(data: bytes) -> object:
        return shrink_raw(raw_picture(data, WIDTH, HEIGHT, 3 * WIDTH, "rgb8"), image)

    works: list[tuple[Callable[[bytes], object], Sequence[bytes]]]
    works = [(jpeg, jpegs), (converted, raws), (as_the_node, raws)]
    return {
        way: [lambda work=work, data=data: work(data) for data in pictures]  # type: ignore[misc]
        for way, (work, pictures) in zip(WAYS, works, strict=True)
    }


def measure(name: str, threads: int, turns: int) -> dict[str, dict[str, list[float]]]:
    """Way -> milliseconds of a set by the clock, and of processor time of all threads, of each turn."""
    image = load_variant(name).image
    jpegs = [bytes(camera.picture) for camera in made_frame(0).cameras.values()]  # type: ignore[arg-type]
    jobs = ways(image, jpegs)
    found: dict[str, dict[str, list[float]]] = {way: {"clock": [], "cpu": []} for way in jobs}
    cv2.setNumThreads(0)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(turns):
            for way, works in jobs.items():
                begin, busy = time.perf_counter(), time.process_time()
                list(pool.map(lambda work: work(), works))
                found[way]["clock"].append((time.perf_counter() - begin) * 1e3)
                found[way]["cpu"].append((time.process_time() - busy) * 1e3)
    return found


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["nano", "tiny"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all milliseconds there")
    args = parser.parse_args(words)
    found = {name: measure(name, args.threads, args.turns) for name in args.variants}
    print("| variant | six pictures | ms | processor ms |\n|---|---|---|---|")
    for name, ways_found in found.items():
        for way, parts in ways_found.items():
            cells = [f"{statistics.median(part):.1f} [{min(part):.1f}]" for part in parts.values()]
            print(f"| {name} | {way} | {' | '.join(cells)} |")
    if args.json:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
