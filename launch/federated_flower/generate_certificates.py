"""Makes certificates for TLS and the nodes' keys, for trying it out.

  python generate_certificates.py --directory=certificates --num_nodes=3

Writes ca.crt, which nodes and users trust; server.pem and server.key of the
SuperLink; node0.key and node0.pub, ... of the SuperNodes, in OpenSSH's format.
They end after --days; the key of the authority is not kept.
"""

import datetime
import ipaddress
import os
import pathlib

from absl import app
from absl import flags
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import oid

_DIRECTORY = flags.DEFINE_string('directory', 'certificates', 'Where to write.')
_HOSTS = flags.DEFINE_list(
    'hosts', ['localhost', '127.0.0.1'], 'Names or addresses of the SuperLink.'
)
_NUM_NODES = flags.DEFINE_integer('num_nodes', 3, 'Keys of SuperNodes.')
_DAYS = flags.DEFINE_integer('days', 30, 'How long they hold.')


def main(argv: list[str]) -> None:
  del argv
  folder = pathlib.Path(_DIRECTORY.value)
  folder.mkdir(parents=True, exist_ok=True)
  pem = serialization.Encoding.PEM
  openssh = serialization.Encoding.OpenSSH
  private = serialization.PrivateFormat
  nothing = serialization.NoEncryption()

  authority = ec.generate_private_key(ec.SECP256R1())
  name = _name('federated_flower CA')
  ca = (
      _builder(name, name, authority)
      .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
      .add_extension(_usage(signs=True), True)
      .sign(authority, hashes.SHA256())
  )
  key = ec.generate_private_key(ec.SECP256R1())
  server = (
      _builder(_name(_HOSTS.value[0]), name, key)
      .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
      .add_extension(_usage(signs=False), True)
      .add_extension(
          x509.ExtendedKeyUsage([oid.ExtendedKeyUsageOID.SERVER_AUTH]), False
      )
      .add_extension(
          x509.SubjectAlternativeName(list(map(_host, _HOSTS.value))), False
      )
      .add_extension(
          x509.AuthorityKeyIdentifier.from_issuer_public_key(
              authority.public_key()
          ),
          False,
      )
      .sign(authority, hashes.SHA256())
  )
  _write(folder / 'ca.crt', ca.public_bytes(pem))
  _write(folder / 'server.pem', server.public_bytes(pem))
  secret = key.private_bytes(pem, private.PKCS8, nothing)
  _write(folder / 'server.key', secret, 0o600)
  for i in range(_NUM_NODES.value):
    node = ec.generate_private_key(ec.SECP384R1())
    secret = node.private_bytes(pem, private.OpenSSH, nothing)
    _write(folder / f'node{i}.key', secret, 0o600)
    public = node.public_key().public_bytes(
        openssh, serialization.PublicFormat.OpenSSH
    )
    _write(folder / f'node{i}.pub', public + b'\n')


def _builder(subject, issuer, key):
  now = datetime.datetime.now(datetime.UTC)
  public = key.public_key()
  return (
      x509.CertificateBuilder()
      .subject_name(subject)
      .issuer_name(issuer)
      .public_key(public)
      .serial_number(x509.random_serial_number())
      .not_valid_before(now - datetime.timedelta(hours=1))  # Clocks differ.
      .not_valid_after(now + datetime.timedelta(days=_DAYS.value))
      .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
  )


def _usage(signs: bool) -> x509.KeyUsage:
  return x509.KeyUsage(
      digital_signature=not signs,
      content_commitment=False,
      key_encipherment=False,
      data_encipherment=False,
      key_agreement=False,
      key_cert_sign=signs,
      crl_sign=signs,
      encipher_only=False,
      decipher_only=False,
  )


def _name(text: str) -> x509.Name:
  return x509.Name([x509.NameAttribute(oid.NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
  try:
    return x509.IPAddress(ipaddress.ip_address(text))
  except ValueError:
    return x509.DNSName(text)


def _write(path: pathlib.Path, content: bytes, mode: int = 0o644) -> None:
  flags_ = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
  with os.fdopen(os.open(path, flags_, mode), 'wb') as f:
    f.write(content)


if __name__ == '__main__':
  app.run(main)
