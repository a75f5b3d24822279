"""Coverage-guided fuzzing of whatever reads bytes or text from strangers."""
