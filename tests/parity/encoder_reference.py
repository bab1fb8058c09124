"""The reference of encoders: checkpoints run by transformers on PyTorch."""

import encoders
import numpy as np
import torch
import transformers


def load(folder, dtype=torch.float32):
  """Returns the model of a folder, of the class that its config names."""
  transformers.utils.logging.disable_progress_bar()
  config = transformers.AutoConfig.from_pretrained(folder)
  kind = getattr(transformers, config.architectures[0])
  if config.architectures[0].endswith('ForMaskedLM'):
    kind = transformers.AutoModel  # The encoder alone.
  return kind.from_pretrained(
      folder, dtype=dtype, attn_implementation='eager'
  ).eval()


def results(folder, batch, dtype=torch.float32):
  """Returns (values, gradients by the name of a tensor).

  Values: hidden states, what a row becomes (the pooler's where the model has one,
  else the first hidden state), logits of a classifier, and a loss: that of the
  labels, or without a head a sum of hidden states times `encoders.slope`.
  """
  model = load(folder, dtype)
  given = {
      'input_ids': torch.tensor(batch['tokens']).long(),
      'attention_mask': torch.tensor(batch['mask']).long(),
      'token_type_ids': torch.tensor(batch['types']).long(),
  }
  is_classifier = hasattr(model, 'classifier')
  base = model.base_model(**given)
  found = {'hidden': base.last_hidden_state}
  pooled = base.pooler_output if base.pooler_output is not None else None
  has_pooler = pooled is not None and _is_stored(folder)
  found['pooled'] = pooled if has_pooler else found['hidden'][:, 0]
  if is_classifier:
    labels = torch.tensor(batch['labels']).long()
    out = model(**given, labels=labels)
    found['logits'], loss = out.logits, out.loss
  else:
    slope = torch.tensor(encoders.slope(found['hidden'].shape)).to(dtype)
    loss = torch.sum(found['hidden'] * slope)
  found['loss'] = loss
  loss.backward()
  grads = {
      name: np.zeros(x.shape) if x.grad is None else x.grad.numpy()
      for name, x in model.named_parameters()
  }
  return {k: v.detach().numpy() for k, v in found.items()}, grads


def _is_stored(folder):
  """Returns whether a pooler comes from the folder: else it is drawn at random."""
  names = encoders.safetensors.load_file(folder / 'model.safetensors')
  return any('pooler' in name for name in names)
