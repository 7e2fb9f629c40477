"""The training loop and its three slots. Guests use `loop.train`, `state.TrainSetup`, `batches.Epochs`,
`checkpoint.restore`.
"""
