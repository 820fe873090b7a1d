# SPDX-License-Identifier: Apache-2.0
"""View-guided distillation: the losses are the literal formulas, and the teacher keeps its own memory."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qdbev_ros.core.errors import ConfigError
from qdbev_train.data.dataset import Batch
from qdbev_train.distillation import (
    Distillation,
    DistillationConfig,
    Seen,
    Teacher,
    bev_divergence,
    image_divergence,
    view_guided,
)
from qdbev_train.quantization.calibrate import run_batch
from tests.quantisation_samples import frames, small_model

B, N, C, CELLS = 2, 3, 4, 5
LEVELS = ((2, 3), (1, 2))


def features(seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(B, N, C, h, w, generator=generator, dtype=torch.float64) for h, w in LEVELS]
    bev = torch.randn(B, CELLS, C, generator=generator, dtype=torch.float64)
    return [i.requires_grad_() for i in images], bev.requires_grad_()


@pytest.fixture
def mask() -> Tensor:
    """Cell 0 is seen by nobody, cell 1 by one camera, cell 2 by all."""
    seen = torch.zeros(B, N, CELLS, dtype=torch.bool)
    seen[:, 1, 1] = True
    seen[:, :, 2] = True
    seen[0, 0, 3:] = True
    seen[1, 2, 4] = True
    return seen


def softmax(values: list[float], tau: float) -> list[float]:
    exponentials = [math.exp(v / tau) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def kl(p: list[float], q: list[float]) -> list[float]:
    return [a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)]


def slow_image(teacher: list[Tensor], student: list[Tensor], b: int, n: int, axis: str, tau: float) -> float:
    """L_img of one camera of one sample: tau^2 / (W H C) D_KL, the mean of the levels."""
    levels = []
    for (height, width), t, s in zip(LEVELS, teacher, student, strict=True):
        t_map, s_map = (x[b, n].detach().reshape(C, -1).tolist() for x in (t, s))
        total = 0.0
        if axis == "spatial":
            for c in range(C):
                total += sum(kl(softmax(t_map[c], tau), softmax(s_map[c], tau)))
        else:
            for pixel in range(height * width):
                columns = ([x[c][pixel] for c in range(C)] for x in (t_map, s_map))
                total += sum(kl(*(softmax(column, tau) for column in columns)))
        levels.append(tau**2 / (width * height * C) * total)
    return sum(levels) / len(levels)


def slow_bev(teacher: Tensor, student: Tensor, b: int, cell: int, axis: str, tau: float) -> float:
    """L_bev of one cell of one sample: tau^2 / C times the cell's part of D_KL."""
    t, s = teacher[b].detach(), student[b].detach()
    if axis == "channel":
        return tau**2 / C * sum(kl(softmax(t[cell].tolist(), tau), softmax(s[cell].tolist(), tau)))
    total = 0.0
    for c in range(C):
        total += kl(softmax(t[:, c].tolist(), tau), softmax(s[:, c].tolist(), tau))[cell]
    return tau**2 / C * total


@pytest.mark.parametrize("axis", ["channel", "spatial"])
@pytest.mark.parametrize(("combine", "floor"), [("product", 0.0), ("product", 0.3), ("sum", 0.0)])
def test_the_loss_equals_a_slow_literal_version_of_the_formula(
    axis: str, combine: str, floor: float, mask: Tensor
) -> None:
    tau = 1.7
    (t_img, t_bev), (s_img, s_bev) = features(0), features(1)
    image = image_divergence(t_img, s_img, axis, tau, per_pixel=True)
    bev = bev_divergence(t_bev, s_bev, axis, tau)
    got = view_guided(image, bev, mask, combine, "none", floor)
    for b in range(B):
        total, of_sample = 0.0, float(got[b].detach())
        for cell in range(CELLS):
            own = slow_bev(t_bev, s_bev, b, cell, axis, tau)
            seen = False
            for n in range(N):
                if mask[b, n, cell]:
                    seen = True
                    camera = slow_image(t_img, s_img, b, n, axis, tau)
                    total += camera * own if combine == "product" else camera + own
            total += floor * own * seen
        assert of_sample == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("axis", ["channel", "spatial"])
def test_channel_wise_baselines_equal_their_literal_versions(axis: str) -> None:
    (t_img, t_bev), (s_img, s_bev) = features(0), features(1)
    teacher = Seen(t_img, t_bev, torch.ones(B, N, CELLS, dtype=torch.bool))
    student = SimpleNamespace(image_features=s_img, bev=s_bev)
    config = DistillationConfig(axis=axis, weighting="fixed")
    image, _ = Distillation([object()], "cwd_img", config).divergence(teacher, student)
    bev, _ = Distillation([object()], "cwd_bev", config).divergence(teacher, student)
    # Their normaliser is tau^2 / C without W H.
    wanted = 0.0
    for level, (h, w) in enumerate(LEVELS):
        one = image_divergence(t_img[level : level + 1], s_img[level : level + 1], axis, 1.0, per_pixel=True)
        wanted += float(one.mean().detach()) * h * w / len(LEVELS)
    assert float(image.detach()) == pytest.approx(float(wanted), rel=1e-5)
    cells = [sum(slow_bev(t_bev, s_bev, b, i, axis, 1.0) for i in range(CELLS)) for b in range(B)]
    assert float(bev.detach()) == pytest.approx(sum(cells) / B, rel=1e-5)


def gradient_of_a_perfect_student(axis: str, mask: Tensor) -> tuple[float, float]:
    """(loss, largest gradient) where student and teacher are alike."""
    (t_img, t_bev), (s_img, s_bev) = features(3), features(3)
    image = image_divergence(t_img, s_img, axis, 1.0, per_pixel=True)
    loss = view_guided(image, bev_divergence(t_bev, s_bev, axis, 1.0), mask, "sum").sum()
    loss.backward()
    return float(loss.detach()), max(float(t.grad.abs().max()) for t in (*s_img, s_bev))


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(mask: Tensor) -> None:
    loss, gradient = gradient_of_a_perfect_student("channel", mask)
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert gradient < 1e-6


def test_over_space_a_perfect_student_is_pulled_away_where_cells_weigh_differently(mask: Tensor) -> None:
    """Why the spatial softmax is for the baselines, in which all cells weigh the same."""
    loss, gradient = gradient_of_a_perfect_student("spatial", mask)
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert gradient > 0.01
    assert gradient_of_a_perfect_student("spatial", torch.ones_like(mask))[1] < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_over_channels_no_cell_counts_negatively_over_space_only_the_sum_does_not(seed: int) -> None:
    (_, teacher), (_, student) = features(seed), features(seed + 10)
    assert (bev_divergence(teacher, student, "channel", 1.0) >= 0).all()
    spatial = bev_divergence(teacher, student, "spatial", 1.0)
    assert (spatial.sum(1) >= 0).all()
    assert (spatial < 0).any()


def test_cells_that_no_camera_sees_contribute_nothing(mask: Tensor) -> None:
    (t_img, t_bev), (s_img, s_bev) = features(0), features(1)
    image = image_divergence(t_img, s_img, "channel", 1.0, per_pixel=True)
    view_guided(image, bev_divergence(t_bev, s_bev, "channel", 1.0), mask, floor=0.5).sum().backward()
    unseen = ~mask.any(1)
    assert unseen.any()
    assert s_bev.grad[unseen].abs().max() == 0
    assert (s_bev.grad[~unseen].abs().amax(-1) > 0).all()


def test_samples_do_not_mix(mask: Tensor) -> None:
    """The batch's loss is the mean of what each sample costs alone."""
    (t_img, t_bev), (s_img, s_bev) = features(0), features(1)
    student = SimpleNamespace(image_features=s_img, bev=s_bev)
    vgd = Distillation([object()], "vgd", DistillationConfig())
    whole, _ = vgd.divergence(Seen(t_img, t_bev, mask), student)
    alone = []
    for b in range(B):
        one = slice(b, b + 1)
        part = SimpleNamespace(image_features=[x[one] for x in s_img], bev=s_bev[one])
        alone.append(vgd.divergence(Seen([x[one] for x in t_img], t_bev[one], mask[one]), part)[0])
    torch.testing.assert_close(whole, torch.stack(alone).mean())


def test_levels_are_averaged() -> None:
    (t_img, _), (s_img, _) = features(0), features(1)
    both = image_divergence(t_img, s_img, "channel", 1.0, per_pixel=True)
    each = [
        image_divergence(t_img[i : i + 1], s_img[i : i + 1], "channel", 1.0, per_pixel=True) for i in (0, 1)
    ]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


@pytest.mark.parametrize(("detach", "image_learns", "bev_learns"), [
    ("none", True, True), ("image", False, True), ("bev", True, False),
])  # fmt: skip
def test_a_detached_factor_is_a_mere_number(
    detach: str, image_learns: bool, bev_learns: bool, mask: Tensor
) -> None:
    (t_img, t_bev), (s_img, s_bev) = features(0), features(1)
    image = image_divergence(t_img, s_img, "channel", 1.0, per_pixel=True)
    view_guided(image, bev_divergence(t_bev, s_bev, "channel", 1.0), mask, detach=detach).sum().backward()
    assert (s_img[0].grad is not None) == image_learns
    assert (s_bev.grad is not None) == bev_learns


def test_the_gradient_is_that_of_finite_differences(mask: Tensor) -> None:
    """In double precision, through both factors of the product."""
    (t_img, t_bev), (s_img, s_bev) = features(0), features(1)

    def literal(images: list[Tensor], bev: Tensor) -> float:
        return sum(
            slow_image(t_img, images, b, n, "channel", 1.0) * slow_bev(t_bev, bev, b, i, "channel", 1.0)
            for b in range(B)
            for n in range(N)
            for i in range(CELLS)
            if mask[b, n, i]
        )

    image = image_divergence(t_img, s_img, "channel", 1.0, per_pixel=True)
    view_guided(image, bev_divergence(t_bev, s_bev, "channel", 1.0), mask).sum().backward()
    step = 1e-5
    for tensor in (s_img[0], s_bev):
        for position in (0, tensor.numel() // 2, tensor.numel() - 1):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.view(-1)[position] += sign * step
                values.append(literal(s_img, s_bev))
                with torch.no_grad():
                    tensor.view(-1)[position] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert float(tensor.grad.view(-1)[position]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def look(teacher: Teacher | Distillation, batch: Batch) -> Seen:
    return teacher.see(batch.images, batch.lidar2img, batch.can_bus, ~batch.is_first)


def test_the_teacher_keeps_its_own_memory_and_forgets_where_a_drive_begins() -> None:
    model = small_model()
    batches = frames(model, 3)
    teacher = Teacher(copy.deepcopy(model).train())
    seen = [look(teacher, b).bev for b in batches]
    with torch.no_grad():
        wanted, previous = [], None
        for batch in batches:
            previous = run_batch(model, batch, previous).bev
            wanted.append(previous)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert not torch.equal(wanted[1], run_batch(model, batches[1], None).bev)
    # A new drive: what was seen before must not matter.
    assert torch.equal(look(teacher, batches[0]).bev, wanted[0])
    # With a queue its own past counts, whatever was seen before.
    teacher.remember(batches[:2], torch.device("cpu"))
    assert torch.equal(look(teacher, batches[2]).bev, wanted[2])


def test_the_view_mask_is_that_of_the_calibration() -> None:
    model = small_model()
    batch = frames(model, 1)[0]
    absent = replace(batch, lidar2img=batch.lidar2img.clone())
    absent.lidar2img[:, 2:] = 0.0
    seen = look(Teacher(model), absent)
    assert seen.mask.shape == (1, 6, model.variant.bev.cells)
    assert torch.equal(seen.mask, model.camera_tables(absent.lidar2img).mask)
    assert not seen.mask[:, 2:].any()
    assert seen.mask[:, :2].any()


class Shown:
    """A teacher that shows the same maps at any frame."""

    def __init__(self, seed: int, mask: Tensor) -> None:
        self.image, self.bev = features(seed)
        self.mask, self.memory = mask, None

    def see(self, *_: object) -> Seen:
        return Seen([x.detach() for x in self.image], self.bev.detach(), self.mask)


def mean_softmax(columns: list[list[float]], tau: float) -> list[float]:
    each = [softmax(column, tau) for column in columns]
    return [sum(values) / len(each) for values in zip(*each, strict=True)]


@pytest.mark.parametrize("axis", ["channel", "spatial"])
def test_an_ensembles_target_is_the_mean_of_its_teachers_distributions(axis: str, mask: Tensor) -> None:
    """KL of the mean softmax and the student's, literally, for a camera of one level and for a cell."""
    tau, (s_img, s_bev) = 1.7, features(9)
    teachers = [Shown(seed, mask) for seed in (0, 1, 2)]
    config = DistillationConfig(axis=axis, temperature=tau, weighting="fixed")
    target = Distillation(teachers, "vgd", config).see(*[torch.zeros(1)] * 4)
    assert torch.equal(target.mask, mask)

    height, width = LEVELS[0]
    maps = [t.image[0][1, 2].detach().reshape(C, -1) for t in teachers]
    own = s_img[0][1, 2].detach().reshape(C, -1)
    if axis == "channel":
        maps, own = [m.T for m in maps], own.T
    wanted = 0.0
    for i in range(len(own)):
        p = mean_softmax([m[i].tolist() for m in maps], tau)
        wanted += tau**2 / (width * height * C) * sum(kl(p, softmax(own[i].tolist(), tau)))
    got = image_divergence(target.image_features[:1], s_img[:1], axis, tau, per_pixel=True)[1, 2]
    assert float(got.detach()) == pytest.approx(wanted, rel=1e-5)

    cells, own = [t.bev[1].detach() for t in teachers], s_bev[1].detach()
    if axis == "channel":
        p = mean_softmax([c[3].tolist() for c in cells], tau)
        wanted = tau**2 / C * sum(kl(p, softmax(own[3].tolist(), tau)))
    else:
        p = [mean_softmax([c[:, k].tolist() for c in cells], tau) for k in range(C)]
        wanted = tau**2 / C * sum(kl(p[k], softmax(own[:, k].tolist(), tau))[3] for k in range(C))
    got = bev_divergence(target.bev, s_bev, axis, tau)[1, 3]
    assert float(got.detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_single_teacher_is_matched_as_it_is(mask: Tensor) -> None:
    teacher = Shown(0, mask)
    target = Distillation([teacher], "vgd", DistillationConfig()).see(*[torch.zeros(1)] * 4)
    assert torch.equal(target.bev, teacher.bev)
    assert all(torch.equal(a, b) for a, b in zip(target.image_features, teacher.image, strict=True))


def test_teachers_that_all_equal_the_student_leave_it_alone(mask: Tensor) -> None:
    s_img, s_bev = features(3)
    student = SimpleNamespace(image_features=s_img, bev=s_bev)
    for others, pulled in (((3, 3), False), ((3, 4), True)):
        vgd = Distillation([Shown(s, mask) for s in (3, *others)], "vgd", DistillationConfig(combine="sum"))
        loss, _ = vgd.divergence(vgd.see(*[torch.zeros(1)] * 4), student)
        gradient = max(float(g.abs().max()) for g in torch.autograd.grad(loss, [*s_img, s_bev]))
        assert (float(loss.detach()) > 1e-3) == pulled
        assert (gradient > 1e-3) == pulled


def test_every_teacher_of_an_ensemble_keeps_its_own_memory() -> None:
    """Also where a run goes on: what a second ensemble sees from the saved state on is the same to the bit."""
    models = [small_model(0), small_model(1)]
    batches = frames(models[0], 3)
    first, second = (
        Distillation([Teacher(m) for m in models], "vgd", DistillationConfig()) for _ in range(2)
    )
    for batch in batches[:2]:
        look(first, batch)
    alone = Teacher(copy.deepcopy(models[1]))
    for batch in batches[:2]:
        look(alone, batch)
    assert torch.equal(first.teachers[1].memory, alone.memory)
    assert not torch.equal(first.teachers[0].memory, alone.memory)
    second.load_state({key: value.clone() for key, value in first.state().items()})
    assert torch.equal(look(first, batches[2]).bev, look(second, batches[2]).bev)
    # With a queue every one of them gets the past frames.
    second.remember(batches[:2], torch.device("cpu"))
    assert torch.equal(second.teachers[1].memory, alone.memory)


def distillation_step(
    config: DistillationConfig, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(loss, logged, share of its gradient) of a step of a student that differs a little from its teacher."""
    teacher, student = Teacher(small_model()), small_model()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = frames(student, 1)[0]
    out = run_batch(student, batch, None)
    task = scale * (out.class_logits.square().mean() + out.boxes.square().mean())
    loss, logged = Distillation([teacher], "vgd", config).loss(look(teacher, batch), out, task)
    features = [out.bev, *out.image_features]
    norms = []
    for x in (loss, task):
        gradients = torch.autograd.grad(x, features, retain_graph=True)
        norms.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    return loss, logged, norms[0] / norms[1]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_weight_by_gradients_is_the_share_of_the_task(scale: float) -> None:
    loss, logged, share = distillation_step(DistillationConfig(weighting="gradient", weight=0.25), scale)
    assert float(share) == pytest.approx(0.25, rel=1e-3)
    assert float(loss.detach()) == pytest.approx(float(logged["weight"] * logged["raw"]), rel=1e-5)
    assert float(logged["image"]) > 0
    assert float(logged["bev"]) > 0


def test_a_fixed_weight_is_what_it_says() -> None:
    loss, logged, _ = distillation_step(DistillationConfig(weighting="fixed", weight=3.0))
    assert float(loss.detach()) == pytest.approx(3.0 * float(logged["raw"]), rel=1e-6)


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="axis 'diagonal'"):
        DistillationConfig(axis="diagonal")
    with pytest.raises(ConfigError, match="temperature"):
        DistillationConfig(temperature=0.0)
    with pytest.raises(ConfigError, match="method 'kd'"):
        Distillation([object()], "kd", DistillationConfig())


def test_the_weight_keeps_up_with_a_divergence_that_falls() -> None:
    """It falls tenfold in fifty steps, as those of real students do at the beginning."""
    teacher, student = Teacher(small_model()), small_model()
    batch = frames(student, 1)[0]
    noise = torch.Generator().manual_seed(1)
    start = [p.detach().clone() for p in student.parameters()]
    away = [0.02 * torch.randn(p.shape, generator=noise) for p in student.parameters()]
    distillation = Distillation([teacher], "vgd", DistillationConfig(weighting="gradient", weight=0.25))
    for step in range(50):
        with torch.no_grad():
            for parameter, origin, distance in zip(student.parameters(), start, away, strict=True):
                parameter.copy_(origin + 10 ** (-step / 200) * distance)
        out = run_batch(student, batch, None)
        task = out.class_logits.square().mean() + out.boxes.square().mean()
        loss, _ = distillation.loss(look(teacher, batch), out, task)
        if step > 45:
            norms = []
            for x in (loss, task):
                gradients = torch.autograd.grad(x, [out.bev, *out.image_features], retain_graph=True)
                norms.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
            assert float(norms[0] / norms[1]) == pytest.approx(0.25, rel=0.5)
