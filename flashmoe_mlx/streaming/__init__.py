"""Spans of files to slots in memory: read experts and decide which of them stay."""
