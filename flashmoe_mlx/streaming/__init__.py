"""From spans of files to slots in memory: reads experts, and decides which of them stay."""
