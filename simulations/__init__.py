"""The researcher's door: whole federations on one machine."""
