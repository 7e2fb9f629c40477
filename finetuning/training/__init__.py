"""The training loop and its three slots. Guests use `loop.train`, `state.TrainSetup`, `batches.Batches`,
`checkpoint.restore`.
"""
