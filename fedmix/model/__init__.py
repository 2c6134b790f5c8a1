"""One transformer over visible image patches and words, and its heads."""
