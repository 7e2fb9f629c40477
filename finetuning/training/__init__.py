"""The training loop and its three slots. Guests mainly use `loop.train`, `state.TrainSetup`, `batches.Epochs`,
`checkpoint.restore`.
"""
