"""AdamW for steps that a CUDA graph holds, the learning rate's course, and half precision.

The weights that learn are float32 (the master weights), and on a GPU the network computes with
copies of them in half precision (`Rounded`; Micikevicius et al. 2018, §3.1). A bfloat16 number has
8 bits: a step of 2e-6 on a weight of 0.02 would be rounded away every time.
"""
import contextlib
import functools
import math

import torch

# The loss scale of float16: where it begins, and after how many good steps in a row it doubles.
FIRST_SCALE = 2.0**14
GROW_AFTER = 2000


class Rounded:
    """A context in which a module computes with half-precision copies of what learns in it.

        rounded = Rounded(network, torch.float16)
        with rounded:
            (loss(network) * rounded.scale).backward()

    As soon as a copy has its gradient, that is added to `grad` of the float32 weight. dtype:
    bfloat16, float16, or float32, with which nothing changes. (torch.autocast does the same with
    norms in float32, which takes a fifth more time in training, and more memory.)

    float16 has no numbers between 0 and 6e-8, where many gradients lie. So the loss is multiplied
    by `scale`, a tensor [], and whoever reads the gradients divides them by it (Micikevicius et
    al. 2018, §3.2). In the other formats it stays 1.
    """

    def __init__(self, module, dtype):
        self.dtype = dtype
        self.places = []
        self.weights = []
        for layer in module.modules():
            for name, weight in layer._parameters.items():
                if weight is not None and weight.requires_grad and weight.dtype != dtype:
                    self.places.append((layer, name))
                    self.weights.append(weight)
        # Made once: a CUDA graph reads them where they lie.
        self.copies = [torch.empty_like(w, dtype=dtype) for w in self.weights]
        for copy, weight in zip(self.copies, self.weights):
            copy.requires_grad_()
            copy.register_post_accumulate_grad_hook(functools.partial(hand_over, weight))
        device = next(module.parameters()).device
        first = FIRST_SCALE if dtype == torch.float16 else 1.0
        self.scale = torch.tensor(first, device=device)
        self.good_steps = torch.zeros((), device=device)

    def __enter__(self):
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.weights)
        for (layer, name), copy in zip(self.places, self.copies):
            layer._parameters[name] = copy

    def __exit__(self, *_):
        for (layer, name), weight in zip(self.places, self.weights):
            layer._parameters[name] = weight

    def adapt(self, skip):
        """Choose the next step's scale. skip: a tensor [], 1 if a gradient was not finite, else 0.

        It was too large for float16 then, so the scale is halved, down to 1. After GROW_AFTER steps
        without that it is doubled.

        (torch.amp.GradScaler does so, too. But it reads all gradients once more to find what is not
        finite, which a norm of ours tells, and its scale has no lower end, where a run is lost.)
        """
        if self.dtype != torch.float16:
            return
        self.good_steps.copy_((self.good_steps + 1) * (1 - skip))
        grows = self.good_steps == GROW_AFTER
        self.good_steps *= ~grows
        self.scale *= 1 + grows.float() - skip / 2
        self.scale.clamp_(min=1)

    def state_dict(self):
        """What a checkpoint holds: nothing but for float16."""
        if self.dtype != torch.float16:
            return {}
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state):
        """Go on from a `state_dict`; one of another format changes nothing."""
        if self.dtype == torch.float16 and state:
            self.scale.copy_(state["scale"])
            self.good_steps.copy_(state["good_steps"])


def hand_over(weight, copy):
    """Add the gradient of a weight's copy to the weight's own, and free it."""
    if weight.grad is None:
        weight.grad = copy.grad.float()
    else:
        weight.grad += copy.grad
    copy.grad = None


class Vector:
    """All weights of a module that learn, as one vector θ [n] float32.

    `theta`, `theta.grad` and `average` (of θ over time) each lie in one piece, and the weights of
    the module and their `grad` are views of them. So what is done to all weights (a mean over
    processes, clipping, the average) is one operation, not one per weight.
    """

    def __init__(self, module, spare=0):
        """spare: so many numbers, `spare`, lie behind θ's gradient in `gradient`."""
        weights = [w for w in module.parameters() if w.requires_grad]
        begins = [0]
        for w in weights:
            # Each begins at a multiple of 64 numbers, as matrix products on a GPU like it.
            begins.append(begins[-1] + math.ceil(w.numel() / 64) * 64)
        total, device = begins.pop(), weights[0].device
        self.theta = torch.nn.Parameter(torch.zeros(total, device=device))
        self.gradient = torch.zeros(total + spare, device=device)
        self.theta.grad, self.spare = self.gradient.split([total, spare])
        for w, begin in zip(weights, begins):
            view = self.theta.data.as_strided(w.shape, w.stride(), begin)
            view.copy_(w.data)
            w.data = view
            w.grad = self.theta.grad.as_strided(w.shape, w.stride(), begin)
        self.average = self.theta.detach().clone()


def adamw(groups, betas, skip=None):
    """AdamW over float32 weights: groups of (parameters, learning rate, weight decay).

    Each learning rate is a tensor [], `group["lr"]`, so that a CUDA graph reads what `set_rates`
    wrote last. skip: a tensor [], read at every step: where it is 1, the step changes nothing.
    """
    settings = []
    for parameters, rate, decay in groups:
        parameters = list(parameters)
        device = parameters[0].device
        lr = torch.tensor(rate, device=device)
        settings.append({"params": parameters, "lr": lr, "weight_decay": decay})
    cuda = device.type == "cuda"
    fused = cuda or skip is not None
    optimizer = torch.optim.AdamW(settings, betas=betas, fused=fused, capturable=cuda)
    optimizer.found_inf = skip  # the name that PyTorch's loss scaler uses; the fused AdamW reads it
    return optimizer


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
def exchanged(a, b, piece=2**24):
    """Within this context two vectors hold each other's values.

    They change places piece by piece, in the memory of one piece.
    """
    def exchange():
        for one, other in zip(a.detach().split(piece), b.detach().split(piece)):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()
