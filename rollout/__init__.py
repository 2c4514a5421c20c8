"""Generation and the stream of completions: engines, workers, wire, replay buffer, mixer."""
