# SPDX-License-Identifier: Apache-2.0
"""How every node of this package starts, stops and fails."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from qdbev_ros.core.errors import ConfigError, QdbevError, install_hint, one_line
from qdbev_ros.core.signals import on_stop


class ManagedNode(Protocol):
    """A node with an orderly end: `finished` ends it, `idle` says that nothing is under way any more."""

    grace_s: float  # how long to wait for `idle` after a stop

    @property
    def node(self) -> Node: ...
    def finished(self) -> bool: ...
    def idle(self) -> bool: ...
    def close(self) -> None: ...


class NodeLog(logging.Handler):
    """Python's log of this project as a node's: what takes long at a start, what is not kept."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._log = node.get_logger()
        log = logging.getLogger("qdbev_ros")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._log.warning(text)  # rclpy allows each line of code one severity
        else:
            self._log.info(text)


def run(name: str, make: Callable[[], ManagedNode]) -> int:
    """Runs a node until it is finished or a signal; exit code 0, or 2 where the user must mend something.

    Packages that may be missing are imported where `make` is called, not with the node's module.
    """
    stop = threading.Event()
    started = threading.Event()

    def end(*_: object) -> None:
        stop.set()
        if not started.is_set():  # nothing to finish yet: loading a model need not be waited for
            raise KeyboardInterrupt

    on_stop(end)
    try:
        _init()
        managed = make()
        started.set()
        try:
            _spin(managed, stop)
        finally:
            managed.close()
            managed.node.destroy_node()
    except QdbevError as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        return 2
    except ImportError as error:
        print(f"{name}: error: {install_hint(error)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped while starting", file=sys.stderr, flush=True)
    finally:
        rclpy.try_shutdown()
    return 0


def _spin(managed: ManagedNode, stop: threading.Event) -> None:
    """Until a stop or the node's own end; then for as long as something is under way, within its grace."""
    executor = SingleThreadedExecutor()
    executor.add_node(managed.node)
    try:
        while not stop.is_set() and not managed.finished():
            executor.spin_once(timeout_sec=0.05)
        deadline = time.monotonic() + managed.grace_s
        while not managed.idle() and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.05)
    finally:
        executor.shutdown()


def _init() -> None:
    """Starts rclpy without its own signal handlers: they invalidate the context while a message is taken."""
    try:
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # rcl's, for --ros-args that it cannot parse
        raise ConfigError(one_line(error)) from error
