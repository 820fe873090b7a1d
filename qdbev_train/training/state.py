# SPDX-License-Identifier: Apache-2.0
"""Everything that a resumed run needs: weights, optimiser, step, and each process's memory and random numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn

from qdbev_ros.core.errors import ConfigError
from qdbev_train.checkpoint import read_tensors, write_tensors
from qdbev_train.quantization import settle_scales
from qdbev_train.training.config import TrainConfig
from qdbev_train.training.objective import Objective

# Of the learning rate, for learned quantisation steps: a step is small, and an optimiser such as Adam moves everything
# by about the learning rate.
STEP_FACTOR = 0.1


class TrainingState:
    """The run so far, the same on every process but for `prev_bev` and the random numbers."""

    def __init__(self, objective: Objective, config: TrainConfig) -> None:
        self.objective, self.config = objective, config
        self.step = 0
        self.prev_bev: Tensor | None = None
        self.parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        learned = {n for n in self.parameters if n.endswith((".scale", ".weight_scale"))}
        named = {n: p for n, p in self.parameters.items() if n not in learned}
        backbone = [p for n, p in named.items() if n.startswith("model.img_backbone.")]
        others = [p for n, p in named.items() if not n.startswith("model.img_backbone.")]
        steps = {
            "params": [self.parameters[n] for n in sorted(learned)],
            "factor": STEP_FACTOR,
            "weight_decay": 0.0,
        }
        groups: list[dict[str, Any]] = [
            {"params": backbone, "factor": config.backbone_factor},
            {"params": others, "factor": 1.0},
            steps,
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        if learned:
            self.optimizer.register_step_post_hook(lambda *_: settle_scales(objective.model))

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]

    def save(self, path: Path, fabric: Fabric) -> None:
        """To be called by every process; the first one writes."""
        own = {"rng": torch.get_rng_state()}
        if fabric.device.type == "cuda":
            own["device_rng"] = torch.cuda.get_rng_state(fabric.device)
        if self.prev_bev is not None:
            own["prev_bev"] = self.prev_bev
        if self.objective.extra_loss is not None:
            own |= {f"extra.{k}": v for k, v in self.objective.extra_loss.state().items()}
        # Every process has its own; they are kept side by side.
        gathered = {k: _gather(fabric, v) for k, v in own.items()}
        if not fabric.is_global_zero:
            return
        tensors = {f"model.{k}": v for k, v in self.objective.model.state_dict().items()}
        tensors |= {f"helps.{k}": v for k, v in self.objective.helps.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        metadata = {"step": self.step, "processes": fabric.world_size, "config": asdict(self.config)}
        write_tensors(path, tensors | gathered, metadata)

    def load(self, path: Path, fabric: Fabric) -> None:
        """Goes on where `path` stopped; the run must be the same but for its length."""
        tensors, metadata = read_tensors(path)
        free = {"length", "save_every", "out", "evaluation"}
        now = asdict(self.config)
        changed = [k for k, v in metadata["config"].items() if k not in free and now.get(k) != v]
        if changed:
            raise ConfigError(
                f"{path} was trained with other settings ({', '.join(changed)}); choose another `out`"
            )
        if metadata["processes"] != fabric.world_size:
            # Which samples are left of an epoch would not come out even.
            raise ConfigError(
                f"{path} is of a run on {metadata['processes']} processes, this one has {fabric.world_size}; "
                "go on with as many, or give out/model.safetensors as `init` to a new run"
            )
        for prefix, module in (("model.", self.objective.model), ("helps.", self.objective.helps)):
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".", 2)
                parameter = self.parameters[name]
                self.optimizer.state[parameter][slot] = (
                    value if slot == "step" else value.to(parameter.device)
                )
        self.step = int(metadata["step"])
        rank = fabric.global_rank
        if "prev_bev" in tensors:
            self.prev_bev = tensors["prev_bev"][rank].to(fabric.device)
        if self.objective.extra_loss is not None:
            own = {k[len("extra.") :]: v[rank] for k, v in tensors.items() if k.startswith("extra.")}
            self.objective.extra_loss.load_state({k: v.to(fabric.device) for k, v in own.items()})
        # Clones, because torch reads these tensors from the beginning of their storage.
        torch.set_rng_state(tensors["rng"][rank].clone())
        if "device_rng" in tensors and fabric.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["device_rng"][rank].clone(), fabric.device)


def _gather(fabric: Fabric, tensor: Tensor) -> Tensor:
    """(processes, ...) of every process's tensor."""
    own = tensor.detach().to(fabric.device)
    if fabric.world_size == 1:
        return own[None]
    every = [torch.empty_like(own) for _ in range(fabric.world_size)]
    distributed.all_gather(every, own)
    return torch.stack(every)


def load_helps(helps: nn.Module, path: Path) -> None:
    """Lets training-only helps go on from another run's state; what that run did not have stays as it is."""
    tensors, _ = read_tensors(path)
    saved = {k.removeprefix("helps."): v for k, v in tensors.items() if k.startswith("helps.")}
    own = helps.state_dict()
    helps.load_state_dict(
        {k: saved[k] if k in saved and saved[k].shape == v.shape else v for k, v in own.items()}
    )
