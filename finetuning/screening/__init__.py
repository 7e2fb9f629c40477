"""Which rows may train.

Guests mainly use `stage.screen_rows`, `calibration.calibrate`, `quarantine.repair` and `probes.probe`.
"""
