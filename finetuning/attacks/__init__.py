"""What attackers send, by name: `catalogue.ATTACKS`."""
