"""Tests, by kind: unit, sim (seeded, virtual time), e2e (real processes and sockets), chaos."""
