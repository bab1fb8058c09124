"""What the launch scripts share: user errors are one line, not a traceback."""

from collections.abc import Callable

from absl import app
from absl import flags
from absl import logging

from bernoulli_lora_jax.training import loop


def run(main: Callable[[list[str]], None]) -> None:
  """Runs main([program]) after parsing the flags; exits 1 on a user's error."""
  app.run(lambda argv: guarded(main, argv), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except AttributeError as e:  # ml_collections: a field that does not exist.
    raise SystemExit(f'Unknown config field: {e}') from e
  except flags.Error as e:
    # ml_collections puts the traceback of a config file into the message: its
    # last line is the error.
    text = str(e)
    is_traced = 'Traceback' in text
    raise SystemExit(
        text.strip().splitlines()[-1] if is_traced else text
    ) from e
  except OSError as e:  # ml_collections: a config file that cannot be read.
    raise SystemExit(' '.join(str(e).split())) from e


def guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
  """Runs main(argv); exits 1 with one line on a user's error."""
  logging.set_verbosity(logging.WARNING)  # Orbax speaks at INFO.
  try:
    main(argv)
  except (
      ValueError,
      TypeError,
      KeyError,
      OSError,
      loop.DivergedError,
  ) as e:
    logging.debug('Traceback:', exc_info=True)
    raise SystemExit(f'{type(e).__name__}: {e}') from e
