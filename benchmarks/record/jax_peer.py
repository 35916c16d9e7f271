"""Times a chain, block or network in JAX: `jax_peer.py SPEC.json`, in a process of its own; needs jax and numpy only.

The spec, which jax_case.py writes, names an .npz with folded weights, a small input and what float64 makes of it.
Prints one line of JSON: the times, which jax_case.py sums up, and the error on that input.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

UNROLLED = 16  # calls in one compiled program, so that the host's share is small
SAMPLE_SECONDS = 0.01  # programs are queued up to about this long before the host waits


def conv(x, weight, bias, stride=1):
    """x (N, H, W, C), weight (kh, kw, C, out), padded to keep the size at stride 1."""
    pad = weight.shape[0] // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(x, weight, (stride, stride), [(pad, pad)] * 2, dimension_numbers=numbers)
    return out + bias


def pool(x, stride, initial, combine):
    window, padding = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, np.array(initial, x.dtype), combine, window, (1, stride, stride, 1), padding)


def chain(x, block, arrays):
    """y_i = relu(conv(x_i + y_{i-1})), the last group passed through, pooled in a 'stage' block."""
    groups = jnp.split(x, block["scale"], axis=-1)
    outs, previous = [], None
    for i in range(block["steps"]):
        u = groups[i] if previous is None or not block["hierarchical"] else groups[i] + previous
        previous = jax.nn.relu(conv(u, *arrays["convs"][i], block["stride"]))
        outs.append(previous)
    if block["steps"] < block["scale"]:
        last = groups[-1]
        outs.append(pool(last, block["stride"], 0, lax.add) / 9 if block["pooled"] else last)
    return jnp.concatenate(outs, axis=-1)


def bottleneck(x, block, arrays):
    out = chain(jax.nn.relu(conv(x, *arrays["conv1"])), block, arrays)
    shortcut = conv(x, *arrays["downsample"], block["stride"]) if "downsample" in arrays else x
    return jax.nn.relu(conv(out, *arrays["conv3"]) + shortcut)


def run(x, program, arrays):
    """x (N, H, W, C); `arrays` has an entry for each block, and stem and head for a network."""
    blocks = list(zip(program["blocks"], arrays["blocks"], strict=True))
    if program["kind"] == "chain":
        return chain(x, *blocks[0])
    if program["kind"] == "network":
        x = pool(jax.nn.relu(conv(x, *arrays["stem"], 2)), 2, -np.inf, lax.max)
    for block, tensors in blocks:
        x = bottleneck(x, block, tensors)
    if program["kind"] == "network":
        x = x.mean((1, 2)) @ arrays["head"][0] + arrays["head"][1]
    return x


def load(file, dtype):
    """The arrays in the shape of the program: pairs of weight and bias."""

    def pair(name):
        weight, bias = file[f"{name}.weight"], file[f"{name}.bias"]
        weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T  # (out, in, kh, kw) or (out, in)
        return jnp.asarray(weight, dtype), jnp.asarray(bias, dtype)

    names = {name.rsplit(".", 1)[0] for name in file.files}
    blocks = []
    while f"{len(blocks)}.convs.0" in names:
        prefix = f"{len(blocks)}."
        convs = []
        while f"{prefix}convs.{len(convs)}" in names:
            convs.append(pair(f"{prefix}convs.{len(convs)}"))
        rest = {name: pair(prefix + name) for name in ("conv1", "conv3", "downsample") if prefix + name in names}
        blocks.append({"convs": convs, **rest})
    return {"blocks": blocks, **{name: pair(name) for name in ("stem", "head") if name in names}}


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["gpu"] and jax.default_backend() != "gpu":
        sys.exit(f"JAX runs on {jax.default_backend()}, not on the GPU")
    dtype, file = jnp.dtype(spec["dtype"]), np.load(spec["arrays"])
    arrays = load(file, dtype)

    def model(arrays, xs):
        return [run(x, spec["program"], arrays) for x in xs]

    out = np.asarray(jax.jit(model)(arrays, [jnp.asarray(file["x"].transpose(0, 2, 3, 1), dtype)])[0], np.float64)
    expected = file["expected"]
    out = out.transpose(0, 3, 1, 2) if out.ndim == 4 else out
    error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))

    batch, channels, height, width = spec["shape"]
    keys = jax.random.split(jax.random.PRNGKey(0), spec["count"])
    make = jax.jit(lambda key: jnp.abs(jax.random.normal(key, (batch, height, width, channels), dtype)))
    inputs = [make(key) for key in keys]
    calls = min(UNROLLED, len(inputs))
    sets = itertools.cycle([inputs[i : i + calls] for i in range(0, len(inputs) - calls + 1, calls)])
    compiled = jax.jit(model).lower(arrays, inputs[:calls]).compile()
    single = jax.jit(model).lower(arrays, inputs[:1]).compile().memory_analysis()

    def seconds(programs):
        start = time.perf_counter()
        for _ in range(programs):
            last = compiled(arrays, next(sets))
        jax.block_until_ready(last)
        return time.perf_counter() - start

    once = min(seconds(1) for _ in range(3))
    programs = max(1, round(SAMPLE_SECONDS / once))
    samples = [1e3 * seconds(programs) / (programs * calls) for _ in range(spec["repeats"])]
    peak = 0 if single is None else (single.temp_size_in_bytes + single.output_size_in_bytes) / 1e6
    found = {"samples_ms": samples, "peak_mb": peak, "calls": calls * programs, "error": error, "jax": jax.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
