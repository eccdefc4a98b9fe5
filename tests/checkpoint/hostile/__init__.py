"""Files and folders that somebody made to do harm, or that broke, and what people are told of each."""
