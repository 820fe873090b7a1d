# SPDX-License-Identifier: Apache-2.0
"""What is no released BEVFormer checkpoint is refused in one line that says why, and nothing in it is ever run."""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qdbev_ros.core.errors import QdbevError
from qdbev_ros.core.variant import CLASSES, load_variant
from qdbev_train.checkpoint import save_model, write_tensors
from qdbev_train.quantization import QuantConfig
from qdbev_train.released.detection import expected_state, fitting_variant
from tests.model_samples import small_model
from tests.released_samples import (
    COMPRESS,
    TRAIN,
    mmcv_content,
    refusal,
    run,
    write_config,
    write_sample_variant,
)


@pytest.fixture(scope="module")
def sample_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_variant(tmp_path_factory.mktemp("variant"))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(small_model(seed=3).state_dict())


@pytest.mark.parametrize(("name", "given"), [("small", "tiny"), ("base", "small"), ("tiny", "nano")])
def test_another_variant_than_given_is_named(name: str, given: str) -> None:
    state = dict(expected_state(load_variant(name)))
    with pytest.raises(
        QdbevError, match=rf"a\.pth: looks like {name}, not {given}; give --variant {name} or none"
    ):
        fitting_variant("a.pth", state, given, False)
    del state["pts_bbox_head.code_weights"]  # not quite one, but nearer to it
    with pytest.raises(QdbevError, match=f"looks like {name}, not {given}"):
        fitting_variant("a.pth", state, given, False)


def test_a_few_wrong_keys_are_all_named() -> None:
    state = dict(expected_state(load_variant("tiny")))
    del state["img_neck.lateral_convs.0.conv.bias"]
    state["pts_bbox_head.extra"] = state["odd\nname\x1b[31m"] = torch.zeros(1)
    state["pts_bbox_head.cls_branches.5.6.weight"] = torch.zeros(3, 256)
    state["pts_bbox_head.cls_branches.5.6.bias"] = torch.zeros(10, dtype=torch.int8)
    with pytest.raises(QdbevError) as caught:
        fitting_variant("a.pth", state, None, False)
    assert str(caught.value) == (
        "a.pth: does not fit variant tiny: 1 missing: img_neck.lateral_convs.0.conv.bias; "
        "2 unexpected: pts_bbox_head.extra, 'odd\\nname\\x1b[31m'; "
        "2 mis-shaped: pts_bbox_head.cls_branches.5.6.weight is (3, 256) but must be (10, 256), "
        "pts_bbox_head.cls_branches.5.6.bias is torch.int8 (torch.strided) but must be torch.float32"
    )


def test_hundreds_of_wrong_keys_are_counted_and_listed_on_demand() -> None:
    full = expected_state(load_variant("tiny"))
    state = {f"student.{key}" if key.startswith("img_backbone") else key: t for key, t in full.items()}
    with pytest.raises(QdbevError) as caught:
        fitting_variant("a.pth", state, None, False)
    message = str(caught.value)
    assert "318 missing: img_backbone.conv1.* 1, img_backbone.bn1.* 5, img_backbone.layer1.* 60" in message
    assert "318 unexpected: student.img_backbone.conv1.* 1" in message
    assert message.endswith("--verbose lists every key")
    assert len(message) < 500
    with pytest.raises(QdbevError) as caught:
        fitting_variant("a.pth", state, None, True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 2 * 318
    assert "  missing img_backbone.layer4.2.bn3.running_var" in lines


def test_an_unknown_size_asks_for_a_variant_file(weights: dict[str, Tensor]) -> None:
    with pytest.raises(QdbevError, match=r"bev_embedding\.weight is \(30, 16\); give the YAML file"):
        fitting_variant("a.pth", weights, None, False)
    with pytest.raises(QdbevError, match=r"it has no pts_bbox_head\.bev_embedding\.weight"):
        fitting_variant("a.pth", {"conv.weight": torch.zeros(1)}, None, False)


class Payload:
    """Pickled code: whoever unpickles it makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir {self.path}",)


@pytest.mark.parametrize("way", ["zip", "old", "in meta", *range(6)])
def test_code_in_a_file_is_named_and_never_run(
    way: str | int,
    tmp_path: Path,
    weights: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, ran = tmp_path / "a.pth", tmp_path / "ran"
    payload = Payload(ran)
    if isinstance(way, int):
        source.write_bytes(pickle.dumps({"state_dict": payload}, protocol=way))
    elif way == "in meta":
        torch.save(mmcv_content(weights, hook=payload), source)
    else:
        torch.save(payload, source, _use_new_zipfile_serialization=way == "zip")
    line = refusal(capsys, "import-bevformer", source, tmp_path / "out.safetensors")
    assert f"{source}: refused, because reading it would run code: it holds posix.system" in line
    assert not ran.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_whole_pickled_model_is_refused_by_the_name_of_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "model": torch.nn.ReLU()}, tmp_path / "a.pth")
    line = refusal(capsys, "import-bevformer", tmp_path / "a.pth", tmp_path / "out.safetensors")
    assert "it holds torch.nn.modules.activation.ReLU" in line
    assert "save its state_dict alone" in line


def torch_bytes(content: Any, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def flipped(content: bytes) -> bytes:
    """With one bit of a weight turned over."""
    place = content.index(torch.full((3,), 0.5).numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "truncated": (torch_bytes({"a": torch.zeros(5000)})[:9000], "cut short or damaged"),
    "truncated, old": (torch_bytes({"a": torch.zeros(5000)}, old=True)[:9000], "not a whole torch file"),
    "truncated in the pickle, old": (torch_bytes({"a": torch.zeros(9)}, old=True)[:150], "not a whole torch file"),
    "one wrong bit": (flipped(torch_bytes({"a": torch.full((5000,), 0.5)})), "Bad CRC-32 for file 'archive/data/0'"),
    "another zip": (other_zip(), "a zip archive, but not one that torch wrote"),
    "text": (b"epoch 24 of my training\n", "a text file, not a checkpoint"),
    "web page": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "a web page, not a checkpoint: the download failed"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    "empty": (b"", "an empty file; download it again"),
    "noise": (bytes(range(255, 0, -1)), "neither a torch nor a safetensors file"),
    "cut safetensors": (b"\x40\0\0\0\0\0\0\0{\"a\":", "not a whole safetensors file"),
    "other pickle": (pickle.dumps({"infos": [1, 2]}, protocol=2), "not a whole torch file"),
    "list": (torch_bytes([torch.zeros(1)]), "holds a list, not a checkpoint"),
    "no weights": (torch_bytes({"meta": {}, "state_dict": {}}), "its state_dict is empty"),
    "no tensors": (torch_bytes({"state_dict": {"a": 3}}), "'a' is a int, and a state_dict maps names to tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_what_is_no_checkpoint_gets_one_line(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.pth"
    source.write_bytes(content)
    line = refusal(capsys, "import-bevformer", source, tmp_path / "out.safetensors")
    assert line.startswith(f"qdbev: error: {source}: ")
    assert words in line
    assert len(line) < 400 + len(str(source))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_files_that_are_not_there_or_cannot_be_written_get_one_line(
    tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours = tmp_path / "a.pth", tmp_path / "a.safetensors"
    assert "a.pth: no such file" in refusal(capsys, "import-bevformer", source, ours)
    assert "a folder, not a checkpoint" in refusal(capsys, "import-bevformer", tmp_path, ours)
    torch.save(mmcv_content(weights), source)
    taken = ("import-bevformer", source)
    given = ("--variant", sample_yaml)
    assert "name it a.safetensors" in refusal(capsys, *taken, tmp_path / "a.pt", *given)
    (tmp_path / "folder.safetensors").mkdir()
    for out in (source / "a.safetensors", tmp_path / "folder.safetensors", Path("/proc/a.safetensors")):
        assert f"{out}: cannot be written: " in refusal(capsys, *taken, out, *given)
    assert run(capsys, *taken, ours, *given)[0] == 0
    for out in (source / "a.pth", Path("/proc/a.pth")):
        assert f"{out}: cannot be written: " in refusal(capsys, "export-bevformer", ours, out)
    assert "ends in .pth" in refusal(capsys, "export-bevformer", ours, tmp_path / "a.onnx")
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]


def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    key = "pts_bbox_head.query_embedding.weight"
    broken = weights | {key: weights[key].clone()}
    broken[key][0, :2] = torch.tensor([float("nan"), float("inf")])
    torch.save(broken, tmp_path / "a.pth")
    line = refusal(
        capsys, "import-bevformer", tmp_path / "a.pth", tmp_path / "o.safetensors", "--variant", sample_yaml
    )
    assert f"2 weights in 1 tensors are NaN or infinite: {key} (2)" in line


def test_other_classes_or_another_order_of_them_are_refused(
    tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(mmcv_content(weights, CLASSES=CLASSES[::-1]), tmp_path / "a.pth")
    line = refusal(
        capsys, "import-bevformer", tmp_path / "a.pth", tmp_path / "o.safetensors", "--variant", sample_yaml
    )
    assert "detects traffic_cone, pedestrian, " in line
    assert "give --variant a YAML file with these `classes`" in line


def test_other_commands_say_how_a_released_file_becomes_a_checkpoint(
    tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str], small_root: Path
) -> None:
    source = tmp_path / "tiny_epoch_24.pth"
    torch.save(mmcv_content(weights), source)
    train = write_config(tmp_path / "train.yaml", TRAIN, small_root, init=str(source))
    compress = write_config(tmp_path / "compress.yaml", COMPRESS, small_root, teacher=str(source))
    for command in (
        ("eval", source, small_root, "--version", "v1.0-mini", "--split", "mini_val"),
        ("export", source, tmp_path / "a.qdbev"),
        ("export-bevformer", source, tmp_path / "a.pth"),
        ("train", train),
        ("compress", compress),
    ):
        assert f"`qdbev import-bevformer {source} tiny_epoch_24.safetensors`" in refusal(capsys, *command), (
            command
        )


def test_only_float_models_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    save_model(tmp_path / "w4a6.safetensors", model, model.variant, {}, QuantConfig().to_dict())
    line = refusal(capsys, "export-bevformer", tmp_path / "w4a6.safetensors", tmp_path / "a.pth")
    assert "quantised, and released BEVFormer has no place for its scales; export the float model" in line
    write_tensors(tmp_path / "last.safetensors", dict(model.state_dict()), {"step": 3})
    line = refusal(capsys, "export-bevformer", tmp_path / "last.safetensors", tmp_path / "a.pth")
    assert "a training state, not a model file" in line


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save(mmcv_content(weights), source)
    taken = ("import-bevformer", source, ours, "--variant", sample_yaml)
    assert run(capsys, *taken)[0] == 0
    before = ours.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        lines = (refusal(capsys, *taken), refusal(capsys, "export-bevformer", ours, tmp_path / "back.pth"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert all("cannot be written: " in line and "File too large" in line for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.safetensors"]
    assert ours.read_bytes() == before
