"""HTTP in front of the worker: connections, routes and the APIs that clients speak."""
