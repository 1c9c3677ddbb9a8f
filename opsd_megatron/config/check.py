"""How the fields of a config are checked."""

from opsd_megatron.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
