"""The reference: checkpoints run by transformers on PyTorch, in float32."""

from unittest import mock

import numpy as np
import torch
import transformers


def load(folder, dtype=torch.float32, attention='eager'):
  """Returns the model of a folder."""
  transformers.utils.logging.disable_progress_bar()
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=dtype, attn_implementation=attention
  ).eval()


def ids(tokens):
  """Returns tokens, or positions, as PyTorch takes them."""
  return torch.tensor(np.asarray(tokens)).long()


def logits(model, tokens, positions=None):
  """Returns logits of tokens, at positions other than 0, 1, ... where given."""
  positions = None if positions is None else ids(positions)
  with torch.no_grad():
    return model(ids(tokens), position_ids=positions).logits.float().numpy()


def frequencies(raw):
  """Returns radians a position of each pair of features; raw: of config.json."""
  config = transformers.CONFIG_MAPPING[raw['model_type']].from_dict(raw)
  model = transformers.AutoModelForCausalLM.from_config(config)
  return model.model.rotary_emb.inv_freq.numpy()


def results(folder, tokens, layer=1):
  """Returns logits, loss and the gradient of one kernel, (in, out)."""
  model = load(folder)
  given = ids(tokens)
  out = model(given, labels=given)
  out.loss.backward()
  return _results(model, out.logits, out.loss, layer)


def results_in_float64(folder, tokens, tables=None, layer=1):
  """Returns the same in float64.

  The published code makes the tables of rotary positions, the squares of RMSNorm
  and the softmax of attention in float32 whatever the dtype of a model.

  Args:
    folder: of the checkpoint.
    tokens: (b, s).
    tables: cosines and sines (1, s, head_dim); where they are given they replace
      the model's own, and all else is in float64.
    layer: of the gradient.
  """
  model = load(folder, torch.float64)
  given = ids(tokens)
  if tables is None:
    logits = model(given).logits
  else:
    cos, sin = (torch.tensor(np.array(x, np.float64)) for x in tables)
    model.model.rotary_emb.forward = lambda x, position_ids: (cos, sin)
    with mock.patch.object(torch, 'float32', torch.float64):
      logits = model(given).logits
  loss = torch.nn.functional.cross_entropy(
      logits[:, :-1].flatten(0, 1), given[:, 1:].flatten()
  )
  loss.backward()
  return _results(model, logits, loss, layer)


def _results(model, logits, loss, layer):
  kernel = model.model.layers[layer].self_attn.q_proj.weight
  return {
      'logits': logits.detach().numpy(),
      'loss': loss.detach().numpy(),
      'grad': kernel.grad.numpy().T,
  }
