"""The server: rounds of whoever answers in time, in a directory of a run."""

from collections.abc import Callable
import json
import logging
import pathlib
import secrets
import time
from typing import Any, NamedTuple

from flwr.app import ConfigRecord
from flwr.app import Context
from flwr.app import Message
from flwr.app import MessageType
from flwr.app import RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp import ServerApp
import jax
import numpy as np
import wire  # pyrefly: ignore  (Flower puts this folder on the path)

from bernoulli_lora_jax import files
from bernoulli_lora_jax import wire as wire_lib
from bernoulli_lora_jax.training import checkpoint
from bernoulli_lora_jax.training import metrics_log
from bernoulli_lora_jax.training import parties as parties_lib

app = ServerApp()
_POLL = 0.5  # Seconds.
_GONE = (3, 4, 5)  # Flower's codes of messages that nobody answered.


class ServerState(NamedTuple):
  """What a stopped run goes on from."""

  job: int  # Names the files of the clients.
  round: int  # Rounds done.
  view: Any
  memory: Any
  tickets: np.ndarray  # Of each client's last accepted payload, or -1.
  bits_up: int  # Sent by clients, accepted payloads alone.
  bits_down: int  # Sent to them.
  seconds: float


class Reply(NamedTuple):
  """A valid payload and who sent it."""

  node: int
  ticket: int
  payload: parties_lib.Payload


@app.main()
def main(grid: Grid, context: Context) -> None:
  """Runs the rounds that are not done yet."""
  logging.getLogger('flwr').propagate = False  # Orbax logs at the root, too.
  options: Any = context.run_config
  config = wire.load_config(context)
  workdir = pathlib.Path(options['workdir'])
  if not workdir.is_absolute():
    raise ValueError(f'Expected an absolute workdir, got workdir={workdir}.')
  checkpoint.check_config(workdir, json.loads(config.to_json_best_effort()))
  parties = parties_lib.make_parties(config)
  state = load(workdir / 'state.npz', parties)
  nodes = Nodes(grid, wire.fingerprint(config), options)
  every = max(1, parties.num_rounds // config.training.num_evals)
  with metrics_log.MetricsLog(workdir, state.round, events=False) as metrics:
    if state.round == 0:
      metrics.write(0, evaluate(parties, state))
    if state.round < parties.num_rounds:
      nodes.wait(options['min-nodes'])
    while state.round < parties.num_rounds:
      state, line = advance(state, parties, nodes)
      if state.round % every == 0 or state.round == parties.num_rounds:
        line |= evaluate(parties, state)
      metrics.write(state.round, line)
      # Before any client can hear of the round.
      wire.save(workdir / 'state.npz', wire_lib.flatten(state))
  params = parties.params(state.view)
  wire.save(workdir / 'params.npz', wire_lib.flatten(params))
  summary = {
      'step': state.round,
      'seconds': state.seconds,
      'bits_up': state.bits_up,
      'bits_down': state.bits_down,
      'device': jax.devices()[0].device_kind,
      **parties.evaluate(params),
  }
  files.write_json(workdir / 'summary.json', summary)


def load(path: pathlib.Path, parties: parties_lib.Parties) -> ServerState:
  """Returns the state of a stopped run, or of a new one."""
  tickets = np.full(parties.num_clients, -1)
  make = lambda view, memory: ServerState(
      secrets.randbits(62), 0, view, memory, tickets, 0, 0, 0.0
  )
  arrays = wire.load(path)
  if arrays is None:
    return make(parties.init(), parties.init_server())
  like = make(jax.eval_shape(parties.init), jax.eval_shape(parties.init_server))
  return wire_lib.unflatten(arrays, like)


def evaluate(
    parties: parties_lib.Parties, state: ServerState
) -> dict[str, Any]:
  """Returns the metrics of all splits but the test split."""
  found = parties.evaluate(parties.params(state.view))
  return {k: v for k, v in found.items() if not k.startswith('test_')}


def advance(
    state: ServerState, parties: parties_lib.Parties, nodes: 'Nodes'
) -> tuple[ServerState, dict[str, Any]]:
  """Returns the state after a round, and its metrics."""
  begun = time.perf_counter()
  view = parties.begin(state.view)
  check = lambda payload: parties.check(view, payload)
  replies, sent = nodes.collect(state, check)
  payloads = {client: reply.payload for client, reply in replies.items()}
  broadcast, memory = parties.combine(view, state.memory, payloads)
  nodes.history[state.round] = broadcast
  up = sum(map(parties_lib.size, payloads.values()))
  tickets = state.tickets.copy()
  for client, reply in replies.items():
    tickets[client] = reply.ticket
  new = state._replace(
      round=state.round + 1,
      view=parties.apply(view, broadcast),
      memory=memory,
      tickets=tickets,
      bits_up=state.bits_up + up,
      bits_down=state.bits_down + sent,
      seconds=state.seconds + time.perf_counter() - begun,
  )
  line = {
      'num_participants': len(payloads),
      'participants': sorted(payloads),
      'bits_up': new.bits_up,
      'bits_down': new.bits_down,
      'round_bits_up': up,
      'round_bits_down': sent,
      'seconds': new.seconds,
  }
  log(logging.INFO, 'Round %d: %s', new.round, line)
  return new, line


class Nodes:
  """The nodes of a run: who is there, what each has seen, whose client it is."""

  def __init__(self, grid: Grid, config: str, options: Any):
    self.history: dict[int, parties_lib.Payload] = {}  # Broadcasts by round.
    self._grid, self._config, self._options = grid, config, options
    self._seen: dict[int, int] = {}  # Round of the view of a node.
    self._client: dict[int, int] = {}  # That a node speaks for.
    self._silent: set[int] = set()  # Asked, but nobody waits for them.
    self._late: dict[str, int] = {}  # Node of a message without its reply.

  def wait(self, least: int) -> None:
    """Returns once there are that many nodes."""
    while len(set(self._grid.get_node_ids())) < least:
      time.sleep(_POLL)

  def collect(
      self,
      state: ServerState,
      check: Callable[[parties_lib.Payload], None],
  ) -> tuple[dict[int, Reply], int]:
    """Returns the valid replies of a round by client, and the bits sent.

    Raises:
      RuntimeError: too few of them, again and again.
    """
    view = wire_lib.flatten({'view': state.view})
    size = lambda arrays: sum(map(parties_lib.size, arrays))
    while size(self.history.values()) > parties_lib.size(view):
      self.history.pop(min(self.history))  # The view is smaller.
    least, sent = self._options['min-replies'], 0
    for _ in range(self._options['max-attempts']):
      replies, bits = self._attempt(state, view, check, least)
      sent += bits
      if len(replies) >= least:
        return replies, sent
      log(
          logging.WARNING,
          'Round %d: %d valid payloads, %d needed; it is repeated.',
          state.round + 1,
          len(replies),
          least,
      )
    raise RuntimeError(
        f'Expected at least min-replies={least} valid payloads in round'
        f' {state.round + 1}, got fewer in max-attempts='
        f'{self._options["max-attempts"]} attempts.'
    )

  def _attempt(self, state, view, check, least):
    """Asks every node once; ends when all but the silent have answered."""
    timeout = self._options['round-timeout']
    end = time.monotonic() + timeout
    asked: dict[str, int] = {}  # Node of a message that has no reply yet.
    told: set[int] = set()
    replies: dict[int, Reply] = {}
    sent = 0
    while time.monotonic() < end:
      online = set(self._grid.get_node_ids())
      for node in sorted(online - told):
        told.add(node)
        content, bits = self._order(state, view, node)
        left = max(1.0, end - time.monotonic())
        message = Message(
            content,
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            group_id=str(state.round),
            ttl=left,
        )
        (number,) = self._grid.push_messages([message])
        if number:  # '' where the node has gone.
          asked[number] = node
          sent += bits
      for message in self._grid.pull_messages([*asked, *self._late]):
        number = message.metadata.reply_to_message_id
        if number in asked:
          node = asked.pop(number)
          self._receive(node, message, state, check, replies, online)
        else:
          node = self._late.pop(number)
          if not message.has_error():  # It lives: wait for it again.
            self._silent.discard(node)
      is_enough = len(replies) >= least or (told and not asked)
      if is_enough and not set(asked.values()) - self._silent:
        break
      time.sleep(_POLL)
    for node in sorted(set(asked.values()) - self._silent):
      self._ignore(state.round, node, f'no reply in {timeout:g} s')
    self._late |= asked
    return replies, sent

  def _order(self, state, view, node):
    """Returns what a node is sent, and the bits of its arrays."""
    order = {
        'job': state.job,
        'round': state.round,
        'config': self._config,
        'accepted': state.tickets.tolist(),
    }
    missed = range(self._seen.get(node, 0), state.round)
    if all(t in self.history for t in missed):
      arrays = {f'broadcast {t}': self.history[t] for t in missed}
    else:
      arrays = {'view': view}
    records = {name: wire.to_record(x) for name, x in arrays.items()}
    content = RecordDict({'order': ConfigRecord(order), **records})
    return content, sum(map(parties_lib.size, arrays.values()))

  def _receive(self, node, message, state, check, replies, online):
    """Adds a valid reply to the replies; logs one that is not."""
    if message.has_error() and message.error.code in _GONE:
      self._ignore(state.round, node, 'it has gone')
      return
    self._silent.discard(node)
    if message.has_error():
      self._seen[node] = -1  # Whatever it lacks, a whole view has it.
      self._reject(state.round, node, None, message.error.reason)
      return
    client = None
    try:
      facts = message.content['facts']
      client = int(facts['client'])
      if not 0 <= client < len(state.tickets):
        raise ValueError(f'client {client} does not exist')
      if facts['round'] != state.round:
        raise ValueError(f'of round {facts["round"] + 1}')
      if self._client.setdefault(node, client) != client:
        raise ValueError(f'the node is client {self._client[node]}')
      twins = [n for n, c in self._client.items() if c == client and n != node]
      if client in replies or (set(twins) & online - self._silent):
        raise ValueError('another node is this client')
      payload = wire.from_record(message.content['payload'])
      check(payload)
      replies[client] = Reply(node, int(facts['ticket']), payload)
      self._seen[node] = state.round
    except Exception as e:  # Whatever a node sends, the round goes on.
      self._reject(state.round, node, client, e)

  def _ignore(self, round_, node, why):
    if node not in self._silent:
      log(logging.WARNING, 'Round %d: node %d: %s.', round_ + 1, node, why)
    self._silent.add(node)

  def _reject(self, round_, node, client, why):
    log(
        logging.WARNING,
        'Rejected node %d, client %s, in round %d: %s',
        node,
        client,
        round_ + 1,
        why,
    )
