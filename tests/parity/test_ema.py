"""The moving average against timm's ModelEmaV3, over a model with BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_like import api, train_step, trees
from big_vision_like.models.layers.convolution import ConvBN
from big_vision_like.tasks import classification
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
WIDTH, CLASSES, DECAY, RATE = 7, 5, 0.8, 0.3


class Model(nn.Module):
  @nn.compact
  def __call__(self, image, *, train):
    x = nn.relu(ConvBN(WIDTH, 3, name="conv")(image, train=train))
    pooled = x.mean((1, 2))
    return {"pooled": pooled, "logits": nn.Dense(CLASSES, name="head")(pooled)}


RULES = [
  *engine.conv("params/conv/conv", "0", bias=False),
  *engine.batch_norm("conv/bn", "1"),
  *engine.dense("params/head", "5"),
]


def to_ours(module):
  theirs = {
    k: x.detach().numpy().copy() for k, x in module.state_dict().items()
  }
  flat = {}
  for rule in RULES:
    arrays = rule.load(*(theirs[k] for k in rule.theirs))
    flat |= dict(zip(rule.ours, arrays))
  return trees.unflatten(flat)


def batch_of(seed):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (13, 8, 6, 3)).astype(np.uint8),
    "label": rng.integers(0, CLASSES, 13),
    "_mask": np.ones(13, bool),
  }


def to_torch(batch):
  import torch

  image = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy())
  return image.float() / 127.5 - 1


def test_average_of_parameters_and_statistics():
  """Four steps of SGD: all averages, and the answers they give."""
  import torch

  timm_utils = pytest.importorskip("timm.utils")
  torch.manual_seed(0)
  theirs = torch.nn.Sequential(
    torch.nn.Conv2d(3, WIDTH, 3, padding=1, bias=False),
    torch.nn.BatchNorm2d(WIDTH),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(WIDTH, CLASSES),
  )
  average = timm_utils.ModelEmaV3(theirs, decay=DECAY)
  optimizer = torch.optim.SGD(theirs.parameters(), lr=RATE)

  model, tx = Model(), optax.sgd(RATE)
  task = classification.Task(CLASSES, loss_name="softmax")
  variables = jax.tree.map(jnp.asarray, to_ours(theirs))
  params, statistics = variables["params"], variables["batch_stats"]
  state = train_step.restart_average(
    api.TrainState(
      step=jnp.int32(0),
      params=params,
      model_state={"batch_stats": statistics},
      opt_state=tx.init(params),
      rng=jax.random.key(0),
      ema={},
    )
  )
  step = jax.jit(train_step.make_train_step(model, task, tx, ema_decay=DECAY))
  theirs.train()
  for seed in range(4):
    batch = batch_of(seed)
    optimizer.zero_grad()
    label = torch.from_numpy(batch["label"])
    torch.nn.functional.cross_entropy(theirs(to_torch(batch)), label).backward()
    optimizer.step()
    average.update(theirs)
    state, _ = step(state, batch)
  wanted, got = trees.flatten(to_ours(average.module)), trees.flatten(state.ema)
  raw = trees.flatten(to_ours(theirs))
  assert set(got) == set(wanted)
  for k, x in wanted.items():
    np.testing.assert_allclose(got[k], x, rtol=1e-4, atol=1e-5, err_msg=k)
    assert np.abs(raw[k] - x).max() > 1e-3, k  # It is far from the last step.
  batch = batch_of(9)
  out = jax.jit(train_step.make_predict(model, task))(state, batch)
  with torch.no_grad():
    answers = average.module(to_torch(batch)).numpy()
  np.testing.assert_allclose(out["logits"], answers, rtol=1e-4, atol=1e-5)
