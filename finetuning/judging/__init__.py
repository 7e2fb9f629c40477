"""Who says what is harm. Guests use `guards.open_judge`, `judges.JUDGES`, `catalogue.parts_of`; only guards.py loads
torch.
"""
