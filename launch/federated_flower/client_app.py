"""A client: one message a round, each in a process of its own.

What a client keeps between rounds is a file in its `state-dir`. The data never
travel: every node deals the examples by the config, and takes the share of its
`partition-id`.
"""

import fcntl
import pathlib
import tempfile
from typing import Any, NamedTuple

from flwr.app import ConfigRecord
from flwr.app import Context
from flwr.app import Message
from flwr.app import RecordDict
from flwr.clientapp import ClientApp
import jax
import numpy as np
import wire  # pyrefly: ignore  (Flower puts this folder on the path)

from bernoulli_lora_jax import wire as wire_lib
from bernoulli_lora_jax.tasks import cache
from bernoulli_lora_jax.training import parties as parties_lib

app = ClientApp()


class ClientState(NamedTuple):
  """What a client keeps."""

  round: int  # Broadcasts that the view has seen.
  view: Any
  ticket: int  # Of its last accepted payload, -1 before the first.
  memory: Any  # After that payload.
  pending_ticket: int  # Of the last payload it sent.
  pending: Any  # Memory after that one, if it is accepted.


@app.train()
def train(message: Message, context: Context) -> Message:
  """Returns this client's payload of the round that the message asks for."""
  config = wire.load_config(context)
  order: Any = message.content['order']
  if order['config'] != wire.fingerprint(config):
    raise ValueError("Expected the server's config on this node, got another.")
  parties = parties_lib.make_parties(config)
  client = int(context.node_config['partition-id'])
  if not 0 <= client < parties.num_clients:
    raise ValueError(
        f'Expected partition-id in [0, {parties.num_clients}), got {client}.'
    )
  default = pathlib.Path(tempfile.gettempdir()) / 'federated_flower'
  folder = pathlib.Path(str(context.node_config.get('state-dir', default)))
  path = folder / f'{order["job"]:x}-{client}.npz'
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.with_suffix('.lock').open('w') as lock:
    # A late order may still be worked on beside the next one.
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = confirmed(load(path, parties), order['accepted'][client])
    state = caught_up(state, parties, message.content)
    view = parties.begin(state.view)
    payload, pending = parties.reply(view, state.memory, client)
    # Of the content: a round that is repeated gives the same.
    content = cache.fingerprint(np.asarray(state.round), *payload.values())
    ticket = int(content, 16) >> 1
    state = state._replace(pending_ticket=ticket, pending=pending)
    wire.save(path, wire_lib.flatten(state))  # Before anybody can accept it.
  facts: Any = {'round': state.round, 'client': client, 'ticket': ticket}
  records = {'payload': wire.to_record(payload), 'facts': ConfigRecord(facts)}
  return Message(RecordDict(records), reply_to=message)


def load(path: pathlib.Path, parties: parties_lib.Parties) -> ClientState:
  """Returns the client's state, a fresh one where there is no file."""
  arrays = wire.load(path)
  if arrays is None:
    memory = parties.init_client()
    return ClientState(0, parties.init(), -1, memory, -1, memory)
  view = jax.eval_shape(parties.init)
  memory = jax.eval_shape(parties.init_client)
  return wire_lib.unflatten(arrays, ClientState(0, view, 0, memory, 0, memory))


def confirmed(state: ClientState, ticket: int) -> ClientState:
  """Returns the state with the memory that the server counts on.

  Args:
    state: of the client.
    ticket: of the client's last accepted payload, from the server.

  Raises:
    ValueError: the memory after that payload is lost.
  """
  if ticket == state.pending_ticket:
    return state._replace(ticket=ticket, memory=state.pending)
  if ticket != state.ticket and jax.tree.leaves(state.memory):
    raise ValueError(
        'Expected the memory after the last accepted payload, which is lost:'
        ' give a state-dir that stays.'
    )
  return state._replace(ticket=ticket)


def caught_up(
    state: ClientState, parties: parties_lib.Parties, content: RecordDict
) -> ClientState:
  """Returns the state at the round of the order.

  Raises:
    ValueError: neither a view nor the broadcasts of all missed rounds came.
  """
  last: Any = content['order']['round']
  if 'view' in content:
    like = {'view': jax.eval_shape(parties.init)}
    found = wire_lib.unflatten(wire.from_record(content['view']), like)
    return state._replace(round=last, **found)
  for missed in range(state.round, last):
    if f'broadcast {missed}' not in content:
      raise ValueError(f'Expected the broadcast of round {missed}, got none.')
    broadcast = wire.from_record(content[f'broadcast {missed}'])
    view = parties.apply(parties.begin(state.view), broadcast)
    state = ClientState(missed + 1, view, *state[2:])
  if state.round != last:
    raise ValueError(f'Expected round {state.round} or later, got {last}.')
  return state
