-- Returns how many expired leases went back to the queue.
return reap(meta(), now_ms(), 100000)
