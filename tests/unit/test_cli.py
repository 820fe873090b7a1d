# SPDX-License-Identifier: Apache-2.0
"""The `qdbev` command itself: help, exit codes, and that it stays light."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qdbev_ros.core.errors import DataError
from qdbev_train import cli

ROOT = Path(cli.__file__).resolve().parents[1]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def run_as(monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], Any]) -> int:
    """Exit code of a subcommand that does `work`."""
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=work)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    return cli.main([])


def test_every_command_shows_an_example() -> None:
    commands = subcommands()
    wanted = {"synth", "train", "compress", "export", "inspect", "eval", "score", "bag"}
    assert wanted | {"import-bevformer", "export-bevformer"} <= set(commands)
    for name, parser in commands.items():
        assert f"qdbev {name}" in (parser.epilog or ""), name


def test_every_command_explains_its_arguments() -> None:
    for name, parser in subcommands().items():
        assert parser.format_help().startswith(f"usage: qdbev {name}")


def test_commands_that_yield_numbers_write_them_as_json() -> None:
    for name in ("eval", "score", "inspect", "import-bevformer", "export-bevformer"):
        assert "--json" in subcommands()[name].format_help()


def test_the_command_line_needs_neither_torch_nor_ros_nor_the_devkit() -> None:
    code = (
        "import sys; from qdbev_train.cli import build_parser; build_parser();"
        "print(sorted({'torch', 'rclpy', 'nuscenes', 'cv2', 'onnx', 'rosbags', 'pyvista'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bad_input_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: Any) -> int:
        raise DataError("table.json: no record 'x'")

    assert run_as(monkeypatch, work) == 2
    assert capsys.readouterr().err == "qdbev: error: table.json: no record 'x'\n"


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: Any) -> int:
        raise KeyboardInterrupt

    assert run_as(monkeypatch, work) == 130


def test_a_missing_package_is_one_line_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: Any) -> None:
        import_module("rosbags_is_not_installed")

    assert run_as(monkeypatch, work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rosbags_is_not_installed" in line
    assert "pip install -r requirements/node.txt" in line


def test_a_full_disk_is_one_line_with_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/scene.json")

    assert run_as(monkeypatch, work) == 2
    assert capsys.readouterr().err == "qdbev: error: No space left on device: out/scene.json\n"


def test_a_defect_of_ours_is_not_hidden_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: Any) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_as(monkeypatch, work)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["bag"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
