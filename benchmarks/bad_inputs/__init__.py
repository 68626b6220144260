"""Bad inputs by kind (A runs, B rows, C media, D rewards, E models, F environment and commands),
each with the words that its message must hold, and faults of a live Redis."""
