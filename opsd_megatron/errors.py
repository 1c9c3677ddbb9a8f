"""Errors that a user can cause and mend; everything else propagates as it is."""


class UserError(Exception):
    """Bad input: the message says what was given, what was expected and what to change. Command lines exit with 2."""


class ConfigError(UserError):
    """A field of a configuration, or a combination of fields, that cannot work."""


class DataError(UserError):
    """A record, file or tokenizer that does not fit; names file, line and field where there is one."""


class CheckpointError(UserError):
    """A checkpoint that is cut, foreign, incomplete or in the way."""


class ServerError(UserError):
    """The inference server is unreachable, refuses, or answers nonsense."""
