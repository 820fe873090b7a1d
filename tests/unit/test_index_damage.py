# SPDX-License-Identifier: Apache-2.0
"""Tables read in blocks, and damaged ones: whatever is wrong, one line says where."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdbev_ros.core.errors import DataError
from qdbev_train.data import json_tables
from qdbev_train.data.json_tables import Tables
from qdbev_train.data.tables import all_frames, load_scenes
from tests.small_dataset import VERSION

TABLES = [
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
]
IN_ONE_TEST = [HealthCheck.function_scoped_fixture]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=8,
)
# Texts with what looks like the end of a record, records within records: all that a cut could stumble over.
tricky = st.text(alphabet='{},[]" \n\\ab', max_size=12)
tricky_records = st.lists(
    st.dictionaries(
        st.text(max_size=3),
        tricky | st.lists(st.dictionaries(tricky, tricky, max_size=2), max_size=3),
        max_size=3,
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=IN_ONE_TEST)
@given(records=tricky_records, block=st.integers(1, 80), indent=st.sampled_from([None, 0, 2]))
def test_a_table_read_in_blocks_is_the_table(
    tmp_path: Path, records: list[Any], block: int, indent: int | None
) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(records, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_tables, "BLOCK", block)
        bytes_read: list[int] = []
        found = [r for part in Tables(tmp_path, bytes_read.append).stream("table") for r in part]
    assert found == records
    assert sum(bytes_read) == path.stat().st_size


def test_a_large_table_comes_in_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_tables, "BLOCK", 1000)
    (tmp_path / "table.json").write_text(json.dumps([{"token": str(i), "n": [i, i]} for i in range(1000)]))
    parts = list(Tables(tmp_path).stream("table"))
    assert [r["token"] for part in parts for r in part] == [str(i) for i in range(1000)]
    assert max(map(len, parts)) < 100


@settings(max_examples=100, deadline=None, suppress_health_check=IN_ONE_TEST)
@given(share=st.floats(0, 1, exclude_max=True), block=st.sampled_from([50, 200, 1 << 20]))
def test_a_table_cut_off_anywhere_is_refused(
    small_root: Path, tmp_path: Path, share: float, block: int
) -> None:
    content = (small_root / VERSION / "sample.json").read_bytes()
    path = tmp_path / "sample.json"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_tables, "BLOCK", block)
        with pytest.raises(DataError, match=r"sample\.json: not JSON: .* at byte \d+$") as caught:
            list(Tables(tmp_path).stream("sample"))
    assert int(str(caught.value).rsplit(" ", 1)[1]) <= path.stat().st_size


@pytest.mark.parametrize("text", ["{}", '{"a": [{}, {}]}', "3", "null"])
def test_json_that_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(DataError, match=r"sample\.json: a table must be a list of records"):
        list(Tables(tmp_path).stream("sample"))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'[{"token": "\xff"}]', b"\x00", b'[{"a": 1} {"a": 2}]'])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sample.json").write_bytes(content)
    with pytest.raises(DataError, match=r"sample\.json: not JSON: ") as caught:
        list(Tables(tmp_path).stream("sample"))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def original(small_root: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: json.loads((small_root / VERSION / f"{name}.json").read_text()) for name in TABLES}


@pytest.fixture(scope="module")
def copy(small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tables; each test leaves them as they were."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(small_root / VERSION, root / VERSION)
    return root


def loaded_with(root: Path, table: str, records: Any) -> list[Any] | DataError:
    """All frames with another content of one table, or the error."""
    path = root / VERSION / f"{table}.json"
    before = path.read_text()
    path.write_text(json.dumps(records))
    try:
        return list(all_frames(load_scenes(root, VERSION)))
    except DataError as error:
        return error
    finally:
        path.write_text(before)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_one_clear_line_or_none(
    original: dict[str, list[dict[str, Any]]], copy: Path, data: st.DataObject
) -> None:
    """A record or a field goes, comes twice or becomes something else: frames that can be used, or a DataError."""
    table = data.draw(st.sampled_from(TABLES))
    records: list[Any] = [dict(record) for record in original[table]]
    row = data.draw(st.integers(0, len(records) - 1))
    field = data.draw(st.sampled_from(sorted(records[row])))
    damage = data.draw(
        st.sampled_from(["value", "value", "field", "record", "twice", "other record", "number"])
    )
    if damage == "value":
        records[row][field] = data.draw(json_values)
    elif damage == "field":
        del records[row][field]
    elif damage == "record":
        del records[row]
    elif damage == "twice":
        records.append(records[row])
    elif damage == "other record":
        records[row] = data.draw(json_values)
    elif isinstance(records[row][field], list) and records[row][field]:
        records[row][field] = [*records[row][field][:-1], data.draw(json_values)]
    outcome = loaded_with(copy, table, records)
    if isinstance(outcome, DataError):
        assert "\n" not in str(outcome)
        assert f"{table}.json" in str(outcome) or ".json: " in str(outcome)
    else:
        assert len(outcome) == 8
        assert all(math.isfinite(x) for f in outcome for x in f.annotations.boxes.centers.ravel())


def change(row: int, **fields: Any) -> Callable[[list[Any]], Any]:
    return lambda records: records[row].update(fields)


@pytest.mark.parametrize(
    ("table", "edit", "named"),
    [
        ("sample", lambda r: r.append(dict(r[0])), "sample.json: two records with the token 'scene-0103-0'"),
        (
            "ego_pose",
            lambda r: r.append(dict(r[0])),
            "ego_pose.json: two records with the token 'scene-0103-0-L",
        ),
        (
            "sample_annotation",
            lambda r: r.append(dict(r[0])),
            "sample_annotation.json: two records with the token 'scene-0103-object0-0'",
        ),
        (
            "sample_data",
            lambda r: r.append(r[1] | {"token": "again"}),
            "sample_data.json: sample scene-0103-0 has two CAM_FRONT key frames, the second is again",
        ),
        ("sample_data", change(1, is_key_frame=False), "sample scene-0103-0 has no CAM_FRONT key frame"),
        (
            "sample",
            change(1, next=""),
            "scene scene-0103 ends after 2 of its 4 samples, at sample scene-0103-1",
        ),
        ("sample", change(1, timestamp=0), "sample scene-0103-1 isn't later than the sample before it"),
        ("scene", change(0, nbr_samples=0), "scene scene-0103 goes on after its 0 samples"),
        ("scene", change(0, name="scene-0916"), "scene.json: two scenes have the name 'scene-0916'"),
        ("scene", lambda r: r.pop(), "sample.json: sample scene-0916-0 is in no scene's chain"),
        (
            "sample_data",
            change(3, sample_token="lost"),
            "sample.json: no record 'lost', which sample_data scene-0103-0-CAM_FRONT_LEFT refers to",
        ),
        (
            "sample_annotation",
            change(2, sample_token="lost"),
            "sample.json: no record 'lost', which sample_annotation scene-0103-object0-2 refers to",
        ),
        (
            "sample_annotation",
            change(2, attribute_tokens=["lost"]),
            "attribute.json: no record 'lost', which sample_annotation scene-0103-object0-2 refers to",
        ),
        (
            "sample_annotation",
            change(2, next="lost"),
            "sample_annotation.json: no record 'lost', which sample_annotation scene-0103-object0-2 refers to",
        ),
        (
            "calibrated_sensor",
            change(2, sensor_token="lost"),
            "sensor.json: no record 'lost', which calibrated_sensor CAM_FRONT_RIGHT refers to",
        ),
        (
            "ego_pose",
            change(1, rotation=[1, 0, 0]),
            "ego_pose.json: record scene-0103-0-CAM_FRONT: 'rotation' is not a list of 4 finite numbers",
        ),
        (
            "ego_pose",
            change(1, rotation=[2, 0, 0, 0]),
            "ego_pose.json: record scene-0103-0-CAM_FRONT: 'rotation' is not a unit quaternion",
        ),
        (
            "sample_annotation",
            change(1, size=[0, 1, 1]),
            "sample_annotation.json: record scene-0103-object0-1: 'size' is not positive",
        ),
        (
            "sample_data",
            change(1, width="wide"),
            "record scene-0103-0-CAM_FRONT: 'width' is not a whole number",
        ),
        (
            "sample_data",
            change(1, width=0),
            "calibrated_sensor.json: record CAM_FRONT: camera CAM_FRONT: picture",
        ),
        (
            "calibrated_sensor",
            change(1, camera_intrinsic=[]),
            "calibrated_sensor.json: record CAM_FRONT: 'camera_intrinsic' is not 3 rows of 3 numbers",
        ),
        (
            "scene",
            change(0, name="a\nb"),
            "scene.json: record scene-0103: 'name' holds a character that cannot be pr",
        ),
        (
            "sample",
            change(0, token="a\nb"),
            "sample.json: record .*: 'token' holds a character that cannot be printed",
        ),
        ("sensor", lambda r: r[0].pop("token"), "sensor.json: record .*: no field 'token'"),
    ],
)
def test_damage_is_named(
    original: dict[str, list[dict[str, Any]]], copy: Path, table: str, edit: Callable[[Any], Any], named: str
) -> None:
    records = [dict(record) for record in original[table]]
    edit(records)
    outcome = loaded_with(copy, table, records)
    assert isinstance(outcome, DataError)
    assert outcome.args[0].startswith(str(copy / VERSION))
    with pytest.raises(DataError, match=named):
        raise outcome


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "not a CAN bus pose file"),
        ("[]", "no messages"),
        ('[{"utime": 1}]', "'accel'"),
        (
            '[{"utime": 1, "accel": [1, 2], "rotation_rate": [1, 2, 3], "vel": [1, 2, 3]}]',
            "'accel' is not a list of 3",
        ),
        ("[", "not a CAN bus pose file"),
    ],
)
def test_a_damaged_can_bus_file_is_named(small_root: Path, tmp_path: Path, text: str, named: str) -> None:
    shutil.copytree(small_root / VERSION, tmp_path / VERSION)
    (tmp_path / "can_bus").mkdir()
    (tmp_path / "can_bus" / "scene-0103_pose.json").write_text(text)
    with pytest.raises(DataError, match=rf"scene-0103_pose\.json: .*{named}"):
        load_scenes(tmp_path, VERSION)


@pytest.mark.parametrize("text", ["[]", "{", '{"evening": 3}'])
def test_damaged_splits_are_named(small_root: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(small_root / VERSION, tmp_path / VERSION)
    (tmp_path / VERSION / "splits.json").write_text(text)
    with pytest.raises(DataError, match=r"splits\.json"):
        load_scenes(tmp_path, VERSION, split="evening")
