"""From the files of a model folder to tensors and experts: where each one lies, and that it may be trusted."""
