import torch

from habana_frameworks.torch import _hpex_C
from habana_frameworks.torch.core.step_closure import _mark_step_if_lazy


class FusedAdagrad(torch.optim.Optimizer):
    """Adagrad whose learning rate is `group["lr_t"]`, on the device. Changes of `group["lr"]` have no effect."""

    def __init__(self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10):
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"Invalid {name} value: {value}")
        super().__init__(params, defaults)
        for group in self.param_groups:
            group["lr_t"] = torch.tensor([lr], dtype=torch.float32).to("hpu")
            group["step_t"] = torch.zeros(1, dtype=torch.int32).to("hpu")
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, initial_accumulator_value)

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the parameters, after calling `closure` if there is one. Returns None."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            _mark_step_if_lazy()
            updated = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in updated):
                raise RuntimeError("FusedAdagrad does not support sparse gradients")
            group["step_t"] += 1
            _hpex_C.fused_adagrad(
                [p.grad for p in updated],
                updated,
                [self.state[p]["sum"] for p in updated],
                group["step_t"],
                group["lr_t"],
                group["weight_decay"],
                group["lr_decay"],
                group["eps"],
            )
