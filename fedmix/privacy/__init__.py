"""Differential privacy; auditable alone, so it imports only batch and config. What every report of an epsilon says with it:"""

UNIT = "patient"  # with all its studies in the site's shard
RELATION = "add or remove one patient"
ACCOUNTANT = "prv"  # of Opacus; its RDP accountant checks it
