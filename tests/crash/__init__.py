"""A rewrite that is killed, fails or loses power leaves the old file or the new one."""
