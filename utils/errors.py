"""How a program ends early: a user's mistake, a request to stop, a process that lost its peers."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence saying what to do."""


class Stopped(Exception):
    """A run was asked to stop and has been saved; the same command goes on."""


class PeerLost(RuntimeError):
    """Another process of the run has ended or cannot be reached."""
