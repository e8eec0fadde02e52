"""Layout rules on eight simulated devices."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from big_vision_like import api, optim, sharding, trees
from big_vision_like.models import vit

SHAPES = {
  "embedding/kernel": (75, 24),
  "embedding/bias": (24,),
  "blocks/attn/query/kernel": (3, 24, 4, 6),
  "blocks/attn/query/bias": (3, 4, 6),
  "blocks/attn/out/kernel": (3, 4, 6, 24),
  "blocks/attn/out/bias": (3, 24),
  "blocks/mlp/fc1/kernel": (3, 24, 40),
  "blocks/mlp/fc1/bias": (3, 40),
  "blocks/mlp/fc2/kernel": (3, 40, 24),
  "pos_embedding": (49, 24),
  "head/kernel": (24, 11),
  "head/bias": (11,),
}


def random_params(seed=0):
  rng = np.random.default_rng(seed)
  return trees.unflatten(
    {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
  )


def make_tx(params, name="adamw", **kw):
  return optim.make(
    name=name,
    lr=0.01,
    wd=0.1,
    clip=1.0,
    schedule=dict(name="constant"),
    total_steps=10,
    params=params,
    **kw,
  )[0]


def make_state(tx, params, *, ema=False):
  return api.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state={"batch_stats": {"mean": jnp.zeros(7)}},
    opt_state=tx.init(params),
    rng=jax.random.key(0),
    ema={"params": params, "batch_stats": {"mean": jnp.ones(7)}}
    if ema
    else None,
  )


def specs(tree):
  return {k: s.spec for k, s in trees.flatten(tree).items()}


def test_mesh_has_all_axes_and_they_are_auto():
  mesh = sharding.make_mesh({"data": -1, "tensor": 2})
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
  assert mesh.axis_names == api.MESH_AXES
  assert mesh.axis_types == (AxisType.Auto,) * 3
  one = sharding.make_mesh({"data": -1}, jax.devices()[:1])
  assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("shape", "sentence"),
  [
    (
      {"data": 3},
      "config.mesh = {'data': 3} needs 3 devices, but there are 8. An axis of "
      "-1 takes what is left.",
    ),
    (
      {"data": -1, "fsdp": 3},
      "config.mesh = {'data': -1, 'fsdp': 3} needs a multiple of 3 devices, "
      "but there are 8.",
    ),
    (
      {"data": -1, "fsdp": 16},
      "config.mesh = {'data': -1, 'fsdp': 16} needs a multiple of 16 devices, "
      "but there are 8.",
    ),
    (
      {"data": -1, "fsdp": -1},
      "config.mesh = {'data': -1, 'fsdp': -1} has to give the axes data, fsdp, "
      "tensor a number of devices each; one may be -1",
    ),
    (
      {"model": 8},
      "config.mesh = {'model': 8} has to give the axes data, fsdp, tensor",
    ),
    ({"data": 0}, "config.mesh = {'data': 0} has to give the axes"),
  ],
)
def test_mesh_refusals(shape, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    sharding.make_mesh(shape)


def test_batch_size_has_to_divide():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  sharding.check_batch_size(12, mesh)
  with pytest.raises(
    ValueError,
    match=r"config\.batch_size = 14 cannot be shared evenly by the 4 devices "
    r"of the mesh axes data 2 x fsdp 2; use a multiple of 4, such as 12 or 16",
  ):
    sharding.check_batch_size(14, mesh)
  with pytest.raises(
    ValueError, match=r"config\.evals\.val\.batch_size = 3 .* such as 4\."
  ):
    sharding.check_batch_size(3, mesh, key="config.evals.val.batch_size")


def test_batch_is_split_over_data_and_fsdp_only():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  batch = jax.device_put(
    np.arange(20.0).reshape(4, 5), sharding.batch_sharding(mesh)
  )
  rows = {s.device: float(s.data[0, 0]) for s in batch.addressable_shards}
  assert all(s.data.shape == (1, 5) for s in batch.addressable_shards)
  for (d, f, _), device in np.ndenumerate(mesh.devices):
    assert rows[device] == 5.0 * (2 * d + f)
  everywhere = jax.device_put(np.ones(3), sharding.replicated(mesh))
  assert everywhere.is_fully_replicated


def test_specs_count_from_the_right():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = ((".*/kernel", ("fsdp", "tensor", None)), (".*", (("data", "fsdp"),)))
  tree = {
    "one": {"kernel": np.ones((6, 4, 5)), "bias": np.ones(12)},
    "blocks": {"kernel": np.ones((3, 6, 4, 5))},
  }
  assert specs(sharding.tree_shardings(tree, mesh, rules)) == {
    "one/kernel": P("fsdp", "tensor", None),
    "one/bias": P(("data", "fsdp")),
    "blocks/kernel": P(None, "fsdp", "tensor", None),
  }


def test_first_rule_wins():
  mesh = sharding.make_mesh({"fsdp": 8})
  rules = (("a/kernel", ()), (".*", ("fsdp",)))
  tree = {"a": {"kernel": np.ones(8)}, "ba": {"kernel": np.ones(8)}}
  assert specs(sharding.tree_shardings(tree, mesh, rules)) == {
    "a/kernel": P(),
    "ba/kernel": P("fsdp"),
  }


def test_a_mesh_that_does_not_divide_heads_or_width_is_refused():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  shapes = {"attn/query/kernel": (8, 3, 5), "mlp/fc1/kernel": (6, 10)}
  tree = trees.unflatten({f"a/{k}": np.ones(x) for k, x in shapes.items()})
  sentence = (
    "config.mesh does not divide what config.sharding cuts:\n"
    "  a/attn/query/kernel (8, 3, 5): 3 over tensor 2\n"
    "  a/mlp/fc1/kernel (6, 10): 6 over fsdp 4\n"
  )
  with pytest.raises(ValueError, match=re.escape(sentence)):
    sharding.tree_shardings(tree, mesh, sharding.RULES["tensor"])
  whole = (("a/.*", ()), *sharding.RULES["tensor"])
  got = sharding.tree_shardings(tree, mesh, whole)
  assert set(specs(got).values()) == {P()}


def test_processes_hold_the_parts_that_the_mesh_gives_them(monkeypatch):
  """Hosts of 2 x 2 chips on a torus of 4 x 4; then with tensor pairs."""
  rows, columns = np.divmod(np.arange(16), 4)
  hosts = rows // 2 * 2 + columns // 2
  devices = np.array([types.SimpleNamespace(process_index=h) for h in hosts])
  for shape, parts, count in (
    ((16, 1, 1), (2, 3, 6, 7), 16),
    ((4, 2, 2), (1, 3), 8),
    ((1, 1, 16), (0,), 1),
  ):
    mesh = types.SimpleNamespace(
      devices=devices.reshape(shape), shape=dict(zip(api.MESH_AXES, shape))
    )
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert sharding.held_parts(mesh) == (parts, count)


@pytest.mark.parametrize(
  ("rules", "sentence"),
  [
    ((("other", ()),), "No rule of config.sharding covers the parameter 'a/b'"),
    (
      ((".*", ("fdsp",)),),
      "config.sharding: the spec ('fdsp',) does not fit the parameter 'a/b' of "
      "shape (8, 4).",
    ),
    ((((".*", ("fsdp", "fsdp"))),), "no axis twice"),
    ((((".*", (None, "fsdp", None))),), "one entry for each of the last"),
  ],
)
def test_rule_refusals(rules, sentence):
  mesh = sharding.make_mesh({"fsdp": 8})
  with pytest.raises(ValueError, match=re.escape(sentence)):
    sharding.tree_shardings({"a": {"b": np.ones((8, 4))}}, mesh, rules)


def test_presets_cut_the_kernels_of_our_models():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  model = vit.Model(
    variant="S/16", sizes=dict(depth=3), pool="map", num_classes=11
  )
  image = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)
  params = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, train=False)["params"], image
  )
  data, fsdp, tensor = (
    specs(sharding.tree_shardings(params, mesh, sharding.RULES[name]))
    for name in ("data", "fsdp", "tensor")
  )
  assert set(data.values()) == {P()}
  kernels = [k for k in data if k.endswith("kernel")]
  assert all("fsdp" in fsdp[k] and "fsdp" in tensor[k] for k in kernels)
  assert all(fsdp[k] == P() for k in data if k not in kernels)
  heads = ("fsdp", "tensor", None)
  want = {}
  for name, lead in (("encoder/blocks", (None,)), ("pool", ())):
    for part in ("query", "key", "value"):
      want[f"{name}/attn/{part}/kernel"] = P(*lead, *heads)
      want[f"{name}/attn/{part}/bias"] = P(*lead, "tensor", None)
    want[f"{name}/attn/out/kernel"] = P(*lead, "tensor", None, "fsdp")
    want[f"{name}/mlp/fc1/kernel"] = P(*lead, "fsdp", "tensor")
    want[f"{name}/mlp/fc1/bias"] = P(*lead, "tensor")
    want[f"{name}/mlp/fc2/kernel"] = P(*lead, "tensor", "fsdp")
  assert {k: s for k, s in tensor.items() if "tensor" in s} == want


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_follows_its_parameters(name):
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  params = random_params()
  trained, _ = trees.split(params, ("head/.*",))
  tx = make_tx(trained, name)
  state = jax.eval_shape(lambda: make_state(tx, params, ema=True))
  state = state.replace(opt_state=jax.eval_shape(lambda: tx.init(trained)))
  got = sharding.state_shardings(state, mesh, sharding.RULES["tensor"])
  assert jax.tree.structure(got) == jax.tree.structure(state)
  flat, shapes = specs(got), trees.flatten(state)
  same_shape = 0
  for path, spec in flat.items():
    name = next((k for k in SHAPES if path.endswith("/" + k)), None)
    if name is None:
      assert spec == P()  # step, rng, counts, model_state
    elif shapes[path].shape == SHAPES[name]:
      assert spec == flat[f"params/{name}"]
      same_shape += path.startswith("opt_state")
  assert same_shape >= len(SHAPES) - 2
  assert (
    sharding.state_shardings(
      state.replace(ema=None), mesh, sharding.RULES["data"]
    ).ema
    is None
  )


def test_adafactor_statistics_keep_the_axes_of_what_is_left():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  params = {
    "blocks": {"fc1": {"kernel": jnp.ones((3, 36, 40))}},
    "square": {"kernel": jnp.ones((40, 40))},
  }
  rules = ((".*/kernel", ("fsdp", "tensor")),)
  tx = make_tx(params, "adafactor")
  state = jax.eval_shape(lambda: make_state(tx, params))
  flat = specs(sharding.state_shardings(state, mesh, rules).opt_state)
  got = {
    k.partition("/inner_state/")[2]: s for k, s in flat.items() if "/v_" in k
  }
  assert got == {
    "v_row/blocks/fc1/kernel": P(None, "fsdp"),
    "v_col/blocks/fc1/kernel": P(None, "tensor"),
    "v_row/square/kernel": P("fsdp"),
    "v_col/square/kernel": P("fsdp"),
  }


NAMES = ("attn/query/kernel", "mlp/fc1/kernel", "mlp/fc1/bias")


def run_updates(optimizer, rules, mesh):
  """Parameters after two jitted updates, laid out by a preset."""
  params, grads = (
    {
      "blocks": trees.unflatten(
        {k: trees.flatten(random_params(seed))[f"blocks/{k}"] for k in NAMES}
      )
    }
    for seed in (0, 1)
  )
  tx = make_tx(params, optimizer)
  init = lambda: make_state(tx, params)
  places = sharding.state_shardings(
    jax.eval_shape(init), mesh, sharding.RULES[rules]
  )
  traces = []

  def step(state, grads):
    traces.append(1)
    updates, opt = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt)

  step = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(places, sharding.replicated(mesh)),
    out_shardings=places,
  )
  state = jax.jit(init, out_shardings=places)()
  for _ in range(2):
    state = step(state, grads)
  assert len(traces) == 1
  return jax.device_get(state.params["blocks"])


@pytest.mark.parametrize(
  ("rules", "shape", "optimizer", "tolerance"),
  [
    ("data", {"data": 8}, "adamw", 1e-6),
    # A momentum in bfloat16 may round either way: 2^-9 of it, times lr.
    ("fsdp", {"data": 2, "fsdp": 4}, "adafactor", 3e-5),
    ("tensor", {"data": 2, "fsdp": 2, "tensor": 2}, "adamw", 1e-6),
  ],
)
def test_updates_agree_with_one_device(rules, shape, optimizer, tolerance):
  one = sharding.make_mesh({}, jax.devices()[:1])
  want = run_updates(optimizer, rules, one)
  got = run_updates(optimizer, rules, sharding.make_mesh(shape))
  # The norm of the gradients is summed in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=tolerance),
    got,
    want,
  )


def test_with_shardings_makes_abstract_arrays():
  mesh = sharding.make_mesh({"fsdp": 8})
  state = jax.eval_shape(
    lambda: make_state(make_tx(random_params()), random_params())
  )
  places = sharding.state_shardings(state, mesh, sharding.RULES["fsdp"])
  got = sharding.with_shardings(state, places)
  for x, shape, place in zip(*map(jax.tree.leaves, (got, state, places))):
    assert (x.shape, x.dtype, x.sharding) == (shape.shape, shape.dtype, place)
