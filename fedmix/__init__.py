"""Federated pre-training of one image-text transformer over hospitals that hold images, reports, or both."""
