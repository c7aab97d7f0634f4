import dataclasses

import pytest
from fixtures.model import SMALL
from jax.sharding import AbstractMesh

import mistral_eqx as mx
from mistral_eqx.parallel import NAMED


SEVEN = mx.PRESETS["7b-v0.2"]


def _listed(config, devices):
    return {(choice.name, *choice.axes.items()) for choice in mx.strategies(config, devices)}


def test_mistral_7b_on_8_devices():
    found = _listed(SEVEN, 8)
    assert ("heads", ("tp", 8)) in found
    assert ("sequence_parallel", ("tp", 8)) in found
    assert ("head_dim", ("tp", 8)) in found
    assert {("kv_replicated", ("kv", 4), ("rep", 2)), ("kv_replicated", ("kv", 2), ("rep", 4))} <= found
    # Four queries a key/value head cannot be split over eight devices; slots can.
    assert ("kv_replicated", ("kv", 1), ("rep", 8)) not in found
    assert ("heads_x_kv_seq", ("kv", 1), ("rep", 8)) in found
    # That is HEAD_DIM under another name.
    assert ("heads_x_head_dim", ("kv", 1), ("rep", 8)) not in found
    assert ("heads, batch over 2", ("dp", 2), ("tp", 4)) in found
    assert ("heads_x_kv_seq, batch over 4", ("dp", 4), ("kv", 1), ("rep", 2)) in found


def test_mistral_7b_on_16_devices():
    found = _listed(SEVEN, 16)
    assert ("heads", ("tp", 16)) not in found
    assert ("head_dim", ("tp", 16)) in found
    for name in ("kv_replicated", "heads_x_head_dim", "heads_x_kv_seq"):
        assert (name, ("kv", 8), ("rep", 2)) in found
    assert ("heads, batch over 2", ("dp", 2), ("tp", 8)) in found


@pytest.mark.parametrize("devices", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("name", ["smollm2-135m", "7b-v0.1", "nemo-12b", "gpt-nano"])
def test_each_choice_is_legal_and_takes_all_devices_once(name, devices):
    config = mx.PRESETS[name]
    choices = mx.strategies(config, devices)
    for choice in choices:
        mesh = AbstractMesh(tuple(choice.axes.values()), tuple(choice.axes))
        choice.strategy.check(config, mesh)
        assert mesh.size == devices
        base = choice.name.split(",")[0]
        assert choice.strategy.layout.startswith(NAMED[base].layout)
        assert ("batch@dp" in choice.strategy.layout) == ("batch over" in choice.name)
        # Every axis of the mesh splits something.
        assert all(f"@{axis}" in choice.strategy.layout or f",{axis}" in choice.strategy.layout for axis in choice.axes)
    keys = [(choice.strategy, tuple(choice.axes.items())) for choice in choices]
    assert len(set(keys)) == len(keys)
    # Those that split the weights the most come first.
    copies = [choice.axes.get("dp", 1) for choice in choices]
    assert copies == sorted(copies)


def test_tokens_of_rows_are_split_if_their_number_is_known():
    alone, found = mx.strategies(SEVEN, 8), mx.strategies(SEVEN, 8, seq=4096)
    assert found[: len(alone)] == alone
    more = {(choice.name, *choice.axes.items()): choice.strategy for choice in found[len(alone) :]}
    assert more["heads, ring over 4", ("cp", 4), ("tp", 2)] == mx.HEADS + "seq@cp kv_seq@cp"
    name = "heads, gather over 2, batch over 2"
    assert more[name, ("dp", 2), ("cp", 2), ("tp", 2)] == mx.HEADS + "seq@cp batch@dp"
    assert not any("kv_seq@rep" in strategy.layout for strategy in more.values())
    # Four slices do not divide six tokens.
    assert mx.strategies(SEVEN, 8, seq=6) == alone


def test_layers_are_split_if_there_are_micro_batches():
    alone, found = mx.strategies(SEVEN, 8), mx.strategies(SEVEN, 8, micro_batches=4)
    assert found[: len(alone)] == alone
    more = {(choice.name, *choice.axes.items()): choice.strategy for choice in found[len(alone) :]}
    assert more["heads, stages over 4", ("pp", 4), ("tp", 2)] == mx.HEADS + "layers@pp"
    assert more["single, stages over 2, batch over 4", ("dp", 4), ("pp", 2)] == mx.SINGLE + "layers@pp batch@dp"
    # Eight stages would wait for four micro-batches, and stages must be equal.
    assert {choice.axes["pp"] for choice in found[len(alone) :]} == {2, 4}
    # Layers with experts are equal too, but not those of a model whose first layers are dense.
    found = mx.strategies(mx.PRESETS["8x7b"], 8, micro_batches=8)
    assert {"experts, stages over 2", "experts, stages over 4"} <= {choice.name for choice in found}
    uneven = dataclasses.replace(mx.PRESETS["8x7b"], routing=mx.Routing(8, 2, first_dense=2))
    assert mx.strategies(uneven, 8, micro_batches=8) == mx.strategies(uneven, 8)


def test_a_model_that_divides_by_nothing_has_no_choice():
    assert mx.strategies(dataclasses.replace(SMALL, kv_heads=1, head_dim=2, hidden=7, vocab=5), 4) == []
    assert mx.strategies(SEVEN, 1) == []


def test_a_choice_makes_its_mesh():
    choice = next(one for one in mx.strategies(SEVEN, 8) if "kv" in one.axes)
    assert dict(choice.mesh().shape) == choice.axes
    with pytest.raises(ValueError, match="takes 16 devices and there are 8"):
        mx.strategies(SEVEN, 16)[0].mesh()


def test_no_devices_are_refused():
    with pytest.raises(ValueError, match=r"^n_devices is 0; it must be at least 1\.$"):
        mx.strategies(SEVEN, 0)
