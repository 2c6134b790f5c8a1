"""How data sets lie on disk: each layout turns a root folder into studies, without opening an image.

One file a data set; ``records.py`` has the shared words, ``paths.py`` opens what a cell names, ``registry.py`` knows all.
"""
