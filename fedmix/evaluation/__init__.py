"""Downstream tasks on a central held-out set: classification, retrieval, regeneration, language."""
