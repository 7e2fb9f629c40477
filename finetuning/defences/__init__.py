"""One file a method: its formula as a gradient step, a row weigher or a pruner."""
