"""Learnable memory: its equations, and that no task changes another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vit_in_numpy

from big_vision_like import flops, train_step, trees
from big_vision_like.models import flexivit, memory, navit, vit
from big_vision_like.models.layers.encoder import unstack_blocks
from big_vision_like.tasks import classification

SIZES = dict(width=24, depth=3, mlp=29, heads=3)
KINDS = dict(vit=vit, flexivit=flexivit, navit=navit)
# A class token, a mean and attention; scanned and not; biases and QK norms.
BACKBONES = {
  "vit": dict(name="vit", variant="Ti/2", position="learn"),
  "unrolled": dict(name="vit", variant="Ti/2", scan=False, rep_size=7),
  "gap": dict(name="vit", variant="Ti/2", pool="gap", position="sincos2d"),
  "map": dict(name="vit", variant="Ti/2", pool="map"),
  "flexivit": dict(name="flexivit", variant="Ti", grid=(3, 5), table=4),
  "navit": dict(name="navit", variant="Ti", max_grid=8, pool="map"),
  "navit_tok": dict(
    name="navit", variant="Ti", max_grid=8, pool="tok", registers=2
  ),
}
QUICK = ("vit", "gap", "navit_tok")
A, B = dict(cells=2, num_classes=5), dict(cells=3, num_classes=11)
ON_A = dict(B, extends=("a",))
ROWS, LENGTH, SLOTS = 2, 41, 3
# The images of a packed row, and of one row each.
GRIDS = [(3, 5), (4, 4), (1, 7)]
PACKED, ALONE = [[0, 1, 2], []], [[1], [0]]


def backbone(kind, *, head=13):
  settings = dict(BACKBONES[kind], num_classes=head)
  patch = {} if settings["name"] == "vit" else dict(patch=2)
  return dict(settings, sizes=dict(SIZES, **patch))


def model_of(kind, tasks, *, head=13, **kw):
  kw.setdefault("task", next(iter(tasks)))
  return memory.Model(backbone=backbone(kind, head=head), tasks=tasks, **kw)


def pack(rows):
  shape = (ROWS, LENGTH)
  batch = dict(
    patches=np.zeros((*shape, 12), np.float32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros((*shape, 2), np.int32),
    grid_hw=np.zeros((ROWS, SLOTS, 2), np.int32),
    example_mask=np.zeros((ROWS, SLOTS), bool),
  )
  for b, row in enumerate(rows):
    start = 0
    for m, image in enumerate(row):
      n = np.prod(GRIDS[image])
      own = slice(start, start + n)
      rng = np.random.default_rng(image)
      batch["patches"][b, own] = rng.normal(size=(n, 12))
      batch["segment_ids"][b, own] = m + 1
      batch["positions"][b, own] = np.argwhere(np.ones(GRIDS[image]))
      batch["grid_hw"][b, m] = GRIDS[image]
      batch["example_mask"][b, m] = True
      start += n
  return {k: jnp.asarray(x) for k, x in batch.items()}


def inputs_of(kind):
  if kind.startswith("navit"):
    return pack(PACKED)
  image = np.random.default_rng(0).normal(size=(2, 6, 10, 3))
  return dict(image=jnp.asarray(image, jnp.float32))


@functools.cache
def params_of(kind):
  """Of the backbone and of the tasks a and b, all random."""
  model = model_of(kind, dict(a=A, b=B))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), train=False, **inputs_of(kind))
  )
  return vit_in_numpy.random_params(shapes["params"])


def only(params, *tasks):
  return {**params, "tasks": {k: params["tasks"][k] for k in tasks}}


@functools.partial(jax.jit, static_argnames="model")
def run(model, params, inputs):
  return model.apply({"params": params}, train=False, **inputs)


@functools.cache
def outputs(kind, **tasks):
  """With these tasks, given as "a" or "a+" for what b extends."""
  specs = {"a": A, "b": ON_A if tasks.get("b") == "extends" else B}
  specs = {k: specs[k] for k in tasks}
  params = only(params_of(kind), *specs)
  return run(model_of(kind, specs), params, inputs_of(kind))


def same(a, b):
  return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(k, marks=() if k in QUICK else pytest.mark.slow)
    for k in BACKBONES
  ],
)
def test_no_answer_changes_when_tasks_join(kind):
  """Bit by bit: those of the backbone, of tasks tuned apart and of a base.

  No product of theirs changes its shape, and those of a CPU then are the same.
  """
  settings = {k: v for k, v in backbone(kind).items() if k != "name"}
  plain = KINDS[BACKBONES[kind]["name"]].Model(**settings)
  want = run(plain, params_of(kind)["backbone"], inputs_of(kind))
  joined = outputs(kind, a=True, b=True)
  extended = outputs(kind, a=True, b="extends")
  for got in (joined, extended):
    assert same(got["logits/backbone"], want["logits"])
    assert same(got["tokens"], want["tokens"])
    assert same(got["logits/a"], outputs(kind, a=True)["logits/a"])
  assert same(joined["logits/b"], outputs(kind, b=True)["logits/b"])
  # The extension does look at its base.
  moved = np.abs(extended["logits/b"] - joined["logits/b"]).max()
  assert moved > 1e-2
  assert np.isfinite(np.asarray(joined["logits/b"])).all()


@pytest.mark.parametrize("kind", ["vit", "gap", "navit_tok"])
def test_without_the_mask_answers_change(kind):
  """So the mask is needed: the interference of section 4.4."""
  params = params_of(kind)
  kw = dict(mask=False)
  alone, joined = (
    run(model_of(kind, tasks, **kw), only(params, *tasks), inputs_of(kind))
    for tasks in (dict(a=A), dict(a=A, b=B))
  )
  for key in ("logits/a", "logits/backbone", "tokens"):
    assert np.abs(joined[key] - alone[key]).max() > 1e-2, key
  masked = outputs(kind, a=True)
  assert np.abs(alone["tokens"] - masked["tokens"]).max() > 1e-2


def in_numpy(params, x, tasks, *, masked):
  """Class tokens behind the blocks; x [N,D] are the model's tokens.

  Table 1 of the paper, row by row: each class token attends alone.
  """
  layers = params["backbone"]["encoder"]
  tokens = {k: params["tasks"][k]["cls"] + x[0] for k in tasks}
  if not masked:  # Instead of the model's own class token.
    x = np.concatenate([np.stack(list(tokens.values())), x[1:]])
  norm = vit_in_numpy.layer_norm
  for i in range(SIZES["depth"]):
    p = layers[f"blocks_{i}"]
    cells = {k: params["tasks"][k]["memory"][i] for k in tasks}

    def block(rows, seen, p=p):
      y = vit_in_numpy.attention(
        norm(rows, p["ln1"]), norm(np.concatenate(seen), p["ln1"]), p["attn"]
      )
      rows = rows + y
      return rows + vit_in_numpy.mlp(norm(rows, p["ln2"]), p["mlp"])

    if not masked:
      x = block(x, [x, *cells.values()])
      continue
    new = {}
    for k, task in tasks.items():
      seen = [
        part
        for j in (k, *task.get("extends", ()))
        for part in (tokens[j][None], cells[j])
      ]
      new[k] = block(tokens[k][None], [x, *seen])[0]
    x, tokens = block(x, [x]), new
  if not masked:
    tokens = dict(zip(tasks, x))
  return {
    k: vit_in_numpy.dense(norm(t, layers["norm"]), params["tasks"][k]["head"])
    for k, t in tokens.items()
  }


@pytest.mark.parametrize("mask", [True, False])
def test_logits_are_the_equations(mask):
  """Of an extension with the mask, and of two tasks in the plain form."""
  tasks = dict(a=A, b=ON_A if mask else B)
  model = model_of("vit", tasks, mask=mask, head=None)
  params = params_of("vit")
  head = {k: v for k, v in params["backbone"].items() if k != "head"}
  params = {**params, "backbone": head}
  image = inputs_of("vit")["image"]
  got = run(model, params, dict(image=image))
  params = vit_in_numpy.float64(unstack_blocks(params))
  p = params["backbone"]
  for row, pixels in enumerate(np.asarray(image, np.float64)):
    patches = pixels.reshape(3, 2, 5, 2, 3).swapaxes(1, 2).reshape(15, 12)
    x = patches @ p["embed"]["kernel"].reshape(12, 24) + p["embed"]["bias"]
    x = np.concatenate([p["cls"][0], x]) + p["pos_embed"][0]
    for k, want in in_numpy(params, x, tasks, masked=mask).items():
      # Float32 through three layers.
      np.testing.assert_allclose(
        got[f"logits/{k}"][row], want, rtol=1e-4, atol=1e-4
      )


@pytest.mark.parametrize(
  "kind", ["vit", "navit_tok", pytest.param("unrolled", marks=pytest.mark.slow)]
)
def test_folded_equals_unfolded(kind):
  """Bit by bit too: the same products, once and not for each batch."""
  tasks = dict(a=A, b=ON_A)
  model = model_of(kind, tasks)
  folded, params = memory.fold(model, params_of(kind))
  assert set(params["tasks"]["a"]) == {"cls", "head", "key", "value"}
  assert params["tasks"]["b"]["key"].shape == (3, 3, 3, 8)
  got = run(folded, params, inputs_of(kind))
  want = outputs(kind, a=True, b="extends")
  for key in ("logits/a", "logits/b", "logits/backbone"):
    # Float32: projections of few cells alone, or scanned, may round otherwise.
    np.testing.assert_allclose(got[key], want[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
  "kind", ["navit_tok", pytest.param("navit", marks=pytest.mark.slow)]
)
def test_the_law_of_packing_holds(kind, mask):
  """Images share the cells and nothing else, with two backends."""
  tasks = dict(a=A, b=ON_A)
  for attention in ("xla", "blockwise"):
    model = model_of(kind, tasks, mask=mask, attention=attention)
    packed = run(model, params_of(kind), pack(PACKED))
    alone = run(model, params_of(kind), pack(ALONE))
    for key in ("logits/a", "logits/b", "logits/backbone"):
      for slot, row in ((0, 1), (1, 0)):
        # Float32 sums over other blocks of keys.
        np.testing.assert_allclose(
          packed[key][0, slot], alone[key][row, 0], rtol=1e-4, atol=1e-5
        )
      assert not np.asarray(packed[key][1]).any()  # No image there.
    batch = pack(PACKED)
    foreign = batch["segment_ids"] == 2
    batch["patches"] = jnp.where(foreign[..., None], 9.0, batch["patches"])
    moved = run(model, params_of(kind), batch)
    for key in ("logits/a", "logits/b", "logits/backbone"):
      assert same(moved[key][0, [0, 2]], packed[key][0, [0, 2]])
      assert not np.isclose(moved[key][0, 1], packed[key][0, 1]).any()


def test_training_starts_from_the_backbone_s_class_token():
  """Position included, so that a class token alone starts from what it knew."""
  model = model_of("vit", dict(a=dict(num_classes=5)), mask=False, head=None)
  inputs = inputs_of("vit")
  fresh = jax.jit(lambda: model.init(jax.random.key(0), train=False, **inputs))
  params = fresh()["params"]
  assert not np.asarray(params["tasks"]["a"]["cls"]).any()
  own = {k: v for k, v in params_of("vit")["backbone"].items() if k != "head"}
  got = run(model, {**params, "backbone": own}, inputs)
  plain = vit.Model(**{k: v for k, v in backbone("vit").items() if k != "name"})
  want = run(plain, params_of("vit")["backbone"], inputs)
  assert same(got["token/a"], want["pooled"])
  cells = model_of("gap", dict(a=dict(cells=97, num_classes=5)))
  started = jax.jit(
    lambda: cells.init(jax.random.key(0), train=False, **inputs)
  )
  task = started()["params"]["tasks"]["a"]
  for name in ("cls", "memory"):
    # 7,000 numbers: three deviations of their spread are 0.0005; 24 of cls.
    assert abs(np.std(task[name]) - 0.02) < (5e-4 if name == "memory" else 1e-2)


TASK = classification.Task(num_classes=5, loss_name="softmax")
FROZEN = {"memory": ("backbone/.*",), "full": ()}


def trained(model, *, frozen):
  """State before, after and metrics of two steps, and FLOPs of one."""
  image = np.random.default_rng(1).integers(0, 256, (3, 6, 10, 3), np.uint8)
  batch = dict(image=image, label=np.arange(3), _mask=np.ones(3, bool))
  tx = optax.sgd(0.1, 0.9)
  init = functools.partial(train_step.init_state, model, TASK, tx)
  state = jax.jit(lambda: init(jax.random.key(0), batch, frozen=frozen))()
  step = train_step.make_train_step(model, TASK, tx, frozen=frozen)
  after, metrics = state, None
  for _ in range(2):  # The head starts at 0: nothing reaches the cells at once.
    after, metrics = jax.jit(step)(after, batch)
  predict = train_step.make_predict(model, TASK)
  count = flops.count_flops
  return (
    state,
    after,
    metrics,
    count(step, state, batch),
    count(predict, state, batch),
  )


@pytest.mark.slow
def test_the_frozen_backbone_costs_no_gradient():
  """It stays, has no gradient, no state, and no product of a backward pass."""
  model = model_of("vit", dict(a=A), head=None)
  before, after, metrics, step, forward = trained(
    model, frozen=("backbone/.*",)
  )
  start, end = (trees.flatten(s.params) for s in (before, after))
  for name in start:
    assert same(start[name], end[name]) == name.startswith("backbone/"), name
  own = {f"tasks/a/{k}" for k in ("cls", "memory", "head/kernel", "head/bias")}
  assert set(metrics["grad_sq"]) == own
  assert all(np.asarray(x).all() for x in metrics["grad_sq"].values())
  state = [k for k in trees.flatten(after.opt_state) if "trace" in k]
  assert len(state) == len(own)
  # A class token beside the others: its own backward pass and that of cells,
  # 4 rows of tokens to the 16 that are only read. Never twice the forward.
  assert step < 1.7 * forward
  *_, step, forward = trained(
    model_of("vit", dict(a=A), head=None, mask=False), frozen=("backbone/.*",)
  )
  # Without the mask, gradients of activations and none of weights; products of
  # two activations have two of them.
  assert 1.9 * forward < step < 2.3 * forward
  settings = {k: v for k, v in backbone("vit", head=5).items() if k != "name"}
  *_, step, forward = trained(vit.Model(**settings), frozen=())
  assert step > 2.7 * forward


@pytest.mark.parametrize(
  ("classes", "totals"),
  [
    (100, (77_668, 86_884, 123_748, 169_828, 261_988)),
    (365, (281_453, 290_669, 327_533, 373_613, 465_773)),
    (397, (306_061, 315_277, 352_141, 398_221, 490_381)),
  ],
)
def test_parameters_are_those_of_the_table(classes, totals):
  """Of ViT-B/32, which itself has 87,455,232."""
  for cells, total in zip((0, 1, 5, 10, 20), totals):
    model = memory.Model(
      backbone=dict(name="vit", variant="B/32"),
      tasks=dict(task=dict(cells=cells)),
      num_classes=classes,
    )
    image = jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), train=False, image=image)  # noqa: B023
    )["params"]
    assert trees.count(shapes["tasks"]) == total
    assert trees.count(shapes["backbone"]) == 87_455_232


def test_remat_changes_nothing():
  params, inputs = params_of("vit"), inputs_of("vit")

  def loss(params, remat):
    model = model_of("vit", dict(a=A, b=ON_A), remat=remat)
    out = model.apply({"params": params}, train=True, **inputs)
    return (out["logits/b"] ** 2).sum()

  one, other = (
    jax.jit(jax.grad(loss), static_argnums=1)(params, remat)["tasks"]
    for remat in ("none", "names")
  )
  # The same operations, fused differently: float32's last digits.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    one,
    other,
  )
  assert np.abs(one["a"]["memory"]).max() > 0  # Through the extension.


def init(model, **inputs):
  inputs = inputs or inputs_of("vit")
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), train=False, **inputs)
  )


@pytest.mark.parametrize(
  ("make", "sentence"),
  [
    (
      lambda: model_of("vit", {"b": ON_A}),
      r"The task 'b' extends 'a', which is not loaded; there are: b\.",
    ),
    (
      lambda: model_of("vit", {"backbone": A}),
      "A task cannot be called 'backbone'",
    ),
    (lambda: model_of("vit", {"a/b": A}), "A task cannot be called 'a/b'"),
    (lambda: memory.Model(backbone={}, tasks={}), "tasks is empty"),
    (
      lambda: model_of("vit", {"a": dict(cell=3)}),
      r"config\.model\.tasks\.a = \{'cell': 3\}: a task has cells, num_classes",
    ),
    (lambda: model_of("vit", {"a": dict(cells=-1)}), "at least 0 cells"),
    (
      lambda: init(model_of("vit", dict(a=A, b=B), task="c")),
      r"The task 'c' is asked for, and not loaded; there are: a, b, backbone",
    ),
    (
      lambda: init(model_of("vit", dict(a=A, b=B), head=None, task="backbone")),
      r"The task 'backbone' is asked for, and not loaded; there are: a, b\.",
    ),
    (
      lambda: init(memory.Model(backbone=dict(name="deepvit"), tasks={"a": A})),
      "'deepvit' takes no memory; vit, flexivit and navit do",
    ),
    (
      lambda: init(memory.Model(backbone=dict(name="vti"), tasks={"a": A})),
      "Unknown name 'vti' in models. Did you mean 'vit'",
    ),
    (
      lambda: init(model_of("vit", {"a": dict(cells=1)})),
      r"The task 'a' has no number of classes: set num_classes",
    ),
  ],
)
def test_refusals(make, sentence):
  with pytest.raises(ValueError, match=sentence):
    make()
