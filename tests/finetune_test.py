"""The commands finetune, merge, export and generate, as a user calls them."""

import contextlib
import dataclasses
import functools
import gc
import inspect
import io
import json
import math
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
from unittest import mock
import warnings

from absl.testing import parameterized
import chex
import finetune_runs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bernoulli_lora_jax as bl
from bernoulli_lora_jax import adapters
from bernoulli_lora_jax import cli
from bernoulli_lora_jax import export
from bernoulli_lora_jax import files
from bernoulli_lora_jax import inject
from bernoulli_lora_jax import matrices
from bernoulli_lora_jax import recipes
from bernoulli_lora_jax.models import decoder
from bernoulli_lora_jax.models import generate
from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import tokenizer as tokenizer_lib
from bernoulli_lora_jax.tasks import language_model
from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.tasks import text
from bernoulli_lora_jax.training import arguments
from bernoulli_lora_jax.training import base_config
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import directory
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import finetune
from bernoulli_lora_jax.training import finetune_checks
from bernoulli_lora_jax.training import finetune_modes
from bernoulli_lora_jax.training import finetune_shown
from bernoulli_lora_jax.training import loop
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import served
from bernoulli_lora_jax.training import tuned

# One rounding of sums of some hundred products.
CLOSE = dict(rtol=2e-4, atol=2e-5)


def setUpModule():
  global FOLDER
  FOLDER = pathlib.Path(tempfile.mkdtemp())
  finetune_runs.write_model(FOLDER / 'model')
  finetune_runs.write_data(FOLDER / 'data.jsonl')
  (FOLDER / 'watched.txt').write_text(
      'Once upon a time there was a world. ' * 9
  )


def tearDownModule():
  shutil.rmtree(FOLDER)


def blora(*words, stdin=''):
  """Returns what a command prints, and its error: '' for none."""
  out, error = io.StringIO(), ''
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    with mock.patch.object(sys, 'stdin', io.StringIO(stdin)):
      try:
        cli.main([str(word) for word in words])
      except SystemExit as e:
        error = str(e.code)
  return out.getvalue(), error


def tune(name, **flags):
  """Runs the command into FOLDER/name; returns the folder and what it printed."""
  out, error = blora(*finetune_runs.command(FOLDER, FOLDER / name, **flags))
  if error:
    raise AssertionError(error)
  return FOLDER / name, out


@functools.cache
def chain_run():
  """The run of most tests: four links of Bernoulli-LoRA."""
  with watched_memory() as seen:
    folder, out = tune('chain', watch_data=FOLDER / 'watched.txt')
  return folder, out, seen


@contextlib.contextmanager
def watched_memory():
  """Yields [(what is called, sets of weights that are then there, its options)]."""
  size = sum(x.nbytes for x in weights(FOLDER / 'model').values())

  def held():
    there = [
        shard.data
        for x in jax.live_arrays()
        if jnp.issubdtype(x.dtype, jnp.floating)
        for shard in x.addressable_shards
        if shard.device == jax.devices()[0]
    ]
    # Two arrays may share one buffer, as leaves and their shards do.
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in there}.values())

  gc.collect()
  before, seen = held(), []

  def watched(name, place):
    function = getattr(place, name)

    def call(*args, **kwargs):
      seen.append((name, (held() - before) / size, kwargs))
      return function(*args, **kwargs)

    return mock.patch.object(place, name, call)

  with contextlib.ExitStack() as stack:
    for place, name in (
        (hf, 'load'),
        (loop, '_peak_memory'),
        (recipes, 'save_recipe'),
        (generate, 'generate'),
        (export, 'report'),
    ):
      stack.enter_context(watched(name, place))
    yield seen


def weights(folder):
  """Returns {path: array} of a folder's weights."""
  params = hf.load(folder, scan_layers=True).params
  return {k: np.asarray(v) for k, v in matrices.named_leaves(params).items()}


def moved(folder):
  """Returns the paths of weights that are others than the model's."""
  old, new = weights(FOLDER / 'model'), weights(folder)
  return {path for path in old if not np.array_equal(old[path], new[path])}


def logits(config, params):
  """Returns logits of some tokens."""
  tokens = np.arange(3, 35, dtype=np.int32).reshape(2, 16) * 7
  return np.asarray(decoder.logits(decoder.apply(config, params, tokens)))


def make_config(**flags):
  """Returns the config of a run."""
  given = dict.fromkeys(inspect.signature(finetune.finetune).parameters, '')
  defaults = inspect.signature(finetune.finetune).parameters.values()
  given |= {p.name: p.default for p in defaults if p.default is not p.empty}
  given |= {'data': str(FOLDER / 'data.jsonl'), **flags}
  return finetune.make_config(given, hf.open_folder(FOLDER / 'model'))


def lines(folder):
  """Returns the lines of metrics."""
  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def summary(folder):
  return json.loads((folder / 'summary.json').read_text())


def loss_of(folder, split='validation'):
  """Returns the loss of an exported folder, evaluated anew."""
  task = language_model.make_task(
      model=str(folder),
      data=str(FOLDER / 'data.jsonl'),
      watch_data=str(FOLDER / 'watched.txt'),
      kind='auto',
      batch_size=2,
      max_length=64,
      eval_fraction=0.2,
      scan_layers=True,
  )
  params = task.load()
  return float(task.metrics(params, task.data, split)['loss'])


class InputTest(parameterized.TestCase):
  """What is wrong ends in a line with its flag, before anything takes long."""

  @parameterized.named_parameters(
      (
          'no_model',
          dict(model='/nowhere/at/all'),
          'Expected a folder.*/nowhere',
      ),
      ('model_is_a_file', dict(model='DATA'), 'Expected a folder'),
      ('no_weights', dict(model='EMPTY'), 'Expected config.json in .*empty'),
      ('no_tokenizer', dict(tokenizer='EMPTY'), 'tokenizer.json in .*empty'),
      ('no_data', dict(data='/nowhere.jsonl'), '/nowhere.jsonl'),
      ('data_unnamed', dict(data=''), "Expected data to be named, got data=''"),
      ('empty_data', dict(data='NOTHING'), 'Expected text in .*nothing.jsonl'),
      ('vocabulary', dict(tokenizer='WIDE'), 'below 512, the vocab_size'),
      ('targets', dict(targets='nothing'), "q_proj.*targets='nothing'"),
      (
          'targets_pattern',
          dict(targets='('),
          'Expected targets to be a regular',
      ),
      ('others', dict(train_others='x_'), "norm.*train_others='x_'"),
      ('tokens', dict(train_tokens='no'), 'train_tokens=no'),
      ('tokens_pattern', dict(train_tokens='('), 'Expected train_tokens to be'),
      *(
          (
              f'full_{flag}',
              {'method': 'full', flag: 'Ġhow'},
              f"^ValueError: Expected {flag}='' with method=full, .*, got {flag}='Ġhow'.$",
          )
          for flag in ('targets', 'train_others', 'train_tokens')
      ),
      ('rank', dict(rank=100), 'Expected rank <= 48.*rank=100'),
      ('rank_zero', dict(rank=0), 'Expected rank >= 1'),
      ('full', dict(method='full', export='adapter'), 'Expected export=merged'),
      ('export', dict(export='gguf'), "export='gguf'"),
      (
          'vllm',
          dict(export='merged,adapter:vllm', targets='q_proj|head'),
          'layers alone with export=adapter:vllm, got targets=.*lm_head',
      ),
      ('a_file', dict(output='DATA'), 'Expected a directory.*output='),
      ('other_things', dict(output='MODEL'), 'Expected an output that is new'),
      ('unnamed', dict(output=''), 'Expected the name of a directory'),
      ('long', dict(max_length=8), 'at most 8 tokens.*max_length=8'),
      ('nothing_left', dict(eval_fraction=0.999), 'eval_fraction=0.999'),
      ('nothing_held', dict(eval_fraction=0.0001), 'eval_fraction=0.0001'),
      ('rate', dict(learning_rate=-1), 'Expected learning_rate > 0'),
      ('stop', dict(early_stopping=2, eval_fraction=0), 'early_stopping=2'),
      ('length', dict(num_steps=0, num_epochs=0), 'Expected num_steps > 0 or'),
      ('warmup', dict(warmup=100), r'Expected warmup in \[0, 12\]'),
      ('parts', dict(micro_batches=3), 'micro_batches to divide batch_size=2'),
      ('dtype', dict(dtype='int8'), "invalid choice 'int8' .*dtype"),
      ('period', dict(period=0), 'Expected period >= 1'),
      ('prob', dict(prob=2), r'Expected prob in \[0, 1\]'),
      (
          'sketched',
          dict(method='lora', sketched='yes'),
          "^ValueError: Expected method of rac_left, .*, got method='lora'.$",
      ),
      (
          'sketched_adamw',
          dict(method='rac_left', sketched='yes', optimizer='adamw'),
          "^ValueError: Expected optimizer adam, .*, got optimizer='adamw'.$",
      ),
      (
          'column',
          dict(method='full', optimizer='column'),
          'optimizer of .* with method=full, .*got optimizer=column',
      ),
      ('adapter_rank', dict(adapter_rank=-1), 'Expected adapter_rank >= 0'),
      (
          'vllm_rank',
          dict(export='adapter:vllm', adapter_rank=513),
          r'Expected adapter_rank in \[1, 512\] with export=adapter:vllm',
      ),
      (
          'shared_frames',
          dict(method='rac_right', shared_frames='q_proj'),
          "shared_frames with method in .* got shared_frames=.*'rac_right'",
      ),
  )
  def test_is_named(self, flags, message):
    places = {
        'DATA': FOLDER / 'data.jsonl',
        'MODEL': FOLDER / 'model',
        'EMPTY': FOLDER / 'empty',
        'NOTHING': FOLDER / 'nothing.jsonl',
        'WIDE': FOLDER / 'wide',
    }
    places['EMPTY'].mkdir(exist_ok=True)
    places['NOTHING'].touch()
    if not places['WIDE'].exists():
      _write_wide(places['WIDE'])
    flags = {k: places.get(v, v) for k, v in flags.items()}
    words = finetune_runs.command(FOLDER, FOLDER / 'wrong', **flags)
    long = mock.patch.object(loop, 'compile_ahead', side_effect=AssertionError)
    load = mock.patch.object(hf, 'load', side_effect=AssertionError)
    with long, load:
      _, error = blora(*words)
    self.assertRegex(error, message)
    self.assertNotIn('\n', error)
    self.assertFalse((FOLDER / 'wrong').exists())
    self.assertFalse(list((FOLDER / 'model').glob('.*')))

  @parameterized.parameters(
      (4096, 320, 0, True),  # Ten links of rank 64: 640.
      (4096, 256, 0, False),
      (512, 320, 0, False),  # No layer has more than 512.
      (4096, 320, 512, False),
      (4096, 320, 513, True),
  )
  def test_rank_of_all_links_that_vllm_takes(self, width, steps, rank, fails):
    config = make_config(rank=64, period=32)
    settings = mock.Mock(num_steps=steps)
    check = lambda chosen: finetune_checks.check_served(
        config, width, chosen, rank, settings
    )
    check(['merged', 'adapter'])
    if not fails:
      return check(['adapter:vllm'])
    with self.assertRaisesRegex(ValueError, '10 links of rank 64.$'):
      check(['adapter:vllm'])

  @parameterized.parameters(
      ('speed', 'layers_1/', ''),
      (
          'speed',
          '^layers/',
          'such as layers_0/.* with mode=speed, got targets=',
      ),
      ('memory', '^layers/', ''),
      (
          'memory',
          'layers_1/',
          'such as layers/.* with mode=memory, got targets=',
      ),
      ('auto', '^layers/', 'with mode=speed, got targets='),
      ('auto', 'layers_1/', 'with mode=memory, got targets='),
      ('auto', 'q_proj', ''),
  )
  def test_targets_are_of_the_paths_of_the_modes(self, mode, targets, message):
    config = make_config(num_steps=12, period=3, targets=targets, mode=mode)
    with mock.patch.object(finetune_modes, '_is_cpu', lambda: False):
      modes = finetune_modes.modes_of(mode, FOLDER / 'unwritten')
    if not message:
      finetune_checks.check_method(config, modes, [])
      return
    with self.assertRaisesRegex(ValueError, message):
      finetune_checks.check_method(config, modes, [])

  def test_both_spellings_of_a_flag(self):
    out, _ = blora('finetune', '--help')
    self.assertIn('--num-steps INT', out)
    self.assertNotIn('--num_steps', out)
    for flag in ('--num-evals', '--num_evals'):
      words = finetune_runs.command(FOLDER, FOLDER / 'wrong', num_evals=None)
      self.assertRegex(blora(*words, flag, 0)[1], 'Expected num_evals >= 1')

  @parameterized.parameters(
      (['merge', 'NO'], 'Expected the directory of a run, got NO'),
      (['merge', 'NO', 'x', '--weights=1'], 'Expected adapters with weights'),
      (['merge', 'NO', '--adapters=a'], 'Expected an output'),
      (['export', 'NO', '--format=merged', '--rank=2'], 'rank of an adapter'),
      (['export', 'NO', '--dtype=float16'], "'float32' or 'bfloat16'"),
      (['export', 'NO', '--rank=-1'], 'Expected rank >= 0'),
      (['generate', 'NO'], 'Expected prompt or prompts'),
      (['generate', 'NO', '--prompt=a', '--prompts=b'], 'prompt or prompts'),
      (
          ['generate', 'NO', '--prompt=a', '--num=2'],
          'temperature > 0 for num=2',
      ),
      (['generate', 'NO', '--prompt=-'], 'at least one prompt'),
      (['generate', '/NO', '--prompt=a'], 'Expected a folder'),
  )
  def test_of_the_other_commands(self, words, message):
    out, error = blora(*words)
    self.assertRegex(error, message)
    self.assertEqual((out, error.count('\n')), ('', 0))

  def test_exports_are_told_from_others(self):
    """A folder of another step, or of nobody, stops a run before it is trained."""
    folder = FOLDER / 'told'
    (folder / 'merged').mkdir(parents=True)
    settings = mock.Mock(num_steps=12, patience=0)
    check = lambda: finetune_checks.check_exports(folder, ['merged'], settings)
    with self.assertRaisesRegex(ValueError, 'which is of another run'):
      check()
    mark = folder / 'merged' / tuned.MARK
    mark.write_text(json.dumps({'run': '', 'step': 12}))
    with self.assertRaisesRegex(ValueError, 'of step 12 where this run has 12'):
      check()  # It was merged by hand, of a run that goes on.
    past = {'step': 12, 'best_step': 9}
    (folder / 'summary.json').write_text(json.dumps(past))
    check()
    settings.patience = 1
    with self.assertRaisesRegex(ValueError, 'of step 12'):
      check()
    mark.write_text(json.dumps({'run': '', 'step': 9}))
    check()
    settings.num_steps = 24
    with self.assertRaisesRegex(ValueError, 'of step 9 where this run has 24'):
      check()


class PartsTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(method='full'), 2 * (3 * 32 * 48 + 4 * 32 * 32)),
      (dict(method='lora'), 2 * 2 * (3 * (32 + 48) + 4 * 64)),
      (dict(method='rac_left', train_tokens='Ġhow|Ġare'), 2 * 32),
  )
  def test_trained_numbers(self, flags, expected):
    """Of stacks all layers count, of embedding and head the rows that train."""
    config = make_config(num_steps=12, **flags, rank=2)
    task = language_model.without_data(str(FOLDER / 'model')).task
    rows = experiment.selection(config, task)
    if 'train_tokens' in flags:
      rows = [row for row in rows if row['rank'] == 'full']
      self.assertEqual([row['trained'] for row in rows], [expected] * 2)
    else:
      self.assertEqual(sum(row['trained'] for row in rows), expected)

  @parameterized.parameters(
      ('lora', 192, 1.2e-2),
      ('lora', 512, 2.5e-3),
      ('cola', 512, 2.5e-3),
      ('bernoulli', 192, 2.5e-2),
      ('bernoulli', 512, 8e-3),
      ('rac_left', 512, 8e-3),
      ('rac_right', 512, 8e-3),
      ('full', 512, 3e-3),
  )
  def test_default_rate_is_on_the_safe_side(self, method, width, best):
    """At most the best that was found at a width, of all ranks, and not far below."""
    given = dict.fromkeys(('alpha', 'train_others', 'train_tokens'))
    given |= dict(method=method, rank=16)
    rate, _ = finetune.default_rate(given, width)
    self.assertBetween(rate, best / 4, best)

  @parameterized.parameters(
      # Width 32; two digits, so 0.12 of 4 / 32.
      (dict(), 0.12, None, '4 / width 32'),
      (dict(alpha=6), 0.042, 6, '4 / width 32 / 3'),
      (dict(alpha=1), 0.12, 1, '4 / width 32'),
      (dict(method='lora'), 0.039, 4, '1.25 / width 32'),
      (dict(method='cola'), 0.039, 4, '1.25 / width 32'),
      (dict(method='lora', alpha=4), 0.039, 4, '1.25 / width 32'),
      (dict(method='lora', alpha=8), 0.02, 8, '1.25 / width 32 / 2'),
      (dict(method='lora', alpha=1), 0.039, 1, '1.25 / width 32'),
      (dict(method='full', alpha=8), 0.016, 8, '0.5 / width 32'),
      (dict(train_others='norm'), 0.016, None, '0.5 / width 32'),
      (dict(train_tokens='Ġhow'), 0.016, None, '0.5 / width 32'),
      (dict(learning_rate=1.0), 1.0, None, '4 / width 32'),
  )
  def test_rate_and_scale(self, flags, rate, alpha, told):
    given = dict(num_steps=12, rank=2, **flags)
    method = make_config(**given).method
    self.assertEqual(method.learning_rate, rate)
    self.assertEqual(method.alpha, alpha)
    given = {'method': 'bernoulli', 'alpha': None, **given}
    given = {'train_others': '', 'train_tokens': '', **given}
    self.assertEqual(finetune.default_rate(given, 32)[1], told)

  def test_tokens_are_counted_without_padding(self):
    config = make_config(num_steps=12, max_length=100, batch_size=2)
    task = arguments.make_task(config)
    stream, rows = task.stream(0), task.num_samples
    segments = [stream._next_row()['segments'] for _ in range(rows)]
    self.assertEqual(stream.get_state()['epoch'], 0)
    whole = np.count_nonzero(np.stack(segments))
    self.assertLess(whole, 0.95 * rows * 100)
    self.assertEqual(task.num_tokens, round(2 * whole / rows))

  def test_loss_that_is_not_finite_ends_a_run(self):
    for name in ('validation_loss', 'train_loss'):
      with self.assertRaisesRegex(loop.DivergedError, f'{name}, got nan at'):
        loop._check_line({name: math.nan, 'validation_perplexity': 1.0}, 3)
    line = {'validation_loss': math.inf, 'validation_perplexity': math.inf}
    self.assertEqual(loop._check_line(line, 3), line)

  @parameterized.parameters(('none', 12), ('jit', 12), ('jit', 1e9))
  def test_mode_is_the_first_that_fits(self, parallel, limit):
    """On one device and several: what is compiled ahead tells."""
    flags = dict(method='lora', targets='q_proj', max_length=64)
    config = make_config(parallel=parallel, num_steps=12, **flags)
    memory = mock.patch.object(finetune_modes, 'memory', lambda: limit)
    out = io.StringIO()
    read = mock.patch.object(text, 'load', wraps=text.load)
    with memory, read as read, contextlib.redirect_stderr(out):
      args = config, ['speed', 'memory'], FOLDER / 'unwritten', mock.Mock()
      program = finetune_modes.fitting(*args)
    read.assert_called_once()
    fits = limit > 12
    self.assertEqual(config.task.kwargs.scan_layers, not fits)
    self.assertEqual('trying memory mode' in out.getvalue(), not fits)
    self.assertLen(program.compiled, 1)
    anew, own = arguments.make_task(config), program.task
    self.assertEqual(own.loss.args, anew.loss.args)
    self.assertEqual(own.matrices('q_proj'), anew.matrices('q_proj'))
    for name in ('num_samples', 'num_tokens', 'chunk', 'preview'):
      self.assertEqual(getattr(own, name), getattr(anew, name))
    for make in (task_lib.shapes, lambda task: task.load(), lambda t: t.data):
      chex.assert_trees_all_equal(make(own), make(anew))

  @parameterized.parameters('none', 'jit')
  def test_compiled_ahead_is_what_trains(self, parallel):
    config = base_config.get_config()
    config.update_from_flattened_dict(
        {
            'task.name': f'{__file__}:stream_task',
            'task.batch_size': 8,
            'training.parallel': parallel,
            'training.num_steps': 4,
            'training.num_evals': 1,
            'training.eval_gradient': False,
            'training.progress': False,
            'method.name': 'full',
        }
    )
    program = experiment.make_program(config)
    (compiled,) = loop.compile_ahead(program)
    self.assertGreater(compiled.memory_analysis().argument_size_in_bytes, 0)
    folder = pathlib.Path(tempfile.mkdtemp(dir=FOLDER))
    self.assertEqual(experiment.train(config, folder, program)['step'], 4)
    self.assertEqual(program.compiled, {(4, None): compiled})

  @parameterized.parameters(checkpoint._FROZEN, checkpoint._DIGEST)
  def test_last_checkpoint_goes_when_the_next_is_whole(self, last):
    """Of one that is kept: neither a kill nor a full disk takes both."""
    folder = FOLDER / last
    tree = lambda x: {'method': {'w': jnp.full(3, x)}}
    write = files.write_json

    def full(path, value):
      if path.name == last:
        raise OSError(28, 'No space left on device')
      write(path, value)

    with checkpoint.Checkpointer(folder, max_to_keep=1) as saver:
      saver.save(1, tree(1.0))
      with mock.patch.object(files, 'write_json', full):
        with self.assertRaisesRegex(OSError, 'step 2 .*no space left'):
          saver.save(2, tree(2.0))
      self.assertEqual(_names(folder / 'checkpoints'), ['1'])
      saver.save(3, tree(3.0))
      self.assertEqual(_names(folder / 'checkpoints'), ['3'])
    with checkpoint.Checkpointer(folder, max_to_keep=1) as saver:
      found = saver.restore(tree(0.0))
      np.testing.assert_array_equal(found['method']['w'], np.full(3, 3.0))

  def test_files_of_a_full_disk_are_named(self):
    path = FOLDER / 'named.json'

    def full(file):
      raise OSError(28, 'No space left on device')

    with self.assertRaisesRegex(OSError, 'No space left on device.*named.json'):
      files.write(path, full)
    self.assertFalse(
        list(FOLDER.glob('*named*')) + list(FOLDER.glob('.named*'))
    )


class SketchedTest(parameterized.TestCase):
  """Weights that move at each step; what has no factors."""

  @parameterized.parameters(
      (dict(method='rac_left'), 'sketched'),
      (dict(method='rac_right'), 'sketched'),
      (dict(method='rac_left', sketched='no'), 'adapter'),
      (dict(method='rac_left', optimizer='adamw'), 'adapter'),
      (dict(method='rac_left', optimizer='column'), 'sketched'),
      (dict(method='rac_left', dtype='bfloat16'), 'sketched'),
      (
          dict(method='rac_left', dtype='bfloat16', rounding='nearest'),
          'adapter',
      ),
      (dict(method='rac_left', rounding='nearest'), 'sketched'),
      (dict(method='bernoulli'), 'adapter'),
      (dict(method='bernoulli', sketched='yes'), 'sketched'),
      (dict(method='bernoulli', shared_coin=True), 'adapter'),
      (dict(method='lora'), 'adapter'),
      (dict(method='full'), 'gradient'),
  )
  def test_mode(self, flags, mode):
    config = make_config(**flags)
    self.assertEqual(config.method.mode, mode)
    has_recipe = flags['method'] not in ('lora', 'full')
    self.assertEqual(config.training.recipe, has_recipe)
    self.assertFalse(config.training.recipe_of_steps)

  @parameterized.parameters('adapter', 'sketched')
  def test_a_run_that_was_begun_goes_on_as_it_was(self, mode):
    folder = FOLDER / f'begun_{mode}'
    folder.mkdir()
    config = make_config(method='rac_left')
    config.method.mode = mode
    (folder / 'config.json').write_text(config.to_json_best_effort())
    make = functools.partial(make_config, method='rac_left', output=str(folder))
    self.assertEqual(make().method.mode, mode)
    was, other = ('yes', 'no') if mode == 'sketched' else ('no', 'yes')
    self.assertEqual(make(sketched=was).method.mode, mode)
    with self.assertRaisesRegex(
        ValueError, f'={was}, as in .*sketched={other}'
    ):
      make(sketched=other)

  def test_change_has_the_rank_of_all_links(self):
    key = jax.random.split(jax.random.key(0), 3)
    base = {'kernel': jax.random.normal(key[0], (12, 10))}
    left = jax.random.normal(key[1], (12, 4))
    change = left @ jax.random.normal(key[2], (4, 10))
    chain = adapters.make_chain(
        bl.ChainPolicy.rac(2, 3, 'left'), optax.sgd(0.1), sketched=True
    )
    state = chain.init(jax.random.key(0), {'kernel': base['kernel'] + change})
    program = mock.Mock(method=mock.Mock(chain=chain))
    program.task.load = lambda: jax.tree.map(jnp.copy, base)
    # Within the second link.
    run = tuned.Tuned(FOLDER, program, None, mock.Mock(chain=state), 5)
    thin = tuned.change(run)['kernel']
    self.assertEqual(thin.ranks, 4)
    np.testing.assert_allclose(thin.left @ thin.right, change, atol=1e-5)
    self.assertLess(thin.lost, 1e-5)
    values = np.linalg.svd(change, compute_uv=False)
    thin = tuned.change(run, rank=1)['kernel']
    lost = np.linalg.norm(values[1:]) / np.linalg.norm(values)
    # Two turns of the power method find the direction.
    np.testing.assert_allclose(thin.lost, lost, rtol=1e-4)

  def test_change_is_that_of_the_links_where_they_are_kept(self):
    base = {'kernel': jax.random.normal(jax.random.key(0), (12, 10))}
    chain = adapters.make_chain(
        bl.ChainPolicy.rac(2, 3, 'left', sketch=bl.sketches.coordinate()),
        optax.adam(0.1),
        sketched=True,
        keeps='link',
    )
    loss = inject.by_product(
        lambda params, x: (jnp.sum(jnp.sin(x @ params['kernel'])), None)
    )
    step = jax.jit(lambda state: chain.step(state, loss, jnp.ones((4, 12)))[0])
    state = chain.init(jax.random.key(0), base)
    folder = pathlib.Path(tempfile.mkdtemp(dir=FOLDER))
    for i in range(5):  # Within the second link.
      state = step(state)
      if i == 2:
        link = recipes.trained_factors(state, chain)
        recipes.save_link(folder / 'recipe', 0, link)
    program = mock.Mock(method=mock.Mock(chain=chain))
    run = tuned.Tuned(folder, program, None, mock.Mock(chain=state), 5)
    self.assertTrue(tuned.has_links(run))
    thin = tuned.change(run)['kernel']
    program.task.load.assert_not_called()
    self.assertLessEqual(thin.ranks, 4)
    self.assertLess(thin.lost, 1e-12)
    change = state.params['kernel'] - base['kernel']
    # Five roundings of weights below four.
    np.testing.assert_allclose(thin.left @ thin.right, change, atol=2e-6)

  @parameterized.parameters(
      # (period, eval_every, checkpoint_every, num_steps, most), its dispatches.
      (100, 100, 6000, 1000, 50, {50}),
      (100, 100, 6000, 1000, 30, {25}),
      (100, 300, 6000, 1037, 50, {50, 37}),
      (100, 20, 6000, 1000, 50, {20}),
      (97, 97, 970, 1037, 50, {30, 7}),  # A prime, and another rest.
      (97, 97, 970, 970, 50, {50, 47}),
      (100, 100, 6000, 70, 50, {35}),
      (1, 10, 100, 100, 50, {1}),
      (3, 3, 3, 12, 50, {3}),
  )
  def test_dispatches_have_two_lengths(self, *numbers):
    period, eval_every, checkpoint_every, num_steps, most, lengths = numbers
    config = make_config(sketched='yes', shared_coin=True, period=period)
    config.training.update(
        num_steps=num_steps,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
    )
    settings = programs.Settings(
        num_steps,
        eval_every,
        checkpoint_every,
        finetune_modes._dispatch(config, most),
    )
    program = mock.Mock(settings=settings, period=period, sides=(None,))
    progress, found = loop.Progress(0, 0, math.inf, 0, 0, 0.0), set()
    while num := loop._num_next(program, progress):
      found.add(num)
      progress = progress._replace(step=progress.step + num)
    self.assertEqual(found, lengths)

  @parameterized.parameters(('yes', 'none'), ('yes', 'jit'), ('no', 'none'))
  @pytest.mark.slow
  def test_links_of_one_coin_have_programs_of_their_side(self, mode, parallel):
    flags = dict(sketched=mode, parallel=parallel, batch_size=8, seed=1)
    made, fitting = [], finetune_modes.fitting
    keep = lambda *args: made.append(fitting(*args)) or made[-1]
    folder, other = (FOLDER / f'coin_{mode}_{parallel}_{i}' for i in range(2))
    run = lambda output: blora(
        *finetune_runs.command(FOLDER, output, **flags), '--shared-coin'
    )
    with mock.patch.object(finetune_modes, 'fitting', keep):
      out, error = run(folder)
      with mock.patch.object(programs.Program, 'sides', (None,)):
        traced_out, traced_error = run(other)
    self.assertEqual(error + traced_error, '')
    told = 'one coin a link for all matrices: a program for each side'
    self.assertIn(told, out)
    self.assertNotIn(told, traced_out)
    lean, traced = (set(program.compiled) for program in made)
    self.assertEqual(lean, {(3, 'left'), (3, 'right')})
    self.assertEqual(traced, {(3, None)})
    # Both ran: the key of the chain, as `AdapterMethod.init` folds it.
    key = jax.random.fold_in(programs.method_key(jax.random.key(1)), 1)
    sides = adapters.sides_of_links(made[0].method.chain, key, 4)
    self.assertEqual(set(sides), {'left', 'right'})
    # Sums of float32 in another order.
    for path, leaf in weights(other / 'merged').items():
      np.testing.assert_allclose(
          weights(folder / 'merged')[path], leaf, rtol=2e-3, atol=2e-4
      )

  @parameterized.parameters(('rac_left', 'memory'), ('bernoulli', 'speed'))
  @pytest.mark.slow
  def test_run(self, method, mode):
    flags = dict(method=method, sketched='yes', mode=mode)
    name = f'sketched_{method}'
    folder, out = tune(name, **flags)
    self.assertIn('50,336 numbers, sketched', out)
    told, (first, *_) = summary(folder), lines(folder)
    self.assertLess(told['validation_loss'], first['validation_loss'])
    np.testing.assert_allclose(
        loss_of(folder / 'merged'), told['validation_loss'], rtol=1e-5
    )
    # The steps are those of adapters, to rounding.
    other, _ = tune(f'{name}_not', **{**flags, 'sketched': 'no'})
    for path, leaf in weights(other / 'merged').items():
      np.testing.assert_allclose(
          weights(folder / 'merged')[path], leaf, rtol=2e-3, atol=2e-4
      )
    is_scanned = mode == 'memory'
    base = hf.load(FOLDER / 'model', scan_layers=is_scanned)
    recipe = recipes.load_recipe(folder / 'recipe')
    self.assertLen(recipe.links, 4)
    merged = hf.load(folder / 'merged', scan_layers=is_scanned).params
    # (12 + 4) / 2 roundings of weights below one, and sums of links.
    chex.assert_trees_all_close(
        recipes.replay(base.params, recipe), merged, rtol=0, atol=12 * 2.0**-24
    )
    base = hf.load(FOLDER / 'model', scan_layers=True)
    params, _ = served._with_adapters(base, [str(folder / 'adapter')], None)
    after = hf.load(folder / 'merged', scan_layers=True).params
    np.testing.assert_allclose(
        logits(base.config, params), logits(base.config, after), **CLOSE
    )
    # Four links of rank 2.
    self.assertRegex(out, r'sum of links.*(?s:.)*q_proj +2 +8 +0 +\d\S*e-0\d')
    with mock.patch.object(hf, 'load', side_effect=AssertionError):
      _, again = tune(name, **flags)
    self.assertEqual(*(x[x.index('Steps and') :] for x in (out, again)))
    self.check_commands(folder)

  def check_commands(self, folder):
    low = FOLDER / f'{folder.name}_low'
    out, error = blora('export', folder, low, '--rank=1')
    self.assertEqual(error, '')
    lost = [float(x.split()[3]) for x in out.splitlines() if '_proj' in x]
    self.assertBetween(min(lost), 0.05, 1.0)
    again = FOLDER / f'{folder.name}_again'
    self.assertEqual(blora('merge', folder, again)[1], '')
    old, new = weights(folder / 'merged'), weights(again)
    for path, leaf in old.items():
      np.testing.assert_array_equal(leaf, new[path])
    end = json.loads((folder / finetune._END).read_text())
    prompt = end['begins'].removeprefix('<s>')
    said, _ = blora(
        'generate', folder, f'--prompt={prompt}', '--max-new-tokens=48'
    )
    self.assertEqual(said.removesuffix('\n'), end['after'])
    more, _ = tune(f'{folder.name}_more', model=folder, method='rac_right')
    np.testing.assert_allclose(
        lines(more)[0]['validation_loss'],
        summary(folder)['validation_loss'],
        rtol=1e-5,
    )

  @parameterized.parameters(
      dict(),
      dict(dtype='bfloat16'),
      dict(dtype='bfloat16', sketch='coordinate'),
      dict(early_stopping=4),
      dict(parallel='jit'),
  )
  @pytest.mark.slow
  def test_resumes_within_a_link(self, **more):
    flags = dict(method='rac_right', checkpoint_every=4, batch_size=8, **more)
    name = '_'.join(['cut', *map(str, more)])
    whole, _ = tune(f'{name}_whole', **flags)
    num_next = loop._num_next

    def interrupted(program, progress):
      if progress.step >= 7:
        raise KeyboardInterrupt
      return num_next(program, progress)

    words = finetune_runs.command(FOLDER, FOLDER / name, **flags)
    with mock.patch.object(loop, '_num_next', interrupted):
      with self.assertRaises((KeyboardInterrupt, AssertionError)):
        self.assertEqual(blora(*words)[1], '')
    self.assertEqual(tuned.last_checkpoint(FOLDER / name), 4)
    self.assertEqual(blora(*words)[1], '')
    for path, leaf in weights(whole / 'merged').items():
      np.testing.assert_array_equal(
          leaf, weights(FOLDER / name / 'merged')[path]
      )
    for one, other in zip(lines(whole), lines(FOLDER / name), strict=True):
      for line in (one, other):
        line.pop('tokens_per_second', None)
      self.assertEqual(one, other)

  @pytest.mark.slow
  def test_best_weights_leave(self):
    flags = dict(early_stopping=1, learning_rate=8.0, num_steps=24, warmup=2)
    folder, _ = tune('sketched_early', method='rac_left', num_evals=12, **flags)
    told = summary(folder)
    self.assertLess(told['best_step'], told['step'])
    np.testing.assert_allclose(
        loss_of(folder / 'merged'), told['validation_loss'], rtol=1e-4
    )
    self.assertEqual(tuned.step_of(folder / 'merged'), told['best_step'])


class KeptTest(parameterized.TestCase):
  """The best step of a run that stops early, on a small task."""

  @parameterized.parameters(
      # Losses of the evaluations at steps 2, 4, ...; the best step; links of 5 steps.
      ([3, 2, 1, 4, 5], 6, 2),
      ([2, 1, 4, 5], 4, 1),
      ([3, 3, 2, 3, 1, 2], 10, 2),
      ([3, math.inf, 2, 4, 1, 0], 12, 3),
      ([math.inf, math.inf], 0, 0),
  )
  def test_recipe_is_of_the_best_step_which_the_host_keeps(
      self, losses, best_step, num_links
  ):
    told = mock.Mock(side_effect=[9, *losses, 7])  # At step 0, and at the end.
    program = small_program()
    folder = pathlib.Path(tempfile.mkdtemp(dir=FOLDER))
    evaluate = lambda self, state: {'validation_loss': told()}
    with mock.patch.object(programs.Program, 'evaluate', evaluate):
      ended = loop.train(program, 0, folder, {}, {})
    self.assertEqual(told.call_count, len(losses) + 2)
    self.assertEqual(ended['best_step'], best_step)
    recipe = recipes.load_recipe(folder / 'recipe')
    self.assertEqual(
        (recipe.num_steps, len(recipe.links)), (best_step, num_links)
    )
    start = program.start(jax.random.key(0))
    with loop.open_checkpoints(program, folder, start) as saver:
      state, best, _ = loop.restore(saver, program, start)
    for path, leaf in jax.tree_util.tree_leaves_with_path(best):
      is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      self.assertIsInstance(leaf, jax.Array if is_key else np.ndarray, path)
    kept = program.params(program.filled(best, state))
    base = program.task.init(jax.random.key(0))
    with warnings.catch_warnings():
      warnings.simplefilter('error')  # Of another checksum.
      chex.assert_trees_all_equal(recipes.replay(base, recipe), kept)

  def test_filled_gives_up_what_it_replaces(self):
    program = small_program()
    state = program.start(jax.random.key(0))
    kept = program.snapshot(state)
    expected = program.params(state)
    for load in (None, lambda: expected):
      task = program.task._replace(load=load)
      filled = dataclasses.replace(program, task=task).filled(kept, state)
      chex.assert_trees_all_equal(program.params(filled), expected)
      one = state.chain.params['one']['kernel']
      self.assertEqual(one.is_deleted(), load is not None)


def small_task(*, batch_size):
  """Returns least squares."""
  x = np.asarray(jax.random.normal(jax.random.key(0), (12, 6)))
  y = x @ np.asarray(jax.random.normal(jax.random.key(1), (6, 4)))

  def loss(params, batch, key):
    del key
    return (
        jnp.mean((batch['x'] @ params['one']['kernel'] - batch['y']) ** 2),
        {},
    )

  return task_lib.from_arrays(
      'small',
      loss,
      weights={'one': {'kernel': jnp.ones((6, 4)) / 3}},
      train={'x': x, 'y': y},
      batch_size=batch_size,
  )


class Ones:
  """A stream."""

  def __next__(self):
    return {'x': np.ones((8, 6), np.float32)}

  def get_state(self):
    return {}

  def set_state(self, state):
    del state


def stream_task(*, batch_size):
  """Returns a task whose batches come from a stream."""

  def loss(params, batch, key):
    del key
    return jnp.mean((batch['x'] @ params['one']['kernel']) ** 2), {}

  return task_lib.Task(
      'ones',
      lambda key: {'one': {'kernel': jnp.ones((6, 4))}},
      {},
      loss,
      8,
      batch_size,
      'stream',
      stream=lambda seed: Ones(),
  )


@functools.cache
def small_program():
  """Returns the program of the small task: at most 12 steps, links of 5."""
  config = base_config.get_config()
  config.task.name = f'{pathlib.Path(__file__)}:small_task'
  config.task.batch_size = 6
  config.method.mode, config.method.name = 'adapter', 'bernoulli'
  config.method.rank, config.method.period = 2, 5
  config.training.num_steps, config.training.eval_every = 12, 2
  config.training.patience, config.training.recipe = 2, True
  config.training.progress = False
  return experiment.make_program(config)


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def _write_wide(folder):
  """Writes the tokenizer with a token more than the model has rows."""
  shutil.copytree(FOLDER / 'model', folder)
  path = folder / 'tokenizer.json'
  found = json.loads(path.read_text())
  size = len(found['model']['vocab'])
  for i in range(size, 520):  # Which the data have.
    found['added_tokens'].append(
        {
            'id': i,
            'content': 'Question' if i == 519 else f'<more {i}>',
            'single_word': False,
            'lstrip': False,
            'rstrip': False,
            'normalized': False,
            'special': False,
        }
    )
  path.write_text(json.dumps(found))


class ChainTest(parameterized.TestCase):
  """What is there after a run, of which there is one."""

  def test_merged_weights_have_the_loss_that_was_told(self):
    folder, out, _ = chain_run()
    told = summary(folder)
    for split in ('validation', 'watched'):
      np.testing.assert_allclose(
          loss_of(folder / 'merged', split), told[f'{split}_loss'], rtol=1e-5
      )
    self.assertRegex(out, r'12 steps of 1\d\d tokens in 2 rows of 64 \(')
    (first, *_), last = lines(folder), lines(folder)[-1]
    self.assertEqual((first['step'], last['step']), (0, 12))
    self.assertLess(last['validation_loss'], first['validation_loss'])
    self.assertIn('watched_loss', first)
    self.assertIn(f'{first["validation_perplexity"]:.4g}', out)
    self.assertIn(f'{last["validation_perplexity"]:.4g}', out)
    self.assertRegex(out, 'held out +.*\n *watched ')
    self.assertTrue((folder / 'loss.png').exists())

  @pytest.mark.slow
  def test_recipe_makes_the_merged_weights(self):
    folder, *_ = chain_run()
    base = hf.load(FOLDER / 'model', scan_layers=True).params
    recipe = recipes.load_recipe(folder / 'recipe')
    self.assertLen(recipe.links, 4)
    made = recipes.replay(base, recipe)
    for path, leaf in matrices.named_leaves(made).items():
      np.testing.assert_array_equal(leaf, weights(folder / 'merged')[path])

  def test_adapter_has_the_logits_of_the_merged_weights(self):
    folder, *_ = chain_run()
    base = hf.load(FOLDER / 'model', scan_layers=True)
    params, _ = served._with_adapters(base, [str(folder / 'adapter')], None)
    tuned_params = hf.load(folder / 'merged', scan_layers=True).params
    ours, theirs = logits(base.config, params), logits(
        base.config, tuned_params
    )
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    base = hf.load(FOLDER / 'model', scan_layers=True)
    self.assertGreater(
        np.abs(logits(base.config, base.params) - theirs).max(), 0.01
    )

  def test_one_set_of_weights_at_a_time_is_on_the_device(self):
    folder, _, seen = chain_run()
    names = [name for name, *_ in seen]
    end = ['generate', 'load', 'generate', 'report']
    # The run's base, that of the recipe, that of what is merged, and that of a sample.
    told = ['load', '_peak_memory', 'load', 'save_recipe', 'load', *end]
    self.assertEqual(names, told)
    with watched_memory() as more:
      _, error = blora('export', folder, FOLDER / 'watched_export')
    self.assertEqual(error, '')
    self.assertEqual([name for name, *_ in more], ['load', 'load', 'report'])
    for name, sets, _ in seen + more:
      # Beside it: data, factors and their moments.
      self.assertLess(sets, 0.25 if name == 'load' else 1.25, name)

  def test_the_same_command_again_prints_without_computing(self):
    folder, out, _ = chain_run()
    load = mock.patch.object(hf, 'load', side_effect=AssertionError)
    with load, mock.patch.object(loop, 'compile_ahead') as compiled:
      _, again = tune('chain', watch_data=FOLDER / 'watched.txt')
    compiled.assert_not_called()
    end = out.index('Merges and adapter')
    self.assertEqual(again[again.index('Merges and adapter') :], out[end:])

  def test_a_speed_that_nobody_measured_is_not_told(self):
    folder, out, _ = chain_run()
    self.assertRegex(out, r'12 steps; .* [\d,]+ tokens/s\n')
    end, told = files.read_json(folder / finetune._END), summary(folder)
    told.pop('tokens_per_second')
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      finetune_shown.show_end(folder, [], told, end)
    self.assertRegex(out.getvalue(), '12 steps; .* to compile\n')
    self.assertNotIn('nan', out.getvalue())

  @pytest.mark.slow
  def test_another_prompt_is_answered(self):
    _, out = tune('chain', watch_data=FOLDER / 'watched.txt', prompt='Hello')
    self.assertIn("prompt: '<s>Hello'", out)
    tune('chain', watch_data=FOLDER / 'watched.txt')

  @parameterized.parameters(
      (dict(rank=3), 'Expected rank=2, as in .*got rank=3'),
      (dict(num_steps=24), 'Expected num_steps=12.*schedule=.cosine'),
      (dict(num_steps=6), 'num_steps'),
  )
  def test_another_run_is_refused(self, flags, message):
    folder, *_ = chain_run()
    flags = {'watch_data': FOLDER / 'watched.txt', **flags}
    _, error = blora(*finetune_runs.command(FOLDER, folder, **flags))
    self.assertRegex(error, message)

  @pytest.mark.slow
  def test_a_process_at_a_time(self):
    folder, *_ = chain_run()
    with directory.hold(folder):
      words = finetune_runs.command(
          FOLDER, folder, watch_data=FOLDER / 'watched.txt'
      )
      for command in (words, ['merge', folder, FOLDER / 'held']):
        with self.subTest(command[0]):
          _, error = blora(*command)
          self.assertRegex(error, 'Expected no other process in')

  def test_merged_has_the_tokenizer_of_the_run(self):
    config = files.read_json(chain_run()[0] / 'config.json')
    own, written = FOLDER / 'own_words', FOLDER / 'written'
    for folder, names in (
        (own, ['tokenizer.json']),
        (written, ['tokenizer.json', 'chat_template.jinja', 'LICENSE']),
    ):
      folder.mkdir()
      for name in names:
        (folder / name).write_text(folder.name)
    found = []
    for name in (str(own), 'bytes'):
      config['task']['kwargs']['tokenizer'] = name
      files.write_json(own / 'config.json', config)
      tuned._copy_tokenizer(tuned.Tuned(own, *[None] * 4), written)
      found.append({p.name: p.read_text() for p in written.iterdir()})
    rest = {'LICENSE': 'written'}
    self.assertEqual(found, [{'tokenizer.json': 'own_words', **rest}, rest])

  def test_merge_and_export(self):
    folder, *_ = chain_run()
    out, error = blora('merge', folder, FOLDER / 'again')
    self.assertEqual(error, '')
    self.assertIn('step 12', out)
    self.assertEqual(reporting.unfinished([folder]), [])  # merged is no run.
    _, error = blora(*finetune_runs.command(FOLDER, folder, adapter_rank=1))
    self.assertRegex(error, 'Expected adapter_rank=0, as of .*, got adapter_')
    old, new = weights(folder / 'merged'), weights(FOLDER / 'again')
    for path, leaf in old.items():
      np.testing.assert_array_equal(leaf, new[path])
    _, error = blora('merge', folder)
    self.assertRegex(error, 'not there yet, got .*chain/merged')
    out, error = blora('export', folder, FOLDER / 'v', '--format=vllm')
    self.assertEqual(error, '')
    self.assertRegex(out, 'self_attn/q_proj +2 +8 +0 ')
    config = json.loads((FOLDER / 'v' / 'adapter_config.json').read_text())
    self.assertEqual((config['r'], config['rank_pattern']), (8, {}))
    out, error = blora('export', folder, FOLDER / 'low', '--rank=1')
    self.assertEqual(error, '')
    lost = [float(x.split()[3]) for x in out.splitlines() if '_proj' in x]
    self.assertBetween(min(lost), 0.05, 1.0)
    self.assertEqual(tuned.step_of(FOLDER / 'low'), 12)

  def test_sum_of_adapters(self):
    folder, *_ = chain_run()
    adapter = folder / 'adapter'
    out, error = blora(
        *('merge', FOLDER / 'model', FOLDER / 'sum'),
        *(f'--adapters={adapter},{adapter}', '--weights=0.25,0.75'),
    )
    self.assertEqual(error, '')
    self.assertRegex(out, 'mlp/up_proj +2 ')
    old, new = weights(folder / 'merged'), weights(FOLDER / 'sum')
    for path, leaf in old.items():
      np.testing.assert_allclose(new[path], leaf, rtol=1e-4, atol=1e-6)

  def test_generate(self):
    folder, *_ = chain_run()
    end = json.loads((folder / finetune._END).read_text())
    prompt = end['begins'].removeprefix('<s>')
    flags = [f'--prompt={prompt}', '--max-new-tokens=48']
    said, error = blora('generate', folder, *flags)
    self.assertEqual(error, '')
    self.assertEqual(said.removesuffix('\n'), end['after'])
    before, _ = blora('generate', FOLDER / 'model', *flags)
    self.assertEqual(before.removesuffix('\n'), end['before'])
    added, _ = blora(
        'generate', FOLDER / 'model', *flags, f'--adapter={folder / "adapter"}'
    )
    self.assertEqual(added, said)
    self.assertNotEqual(added, before)

  def test_generate_many(self):
    folder, *_ = chain_run()
    flags = '--temperature=1 --max-new-tokens=4 --num=2 --chat'.split()
    out, error = blora(
        'generate', folder, '--prompts=-', *flags, stdin='One\n\nTwo\n'
    )
    self.assertEqual(error, '')
    self.assertEqual(out.count("--- 'One'"), 2)
    self.assertEqual(out.count("--- 'Two'"), 2)
    one, _ = blora('generate', folder, '--prompt=-', *flags, stdin='One\n')
    self.assertTrue(out.startswith(one))
    other, _ = blora('generate', folder, '--prompt=One', *flags, '--seed=1')
    self.assertNotEqual(one, other)

  def test_chat_is_the_template(self):
    folder, *_ = chain_run()
    seen = []
    fake = lambda config, params, rows, **options: (
        seen.append((rows, options)) or [[5]] * len(rows)
    )
    with mock.patch.object(served.generate_lib, 'generate', fake):
      blora('generate', folder, '--prompt=Hi', '--chat')
      blora('generate', folder, '--prompt=Hi')
    words = tokenizer_lib.load(FOLDER / 'model')
    (chat, options), (plain, _) = seen
    text = '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    self.assertEqual(words.decode(chat[0]), text)
    self.assertEqual(words.decode(plain[0]), '<s>Hi')
    self.assertEqual(options['end_tokens'], [words.eos_id, finetune_runs.END])

  def test_samples_end_where_answers_do(self):
    words = tokenizer_lib.load(FOLDER / 'model')
    ends = [
        options['end_tokens']
        for name, _, options in chain_run()[-1]
        if name == 'generate'
    ]
    self.assertEqual(ends, [[words.eos_id, finetune_runs.END]] * 2)


@pytest.mark.slow
class MethodTest(parameterized.TestCase):

  def test_lora(self):
    folder, out = tune('lora', method='lora', learning_rate=None)
    self.assertIn('learning rate: 0.039, from 1.25 / width 32\n', out)
    self.assertRegex(out, 'self_attn/q_proj +2 +32 x 32 +2 .* 2 ')
    self.assertEqual(tuned.read_config(folder).method.alpha, 4)
    base = hf.load(FOLDER / 'model', scan_layers=True)
    params, _ = served._with_adapters(base, [str(folder / 'adapter')], None)
    after = hf.load(folder / 'merged', scan_layers=True).params
    np.testing.assert_allclose(
        logits(base.config, params), logits(base.config, after), **CLOSE
    )
    self.assertFalse((folder / 'recipe').exists())  # The adapter says it all.

  def test_full(self):
    folder, out = tune('full', method='full', learning_rate=1e-3)
    self.assertIn('learning rate: 0.001\n', out)
    self.assertEqual(moved(folder / 'merged'), set(weights(FOLDER / 'model')))
    self.assertFalse((folder / 'adapter').exists())
    self.assertFalse((folder / 'recipe').exists())
    self.assertIn('trained a step: 50,336 of 50,336', out)
    np.testing.assert_allclose(
        loss_of(folder / 'merged'),
        summary(folder)['validation_loss'],
        rtol=1e-5,
    )
    _, error = blora('export', folder)
    self.assertRegex(error, 'got one of full fine-tuning: export merged')

  def test_others(self):
    folder, _ = tune('others', train_others='norm', targets='q_proj')
    paths = moved(folder / 'merged')
    self.assertIn('norm/scale', paths)
    self.assertEqual(
        paths,
        {p for p in weights(FOLDER / 'model') if 'norm' in p or 'q_proj' in p},
    )
    _, error = blora('export', folder)
    self.assertRegex(error, 'that trained norm at full size')

  def test_tokens(self):
    """Rows of two tokens move, and leave with the merged weights."""
    folder, _ = tune('tokens', train_tokens='Ġhow|Ġare')
    words = tokenizer_lib.load(folder / 'merged').backend
    chosen = {words.token_to_id('Ġhow'), words.token_to_id('Ġare')}
    old, new = weights(FOLDER / 'model'), weights(folder / 'merged')
    for path, axis in (('embed_tokens/embedding', 1), ('lm_head/kernel', 0)):
      differ = np.any(old[path] != new[path], axis=axis)
      self.assertEqual(set(np.flatnonzero(differ)), chosen, path)
    self.assertFalse((folder / 'adapter').exists())

  def test_best_weights_leave(self):
    """After early stopping what is merged, and exported, is the best."""
    flags = dict(
        early_stopping=1,
        learning_rate=1.0,
        num_evals=12,
        num_steps=24,
        warmup=2,
        watch_data=FOLDER / 'watched.txt',
    )
    folder, out = tune('early', **flags)
    told = summary(folder)
    self.assertTrue(told['stopped'])
    self.assertLess(told['best_step'], told['step'])
    best = min(
        (line['validation_loss'], line['step'])
        for line in lines(folder)
        if 'validation_loss' in line and line['step']
    )
    self.assertEqual(best[1], told['best_step'])
    np.testing.assert_allclose(
        loss_of(folder / 'merged'), told['validation_loss'], rtol=1e-4
    )
    np.testing.assert_allclose(best[0], told['validation_loss'], rtol=1e-4)
    base = hf.load(FOLDER / 'model', scan_layers=True)
    params, _ = served._with_adapters(base, [str(folder / 'adapter')], None)
    after = hf.load(folder / 'merged', scan_layers=True).params
    np.testing.assert_allclose(
        logits(base.config, params),
        logits(base.config, after),
        rtol=2e-3,  # At such a rate weights are some tens, and so are roundings.
        atol=2e-3,
    )
    self.assertIn(f'the weights those of {told["best_step"]}', out)
    self.assertEqual(tuned.step_of(folder / 'merged'), told['best_step'])
    recipe = recipes.load_recipe(folder / 'recipe')
    self.assertEqual(recipe.num_steps, told['best_step'])
    base = hf.load(FOLDER / 'model', scan_layers=True).params
    made = recipes.replay(base, recipe)
    for path, leaf in matrices.named_leaves(made).items():
      np.testing.assert_array_equal(leaf, weights(folder / 'merged')[path])
    tune('early', **flags)  # It is over: nothing is refused.

  def test_goes_on_from_an_earlier_run(self):
    first, *_ = chain_run()
    folder, _ = tune('second', model=first, watch_data=FOLDER / 'watched.txt')
    begun, ended = lines(folder)[0], summary(first)
    np.testing.assert_allclose(
        begun['validation_loss'], ended['validation_loss'], rtol=1e-5
    )
    config = tuned.read_config(folder)
    self.assertEqual(config.task.kwargs.model, str(first / 'merged'))
    bare = FOLDER / 'bare'
    shutil.copytree(first, bare)
    shutil.rmtree(bare / 'merged')
    words = finetune_runs.command(FOLDER, FOLDER / 'third', model=bare)
    _, error = blora(*words)
    self.assertRegex(error, f'Expected merged weights in {bare}.*blora merge')

  def test_longer(self):
    """At a constant rate a run goes on, once the shorter one's exports are away."""
    flags = dict(schedule='constant')
    folder, _ = tune('longer', **flags)
    words = finetune_runs.command(FOLDER, folder, num_steps=24, **flags)
    _, error = blora(*words)
    self.assertRegex(error, 'merged, which is of step 12 where this run has 24')
    for name in ('merged', 'adapter'):
      (folder / name).rename(folder / f'{name}_12')
    _, error = blora(*words)
    self.assertEqual(error, '')
    whole, _ = tune('whole', num_steps=24, num_evals=8, **flags)
    for path, leaf in weights(whole / 'merged').items():
      np.testing.assert_array_equal(leaf, weights(folder / 'merged')[path])

  def test_devices_share_a_batch(self):
    flags = dict(batch_size=8, num_steps=6, num_evals=2)
    one, _ = tune('one_device', **flags)
    with watched_memory() as seen:
      many, _ = tune('devices', parallel='jit', **flags)
    for name, sets, _ in seen:
      self.assertLess(sets, 0.25 if name == 'load' else 1.25, name)
    for line, other in zip(lines(one), lines(many), strict=True):
      self.assertEqual(line['step'], other['step'])
      for name in ('loss', 'validation_loss'):
        if name in line:
          np.testing.assert_allclose(line[name], other[name], rtol=1e-4)

  def test_without_evaluations(self):
    folder, out = tune('blind', eval_fraction=0, export='merged')
    self.assertNotIn('validation_loss', summary(folder))
    self.assertNotIn('perplexity', out)
    self.assertIn('self_attn/q_proj', out[out.index('Merges') :])
    self.assertFalse((folder / 'adapter').exists())


@pytest.mark.slow
class EndTest(parameterized.TestCase):
  """Runs that end otherwise than well."""

  def test_diverged(self):
    folder = FOLDER / 'diverged'
    flags = dict(learning_rate=1e30, checkpoint_every=1)
    words = finetune_runs.command(FOLDER, folder, **flags)
    for _ in range(2):
      _, error = blora(*words)
      self.assertRegex(error, '^DivergedError: Expected a finite loss, got nan')
      self.assertRegex(error, 'It is that of step 1, which blora merge')
      self.assertNotIn('\n', error)
    self.assertFalse((folder / 'merged').exists())
    _, error = blora('merge', folder)
    self.assertEqual(error, '')
    self.assertEqual(tuned.step_of(folder / 'merged'), 1)

  @parameterized.parameters('checkpoint', 'merged', 'adapter')
  def test_full_disk_loses_nothing(self, what):
    """As far as a process sees: the second write of a kind fails."""
    whole, _ = tune('unbroken')
    folder = FOLDER / f'full_{what}'
    words = finetune_runs.command(FOLDER, folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    count = 0

    def limited(function):
      def call(*args, **kwargs):
        nonlocal count
        count += 1
        if what != 'checkpoint' or count == 2:
          resource.setrlimit(resource.RLIMIT_FSIZE, (least, limits[1]))
        try:
          return function(*args, **kwargs)
        finally:
          resource.setrlimit(resource.RLIMIT_FSIZE, limits)

      return call

    # Bytes: above those of a tokenizer, below those of tensors.
    place, name, least = {
        'checkpoint': (checkpoint.Checkpointer, 'save', 9_000),
        'merged': (tuned, 'save_merged', 50_000),
        'adapter': (tuned, 'save_adapter', 9_000),
    }[what]
    with mock.patch.object(place, name, limited(getattr(place, name))):
      out, error = blora(*words)
    self.assertRegex(error, '^OSError: Expected to write .*(checkpoint|model)')
    self.assertRegex(error, 'File too large')
    self.assertNotIn('\n', error)
    self.assertNotIn('Traceback', out)
    stray = [p for p in folder.rglob('*') if p.name.startswith('.')]
    stray += list(folder.rglob('*tmp*'))
    self.assertEqual(stray, [])
    steps = [p.name for p in (folder / 'checkpoints').iterdir()]
    self.assertEqual(steps, ['3' if what == 'checkpoint' else '12'])
    self.assertEqual(blora(*words)[1], '')
    for path, leaf in weights(whole / 'merged').items():
      np.testing.assert_array_equal(leaf, weights(folder / 'merged')[path])
    for one, other in zip(lines(whole), lines(folder), strict=True):
      for line in (one, other):
        line.pop('tokens_per_second', None)
      self.assertEqual(one, other)

  def test_killed(self):
    """A few kills; `python tests/kill_runs.py --finetune` has more."""
    script = pathlib.Path(__file__).parent / 'kill_runs.py'
    subprocess.run(
        [sys.executable, script, '--finetune', '--kills=4', '--steps=60'],
        check=True,
    )
