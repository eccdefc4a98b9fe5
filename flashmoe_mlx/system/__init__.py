"""Services of the operating system: files, threads, memory and package data."""
