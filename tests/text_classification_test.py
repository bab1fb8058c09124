"""Tests of telling the label of a text, as a task of the harness."""

import collections
import json
import pathlib

from absl.testing import parameterized
import encoders
import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
import tokenizer_folders

from bernoulli_lora_jax import cli
from bernoulli_lora_jax import matrices as matrices_lib
from bernoulli_lora_jax.studies import audit_run
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.tasks import text_classification
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import config_files
from bernoulli_lora_jax.training import evaluated
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import sweep

WORDS = 'hello there once upon time tokenizer world trained answer fine'.split()
LABELS = ('tools', 'games', 'mail')


def write_model(folder, name='bert', make=tokenizer_folders.bert, **changes):
  """Writes an encoder of random weights with a tokenizer; returns the folder."""
  folder = encoders.write(
      folder, name, vocab_size=512, num_hidden_layers=2, **changes
  )
  return tokenizer_folders.write(folder, make())


def write_texts(path, count=60, seed=0, extra=(), shift=0):
  """Writes texts whose first words tell the label; returns the file."""
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(count):
    label = int(rng.integers(3))
    size = int(rng.integers(0, 3)) if i % 4 else int(rng.integers(8, 20))
    words = [*3 * [WORDS[label]], *rng.choice(WORDS, size), f'{seed}{i}']
    name = LABELS[(label + shift) % 3]
    rows.append({'text': ' '.join(words), 'label': name})
  lines = [json.dumps(row) for row in [*rows, *extra]]
  pathlib.Path(path).write_text('\n'.join(lines))
  return str(path)


class Folder(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _folder(self, tmp_path, monkeypatch):
    self.tmp = tmp_path
    self.monkeypatch = monkeypatch

  def write(self, *records):
    path = self.tmp / 'rows.jsonl'
    lines = [x if isinstance(x, str) else json.dumps(x) for x in records]
    path.write_text('\n'.join(lines))
    return str(path)

  def files(self):
    """Writes a model, texts to train on and texts to test on."""
    if not (self.tmp / 'model').exists():
      write_model(self.tmp / 'model')
      write_texts(self.tmp / 'train.jsonl')
      write_texts(self.tmp / 'test.jsonl', 30, seed=1)
    return {
        'model': str(self.tmp / 'model'),
        'data': str(self.tmp / 'train.jsonl'),
        'test_data': str(self.tmp / 'test.jsonl'),
        'max_length': 32,
        'eval_fraction': 0.25,
        'eval_batch_size': 7,
    }

  def make_task(self, **more):
    return text_classification.make_task(
        **{**self.files(), 'batch_size': 4, **more}
    )

  def make_config(self, mode='adapter', name='lora', **overrides):
    config = base_config.get_config()
    config.task.name = 'bernoulli_lora_jax.tasks.text_classification:make_task'
    config.task.kwargs = config_dict.ConfigDict(self.files())
    config.task.batch_size = 4
    config.method.mode, config.method.name = mode, name
    config.method.rank = 2
    config.method.select = 'query|value'
    config.method.others = '^classifier'
    config.method.sketch = 'coordinate'  # A QR takes long to compile.
    config.method.period = 3
    config.method.optimizer = 'adam'
    config.method.learning_rate = 0.01
    config.training.num_steps, config.training.num_evals = 8, 2
    config.training.patience = 2
    config.training.progress = False
    flat = {k.replace('__', '.'): v for k, v in overrides.items()}
    return experiment.apply_overrides(config, flat)


class ConfigsTest(Folder):

  def test_columns_come_back(self):
    config = config_files.load('glue:mrpc')
    (self.tmp / 'config.json').write_text(config.to_json_best_effort())
    again = experiment.read_config(self.tmp)
    self.assertEqual(again.task.kwargs.to_dict(), config.task.kwargs.to_dict())
    columns = {'sentence1': 'text', 'sentence2': 'pair'}
    self.assertEqual(again.task.kwargs.columns.to_dict(), columns)

  @pytest.mark.slow
  def test_glue(self):
    """RoBERTa on a dataset of GLUE's columns, as `save_to_disk` writes it."""
    datasets = pytest.importorskip('datasets')
    rows = [(f'{WORDS[i % 3]} {i}', WORDS[i % 4], i % 2) for i in range(40)]
    first, second, label = map(list, zip(*rows, strict=True))
    columns = {'sentence1': first, 'sentence2': second, 'label': label}
    kinds = datasets.ClassLabel(names=['entailment', 'not_entailment'])
    one = datasets.Dataset.from_dict({**columns, 'idx': list(range(40))})
    one = one.cast_column('label', kinds)
    folder = self.tmp / 'rte'
    datasets.DatasetDict(
        {'train': one, 'validation': one.select(range(10))}
    ).save_to_disk(str(folder))
    pad = tokenizer_folders.roberta().token_to_id('<pad>')
    model = write_model(
        self.tmp / 'model',
        'roberta',
        tokenizer_folders.roberta,
        pad_token_id=pad,
    )
    config = config_files.load('glue:rte,smoke')
    self.assertEqual(config.task.kwargs.data, 'nyu-mll/glue/rte:train')
    config = experiment.apply_overrides(
        config,
        {
            'task.kwargs.model': str(model),
            'task.kwargs.data': f'{folder}:train',
            'task.kwargs.test_data': f'{folder}:validation',
            'task.kwargs.max_length': 24,
            'task.batch_size': 8,
            'method.sketch': 'coordinate',
            'training.progress': False,
        },
    )
    summary = experiment.train(config, self.tmp / 'run')
    self.assertEqual(summary['step'], 4)
    self.assertIn('test_macro_f1', summary)
    self.assertLen(experiment.selection(config, arguments.make_task(config)), 6)

  @parameterized.parameters(('parameters', 10), ('rank', 8), ('flops', 9))
  def test_debian_sections(self, equal, num):
    """The runs of each table, and what their methods train."""
    self.files()
    self.monkeypatch.setenv('BERNOULLI_LORA_MINILM', str(self.tmp / 'model'))
    (self.tmp / 'debian_sections').symlink_to(self.tmp)
    self.monkeypatch.setenv('BERNOULLI_LORA_DATA', str(self.tmp))
    config = config_files.load(f'debian_sections:{equal},smoke')
    grid = sweep.load(str(config_files.find('debian_sections')), equal)
    self.assertLen(grid, num * 4 * 5)
    task = arguments.make_task(config)
    trained = {}
    for overrides in grid[::20]:
      run = experiment.apply_overrides(config, overrides)
      name = run.method.name, run.method.mode
      trained[name] = experiment.trained_parameters(run, task) - 3 * 33
    self.assertLen(trained, num)
    self.assertEqual(trained.get(('probe', 'gradient'), 0), 0)
    factors = {
        k: v for k, v in trained.items() if k[0] not in ('full', 'probe')
    }
    # Query and value of two layers of width 32.
    numbers = {
        'parameters': {4 * 8 * 32},
        'rank': {4 * 32, 4 * 2 * 32, 4 * 8 * 32, 4 * 16 * 32},
        'flops': {4 * 8 * 32, 4 * 16 * 32},
    }
    self.assertEqual(set(factors.values()), numbers[equal])

  def test_equal_flops_are_of_all_weights(self):
    config = self.make_config(
        'gradient', 'full', training__num_full_passes=2.0,
        training__num_steps=0, method__others='', method__train_others=True,
    )  # fmt: skip
    task = arguments.make_task(config)
    steps = experiment.make_settings(config, task).num_steps
    self.assertAlmostEqual(steps, 2 * task.num_samples / 4, delta=2)
    probe = self.make_config(
        'gradient', 'probe', training__num_full_passes=2.0,
        training__num_steps=0,
    )  # fmt: skip
    # Of three products a matrix it has one, and the head's.
    more = experiment.make_settings(probe, task).num_steps
    spent = [
        num * experiment.step_flops(c, task)
        for num, c in ((steps, config), (more, probe))
    ]
    self.assertGreater(more, 2 * steps)
    self.assertAlmostEqual(spent[1] / spent[0], 1, delta=0.05)  # Whole steps.


class ReadTest(Folder):

  def test_records(self):
    path = self.write(
        {'sentence': 'one', 'other': 'two', 'kind': 3}, '',
        {'sentence': 'three', 'other': 'four', 'kind': 'x'},
    )  # fmt: skip
    self.monkeypatch.setenv('A_FOLDER', str(self.tmp))
    columns = {'sentence': 'text', 'other': 'pair', 'kind': 'label'}
    found = text_classification.read('$A_FOLDER/rows.jsonl', columns)
    self.assertEqual(found.texts, ['one', 'three'])
    self.assertEqual(found.pairs, ['two', 'four'])
    self.assertEqual(found.labels, ['3', 'x'])
    self.assertEqual(found.places, ['line 1', 'line 3'])
    self.assertEqual(found, text_classification.read(path, columns))

  def test_bad_lines_are_named(self):
    path = self.write(
        {'text': 'a', 'label': 'x'}, '{"text": ', {'text': ' ', 'label': 'x'},
        {'text': 'b', 'label': -1}, {'text': 'c'}, {'text': 'd', 'label': True},
    )  # fmt: skip
    with self.assertRaises(ValueError) as raised:
      text_classification.read(path)
    message = str(raised.exception)
    self.assertIn(f'Expected good documents in {path}, got 5 bad of 6', message)
    self.assertIn('line 2 (no JSON', message)
    self.assertIn("line 3 ('text' is empty)", message)
    self.assertIn(
        "line 4 ('label' is no text and no whole number >= 0 but -1), and 2 more",
        message,
    )
    with pytest.warns(UserWarning, match='5 bad of 6'):
      found = text_classification.read(path, skip_bad=True)
    self.assertEqual(found.texts, ['a'])

  def test_pairs_in_some_are_refused(self):
    path = self.write(
        {'text': 'a', 'pair': 'b', 'label': 'x'}, {'text': 'a', 'label': 'x'}
    )
    with self.assertRaisesRegex(ValueError, "'pair' in all or none .* line 2"):
      text_classification.read(path)

  def test_variables_that_are_not_set(self):
    with self.assertRaisesRegex(ValueError, 'variables of .* that are set'):
      text_classification.read('$NOT_SET_ANYWHERE/rows.jsonl')


class LengthsTest(parameterized.TestCase):

  @parameterized.parameters(
      ([3, 8, 9, 30], 1, 64, (32,)),
      ([3, 8, 9, 9, 30], 2, 64, (16, 32)),
      ([3, 8, 9, 30], 3, 64, (8, 16, 32)),
      ([3] * 9 + [20], 2, 64, (8, 24)),
      ([3, 20, 20], 2, 20, (8, 20)),
      ([3, 4], 3, 64, (8,)),
  )
  def test_lengths(self, sizes, num, max_length, expected):
    found = text_classification.lengths_of(np.array(sizes), num, max_length)
    self.assertEqual(found, expected)

  def test_long_texts_have_few_candidates(self):
    sizes = np.arange(1, 8193)
    found = text_classification.lengths_of(sizes, 2, 8192)
    self.assertEqual(found, (4096, 8192))

  @parameterized.parameters(1, 3, 4, 7, 15)
  def test_buckets(self, batch_size):
    bucket = np.array([2] * 3 + [1] * 5 + [0] * 7)
    found = text_classification.buckets(bucket, batch_size)
    # One after another, from the first row to the last.
    self.assertEqual(
        [a for _, a, _ in found], [0, *(c for *_, c in found[:-1])]
    )
    self.assertEqual(found[-1][2], len(bucket))
    for number, first, end in found[:-1]:
      self.assertEqual((end - first) % batch_size, 0)
      self.assertEqual(bucket[first], number)
    self.assertGreaterEqual(found[-1][2] - found[-1][1], batch_size)


class TaskTest(Folder):

  def test_an_epoch_passes_through_all_rows(self):
    task = self.make_task(num_lengths=2)
    data, size = task.data, task.num_samples
    lengths = [8, 32]  # Of the texts above.
    per_epoch = size // 4
    draw = jax.jit(task.batch)
    seen = {}
    for seed in (0, 1):
      batches = [
          draw(data, jax.random.key(seed), jnp.int32(i))
          for i in range(2 * per_epoch)
      ]
      for epoch in range(2):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        rows = np.concatenate([b['index'] for b in mine])
        self.assertLen(set(rows.tolist()), 4 * per_epoch)
        seen[seed, epoch] = (
            [int(b['bucket'][0]) for b in mine],
            rows.tolist(),
        )
      for b in batches:
        self.assertLen(set(np.asarray(b['bucket']).tolist()), 1)
        self.assertLessEqual(b['lengths'].max(), lengths[int(b['bucket'][0])])
    self.assertEqual({0, 1}, set(seen[0, 0][0]))
    # Lengths follow one another alike in all runs, rows do not.
    self.assertEqual(seen[0, 0][0], seen[1, 0][0])
    self.assertNotEqual(seen[0, 0][1], seen[1, 0][1])
    self.assertNotEqual(seen[0, 0][0], seen[0, 1][0])

  def test_the_length_of_a_row_changes_nothing(self):
    params = self.make_task().init(jax.random.key(0))
    found = []
    for num in (1, 3):
      task = self.make_task(num_lengths=num)
      short = jax.tree.map(lambda x: x[-3:], task.data['test'])
      rows = task.data['test'], short
      found.append([jax.jit(task.outputs)(params, x) for x in rows])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
      # Sums over other lengths are rounded otherwise.
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

  def test_runs_that_step_together_take_one_branch(self):
    task = self.make_task()
    params = jax.eval_shape(task.init, jax.random.key(0))

    def loss(params, key, step):
      return task.loss(params, task.batch(task.data, key, step), None)[0]

    def branches(f, *args):
      return str(jax.make_jaxpr(f)(*args)).count(' cond[')

    key, keys = jax.random.key(0), jax.random.split(jax.random.key(0), 2)
    alone = branches(loss, params, key, 0)
    self.assertEqual(alone, 2)  # Which rows are dealt, and the length.
    together = jax.vmap(loss, (None, 0, None))
    self.assertEqual(branches(together, params, keys, 0), alone)

  def test_metrics_are_those_of_sklearn(self):
    extra = [{'text': 'world', 'label': x} for x in ('new', 'mail', 'newer')]
    self.files()
    path = write_texts(self.tmp / 'more.jsonl', 20, seed=2, extra=extra)
    with pytest.warns(
        UserWarning, match=r'told wrong: 2 of 23: line 21 \(.new'
    ):
      task = self.make_task(test_data=path, unseen='count')
    params = task.init(jax.random.key(3))
    rows, names = task.data['test'], sorted(LABELS)
    logits = np.asarray(task.outputs(params, rows))
    told, y = logits.argmax(1), np.asarray(rows['y'])
    self.assertEqual(int((y == 3).sum()), 2)
    found = jax.jit(task.metrics, static_argnums=2)(params, task.data, 'test')
    np.testing.assert_allclose(found['accuracy'], np.mean(told == y), rtol=1e-6)
    f1 = sklearn_metrics.f1_score(
        y, told, average=None, labels=range(3), zero_division=0
    )
    there = sorted(set(y[y < 3]) | set(told))
    np.testing.assert_allclose(found['macro_f1'], f1[there].mean(), rtol=1e-6)
    log_probs = jax.nn.log_softmax(logits)
    known = np.flatnonzero(y < 3)
    expected = -np.mean(np.asarray(log_probs)[known, y[known]])
    np.testing.assert_allclose(found['loss'], expected, rtol=1e-5)
    counts = collections.Counter(names[i] for i in y[known])
    with open(path) as file:
      written = [json.loads(line)['label'] for line in file]
    self.assertEqual(
        counts, collections.Counter(x for x in written if x in names)
    )

  def test_macro_f1_leaves_out_labels_that_are_nowhere(self):
    counts = [jnp.array(x) for x in ([2, 0, 0], [2, 1, 0], [3, 0, 0])]
    found = text_classification.macro_f1(*counts)
    np.testing.assert_allclose(found, (4 / 5 + 0) / 2, rtol=1e-6)

  def test_training_is_evaluated_on_some_texts(self):
    task = self.make_task(train_rows=10)
    params = task.init(jax.random.key(0))
    step = -(-task.num_samples // 10)
    rows = jax.tree.map(lambda x: x[::step], task.data['train'])
    expected = task.loss(params, rows, None)[0]
    found = task.evaluate(params, task.data, 'train')['loss']
    np.testing.assert_allclose(found, expected, rtol=1e-5)

  def test_splits(self):
    path = self.write(
        *({'text': f'text {i % 50}', 'label': i % 3} for i in range(150))
    )
    found = {}
    for seed in (0, 1):
      whole = text_classification.read(path)
      splits = text_classification._splits(whole, 0.3, seed, path)
      held = set(splits['validation'].texts)
      self.assertFalse(held & set(splits['train'].texts))
      self.assertLen(splits['train'].texts + splits['validation'].texts, 150)
      self.assertBetween(len(held), 7, 24)  # 15, 2.6 standard deviations.
      found[seed] = held
    self.assertNotEqual(found[0], found[1])

  def test_unseen_labels_are_named(self):
    extra = [{'text': 'world', 'label': 'new'}]
    path = write_texts(self.tmp / 'more.jsonl', 5, seed=2, extra=extra)
    with self.assertRaisesRegex(
        ValueError, r"got others in 1 of 6: line 6 \('new'\): correct them"
    ):
      self.make_task(test_data=path)
    with self.assertRaisesRegex(ValueError, 'line 6'):
      self.make_task(eval_data=path)

  def test_labels_that_are_all_held_out(self):
    path = self.write(
        *({'text': f'{i}', 'label': i % 2} for i in range(20)),
        *({'text': f'x {i}', 'label': 2 if i == 9 else 0} for i in range(30)),
    )
    seed = next(
        s
        for s in range(100)
        if text_classification._hash(text_classification.read(path), 29, s)
        < 0.2
    )
    with pytest.warns(UserWarning, match=r"labels \['2'\] are held out"):
      task = self.make_task(
          data=path, test_data='', eval_fraction=0.2, split_seed=seed
      )
    self.assertEqual(task.init(jax.random.key(0))['classifier']['bias'].size, 3)

  @parameterized.parameters(
      ({'max_length': 64}, 'max_length <= 40'),
      ({'batch_size': 61}, r'task.batch_size in \[1, '),
      ({'eval_fraction': 1.0}, 'eval_fraction in'),
      ({'unseen': 'skip'}, 'unseen'),
      ({'sampling': 'full'}, 'sampling'),
      ({'num_lengths': 0}, 'num_lengths >= 1'),
      ({'head': 'round'}, 'head'),
      ({'data': 'nowhere.jsonl'}, 'a file, a folder'),
  )
  def test_rejects(self, more, message):
    with self.assertRaisesRegex((ValueError, OSError), message):
      self.make_task(**more)

  def test_rejects_one_label_and_decoders(self):
    one = self.write({'text': 'a', 'label': 'x'}, {'text': 'b', 'label': 'x'})
    with self.assertRaisesRegex(ValueError, 'two labels or more'):
      self.make_task(data=one)

  def test_preview(self):
    text = self.make_task(num_lengths=2).preview
    self.assertRegex(text, r'texts: \d+ train, \d+ validation, 30 test')
    self.assertRegex(text, r'3 labels: \w+ \d+, \w+ \d+, \w+ \d+\n')
    self.assertRegex(text, r'rows: \d+ of 8, \d+ of 32; \d+% is padding')

  def test_replacement(self):
    task = self.make_task(sampling='replacement')
    self.assertEqual(task.sampling, 'replacement')
    batch = task.batch(task.data, jax.random.key(0), 0)
    value, _ = task.loss(task.init(jax.random.key(0)), batch, None)
    self.assertTrue(np.isfinite(value))

  def test_pairs_have_types(self):
    rows = [
        {'text': 'hello there', 'pair': 'once upon', 'label': i % 2}
        for i in range(12)
    ]
    task = self.make_task(data=self.write(*rows), test_data='', eval_fraction=0)
    self.assertEqual(int(task.data['train']['types'].max()), 1)
    self.assertNotIn('validation', task.data)


class TrainTest(Folder):

  def train(self, name, config):
    return experiment.train(config, self.tmp / name)

  def weights(self, name, config):
    """Returns the weights that a run has kept, by path."""
    program = experiment.make_program(config)
    start = program.start(jax.random.key(config.seed))
    with loop.open_checkpoints(program, self.tmp / name, start) as saver:
      state, _, _ = loop.restore(saver, program, start)
    return matrices_lib.named_leaves(program.params(state))

  @parameterized.parameters(
      ('probe', False, 3 * 33),  # 3 labels of width 32.
      ('full', False, 2 * 2 * 32 * 32 + 3 * 33),
      ('bernoulli', False, 2 * 2 * 2 * 32 + 3 * 33),
      ('full', True, None),
  )
  def test_what_moves_in_gradient_mode(self, name, train_others, num):
    config = self.make_config('gradient', name)
    config.method.train_others = train_others
    task = arguments.make_task(config)
    params = task_lib.shapes(task)
    method = experiment.make_method(config, task)
    marks = matrices_lib.named_leaves(method.trained(params))
    moving = {path for path, moves in marks.items() if moves}
    expected = {'classifier/kernel', 'classifier/bias'}
    if name != 'probe':
      names = [f'layers/attention/self/{x}/kernel' for x in ('query', 'value')]
      expected |= set(names)
    if train_others:
      expected = set(marks)
      num = sum(x.size for x in jax.tree.leaves(params))
    self.assertEqual(moving, expected)
    self.assertEqual(experiment.trained_parameters(config, task), num)

  def test_a_probe_needs_others(self):
    config = self.make_config('gradient', 'probe', method__others='')
    with self.assertRaisesRegex(ValueError, 'Expected method.others with'):
      experiment.make_program(config)

  @pytest.mark.slow
  def test_a_probe_moves_the_head_alone(self):
    config = self.make_config('gradient', 'probe')
    self.train('probe', config)
    before = matrices_lib.named_leaves(arguments.make_task(config).weights)
    after = self.weights('probe', config)
    for path, leaf in before.items():
      np.testing.assert_array_equal(leaf, after[path], err_msg=path)
    self.assertGreater(float(jnp.abs(after['classifier/bias']).max()), 0.01)

  @parameterized.parameters(
      ('gradient', 'full'), ('adapter', 'lora'), ('adapter', 'asymmetric_left'),
      ('adapter', 'asymmetric_right'), ('adapter', 'cola'),
      ('adapter', 'rac_left'), ('adapter', 'rac_right'),
      ('adapter', 'bernoulli'), ('sketched', 'bernoulli'),
  )  # fmt: skip
  @pytest.mark.slow
  def test_methods_learn(self, mode, name):
    # What trains both factors wants a smaller one, as RATES of debian_sections.
    rate = {'full': 0.003, 'lora': 0.01, 'cola': 0.01}.get(name, 0.02)
    config = self.make_config(
        mode, name, training__num_steps=120, training__patience=4,
        training__num_evals=4, method__period=30, method__learning_rate=rate,
        method__select='', method__rank=8,
    )  # fmt: skip
    summary = self.train(f'{mode}_{name}', config)
    # The first words tell the label; a third is by chance.
    self.assertGreater(summary['test_accuracy'], 0.8)

  @pytest.mark.slow
  def test_resumes_to_the_bit(self):
    config = self.make_config(
        'adapter', 'bernoulli', training__checkpoint_every=2,
        training__steps_per_dispatch=2, training__num_steps=8,
    )  # fmt: skip
    whole = self.train('whole', config)
    program = experiment.make_program(config)
    record = experiment.run_of(config, self.tmp / 'halves', program)
    calls = []

    def stop(*args):
      calls.append(args)
      if len(calls) == 3:
        raise KeyboardInterrupt
      return write(*args)

    write = loop.metrics_log.MetricsLog.write
    with self.monkeypatch.context() as patch:
      patch.setattr(loop.metrics_log.MetricsLog, 'write', stop)
      with self.assertRaises(KeyboardInterrupt):
        loop.train(*record)
    halves = loop.train(
        *experiment.run_of(config, self.tmp / 'halves', program)
    )
    same = lambda summary: {
        k: v for k, v in summary.items() if 'seconds' not in k
    }
    self.assertEqual(same(whole), same(halves))

  def test_evaluated_on_other_data(self):
    # Of the head alone, whose step compiles soonest.
    config = self.make_config(
        'gradient', 'probe', method__learning_rate=0.1, training__num_evals=4
    )
    # Of labels that are wrong: what is learned makes it worse.
    wrong = write_texts(self.tmp / 'wrong.jsonl', 40, seed=5, shift=1)
    with config.unlocked():
      config.task.kwargs.eval_data = wrong
    summary = self.train('runs/a', config)
    self.assertLess(summary['best_step'], 8)
    same = str(self.tmp / 'test.jsonl')
    call = lambda *words: cli.main(['evaluate', str(self.tmp / 'runs'), *words])
    (row,) = evaluated.evaluate([self.tmp / 'runs'], same)
    for name in ('loss', 'accuracy', 'macro_f1'):
      np.testing.assert_allclose(row[name], summary[f'test_{name}'], rtol=1e-5)
    extra = [{'text': 'world', 'label': 'new'}]
    other = write_texts(self.tmp / 'other.jsonl', 9, seed=3, extra=extra)
    with self.assertRaisesRegex(SystemExit, r"line 10 \('new'\)"):
      call(f'--data={other}')
    with pytest.warns(UserWarning, match='told wrong'):
      evaluated.evaluate(
          [self.tmp / 'runs'], other, name='held_out', unseen='count'
      )
    after = json.loads((self.tmp / 'runs/a/summary.json').read_text())
    self.assertEqual(summary, {k: after[k] for k in summary})
    self.assertLess(after['held_out_accuracy'], 1)
    rows = reporting.statistics(
        reporting.load_runs([self.tmp / 'runs']), metric='held_out_macro_f1'
    )
    self.assertEqual(rows[0]['mean'], after['held_out_macro_f1'])
    with self.assertRaisesRegex(SystemExit, 'name to be an identifier'):
      call(f'--data={same}', '--name=test')

  @pytest.mark.slow
  def test_runs_of_a_sweep_are_those_alone(self):
    config = self.make_config('adapter', 'bernoulli')
    grid = [
        {'method.learning_rate': rate, 'seed': seed}
        for rate in (0.01, 0.03)
        for seed in (0, 1)
    ]
    sweep.train(config, grid, self.tmp / 'sweep', progress=False)
    losses = []
    for overrides in grid:
      folder = self.tmp / 'sweep' / sweep.run_name(overrides)
      summary = json.loads((folder / 'summary.json').read_text())
      self.assertEqual(summary['runs_together'], 4)
      one = experiment.apply_overrides(config, overrides)
      alone = self.train(sweep.run_name(overrides).replace('/', '_'), one)
      for name in ('test_loss', 'validation_loss', 'test_macro_f1'):
        # Batched products are rounded otherwise than single ones.
        np.testing.assert_allclose(summary[name], alone[name], rtol=2e-3)
      losses.append(summary['test_loss'])
    self.assertLen(set(losses), 4)

  @pytest.mark.slow
  def test_audits_in_chunks(self):
    """Constants along the path do not depend on the size of chunks."""
    found = []
    for size in (7, 100):  # Of 60 texts or fewer.
      config = self.make_config(
          'gradient', 'bernoulli', training__eval_gradient=True,
          training__patience=0, method__optimizer='sgd', method__period=1,
          method__learning_rate=0.02,
      )  # fmt: skip
      with config.unlocked():
        config.task.kwargs.sampling = 'replacement'
        config.task.kwargs.eval_batch_size = size
      folder = self.tmp / f'audit_{size}'
      experiment.train(config, folder)
      tables = audit_run.audit(
          folder, num_points=2, num_products=3, num_batches=3, progress=False
      ).tables
      held = {row['assumption']: row['held'] for row in tables['assumptions']}
      self.assertEqual(held['the replay is the run'], 'yes')
      self.assertEqual(held['minibatches independent'], 'yes')
      found.append({r['constant']: r['value'] for r in tables['constants']})
      # Of frames in n dimensions r of them: query and value of width 32, rank 2.
      for row in tables['lambda']:
        self.assertAlmostEqual(row['least, E[H]'], 2 / 32, places=6)
    for name in ('L', 'L between points', 'D0', 'sigma^2'):
      # Sums over other chunks are rounded otherwise.
      np.testing.assert_allclose(found[0][name], found[1][name], rtol=2e-3)

  def test_a_head_for_each_seed(self):
    task = self.make_task()
    heads = [
        task.begin(jax.random.key(i), task.weights)['classifier']['kernel']
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(heads[0], heads[1])
    self.assertGreater(float(jnp.abs(heads[0] - heads[2]).max()), 0.01)
    shapes = task_lib.shapes(task)
    self.assertEqual(shapes['classifier']['kernel'].shape, (32, 3))
