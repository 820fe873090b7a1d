# SPDX-License-Identifier: Apache-2.0
"""The training loop. History is the detached BEV of the last step (streams), or that of a queue's own past."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import Variant
from qdbev_train.checkpoint import read_tensors, save_model, write_tensors
from qdbev_train.data.dataset import Batch
from qdbev_train.training.auxiliary import TrainingHelps
from qdbev_train.training.config import TrainConfig
from qdbev_train.training.losses import Targets, detection_loss


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up from a third, then cosine down to a thousandth."""
    if step < config.warmup_steps:
        return config.learning_rate * (1 / 3 + 2 / 3 * step / config.warmup_steps)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class TrainingState:
    """Everything that a resumed run needs: weights, optimiser, memory, step and random numbers."""

    def __init__(self, model: nn.Module, helps: TrainingHelps, config: TrainConfig) -> None:
        self.model, self.helps, self.config = model, helps, config
        self.step = 0
        self.prev_bev: Tensor | None = None
        named = [(f"model.{n}", p) for n, p in model.named_parameters() if p.requires_grad]
        named += [(f"helps.{n}", p) for n, p in helps.named_parameters()]
        self.names = [name for name, _ in named]
        backbone = [p for n, p in named if n.startswith("model.img_backbone.")]
        others = [p for n, p in named if not n.startswith("model.img_backbone.")]
        groups = [{"params": backbone, "factor": config.backbone_factor}, {"params": others, "factor": 1.0}]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._parameters = dict(named)

    def set_learning_rate(self) -> float:
        rate = learning_rate_at(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        return rate

    def save(self, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"helps.{k}": v for k, v in self.helps.state_dict().items()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        tensors["rng"] = torch.get_rng_state()
        write_tensors(path, tensors, {"step": self.step, "config": asdict(self.config)})

    def load(self, path: Path) -> None:
        """Goes on where `path` stopped; the run must be the same but for its length."""
        tensors, metadata = read_tensors(path)
        free = {"steps", "save_every", "out"}
        now = asdict(self.config)
        changed = [k for k, v in metadata["config"].items() if k not in free and now.get(k) != v]
        if changed:
            raise ConfigError(
                f"{path} was trained with other settings ({', '.join(changed)}); choose another `out`"
            )
        for prefix, module in (("model.", self.model), ("helps.", self.helps)):
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".", 2)
                self.optimizer.state[self._parameters[name]][slot] = value
        self.step = int(metadata["step"])
        torch.set_rng_state(tensors["rng"])


def train_step(state: TrainingState, batch: Batch) -> dict[str, Tensor]:
    """Forward pass and losses of one batch; `state.prev_bev` moves on to this frame's map, detached."""
    device = next(state.model.parameters()).device
    targets = [Targets(k.to(device), c.to(device)) for k, c in zip(batch.labels, batch.codes, strict=True)]
    images, lidar2img = batch.images.to(device), batch.lidar2img.to(device)
    positives = torch.tensor(float(max(1, sum(len(t.labels) for t in targets))), device=device)
    extra, layout = state.helps.extra_queries(targets)
    # A stream's first frame has no history; before the first step no stream has.
    has_prev = ~batch.is_first if state.prev_bev is not None else torch.zeros_like(batch.is_first)
    out = state.model(
        images,
        lidar2img,
        batch.can_bus.to(device),
        state.prev_bev,
        has_prev=has_prev.to(device),
        extra_queries=extra,
    )
    state.prev_bev = out.bev.detach()
    q = state.helps.variant.transformer.queries
    losses = detection_loss(out.class_logits[:, :, :q], out.boxes[:, :, :q], targets, positives)
    losses |= state.helps.losses(
        out.class_logits, out.boxes, out.bev, out.image_features[0], lidar2img, targets, layout, positives
    )
    return losses


@torch.no_grad()
def remember(model: nn.Module, history: Sequence[Batch]) -> Tensor:
    """The BEV map (B, cells, C) after the frames of a queue, computed as in deployment: no dropout, no gradient."""
    model.eval()
    device = next(model.parameters()).device
    bev: Tensor | None = None
    for batch in history:
        bev = model(
            batch.images.to(device),
            batch.lidar2img.to(device),
            batch.can_bus.to(device),
            bev,
            has_prev=None if bev is None else ~batch.is_first.to(device),
        ).bev
    model.train()
    assert bev is not None
    return bev


def train(
    model: nn.Module,
    variant: Variant,
    config: TrainConfig,
    open_data: Callable[[int], Iterable[Sequence[Batch]]],
    quantisation: Any = None,
) -> Path:
    """Trains to `config.steps`, resuming from `config.out`/last.safetensors where there is one.

    `open_data(step)` gives from that step on, for each step, the frames to remember and then the one to learn from: a
    stream remembers the step before and gives one frame, a queue brings its own past. `quantisation` goes into the
    model file of a student.
    Returns the path of the finished model file. Progress goes to the terminal and to TensorBoard in `config.out`.
    """
    out = Path(config.out)
    torch.manual_seed(config.seed)
    fabric = Fabric(accelerator="auto", devices=1)
    helps = TrainingHelps(variant, config.query_groups, config.denoising_groups, config.dense_heads)
    state = TrainingState(model, helps, config)
    last = out / "last.safetensors"
    if last.exists():
        state.load(last)
    model.to(fabric.device), helps.to(fabric.device)
    model.train()
    writer = SummaryWriter(str(out), purge_step=state.step)
    progress = tqdm(
        total=config.steps, initial=state.step, desc=f"train {variant.name}", unit="step", smoothing=0.02
    )
    smoothed: float | None = None
    for *history, batch in islice(open_data(state.step), config.steps - state.step):
        if history:
            state.prev_bev = remember(model, history)
        rate = state.set_learning_rate()
        losses = train_step(state, batch)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            raise ConfigError(
                f"the loss is {total.item()} at step {state.step}; lower learning_rate in the settings"
            )
        state.optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [p for g in state.optimizer.param_groups for p in g["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        state.optimizer.step()
        state.step += 1
        main = float((losses["class"] + losses["box"]).detach())
        smoothed = main if smoothed is None else 0.98 * smoothed + 0.02 * main
        progress.update()
        progress.set_postfix(loss=f"{smoothed:.2f}")
        if state.step % 10 == 0:
            scalars = {f"loss/{k}": float(v.detach()) for k, v in losses.items()}
            scalars |= {"loss/total": float(total.detach()), "norm": float(norm), "lr": rate}
            for key, value in scalars.items():
                writer.add_scalar(key, value, state.step)
        if state.step % config.save_every == 0 or state.step == config.steps:
            state.save(last)
            save_model(
                out / "model.safetensors", model, variant, provenance(config, state.step), quantisation
            )
    progress.close()
    writer.close()
    return out / "model.safetensors"


def provenance(config: TrainConfig, step: int) -> dict[str, Any]:
    """What a checkpoint says of its making."""
    return {"config": asdict(config), "steps": step, "samples": step * config.batch}
