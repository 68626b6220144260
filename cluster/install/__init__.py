"""Steps of `make setup` that pip cannot do."""
