"""Getting items around: what is announced, asked for, held and passed on."""
