"""Files of a model folder to tensors and experts: where each one lies, and whether it may be trusted."""
