"""The model once more in numpy and float64: one row, one head and one query at a time, with neither cache nor mask.

Functions take the modules of `mistral_eqx.nn` and read their weights. What a test wants to see go wrong is an argument.
"""

import numpy as np


def array(linear):
    """A layer's weight."""
    return np.asarray(linear.weight.value, np.float64)


def rms_norm(norm, x):
    rows = [row / np.sqrt(np.mean(row**2) + norm.eps) for row in x]
    return np.stack(rows) * np.asarray(norm.weight, np.float64)


def rotate(vector, position, theta):
    """Each pair of adjacent entries is a complex number, which is turned."""
    pairs = len(vector) // 2
    turned = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * position * theta ** (-np.arange(pairs) / pairs))
    return np.stack([turned.real, turned.imag], axis=1).reshape(-1)


def attend(query, keys, values, scale):
    """One query's mixture of values."""
    scores = np.array([query @ key * scale for key in keys])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


def sees(query, key, window):
    """Whether a query at one position sees a key at another."""
    return key >= 0 and key <= query and (window is None or query - key < window)


def heads(attention, x, positions, *, theta, scale=None, kv_head_of=None):
    """What each query head reads, shape `(seq, kv_heads, q_per_kv, head_dim)`."""
    q, k, v = (array(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    kv_heads, q_per_kv, head_dim, _ = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    mixed = np.zeros((len(x), kv_heads, q_per_kv, head_dim))
    for group in range(kv_heads):
        for member in range(q_per_kv):
            source = group if kv_head_of is None else kv_head_of(group, member)
            keys = np.stack([rotate(k[source] @ row, at, theta) for row, at in zip(x, positions, strict=True)])
            values = np.stack([v[source] @ row for row in x])
            for index, (row, at) in enumerate(zip(x, positions, strict=True)):
                seen = [number for number, key in enumerate(positions) if sees(at, key, attention.window)]
                if seen:
                    query = rotate(q[group, member] @ row, at, theta)
                    mixed[index, group, member] = attend(query, keys[seen], values[seen], scale)
    return mixed


def attention(module, x, positions, **how):
    """`module` applied to activations of shape `(seq, embed)`."""
    mixed, out = heads(module, x, positions, **how), array(module.o_proj)
    return mixed.reshape(len(x), -1) @ out.reshape(len(out), -1).T


def feed_forward(module, x):
    gate, up = x @ array(module.gate_proj).T, x @ array(module.up_proj).T
    return gate / (1 + np.exp(-gate)) * up @ array(module.down_proj).T


def block(module, x, positions, **how):
    x = x + attention(module.attention, rms_norm(module.attention_norm, x), positions, **how)
    return x + feed_forward(module.feed_forward, rms_norm(module.feed_forward_norm, x))


def logits(model, ids):
    """The whole model, for one row of ids."""
    table = array(model.embedding)
    x = table[np.asarray(ids)]
    for module in model.blocks:
        x = block(module, x, np.arange(len(ids)), theta=model.config.rope_theta)
    return rms_norm(model.norm, x) @ (table if model.head is None else array(model.head)).T
