"""Measure what a setting costs in quality: perplexity, divergence and tasks."""
