"""Tests of launch/federated_flower: real processes on the loopback interface."""

import importlib
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import types
import unittest
from unittest import mock
import urllib.request

import jax
import numpy as np
import pytest

from bernoulli_lora_jax import matrices
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import parties as parties_lib

pytest.importorskip('flwr', reason='flwr, extra `federated`, is not installed.')
pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_APP = _ROOT / 'launch' / 'federated_flower'
_CONFIG = _ROOT / 'configs' / 'federated.py'
_BIN = pathlib.Path(sys.executable).parent
_LONG = 300.0  # Seconds after which a network is taken for hanging.
# Weights are of size one and computed in float32 by the same programs; sums over
# clients in another order differ in the last bits: 5 rounds of 1e-7.
_TOLERANCE = 1e-6


class Network:
  """A SuperLink, SuperNodes and a user of them; a context manager."""

  def __init__(self, certificates=None):
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='flower'))
    self.certificates = certificates
    self.port = _free_port()
    self.processes = {}
    self.env = {
        **os.environ,
        'FLWR_HOME': str(self.folder / 'home'),
        'FLWR_TELEMETRY_ENABLED': '0',
        'FLWR_DISABLE_UPDATE_CHECK': '1',
        'FLWR_SUPEREXEC_TASK_POLL_INTERVAL': '0.1',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'NO_PROXY': '127.0.0.1',
        'PATH': f'{_BIN}{os.pathsep}{os.environ["PATH"]}',
        'PYTHONUNBUFFERED': '1',
        # A client is a small program: more threads only contend.
        'OMP_NUM_THREADS': '1',
        'OPENBLAS_NUM_THREADS': '1',
    }
    self.trust = 'insecure = true'
    if certificates:
      self.trust = f'root-certificates = "{certificates}/ca.crt"'
    self.write_connection(self.trust)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    for name in self.processes:
      self.kill(name, signal.SIGTERM)
    end = time.monotonic() + 5
    for process in self.processes.values():
      try:
        process.wait(max(0.1, end - time.monotonic()))
      except subprocess.TimeoutExpired:
        pass
    for name, process in self.processes.items():
      self.kill(name)
      process.wait()
    shutil.rmtree(self.folder, ignore_errors=True)

  def write_connection(self, trust):
    path = self.folder / 'home' / 'config.toml'
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        '[superlink]\ndefault = "test"\n\n[superlink.test]\n'
        f'address = "127.0.0.1:{self.port}"\n{trust}\n'
    )

  def spawn(self, name, program, *args):
    with (self.folder / f'{name}.log').open('wb') as log:
      self.processes[name] = subprocess.Popen(
          [_BIN / program, *map(str, args)],
          stdout=log,
          stderr=subprocess.STDOUT,
          stdin=subprocess.DEVNULL,
          env=self.env,
          cwd=self.folder,
          start_new_session=True,
      )
    return self.processes[name]

  def log(self, name):
    text = (self.folder / f'{name}.log').read_text(errors='replace')
    return re.sub(r'\x1b\[[0-9;]*m', '', text)

  def kill(self, name, number=signal.SIGKILL):
    """Ends the whole process group."""
    try:
      os.killpg(self.processes[name].pid, number)
    except ProcessLookupError:
      pass

  def start_link(self):
    args = ['--host', '127.0.0.1', '--port', self.port]
    args += ['--disable-runtime-dependency-installation']
    context = None
    if self.certificates:
      args += ['--ssl-ca-certfile', f'{self.certificates}/ca.crt']
      args += ['--ssl-certfile', f'{self.certificates}/server.pem']
      args += ['--ssl-keyfile', f'{self.certificates}/server.key']
      args += ['--enable-supernode-auth']
      context = ssl.create_default_context(cafile=f'{self.certificates}/ca.crt')
    else:
      args += ['--insecure']
    process = self.spawn('link', 'flower-superlink', *args)
    scheme = 'https' if self.certificates else 'http'
    url = f'{scheme}://127.0.0.1:{self.port}/health'

    def is_up():
      assert process.poll() is None, self.log('link')
      try:
        urllib.request.urlopen(url, timeout=5, context=context).close()
        return True
      except OSError:
        return False

    _wait(is_up, 'the SuperLink')

  def start_node(self, client, name=None, trusts=True, key=None):
    args = ['--superlink', f'127.0.0.1:{self.port}', '--host', '127.0.0.1']
    args += ['--port', _free_port(), '--node-config']
    args += [f'partition-id={client} state-dir="{self.folder}/state"']
    if not self.certificates:
      args += ['--insecure']
    elif trusts:
      args += ['--root-certificates', f'{self.certificates}/ca.crt']
    if key is not None:
      args += ['--auth-supernode-private-key', f'{self.certificates}/{key}']
    return self.spawn(name or f'node{client}', 'flower-supernode', *args)

  def flwr(self, *args):
    """Returns what the command line says, as JSON; it exits 0 in any case."""
    done = subprocess.run(
        [_BIN / 'flwr', *map(str, args), '--format', 'json'],
        env=self.env,
        cwd=self.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LONG,
    )
    return json.loads(done.stdout or '{}') | {'stderr': done.stderr}

  def submit(self, variant, overrides, app=_APP, name=None, **options):
    """Starts a run; returns its number and its directory."""
    workdir = self.folder / (name or variant)
    options = {
        'config': f'{_CONFIG}:{variant}',
        'overrides': json.dumps(_overrides(overrides)),
        'workdir': str(workdir),
        'min-nodes': 3,
        'min-replies': 1,
        'round-timeout': 120.0,
        **options,
    }
    text = ' '.join(
        f"{k}='{v}'" if isinstance(v, str) else f'{k}={v}'
        for k, v in options.items()
    )
    answer = self.flwr('run', app, 'test', '--run-config', text)
    assert answer.get('success'), answer
    return answer['run-id'], workdir

  def finish(self, run):
    """Returns the log of the server once the run has completed."""
    status = lambda: self.flwr('list', 'test', '--run-id', run)['runs'][0]
    _wait(
        lambda: status()['status'].startswith('finished'), 'the run', every=2.0
    )
    shown = subprocess.run(
        [_BIN / 'flwr', 'log', str(run), 'test', '--show'],
        env=self.env,
        capture_output=True,
        text=True,
        timeout=_LONG,
    )
    log = re.sub(r'\x1b\[[0-9;]*m', '', shown.stdout)
    logs = ''.join(self.log(n)[-3000:] for n in self.processes)
    found = status()
    assert found['status'] == 'finished:completed', f'{found}\n{log}\n{logs}'
    print(log)
    return log


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _wait(is_done, what, every=0.1):
  end = time.monotonic() + _LONG
  while not is_done():
    assert time.monotonic() < end, f'Waited {_LONG} s for {what}.'
    time.sleep(every)


def _overrides(overrides):
  return {
      'training.num_evals': 1,
      'task.pretrain_epochs': 2,
      'federated.num_clients': 3,
      **overrides,
  }


def _config(variant, overrides):
  config = runpy.run_path(str(_CONFIG))['get_config'](variant)
  return experiment.apply_overrides(config, _overrides(overrides))


def _lines(workdir):
  """Returns the metrics of each round."""
  try:
    text = (workdir / 'metrics.jsonl').read_text()
  except FileNotFoundError:
    return []
  return [json.loads(line) for line in text.splitlines()[1:]]


def _flat(params):
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  names = matrices.path_names([path for path, _ in leaves])
  return {n: np.asarray(x) for n, (_, x) in zip(names, leaves, strict=True)}


def _by_parties(config, participants):
  """Returns the weights after rounds in which these clients took part."""
  parties = parties_lib.make_parties(config)
  view, server = parties.init(), parties.init_server()
  memory = [parties.init_client() for _ in range(parties.num_clients)]
  for present in participants:
    view = parties.begin(view)
    payloads = {}
    for i in present:
      payloads[i], memory[i] = parties.reply(view, memory[i], i)
    broadcast, server = parties.combine(view, server, payloads)
    view = parties.apply(view, broadcast)
  return _flat(parties.params(view))


def _simulated(config):
  """Returns the weights, and bits up and down a round, of one process."""
  program = experiment.make_program(config)
  key = jax.random.key(config.seed)
  state = program.put(program.start(key))
  rounds = config.training.num_steps
  run = program.jit(rounds, state)
  state, metrics = run(program.data, state, key, 0)
  bits = [metrics[f'round_bits_{way}'].tolist() for way in ('up', 'down')]
  return _flat(program.params(state)), *bits


def _assert_weights(workdir, expected):
  with np.load(workdir / 'params.npz') as stored:
    found = dict(stored)
  assert found.keys() == expected.keys()
  for path, x in expected.items():
    assert np.isfinite(found[path]).all()
    np.testing.assert_allclose(found[path], x, rtol=0, atol=_TOLERANCE)


class FlowerTest(unittest.TestCase):
  """Three nodes without TLS."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.network = cls.enterClassContext(Network())
    cls.network.start_link()
    for client in range(3):
      cls.network.start_node(client)

  def test_adapters_equal_the_simulation(self):
    # Clients of different sizes: it shows who computes for whom.
    variant, overrides = 'bernoulli,dirichlet', {'training.num_steps': 5}
    run, workdir = self.network.submit(variant, overrides)
    self.network.finish(run)
    lines = _lines(workdir)
    weights, up, down = _simulated(_config(variant, overrides))
    _assert_weights(workdir, weights)
    self.assertEqual([line['participants'] for line in lines], [[0, 1, 2]] * 5)
    self.assertEqual([line['round_bits_up'] for line in lines], up)
    # The mean of a round travels with the order of the next one.
    sent = [line['round_bits_down'] for line in lines]
    self.assertEqual(sent, [0, *down[:-1]])
    summary = json.loads((workdir / 'summary.json').read_text())
    self.assertEqual(summary['step'], 5)
    self.assertEqual(summary['bits_up'], sum(up))
    self.assertIn('test_accuracy', summary)
    self.assertNotIn('test_accuracy', lines[-1])
    self.assertIn('validation_accuracy', lines[-1])

  def test_resumed_ef21_equals_the_simulation(self):
    run, workdir = self.network.submit('ef21', {'training.num_steps': 3})
    self.network.finish(run)
    overrides = {'training.num_steps': 5}
    run, _ = self.network.submit('ef21', overrides)
    self.network.finish(run)
    lines = _lines(workdir)
    weights, up, down = _simulated(_config('ef21', overrides))
    _assert_weights(workdir, weights)
    self.assertEqual([line['participants'] for line in lines], [[0, 1, 2]] * 5)
    self.assertEqual([line['round_bits_up'] for line in lines], up)
    sent = [line['round_bits_down'] for line in lines]
    # A server that has been resumed sends its view.
    self.assertEqual(sent[:3] + sent[4:], [0, *down[:2], down[3]])
    self.assertGreater(sent[3], down[2])

  def test_bad_payloads_are_rejected_and_the_round_goes_on(self):
    app = self.network.folder / 'faulty_app'
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(_APP, app, ignore=ignore)
    (app / 'faulty.py').write_text(_FAULTY)
    project = app / 'pyproject.toml'
    text = project.read_text()
    self.assertIn('"client_app:app"', text)
    project.write_text(text.replace('"client_app:app"', '"faulty:app"'))
    overrides = {'training.num_steps': 3}
    run, workdir = self.network.submit('ef21', overrides, app, 'faulty')
    log = self.network.finish(run)
    participants = [line['participants'] for line in _lines(workdir)]
    self.assertEqual(participants, [[0], [0], [0, 1, 2]])
    for client, round_, why in (
        (1, 1, 'Expected finite numbers'),
        (2, 1, 'Expected /Dense_0/kernel of'),
        (1, 2, 'of round 3'),
        (0, 2, 'the node is client 2'),
    ):
      self.assertRegex(
          log,
          rf'WARNING.*Rejected node \d+, client {client}, in round'
          rf' {round_}: {why}',
      )
    self.assertEqual(log.count('Rejected'), 4)
    # Who was rejected goes on from the memory that the server knows of.
    expected = _by_parties(_config('ef21', overrides), participants)
    _assert_weights(workdir, expected)


_FAULTY = """
import client_app
from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp
import numpy as np

app = ClientApp()


@app.train()
def train(message, context):
  reply = client_app.train(message, context)
  facts, payload = reply.content['facts'], reply.content['payload']
  client, round_ = facts['client'], facts['round']
  path = sorted(payload)[0]
  if (client, round_) == (1, 0):
    x = payload[path].numpy()
    payload[path] = Array(np.full_like(x, np.nan))
  if (client, round_) == (2, 0):
    payload[path] = Array(payload[path].numpy()[:-1])
  if (client, round_) == (1, 1):
    facts['round'] = 2
  if (client, round_) == (2, 1):
    facts['client'] = 0
  return reply
"""


def test_a_killed_node_is_missed_and_comes_back():
  with Network() as network:
    network.start_link()
    for client in range(3):
      network.start_node(client)
    overrides = {'training.num_steps': 5}
    run, workdir = network.submit('ef21', overrides)
    _wait(lambda: len(_lines(workdir)) == 1, 'round 2')
    network.kill('node1')
    _wait(lambda: len(_lines(workdir)) >= 2, 'the end of round 2')
    begun = time.monotonic()
    _wait(lambda: len(_lines(workdir)) >= 3, 'the end of round 3')
    # Nobody waits for it again.
    assert time.monotonic() - begun < 60
    network.start_node(1, 'node1 again')
    log = network.finish(run)
    participants = [line['participants'] for line in _lines(workdir)]
    assert participants[:3] == [[0, 1, 2], [0, 2], [0, 2]]
    assert participants[4] == [0, 1, 2]
    # Our own time-out, or the SuperLink's, which hears no heartbeat.
    assert re.search(r'WARNING.*Round 2: node \d+: (no reply|it has gone)', log)
    assert log.count('WARNING') == 1
    # What the dead client had sent still counts; it goes on from its file.
    expected = _by_parties(_config('ef21', overrides), participants)
    _assert_weights(workdir, expected)


def test_tls_and_keys_are_needed(tmp_path):
  script = _APP / 'generate_certificates.py'
  flags = [f'--directory={tmp_path}', '--num_nodes=3']
  subprocess.run([sys.executable, script, *flags], check=True)
  with Network(tmp_path) as network:
    network.start_link()
    for i in range(2):
      public = tmp_path / f'node{i}.pub'
      answer = network.flwr('supernode', 'register', public, 'test')
      assert answer.get('success'), answer
      network.start_node(i, key=f'node{i}.key')
    overrides = {'training.num_steps': 2, 'federated.num_clients': 2}
    run, workdir = network.submit('bernoulli', overrides, **{'min-nodes': 2})
    refused = {
        'unregistered': (
            network.start_node(2, 'unregistered', key='node2.key'),
            'Failed to activate SuperNode',
        ),
        'keyless': (
            network.start_node(2, 'keyless'),
            'SuperNode authentication is enabled',
        ),
        'distrusting': (
            network.start_node(2, 'distrusting', False, 'node0.key'),
            'CERTIFICATE_VERIFY_FAILED',
        ),
    }
    for name, (process, why) in refused.items():
      assert process.wait(_LONG), name
      assert why in network.log(name)
    network.finish(run)
    assert [line['participants'] for line in _lines(workdir)] == [[0, 1]] * 2
    config = _config('bernoulli', overrides)
    _assert_weights(workdir, _simulated(config)[0])
    network.write_connection('insecure = true')
    assert not network.flwr('list', 'test').get('success')


class Grid:
  """Nodes that answer as scripted: (node, round, attempt) -> facts or None."""

  def __init__(self, nodes, answer):
    self.nodes, self.answer = nodes, answer
    self.orders = []  # (node, names of the records).
    self._replies = {}

  def get_node_ids(self):
    return self.nodes

  def push_messages(self, messages):
    (message,) = messages
    node, content = message.dst_node_id, message.content
    self.orders.append((node, sorted(set(content) - {'order'})))
    number = str(len(self.orders))
    client = self.answer(node, content['order']['round'])
    if client is not None:
      facts = {'round': content['order']['round'], 'ticket': 7}
      self._replies[number] = {'facts': facts | {'client': client}}
      self._replies[number]['payload'] = {}
    return [number]

  def pull_messages(self, numbers):
    for number in set(numbers) & self._replies.keys():
      yield types.SimpleNamespace(
          metadata=types.SimpleNamespace(reply_to_message_id=number),
          content=self._replies.pop(number),
          has_error=lambda: False,
      )


@pytest.fixture(name='server')
def _server(monkeypatch):
  monkeypatch.syspath_prepend(str(_APP))
  server = importlib.import_module('server_app')
  make = lambda content, **kwargs: types.SimpleNamespace(
      content=content, **kwargs
  )
  monkeypatch.setattr(server, 'Message', make)
  return server


def _collect(server, grid, rounds, **options):
  options = {
      'min-replies': 1,
      'round-timeout': 1.5,
      'max-attempts': 2,
  } | options
  nodes = server.Nodes(grid, 'config', options)
  found = []
  for i in range(rounds):
    view = np.zeros(8, np.float32)
    state = server.ServerState(1, i, view, (), np.full(3, -1), 0, 0, 0.0)
    replies, sent = nodes.collect(state, lambda payload: None)
    found.append((sorted(replies), sent))
    nodes.history[i] = {'w': np.zeros(3, np.float32)}
  return found


def test_too_few_replies_end_the_run(server):
  grid = Grid([10, 11], lambda node, _: 0 if node == 10 else None)
  with mock.patch.object(server, 'log') as log:
    with pytest.raises(RuntimeError, match='min-replies=2 .* in round 1'):
      _collect(server, grid, 1, **{'min-replies': 2})
  repeated = [c for c in log.call_args_list if 'repeated' in c.args[1]]
  assert len(repeated) == 2


def test_who_is_silent_is_asked_but_not_waited_for(server):
  grid = Grid([10, 11], lambda node, _: 0 if node == 10 else None)
  begun = time.monotonic()
  found = _collect(server, grid, 4)
  assert [clients for clients, _ in found] == [[0]] * 4
  assert time.monotonic() - begun < 3.0  # One time-out of 1.5 s, not four.
  assert sum(node == 11 for node, _ in grid.orders) == 4


def test_missed_broadcasts_travel_unless_the_view_is_smaller(server):
  # The view has 256 bits, a broadcast 96: three of them are more.
  grid = Grid([10, 11], lambda node, i: 0 if node == 10 or i == 4 else None)
  found = _collect(server, grid, 4)
  orders = [names for node, names in grid.orders if node == 11]
  missed = [[f'broadcast {i}' for i in range(n)] for n in range(3)]
  assert orders == [*missed, ['view']]
  assert [sent for _, sent in found] == [0, 2 * 96, 96 + 2 * 96, 96 + 256]


def test_a_node_speaks_for_one_client_and_a_client_by_one_node(server):
  grid = Grid([10, 11], lambda node, _: 0)
  with mock.patch.object(server, 'log') as log:
    _collect(server, grid, 1)
    with pytest.raises(RuntimeError):
      _collect(server, Grid([11], lambda node, _: 3), 1)
  reasons = ' '.join(str(c.args[-1]) for c in log.call_args_list)
  assert 'another node is this client' in reasons
  assert 'client 3 does not exist' in reasons


def test_memory_moves_when_the_server_says_so(server):
  del server  # It puts the app on the path.
  client = importlib.import_module('client_app')
  memory, pending = {'w': np.zeros(2)}, {'w': np.ones(2)}
  state = client.ClientState(3, (), 5, memory, 6, pending)
  assert client.confirmed(state, 5).memory is memory
  moved = client.confirmed(state, 6)
  assert moved.memory is pending
  assert moved.ticket == 6
  with pytest.raises(ValueError, match='which is lost'):
    client.confirmed(state, 7)
  stateless = client.ClientState(0, (), -1, (), -1, ())
  assert client.confirmed(stateless, 7).ticket == 7  # Nothing to lose.
