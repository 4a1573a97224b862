"""The UNet of Stable Diffusion 2 with MVDream's two changes (MVDream §3.1, figure 3).

1. Every self-attention runs over the tokens of all views at once ("3D attention"). The weights are
   those of the 2D model; only the tokens are gathered differently, [B·V, L, C] -> [B, V·L, C].
2. The camera of each view (16 numbers) goes through a two-layer MLP and is added to the time
   embedding.

Without a camera both are off: each view attends to itself alone, and the same weights are a
text-to-image model (the 2D mode). `UNetConfig` can exchange either change for another one, which
the paper compares it with.

The file goes from small to large: embeddings, convolutions, ResBlock, attention, transformer, the
blocks of the U, and the U itself. N stands for B·V, the views of all sets.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .groupnorm import GroupNorm
from .tools.errors import UserError

# What stands for the two changes; the first of each is MVDream's, the others its ablations.
ATTENTION = ("3d", "pixel", "view")
CAMERA = ("time", "text", "none")
# What the network is trained to tell from x_t: the noise, or v (`diffusion.predict_noise`).
PREDICTION = ("eps", "v")


@dataclass
class UNetConfig:
    """The defaults are Stable Diffusion 2.1's with a camera MLP: 868 M parameters."""
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    # The width of each level as a multiple of model_channels, finest level first.
    channel_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    # The downsampling rates at which a transformer follows each ResBlock.
    attention_resolutions: tuple = (1, 2, 4)
    head_dim: int = 64
    context_dim: int = 1024
    camera_dim: int = 16
    # Groups of every group norm.
    groups: int = 32
    # How the views of a set see each other. "3d": self-attention over all tokens of all views;
    # "pixel": each view alone, then a new layer over the V tokens of one pixel; "view": not at all.
    attention: str = "3d"
    # Where the camera of a view goes. "time": its MLP is added to the time embedding; "text": it
    # is one more token of the text that this view sees; "none": nowhere.
    camera: str = "time"
    # "v": the 768-pixel Stable Diffusion 2, for example.
    prediction: str = "eps"


# ---- time and camera -------------------------------------------------------------------------

def time_embedding(t, width):
    """Sinusoids of the time step: t [N] -> [N, width], all cosines first, then all sines.

    Attention is all you need, §3.5, as DDPM uses it (appendix B). Float32 in any network.
    """
    half = width // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    frequency = torch.exp(-math.log(10000) * k / half)
    angle = t.float()[:, None] * frequency  # [N, half]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def embedding_mlp(width_in, width):
    """The two-layer network of an embedding: [..., width_in] -> [..., width]."""
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))


def zero_module(layer):
    """The layer with all parameters zero: the residual branch that it ends starts at nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def new_camera_mlp(config):
    """The camera's two-layer MLP: [..., 16] -> the width of the time embedding, or of a token."""
    width = config.context_dim if config.camera == "text" else 4 * config.model_channels
    return embedding_mlp(config.camera_dim, width)


def zero_camera_mlp(config):
    """A camera MLP for Stable Diffusion, which has none (`MVDream.load`): its output is zero.

    So at first it changes nothing. A UNet that is trained from nothing has an ordinary one.
    """
    mlp = new_camera_mlp(config)
    zero_module(mlp[-1])
    return mlp


# ---- convolutions ----------------------------------------------------------------------------

class Conv2d(nn.Conv2d):
    """A convolution that takes any number format and computes in that of its weights.

    Where it is compiled, the bias is added apart: the compiler fuses that into what reads the sum.
    """

    def forward(self, x):
        x = x.to(self.weight.dtype)
        if not torch.compiler.is_compiling():
            return super().forward(x)
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return x + self.bias.to(x.dtype)[:, None, None]


class ResidualConv(Conv2d):
    """A convolution whose output is part of the residual stream, which blocks add to in turn.

    It returns float32 even if the weights are bfloat16: a sum of many blocks would lose its small
    terms in 8 bits.
    """

    def forward(self, x):
        return super().forward(x).to(torch.promote_types(x.dtype, torch.float32))


class Downsample(ResidualConv):
    """Halve height and width: [N, C, h, w] -> [N, C, h/2, w/2]."""

    def __init__(self, width):
        super().__init__(width, width, 3, stride=2, padding=1)


class Upsample(ResidualConv):
    """Double height and width: [N, C, h, w] -> [N, C, 2h, 2w]."""

    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions, with the time (and camera) embedding added between them."""

    def __init__(self, width_in, width, embedding_width, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, width_in)
        self.conv1 = Conv2d(width_in, width, 3, padding=1)
        self.embed = nn.Linear(embedding_width, width)
        self.norm2 = GroupNorm(groups, width)
        self.conv2 = zero_module(Conv2d(width, width, 3, padding=1))
        same = width_in == width
        self.skip = nn.Identity() if same else ResidualConv(width_in, width, 1)

    def forward(self, x, embedding):
        """x [N, width_in, h, w], embedding [N, E] -> [N, width, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embed(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


# ---- attention -------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention: x [..., L, C] looks at context [..., M, D], or itself: [..., L, C]."""

    def __init__(self, width, context_width, head_dim):
        super().__init__()
        self.heads = width // head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)
        # No parameter and no buffer: it is not saved (see `join`).
        self.joined = None

    def join(self):
        """Let the weights of k and v, and of q if it reads as many numbers, lie in one tensor.

        A compiler then needs one product for them, which is faster. The parameters become slices
        of that tensor, so it holds what is written into them. None is made where a weight learns:
        the gradient would not reach it. Called again, it does nothing unless a weight lies
        elsewhere by now, or learns.
        """
        layers = [self.to_q, self.to_k, self.to_v]
        if self.to_q.weight.shape != self.to_k.weight.shape:
            layers.remove(self.to_q)
        weights = [layer.weight for layer in layers]
        if any(weight.requires_grad for weight in weights):
            self.joined = None
            return
        if self.joined is not None:
            slices = self.joined.chunk(len(weights))
            if all(w.data_ptr() == part.data_ptr() for w, part in zip(weights, slices)):
                return
        self.joined = torch.cat(weights)
        for weight, part in zip(weights, self.joined.chunk(len(weights))):
            weight.data = part

    def split_heads(self, x):
        """[..., L, heads·d] -> [..., heads, L, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x, context=None):
        """softmax(q kᵀ / sqrt(d)) v per head (Attention is all you need, eq. 1)."""
        if self.joined is None or not torch.compiler.is_compiling():
            context = x if context is None else context
            q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        elif context is None:
            q, k, v = F.linear(x, self.joined).chunk(3, dim=-1)
        else:
            q = self.to_q(x)
            k, v = F.linear(context, self.joined[-2 * x.shape[-1] :]).chunk(2, dim=-1)
        q, k, v = map(self.split_heads, (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)  # [..., heads, L, d]
        return self.to_out(out.transpose(-3, -2).flatten(-2))


class MultiViewTransformer(nn.Module):
    """Self-attention over all views, cross-attention to the text, a gated feed-forward network.

    Each has a residual. The 3D attention of MVDream is two lines of `forward`. attention: one of
    ATTENTION.
    """

    def __init__(self, width, context_width, head_dim, groups, attention="3d"):
        super().__init__()
        self.attention = attention
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, context_width, head_dim)
        self.norm3 = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 8 * width)
        self.feed_out = nn.Linear(4 * width, width)
        self.proj_out = zero_module(nn.Linear(width, width))
        if attention == "pixel":
            self.pixel_norm = nn.LayerNorm(width)
            self.pixel_attention = Attention(width, width, head_dim)
            zero_module(self.pixel_attention.to_out)

    def feed_forward(self, x):
        """GEGLU (Shazeer 2020): half of the hidden layer, the second, gates the first."""
        value, gate = self.feed_in(x).chunk(2, dim=-1)
        return self.feed_out(value * F.gelu(gate))

    def attend_at_pixels(self, y, views):
        """The V tokens of a pixel see each other, and no others: y [B·V, h·w, C] -> the same."""
        y = y.unflatten(0, (-1, views)).transpose(1, 2)  # [B, h·w, V, C]
        y = self.pixel_attention(self.pixel_norm(y))
        return y.transpose(1, 2).flatten(0, 1)

    def forward(self, x, context, views, across_views):
        """x [B·V, C, h, w], context [B, L, D] -> [B·V, C, h, w].

        views: V. across_views: do the views of a set see each other (3D mode)? context may also be
        [B·V, L, D], a text for each view.
        """
        N, C, height, width = x.shape
        sets, tokens = N // views, height * width
        y = self.norm(x).to(self.proj_in.weight.dtype)
        y = self.proj_in(y.flatten(2).transpose(1, 2))  # [B·V, h·w, C]

        if across_views and self.attention == "3d":  # 3D attention: the tokens of all V views
            y = y.reshape(sets, views * tokens, C)
        y = y + self.self_attention(self.norm1(y))
        if across_views and self.attention == "pixel":  # an ablation
            y = y + self.attend_at_pixels(y, views)
        # In both modes: the views of a set share one text, so context is not repeated V times.
        # From here on the tokens of an image do not see each other.
        y = y.reshape(len(context), -1, C)
        y = y + self.cross_attention(self.norm2(y), context)
        y = y + self.feed_forward(self.norm3(y))

        y = self.proj_out(y).reshape(N, tokens, C)
        return x + y.transpose(1, 2).unflatten(2, (height, width))


# ---- the U -----------------------------------------------------------------------------------

def check_variant(config):
    """Raise UserError if a name in a UNetConfig is none of those there are."""
    named = (("attention", ATTENTION), ("camera", CAMERA), ("prediction", PREDICTION))
    for name, known in named:
        value = getattr(config, name)
        if value not in known:
            raise UserError(f"the UNet has no {name} {value!r}: choose {', '.join(known)}")


def is_variant(config):
    """Does a UNetConfig differ from MVDream in more than sizes? Other tools cannot read that."""
    return (config.attention, config.camera) != (ATTENTION[0], CAMERA[0])


class Block(nn.Module):
    """One entry of encoder, middle or decoder, numbered as in LDM.

    It has some of five layers, and runs them in this order.
    """

    def __init__(self, conv=None, res=None, attention=None, down=None, up=None):
        super().__init__()
        self.conv = conv
        self.res = res
        self.attention = attention
        self.down = down
        self.up = up

    def forward(self, x, embedding, context, views, across_views):
        """x [B·V, C, h, w], embedding [B·V, E], context [B, L, D] -> [B·V, C', h', w']."""
        if self.conv is not None:
            x = self.conv(x)
        if self.res is not None:
            x = self.res(x, embedding)
        if self.attention is not None:
            x = self.attention(x, context, views, across_views)
        if self.down is not None:
            x = self.down(x)
        if self.up is not None:
            x = self.up(x)
        return x


class MultiViewUNet(nn.Module):
    """ε_θ(x_t; t, text, camera), MVDream eq. 2; or v_θ, if `prediction` is "v".

    `forward` is made of PIECES, which a compiler takes one by one (`model.compile_network`).
    """
    PIECES = ("condition", "descend", "cross", "ascend", "leave")

    def __init__(self, config: UNetConfig):
        super().__init__()
        check_variant(config)
        self.config = config
        self.prediction = config.prediction
        self.time_mlp = embedding_mlp(config.model_channels, 4 * config.model_channels)
        if config.camera != "none":
            self.camera_mlp = new_camera_mlp(config)
        widths = [mult * config.model_channels for mult in config.channel_mult]
        coarsest = len(widths) - 1

        # The encoder hands the output of each of its blocks to the decoder: a skip connection.
        width = config.model_channels
        first = ResidualConv(config.in_channels, width, 3, padding=1)
        self.encoder = nn.ModuleList([Block(conv=first)])
        skips = [width]
        for level in range(len(widths)):
            for _ in range(config.num_res_blocks):
                res = self.new_res(width, widths[level])
                width = widths[level]
                self.encoder.append(Block(res=res, attention=self.new_transformer(width, level)))
                skips.append(width)
            if level < coarsest:
                self.encoder.append(Block(down=Downsample(width)))
                skips.append(width)

        self.middle = nn.ModuleList()
        self.middle.append(Block(res=self.new_res(width, width)))
        self.middle.append(Block(attention=self.new_transformer(width)))
        self.middle.append(Block(res=self.new_res(width, width)))

        self.decoder = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(config.num_res_blocks + 1):
                res = self.new_res(width + skips.pop(), widths[level])
                width = widths[level]
                attention = self.new_transformer(width, level)
                last = i == config.num_res_blocks
                up = Upsample(width) if last and level > 0 else None
                self.decoder.append(Block(res=res, attention=attention, up=up))

        self.norm_out = GroupNorm(config.groups, width)
        self.conv_out = zero_module(Conv2d(width, config.out_channels, 3, padding=1))

    def new_res(self, width_in, width):
        """A ResBlock of this UNet."""
        return ResBlock(width_in, width, 4 * self.config.model_channels, self.config.groups)

    def new_transformer(self, width, level=None):
        """A transformer of this UNet, or None if the level (0: the finest) has none.

        level None: the middle, which always has one.
        """
        config = self.config
        if level is not None and 2**level not in config.attention_resolutions:
            return None
        return MultiViewTransformer(
            width, config.context_dim, config.head_dim, config.groups, config.attention
        )

    def add_token(self, context, camera):
        """The camera becomes a token: context [B, L, D], camera [B, V, 16] -> [B·V, L + 1, D]."""
        token = self.camera_mlp(camera)  # [B, V, D]
        context = context[:, None].expand(-1, camera.shape[1], -1, -1)  # [B, V, L, D]
        return torch.cat([context, token[:, :, None]], dim=2).flatten(0, 1)

    def condition(self, t, context, camera, views):
        """What all blocks are told of time, camera and text: embedding [B·V, E], context.

        Arguments as of `forward`. The context is [B, L, D], or [B·V, L + 1, D] if the camera is a
        token.
        """
        dtype = self.conv_out.weight.dtype
        context = context.to(dtype)
        embedding = self.time_mlp(time_embedding(t, self.config.model_channels).to(dtype))
        embedding = embedding[:, None].expand(-1, views, -1)  # [B, V, E]
        if camera is not None and self.config.camera == "time":
            embedding = embedding + self.camera_mlp(camera.to(dtype))
        if camera is not None and self.config.camera == "text":
            context = self.add_token(context, camera.to(dtype))
        return embedding.flatten(0, 1), context

    def levels(self, blocks):
        """The blocks of the encoder or of the decoder, those of a level together.

        What halves the resolution counts to the level below it, what doubles it to the one it ends.
        """
        count = self.config.num_res_blocks + 1
        return [blocks[i : i + count] for i in range(0, len(blocks), count)]

    def descend(self, blocks, h, *told):
        """Blocks of the encoder in turn, h [B·V, C, h, w] -> what each of them returns."""
        results = []
        for block in blocks:
            h = block(h, *told)
            results.append(h)
        return results

    def cross(self, h, *told):
        """The blocks of the middle in turn: h [B·V, C, h, w] -> the same shape."""
        for block in self.middle:
            h = block(h, *told)
        return h

    def ascend(self, blocks, h, skips, *told):
        """Blocks of the decoder in turn; each also sees what its twin in the encoder has made."""
        for block, skip in zip(blocks, skips):
            h = block(torch.cat([h, skip], dim=1), *told)
        return h

    def leave(self, h):
        """[B·V, C, h, w] -> the prediction [B·V, c, h, w]."""
        return self.conv_out(F.silu(self.norm_out(h)))

    def forward(self, x, t, context, camera=None):
        """The prediction, [B, V, c, h, w], in the number format of the weights.

        x [B, V, c, h, w]: noisy latents; h and w are divisible by 2^(levels - 1).
        t [B]: time steps 0..999, one per set. context [B, L, D]: the text.
        camera [B, V, 16] (`cameras.extrinsics`), or None for the 2D mode.
        """
        B, V = x.shape[:2]
        embedding, context = self.condition(t, context, camera, V)
        told = embedding, context, V, camera is not None  # as `Block.forward` is
        h = x.flatten(0, 1)  # [B·V, c, h, w]
        skips = []
        for blocks in self.levels(self.encoder):
            skips += self.descend(blocks, h, *told)
            h = skips[-1]
        h = self.cross(h, *told)
        for blocks in self.levels(self.decoder):
            h = self.ascend(blocks, h, [skips.pop() for _ in blocks], *told)
        return self.leave(h).unflatten(0, (B, V))
