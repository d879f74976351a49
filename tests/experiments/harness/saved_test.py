"""Tests of what is read of a run without its program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


class TestLoad:
  def test_a_run_that_is_interrupted_then_finished(self, train, tmp_path):
    settings = {'depth': 3}
    first = train(stop_when=lambda history: True, settings=settings)
    loaded = harness.load(tmp_path)
    assert (loaded.step, loaded.best) == (10, ())
    assert loaded.settings['depth'] == 3
    assert loaded.settings['train.seeds'] == [0, 1]
    same(loaded.params, first.params._asdict())
    whole = train(settings=settings)
    loaded = harness.load(tmp_path, like=bj.BilevelParams(0, 0))
    same(loaded.params, whole.params)
    assert loaded.step == 40

  def test_a_relative_folder(self, train, tmp_path, monkeypatch):
    trained = train(stop_when=lambda history: True)
    monkeypatch.chdir(tmp_path.parent)
    loaded = harness.load(tmp_path.name)
    same(loaded.params, trained.params._asdict())

  def test_best_params_and_nested_ones(self, train, tmp_path):
    params = {'layers': ({'w.b': np.ones(2)}, {'w.b': np.zeros((0, 2))})}
    trained = train(
      solver=bj.gradient(
        lambda p, b: ((p['layers'][0]['w.b'] - b[0]) ** 2).sum()
      ),
      init=lambda context: params,
      evaluate=lambda context, params, state: {
        'score': params['layers'][0]['w.b'][0]
      },
      select='score',
      name='other',
    )
    loaded = harness.load(tmp_path, name='other')
    assert list(loaded.params['layers'][0]) == ['w.b']
    same(loaded.best.score, trained.best.score)
    same(loaded.best.step, trained.best.step)
    loaded = harness.load(tmp_path, name='other', like=params)
    same(loaded.best.params, trained.best.params)
    same(loaded.params, trained.params)

  def test_state_with_keys_and_what_losses_return(self, train, tmp_path):
    def energy(params, batch):
      return jnp.sum((params - batch) ** 2), {'mean': batch.mean()}

    def solver(context=None):
      key = jax.random.key(0) if context is None else context.seed_key
      return optax.chain(
        bj.gradient(energy, outputs=lambda p: {'mean': jnp.zeros([])}),
        optax.add_noise(0.1, 0.5, key),
        optax.sgd(0.1),
      )

    trained = train(
      solver=solver,
      init=lambda context: jnp.ones(3),
      evaluate=None,
      steps=10,
    )
    one = jax.eval_shape(lambda: solver().init(jnp.ones(3)))
    loaded = harness.load(tmp_path, state=one)
    outputs = bj.outputs(loaded.state)
    assert np.all(jax.tree.leaves(outputs)[0] != 0)
    same(outputs, bj.outputs(trained.state))
    data = lambda tree: [
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
      for x in jax.tree.leaves(tree)
    ]
    same(data(loaded.state), data(trained.state))
    assert jax.tree.structure(loaded.state) == jax.tree.structure(trained.state)
    assert harness.load(tmp_path).state == ()
    with pytest.raises(harness.OtherRunError, match='nothing here'):
      harness.load(tmp_path, state=one[:1])

  def test_another_structure_is_told(self, train, tmp_path):
    train(steps=10)
    for like, message in (
      ({'upper': 0, 'low': 0}, r'upper\[3\] there, low here'),
      (bj.BilevelParams(0, np.zeros(4)), r'lower\[3\] there, lower\[4\] here'),
      (bj.BilevelParams(0, (0, 0)), r'lower\[3\] there, lower.0 here'),
      (bj.BilevelParams(0, ()), r'lower\[3\] there, nothing here'),
    ):
      with pytest.raises(harness.OtherRunError, match=message):
        harness.load(tmp_path, like=like)

  def test_the_one_before_a_damaged_one_and_nothing_is_moved(
    self, train, tmp_path
  ):
    train(steps=20)
    folder = tmp_path / 'run'
    (folder / 'checkpoints' / '20' / 'about' / 'metadata').write_text('{')
    (folder / 'settings.json').write_text('')
    with pytest.warns(RuntimeWarning) as caught:
      loaded = harness.load(tmp_path)
    assert (loaded.step, loaded.settings) == (10, {})
    assert 'step 20 is damaged' in str(caught[0].message)
    assert 'settings' in str(caught[1].message)
    assert not (folder / 'damaged').exists()

  def test_nothing_there_names_what_is(self, train, tmp_path):
    with pytest.raises(harness.MissingDataError, match='train there first'):
      harness.load(tmp_path)
    train(steps=10)
    with pytest.raises(harness.MissingDataError, match=r"'a' .* there are run"):
      harness.load(tmp_path, name='a')
    train(steps=10, name='b/tuning')
    with pytest.raises(harness.MissingDataError, match='are b/tuning, run'):
      harness.load(tmp_path, name='a')
    said = r"itself: .* name='run'"
    with pytest.raises(harness.MissingDataError, match=said):
      harness.load(tmp_path / 'run')
