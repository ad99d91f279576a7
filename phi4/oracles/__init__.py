"""Whether an answer is right: exact, choice, math and code, and the sandbox that runs programs."""
