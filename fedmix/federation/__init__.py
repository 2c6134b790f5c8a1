"""A site's whole job, what it sends, and how the server adds it up. Knows nothing of Flower."""
