"""The one exception tree: everything a user can mend is a FedmixError, and its message says what to do.

Messages carry counts, keys and limits, never a patient id, report text or the name of a site's file: an error may
leave the site in a log or a reply.
"""


class FedmixError(Exception):
    """Root of every error that fedmix raises on purpose; the command line prints it as one sentence."""


class ConfigError(FedmixError):
    """An experiment says something that cannot be run: unknown key, value out of range, contradiction."""


class DataError(FedmixError):
    """Data at this site is missing, unreadable or not what its description says."""


class UpdateError(FedmixError):
    """A site's update does not have the names, shapes, types or counts that the server asked for."""


class RunError(FedmixError):
    """A run cannot start, go on or be resumed: folder, checkpoint, quorum or worker."""


class LedgerError(FedmixError):
    """A ledger is not whole, or an entry cannot be kept; nothing that it should tell of may happen."""


class PolicyError(FedmixError):
    """A hospital's policy does not let a message in or out; the sentence is fit to be sent."""
