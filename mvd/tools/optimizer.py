"""AdamW for steps that a CUDA graph holds, the learning rate's course, and bfloat16 on a GPU.

The weights that learn are float32 (the master weights), and on a GPU the network computes with
bfloat16 copies of them (`Rounded`; Micikevicius et al. 2018, §3.1). A bfloat16 number has 8 bits:
a step of 2e-6 on a weight of 0.02 would be rounded away every time.
"""
import contextlib
import math

import torch


class Rounded:
    """A context in which, on CUDA, a module computes with bfloat16 copies of what learns in it.

        in_bfloat16 = Rounded(network)
        with in_bfloat16:
            loss(network).backward()

    As the context ends, the gradients of the copies are added to `grad` of the float32 weights.
    Elsewhere than on CUDA nothing changes. (torch.autocast does the same with norms in float32,
    which takes a fifth more time in training, and more memory.)
    """

    def __init__(self, module):
        self.places = []
        self.weights = []
        for layer in module.modules():
            for name, weight in layer._parameters.items():
                if weight is not None and weight.requires_grad and weight.is_cuda:
                    self.places.append((layer, name))
                    self.weights.append(weight)
        # Made once: a CUDA graph reads them where they lie.
        self.copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in self.weights]
        for copy in self.copies:
            copy.requires_grad_()

    def __enter__(self):
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.weights)
        for (layer, name), copy in zip(self.places, self.copies):
            layer._parameters[name] = copy

    def __exit__(self, *_):
        for (layer, name), weight, copy in zip(self.places, self.weights, self.copies):
            layer._parameters[name] = weight
            if copy.grad is not None:
                gradient = copy.grad.float()
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
                copy.grad = None


def adamw(groups, betas):
    """AdamW over float32 weights: groups of (parameters, learning rate, weight decay).

    Each learning rate is a tensor [], `group["lr"]`, so that a CUDA graph reads what `set_rates`
    wrote last.
    """
    settings = []
    for parameters, rate, decay in groups:
        parameters = list(parameters)
        device = parameters[0].device
        lr = torch.tensor(rate, device=device)
        settings.append({"params": parameters, "lr": lr, "weight_decay": decay})
    cuda = device.type == "cuda"
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
