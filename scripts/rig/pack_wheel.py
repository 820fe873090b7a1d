# SPDX-License-Identifier: Apache-2.0
"""pack_wheel.py PREFIX OUT: packs ROS message packages, installed to PREFIX by CMake, into one wheel in folder OUT.

Only what rclpy needs at run time goes in: Python modules, shared libraries, definitions and the ament index, no headers
and no CMake files. Libraries and the index go to the environment's own lib/ and share/.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

NAME, VERSION = "qdbev_ros_messages", "0.1.0"
DEFINITIONS = {".msg", ".idl", ".json"}
LONG_AGO = (2024, 1, 1, 0, 0, 0)  # the same content gives the same wheel


def runtime_files(prefix: Path) -> Iterator[tuple[str, Path]]:
    """(name in the wheel, file) of everything that is needed at run time."""
    site = prefix / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for path in sorted(p for p in prefix.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        relative = path.relative_to(prefix)
        if path.is_relative_to(site):
            if path.suffix != ".c" and not any(part.endswith(".egg-info") for part in relative.parts):
                yield path.relative_to(site).as_posix(), path
            continue
        in_index = (
            relative.parts[:2] == ("share", "ament_index") and "parent_prefix_path" not in relative.parts
        )
        defines = relative.parts[0] == "share" and (path.suffix in DEFINITIONS or path.name == "package.xml")
        if in_index or defines or (relative.parts[0] == "lib" and path.suffix == ".so"):
            yield f"{NAME}-{VERSION}.data/data/{relative.as_posix()}", path


def pack(prefix: Path, out: Path) -> Path:
    """Writes the wheel and returns its path."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tag = f"{python}-{python}-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    info = f"{NAME}-{VERSION}.dist-info"
    members = {name: path.read_bytes() for name, path in runtime_files(prefix)}
    members[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode()
    members[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    record = "".join(f"{name},{_digest(data)},{len(data)}\n" for name, data in members.items())
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()

    out.mkdir(parents=True, exist_ok=True)
    wheel = out / f"{NAME}-{VERSION}-{tag}.whl"
    unfinished = wheel.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(unfinished, "w") as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            archive.writestr(entry, data)
    os.replace(unfinished, wheel)
    return wheel


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2])))
