"""Commands about runs that are over or under way: `avatar runs list` (listing.py), `avatar logs`
(logs.py), `avatar compare` (compare.py). All read run folders and nothing else."""
