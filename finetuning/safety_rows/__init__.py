"""The operator's rows by role: the invented-hazard world that ships, or a file of the operator's own."""
