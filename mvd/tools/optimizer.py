"""AdamW for steps that a CUDA graph holds, the learning rate's course, and bfloat16 on a GPU.

The weights that learn are float32 (the master weights), and on a GPU `autocast` lets the network
compute with bfloat16 copies of them (Micikevicius et al. 2018, §3.1). A bfloat16 number has 8
bits: a step of 2e-6 on a weight of 0.02 would be rounded away every time.
"""
import contextlib
import math

import torch


def autocast(device):
    """A context in which a network computes in bfloat16, on CUDA; elsewhere it changes nothing."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def adamw(groups, betas):
    """AdamW over float32 weights: groups of (parameters, learning rate, weight decay).

    Each learning rate is a tensor [], `group["lr"]`, so that a CUDA graph reads what `set_rates`
    wrote last.
    """
    groups = [(list(parameters), rate, decay) for parameters, rate, decay in groups]
    device = groups[0][0][0].device
    cuda = device.type == "cuda"
    settings = []
    for parameters, rate, decay in groups:
        lr = torch.tensor(rate, device=device)
        settings.append({"params": parameters, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(settings, betas=betas, fused=cuda, capturable=cuda)


def set_rates(optimizer, *rates):
    """Set the learning rate of each group of `adamw`."""
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"].fill_(rate)


def learning_rate(step, steps, peak):
    """Of step 0..steps - 1: linear warm-up to `peak` over 2% of the steps, then cosine decay."""
    warm_up = max(1, steps // 50)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return peak * min((step + 1) / warm_up, cosine)


@contextlib.contextmanager
def swapped_in(parameters, tensors):
    """Within this context the parameters hold the values of the tensors; afterwards their own."""
    parameters = list(parameters)
    with torch.no_grad():
        kept = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, tensors)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
