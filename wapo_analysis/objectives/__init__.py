"""Objectives: token losses, advantages, weights and the policy loss of the nine."""
