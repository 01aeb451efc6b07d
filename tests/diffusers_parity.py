"""Comparing modules of the port with diffusers' own: whole outputs, and block by block."""

import jax.numpy as jnp
import numpy as np


def channels_last(tensor):
    array = tensor.detach().numpy()
    return jnp.asarray(array.transpose(1, 2, 0) if array.ndim == 3 else array)


def close(ours, theirs, tolerance):
    theirs = np.asarray(channels_last(theirs))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def compare_blocks(torch, theirs, ours, x, cond, tolerance) -> int:
    """Feed every block of a UNet what it gets in diffusers' network, compare what comes out, count the comparisons.

    Levels first, then every attention, feed-forward, ResNet block and layer on its own: a fault cannot hide behind a
    residual connection.
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
    context, time = channels_last(cond[0]), ours.embed_time(501, jnp.float32)
    close(time, outputs["time_embedding"][0], tolerance)

    def of(name, key, position):
        args, kwargs = inputs[name]
        return kwargs[key] if key in kwargs else args[position]

    compared = 1
    for level, block in enumerate(ours.down_blocks):
        name = f"down_blocks.{level}"
        y, skips = block(channels_last(of(name, "hidden_states", 0)[0]), time, context)
        close(y, outputs[name][0][0], tolerance)
        for skip, expected in zip(skips, outputs[name][1], strict=True):
            close(skip, expected[0], tolerance)
        compared += 1
    middle = ours.mid_block(channels_last(of("mid_block", "hidden_states", 0)[0]), time, context)
    close(middle, outputs["mid_block"][0], tolerance)
    for level, block in enumerate(ours.up_blocks):
        name = f"up_blocks.{level}"
        x_in = channels_last(of(name, "hidden_states", 0)[0])
        skips = [channels_last(skip[0]) for skip in of(name, "res_hidden_states_tuple", 1)]
        close(block(x_in, skips, time, context), outputs[name][0], tolerance)
        compared += 1
    for name, output in outputs.items():
        module = _follow(ours, name)
        kind = type(module).__name__
        if kind == "Attention":
            hidden = channels_last(of(name, "hidden_states", 0)[0])
            encoder = inputs[name][1].get("encoder_hidden_states")
            close(module(hidden, hidden if encoder is None else channels_last(encoder[0])), output[0], tolerance)
        elif kind == "ResnetBlock":
            close(module(channels_last(inputs[name][0][0][0]), time), output[0], tolerance)
        elif kind in ("FeedForward", "GEGLU", "GroupNorm", "LayerNorm", "Downsample", "Upsample", "Conv", "Linear"):
            hidden = of(name, "hidden_states", 0)
            # Those of the time embedding were compared above, and a downsampler's convolution of stride 2 with it.
            if hidden.ndim == 2 or (kind == "Conv" and "downsamplers" in name):
                continue
            close(module(channels_last(hidden[0])), output[0], tolerance)
        else:
            continue
        compared += 1
    return compared


def _follow(module, name):
    """The module of the same path, or None for activations and dropouts."""
    for part in name.split("."):
        try:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        except (AttributeError, IndexError):
            return None
    return module
