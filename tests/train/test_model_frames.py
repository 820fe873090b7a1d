# SPDX-License-Identifier: Apache-2.0
"""The whole network over frames: history, batches, absent cameras, box reading, extra queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdbev_ros.core.ego_motion import bev_shift, rotate_bev, rotation_sources
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.projection import visible_cells
from qdbev_ros.core.variant import load_variant
from qdbev_train.model import BEVFormer, ExtraQueries, Output
from qdbev_train.model.attention import History, Views
from qdbev_train.model.bevformer import collate_tables
from qdbev_train.model.encoder import cell_centres
from qdbev_train.model.head import inverse_sigmoid
from tests.model_samples import can_bus, rig, small_model

CELLS = 30


@pytest.fixture(scope="module")
def model() -> BEVFormer:
    return small_model()


def images(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 6, 3, 32, 64, generator=torch.Generator().manual_seed(seed))


def history(count: int, seed: int = 6) -> Tensor:
    return torch.randn(count, CELLS, 16, generator=torch.Generator().manual_seed(seed))


def assert_same(one: Output, other: Output) -> None:
    for a, b in zip((*one.image_features, *one[1:]), (*other.image_features, *other[1:])):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_shapes_are_the_contract(model: BEVFormer) -> None:
    out = model(images(2), rig(model.variant).expand(2, -1, -1, -1), can_bus(0, 1).expand(2, -1))
    assert [tuple(f.shape) for f in out.image_features] == [(2, 6, 16, 4, 8), (2, 6, 16, 2, 4)]
    assert out.bev.shape == (2, CELLS, 16)
    assert out.class_logits.shape == (2, 2, 7, 10)
    assert out.boxes.shape == (2, 2, 7, 10)


@torch.no_grad()
def test_a_batch_is_its_elements_one_by_one(model: BEVFormer) -> None:
    rigs = torch.stack([rig(model.variant), rig(model.variant, turn_degrees=25.0), rig(model.variant)])
    rigs[2, 1:5] = 0.0  # two cameras left: fewer cells, fewer cameras per cell
    buses = torch.stack([can_bus(8.0, 3.0), can_bus(-20.0, 1.0), can_bus(3.0, 2.0)])
    prev, has_prev = history(3), torch.tensor([True, False, True])
    together = model(images(3), rigs, buses, prev, has_prev)
    for i in range(3):
        alone = model(
            images(3)[i : i + 1], rigs[i : i + 1], buses[i : i + 1], prev[i : i + 1] if i != 1 else None
        )
        rows = slice(i, i + 1)
        picked = Output(
            [f[rows] for f in together.image_features],
            together.bev[rows],
            together.class_logits[:, rows],
            together.boxes[:, rows],
        )
        assert_same(picked, alone)


@torch.no_grad()
def test_without_history_the_old_map_and_the_shift_do_not_matter(model: BEVFormer) -> None:
    inputs = images(1), rig(model.variant)[None], can_bus(8.0, 3.0)[None]
    broken = torch.full((1, CELLS, 16), float("nan"))
    first = model(*inputs)
    assert_same(model(*inputs, broken, torch.tensor([False])), first)
    assert (model(*inputs, history(1)).bev - first.bev).abs().max() > 1e-2


def test_a_broken_map_behind_has_prev_false_leaves_gradients_finite(model: BEVFormer) -> None:
    broken = torch.full((1, CELLS, 16), float("nan"))
    out = model(images(1), rig(model.variant)[None], can_bus(8.0, 3.0)[None], broken, torch.tensor([False]))
    out.boxes.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 100
    assert all(g.isfinite().all() for g in gradients)
    model.zero_grad()


def test_history_is_turned_from_the_old_map_which_stays_as_it_was(model: BEVFormer) -> None:
    buses = torch.stack([can_bus(30.0, 3.0), can_bus(-75.0, 1.5)])
    prev = history(2)
    kept = prev.clone()
    turned, shift, use_prev = model.align_history(buses, prev, torch.tensor([True, False]))
    assert torch.equal(prev, kept)
    assert use_prev.tolist() == [1.0, 0.0]
    for i, degrees in enumerate((30.0, -75.0)):
        sources = rotation_sources(degrees, model.variant.bev, None)
        assert (sources < 0).any()
        assert torch.equal(turned[i], torch.from_numpy(rotate_bev(kept[i].numpy(), sources)))
        torch.testing.assert_close(shift[i], torch.from_numpy(bev_shift(buses[i].numpy(), model.variant.bev)))


@torch.no_grad()
def test_a_call_leaves_its_inputs_as_they_were_and_takes_float64_geometry(model: BEVFormer) -> None:
    """The reference writes to can_bus and turns prev_bev in place."""
    inputs = images(1), rig(model.variant)[None].double(), can_bus(8.0, 3.0)[None].double(), history(1)
    kept = [tensor.clone() for tensor in inputs]
    out = model(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept))
    assert_same(out, model(*(tensor.float() for tensor in inputs)))


@torch.no_grad()
def test_every_layer_sees_the_initial_queries_beside_the_old_map(model: BEVFormer) -> None:
    seen = []
    hooks = [
        layer.attentions[0].value_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in model.pts_bbox_head.transformer.encoder.layers
    ]
    bus = can_bus(0.0, 2.0)[None]
    head = model.pts_bbox_head
    initial = head.bev_embedding.weight + head.transformer.can_bus_mlp(bus)[:, None]
    model(images(1), rig(model.variant)[None], bus, history(1))
    model(images(1), rig(model.variant)[None], bus)
    for hook in hooks:
        hook.remove()
    with_history, without = seen[:2], seen[2:]
    for pair in with_history:
        torch.testing.assert_close(pair[:, 0], history(1))
        torch.testing.assert_close(pair[:, 1], initial)
    for pair in without:
        assert torch.equal(pair[:, 0], pair[:, 1])
    torch.testing.assert_close(without[0][:, 0], initial)
    assert (
        without[1][:, 0] - initial
    ).abs().max() > 1e-2  # the second layer's own input, not the initial query


@torch.no_grad()
def test_boxes_are_read_from_the_reference_that_entered_their_layer(model: BEVFormer) -> None:
    head = model.pts_bbox_head
    entering, codes = [], []
    hooks = [
        layer.attentions[1].register_forward_pre_hook(lambda _, args: entering.append(args[2]))
        for layer in head.transformer.decoder.layers
    ]
    hooks += [b.register_forward_hook(lambda _, __, out: codes.append(out)) for b in head.reg_branches]
    out = model(images(1), rig(model.variant)[None], can_bus(0.0, 2.0)[None])
    for hook in hooks:
        hook.remove()
    first = head.transformer.reference_points(head.query_embedding.weight[:, :16]).sigmoid()
    torch.testing.assert_close(entering[0][0], first[:, :2])
    x0, y0, _, x1, y1, _ = model.variant.bev.pc_range
    for layer in range(2):
        xy = (codes[layer][..., :2] + inverse_sigmoid(entering[layer])).sigmoid()
        metres = xy * torch.tensor([x1 - x0, y1 - y0]) + torch.tensor([x0, y0])
        torch.testing.assert_close(out.boxes[layer][..., :2], metres, atol=1e-4, rtol=1e-4)
        kept = [2, 3, 5, 6, 7, 8, 9]
        assert torch.equal(out.boxes[layer][..., kept], codes[layer][..., kept])
    # What layer 0 reads is where layer 1 looks.
    centre = (out.boxes[0][..., :2] - torch.tensor([x0, y0])) / torch.tensor([x1 - x0, y1 - y0])
    torch.testing.assert_close(entering[1], centre, atol=1e-5, rtol=1e-5)
    z = (codes[0][0, :, 4] + inverse_sigmoid(first[:, 2])).sigmoid() * 8.0 - 5.0
    torch.testing.assert_close(out.boxes[0, 0, :, 4], z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("absent", range(6))
@torch.no_grad()
def test_an_absent_camera_gives_what_a_network_built_without_it_gives(absent: int) -> None:
    model, smaller = small_model(), small_model()
    smaller.load_state_dict(model.state_dict())
    others = [camera for camera in range(6) if camera != absent]
    transformer = smaller.pts_bbox_head.transformer
    transformer.cams_embeds = torch.nn.Parameter(transformer.cams_embeds[others])
    rigs, bus, past = rig(model.variant), can_bus(5.0, 2.0)[None], history(1)
    rigs = rigs.expand(1, -1, -1, -1).clone()
    rigs[:, absent] = 0.0
    five = images(1)[:, others]
    tables = smaller.camera_tables(rigs[:, others], five.shape[-2:])
    expected = smaller.forward_tensors(five, *smaller.encoder_inputs(five, tables, bus, past, None))
    got = model(images(1), rigs, bus, past)
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_absent_cameras_leave_everything_finite_and_unread(model: BEVFormer) -> None:
    rigs = rig(model.variant)[None].clone()
    rigs[:, 3:] = 0.0
    bus = can_bus(0.0, 2.0)[None]
    pictures = images(1)
    out = model(pictures, rigs, bus)
    pictures[:, 3:] = 1e4  # what an absent camera's picture holds is nobody's business
    again = model(pictures, rigs, bus)
    assert out.boxes.isfinite().all()
    torch.testing.assert_close(out.bev, again.bev)
    assert model(pictures, torch.zeros_like(rigs), bus).boxes.isfinite().all()


@torch.no_grad()
def test_extra_queries_come_last_and_a_mask_keeps_them_apart(model: BEVFormer) -> None:
    inputs = images(1), rig(model.variant)[None], can_bus(0.0, 2.0)[None]
    may_attend = torch.zeros(10, 10, dtype=torch.bool)
    may_attend[:7, :7] = may_attend[7:, 7:] = True
    torch.manual_seed(0)
    extra = ExtraQueries(torch.randn(1, 3, 16), torch.randn(1, 3, 16), torch.rand(1, 3, 3), may_attend)
    plain, more = model(*inputs), model(*inputs, extra_queries=extra)
    assert more.boxes.shape == (2, 1, 10, 10)
    torch.testing.assert_close(more.boxes[:, :, :7], plain.boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(more.class_logits[:, :, :7], plain.class_logits, atol=1e-4, rtol=1e-4)


def test_every_trained_parameter_gets_a_gradient(model: BEVFormer) -> None:
    out = model(images(1), rig(model.variant)[None], can_bus(5.0, 2.0)[None], history(1))
    (out.boxes.square().sum() + out.class_logits.square().sum()).backward()
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    model.zero_grad()
    assert without == []


@pytest.mark.parametrize(
    ("name", "shape"), [("images", (1, 5, 3, 32, 32)), ("lidar2img", (1, 5, 4, 4)), ("prev_bev", (1, 31, 16))]
)
def test_a_wrong_shape_is_named(model: BEVFormer, name: str, shape: tuple[int, ...]) -> None:
    inputs = {
        "images": images(1),
        "lidar2img": rig(model.variant)[None],
        "can_bus": can_bus(0, 0)[None],
        "prev_bev": history(1),
    }
    inputs[name] = torch.zeros(shape)
    with pytest.raises(DataError, match=f"{name} has shape .*sample takes"):
        model(**inputs)


@torch.no_grad()
def test_pictures_of_another_size_are_seen_through_the_same_cameras(model: BEVFormer) -> None:
    """The projection divides by the size of the pictures that come, not by the variant's."""
    half, bus = torch.diag(torch.tensor([0.5, 0.5, 1.0, 1.0])), can_bus(0, 0)[None]
    small = images(1)[..., ::2, ::2]
    seen: list[Views] = []
    first = model.pts_bbox_head.transformer.encoder.layers[0].attentions[1]
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(images(1), rig(model.variant)[None], bus)
    model(small, half @ rig(model.variant)[None], bus)
    hook.remove()
    torch.testing.assert_close(seen[0].points, seen[1].points)
    assert seen[1].sizes[0] != seen[0].sizes[0]


@torch.no_grad()
def test_the_shift_moves_the_old_maps_references_only(model: BEVFormer) -> None:
    seen: list[History] = []
    first = model.pts_bbox_head.transformer.encoder.layers[0].attentions[0]
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    bus = torch.stack([can_bus(0.0, 2.0), can_bus(0.0, 2.0)])
    rigs = rig(model.variant).expand(2, -1, -1, -1)
    model(images(2), rigs, bus, history(2), torch.tensor([True, False]))
    hook.remove()
    centres, moved = cell_centres(6, 5), torch.from_numpy(bev_shift(bus[0].numpy(), model.variant.bev))
    assert moved.abs().max() > 0.02
    torch.testing.assert_close(seen[0].references[0, 0], centres + moved)
    for element, entry in ((0, 1), (1, 0), (1, 1)):
        assert torch.equal(seen[0].references[element, entry], centres)


def test_a_cells_position_is_its_column_then_its_row(model: BEVFormer) -> None:
    encoding = model.pts_bbox_head.positional_encoding
    position = encoding().reshape(6, 5, 16)
    assert torch.equal(position[4, 3, :8], encoding.col_embed.weight[3])
    assert torch.equal(position[4, 3, 8:], encoding.row_embed.weight[4])


def test_collated_tables_say_the_same_as_each_elements_own() -> None:
    variant = load_variant("nano")
    few = rig(variant).numpy().copy()
    few[1:] = 0.0
    narrow = few.copy()
    narrow[0, 0] *= 4.0  # a long lens sees fewer cells
    elements = [visible_cells(m, variant.bev, variant.image) for m in (rig(variant).numpy(), few, narrow)]
    assert len({e.cells.shape[1] for e in elements}) > 1
    assert len({e.slots.shape[1] for e in elements}) > 1
    tables = collate_tables(elements)
    for b, element in enumerate(elements):
        assert torch.equal(tables.mask[b], torch.from_numpy(element.mask))
        rows = [*tables.cells[b].flatten().tolist(), 1600]
        for cell in range(1600):
            cameras = int(element.mask[:, cell].sum())
            slots = tables.slots[b, cell].tolist()
            # Each used slot leads back to the cell, in a camera that sees it; the rest lead behind the list.
            assert [rows[slot] for slot in slots[:cameras]] == [cell] * cameras
            assert all(element.mask[slot // tables.cells.shape[2], cell] for slot in slots[:cameras])
            assert set(slots[cameras:]) <= {len(rows) - 1}
        torch.testing.assert_close(tables.weights[b].sum(-1), torch.from_numpy(element.mask.any(0)).float())
