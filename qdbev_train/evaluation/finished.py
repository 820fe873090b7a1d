# SPDX-License-Identifier: Apache-2.0
"""Detections of the scenes that an evaluation has finished, kept beside its result file until that one is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.files import write_text
from qdbev_train.evaluation.results import Entry


class FinishedScenes:
    """Result entries by scene and sample token, in RESULTS.scenes: a line for the run, then a line for each scene.

    `run` says what is evaluated; a file of another run is refused, a last line that was cut off is done again.
    """

    def __init__(self, results: Path, run: Mapping[str, str]) -> None:
        self.path = results.with_name(results.name + ".scenes")
        before, self.scenes = self._read(dict(run))
        if before != run:
            other = ", ".join(key for key in {**run, **before} if before.get(key) != run.get(key))
            raise DataError(
                f"{self.path}: an unfinished evaluation of another {other}; remove it or go on with that"
            )
        kept = [{"scene": name, "results": results} for name, results in self.scenes.items()]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in [before, *kept]))

    def add(self, scene: str, results: dict[str, list[Entry]]) -> None:
        """Keeps a finished scene."""
        self.scenes[scene] = results
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"scene": scene, "results": results}) + "\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}") from error

    def remove(self) -> None:
        """Everything is in the result file now."""
        self.path.unlink()

    def _read(self, run: dict[str, str]) -> tuple[dict[str, str], dict[str, dict[str, list[Entry]]]]:
        """What was evaluated and its finished scenes; `run` and none where there is no file."""
        try:
            texts = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
            # A line without its end was being written when the run was killed.
            first, *others = [json.loads(text) for text in texts if text.endswith("\n")] or [run]
            return {**first}, {line["scene"]: line["results"] for line in others}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: damaged; remove it to begin anew") from error
