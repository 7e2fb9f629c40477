"""Which recipes there are: the bases' numbers, and every defence and baseline by name. No torch."""
