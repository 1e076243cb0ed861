"""Megatron's optimizer and learning-rate schedule for our configuration.

Without FusedAdam (a CPU, or a GPU without Transformer Engine and apex) Megatron falls back to
torch's Adam, whose state its distributed optimizer can save but not load. `PlainAdam` has
FusedAdam's state layout, so that such a run can resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim.adamw import adamw

from megatron_drpo.config import Config
from megatron_drpo.device import Device
from megatron_drpo.mcore import precision


class PlainAdam(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with the state of FusedAdam: `step` in the group, moments in fp32.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as in the paper.
        adam_w_mode: decoupled weight decay; the only mode here.
        capturable: for CUDA graphs, asked about from megatron-core 0.17 on; False only.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode, "PlainAdam decouples weight decay"
        assert not capturable, "PlainAdam counts its steps on the host"
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for param in params:
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(step - 1)) for _ in params],  # which adamw itself advances
                foreach=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _use_plain_adam() -> None:
    """Let Megatron build PlainAdam and treat it as apex's FusedAdam.

    Megatron decides by what is installed, when these two modules are imported.
    """
    megatron_optimizer.Adam = distrib_optimizer.Adam = PlainAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that Megatron chains: of the experts' parameters and of the others'."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def clip_gradients(optimizer: MegatronOptimizer, most: float, norm: float) -> None:
    """Scale the gradients down to the global norm `most`; `norm` is what theirs is."""
    for part in parts(optimizer):
        clip_grad_by_total_norm_fp32(
            part.get_parameters(),
            most,
            norm,
            # Where the inner optimizer owns the masters, gradients are not in `grad`.
            use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
        )


def _know_order(optimizer: distrib_optimizer.DistributedOptimizer) -> None:
    """Where each parameter's state is: Megatron puts the fp32 ones of a group before the others,
    and forgets it when it saves and loads."""
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for number, (fp32, others) in enumerate(groups):
        for order, parameter in enumerate([*fp32, *others]):
            optimizer.model_param_group_index_map[parameter] = (number, order)


@torch.no_grad()
def _make_hybrid_state(optimizer: HybridDeviceOptimizer, config: Any = None) -> None:
    """Moments and master weights as before the first update, which Megatron cannot make itself."""
    for each in optimizer.sub_optimizers:
        for group in each.param_groups:
            for param in group["params"]:
                state = each.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                    if isinstance(each, torch.optim.Adam | torch.optim.AdamW):
                        state["step"] = torch.tensor(0.0)
    optimizer._sync_sub_optimizers_state_to_hdo()


def build_optimizer(
    config: Config, chunks: Sequence[DistributedDataParallel], device: Device
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer over this rank's chunks, and its schedule counted in optimizer updates."""
    if device.kind == "cpu" or megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        _use_plain_adam()
    ours = config.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=ours.lr,
            min_lr=ours.min_lr,
            weight_decay=ours.weight_decay,
            adam_beta1=ours.adam_beta1,
            adam_beta2=ours.adam_beta2,
            adam_eps=ours.adam_eps,
            clip_grad=ours.clip_grad,
            bf16=config.model.bf16,
            params_dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            use_distributed_optimizer=ours.use_distributed_optimizer,
            **precision.of_optimizer(config),
        ),
        list(chunks),
    )
    for part in parts(optimizer):
        if isinstance(part, distrib_optimizer.DistributedOptimizer) and not part.is_stub_optimizer:
            _know_order(part)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.init_state_fn = _make_hybrid_state
            # Classes among the settings, which a checkpoint could be saved with but not loaded.
            for group in part.optimizer.param_groups:
                del group["cpu_optimizer_cls"], group["gpu_optimizer_cls"]
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=ours.lr,
        min_lr=ours.min_lr,
        lr_warmup_steps=ours.lr_warmup_iters,
        lr_decay_steps=ours.lr_decay_iters or max(config.num_updates, ours.lr_warmup_iters + 1),
        lr_decay_style=ours.lr_decay_style,
        start_wd=ours.weight_decay,
        end_wd=ours.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    # Megatron's count starts at 0, which would give the first update of a warm-up a rate of 0.
    scheduler.step(increment=1)
    return optimizer, scheduler
