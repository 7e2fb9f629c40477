"""A customer's file: scanned while it arrives, read again for training, encoded as tokens. No torch."""
