"""The mesh, the table of layouts against the real parameter trees, activation constraints."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import sharding, trees
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from tests import tiny

ONE = {"dcn_data": 1, "data": 1, "fsdp": 1, "tensor": 1}


def mesh(**sizes):
    cfg = {**ONE, **sizes}
    return sharding.make_mesh(cfg, jax.devices()[: int(np.prod(list(cfg.values())))])


@pytest.fixture(scope="module")
def shapes():
    return {v: hf_folder.param_shapes(variants.build({"variant": v})) for v in ("nano", "1b", "8b", "26b")}


@pytest.mark.parametrize("variant", ["nano", "1b", "8b", "26b"])
def test_every_parameter_has_exactly_one_rule(variant, shapes):
    specs = sharding.param_specs(shapes[variant])
    assert specs.keys() == trees.flatten(shapes[variant]).keys()


def test_golden_specs_of_the_8b(shapes):
    """tests/golden/shardings_8b.txt: a mesh axis, or - for whole, for each dimension."""
    specs = sharding.param_specs(shapes["8b"])
    got = [
        f"{path}: {' '.join(axis or '-' for axis in spec) or 'whole'}"
        for path, spec in specs.items()
        if not path.startswith("vqvae/")
    ]
    golden = pathlib.Path(__file__).parent / "golden" / "shardings_8b.txt"
    assert sorted(got) == golden.read_text().splitlines()
    assert not any(any(spec) for path, spec in specs.items() if path.startswith("vqvae/"))


def test_little_of_a_large_model_is_replicated(shapes):
    flat, specs = trees.flatten(shapes["8b"]), sharding.param_specs(shapes["8b"])
    size = {path: np.prod(leaf.shape) for path, leaf in flat.items()}
    whole = sum(n for path, n in size.items() if not any(specs[path]))
    assert whole < 0.02 * sum(size.values())


def test_a_parameter_without_a_rule_and_a_rule_without_a_parameter(shapes):
    tree = trees.unflatten({**trees.flatten(shapes["nano"]), "llm/new": jax.ShapeDtypeStruct((2,), "f")})
    with pytest.raises(ValueError, match="'llm/new'.*covered by 0"):
        sharding.param_specs(tree)
    idle = (*sharding.PARAM_RULES, sharding.Rule("llm", "gone/kernel"))
    with pytest.raises(ValueError, match="match no parameter.*gone"):
        sharding.param_specs(shapes["nano"], idle)
    double = (*sharding.PARAM_RULES, sharding.Rule("llm", "embed/.*"))
    with pytest.raises(ValueError, match="covered by 2"):
        sharding.param_specs(shapes["nano"], double)
    sharding.param_specs({"connector": shapes["nano"]["connector"]})  # other parts are not missed


def test_a_dimension_that_does_not_divide_is_named(shapes):
    with pytest.raises(
        UserError,
        match=r"mesh.tensor=8 does not divide dimension 2 of llm/layers/attn/"
        r"[kqv]/kernel .*these sizes would: \[1, [0-9, ]+\]",
    ):
        sharding.shardings(shapes["nano"], mesh(tensor=8))


def test_mesh_sizes(shapes):
    assert dict(sharding.make_mesh({**ONE, "data": -1, "fsdp": 2}).shape) == {
        "dcn_data": 1,
        "data": 4,
        "fsdp": 2,
        "tensor": 1,
    }
    for wrong, text in (
        ({"data": 3}, "3 devices, but there are 8"),
        ({"data": 0}, "positive"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": -1, "tensor": 3}, "3"),
    ):
        with pytest.raises(UserError, match=text):
            sharding.make_mesh({**ONE, **wrong})


def test_constrain():
    x = jnp.zeros((4, 6, 10))
    assert sharding.constrain(x, "act_batch", "act_len", "act_emb") is x  # no mesh
    with pytest.raises(ValueError, match="'act_bach'"):
        sharding.constrain(x, "act_bach", None, None)
    with pytest.raises(ValueError, match="shape"):
        sharding.constrain(x, "act_batch")
    with jax.set_mesh(mesh(data=2, tensor=4)):
        y = jax.jit(lambda x: sharding.constrain(x, "act_batch", None, "act_ffw"))(x)
        assert y.sharding.spec[0] == sharding.BATCH_AXES or "data" in y.sharding.spec[0]
        assert len(y.sharding.spec) < 3 or y.sharding.spec[2] is None  # 10 is not divided by 4
        z = jax.jit(lambda x: sharding.constrain(x, "act_batch", None, "act_heads"))(jnp.zeros((4, 1, 8)))
        assert z.addressable_shards[0].data.shape == (2, 1, 2)


def test_the_residual_stream_is_split_over_places_and_batch():
    model, params = tiny.made()
    with jax.set_mesh(mesh(data=2, tensor=2)):
        embed = jax.jit(
            lambda tokens: model.apply({"params": params}, tokens, method=lambda m, t: m.llm.embed_tokens(t))
        )
        assert embed(np.zeros((2, 8), np.int32)).addressable_shards[0].data.shape == (1, 4, 32)
        assert embed(np.zeros((2, 7), np.int32)).addressable_shards[0].data.shape == (1, 7, 32)


def test_global_batch():
    m = mesh(data=2, fsdp=2)
    x = np.arange(12).reshape(4, 3)
    batch = sharding.global_batch(m, {"x": x})
    np.testing.assert_array_equal(batch["x"], x)
    assert batch["x"].addressable_shards[0].data.shape == (1, 3)
    with pytest.raises(UserError, match="train.global_batch=6"):
        sharding.check_rows(6, m, "train.global_batch")
