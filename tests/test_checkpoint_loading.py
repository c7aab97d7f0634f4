import equinox as eqx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from fixtures.checkpoint import assert_same_weights, edit_json, random_model, tiny, weights, write_gguf

from mistral_eqx.checkpoint import load, save


@pytest.fixture
def model(getkey):
    return random_model(tiny(), getkey())


@pytest.fixture
def hf(model, tmp_path):
    save(model, tmp_path / "hf")
    return tmp_path / "hf"


def edit_tensors(folder, change, file="model.safetensors"):
    """Changes the tensors of a file of weights with the official library."""
    tensors = safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.slow
def test_three_formats_hold_the_same_model(model, hf, tmp_path):
    save(model, tmp_path / "mistral", format="mistral")
    gguf = write_gguf(tmp_path / "model.gguf", model)
    ids = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    logits = eqx.filter_jit(model)(ids)
    for path in (hf, tmp_path / "mistral", gguf):
        loaded = load(path)
        assert_same_weights(loaded, model)
        assert loaded.config == model.config
        assert eqx.tree_equal(loaded, model)
        np.testing.assert_array_equal(eqx.filter_jit(loaded)(ids), logits)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", "float16"])
def test_weights_are_cast_on_the_way(stored, wanted, getkey, tmp_path):
    stored_model = random_model(tiny(), getkey(), jnp.dtype(stored))
    save(stored_model, tmp_path / "hf")
    loaded = load(tmp_path / "hf", dtype=wanted)
    for path, array in weights(loaded).items():
        assert array.dtype == (wanted or stored)
        expected = weights(stored_model)[path].astype(wanted or stored)
        assert array.tobytes() == expected.tobytes()


def test_dtypes_by_name_or_type(hf):
    for dtype in (jnp.bfloat16, np.dtype(ml_dtypes.bfloat16), "bfloat16"):
        assert load(hf, dtype=dtype).dtype == jnp.bfloat16
    for wrong in ("int8", "float64", jnp.int32, "half a float"):
        with pytest.raises(
            ValueError, match=r"cannot be loaded as '.*'; the supported dtypes are float32, float16, bfl"
        ):
            load(hf, dtype=wrong)


def test_layers_have_their_windows(getkey, tmp_path):
    model = random_model(tiny(layers=3, windows=(None, 5, 5)), getkey())
    save(model, tmp_path / "hf")
    assert [block.attention.window for block in load(tmp_path / "hf").blocks] == [None, 5, 5]


def test_progress_counts_every_byte(hf):
    seen = []
    load(hf, progress=lambda done, total: seen.append((done, total)))
    sizes = [array.nbytes for array in safetensors.numpy.load_file(hf / "model.safetensors").values()]
    assert len(seen) == len(sizes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (sum(sizes), sum(sizes))


def test_a_missing_tensor(hf):
    edit_tensors(hf, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ValueError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight', .* in shape \(64, 32\); fetch"
    ):
        load(hf)


def test_a_missing_head_is_not_made_up(hf):
    edit_tensors(hf, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"has no tensor 'lm_head\.weight', .*mark the embeddings as tied"):
        load(hf)


def test_an_extra_tensor(hf):
    edit_tensors(hf, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(96, np.float32)}))
    with pytest.raises(ValueError, match=r"has a tensor 'model\.layers\.0\.self_attn\.q_proj\.bias', which a model"):
        load(hf)


def test_too_few_layers_in_the_config(hf):
    edit_json(hf / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has a tensor 'model\.layers\.1\..*or the config has too few layers"):
        load(hf)


def test_a_misshapen_tensor(hf):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(hf, lambda tensors: tensors.update({name: np.ones((32, 31), np.float32)}))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight' .* \(32, 31\), .* \(32, 32\)"):
        load(hf)
    edit_tensors(hf, lambda tensors: tensors.update({name: np.ones((32, 32, 1), np.float32)}))
    with pytest.raises(ValueError, match=r"has shape \(32, 32, 1\), but its config requires \(32, 32\)"):
        load(hf)


def test_trap_default_that_hides_a_wrong_config(hf, getkey, tmp_path):
    # Other head counts than the weights have would still be a model of some shape.
    edit_json(hf / "config.json", num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"but its config requires \(48, 32\)"):
        load(hf)
    # theta and window leave no trace in the weights: they come out as they went in.
    model = random_model(tiny(rope_theta=12345.0, windows=(6, 6), norm_eps=0.25), getkey())
    for format in ("hf", "mistral"):
        save(model, tmp_path / format, format=format, overwrite=True)
        assert load(tmp_path / format).config == model.config


def test_tables_that_old_files_carry_along(hf, model):
    angles = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for layer in range(2)}
    edit_tensors(hf, lambda tensors: tensors.update(angles))
    assert_same_weights(load(hf), model)


def test_a_tied_model_that_stores_its_table_twice(getkey, tmp_path):
    model = random_model(tiny(tied=True), getkey())
    save(model, tmp_path / "hf")
    assert "lm_head.weight" not in safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    table = np.asarray(model.embedding.weight.value)
    edit_tensors(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": table}))
    assert_same_weights(load(tmp_path / "hf"), model)
    assert load(tmp_path / "hf").head is None
    for other in (table + 1, table[:, :-1]):
        edit_tensors(tmp_path / "hf", lambda tensors, other=other: tensors.update({"lm_head.weight": other.copy()}))
        with pytest.raises(
            ValueError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight' differ; set it to false"
        ):
            load(tmp_path / "hf")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_refuses_what_is_no_number(hf, value):
    load(hf, check=True)
    name = "model.layers.1.self_attn.q_proj.weight"

    def change(tensors):
        tensors[name][17, 3] = value

    edit_tensors(hf, change)
    load(hf)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight' holds NaN or infinity"):
        load(hf, check=True)


def test_check_finds_what_the_cast_made_infinite(hf):
    def change(tensors):
        tensors["model.norm.weight"][5] = 1e6

    edit_tensors(hf, change)
    load(hf, check=True)
    assert not np.isfinite(np.asarray(load(hf, dtype="float16").norm.weight)).all()
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' holds NaN or infinity .* \(as float16\)"):
        load(hf, dtype="float16", check=True)


def test_truncated_and_empty_weights(hf):
    file = hf / "model.safetensors"
    content = file.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors' is truncated: it has \d+ bytes of \d+"):
            load(hf)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors' is empty"):
        load(hf)


def test_names_that_are_nowhere():
    with pytest.raises(ValueError, match=r"no-such-model"):
        load("no-such-model")


def test_the_loaded_model_does_not_depend_on_its_file(hf, model):
    loaded = load(hf)
    (hf / "model.safetensors").write_bytes(bytes((hf / "model.safetensors").stat().st_size))
    assert_same_weights(loaded, model)
