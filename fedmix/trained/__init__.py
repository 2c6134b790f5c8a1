"""A trained model for people who did not train it: the folder they are given, and what they call."""
