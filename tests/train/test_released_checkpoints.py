# SPDX-License-Identifier: Apache-2.0
"""A released BEVFormer file becomes a checkpoint of ours and back, bit by bit."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qdbev_ros.core.variant import CLASSES, load_variant
from qdbev_train import cli
from qdbev_train.checkpoint import load_model, read_tensors
from qdbev_train.model import load_bevformer_checkpoint
from qdbev_train.released.detection import expected_state, fitting_variant
from qdbev_train.released.reading import read_released
from tests.model_samples import can_bus, rig, small_model
from tests.released_samples import (
    COMPRESS,
    META,
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


def without_checksums(state: dict[str, Tensor], path: Path) -> None:
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(state, path)
    torch.serialization.set_crc32_options(computed)


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "bare state dict": lambda state, path: torch.save(state, path),
    "no checksums": without_checksums,
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
    assert 'file: "a.pth"' in out  # where the weights came from travels along


def test_an_imported_model_is_compressed_and_trained_on(
    imported: Path, tmp_path: Path, sample_yaml: Path, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = {"out": str(tmp_path / "student")}
    settings = out | {"teacher": str(imported), "calibration": {"steps": 1, "batch": 1}}
    compress = write_config(tmp_path / "compress.yaml", COMPRESS, small_root, **settings)
    assert run(capsys, "compress", compress)[0] == 0
    _, metadata = read_tensors(tmp_path / "student" / "model.safetensors")
    assert metadata["provenance"]["teacher"]["source"]["file"] == "a.pth"
    settings = {"out": str(tmp_path / "tuned"), "init": str(imported), "variant": str(sample_yaml)}
    settings |= {"length": "1 steps", "batch": 1}
    train = write_config(tmp_path / "train.yaml", TRAIN, small_root, **settings)
    assert run(capsys, "train", train)[0] == 0
    assert (
        run(capsys, "export-bevformer", tmp_path / "tuned" / "model.safetensors", tmp_path / "b.pth")[0] == 0
    )


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
