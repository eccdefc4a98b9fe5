"""The machine's power supply."""

import psutil


def on_battery() -> bool:
    """Return whether the machine runs on its battery. One without a battery, or of which this is unknown, does not."""
    # Not on every system.
    sensors = getattr(psutil, "sensors_battery", lambda: None)
    battery = sensors()
    return battery is not None and battery.power_plugged is False
