"""What a training will take, before anything is taken: memory, steps, tokens, hours, money."""
