"""AdamW on float32 weights of a network that works, on a GPU, with rounded bfloat16 copies of them (Micikevicius et al. 2018, §3.1).

A bfloat16 number has 8 bits: a step of 2e-6 on a weight of 0.02 would be rounded away every time. So the optimizer moves float32
weights, and the network computes with copies that are rounded anew after each step.
"""
import math

import torch

from .device import load_optimizer


class MasterAdamW:
    """groups: (module, learning rate, weight decay) each. `weights`: float32 [...], one for each parameter of the modules, in their order.
    `lr`: of each group a tensor [], which a CUDA graph reads."""

    def __init__(self, groups, betas):
        modules, rates, decays = zip(*groups)
        masters = [[p.detach().float().clone() for p in module.parameters()] for module in modules]
        self.weights = sum(masters, [])
        device = self.weights[0].device
        cuda = device.type == "cuda"
        self.copies = [p for module in modules for p in module.to(torch.bfloat16 if cuda else torch.float32).parameters()]
        self.lr = [torch.tensor(rate, device=device) for rate in rates]
        self.adam = torch.optim.AdamW([{"params": weights, "lr": lr, "weight_decay": decay}
                                       for weights, lr, decay in zip(masters, self.lr, decays)], betas=betas, fused=cuda, capturable=cuda)

    @torch.no_grad()
    def work_with(self, tensors):
        """Let the network compute with these: the weights, or an average of them."""
        torch._foreach_copy_(self.copies, tensors)

    def backward(self, loss):
        """The gradient of the loss, as float32 `grad` of the weights; None where the loss does not depend on one."""
        gradients = list(torch.autograd.grad(loss, self.copies, allow_unused=True))
        for i, w in enumerate(self.weights):                                     # one by one: a bfloat16 gradient goes as its
            w.grad = None if gradients[i] is None else gradients[i].float()      # float32 one comes
            gradients[i] = None

    def step(self):
        """Move the weights, round them for the network, and give the gradients' memory back."""
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.work_with(self.weights)

    def finish(self, tensors):
        """Training is over: from here on the modules hold these float32 tensors themselves, the weights or an average of them."""
        for copy, tensor in zip(self.copies, tensors):
            copy.data = tensor                                                   # no second copy: at full size it takes 3.2 GiB

    def state_dict(self):
        return {"weights": self.weights, "optimizer": self.adam.state_dict()}

    def load_state_dict(self, state):
        """Go on from a `state_dict`, perhaps of another device."""
        load_optimizer(self.adam, state["optimizer"])
        for group, lr in zip(self.adam.param_groups, self.lr):
            group["lr"] = lr
        for w, kept in self.adam.state.items():                                  # in the layout of the weights, as fused AdamW wants
            kept.update({name: torch.empty_like(w).copy_(kept[name]) for name in ("exp_avg", "exp_avg_sq")})
        torch._foreach_copy_(self.weights, [saved.to(self.lr[0].device) for saved in state["weights"]])
        self.work_with(self.weights)


def learning_rate(step, steps, peak):
    """Of step 0..steps − 1: linear warm-up to `peak` over 2% of the steps, then half a cosine, down to 0 at the end."""
    warm_up = max(1, steps // 50)
    return peak * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
