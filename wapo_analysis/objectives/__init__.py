"""Objectives: token losses, advantages, weights and the policy loss."""
