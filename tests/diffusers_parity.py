"""Comparing modules of the port with diffusers' own: whole outputs, and block by block."""

import jax.numpy as jnp
import numpy as np
from parity import double_module, in_double


def channels_last(tensor):
    """What torch has for one example, as an array of JAX; in float64, which JAX would round, as one of NumPy."""
    array = tensor.detach().numpy()
    array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    return array if array.dtype == np.float64 else jnp.asarray(array)


def _doubled(value, torch):
    """Tensors, in whatever holds them, in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _doubled(item, torch) for key, item in value.items()}
    return type(value)(_doubled(item, torch) for item in value) if isinstance(value, tuple | list) else value


def compare_blocks(torch, parity, theirs, ours, x, cond) -> int:
    """Feed every block of a UNet what it gets in diffusers' network, compare what comes out, count the comparisons.

    Levels first, then every attention, feed-forward, ResNet block and layer on its own: a fault cannot hide behind a
    residual connection. The truth is diffusers' block in float64 for the same input.
    """
    inputs, outputs, handles = {}, {}, []

    def keep(name):
        def hook(module, args, kwargs, output):
            inputs[name], outputs[name] = (args, kwargs), output

        return hook

    for name, block in theirs.named_modules():
        handles.append(block.register_forward_hook(keep(name), with_kwargs=True))
    with torch.no_grad():
        theirs(x, torch.tensor(501), cond)
    for handle in handles:
        handle.remove()
    time = channels_last(outputs["time_embedding"][0])
    blocks = dict(theirs.named_modules())

    def of(name, key, position):
        args, kwargs = inputs[name]
        return kwargs[key] if key in kwargs else args[position]

    def compare(kind, name, f, module, *arguments):
        args, kwargs = inputs[name]
        with torch.no_grad():
            truth = double_module(torch, blocks[name])(*_doubled(args, torch), **_doubled(kwargs, torch))
        peer, truth = (_first_of_batch(value, torch) for value in (outputs[name], truth))
        parity.check(f"UNet: {kind}", f(module, *arguments), peer, truth, in_double(f, module, *arguments))

    compare(
        "TimestepEmbedding", "time_embedding", call, ours.time_embedding, channels_last(of("time_embedding", "", 0)[0])
    )
    compared, context = 1, channels_last(cond[0])
    for level, block in enumerate(ours.down_blocks):
        name = f"down_blocks.{level}"
        compare("DownBlock", name, call, block, channels_last(of(name, "hidden_states", 0)[0]), time, context)
        compared += 1
    hidden = channels_last(of("mid_block", "hidden_states", 0)[0])
    compare("MidBlock", "mid_block", call, ours.mid_block, hidden, time, context)
    for level, block in enumerate(ours.up_blocks):
        name = f"up_blocks.{level}"
        x_in = channels_last(of(name, "hidden_states", 0)[0])
        skips = [channels_last(skip[0]) for skip in of(name, "res_hidden_states_tuple", 1)]
        compare("UpBlock", name, call, block, x_in, skips, time, context)
        compared += 1
    for name in outputs:
        module = _follow(ours, name)
        kind = type(module).__name__
        if kind == "Attention":
            hidden = channels_last(of(name, "hidden_states", 0)[0])
            encoder = inputs[name][1].get("encoder_hidden_states")
            compare(kind, name, call, module, hidden, hidden if encoder is None else channels_last(encoder[0]))
        elif kind == "ResnetBlock":
            compare(kind, name, call, module, channels_last(inputs[name][0][0][0]), time)
        elif kind in ("FeedForward", "GEGLU", "GroupNorm", "LayerNorm", "Downsample", "Upsample", "Conv", "Linear"):
            hidden = of(name, "hidden_states", 0)
            # Those of the time embedding were compared above, and a downsampler's convolution of stride 2 with it.
            if hidden.ndim == 2 or (kind == "Conv" and "downsamplers" in name):
                continue
            compare(kind, name, call, module, channels_last(hidden[0]))
        else:
            continue
        compared += 1
    return compared


def check_autoencoder(torch, parity, name, theirs, ours, scale, image) -> None:
    """Mean, deviation, and the image of the mean; all decode the same latents, so that no error counts twice."""

    def torchs(vae, image, latent):
        with torch.no_grad():
            moments = vae.encode(image).latent_dist
            return [scale * moments.mean[0], scale * moments.std[0], vae.decode(latent).sample[0]]

    with torch.no_grad():
        latent = theirs.encode(image).latent_dist.mean
    peer = torchs(theirs, image, latent)
    truth = torchs(double_module(torch, theirs), image.double(), latent.double())

    def both(vae, image, latent):
        return *vae.encode(image), vae.decode(scale * latent)

    arguments = ours, channels_last(image[0]), channels_last(latent[0])
    parts = both(*arguments), map(channels_last, peer), map(channels_last, truth), in_double(both, *arguments)
    for part, *arrays in zip(("mean", "deviation", "decoded"), *parts, strict=True):
        parity.check(f"{name}: {part}", *arrays)


def call(module, *args):
    return module(*args)


def _first_of_batch(value, torch):
    """The outputs of a block for the one example there is, in our layout."""
    if isinstance(value, torch.Tensor):
        return channels_last(value[0])
    return tuple(_first_of_batch(item, torch) for item in value)


def _follow(module, name):
    """The module of the same path, or None for activations and dropouts."""
    for part in name.split("."):
        try:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        except (AttributeError, IndexError):
            return None
    return module
