"""A base with adapters on it. Guests mainly use `base.load_base`, `adapted.AdaptedBase`, `lora.read`, `losses.row_nll`,
`prefix_cache.PrefixCache`.
"""
