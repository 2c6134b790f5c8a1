"""Differential privacy and secure sums; auditable alone, so it imports only batch and config."""
