"""One attempt at a job, from the claim to the published result; the supervisor is the way in."""
