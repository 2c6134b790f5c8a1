"""What the model learns from: masked patches, masked words, alignment of pairs."""
