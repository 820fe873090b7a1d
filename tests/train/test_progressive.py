# SPDX-License-Identifier: Apache-2.0
"""Progressive training: what is on the grid in which stage, for how long, and with which ranges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdbev_ros.core.errors import ConfigError
from qdbev_train.quantization import PARTS, QuantConfig, post_training_quantise
from qdbev_train.quantization.calibrate import run_batch
from qdbev_train.quantization.layers import ActivationQuantiser, QuantisedLayer
from qdbev_train.training.stages import Stage, StageLengths, plan_stages
from tests.quantisation_samples import frames, small_model

PAPER = StageLengths(backbone=0.28, neck=0.13, encoder=0.19, decoder=0.11, final=0.30)
# Where the layers of a part are; nothing else is quantised.
HOMES = {
    "backbone": ("img_backbone.",),
    "neck": ("img_neck.",),
    "encoder": ("pts_bbox_head.transformer.encoder.",),
    "decoder": (
        "pts_bbox_head.transformer.decoder.",
        "pts_bbox_head.cls_branches.",
        "pts_bbox_head.reg_branches.",
    ),
}


def test_stages_switch_on_part_after_part_in_the_papers_proportions() -> None:
    stages = plan_stages("vgd", PAPER, PARTS, 1010)
    assert stages == [
        Stage("backbone", PARTS[:1], 0, 280, False),
        Stage("neck", PARTS[:2], 280, 130, False),
        Stage("encoder", PARTS[:3], 410, 190, False),
        Stage("decoder", PARTS[:4], 600, 110, False),
        Stage("final", PARTS, 710, 300, True),
    ]
    assert [s.distilled for s in plan_stages("progressive", PAPER, PARTS, 1010)] == [False] * 5


@pytest.mark.parametrize("steps", [7, 20, 84, 999])
def test_stages_follow_on_each_other_and_take_all_steps(steps: int) -> None:
    stages = plan_stages("progressive", PAPER, PARTS, steps)
    assert sum(s.steps for s in stages) == steps
    assert [s.first for s in stages] == [sum(s.steps for s in stages[:i]) for i in range(len(stages))]


def test_standard_training_and_the_float_control_have_one_stage_as_long() -> None:
    assert plan_stages("qat", None, PARTS, 50) == [Stage("qat", PARTS, 0, 50, False)]
    assert plan_stages("float_control", None, PARTS, 50) == [Stage("float_control", (), 0, 50, False)]
    assert plan_stages("ptq", None, PARTS, 0) == []


def test_a_part_without_a_length_comes_with_the_next() -> None:
    stages = plan_stages("progressive", StageLengths(1, 0, 1, 0, 1), PARTS, 30)
    assert [s.parts for s in stages] == [PARTS[:1], PARTS[:3], PARTS]


@pytest.mark.parametrize(
    ("method", "lengths", "parts", "steps", "complaint"),
    [
        ("vgd", PAPER, PARTS, 4, "no step"),
        ("vgd", StageLengths(1, 1, 1, 1, 0), PARTS, 40, "final stage"),
        ("progressive", PAPER, ("backbone",), 100, "not among the parts"),
        ("progressive", StageLengths(1, 0, 0, 0, 0), PARTS, 40, "leaves parts in float"),
        ("progressive", None, PARTS, 40, "needs the lengths"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    method: str, lengths: StageLengths | None, parts: tuple[str, ...], steps: int, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_stages(method, lengths, parts, steps)
    with pytest.raises(ConfigError, match="below zero"):
        StageLengths(-1, 1, 1, 1, 1)


def quantised(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, QuantisedLayer)}


def test_quantised_modules_are_exactly_those_of_the_stage() -> None:
    """Every layer of a part that is to be quantised is, with the stage that has the part, and no other one."""
    model = small_model()
    config = QuantConfig(weight_rounding="nearest", bias_correction=False)
    wanted_of = {part: set[str]() for part in PARTS}
    for name, module in small_model().named_modules():
        part = next((p for p, homes in HOMES.items() if name.startswith(homes)), None)
        if part is None or config.bits(name)[0] == 32:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            wanted_of[part].add(name)
        elif type(module).__name__ == "PackedAttention":
            wanted_of[part].update({f"{name}.query_key", f"{name}.value"})
    for stage in plan_stages("progressive", PAPER, PARTS, 100):
        post_training_quantise(model, frames(model, 1), QuantConfig(**{**vars(config), "parts": stage.parts}))
        assert quantised(model) == set().union(*(wanted_of[part] for part in stage.parts))


def test_a_switch_leaves_what_was_switched_before_as_it_is_and_calibrates_on_it() -> None:
    """The ranges of the new part are those of what it really gets: inputs from the quantised parts before it."""
    plain = QuantConfig(weight_rounding="nearest", bias_correction=False, activation_range="minmax")
    model = small_model()
    batches = frames(model, 2)

    def switch(parts: tuple[str, ...], to: nn.Module) -> None:
        post_training_quantise(to, batches, QuantConfig(**{**vars(plain), "parts": parts}))

    switch(PARTS[:1], model)
    with torch.no_grad():  # training in between
        for parameter in model.img_backbone.parameters():
            parameter.mul_(1.3)
    before = {k: v.clone() for k, v in model.img_backbone.state_dict().items()}
    switch(PARTS[:2], model)
    after = model.img_backbone.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    # The neck's own ranges are the largest values behind its convolutions, on quantised inputs.
    peaks: dict[str, float] = {}

    def note(name: str, x: torch.Tensor) -> None:
        peaks[name] = max(peaks.get(name, 0.0), float(x.abs().max()))

    found = {n: m for n, m in model.img_neck.named_modules() if isinstance(m, ActivationQuantiser)}
    for name, quantiser in found.items():
        quantiser.register_forward_pre_hook(lambda _, args, n=name: note(n, args[0]))
        quantiser.active = False
    for module in model.img_neck.modules():
        if isinstance(module, QuantisedLayer):
            module.active = False
    with torch.no_grad():
        previous = None
        for batch in batches:
            previous = run_batch(model, batch, previous).bev
    assert len(found) > 2
    for name, quantiser in found.items():
        assert float(quantiser.scale) == pytest.approx(2 * peaks[name] / 63, rel=1e-5)
