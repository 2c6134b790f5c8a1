"""Commands that are long enough for a file of their own; ``fedmix.cli`` puts them behind the front door."""
