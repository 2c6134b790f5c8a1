"""A site's files to a prepared shard: what may be decided (options), one study (reading), all of them (pipeline)."""

from fedmix.data.prepare.options import PrepareOptions, PrepareSummary
from fedmix.data.prepare.pipeline import prepare

__all__ = ["PrepareOptions", "PrepareSummary", "prepare"]
