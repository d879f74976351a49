"""Tests of the training loop and its compiled program."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.train import context as context_lib
from experiments.harness.train import program as program_lib


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), a, b)


class TestMembers:
  def test_crosses_grid_and_seeds_in_the_stated_order(self):
    seeds, hyper = harness.members([3, 5], rate=(0.1, 0.2), decay=(1.0, 2.0))
    rows = zip(hyper['rate'], hyper['decay'], seeds, strict=True)
    expected = list(itertools.product((0.1, 0.2), (1.0, 2.0), (3, 5)))
    np.testing.assert_allclose([list(map(float, r)) for r in rows], expected)

  def test_without_a_grid(self):
    assert harness.members(2) == ((0, 1), {})

  @pytest.mark.parametrize('seeds', [0, [], [-1], [2**32]])
  def test_seeds_out_of_range(self, seeds):
    with pytest.raises(ValueError, match='seeds are one or more of'):
      harness.members(seeds)


class TestResults:
  def test_follows_a_hand_written_loop(self):
    """Finds a lost step, a wrong key, a state that is not carried."""
    solver = bj.gradient(lambda p, b: jnp.sum((p - b) ** 2))
    solver = optax.chain(solver, optax.adam(0.1))

    def draw(context):
      return jax.random.uniform(context.key, (2,)) + context.step

    trained = harness.train(
      solver,
      harness.Task(lambda context: jnp.zeros(2), draw),
      harness.Training(6, chunk=3, seeds=[7], workdir=None),
    )
    seed_key = jax.random.key(7)
    params = jnp.zeros(2)
    state = solver.init(params)
    for step in range(6):
      context = context_lib.make_context(
        context_lib.Members(jnp.uint32(7), (), ()),
        context_lib.Shared(),
        'batch',
        step,
      )
      assert_trees_equal(
        jax.random.key_data(context.seed_key), jax.random.key_data(seed_key)
      )
      updates, state = solver.update(draw(context), state, params)
      params = bj.apply_updates(params, updates)
    assert_trees_close(trained.params[0], params)

  def test_keys_differ_by_step_stream_and_seed(self):
    """Finds batches that repeat, or that equal the initial draw."""
    keys = {
      tuple(
        jax.random.key_data(
          context_lib.make_context(
            context_lib.Members(jnp.uint32(seed), (), ()),
            context_lib.Shared(),
            stream,
            step,
          ).key
        ).tolist()
      )
      for seed in range(3)
      for step in range(5)
      for stream in ('init', 'batch', 'evaluate')
    }
    assert len(keys) == 3 * 5 * 3

  def test_seeds_together_equal_seeds_alone(self, train):
    together = train(seeds=3, workdir=None)
    for seed in range(3):
      alone = train(seeds=[seed], workdir=None)
      pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
      assert_trees_close(pick(together.params, seed), pick(alone.params, 0))
      for name, values in alone.history.items():
        np.testing.assert_allclose(
          together.history[name][:, seed], values[:, 0], 1e-4, 1e-6
        )

  def test_groups_equal_all_at_once(self, train):
    whole = train(workdir=None).params
    for at_once in (1, 2):
      assert_trees_close(train(workdir=None, at_once=at_once).params, whole)

  def test_one_at_once_takes_one_branch(self):
    """Under vmap a cond becomes a select, which would take both."""

    def count(at_once):
      branch = lambda c: jax.lax.cond(c.own > 0, jnp.sin, jnp.cos, c.own)
      program = program_lib.Program(
        optax.chain(bj.gradient(lambda p, b: p * b), optax.sgd(0.1)),
        lambda context: jnp.zeros(()),
        branch,
        None,
        count=2,
        at_once=at_once,
      )
      every = context_lib.Members(
        jnp.arange(2, dtype=jnp.uint32), jnp.arange(2.0), ()
      )
      shared = context_lib.Shared()
      carry = program.init(every, shared)
      chunk = functools.partial(program.chunk, length=2)
      return str(jax.make_jaxpr(chunk)(carry, every, shared)).count('cond[')

    assert (count(None), count(1)) == (0, 1)

  def test_chunk_length_does_not_matter(self, train):
    assert_trees_equal(
      train(workdir=None, chunk=40).params, train(workdir=None, chunk=4).params
    )

  def test_grid_members_equal_separate_runs(self, train, grid_solver):
    rates = (0.01, 0.1)
    seeds, hyper = harness.members(2, rate=rates)
    grid = train(solver=grid_solver, seeds=seeds, hyper=hyper, workdir=None)
    for i, rate in enumerate(rates):
      alone = train(solver=grid_solver(rate=rate), workdir=None)
      rows = slice(2 * i, 2 * i + 2)
      assert_trees_close(
        jax.tree.map(lambda x, rows=rows: x[rows], grid.params), alone.params
      )

  def test_own_data_and_shared_data_reach_every_function(self, train):
    own, data = jnp.array([1.0, 2.0]), {'w': jnp.array([10.0, 20.0, 30.0])}

    def metric(context, params, state):
      del params, state
      return {'sum': context.own + jnp.sum(context.data['w'])}

    trained = train(own=own, data=data, evaluate=metric, workdir=None)
    np.testing.assert_array_equal(trained.history['sum'][-1], [61.0, 62.0])
    data['w'].block_until_ready()  # Not donated: still there.

  def test_shared_data_is_not_copied_for_each_member(self):
    """Finds data mapped over members: its product would be batched."""
    loss = lambda params, batch: jnp.mean((batch @ params) ** 2)
    program = program_lib.Program(
      optax.chain(bj.gradient(loss), optax.sgd(0.1)),
      lambda context: jnp.ones(5),
      lambda context: context.data,
      None,
      count=3,
    )
    every = context_lib.Members(jnp.arange(3, dtype=jnp.uint32), (), ())
    shared = context_lib.Shared(jnp.ones((11, 5)))
    carry = program.init(every, shared)
    chunk = functools.partial(program.chunk, length=2)
    jaxpr = str(jax.make_jaxpr(chunk)(carry, every, shared))
    assert 'f32[11,5]' in jaxpr
    assert 'f32[3,11,5]' not in jaxpr

  def test_params_that_the_state_holds_too_can_be_donated(self):
    keeper = optax.GradientTransformationExtraArgs(
      lambda params: (params, None),  # None is no leaf.
      lambda u, state, params=None, **_: (u, state),
    )
    solver = optax.chain(
      bj.gradient(lambda p, b: jnp.sum(p**2)), keeper, optax.sgd(0.1)
    )
    trained = harness.train(
      solver,
      harness.Task(lambda context: jnp.ones(4)),
      harness.Training(4, chunk=2, seeds=2, workdir=None),
    )
    np.testing.assert_allclose(trained.params, 0.8**4, 1e-6)
    np.testing.assert_array_equal(trained.state[1][0], np.ones((2, 4)))

  def test_params_that_are_data_can_be_donated(self, train):
    """The data is needed again in the next chunk, and by the caller."""
    own = jnp.ones((2, 3))
    start = lambda context: bj.BilevelParams(context.own, context.own)
    batch = lambda context: context.own
    one = train(init=start, batch=batch, own=own, workdir=None)
    other = train(init=start, batch=batch, own=own, workdir=None)
    assert_trees_equal(one.params, other.params)

  def test_history_has_losses_counts_and_metrics(self, train):
    trained = train(steps=20)
    assert trained.steps.tolist() == [10, 20]
    assert set(trained.history) == {
      'loss/energy',
      'count/gradients/energy',
      'score',
    }
    assert trained.history['loss/energy'].shape == (2, 2)
    np.testing.assert_array_equal(
      trained.history['count/gradients/energy'], [[10, 10], [20, 20]]
    )
    assert trained.seconds > 0
    assert trained.compile_seconds > 0

  def test_losses_are_means_over_the_steps_of_a_chunk(self, train):
    """The last chunk is shorter; its mean is over its own steps."""
    each = train(steps=25, chunk=1, workdir=None)
    whole = train(steps=25, workdir=None)
    of = each.history['loss/energy']
    expected = [of[:10].mean(0), of[10:20].mean(0), of[20:].mean(0)]
    np.testing.assert_allclose(whole.history['loss/energy'], expected, 1e-5)

  def test_measures_of_every_step_join_the_losses(self, train, grid_solver):
    measure = lambda params, updates: {'moved': jnp.sum(updates.upper**2)}
    solver = harness.with_metrics(grid_solver(), measure)
    plain = train(steps=20, workdir=None)
    each = train(solver=solver, steps=20, chunk=1, workdir=None)
    whole = train(solver=solver, steps=20, workdir=None)
    assert_trees_close(whole.params, plain.params)
    # Adam's first step is its rate, in each of three coordinates.
    np.testing.assert_allclose(each.history['loss/moved'][0], 0.03, 1e-3)
    means = each.history['loss/moved'].reshape(2, 10, -1).mean(1)
    np.testing.assert_allclose(whole.history['loss/moved'], means, 1e-4)

  def test_a_solver_sees_the_key_of_its_seed(self, train):
    """Environments in a state differ by seed, and are those of a seed alone."""

    def solver(context):
      start = jax.random.uniform(context.key, (2,))

      def update(updates, state, params=None, **_):
        del params
        return updates, state + context.own

      environment = optax.GradientTransformationExtraArgs(
        lambda params: start, update
      )
      inner = bj.gradient(lambda p, b: jnp.sum((p.upper - b) ** 2))
      return optax.chain(inner, optax.sgd(0.1), environment)

    own = jnp.array([1.0, 2.0, 3.0])
    arguments = {'solver': solver, 'steps': 10, 'workdir': None}
    state = train(seeds=3, own=own, **arguments).state[-1]
    assert len(np.unique(np.asarray(state) % 1)) == 6
    alone = train(seeds=[1], own=own[1:2], **arguments).state[-1]
    np.testing.assert_array_equal(state[1], alone[0])

  def test_start_is_recorded_without_losses(self, train):
    trained = train(steps=10, record_start=True)
    assert trained.steps.tolist() == [0, 10]
    assert np.isnan(trained.history['loss/energy'][0]).all()
    assert np.isfinite(trained.history['score']).all()

  def test_best_params_are_those_of_the_best_record(self, train):
    trained = train(select='score', chunk=1, steps=30, seeds=3, workdir=None)
    scores = trained.history['score']
    np.testing.assert_array_equal(trained.best.score, scores.max(axis=0))
    best = scores.argmax(axis=0)
    np.testing.assert_array_equal(trained.best.step, trained.steps[best])
    assert (trained.best.step < 30).any()
    again = -jnp.sum((trained.best.params.upper - 0.5) ** 2, axis=1)
    np.testing.assert_allclose(again, trained.best.score, 1e-6)

  def test_stop_when_ends_the_run_and_a_second_call_does_not_go_on(self, train):
    enough = lambda history: len(history['score']) >= 2
    first = train(stop_when=enough)
    second = train(stop_when=enough)
    assert first.step == second.step == 20
    assert_trees_equal(first.params, second.params)


class TestLength:
  def test_steps_can_be_raised_later(self, train, tmp_path):
    first = train(steps=25)
    assert first.steps.tolist() == [10, 20, 25]
    longer = train(steps=40)
    # Back on multiples of the chunk.
    assert longer.steps.tolist() == [10, 20, 25, 30, 40]
    whole = train(steps=40, workdir=None)
    assert_trees_equal(longer.params, whole.params)
    with pytest.raises(
      harness.OtherRunError, match=r'run of 40 steps, more than steps=30\.'
    ):
      train(steps=30)

  def test_the_first_chunk_is_saved(self, train, tmp_path):
    train(save_seconds=1e9, steps=30)
    folder = tmp_path / 'run' / 'checkpoints'
    assert sorted(path.name for path in folder.iterdir()) == ['10', '30']


class TestCompilation:
  def test_one_trace_whatever_the_number_of_chunks(self, train, tmp_path):
    traces = []

    def counted(context):
      traces.append(context)
      return jax.random.uniform(context.key, (3,))

    train(batch=counted, steps=10, workdir=tmp_path / 'one')
    one = len(traces)
    assert one == 2  # One for the digest of the program.
    enough = lambda history: len(history['score']) >= 2
    train(batch=counted, steps=50, workdir=tmp_path / 'many', stop_when=enough)
    assert len(traces) == 2 * one
    # Resumed: compiled once more, for three chunks.
    trained = train(batch=counted, steps=50, workdir=tmp_path / 'many')
    assert trained.step == 50
    assert len(traces) == 3 * one
    # A shorter last chunk is one program more. Without a folder, no digest.
    train(batch=counted, steps=45, chunk=10, workdir=None)
    assert len(traces) == 3 * one + 2
    # Done: nothing to compile.
    train(batch=counted, steps=50, workdir=tmp_path / 'many')
    assert len(traces) == 3 * one + 3

  def test_the_same_functions_share_their_program(
    self, train, grid_solver, tmp_path
  ):
    """Runs that differ in numbers, arrays, folders and lengths."""
    traces = []

    def counted(context):
      traces.append(context)
      return jax.random.uniform(context.key, (3,))

    def run(rate, name, seeds=(0, 1), **arguments):
      return train(
        solver=grid_solver,
        batch=counted,
        hyper={'rate': jnp.full(len(seeds), rate)},
        seeds=seeds,
        workdir=tmp_path / name,
        **arguments,
      )

    one = run(0.1, 'one', steps=20)
    count = len(traces)
    other = run(0.2, 'other', seeds=(3, 4), steps=30)
    enough = lambda history: len(history['score']) >= 1
    run(0.1, 'one', steps=40, stop_when=enough)
    again = run(0.1, 'one', steps=40)  # Resumed.
    assert len(traces) == count
    assert again.compile_seconds == one.compile_seconds > 0
    assert other.compile_seconds == 0
    # Other functions with the same names and shapes are another program.
    alone = lambda context: 2 * jax.random.uniform(context.key, (3,))
    doubled = train(batch=alone, workdir=None)
    plain = train(workdir=None)
    assert (doubled.params.lower != plain.params.lower).all()
    # So are other numbers of members.
    run(0.1, 'three', seeds=(0, 1, 2))
    assert len(traces) == 2 * count
    shared = run(0.2, 'shared', seeds=(3, 4), steps=30)
    separate = train(
      solver=lambda context: grid_solver(context),
      hyper={'rate': jnp.full(2, 0.2)},
      seeds=(3, 4),
      steps=30,
      workdir=None,
    )
    assert_trees_equal(shared.params, separate.params)

  def test_a_solver_that_cannot_be_hashed_has_its_own_program(self, train):
    class Solver:
      __hash__ = None

      def __init__(self, solver):
        self.init, self.update = solver

    solver = optax.chain(
      bj.gradient(lambda p, batch: jnp.sum((p.lower - batch) ** 2)),
      optax.sgd(0.1),
    )
    assert_trees_equal(
      train(solver=Solver(solver), workdir=None).params,
      train(solver=solver, workdir=None).params,
    )


class TestNonfinite:
  """A batch that is NaN at step 7, for members whose `own` is positive."""

  @staticmethod
  def poisoned(context):
    bad = (context.step == 7) & (context.own > 0)
    return jnp.where(bad, jnp.nan, jax.random.uniform(context.key, (3,)))

  def run(self, train, own, **arguments):
    return train(
      batch=self.poisoned, own=jnp.array(own), seeds=len(own), **arguments
    )

  def test_one_seed_freezes_at_its_last_finite_params(self, train):
    with pytest.warns(RuntimeWarning) as caught:
      trained = self.run(train, [0.0, 1.0, 0.0], select='score')
    assert len(caught) == 1
    message = str(caught[0].message)
    assert 'seed 1' in message
    assert 'step 7' in message
    assert 'loss/energy, lower became' in message
    assert 'smaller step size' in message

    (stop,) = trained.stopped
    assert (stop.member, stop.seed, stop.step) == (1, 1, 7)
    # The upper variable's gradient has no part in the batch.
    assert stop.sequences == ('loss/energy', 'lower')

    before = self.run(train, [0.0] * 3, steps=7, chunk=7, workdir=None)
    row = lambda tree: jax.tree.map(lambda x: x[1], tree)
    assert_trees_equal(row(trained.params), row(before.params))
    assert_trees_equal(row(trained.state), row(before.state))
    assert trained.best.step[1] == 0  # It had stopped before any record.

  def test_others_do_not_notice_and_metrics_are_null(self, train, tmp_path):
    with pytest.warns(RuntimeWarning, match='seed 1'):
      trained = self.run(train, [0.0, 1.0])
    healthy = self.run(train, [0.0, 0.0], workdir=None)
    for name, values in trained.history.items():
      np.testing.assert_array_equal(values[:, 0], healthy.history[name][:, 0])
      assert np.isnan(values[:, 1]).all()
    line = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1]
    assert json.loads(line)['score'][1] is None

  def test_a_resumed_run_still_knows_and_does_not_warn_again(self, train):
    with pytest.warns(RuntimeWarning, match='seed 1'):
      first = self.run(train, [0.0, 1.0], stop_when=lambda h: True)
    second = self.run(train, [0.0, 1.0])
    assert second.step == 40
    assert second.stopped == first.stopped

  def test_all_seeds_end_the_run_after_saving(self, train, tmp_path):
    with (
      pytest.warns(RuntimeWarning),
      pytest.raises(FloatingPointError, match=r'all 2 seeds .* step 7 '),
    ):
      self.run(train, [1.0, 1.0])
    assert (tmp_path / 'run' / 'checkpoints' / '10').is_dir()
    assert len(harness.read_records(tmp_path / 'run' / 'metrics.jsonl')) == 1
    with pytest.raises(harness.AllStoppedError, match='all 2 seeds'):
      self.run(train, [1.0, 1.0])

  def test_a_seed_alone_keeps_the_checkpoint_before(self, train, tmp_path):
    """It is not frozen, which would take a second copy of all it changes."""
    for chunk, kept in ((5, 5), (10, None)):
      where = 'The checkpoint of step 5 is in' if kept else 'step 7'
      for _ in range(2):  # The same command says the same.
        with (
          pytest.warns(RuntimeWarning, match='stopped at step 7'),
          pytest.raises(harness.AllStoppedError, match=where) as error,
        ):
          self.run(train, [1.0], chunk=chunk, workdir=tmp_path / str(chunk))
        assert ('checkpoint' in str(error.value)) == (kept is not None)
      folder = tmp_path / str(chunk) / 'run'
      steps = [p.name for p in (folder / 'checkpoints').iterdir()]
      assert steps == ([] if kept is None else [str(kept)])
      last = harness.read_records(folder / 'metrics.jsonl')[-1]
      assert last['score'] == [None]

  def test_infinite_params_under_finite_losses_count(self):
    """Finds a check of losses alone."""
    solver = optax.chain(
      bj.gradient(lambda p, b: p['a'] + 0 * p['b']), optax.scale(-3e38)
    )
    start = lambda context: {'a': context.own, 'b': jnp.zeros(())}
    with pytest.warns(RuntimeWarning, match='params became non-finite'):
      trained = harness.train(
        solver,
        harness.Task(start, own=jnp.array([0.0, -3e38])),
        harness.Training(1, chunk=1, seeds=2, workdir=None),
      )
    assert trained.stopped[0].sequences == ('params',)
    np.testing.assert_allclose(trained.params['a'], [-3e38, -3e38])


class TestArguments:
  def test_unknown_select_names_the_metrics(self, train):
    with pytest.raises(
      ValueError, match=r"'scores' is unknown.*loss/energy.*score"
    ):
      train(select='scores')

  def test_own_needs_the_axis_of_members(self, train):
    with pytest.raises(
      ValueError, match=r"own\['a'\] needs a leading axis of 2"
    ):
      train(own={'a': jnp.zeros((3, 2))})

  def test_metrics_are_scalars_in_a_dict_of_new_names(self, train):
    with pytest.raises(ValueError, match=r"'v' is a scalar .* \(3,\)"):
      train(evaluate=lambda c, p, s: {'v': p.upper})
    with pytest.raises(TypeError, match='dict'):
      train(evaluate=lambda c, p, s: jnp.sum(p.upper))
    with pytest.raises(ValueError, match='loss/energy'):
      train(evaluate=lambda c, p, s: {'loss/energy': jnp.sum(p.upper)})

  def test_other_arrays_in_the_same_folder_are_refused(self, train):
    own, data = jnp.ones((2, 3)), {'rows': np.zeros((4, 2))}
    arguments = {'steps': 10, 'frozen': {'w': np.ones(5)}}
    train(own=own, data=data, **arguments)
    train(own=own, data=data, **arguments)
    changed = {'rows': np.ones((4, 2))}
    with pytest.raises(
      harness.OtherRunError,
      match=r'changed: data rows\. Give',
    ):
      train(own=own, data=changed, **arguments)
    with pytest.raises(harness.OtherRunError, match='changed: '):
      train(own=2 * own, data=data, **arguments)
    with pytest.raises(harness.OtherRunError, match='frozen weights'):
      train(own=own, data=data, steps=10, frozen={'w': np.zeros(5)})

  def test_other_settings_in_the_same_folder_are_refused(self, train):
    train(steps=10, settings={'rate': 0.1, 'sizes': (1, 2)})
    train(steps=10, settings={'rate': 0.1, 'sizes': (1, 2)})
    with pytest.raises(
      harness.OtherRunError, match=r'rate: 0\.1 -> 0\.2\.'
    ) as e:
      train(steps=10, settings={'rate': 0.2, 'sizes': (1, 2)})
    assert 'another --workdir' in str(e.value)
    with pytest.raises(ValueError, match=r'seeds: \[0, 1\] -> \[0, 1, 2\]'):
      train(steps=10, settings={'rate': 0.1, 'sizes': (1, 2)}, seeds=3)
    assert train(steps=10, settings={'rate': 0.1, 'sizes': (1, 2)}).step == 10


def test_a_run_that_all_stopped_keeps_what_it_reached(tmp_path):
  burst = bj.gradient(lambda x, batch: jnp.where(batch < 3, x, jnp.nan))
  with (
    pytest.warns(RuntimeWarning, match='stopped at step 3'),
    pytest.raises(harness.AllStoppedError) as found,
  ):
    harness.train(
      optax.chain(burst, optax.sgd(0.1)),
      harness.Task(
        lambda context: jnp.float32(1.0), lambda context: context.step
      ),
      harness.Training(6, chunk=1, seeds=2, workdir=tmp_path),
      harness.Measure(lambda context, params, state: {'x': params}),
    )
  trained = found.value.trained
  reached = trained.history['x'][:3, 0]
  np.testing.assert_allclose(reached, [0.9, 0.8, 0.7], rtol=1e-6)
  assert np.isnan(trained.history['x'][-1]).all()


def test_a_finished_run_says_that_nothing_is_run(tmp_path, capsys):
  def run():
    return harness.train(
      optax.chain(bj.gradient(lambda x, batch: x), optax.sgd(0.1)),
      harness.Task(lambda context: jnp.float32(1.0)),
      harness.Training(2, chunk=2, seeds=1, workdir=tmp_path),
    )

  run()
  assert 'finished before' not in capsys.readouterr().err
  run()
  assert 'run: finished before, nothing is run' in capsys.readouterr().err
