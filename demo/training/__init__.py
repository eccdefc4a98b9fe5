"""Data, training, export and scores of the demo model."""
