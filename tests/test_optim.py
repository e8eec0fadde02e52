"""Optimizers against formulas written out by hand, rules and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_like import optim, trees


def make(params, **kw):
  settings = dict(
    name="adamw",
    lr=0.1,
    wd=0.0,
    clip=None,
    schedule=dict(name="constant"),
    total_steps=100,
  )
  return optim.make(**(settings | kw), params=params)


def random_tree(shapes, seed):
  rng = np.random.default_rng(seed)
  return trees.unflatten(
    {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  )


@jax.jit(static_argnums=0)
def first_update(tx, params, grads):
  return tx.update(grads, tx.init(params), params)[0]


def train(tx, params, grads):
  """Parameters after one step for each gradient."""
  state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  for grad in grads:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
  return trees.flatten(params), state


SHAPES = {
  "embedding/kernel": (7, 5),
  "embedding/bias": (5,),
  "blocks/fc1/kernel": (3, 5, 11),
  "head/kernel": (5, 13),
  "head/bias": (13,),
}


def test_adamw_equals_its_equations():
  params = random_tree(SHAPES, 0)
  grads = [random_tree(SHAPES, seed) for seed in (1, 2, 3)]
  tx, lr_fn = make(
    params,
    wd=0.03,
    wd_mults=(("head/.*kernel", 100.0), (".*/kernel", 1.0), (".*", 0.0)),
    lr_mults=(("embedding/.*", 0.5), (".*", 1.0)),
    schedule=dict(name="cosine", warmup=2),
    b1=0.8,
    b2=0.95,
    eps=1e-3,
  )
  got, _ = train(tx, params, grads)
  decay = {"head/kernel": 3.0, "embedding/kernel": 0.03}
  decay["blocks/fc1/kernel"] = 0.03
  for name, p in trees.flatten(params).items():
    p = p.astype(np.float64)
    m = v = 0.0
    for t, grad in enumerate(grads):
      g = trees.flatten(grad)[name].astype(np.float64)
      m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
      m_hat, v_hat = m / (1 - 0.8 ** (t + 1)), v / (1 - 0.95 ** (t + 1))
      scaled = m_hat / (np.sqrt(v_hat) + 1e-3) + decay.get(name, 0.0) * p
      lr = float(lr_fn(t)) * (0.5 if "embedding" in name else 1.0)
      p = p - lr * scaled
    # float32 arithmetic against float64, three steps.
    np.testing.assert_allclose(got[name], p, rtol=2e-5, atol=2e-6)


def numpy_adafactor(p, grads, *, lr, cap, factored):
  """Scaling Vision Transformers: factored second moment, then momentum."""
  row = col = v = m = 0.0
  for t, g in enumerate(grads, start=1):
    g = g.astype(np.float64)
    beta = min(cap, 1 - t**-0.8)
    sq = g**2 + 1e-30
    if factored:
      row = beta * row + (1 - beta) * sq.mean(axis=1)
      col = beta * col + (1 - beta) * sq.mean(axis=0)
      second = row[:, None] * col[None, :] / row.mean()
    else:
      second = v = beta * v + (1 - beta) * sq
    m = 0.9 * m + 0.1 * g / np.sqrt(second)
    p = p - lr * m
  return p


@pytest.mark.parametrize(
  ("settings", "cap", "tolerance"),
  [
    # float32 against float64, four steps.
    (dict(momentum_dtype="float32"), 0.999, 2e-6),
    (dict(momentum_dtype="float32", beta2_cap=0.3), 0.3, 2e-6),
    # The default keeps 8 bits of a momentum below 1, for three steps: 2^-9
    # each time, twice (stored, and multiplied by 0.9), times lr = 0.1.
    (dict(), 0.999, 1.2e-3),
  ],
)
def test_adafactor_equals_its_equations(settings, cap, tolerance):
  shapes = {"a/kernel": (37, 41), "a/small": (31, 97), "a/bias": (43,)}
  params = random_tree(shapes, 0)
  grads = [random_tree(shapes, seed) for seed in (1, 2, 3, 4)]
  got, _ = train(make(params, name="adafactor", **settings)[0], params, grads)
  for name, p in trees.flatten(params).items():
    named = [trees.flatten(g)[name] for g in grads]
    # Of two dimensions, the smaller has to be at least 32 to be factored.
    want = numpy_adafactor(
      p, named, lr=0.1, cap=cap, factored=name == "a/kernel"
    )
    np.testing.assert_allclose(got[name], want, rtol=0, atol=tolerance)


def test_adafactor_keeps_a_row_a_column_and_half_a_momentum():
  params = random_tree({"a/kernel": (37, 41)}, 0)
  state = make(params, name="adafactor")[0].init(params)
  kept = [x for x in jax.tree.leaves(state) if x.size > 1]
  assert sorted((x.shape, x.dtype.name) for x in kept) == [
    ((37,), "float32"),
    ((37, 41), "bfloat16"),
    ((41,), "float32"),
  ]


def test_adafactor_clips_updates_only_if_asked():
  params = random_tree({"a/kernel": (37, 41)}, 0)
  grads = random_tree({"a/kernel": (37, 41)}, 1)
  kw = dict(name="adafactor", lr=1.0, momentum=None)
  plain = make(params, **kw)[0]
  clipped = make(params, **kw, clip_threshold=0.5)[0]
  free = first_update(plain, params, grads)["a"]["kernel"]
  got = first_update(clipped, params, grads)["a"]["kernel"]
  rms = np.sqrt(np.mean(np.square(free)))
  assert rms > 0.9
  np.testing.assert_allclose(got, free * 0.5 / rms, rtol=1e-5)


def test_adafactor_of_scanned_layers_equals_layers_alone():
  depth = 33  # From 32 layers on, a stack of biases looks like a matrix.
  shapes = {"kernel": (34, 35), "bias": (36,)}
  alone = [random_tree(shapes, seed) for seed in range(depth)]
  grads = [random_tree(shapes, 100 + seed) for seed in range(depth)]
  stack = lambda layers: {
    "blocks": jax.tree.map(lambda *x: np.stack(x), *layers)
  }
  scanned, _ = train(
    make(stack(alone), name="adafactor", clip_threshold=0.5)[0],
    stack(alone),
    [stack(grads)] * 2,
  )
  for i in (0, 32):
    tx, _ = make(alone[i], name="adafactor", clip_threshold=0.5)
    want, _ = train(tx, alone[i], [grads[i]] * 2)
    for name in shapes:
      np.testing.assert_allclose(
        scanned[f"blocks/{name}"][i], want[name], rtol=1e-6, atol=1e-7
      )


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_its_equations(nesterov):
  params = random_tree({"kernel": (5, 7)}, 0)
  grads = [random_tree({"kernel": (5, 7)}, seed) for seed in (1, 2, 3)]
  tx, _ = make(params, name="sgd", momentum=0.7, nesterov=nesterov)
  got, _ = train(tx, params, grads)
  p, m = params["kernel"].astype(np.float64), 0.0
  for g in grads:
    m = 0.7 * m + g["kernel"]
    p = p - 0.1 * (g["kernel"] + 0.7 * m if nesterov else m)
  np.testing.assert_allclose(got["kernel"], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_have_no_state(name):
  frozen = ("blocks/.*", "head/kernel")
  params, grads = random_tree(SHAPES, 0), random_tree(SHAPES, 1)
  trained, _ = trees.split(params, frozen)
  tx, _ = make(trained, name=name, wd=0.1)
  got, state = train(tx, trained, [trees.split(grads, frozen)[0]] * 2)
  assert set(got) == set(SHAPES) - {"blocks/fc1/kernel", "head/kernel"}
  kept = [k for k, x in trees.flatten(state).items() if x.size > 1]
  assert kept
  assert not [k for k in kept if "blocks" in k or "head/kernel" in k]


def test_optimizer_state_counts_like_the_train_state():
  params = random_tree(SHAPES, 0)
  tx, lr_fn = make(params, schedule=dict(name="linear", warmup=3))
  _, state = train(tx, params, [params] * 4)
  counts = [x for k, x in trees.flatten(state).items() if k.endswith("count")]
  assert [int(c) for c in counts] == [4, 4]
  # Step 0 of a warmup has no learning rate: the first update is nothing.
  first, _ = train(tx, params, [params])
  assert float(lr_fn(0)) == 0.0
  np.testing.assert_array_equal(
    first["head/kernel"], trees.flatten(params)["head/kernel"]
  )


LR, TOTAL = 8e-4, 1000


def closed_form(name, t):
  done = (t - 100) / (TOTAL - 100)
  return {
    "constant": lambda: LR,
    "linear": lambda: LR * (1 - done),
    "cosine": lambda: LR * (1 + np.cos(np.pi * done)) / 2,
    "rsqrt": lambda: LR / np.sqrt(1 + (t - 100) / 50),
    "steps": lambda: LR * 0.5 ** ((t >= 457) + (t >= 700)),
  }[name]()


def test_cosine_from_and_to_a_share_of_the_learning_rate():
  fn = optim.make_schedule(
    lr=LR,
    total_steps=TOTAL,
    name="cosine",
    warmup=100,
    warmup_start=0.1,
    end=0.02,
  )
  middle = 0.02 + 0.98 / 2
  for t, share in ((0, 0.1), (50, 0.55), (100, 1), (550, middle), (1000, 0.02)):
    np.testing.assert_allclose(fn(t), share * LR, rtol=1e-5)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("share", [False, True])
def test_schedules_equal_their_closed_forms(name, share):
  settings = {
    "rsqrt": dict(timescale=0.05 if share else 50),
    "steps": dict(drops=(0.457, 0.7) if share else (457, 700), factor=0.5),
  }.get(name, {})
  fn = optim.make_schedule(
    lr=LR,
    total_steps=TOTAL,
    name=name,
    warmup=0.1 if share else 100,
    cooldown=0.2 if share else 200,
    **settings,
  )
  for t in (100, 101, 457, 800):
    np.testing.assert_allclose(
      fn(t), closed_form(name, t), rtol=1e-5, atol=1e-7 * LR
    )
  # Warmup: the shape holds its first value; cooldown: a ramp to zero.
  for t in (0, 1, 37):
    np.testing.assert_allclose(fn(t), LR * t / 100, rtol=1e-5)
  for t in (801, 950, 999):
    want = closed_form(name, t) * (TOTAL - t) / 200
    np.testing.assert_allclose(fn(t), want, rtol=1e-5, atol=1e-7 * LR)
  assert fn(TOTAL) == 0.0
  assert fn(TOTAL + 5) == 0.0
  traced = jax.jit(fn)(jnp.int32(457))
  assert traced.dtype == jnp.float32
  np.testing.assert_allclose(traced, fn(457), rtol=1e-6)


def test_linear_schedule_ends_at_a_share():
  fn = optim.make_schedule(lr=2.0, total_steps=10, name="linear", end=0.25)
  np.testing.assert_allclose([fn(0), fn(5), fn(10)], [2.0, 1.25, 0.5])


def test_bfloat16_momentum_of_adamw():
  params = random_tree({"kernel": (5, 7)}, 0)
  tx, _ = make(params, mu_dtype="bfloat16")
  flat = trees.flatten(tx.init(params))
  assert {
    k.split("/")[1]: x.dtype.name for k, x in flat.items() if x.size > 1
  } == {
    "mu": "bfloat16",
    "nu": "float32",
  }


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    (
      dict(name="adam"),
      r"config\.optim\.name = 'adam' is unknown\. Did you mean 'adamw'\? "
      r"There are: adamw, adafactor, sgd\.",
    ),
    (
      dict(mu_type=0.9),
      r"config\.optim\.settings of 'adamw' does not take 'mu_type'\. Did you "
      r"mean 'mu_dtype'\? It takes: b1, b2, eps, mu_dtype\.",
    ),
    (
      dict(schedule=dict(name="cosin")),
      r"config\.optim\.schedule\.name = 'cosin' is unknown\. Did you mean "
      r"'cosine'\? There are: constant, linear, cosine, rsqrt, steps\.",
    ),
    (
      dict(schedule=dict(name="rsqrt", warm_up=3)),
      r"config\.optim\.schedule 'rsqrt' does not take 'warm_up'\. Did you "
      r"mean 'warmup'\? It takes: timescale, warmup, warmup_start, cooldown\.",
    ),
    (
      dict(schedule=dict(name="steps")),
      r"config\.optim\.schedule 'steps' needs drops",
    ),
    (
      dict(schedule=dict(name="rsqrt", warmup=70, cooldown=31)),
      r"warmup \(70 steps\) and cooldown \(31 steps\) do not fit into "
      r"config\.total_steps = 100\.",
    ),
    (
      dict(schedule=dict(name="cosine", warmup=1.5)),
      r"config\.optim\.schedule\.warmup = 1\.5 is neither a number of steps "
      r"nor a share of the run between 0 and 1\.",
    ),
    (
      dict(lr_mults=(("head/.*", 0.0), (".*", 1.0))),
      r"config\.optim\.lr_mults gives 'head/bias' the multiplier 0\.0; it has "
      r"to be positive\.",
    ),
    (
      dict(lr_mults=(("head/.*", 1.0),)),
      r"No rule of config\.optim\.lr_mults covers the parameter",
    ),
    (
      dict(wd_mults=((".*/kernel", 1.0),)),
      r"No rule of config\.optim\.wd_mults covers the parameter '.*/bias'",
    ),
  ],
)
def test_refusals(settings, sentence):
  params = jax.tree.map(jnp.asarray, random_tree(SHAPES, 0))
  with pytest.raises(ValueError, match=sentence):
    make(params, **settings)


@pytest.mark.parity
def test_adamw_equals_torch():
  torch = pytest.importorskip("torch")
  params = random_tree({"a/kernel": (5, 7), "a/bias": (11,)}, 0)
  grads = [
    random_tree({"a/kernel": (5, 7), "a/bias": (11,)}, s) for s in range(1, 6)
  ]
  tx, _ = make(params, wd=0.3, lr=0.02, eps=1e-6)
  got, _ = train(tx, params, grads)
  tensors = {
    k: torch.tensor(x, requires_grad=True)
    for k, x in trees.flatten(params).items()
  }
  opt = torch.optim.AdamW(
    [
      dict(params=[tensors["a/kernel"]], weight_decay=0.3),
      dict(params=[tensors["a/bias"]], weight_decay=0.0),
    ],
    lr=0.02,
    eps=1e-6,
  )
  for grad in grads:
    for k, g in trees.flatten(grad).items():
      tensors[k].grad = torch.tensor(g)
    opt.step()
  for k, x in got.items():
    # float32 on both sides; the order of operations differs.
    np.testing.assert_allclose(x, tensors[k].detach().numpy(), atol=2e-6)


UNITS = {
  "fc/kernel": (7, 5),
  "fc/bias": (5,),
  "conv/kernel": (3, 3, 2, 5),
  "depthwise/kernel": (3, 3, 1, 5),
  "biases": (3, 11),
}


def to_torch(name, array):
  """In torch the axis of the outputs comes first."""
  return np.moveaxis(array, -1, 0) if name.endswith("kernel") else array


@pytest.mark.parity
def test_adaptive_clipping_is_timms():
  import torch
  from timm.utils.agc import adaptive_clip_grad

  params, grads = random_tree(UNITS, 0), random_tree(UNITS, 1)
  # Of some units the gradient is small enough, of some the parameters are 0.
  grads["fc"]["kernel"][:, :2] *= 1e-3
  params["conv"]["kernel"][..., 0] = 0.0
  grads["biases"][1] = 0.0
  tx, _ = make(
    params, name="sgd", momentum=0.0, lr=1.0, clip=0.02, clip_mode="agc"
  )
  ours = trees.flatten(first_update(tx, params, grads))
  for name, value in trees.flatten(params).items():
    theirs = torch.nn.Parameter(torch.tensor(to_torch(name, value)))
    grad = trees.flatten(grads)[name]
    theirs.grad = torch.tensor(to_torch(name, grad))
    adaptive_clip_grad(theirs, 0.02)
    expected = theirs.grad.numpy()
    # Norms of up to 99 float32 numbers, added in another order.
    np.testing.assert_allclose(
      to_torch(name, -np.asarray(ours[name])), expected, rtol=2e-6
    )
    assert not np.array_equal(expected, to_torch(name, grad)), name


def test_adaptive_clipping_knows_the_units_of_attention_and_of_scans():
  """Norms by hand: every unit ends with a norm of 0.1 of its parameter's."""
  shapes = {
    "attn/query/kernel": ((7, 3, 5), (0,)),
    "attn/query/bias": ((3, 5), (0, 1)),
    "attn/out/kernel": ((3, 5, 7), (0, 1)),
    "blocks/fc/kernel": ((2, 5, 7), (1,)),
    "blocks/fc/bias": ((2, 7), (1,)),
    "blocks/attn/key/kernel": ((2, 7, 3, 5), (1,)),
    "pos_embedding": ((1, 11, 7), (1, 2)),
  }
  params = random_tree({k: s for k, (s, _) in shapes.items()}, 0)
  grads = random_tree({k: s for k, (s, _) in shapes.items()}, 1)
  settings = dict(name="sgd", momentum=0.0, lr=1.0, clip_mode="agc")
  tx, _ = make(params, **settings, clip=0.1)
  got = trees.flatten(first_update(tx, params, grads))
  for name, (_, axes) in shapes.items():
    param, grad = trees.flatten(params)[name], trees.flatten(grads)[name]
    norm = lambda x, axes=axes: np.sqrt((x**2).sum(axes, keepdims=True))
    expected = grad * np.minimum(1.0, 0.1 * norm(param) / norm(grad))
    np.testing.assert_allclose(-got[name], expected, rtol=1e-5, err_msg=name)
  some, few = (trees.split(tree, ("attn/.*",))[0] for tree in (params, grads))
  kept = first_update(make(some, **settings, clip=0.1)[0], some, few)
  np.testing.assert_array_equal(kept["pos_embedding"], got["pos_embedding"])
  free = first_update(make(params, **settings, clip=0)[0], params, grads)
  np.testing.assert_array_equal(-free["pos_embedding"], grads["pos_embedding"])


def test_an_unknown_way_to_clip_lists_the_known_ones():
  with pytest.raises(
    ValueError, match=r"clip_mode = 'acg'.*Did you mean 'agc'"
  ):
    make(random_tree(SHAPES, 0), clip=1.0, clip_mode="acg")
