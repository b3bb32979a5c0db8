"""What the stages share that sample completions of a policy and grade them: label_steps, make_pairs and generate_traces."""
