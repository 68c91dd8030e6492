"""What a run's numbers look like: figures with captions, as one HTML page or as PNG files."""
