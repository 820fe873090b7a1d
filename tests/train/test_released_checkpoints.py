# SPDX-License-Identifier: Apache-2.0
"""A released BEVFormer file becomes a checkpoint of ours and back, bit by bit; anything else is one clear line."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from qdbev_ros.core.errors import QdbevError
from qdbev_ros.core.variant import CLASSES, load_variant
from qdbev_train import cli
from qdbev_train.checkpoint import load_model, read_tensors, save_model, write_tensors
from qdbev_train.model import load_bevformer_checkpoint
from qdbev_train.quantization import QuantConfig
from qdbev_train.released.detection import expected_state, fitting_variant
from qdbev_train.released.reading import read_released
from tests.model_samples import can_bus, rig, small_model, small_variant

ROOT = Path(cli.__file__).resolve().parents[1]
META = {
    "env_info": "sys.platform: linux",
    "config": "model = dict(type='BEVFormer')",
    "CLASSES": CLASSES,
    "PALETTE": None,
    "epoch": 24,
    "iter": 84408,
    "exp_name": "bevformer_tiny.py",
    "mmcv_version": "1.4.0",
    "time": "Sat Jun 11 06:12:10 2022",
}


@pytest.fixture(scope="module")
def sample_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The variant of the small model as a file."""
    path = tmp_path_factory.mktemp("variant") / "sample.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(small_variant().to_dict()))))
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(small_model(seed=3).state_dict())


def mmcv_content(state: dict[str, Tensor], **meta: Any) -> dict[str, Any]:
    """What mmcv saves at the end of a training."""
    optimizer = {"state": {0: {"step": 84408, "exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 2e-7}]}
    return {"meta": META | meta, "state_dict": OrderedDict(state), "optimizer": optimizer}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """(exit code, standard output, lines of standard error) of a qdbev command."""
    capsys.readouterr()
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses its input."""
    code, out, lines = run(capsys, *arguments)
    assert (code, out, len(lines)) == (2, "", 1), lines
    return lines[0]


def pattern(key: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Numbers of every sign and size, other ones for each key: any mix-up or rounding shows."""
    bits = (torch.arange(int(np.prod(shape)), dtype=torch.int32) + 7919 * number) * -1640531535
    values = (bits & ~0x00800000).view(torch.float32)  # one bit of the exponent stays 0, so all are finite
    return torch.tensor(number) if key.endswith("num_batches_tracked") else values.reshape(shape)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_import_and_export_give_back_every_bit(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {key: tuple(t.shape) for key, t in expected_state(load_variant(name)).items()}
    state = {key: pattern(key, shape, i) for i, (key, shape) in enumerate(shapes.items())}
    source, ours, back = tmp_path / "released.pth", tmp_path / "ours.safetensors", tmp_path / "back.pth"
    torch.save(mmcv_content(state), source)
    code, out, _ = run(capsys, "import-bevformer", source, ours)
    assert code == 0
    assert f"{name}, as its shapes say" in out
    source.unlink()
    assert run(capsys, "export-bevformer", ours, back)[0] == 0
    ours.unlink()
    assert run(capsys, "import-bevformer", back, ours)[0] == 0
    again, _ = read_tensors(ours)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert tensor.dtype == again[key].dtype, key
        assert torch.equal(as_bits(tensor), as_bits(again[key])), key


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def test_import_keeps_where_the_weights_come_from_and_leaves_the_optimizer(
    tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours, report = tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path / "a.json"
    torch.save(mmcv_content(weights), source)
    code, out, _ = run(capsys, "import-bevformer", source, ours, "--variant", sample_yaml, "--json", report)
    assert code == 0
    tensors, metadata = read_tensors(ours)
    assert tensors.keys() == weights.keys()
    provenance = metadata["provenance"]
    digest = read_released(source).sha256
    assert provenance["source"] == {"file": "a.pth", "bytes": source.stat().st_size, "sha256": digest}
    assert provenance["meta"] == {k: META[k] for k in ("epoch", "iter", "time", "exp_name", "mmcv_version")}
    numbers = json.loads(report.read_text())
    assert (numbers["variant"], numbers["tensors"], numbers["left_out"]) == (
        "sample",
        len(weights),
        ["optimizer"],
    )
    assert digest in out
    assert numbers["result"]["sha256"] in out


def test_importing_and_exporting_twice_gives_the_same_bytes(
    tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.pth"
    torch.save(mmcv_content(weights), source)
    files: dict[str, set[bytes]] = {".safetensors": set(), ".pth": set(), "names.safetensors": set()}
    for i in range(3):
        ours = tmp_path / f"{i}.safetensors"
        assert run(capsys, "import-bevformer", source, ours, "--variant", sample_yaml)[0] == 0
        files[".safetensors"].add(ours.read_bytes())
        for kind in (".pth", "names.safetensors"):
            out = tmp_path / f"{i}{kind}"
            assert run(capsys, "export-bevformer", ours, out)[0] == 0
            files[kind].add(out.read_bytes())
    assert {kind: len(contents) for kind, contents in files.items()} == dict.fromkeys(files, 1)


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "bare state dict": lambda state, path: torch.save(state, path),
    "DataParallel": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "before torch 1.6": lambda state, path: torch.save(
        mmcv_content(state), path, _use_new_zipfile_serialization=False
    ),
    "parameters": lambda state, path: torch.save(
        {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state.items()}, path
    ),
    "numpy in meta": lambda state, path: torch.save(
        mmcv_content(state, hook_msgs={"best": np.float64(0.4), "ap": np.arange(3.0), "n": np.int64(3)}), path
    ),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_every_way_in_which_people_save_weights_is_read(
    writer: Callable[[dict[str, Tensor], Path], None],
    tmp_path: Path,
    sample_yaml: Path,
    weights: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, ours = tmp_path / "a.pth", tmp_path / "a.safetensors"
    writer(weights, source)
    code, _, lines = run(capsys, "import-bevformer", source, ours, "--variant", sample_yaml)
    assert (code, lines) == (0, [])
    tensors, _ = read_tensors(ours)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in weights.items())


def test_numpy_values_are_let_through_only_while_a_checkpoint_is_read(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    source = tmp_path / "a.pth"
    WRITERS["numpy in meta"](weights, source)
    read_released(source)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(source, weights_only=True)


def test_names_that_other_numpy_versions_write_are_let_through(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    source = tmp_path / "a.pth"
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        WRITERS["numpy in meta"](weights, source)
        with zipfile.ZipFile(source) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        data = members["a/data.pkl"].replace(b"cnumpy.core.multiarray\n", b"c" + module + b"\n")
        assert b"c" + module + b"\nscalar\n" in data
        with zipfile.ZipFile(source, "w", zipfile.ZIP_STORED) as archive:
            for name, content in (members | {"a/data.pkl": data}).items():
                archive.writestr(name, content)
        assert read_released(source).meta["epoch"] == 24


def test_half_precision_becomes_single_and_is_said(
    tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours = tmp_path / "a.pth", tmp_path / "a.safetensors"
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    torch.save(mmcv_content(half), source)
    _, out, _ = run(capsys, "import-bevformer", source, ours, "--variant", sample_yaml)
    floating = sum(v.is_floating_point() for v in weights.values())
    assert f"{floating} tensors from float16 to float32" in out
    tensors, _ = read_tensors(ours)
    assert all(torch.equal(tensors[key], tensor.to(weights[key].dtype)) for key, tensor in half.items())


@pytest.mark.parametrize("name", ["nano", "tiny", "small", "base"])
def test_shapes_say_which_variant_it_is(name: str) -> None:
    state = expected_state(load_variant(name))
    assert fitting_variant("a.pth", state, None, False).name == name


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
    state["pts_bbox_head.extra"] = torch.zeros(1)
    state["pts_bbox_head.cls_branches.5.6.weight"] = torch.zeros(3, 256)
    state["pts_bbox_head.cls_branches.5.6.bias"] = torch.zeros(10, dtype=torch.int8)
    with pytest.raises(QdbevError) as caught:
        fitting_variant("a.pth", state, None, False)
    assert str(caught.value) == (
        "a.pth: does not fit variant tiny: 1 missing: img_neck.lateral_convs.0.conv.bias; "
        "1 unexpected: pts_bbox_head.extra; "
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


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "truncated": (torch_bytes({"a": torch.zeros(5000)})[:9000], "cut short or damaged"),
    "truncated, old": (torch_bytes({"a": torch.zeros(5000)}, old=True)[:9000], "not a whole torch file"),
    "truncated in the pickle, old": (torch_bytes({"a": torch.zeros(9)}, old=True)[:150], "not a whole torch file"),
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
    assert not list(tmp_path.glob("*.part"))


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
    train = yaml.safe_load((ROOT / "config/train/nano_town.yaml").read_text())
    compress = yaml.safe_load((ROOT / "config/compress/nano_town.yaml").read_text())
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train | {"init": str(source)}))
    (tmp_path / "compress.yaml").write_text(yaml.safe_dump(compress | {"teacher": str(source)}))
    for command in (
        ("eval", source, small_root, "--version", "v1.0-mini", "--split", "mini_val"),
        ("export", source, tmp_path / "a.qdbev"),
        ("export-bevformer", source, tmp_path / "a.pth"),
        ("train", tmp_path / "train.yaml"),
        ("compress", tmp_path / "compress.yaml"),
    ):
        assert f"`qdbev import-bevformer {source} tiny_epoch_24.safetensors`" in refusal(capsys, *command), (
            command
        )


@pytest.fixture
def imported(tmp_path: Path, sample_yaml: Path, weights: dict[str, Tensor]) -> Path:
    path = tmp_path / "imported.safetensors"
    torch.save(mmcv_content(weights), tmp_path / "a.pth")
    cli.main(["import-bevformer", str(tmp_path / "a.pth"), str(path), "--variant", str(sample_yaml)])
    return path


def test_an_imported_model_computes_what_its_state_dict_does(
    imported: Path, weights: dict[str, Tensor]
) -> None:
    model, variant, _ = load_model(imported)
    direct = small_model(seed=4)
    load_bevformer_checkpoint(direct, weights)
    images = torch.randn(1, 6, 3, variant.image.padded_height, variant.image.padded_width)
    frames = [
        (rig(variant)[None], can_bus(0.0, 0.0)[None]),
        (rig(variant, 3.0)[None], can_bus(3.0, 2.0)[None]),
    ]
    bev = None
    with torch.no_grad():
        for lidar2img, vector in frames:
            ours, theirs = (m(images, lidar2img, vector, bev) for m in (model, direct.eval()))
            assert torch.equal(ours.class_logits, theirs.class_logits)
            assert torch.equal(ours.boxes, theirs.boxes)
            assert torch.equal(ours.bev, theirs.bev)
            bev = ours.bev


def test_an_imported_model_is_scored_and_packed(
    imported: Path, tmp_path: Path, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nuscenes")
    package, scores = tmp_path / "a.qdbev", tmp_path / "a.json"
    code, _, _ = run(
        capsys,
        "eval",
        imported,
        small_root,
        "--version",
        "v1.0-mini",
        "--split",
        "mini_val",
        "--json",
        scores,
    )
    assert code == 0
    assert run(capsys, "export", imported, package, "--scores", scores)[0] == 0
    code, out, _ = run(capsys, "inspect", package)
    assert code == 0
    assert '"file": "a.pth"' in out  # where the weights came from travels along


def test_exported_files_have_the_layout_that_mmcv_reads(
    imported: Path, tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.pth"
    assert run(capsys, "export-bevformer", imported, out)[0] == 0
    content = torch.load(out, weights_only=True)
    assert set(content) == {"meta", "state_dict"}
    assert content["meta"]["CLASSES"] == CLASSES
    assert (content["meta"]["epoch"], content["meta"]["mmcv_version"]) == (24, "1.4.0")
    assert isinstance(content["state_dict"], OrderedDict)
    assert list(content["state_dict"]) == list(weights)
    assert all(torch.equal(content["state_dict"][key], tensor) for key, tensor in weights.items())


def test_exported_safetensors_come_back_in(
    imported: Path, tmp_path: Path, sample_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, again = tmp_path / "names.safetensors", tmp_path / "again.safetensors"
    assert run(capsys, "export-bevformer", imported, names)[0] == 0
    assert "`qdbev import-bevformer` makes one" in refusal(capsys, "export", names, tmp_path / "a.qdbev")
    assert run(capsys, "import-bevformer", names, again, "--variant", sample_yaml)[0] == 0
    first, _ = read_tensors(imported)
    second, metadata = read_tensors(again)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert metadata["provenance"]["meta"]["epoch"] == 24
    assert "a checkpoint of this project already" in refusal(capsys, "import-bevformer", again, names)


def test_only_float_models_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    save_model(tmp_path / "w4a6.safetensors", model, model.variant, {}, QuantConfig().to_dict())
    line = refusal(capsys, "export-bevformer", tmp_path / "w4a6.safetensors", tmp_path / "a.pth")
    assert "quantised, and released BEVFormer has no place for its scales; export the float model" in line
    write_tensors(tmp_path / "last.safetensors", dict(model.state_dict()), {"step": 3})
    line = refusal(capsys, "export-bevformer", tmp_path / "last.safetensors", tmp_path / "a.pth")
    assert "a training state, not a model file" in line
