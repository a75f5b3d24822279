"""Tasks: what is asked, and how an answer is judged without running it."""
