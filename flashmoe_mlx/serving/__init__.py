"""The parts of the server, from a request's bytes to an answer's."""
