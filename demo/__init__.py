"""The demo model, a pocket dictionary that calls tools, and a program that talks to it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
