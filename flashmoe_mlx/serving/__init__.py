"""HTTP around a generation: connections, routes and the APIs that clients speak."""
