"""The tables of cost: laws that fit, kinds that are told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like.benchmarks import (
  attention,
  kinds,
  models,
  share,
  tokens,
)
from big_vision_like.models.layers.blocks import BlockConfig


def cells(table: str) -> list[list[str]]:
  """The header and the rows of a markdown table."""
  lines = [line for line in table.splitlines() if line.startswith("|")]
  return [
    [cell.strip() for cell in line[1:-1].split("|")]
    for line in lines
    if set(line) != {"|", "-"}
  ]


def test_fits_find_the_law_that_made_the_costs():
  n = (1000, 2000, 4000, 8000)
  line = tokens.fit("x", {k: 2 + 3 * k / 1000 for k in n}, "ms")
  assert line["linear"] == "2 + 3 n ms"
  assert line["linear error"] == "0%"
  assert line["quadratic error"] != "0%"
  square = tokens.fit("x", {k: 5 * (k / 1000) ** 2 for k in n}, "ms")
  assert square["quadratic"].endswith("+ 5 n² ms")
  assert square["quadratic error"] == "0%"
  assert square["power"] == pytest.approx(2)


def test_packed_attention_by_backend(monkeypatch):
  monkeypatch.setattr(attention, "IMAGE", 5)
  table = attention.run(
    lengths=(4, 16, 64), heads=2, head=8, repeats=1, memory=50_000
  )
  header, *rows = cells(table)
  assert [row[:2] for row in rows] == [["4", "16"], ["16", "4"], ["64", "1"]]
  megabytes = [float(row[header.index("xla, MB")]) for row in rows]
  assert megabytes == sorted(megabytes)
  # Scores of 64 x 64 in two heads are 33 kB, and there are several of them.
  assert rows[2][header.index("xla, ms")] == "not run"
  assert "Not run here: splash, cudnn." in table


def test_rows_are_full_of_whole_images():
  ids = attention.segments(2, 500)
  assert ids.shape == (2, 500)
  assert np.bincount(ids[1]).tolist() == [108, 196, 196]
  assert set(attention.segments(1, 100).flat) == {1}


def test_attention_table_has_time_memory_and_fits():
  table = tokens.run(
    tokens=(16, 64, 144), width=8, heads=2, repeats=1, memory=150_000
  )
  costs, fits = (cells(part) for part in table.split("### Fits"))
  assert [row[0] for row in costs[1:]] == ["16", "64", "144"]
  # Scores of 144 x 144 in two heads are 166 kB.
  assert costs[3][costs[0].index("MHSA, ms")] == "not run"
  assert float(costs[3][costs[0].index("MHSA, MB")]) >= 0.166
  fitted = [row[0] for row in fits[1:]]
  assert {f"memory of {name}" for name in tokens.LAYERS} <= set(fitted)
  assert "time of separable" in fitted
  assert "time of MHSA" not in fitted


def test_odd_maps_are_refused():
  for n in (50, 49):
    with pytest.raises(ValueError, match=f"{n} tokens are no square"):
      tokens.run(tokens=(n,), width=8, heads=2, repeats=1)


def test_attention_spreads_evenly_among_the_layers():
  stack = share.Stack(BlockConfig(heads=2, mlp=8), 3, 6)
  x = jnp.zeros((1, 5, 4))
  names = stack.init(jax.random.key(0), x)["params"]
  assert sorted(n for n in names if n.startswith("attn")) == [
    "attn_2",
    "attn_5",
    "attn_8",
  ]
  assert sum(n.startswith("mlp") for n in names) == 6
  # 4 projections, scores and their products; two layers of 4 x 8.
  want = 3 * (4 * 5 * 16 + 2 * 25 * 4) + 6 * 2 * 5 * 32
  assert share._products(stack, x) == want


def test_share_table_is_relative_to_vits_share():
  header, *rows = cells(
    share.run(
      shares=(0.25,),
      layers=4,
      width=8,
      heads=2,
      tokens=5,
      batch=2,
      repeats=1,
    )
  )
  at = {name: header.index(name) for name in header}
  assert [row[at["attention"]] for row in rows] == ["25%", "50%"] * 2
  assert [row[at["layers"]] for row in rows[:2]] == ["1 + 3 FFN", "2 + 2 FFN"]
  assert [row[at["speed"]] for row in rows[1::2]] == ["1", "1"]


PROGRAM = """HloModule jit_f, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%inner.1 (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %d.1 = f32[2]{0} dot(%p, %p), metadata={op_name="f/mlp/dot"}
}

%soft (p.2: f32[2]) -> f32[2] {
  %p.2 = f32[2]{0} parameter(0)
  ROOT %e = f32[2]{0} exponential(%p.2)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %a = f32[2]{0} fusion(%x), calls=%inner.1, metadata={op_name="f/ln1/add"}
  %b = f32[2]{0} fusion(%a), calls=%soft, metadata={op_name="f/attn/exp"}
  %c = (f32[2], f32[2]) fusion(%b), calls=%soft, metadata={op_name="f/ln2/mul"}
  %t = f32[2]{0} transpose(%b), dimensions={0}
  %g = f32[2]{0} add(%t, %t), metadata={op_name="f/dw0/conv/add"}
  %cc = f32[2]{0} custom-call(%g), custom_call_target="__cublas$gemm"
  %w = f32[2]{0} while(%g), body=%soft
  ROOT %r = f32[2]{0} tanh(%g), metadata={op_name="f/mlp/tanh"}
}
"""


def test_kinds_are_told_from_the_program():
  seconds = dict(a=8, b=4, c=2, t=1, g=0.5, cc=8, r=0.25, w=99, other=99)
  found = kinds.shares(PROGRAM, seconds)
  total = 23.75
  assert {k: x * total for k, x in found.items()} == pytest.approx(
    {
      "products": 16,
      "softmax": 4,
      "normalisation": 2,
      "reshapes": 1,
      "depthwise": 0.5,
      "element-wise": 0.25,
    }
  )
  with pytest.raises(ValueError, match="no instruction"):
    kinds.shares(PROGRAM, {"other": 1.0})


def test_profile_of_a_model_adds_up():
  pair = models.Pair("vit", "local", "", 16)
  header, row = cells(kinds.run(pairs=[pair], batch=2, repeats=1))
  assert header[2:] == list(kinds.KINDS)
  parts = [float(x.rstrip("%")) for x in row[2:]]
  # Rounded to whole percents.
  assert np.sum(parts) == pytest.approx(100, abs=3)
  assert parts[0] > 0
