"""Which rows may train. Guests use `stage.screen_rows`, `calibration.calibrate`, `probes.probe`, `quarantine.repair`.
"""
