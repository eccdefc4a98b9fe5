"""The demo model: a pocket dictionary that calls tools, and everything that makes it."""
