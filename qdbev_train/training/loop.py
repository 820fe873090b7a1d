# SPDX-License-Identifier: Apache-2.0
"""The training loop, on one process or on many. History is the detached BEV of the last step (streams), or that of a
queue's own past."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_ros.core.files import write_text
from qdbev_ros.core.variant import Variant
from qdbev_train.checkpoint import save_model
from qdbev_train.data.dataset import Batch
from qdbev_train.model import BEVFormer
from qdbev_train.training.auxiliary import TrainingHelps
from qdbev_train.training.config import TrainConfig
from qdbev_train.training.objective import ExtraLoss, Objective
from qdbev_train.training.schedule import learning_rate_at, make_plan
from qdbev_train.training.state import TrainingState, load_helps
from qdbev_train.training.stopping import StopRequest

UNSCORED = "unscored"  # holds a step whose score is due; a run that was killed while it scored does so when it goes on


@dataclass(frozen=True)
class TrainingData:
    """The frames to learn from.

    samples: frames an epoch · open(step, rank, processes) gives one process its share from that step on: for each step
    the frames to remember and then the one to learn from. A stream remembers the step before and gives one frame, a
    queue brings its own past.
    """

    samples: int
    open: Callable[[int, int, int], Iterable[Sequence[Batch]]]


def open_fabric(quantised: bool) -> Fabric:
    """One process on the machine's best device, or under torchrun as many as it started, joined by DDP."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return Fabric(accelerator="auto", devices=1)
    # The others wait while the first process evaluates. In a student not everything need have a gradient.
    strategy = DDPStrategy(
        timeout=timedelta(hours=12), find_unused_parameters=quantised, forward_sync_buffers=False
    )
    fabric = Fabric(accelerator="auto", devices=local, num_nodes=processes // local, strategy=strategy)
    fabric.launch()
    return fabric


def train_step(
    fabric: Fabric, objective: nn.Module, batch: Batch, prev_bev: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What `Objective.forward` gives for a batch; `objective` is one, perhaps in DDP."""
    device = fabric.device
    boxes = torch.tensor(float(sum(map(len, batch.labels))), device=device)
    positives = fabric.all_reduce(boxes, reduce_op="mean").clamp(min=1.0)  # type: ignore[union-attr]
    # A stream's first frame has no history; before the first step no stream has.
    has_prev = ~batch.is_first if prev_bev is not None else torch.zeros_like(batch.is_first)
    result: tuple[dict[str, Tensor], dict[str, Tensor], Tensor] = objective(
        batch.images.to(device),
        batch.lidar2img.to(device),
        batch.can_bus.to(device),
        [k.to(device) for k in batch.labels],
        [c.to(device) for c in batch.codes],
        positives,
        prev_bev,
        has_prev.to(device),
    )
    return result


def train(
    model: BEVFormer,
    variant: Variant,
    config: TrainConfig,
    data: TrainingData,
    quantisation: Any = None,
    extra_loss: ExtraLoss | None = None,
    evaluate: Callable[[Path], dict[str, float]] | None = None,
    helps_from: Path | None = None,
    rate_at: Callable[[int], float] | None = None,
) -> Path:
    """Trains for `config.length`, resuming from `config.out`/last.safetensors where there is one.

    `quantisation` goes into the model file of a student, `extra_loss` adds its losses to those of detection, `evaluate`
    gives the scores of a model file, `helps_from` is a training state whose training-only helps go on here, `rate_at`
    gives the learning rate of a step where it isn't that of `config`. Returns the path of the finished model file;
    progress goes to the terminal and to TensorBoard in `config.out`. Ctrl-C and SIGTERM save, and then raise
    KeyboardInterrupt.
    """
    fabric = open_fabric(quantisation is not None)
    torch.manual_seed(config.seed + fabric.global_rank)
    helps = TrainingHelps(variant, config.query_groups, config.denoising_groups, config.dense_heads)
    if helps_from is not None:
        load_helps(helps, helps_from)
    objective = Objective(model, helps, config, extra_loss).to(fabric.device)
    objective.train()
    state = TrainingState(objective, config)
    run = _Run(fabric, state, variant, quantisation, evaluate)
    if run.last.exists():
        state.load(run.last, fabric)
    plan = make_plan(config, data.samples, fabric.world_size)
    owed = run.owes_score()
    if run.is_over(plan.steps):
        # A kill between the last save's two files left the model file as it was before.
        run.save()
        if not owed:
            return run.model_file
    module = fabric.setup_module(objective) if fabric.world_size > 1 else objective
    batches = data.open(state.step, fabric.global_rank, fabric.world_size)
    stopped = False
    with StopRequest() as stop, run.progress(plan.steps) as progress:
        if owed:
            run.evaluate()
        for *history, batch in islice(batches, plan.steps - state.step):
            if history:
                state.prev_bev = objective.remember(history)
            rate = learning_rate_at(state.step, config, plan) if rate_at is None else rate_at(state.step)
            state.set_learning_rate(rate)
            losses, numbers, bev = train_step(fabric, module, batch, state.prev_bev)
            stopped, scalars = run.agree(losses, numbers, stop.asked)
            state.optimizer.zero_grad(set_to_none=True)
            fabric.backward(torch.stack(list(losses.values())).sum())
            norm = nn.utils.clip_grad_norm_(state.parameters.values(), config.clip_norm)
            state.optimizer.step()
            state.prev_bev = None if history else bev
            state.step += 1
            run.log(progress, scalars | {"norm": float(norm), "lr": rate})
            finished = state.step == plan.steps
            due = plan.evaluate_every is not None and (finished or state.step % plan.evaluate_every == 0)
            if due:
                run.owe_score()
            if stopped or finished or due or state.step % config.save_every == 0:
                run.save()
            if stopped:
                break
            if due:
                run.evaluate()
    run.close()
    # In the last step too: whoever stops a stage doesn't want the next one.
    if stopped:
        run.give_up(plan.steps)
    return run.model_file


class _Run:
    """What a run leaves behind: files, TensorBoard scalars, a progress bar. Only the first process writes."""

    def __init__(
        self,
        fabric: Fabric,
        state: TrainingState,
        variant: Variant,
        quantisation: Any,
        evaluate: Callable[[Path], dict[str, float]] | None,
    ) -> None:
        self._fabric, self._state, self._variant = fabric, state, variant
        self._quantisation, self._evaluate = quantisation, evaluate
        out = Path(state.config.out)
        self.last, self.model_file = out / "last.safetensors", out / "model.safetensors"
        self._unscored = out / UNSCORED
        self._writer: SummaryWriter | None = None
        self._smoothed: float | None = None

    def is_over(self, steps: int) -> bool:
        """Whether no step is left. Raises ConfigError where the run went further than `steps`."""
        if self._state.step > steps:
            raise ConfigError(
                f"{self.last} is at step {self._state.step} already, length is {steps} steps; "
                "make it longer or choose another `out`"
            )
        return self._state.step == steps

    def progress(self, steps: int) -> tqdm[Any]:
        state, first = self._state, self._fabric.is_global_zero
        if first:
            try:
                self._writer = SummaryWriter(state.config.out, purge_step=state.step + 1)
            except OSError as error:
                raise DataError(f"{state.config.out}: cannot be written: {error.strerror}") from error
        title = f"train {self._variant.name}"
        return tqdm(
            total=steps, initial=state.step, desc=title, unit="step", smoothing=0.02, disable=not first
        )

    def agree(
        self, losses: dict[str, Tensor], numbers: dict[str, Tensor], stop: bool
    ) -> tuple[bool, dict[str, float]]:
        """Whether any process was asked to stop, and what to log, on average over the processes.

        Raises ConfigError, on all of them, where a loss isn't finite.
        """
        device = self._fabric.device
        named = {f"loss/{k}": v.detach() for k, v in losses.items()} | numbers
        own = torch.stack(
            [*(v.float().to(device) for v in named.values()), torch.tensor(float(stop), device=device)]
        )
        mean = self._fabric.all_reduce(own, reduce_op="mean")
        assert isinstance(mean, Tensor)
        *values, stopped = mean.tolist()
        total = sum(values[: len(losses)])
        if not torch.isfinite(torch.tensor(total)):
            raise ConfigError(
                f"the loss is {total} at step {self._state.step}; lower learning_rate in the settings"
            )
        return stopped > 0, dict(zip(named, values, strict=True)) | {"loss/total": total}

    def log(self, progress: tqdm[Any], scalars: dict[str, float]) -> None:
        total = scalars["loss/total"]
        self._smoothed = total if self._smoothed is None else 0.95 * self._smoothed + 0.05 * total
        progress.set_postfix(loss=f"{self._smoothed:.2f}", lr=f"{scalars['lr']:.1e}", refresh=False)
        progress.update()
        self._write(scalars)

    def save(self) -> None:
        """The state to go on from, and the model file."""
        state = self._state
        state.save(self.last, self._fabric)
        if self._fabric.is_global_zero:
            made = provenance(state.config, state.step, self._fabric.world_size)
            save_model(self.model_file, state.objective.model, self._variant, made, self._quantisation)
        self._fabric.barrier()  # whoever goes on may read the files

    def owe_score(self) -> None:
        """Notes that this step is to be scored, before the files of it are there."""
        if self._fabric.is_global_zero:
            write_text(self._unscored, str(self._state.step))

    def owes_score(self) -> bool:
        """Whether this step was to be scored and wasn't."""
        noted = self._unscored.read_text() if self._unscored.exists() else ""
        self._fabric.barrier()  # the first process will remove it
        return self._evaluate is not None and noted == str(self._state.step)

    def evaluate(self) -> None:
        """Scores the model as it is; the first process does, the others wait."""
        assert self._evaluate is not None
        if self._fabric.is_global_zero:
            # Building the model to score draws random numbers that are the training's.
            with torch.random.fork_rng():
                scores = self._evaluate(self.model_file)
            self._write({f"score/{k}": v for k, v in scores.items()})
            text = " ".join(f"{k} {v:.4f}" for k, v in scores.items())
            tqdm.write(f"step {self._state.step}: {text}")
            self._unscored.unlink(missing_ok=True)
        self._fabric.barrier()

    def _write(self, scalars: dict[str, float]) -> None:
        if self._writer is not None:
            for key, value in scalars.items():
                self._writer.add_scalar(key, value, self._state.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def give_up(self, steps: int) -> None:
        """Ends a run that was asked to stop, with one line in all."""
        if not self._fabric.is_global_zero:
            raise SystemExit(130)
        raise KeyboardInterrupt(
            f"stopped at step {self._state.step} of {steps}; the same command goes on from there"
        )


def provenance(config: TrainConfig, step: int, processes: int) -> dict[str, Any]:
    """What a checkpoint says of its making."""
    return {"config": asdict(config), "steps": step, "samples": step * config.batch * processes}
