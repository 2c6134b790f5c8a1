"""One experiment as typed, checked values. Deep code never takes an Experiment: it gets the piece it needs."""

from fedmix.config.base import StreamName
from fedmix.config.data import Data, HeldOut, PhantomData, Site, Studies
from fedmix.config.evaluating import Attack, Evaluation, Study
from fedmix.config.experiment import Experiment
from fedmix.config.federating import Aggregation, Federation, Screening, StreamMix, Wire
from fedmix.config.model import Model, WarmStart
from fedmix.config.protecting import Privacy, SecureSum
from fedmix.config.reading import MAX_CONFIG_BYTES, build, json_schema, load, parse, regime, variant
from fedmix.config.training import COMPARING, WEIGHTS, Augment, Objectives, Optimiser, Outer, Stage, sites_of

__all__ = [
    "COMPARING",
    "MAX_CONFIG_BYTES",
    "WEIGHTS",
    "Aggregation",
    "Attack",
    "Augment",
    "Data",
    "Evaluation",
    "Experiment",
    "Federation",
    "HeldOut",
    "Model",
    "Objectives",
    "Optimiser",
    "Outer",
    "PhantomData",
    "Privacy",
    "Screening",
    "SecureSum",
    "Site",
    "Stage",
    "StreamMix",
    "StreamName",
    "Studies",
    "Study",
    "WarmStart",
    "Wire",
    "build",
    "json_schema",
    "load",
    "parse",
    "regime",
    "sites_of",
    "variant",
]
