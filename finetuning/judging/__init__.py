"""Who says what is harm; only guards.py loads torch.

Guests mainly use `guards.open_judge`, `judges.JUDGES` and `catalogue.parts_of`.
"""
