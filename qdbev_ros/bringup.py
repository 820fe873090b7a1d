# SPDX-License-Identifier: Apache-2.0
"""Which processes run, with which parameters: one description for `ros2 launch` and for machines without it.

Example: python -m qdbev_ros.bringup model:=demo/nano.qdbev bag:=demo/town.mcap record:=out/run.mcap
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from qdbev_ros.core.errors import ConfigError, QdbevError
from qdbev_ros.core.signals import on_stop
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.presets import TopicPreset, config_folder, is_file_name, load_preset

PACKAGE = "qdbev_ros"
DETECTOR = "qdbev_detector"
LINGER_S = 8.0  # the player's patience with each set that is still worked on
SHARED_MEMORY_MB = 256  # that camera images need; with less they go over UDP
STOP_S = (12.0, 4.0)  # how long a process may take after SIGINT, then after SIGTERM, before SIGKILL


@dataclass(frozen=True)
class Argument:
    """A launch argument; `choices` are the legal values where they are few."""

    name: str
    default: str
    text: str
    choices: tuple[str, ...] = ()


BOOLEAN = ("true", "false")
ARGUMENTS = (
    Argument("model", "", "path of the .qdbev package (required)"),
    Argument("bag", "", "bag to play: .mcap, .db3 or bag folder; empty: live cameras"),
    Argument("rate", "1.0", "speed of the bag"),
    Argument(
        "loop",
        "false",
        "play the bag again and again; endless: with stamps and a motion that go on instead of beginning anew",
        (*BOOLEAN, "endless"),
    ),
    Argument(
        "preset", "nuscenes", "topic and frame names: a preset of config/presets, or a remapping file (.yaml)"
    ),
    Argument(
        "calibration",
        "",
        "calibration file (.yaml) for cameras without CameraInfo or transforms; empty: none",
    ),
    Argument("params", "", "parameter file of the node; empty: config/detector.yaml"),
    Argument("engine", "", "inference engine; empty: as in the parameter file"),
    Argument(
        "queue_size",
        "",
        "sets that may wait for the engine; the bag then waits, too, so that every set is answered; empty: as in "
        "the parameter file, and the bag plays in real time",
    ),
    Argument(
        "rviz",
        "false",
        "show boxes, ground truth, images and transforms in rviz2; ticking Overlay there has the node draw it",
        BOOLEAN,
    ),
    Argument("record", "", "file to record results, transforms and annotations into, OUT.mcap; empty: none"),
    Argument("record_images", "false", "record the camera images, too", BOOLEAN),
    Argument("use_sim_time", "false", "take the time from the bag (/clock)", BOOLEAN),
)


@dataclass(frozen=True)
class Process:
    """One process. `parameters` win over `parameter_files`; where one ends that `ends_all`, the others end, too."""

    name: str  # of the node
    package: str
    executable: str
    parameters: dict[str, str | bool | int | float] = field(default_factory=dict)
    parameter_files: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    remappings: tuple[tuple[str, str], ...] = ()
    ends_all: bool = False


@dataclass(frozen=True)
class Bringup:
    """All processes, what they need in the environment, and warnings for the user."""

    processes: tuple[Process, ...]
    environment: dict[str, str]
    warnings: tuple[str, ...] = ()


def describe(given: Mapping[str, str], environment: Mapping[str, str] | None = None) -> Bringup:
    """What the launch arguments `given` ask for. Raises ConfigError that names the argument."""
    values = _checked(given)
    preset = load_preset(values["preset"])
    sim_time: dict[str, str | bool | int | float] = {"use_sim_time": values["use_sim_time"] == "true"}
    processes = [_detector(values, sim_time)]
    if values["record"]:
        topics = " ".join(recorded_topics(preset, images=values["record_images"] == "true"))
        # The recorder keeps to the wall clock: on a looped bag the bag's own time would go back in the file.
        # A replay is for its recording and can be had again; a vehicle needs its detector, whatever becomes of that.
        parameters: dict[str, str | bool | int | float] = {"output": values["record"], "topics": topics}
        ends_all = bool(values["bag"])
        processes.append(Process("qdbev_recorder", PACKAGE, "recorder_node", parameters, ends_all=ends_all))
    if values["bag"]:
        processes.append(_player(values, preset))
    if values["rviz"] == "true":
        processes.append(_rviz(preset, sim_time))
    extra, warnings = _transport(os.environ if environment is None else environment)
    return Bringup(tuple(processes), extra, warnings)


def recorded_topics(preset: TopicPreset, images: bool) -> list[str]:
    """What a recording holds: all results, and what it takes to judge and show them."""
    results = [f"/{DETECTOR}/{name}" for name in ("detections", "objects", "markers")]
    topics = [*results, "/diagnostics", "/tf", "/tf_static", preset.annotations, *preset.info_topics()]
    if preset.ego_motion == "odometry":
        topics.append(preset.odometry)
    topics = [topic for topic in topics if topic]
    return [*topics, *preset.image_topics()] if images else topics


def _checked(given: Mapping[str, str]) -> dict[str, str]:
    known = {argument.name: argument for argument in ARGUMENTS}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"no argument {name!r}; known: {', '.join(known)}")
        choices = known[name].choices
        if choices and value.lower() not in choices:
            raise ConfigError(f"argument {name} is {value!r}; use one of {', '.join(choices)}")
    values = {name: given.get(name, argument.default) for name, argument in known.items()}
    values |= {name: value.lower() for name, value in values.items() if known[name].choices}
    if not values["model"]:
        raise ConfigError("argument model is missing: give a package, e.g. model:=demo/nano.qdbev")
    if is_file_name(values["preset"]):
        values["preset"] = str(Path(values["preset"]).expanduser().absolute())
    for name in ("model", "bag", "params", "record", "calibration"):
        if values[name]:  # no shell replaces the tilde of model:=~/nano.qdbev
            values[name] = str(Path(values[name]).expanduser().absolute())
    for name in ("model", "bag", "params", "calibration"):
        if values[name] and not Path(values[name]).exists():
            raise ConfigError(f"argument {name}: {values[name]} doesn't exist")
    if values["record"] and not values["record"].endswith(".mcap"):
        raise ConfigError(f"argument record: {values['record']} is no name of an MCAP file: give OUT.mcap")
    for name, kind in (("rate", float), ("queue_size", int)):
        try:
            kind(values[name] or "0")
        except ValueError:
            raise ConfigError(f"argument {name} is {values[name]!r}, which is no number") from None
    return values


def _detector(values: dict[str, str], sim_time: dict[str, str | bool | int | float]) -> Process:
    parameters: dict[str, str | bool | int | float] = {
        "model": values["model"],
        "preset": values["preset"],
        **sim_time,
    }
    if values["calibration"]:
        parameters["calibration"] = values["calibration"]
    if values["engine"]:
        parameters["engine"] = values["engine"]
    if values["queue_size"]:
        parameters["queue_size"] = int(values["queue_size"])
    if values["bag"]:
        # A replay should answer every set, even on a slow machine; our player offers reliable images.
        parameters |= {"image_reliability": "reliable", "tf_timeout": 2.0, "sync_deadline": 0.8}
    file = values["params"] or str(config_folder() / "detector.yaml")
    return Process(DETECTOR, PACKAGE, "detector_node", parameters, (file,), ends_all=True)


def _player(values: dict[str, str], preset: TopicPreset) -> Process:
    answers = f"/{DETECTOR}/detections"
    # The recorder subscribes to each topic when it finds it: to that of the answers in time for the first one.
    wait_for = preset.image_topics()
    if values["record"]:
        wait_for += [topic for topic in (preset.annotations, answers) if topic]
    parameters: dict[str, str | bool | int | float] = {
        "bag": values["bag"],
        "preset": values["preset"],
        "rate": float(values["rate"]),
        "loop": values["loop"] != "false",
        "endless": values["loop"] == "endless",
        "clock": values["use_sim_time"] == "true",
        "wait_for": " ".join(wait_for),
        "answers": answers,
        "linger": LINGER_S,
        "max_ahead": int(values["queue_size"] or 0),
    }
    return Process("qdbev_bag_player", PACKAGE, "bag_player_node", parameters, ends_all=True)


def _rviz(preset: TopicPreset, sim_time: dict[str, str | bool | int | float]) -> Process:
    # RViz tells the transport from the last part of a topic's name: "compressed", or anything else for raw pictures.
    compressed = preset.image_type == "compressed"
    shown = "/{}/image_rect/compressed" if compressed else "/{}/image_rect"
    remappings = [(shown.format(camera), preset.image_topic(camera)) for camera in CAMERAS]
    if preset.annotations:
        remappings.append(("/annotations", preset.annotations))
    view = str(config_folder() / ("qdbev.rviz" if compressed else "qdbev_raw.rviz"))
    # With odometry nobody tells where the vehicle is in the fixed frame, and RViz would show nothing at all.
    frame = preset.base_frame if preset.ego_motion == "odometry" else preset.fixed_frame
    arguments = ("-d", view, "-f", frame)
    return Process("rviz2", "rviz2", "rviz2", sim_time, arguments=arguments, remappings=tuple(remappings))


def _transport(environment: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Fast DDS profile for large images unless the user has one, and a warning where shared memory is too small."""
    names = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")  # Humble and Jazzy; Kilted
    extra = {}
    if not any(environment.get(name) for name in names):
        extra = dict.fromkeys(names, str(config_folder() / "fastdds_shm.xml"))
    try:
        statistics = os.statvfs("/dev/shm")
    except OSError:
        return extra, ("there is no /dev/shm: images go over UDP, raw ones will get lost",)
    megabytes = statistics.f_frsize * statistics.f_blocks // 2**20
    if megabytes >= SHARED_MEMORY_MB:
        return extra, ()
    text = f"/dev/shm has {megabytes} MB, less than {SHARED_MEMORY_MB}: images go over UDP, raw ones will get lost"
    return extra, (text + " (docker run --shm-size=1g)",)


def command(process: Process, folder: Path) -> list[str]:
    """The command line of a process without `ros2`; its parameters go to a file in `folder`."""
    if process.package != PACKAGE:
        program = shutil.which(process.executable)
        if program is None:
            raise ConfigError(f"{process.executable} is not installed: leave rviz:=true out")
        start = [program, *process.arguments]
    else:
        start = [sys.executable, "-m", f"{PACKAGE}.{process.executable}", *process.arguments]
    # Under the node's own name: a parameter file's section of that name would win over a bare -p. With the slash it
    # is a section of its own that comes last, wherever the files have theirs.
    overrides = folder / f"{process.name}.yaml"
    overrides.write_text(yaml.safe_dump({f"/{process.name}": {"ros__parameters": process.parameters}}))
    files = [item for path in (*process.parameter_files, str(overrides)) for item in ("--params-file", path)]
    names = (("__node", process.name), *process.remappings)
    remaps = [item for old, new in names for item in ("-r", f"{old}:={new}")]
    return [*start, "--ros-args", *remaps, *files]


def loss(process: Process, code: int) -> str:
    """What is told where a process ended that does not end all."""
    how = f"failed with exit code {code}, see its line above" if code else "ended"
    return f"{process.name} {how}: the detector goes on without it"


def run(bringup: Bringup) -> int:
    """Starts everything; ends it on a signal, or with a process that ends all. The first failure's exit code, or 0."""
    stop = False

    def request_stop(*_: object) -> None:
        nonlocal stop
        stop = True

    on_stop(request_stop)
    for warning in bringup.warnings:
        print(f"bringup: warning: {warning}", file=sys.stderr, flush=True)
    environment = os.environ | bringup.environment
    with tempfile.TemporaryDirectory(prefix="qdbev-") as folder:
        commands = [command(process, Path(folder)) for process in bringup.processes]
        # Sessions of their own: what the terminal sends reaches this process, which passes it on once.
        running = [subprocess.Popen(line, env=environment, start_new_session=True) for line in commands]
        try:
            ended = _watch(bringup.processes, running, lambda: stop)
        finally:
            _stop(running)
    # Ended by our own signals is no failure; killed because it would not end, or a complaint, is.
    forced = [process.returncode for process in running]
    forced = [code for code in forced if code not in (-signal.SIGINT, -signal.SIGTERM)]
    code = next((code for code in [*ended, *forced] if code), 0)
    return code if code >= 0 else 128 - code


def _watch(
    processes: Sequence[Process], running: Sequence[subprocess.Popen[bytes]], stopped: Callable[[], bool]
) -> list[int]:
    """Until a stop, or the end of a process that ends all; the codes of those that ended by themselves, in order."""
    codes: dict[str, int] = {}
    while not stopped():
        for process, started in zip(processes, running):
            code = started.poll()
            if code is None or process.name in codes:
                continue
            codes[process.name] = code
            if process.ends_all:
                return list(codes.values())
            print(f"bringup: warning: {loss(process, code)}", file=sys.stderr, flush=True)
        time.sleep(0.05)
    return list(codes.values())


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGINT, and stronger signals for what does not end in time."""
    for number, patience in ((signal.SIGINT, STOP_S[0]), (signal.SIGTERM, STOP_S[1]), (signal.SIGKILL, 5.0)):
        for process in running:
            if process.poll() is None:
                process.send_signal(number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(process.poll() is None for process in running):
            time.sleep(0.02)


def parse(words: Sequence[str]) -> dict[str, str]:
    """`name:=value` words as a mapping. Raises ConfigError for anything else."""
    given = {}
    for word in words:
        name, separator, value = word.partition(":=")
        if not separator:
            raise ConfigError(f"{word!r} is no argument: write name:=value; --show-args lists the names")
        given[name] = value
    return given


def show_arguments() -> str:
    """The arguments with defaults and texts, as `ros2 launch --show-args` prints them."""
    lines = []
    for argument in ARGUMENTS:
        default = f"default: {argument.default!r}" if argument.default else "no default"
        legal = f", one of {', '.join(argument.choices)}" if argument.choices else ""
        lines.append(f"{argument.name}:={'...':4} {argument.text} ({default}{legal})")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or {"-h", "--help", "--show-args"} & set(words):
        print(f"{(__doc__ or '').strip()}\n\n{show_arguments()}")
        return 0
    try:
        return run(describe(parse(words)))
    except QdbevError as error:
        print(f"bringup: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
