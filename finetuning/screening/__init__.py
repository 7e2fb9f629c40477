"""Which rows may train.

Guests use `stage.screen_rows`, `calibration.calibrate`, `quarantine.repair` and `probes.probe`.
"""
