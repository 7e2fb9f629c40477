"""Jobs: what a policy makes of a request, the moves of a job, leases, how attempts end, the reaper."""
