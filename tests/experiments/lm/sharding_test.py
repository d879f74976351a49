"""A model on meshes of eight virtual devices against the same on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevel_jax as bj
from experiments import harness
from experiments.lm import decoder, log_probs, lora, sharding
from tests.experiments.lm.decoder_test import CONFIGS, SMALL

P = PartitionSpec
CONFIG = dataclasses.replace(
  SMALL, layers=2, width=32, hidden=64, heads=4, vocabulary=48
)
ROWS, LENGTH = 8, 10


def batches():
  """Of demonstrations and of comparisons, with a reference."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 48, size=(3, ROWS, LENGTH)).astype(np.int32)
  # As many tokens in each half: a mean over them is one of halves' means.
  first = np.array([3, 5, 4, 6] * 2)
  mask = (np.arange(LENGTH) >= first[:, None]).astype(np.int32)
  pairs = {'chosen': tokens[1], 'rejected': tokens[2], 'mask': mask}
  pairs['reference'] = -20 - rng.random((ROWS, 2), dtype=np.float32)
  return {'sft': {'tokens': tokens[0], 'mask': mask}, 'dpo': pairs}


def losses(dtype=None):
  """Of weights that have adapters, in `weights` and `adapters`."""

  def of(params, tokens, mask):
    full = lora.attach(params['weights'], params['adapters'])
    return log_probs.from_tokens(
      CONFIG, full, tokens, mask, remat=True, dtype=dtype
    )

  def sft(params, batch):
    result = of(params, batch['tokens'], batch['mask'])
    return bj.losses.sft(result.log_probs, result.mask)

  def dpo(params, batch):
    totals = [
      of(params, batch[name], batch['mask']).total
      for name in ('chosen', 'rejected')
    ]
    return bj.losses.dpo(*totals, *batch['reference'].T, beta=0.5)

  return {'sft': sft, 'dpo': dpo}


def params_of():
  weights = decoder.init(CONFIG, 0)
  adapters = lora.init(weights, jax.random.key(0), rank=4, weights=lora.WEIGHTS)
  change = lambda w: np.float32(np.cos(np.arange(w.size)).reshape(w.shape) / 9)
  adapters = jax.tree.map(lambda w: np.asarray(w) + change(w), adapters)
  return {'weights': weights, 'adapters': adapters}


def mesh_of(fsdp, tp):
  return jax.make_mesh(
    (fsdp, tp), ('fsdp', 'tp'), axis_types=(AxisType.Auto,) * 2
  )


def placed(tree, mesh, specs):
  return jax.device_put(
    tree,
    jax.tree.map(
      lambda spec: NamedSharding(mesh, spec),
      specs,
      is_leaf=lambda x: isinstance(x, P),
    ),
  )


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_device():
  params, data = params_of(), batches()
  loss = losses()

  def in_parts(params, batch):
    """A batch in two parts, one after the other."""
    parts = bj.evaluation.accumulate(bj.gradient(loss['sft']), 2)
    gradient, state = parts.update(batch, parts.init(params), params)
    return bj.values(state)['loss'], gradient

  ways = {n: jax.value_and_grad(f) for n, f in loss.items()}
  ways['parts'] = in_parts
  data['parts'] = data['sft']

  def run(names):
    return jax.jit(
      lambda params, data: {n: ways[n](params, data[n]) for n in names}
    )

  one = run(ways)(params, data)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    one['parts'],
    one['sft'],
  )
  for shape, names in (((8, 1), ['sft']), ((4, 2), ['dpo', 'parts'])):
    mesh = mesh_of(*shape)
    there = placed(params, mesh, sharding.specs(CONFIG, mesh)(params))
    for leaf in (there['weights']['layers']['q'], there['adapters']['o.b']):
      parts = {str(s.index) for s in leaf.addressable_shards}
      assert len(parts) == (8 if leaf.shape[1] > 4 else shape[0])
    split = placed(data, mesh, jax.tree.map(lambda _: P('fsdp'), data))
    result = run(names)(there, split)
    for name in names:
      np.testing.assert_allclose(result[name][0], one[name][0], rtol=1e-4)
      largest = max(np.abs(g).max() for g in jax.tree.leaves(one[name][1]))
      jax.tree.map(
        lambda a, b, atol=1e-4 * largest: np.testing.assert_allclose(
          a, b, rtol=1e-4, atol=atol
        ),
        result[name][1],
        one[name][1],
      )


@pytest.mark.slow
def test_bfloat16_computes_and_float32_is_moved():
  params, data = params_of(), batches()

  def run(params, batch):
    return [
      jax.value_and_grad(losses(dtype)['dpo'])(params, batch)
      for dtype in (None, jnp.bfloat16)
    ]

  wide, low = jax.jit(run)(params, data['dpo'])
  assert low[0].dtype == jnp.float32
  assert abs(low[0] - wide[0]) < 0.1 * abs(wide[0])
  assert low[0] != wide[0]
  for one, two in zip(*(jax.tree.leaves(g) for _, g in (wide, low))):
    assert two.dtype == jnp.float32
    one, two = (np.asarray(g).ravel() for g in (one, two))
    assert one @ two > 0.9 * np.linalg.norm(one) * np.linalg.norm(two)
  # No copy of all weights: the products are of bfloat16, layer by layer.
  x = jax.eval_shape(
    lambda p: decoder.embed(p, data['sft']['tokens'], jnp.bfloat16),
    params['weights'],
  )
  left = jax.eval_shape(
    lambda p, x: decoder.run_layers(CONFIG, p['layers'], x),
    params['weights'],
    x,
  )
  assert left.dtype == jnp.bfloat16


def shapes_of(config):
  return jax.eval_shape(lambda: decoder.init(config, 0))


def test_where_each_weight_goes():
  mesh = mesh_of(4, 2)
  config = dataclasses.replace(
    CONFIGS['qwen2, linear positions'], tied=False, vocabulary=51
  )
  tree = shapes_of(config)
  result = sharding.specs(config, mesh)(tree)
  # 51 words are no multiple of two.
  assert (result['embed'], result['head']) == (P(None, 'fsdp'), P('fsdp', None))
  layers = result['layers']
  for name in ('q', 'k', 'v', 'gate', 'up'):
    assert layers[name] == P(None, 'fsdp', 'tp')
  for name in ('o', 'down'):
    assert layers[name] == P(None, 'tp', 'fsdp')
  assert layers['q_bias'] == layers['k_bias'] == P(None, 'tp')
  assert result['norm'] == layers['mlp_norm'] == P()
  # Three heads are not cut in two, though their 30 columns could be.
  config = CONFIGS['qwen3']
  adapters = lora.init(
    decoder.init(config, 0), jax.random.key(0), rank=4, weights=lora.WEIGHTS
  )
  nested = bj.BilevelParams(upper=(shapes_of(config),), lower=adapters)
  result = sharding.specs(config, mesh)(nested)
  layers = result.upper[0]['layers']
  assert layers['k'] == layers['v'] == P(None, 'fsdp', None)
  assert layers['q'] == P(None, 'fsdp', 'tp')
  assert layers['q_norm'] == P()
  assert result.lower['q.a'] == P(None, 'fsdp', None)
  assert result.lower['q.b'] == P(None, None, 'tp')
  assert result.lower['v.b'] == P(None, None, None)
  assert result.lower['down.a'] == P(None, 'tp', None)
  assert result.lower['down.b'] == P(None, None, 'fsdp')
  # Fully sharded alone.
  one = jax.make_mesh((8,), ('data',))
  single = sharding.specs(config, one, fsdp='data', tp=None)(shapes_of(config))
  assert single['layers']['o'] == P(None, None, 'data')
  with pytest.raises(harness.SettingsError, match="not 'fsdp'"):
    sharding.specs(config, one)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path):
  """Adapters over frozen weights, by the coin of ALRIGHT."""
  params, data = params_of(), batches()
  loss = losses()

  def on(name):
    full = lambda adapters, frozen: {'weights': frozen, 'adapters': adapters}
    return lambda adapters, batch: loss[name](
      full(adapters, batch['frozen']), batch['rows']
    )

  def train(shape, workdir, steps):
    layout = None
    if shape is not None:
      mesh = mesh_of(*shape)
      layout = harness.Layout(
        mesh, sharding.specs(CONFIG, mesh), examples=('fsdp',)
      )
    return harness.train(
      optax.chain(
        bj.solvers.alright(
          [on('sft'), on('dpo')], ('sft', 'dpo'), weights=[0.5, 0.5], key=1
        ),
        optax.adam(1e-2),
      ),
      harness.Task(
        lambda context: params['adapters'],
        lambda context: {
          name: {'frozen': context.frozen, 'rows': rows}
          for name, rows in context.data.items()
        },
        data=data,
        shard=shape is not None,
        frozen=params['weights'],
      ),
      harness.Training(
        steps, chunk=2, seeds=1, workdir=workdir, at_once=1, layout=layout
      ),
    )

  one = train(None, None, 4)
  train((8, 1), tmp_path, 2)
  other = train((4, 2), tmp_path, 4)
  assert other.step == 4
  spread = other.params['down.a'].sharding
  assert len(spread.device_set) == 8
  assert spread.spec[2] == 'tp'
  for name, adapter in other.params.items():
    np.testing.assert_allclose(
      adapter, one.params[name], rtol=1e-4, atol=1e-5, err_msg=name
    )
    assert np.abs(adapter[0] - params['adapters'][name]).max() > 1e-3
